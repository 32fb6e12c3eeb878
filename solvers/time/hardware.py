"""Machines, backends, expert kernels, engines and models: the numbers of hardware.json, each with
its source or the ends between which it is assumed, and what a user says of them resolved to one
record.

Units of the file: TFLOPS (dense), GB/s one way per GPU, microseconds, bytes.
"""

import csv
from dataclasses import dataclass, field, replace
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from semmoe.profiles.config import read_config
from semmoe.profiles.document import parse_json
from semmoe.profiles.errors import InputError
from semmoe.profiles.trace import TraceInfo
from semmoe.solvers.json_record import JsonRecord
from semmoe.solvers.placement import Topology

TABLE = Path(__file__).parent / "hardware.json"
FILE_FORMAT = "semmoe-hardware"
MACHINE_NUMBERS = ("bf16", "fp8", "hbm", "nvl", "nic", "domain")
NEEDED_NUMBERS = ("bf16", "hbm", "nvl", "nic")
PHASES = ("prompt", "generated")
OVERLAPS = ("none", "two-batch")
ROWS = ("bf16", "fp8")
WAYS = ("dispatch", "combine")
FP8_SCALE = 4 / 128  # bytes of scales per value


@dataclass(frozen=True)
class Parameter(JsonRecord):
    """A number of the time model: where it is from, or between which ends it is assumed."""

    name: str
    value: float
    source: str | None = None
    assumed: str | None = None  # why
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Shape(JsonRecord):
    """Sizes of a model's experts."""

    hidden: int
    expert: int
    shared: int  # width of the experts that every token uses, all of a layer together
    weights: str  # a key of the table's experts
    source: str


@dataclass(frozen=True)
class TimeAsked:
    """What is asked of a time: "" and 0 stand for the default of engine, phase or model.

    Fields:
        hardware: name of a machine of hardware.json, or a JSON file of one's own.
        backend: name of a backend.
        tokens_per_rank: tokens of a batch on each rank.
        phase: "prompt" (prefill) or "generated" (decode).
        weights: number type of the experts: "bf16", "fp8" or "mxfp4". rows: of a row on dispatch.
        overlap: "none" or "two-batch".
        other_us: of a layer outside its experts and exchanges, for the whole batch.
        step_ms: of a step of the whole model. gpu_hour: US dollars.
        measured: CSV of measured exchanges and experts.
        engine: name of an engine, which fills the rest.
        hidden_size, expert_size: of the model, where its config.json is not at hand.
    """

    hardware: str
    backend: str = ""
    tokens_per_rank: int = 0
    phase: str = ""
    weights: str = ""
    rows: str = "bf16"
    overlap: str = "none"
    other_us: float = 0.0
    step_ms: float = 0.0
    gpu_hour: float = 0.0
    measured: Path | None = None
    engine: str = ""
    hidden_size: int = 0
    expert_size: int = 0


@dataclass(frozen=True)
class Costing:
    """Everything that turns counts into microseconds."""

    asked: TimeAsked
    hardware: str
    backend: str
    kind: str  # per-rank, per-node, per-expert or gather
    phase: str
    tokens_per_rank: int
    engine: str
    shape: Shape
    weights: str
    peak: str  # the machine's number that the experts' arithmetic is limited by
    parameters: dict[str, Parameter]
    domain: int  # ranks that one fast network joins
    header: int = 0  # bytes of a row beside its values
    balances: bool = False
    own_first: bool = False  # whether experts begin with the rank's own tokens, while others' travel
    schedules: tuple[str, ...] | None = None  # that the engine runs; None: no engine is named
    curves: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)  # measured: size, us
    notes: tuple[str, ...] = ()

    @property
    def values(self) -> dict[str, float]:
        """The numbers by name."""
        return {name: parameter.value for name, parameter in self.parameters.items()}

    @property
    def assumed(self) -> list[Parameter]:
        """Parameters that no source pins and no measurement replaces."""
        return [p for p in self.parameters.values() if p.assumed is not None and p.low != p.high]

    def deployable(self, schedule: str) -> bool:
        """Whether the engine that was named runs the schedule; without a name, whether any does."""
        return schedule in (self.schedules or ("random", "dp-scorer"))

    def row_bytes(self, way: str) -> float:
        """Bytes of a row on dispatch or combine."""
        if way == "combine" or self.asked.rows == "bf16":
            return 2.0 * self.shape.hidden
        return self.shape.hidden * (1 + FP8_SCALE) + self.header


@cache
def table() -> dict[str, Any]:
    """hardware.json as it is."""
    return parse_json(TABLE.read_text(encoding="utf-8"), strict=True)


def nodes_of_ranks(num_ranks: int, ranks_per_node: int, num_nodes: int, domain: int) -> np.ndarray:
    """Fast network of each rank, int64 [R]: the plan's nodes; of one node, or of machines whose
    fast network joins several hosts, as many ranks as that network joins."""
    size = domain if num_nodes == 1 or domain > 8 else ranks_per_node
    return np.arange(num_ranks) // max(size, 1)


def resolve(
    asked: TimeAsked, model: tuple[str, int, int, int], *, num_ranks: int, num_nodes: int, prompts: float
) -> Costing:
    """Everything that is asked, with defaults filled in.

    Parameters:
        model: its name or path, layers, experts and top-k.
        num_ranks, num_nodes: of the deployment.
        prompts: share of the trace's tokens that belong to prompts, for the default phase.

    Raises InputError for names that are not known, sizes that nothing says, and backends that
    cannot be predicted.
    """
    _check_numbers(asked)
    facts = table()
    phase = asked.phase or ("prompt" if prompts > 0.5 else "generated")
    engine = _entry(facts["engines"], asked.engine, "--engine") if asked.engine else None
    machine, found, usual = _machine(asked.hardware)
    name = asked.backend or (engine or {}).get(phase) or usual or facts["phases"][phase]["backend"]
    chosen = _entry(facts["backends"], name, f"{asked.hardware}: backend" if name == usual else "--backend")
    shape = _shape(asked, model)
    weights = asked.weights or shape.weights
    kernel = _entry(facts["experts"], weights, "--weights")
    if kernel["peak"] not in found:
        raise InputError(f"--weights {weights}: {machine} has no {kernel['peak']} peak, give --weights bf16")
    domain = int(found["domain"].value)
    fast = nodes_of_ranks(num_ranks, num_ranks // num_nodes, num_nodes, domain)
    variant = _variant(chosen, machine, several=bool(fast[-1]))
    if variant.get("one_domain") and fast[-1]:
        raise InputError(f"--backend {name} works inside one NVLink domain of {domain} GPUs, not on {num_ranks} ranks")
    curves = _curves(asked, shape)
    if variant.get("needs_measured") and not curves.keys() >= set(WAYS):
        measured = (
            "give measured rows with --measured, or --hardware with a file of semmoe run --replay --write-hardware"
        )
        raise InputError(f"--backend {name} {chosen['unknown']}: {measured}")
    if variant.get("own_first") and asked.overlap != "none":
        raise InputError(f"--overlap {asked.overlap}: --backend {name} runs one batch at a time")
    parameters = dict(found)
    for way in ("dispatch", "combine"):
        given = variant.get(way) or variant["dispatch"]
        where = way if "combine" in variant else "exchange"
        parameters |= {f"{where}.{key}": _parameter(f"{where}.{key}", value) for key, value in given.items()}
    parameters["setup"] = _parameter("setup", variant["setup"])
    numbers = {key: value for key, value in kernel.items() if isinstance(value, dict)}
    numbers["tile"] = facts["phases"][phase]["tile"]
    parameters |= {f"experts.{key}": _parameter(f"experts.{key}", value) for key, value in numbers.items()}
    unused = {"fp8", "bf16"} - {kernel["peak"]} | {"domain"}
    for way in [name for name in (*WAYS, "experts") if name in curves]:
        unused |= {p for p in parameters if p.startswith(f"{way}.") and p != "experts.tile"}
    if curves.keys() >= set(WAYS):
        unused |= {p for p in parameters if p.startswith("exchange.")} | {"setup", "nvl", "nic"}
    notes = (f"{machine} joins {domain} GPUs: ranks beyond that are taken to be behind network cards",) * bool(
        num_nodes == 1 and fast[-1]
    )
    if engine:
        also = ", with dp-scorer through a router or plug-in" if "dp-scorer" in engine["schedules"] else ""
        runs = f"it runs placement{also}; tp-* needs shuffled collectives, today semmoe run"
        notes += (f"{asked.engine}: {engine['about']}; {runs}",)
    return Costing(
        asked=asked,
        hardware=machine,
        backend=name,
        kind=variant["kind"],
        phase=phase,
        tokens_per_rank=asked.tokens_per_rank or facts["phases"][phase]["tokens_per_rank"],
        engine=asked.engine,
        shape=shape,
        weights=weights,
        peak=kernel["peak"],
        parameters={n: p for n, p in parameters.items() if n not in unused},
        domain=domain,
        header=variant.get("header", 0),
        balances=variant.get("balances", False),
        own_first=variant.get("own_first", False),
        schedules=tuple(engine["schedules"]) if engine else None,
        curves=curves,
        notes=notes,
    )


def costing_of(asked: TimeAsked, info: TraceInfo, topology: Topology, *, prompts: float = 0.0) -> Costing:
    """`resolve` for the model of a trace."""
    model = (info.model, info.num_layers, info.num_experts, info.top_k)
    return resolve(asked, model, num_ranks=topology.num_ranks, num_nodes=topology.num_nodes, prompts=prompts)


def _check_numbers(asked: TimeAsked) -> None:
    for name in ("tokens_per_rank", "other_us", "step_ms", "gpu_hour", "hidden_size", "expert_size"):
        value = getattr(asked, name)
        if not (isfinite(value) and value >= 0):
            raise InputError(f"--{name.replace('_', '-')} is {value}, expected a number from 0")
    for name, known in (("phase", ("", *PHASES)), ("overlap", OVERLAPS), ("rows", ROWS)):
        if getattr(asked, name) not in known:
            raise InputError(f"--{name} {getattr(asked, name)!r} is none of {', '.join(filter(None, known))}")
    if asked.overlap == "two-batch" and not asked.other_us:
        raise InputError("--overlap two-batch needs --other-us: the attention behind which exchanges hide")


def _entry(known: dict[str, Any], name: str, option: str) -> Any:
    if name not in known:
        raise InputError(f"{option} {name}: known are {', '.join(known)}")
    return known[name]


def _parameter(name: str, value: dict[str, Any]) -> Parameter:
    if "assumed" in value:
        return Parameter(name, value["value"], None, value["assumed"], value["low"], value["high"])
    return Parameter(name, value["value"], value["source"])


def _variant(chosen: dict[str, Any], machine: str, *, several: bool) -> dict[str, Any]:
    """What a backend is on one node or several, with what differs on a machine."""
    which = "nodes" if several and "nodes" in chosen else "one-node"
    variant = dict(chosen[which])
    for key, value in chosen.get("on", {}).get(machine, {}).get(which, {}).items():
        variant[key] = {**variant[key], **value}
    return variant


def _machine(name: str) -> tuple[str, dict[str, Parameter], str]:
    """Name and numbers of a machine of the table, or of a file, and the backend that a file was
    measured with."""
    known = table()["machines"]
    if name in known:
        return name, {key: _parameter(key, value) for key, value in known[name].items()}, ""
    path = Path(name)
    if not path.is_file():
        raise InputError(f"--hardware {name}: no file, and known machines are {', '.join(known)}")
    given = _own_machine(path)
    numbers = {key: given[key] for key in MACHINE_NUMBERS if key in given}
    lacking = [key for key in NEEDED_NUMBERS if key not in numbers]
    if lacking:
        raise InputError(f"{path} lacks {', '.join(lacking)}: TFLOPS, GB/s one way per GPU")
    found = {}
    for key, value in ({"domain": 8} | numbers).items():
        plain = value if isinstance(value, dict) else {"value": value, "source": path.name}
        if not isinstance(plain.get("value"), int | float) or not 0 < plain["value"] < 1e9:
            raise InputError(f"{path}: {key} is {str(value)[:40]}, expected a positive number or an object with value")
        ends = [plain.get("low", plain["value"]), plain.get("high", plain["value"])]
        assumed = str(plain["assumed"]) if "assumed" in plain else None
        source = None if assumed else str(plain.get("source", path.name))
        low, high = ends if assumed else (None, None)
        found[key] = Parameter(key, float(plain["value"]), source, assumed, low, high)
    return str(given.get("name", path.stem)), found, str(given.get("backend", ""))


def _own_machine(path: Path) -> dict[str, Any]:
    try:
        given = parse_json(path.read_text(encoding="utf-8"), strict=True)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not JSON: {error}"
        raise InputError(f"--hardware {path} cannot be read: {reason}") from None
    if not isinstance(given, dict) or given.get("format", FILE_FORMAT) != FILE_FORMAT:
        raise InputError(f"--hardware {path}: expected an object with {', '.join(MACHINE_NUMBERS)}")
    return given


def _shape(asked: TimeAsked, model: tuple[str, int, int, int]) -> Shape:
    """Sizes as given, else of the model's config.json, else of a known model with as many layers,
    experts and choices."""
    name, layers, experts, top_k = model
    known = [m for m in table()["models"] if (m["layers"], m["experts"], m["top_k"]) == (layers, experts, top_k)]
    like = known[0] if known else {"shared": 0, "weights": "bf16"}
    if asked.hidden_size and asked.expert_size:
        return Shape(asked.hidden_size, asked.expert_size, 0, like["weights"], "--hidden-size and --expert-size")
    config = Path(name) / "config.json" if name else Path("")
    sizes: dict[str, Any] = {}
    if config.is_file():
        facts = read_config(config)
        sizes = facts.get("text_config") or facts
    hidden = asked.hidden_size or sizes.get("hidden_size")
    expert = asked.expert_size or sizes.get("moe_intermediate_size") or sizes.get("intermediate_size")
    if isinstance(hidden, int) and isinstance(expert, int):
        shared = int(sizes.get("n_shared_experts") or 0) * expert
        return Shape(hidden, expert, shared, like["weights"], f"{config}")
    if not known:
        raise InputError(
            f"sizes of {layers} layers of {experts} experts, top-{top_k}, are not known: give --hidden-size and --expert-size"
        )
    source = f"{like['name']}, which has {layers} layers of {experts} experts, top-{top_k}: {like['source']}"
    shape = Shape(like["hidden"], like["expert"], like["shared"], like["weights"], source)
    return replace(shape, hidden=hidden or shape.hidden, expert=expert or shape.expert)


def _curves(asked: TimeAsked, shape: Shape) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Measured microseconds over size (bytes on the busiest link; activations of a rank for
    "experts"), ascending, from --measured or from the machine's own file."""
    rows: list[tuple[str, float, float]] = []
    if asked.measured is not None:
        rows = _rows_of_csv(asked.measured)
    elif Path(asked.hardware).is_file() and asked.hardware not in table()["machines"]:
        given = _own_machine(Path(asked.hardware)).get("measured", {})
        try:
            of = given.pop("experts_of", None)
            if of is not None and "experts" in given and list(of) != [shape.hidden, shape.expert]:
                sizes = f"{of[0]} x {of[1]} were measured, the model's are {shape.hidden} x {shape.expert}"
                raise InputError(f"{asked.hardware}: experts of {sizes}")
            rows = [(what, float(size), float(us)) for what, found in given.items() for size, us in found]
        except (TypeError, ValueError, AttributeError):
            raise InputError(f'{asked.hardware}: "measured" holds lists of [size, microseconds] by name') from None
    found = {}
    for what in dict.fromkeys(name for name, _, _ in rows):
        pairs = sorted({(size, us) for name, size, us in rows if name == what})
        if len(pairs) < 2 or any(not (isfinite(s) and isfinite(us) and s >= 0 and us > 0) for s, us in pairs):
            raise InputError(f"measured {what}: expected two rows or more, sizes from 0 and microseconds above 0")
        sizes, us = np.array(pairs).T
        found[what] = (sizes, us)
    return {**{way: found["exchange"] for way in WAYS if "exchange" in found}, **found}


def _rows_of_csv(path: Path) -> list[tuple[str, float, float]]:
    """what, size, us of a CSV with the columns `bytes` and `us`, and `what` where there is more
    than exchanges: dispatch, combine, exchange (both), experts (whose bytes are activations)."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        return [(row.get("what") or "exchange", float(row["bytes"]), float(row["us"])) for row in rows]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--measured {path} cannot be read: {error}") from None
    except (KeyError, TypeError, ValueError):
        raise InputError(f"--measured {path}: expected columns bytes and us with numbers, and what") from None
