"""Plan: a placement with where it came from, and its directory on disk (docs/formats.md).

The directory holds plan.json, which people and engines read, and tables.safetensors with the arrays
that schedules and evaluation need. It is written beside its name and renamed, so a plan is there
whole or not at all. Same input and seed give the same bytes: nothing in it depends on the time, the
machine or a path.

Shape letters: L MoE layers, E experts, R ranks, S slots per rank.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from semmoe.profiles.checkpoint import IDENTITY
from semmoe.profiles.document import (
    SHA256,
    anything,
    digest_of,
    distinct,
    grid,
    integer,
    line_per_key,
    list_of,
    map_of,
    null_or,
    number,
    read_bounded,
    read_document,
    record,
    text,
    validate,
)
from semmoe.profiles.errors import InputError
from semmoe.profiles.files import check_directory_target, inside, new_directory, write_file
from semmoe.profiles.hub.urls import fetched, is_url
from semmoe.profiles.safetensors_file import map_arrays, read_shard, write_arrays
from semmoe.profiles.trace import MAX_LAYERS, TraceInfo, hash_file
from semmoe.solvers.deployment import Deployment
from semmoe.solvers.evaluate.report import Report
from semmoe.solvers.html import facts_html
from semmoe.solvers.place.replicas import OWN_RULE, check_rule
from semmoe.solvers.placement import EMPTY, Placement, Topology, fingerprint_of, part_sizes
from semmoe.solvers.schedule.request_scorer import RequestScorer
from semmoe.solvers.schedule.schedule import Schedule

FORMAT = "semmoe-plan"
VERSION = 1
TABLES = "tables.safetensors"
MAX_RANKS = 1_000_000
RESIGNED = "plan.json was edited by hand and signed again: its scores are those of before"
NO_DIGEST = "it stores no digest, an older semmoe wrote it"

MODEL = record(
    {
        "model": text(),
        "model_type": text(),
        "num_layers": integer(1, MAX_LAYERS),
        "num_experts": integer(1, 65_535),
        "top_k": integer(1, 65_535),
        "model_layers": distinct(list_of(integer(0, 10 * MAX_LAYERS), most=MAX_LAYERS)),
        "num_model_layers": integer(0, 10 * MAX_LAYERS),
    },
    {"n_group": integer(1, 65_535), "topk_group": integer(0, 65_535), "checkpoint": null_or(IDENTITY)},
)
FACTS = record(
    {
        "made_by": text(),
        "method": text(),
        "seed": integer(-(2**63)),
        "dispatch": text(),
        "load_cap": number(0),
        "options": map_of(anything),
        "model": MODEL,
        "topology": record(
            {"ranks": integer(1, MAX_RANKS), "nodes": integer(1, MAX_RANKS)},
            {"cost": null_or(list_of(list_of(number(0), most=MAX_RANKS), most=MAX_RANKS))},
        ),
        "trace": map_of(anything),
        "split": map_of(anything),
        "notes": list_of(text()),
        "scores": map_of(anything),
        "placement": grid((None, None, None), EMPTY, 65_535),
    },
    {
        "replicas": integer(0, MAX_RANKS),
        "outputs": map_of(anything),
        "tables_sha256": SHA256,
        "digest": SHA256,
    },
)


@dataclass(frozen=True)
class ModelFacts:
    """The model that a placement belongs to."""

    model: str
    model_type: str
    num_layers: int
    num_experts: int
    top_k: int
    model_layers: tuple[int, ...]
    num_model_layers: int
    n_group: int = 1
    topk_group: int = 1
    checkpoint: dict[str, Any] | None = field(default=None, compare=False)  # of the trace: profiles/checkpoint.py

    @classmethod
    def of(cls, info: TraceInfo) -> "ModelFacts":
        return cls(**{f.name: getattr(info, f.name) for f in fields(cls)})

    def to_json(self) -> dict[str, Any]:
        """The object of plan.json; without the checkpoint where none is known."""
        named = {**asdict(self), "model_layers": list(self.model_layers)}
        return {key: value for key, value in named.items() if key != "checkpoint" or value is not None}

    def check(self, info: TraceInfo, where: str) -> None:
        """Raise InputError where the trace is not one of this model, or in another numbering."""
        info.check_numbering(where)
        for name in ("num_layers", "num_experts", "top_k", "model_layers"):
            if getattr(self, name) != getattr(info, name):
                raise InputError(
                    f"{where} has {name} {getattr(info, name)}, the plan is for {name} {getattr(self, name)}"
                )


@dataclass(frozen=True, eq=False)
class ScoredPlacement:
    """What the scores of a refitted plan are about, fitted on the training requests alone."""

    placement: Placement
    load_LE: np.ndarray  # int64 [L, E]: activations of those requests


@dataclass(frozen=True, eq=False)
class Plan:
    """A placement, and what it was made from and for.

    Fields:
        placement: experts of every rank, int32 [L, R, S].
        topology: ranks, nodes, and costs between ranks where they are known.
        model: the model that it is for.
        method, seed, dispatch, load_cap, options: what it was asked for (`Demands`).
        load_LE: int64 [L, E], activations of the requests that the placement was fitted on.
        fitted_keys: uint64, keys of those requests (profiles/split.py), so that none is scored on.
        trace: fingerprints and sizes of the traces that it was made from.
        split: which of their requests were held out.
        scores: the report on held-out requests; None where there is none.
        notes: what could not be kept, a line each.
        made_by: the command.
        tables: arrays of the schedule by name.
        scored: what `scores` are about; None where `placement` itself was scored, and in older
            plans.
        unchecked: files that were read and could not be compared with a hash, and why.

    Raises InputError where the parts do not fit each other. Source: docs/formats.md, "plan".
    """

    placement: Placement
    topology: Topology
    model: ModelFacts
    method: str
    seed: int
    dispatch: str
    load_LE: np.ndarray
    fitted_keys: np.ndarray
    load_cap: float = 1.05
    options: dict[str, Any] = field(default_factory=dict)
    trace: dict[str, Any] = field(default_factory=dict)
    split: dict[str, Any] = field(default_factory=dict)
    scores: Report | None = None
    notes: list[str] = field(default_factory=list)
    made_by: str = ""
    tables: dict[str, np.ndarray] = field(default_factory=dict)
    scored: ScoredPlacement | None = None
    unchecked: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        placement, model = self.placement, self.model
        if placement.num_ranks != self.topology.num_ranks:
            raise InputError(f"the placement has {placement.num_ranks} ranks, its topology {self.topology.num_ranks}")
        if (placement.num_layers, placement.num_experts) != (model.num_layers, model.num_experts):
            raise InputError(
                f"the placement has {placement.num_layers} layers of {placement.num_experts} experts, "
                f"the model {model.num_layers} of {model.num_experts}"
            )

    @cached_property
    def deployment(self) -> Deployment:
        """The placement with its schedule. Raises InputError where the schedule's tables are not
        whole."""
        schedule = Schedule.from_tables(self.tables)
        return Deployment(
            self.placement, self.load_LE, self.topology, self.dispatch, schedule, check_rule(self.replica_choice)
        )

    def with_rule(self, rule: str | None) -> "Plan":
        """The plan with another rule by which copies serve; the same for None."""
        return self if rule is None else replace(self, options={**self.options, "replica_choice": check_rule(rule)})

    @property
    def replica_choice(self) -> str:
        """The rule by which copies serve (solvers/place/replicas.py)."""
        return str(self.options.get("replica_choice", OWN_RULE))

    @property
    def request_scorer(self) -> RequestScorer | None:
        """What scores requests by their prompts; None where the plan has no schedule, or the traces
        had no prompts."""
        schedule = self.deployment.schedule
        return schedule.request if schedule is not None and schedule.has_requests else None

    def facts(self) -> dict[str, Any]:
        """What `semmoe show` tells, by name."""
        placement, outputs = self.placement, self.outputs
        load_LR = (self.load_LE[:, :, None] * (placement.hosts_LER / placement.hosts_LER.sum(2, keepdims=True))).sum(1)
        load_LR = load_LR[load_LR.any(axis=1)]  # layers without any load say nothing of balance
        facts: dict[str, Any] = {
            "kind": "plan",
            "model": self.model.model,
            "layers": placement.num_layers,
            "experts": placement.num_experts,
            "top_k": self.model.top_k,
            "ranks": placement.num_ranks,
            "nodes": self.topology.num_nodes,
            "slots_per_rank": placement.slots_per_rank,
            "replica_slots_per_rank": placement.num_replicas,
            "method": self.method,
            "dispatch": self.dispatch,
            "seed": self.seed,
            "made_by": self.made_by,
            "fingerprint": self.fingerprint,
            "fitted_load_imbalance": float((load_LR.max(1) / load_LR.mean(1)).mean()),
            "fitted_on": "all requests" if self.split.get("refit") else "training requests",
            "phase": self.options.get("phase", "all"),
        }
        if placement.num_copies:
            facts["replica_choice"] = self.replica_choice
        for phase, share in self.options.get("phase_shares", {}).items():
            facts[f"{phase}_share"] = share
        if "balance" in self.options:
            facts |= {"fitted_on": "expert loads", "scored": "for balance only, on the loads that it was made from"}
        if placement.num_copies != placement.num_replicas * placement.num_ranks:
            facts["copies_per_layer"] = placement.num_copies
        if placement.num_empty:
            facts["empty_slots_per_layer"] = placement.num_empty // placement.num_layers
        if placement.num_wasted:
            facts["wasted_slots"] = placement.num_wasted
        possible = "possible" if outputs["permuted_checkpoint"] else f"not possible: {outputs['why_not']}"
        facts["permuted_checkpoint"] = possible
        for row in self.scores.rows if self.scores else []:
            if row.schedule == "random":
                facts[f"held_out_rem_{row.placement}"] = row.rem
        return facts | ({"notes": self.notes} if self.notes else {})

    def _repr_html_(self) -> str:
        """What a notebook shows: the facts, and the scores on held-out requests."""
        shown = {name: f"{v:.3f}" if isinstance(v, float) else v for name, v in self.facts().items() if v != ""}
        return facts_html("semmoe plan", shown) + (self.scores._repr_html_() if self.scores else "")

    def to_json(self) -> dict[str, Any]:
        """The content of plan.json."""
        topology: dict[str, Any] = {"ranks": self.topology.num_ranks, "nodes": self.topology.num_nodes}
        if self.topology.cost_RR is not None:
            topology["cost"] = self.topology.cost_RR.tolist()
        return {
            "format": FORMAT,
            "version": VERSION,
            "made_by": self.made_by,
            "method": self.method,
            "seed": self.seed,
            "dispatch": self.dispatch,
            "load_cap": self.load_cap,
            "options": self.options,
            "model": self.model.to_json(),
            "topology": topology,
            "replicas": self.placement.num_replicas,
            "outputs": self.outputs,
            "trace": self.trace,
            "split": self.split,
            "notes": self.notes,
            "scores": self.scores.to_json() if self.scores else {},
            "placement": self.placement.experts_LRS.tolist(),
        }

    def save(self, path: str | Path, *, beside: Mapping[str, str] | None = None) -> None:
        """Write the plan directory, with texts `beside` its own files by name; a plan that is there
        already is replaced. Raises InputError for any other file or directory, and where it cannot
        be written."""
        path = Path(path)
        check_plan_target(path)
        arrays = {"expert_load": self.load_LE.astype(np.int64), "fitted_requests": self.fitted_keys, **self.tables}
        if self.scored:
            arrays |= {"scored_placement": self.scored.placement.experts_LRS}
            arrays |= {"scored_expert_load": self.scored.load_LE.astype(np.int64)}
        with new_directory(path, what=f"the plan {path}") as folder:
            facts = signed(self.to_json(), write_arrays(folder / TABLES, arrays))
            (folder / "plan.json").write_text(line_per_key(facts), encoding="utf-8")
            for name, content in (beside or {}).items():
                (folder / name).write_text(content, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path, *, accept_edits: bool = False, mapped: bool = False) -> "Plan":
        """Read and check a plan directory. Raises InputError where it is none, damaged, or not as
        it was written; with `accept_edits` a plan.json that was edited passes where all else does,
        with a note of it. A URL that fsspec knows (hf://datasets/OWNER/NAME) is fetched first.

        `mapped`: large tables of a local plan stay in their file until they are looked at, for work
        that may never do so; the file must stay as it is (a plan that replaces it leaves it so).
        """
        if is_url(path):
            with fetched(str(path), ("plan.json", TABLES)) as folder:
                return cls.load(folder, accept_edits=accept_edits)
        path = Path(path)
        facts, unchecked = read_facts(path, accept_edits=accept_edits)
        try:
            model = ModelFacts(**{**facts["model"], "model_layers": tuple(facts["model"]["model_layers"])})
            topology = facts["topology"]
            cost = np.asarray(topology["cost"], np.float64) if topology.get("cost") else None
            may_waste = bool(facts["options"].get("wasted_slots"))
            placement = Placement(np.asarray(facts["placement"], np.int32), model.num_experts, may_waste)
            shapes = (placement.num_layers, placement.num_experts), placement.experts_LRS.shape
            tables = _read_tables(path, *shapes, mapped=mapped)
            scored = None
            if (scored_LRS := tables.pop("scored_placement", None)) is not None:
                scored_placement = Placement(scored_LRS, model.num_experts)
                scored = ScoredPlacement(scored_placement, tables.pop("scored_expert_load"))
            return cls(
                placement=placement,
                topology=Topology(topology["ranks"], topology["nodes"], cost),
                model=model,
                unchecked=unchecked,
                load_LE=tables.pop("expert_load"),
                fitted_keys=tables.pop("fitted_requests"),
                tables=tables,
                scores=Report.from_json(facts["scores"]) if facts["scores"] else None,
                scored=scored,
                **{
                    name: facts[name]
                    for name in (
                        "method",
                        "seed",
                        "dispatch",
                        "load_cap",
                        "options",
                        "trace",
                        "split",
                        "notes",
                        "made_by",
                    )
                },
            )
        except KeyError as error:
            raise InputError(f"{path} is not a whole plan: it lacks {error}") from None
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{path / 'plan.json'} is damaged: {error}") from None
        except InputError as error:
            named = str(error).startswith(str(path))
            raise error if named else InputError(f"{path / 'plan.json'}: {error}") from None

    @property
    def outputs(self) -> dict[str, Any]:
        """Which outputs can express the placement, as far as the traces told: a router that chooses
        among groups of consecutive experts keeps its choices only under permutations of whole
        groups; a permutation has no copies, and shares experts among ranks as the linear split
        does."""
        why_not, model, placement = "", self.model, self.placement
        held_LR = (placement.experts_LRS != EMPTY).sum(axis=2)
        if placement.num_copies:
            why_not = placement.copies_in_words
        elif (held_LR != part_sizes(placement.num_experts, placement.num_ranks)).any():
            why_not = "ranks other than the first ones hold one expert more"
        elif 1 <= model.topk_group < model.n_group:
            group_LP = placement.order_LE // (model.num_experts // model.n_group)
            group_LGE = group_LP.reshape(len(group_LP), model.n_group, -1)
            num_split = int((group_LGE != group_LGE[:, :, :1]).any(axis=(1, 2)).sum())
            if num_split:
                picks = f"the router picks {model.topk_group} of {model.n_group} groups of experts"
                why_not = f"{picks}, and {num_split} of {len(group_LP)} layers split a group"
        return {"engine_map": True, "ranks_checkpoint": True, "permuted_checkpoint": not why_not, "why_not": why_not}

    @property
    def fingerprint(self) -> str:
        """Short hash of the placement and the model it is for."""
        return fingerprint_of(asdict(self.model), self.placement.experts_LRS)


def check_plan_target(path: Path) -> None:
    """Raise InputError where writing a plan to `path` would overwrite something that is not a
    plan."""
    if path.exists() and not (path / "plan.json").is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path} is there and is not a plan: choose another name")
    if not path.absolute().parent.exists():
        raise InputError(f"cannot write the plan {path}: the directory {path.absolute().parent} does not exist")
    check_directory_target(path, what=f"the plan {path}")


def signed(facts: dict[str, Any], tables_sha256: str) -> dict[str, Any]:
    """plan.json with the hash of its tables, and its own."""
    facts = json.loads(json.dumps(facts)) | {"tables_sha256": tables_sha256}
    return {**facts, "digest": digest_of(facts)}


def read_facts(path: Path, *, accept_edits: bool = False) -> tuple[dict[str, Any], dict[str, str]]:
    """plan.json, checked by itself and against its tables; and what could not be checked, as
    Plan.unchecked has it. With `accept_edits` a wrong digest becomes a note in it."""
    where = path / "plan.json"

    def read() -> bytes:
        return read_bounded(where)

    facts = read_document(read, str(path), "plan.json", kind="plan", format=FORMAT, version=VERSION)
    validate(facts, FACTS, str(where))
    if "digest" in facts and digest_of(facts) != facts["digest"]:
        if not accept_edits:
            raise InputError(
                f"{where} was edited after it was written: its digest is not that of its content; where that is meant, "
                f"`semmoe show {path} --accept-edits` checks the rest and signs it again"
            )
        facts["notes"] += [RESIGNED] * (RESIGNED not in facts["notes"])
    tables = inside(path, TABLES, str(path))
    if not tables.is_file():
        raise InputError(f"{path} is not a whole plan: it holds no {TABLES}")
    if "tables_sha256" in facts:
        if hash_file(tables) != facts["tables_sha256"]:
            raise InputError(
                f"{tables} is not what {where} was written with: it was changed, or is the {TABLES} of another plan"
            )
    elif "digest" in facts:
        raise InputError(f"{where} lacks the key 'tables_sha256'")
    return facts, {} if "digest" in facts else {str(path): NO_DIGEST}


def sign_again(path: str | Path) -> Plan:
    """The plan of a directory whose plan.json was edited on purpose, signed again. Raises
    InputError where anything else is wrong with it; then nothing is written."""
    path = Path(path)
    plan = Plan.load(path, accept_edits=True)
    facts = {**read_facts(path, accept_edits=True)[0], "outputs": plan.outputs}
    write_file(path / "plan.json", line_per_key(signed(facts, hash_file(path / TABLES))))
    return plan


def _read_tables(
    path: Path, load_shape: tuple[int, int], placement_shape: tuple[int, ...], *, mapped: bool
) -> dict[str, np.ndarray]:
    """The arrays beside a placement of that shape, with the types and shapes of all that every
    plan has."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    where = path / TABLES
    shard = read_shard(where)
    found = {tensor.name: (tensor.dtype, tensor.shape) for tensor in shard.tensors}
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {"expert_load": ("I64", load_shape)}
    if "scored_placement" in found:
        wanted |= {"scored_placement": ("I32", placement_shape), "scored_expert_load": ("I64", load_shape)}
    wanted["fitted_requests"] = ("U64", found.get("fitted_requests", ("", (0,)))[1][:1] or (0,))
    for name, (dtype, shape) in wanted.items():
        if name not in found:
            raise InputError(f"{where} lacks the tensor {name}")
        if found[name] != (dtype, shape):
            raise InputError(
                f"{where}: {name} is {found[name][0]} {list(found[name][1])}, expected {dtype} {list(shape)}"
            )
    try:
        tables = map_arrays(shard) if mapped else load_file(where)
    except (SafetensorError, OSError, TypeError, KeyError) as error:
        raise InputError(f"{where} is damaged: {error}") from None
    for name, table in tables.items():
        if table.dtype.kind == "f" and not np.isfinite(table).all():
            raise InputError(f"{where}: {name} holds values that are no finite numbers")
        if name.endswith("expert_load") and table.size and table.min() < 0:
            raise InputError(f"{where}: {name} holds {table.min()}, expected counts from 0")
    return map_arrays(shard) if mapped else tables  # in new mappings nothing was looked at yet
