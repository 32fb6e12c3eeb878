"""What runs inside an engine reads of a plan: its placement, its request scorer, its facts.

Either from a plan directory, or from the small one that `semmoe export --to vllm-plugin` writes
(docs/formats.md, "Plug-in directory"). An engine's environment holds numpy and safetensors; nothing
else is imported here, and only the tensors that are needed are read.

Shape letters: L MoE layers, E experts, R ranks, S slots per rank, V ids of prompts, D topics.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from semmoe.profiles.document import (
    SHA256,
    anything,
    boolean,
    digest_of,
    grid,
    integer,
    list_of,
    map_of,
    one_of,
    read_bounded,
    read_document,
    record,
    text,
    validate,
)
from semmoe.profiles.errors import InputError
from semmoe.profiles.files import inside
from semmoe.solvers.placement import fingerprint_of

FORMAT = "semmoe-plugin"
VERSION = 1
FACTS_FILE = "plugin.json"
TABLES_FILE = "tables.safetensors"
VECTORS_FILE = "vectors.json"
ENGINES = ("vllm", "sglang")
TABLES = ("ids_V", "topic_VD", "topic_DR", "mean_V", "weight_VR")  # of the scorer
PLACEMENT, LOAD = "experts_LRS", "expert_load"  # in the plug-in's directory
PLAN_PREFIX = "schedule.request."  # of the scorer's tables in a plan
POWER = 0.7  # of an id's frequency in a prompt: solvers.schedule.request_scorer.POWER
DEFAULTS = {"n_group": 1, "topk_group": 1}  # of ModelFacts

MODEL = record(
    {
        "model": text(),
        "model_type": text(),
        "num_layers": integer(1),
        "num_experts": integer(1, 65_535),
        "top_k": integer(1, 65_535),
        "model_layers": list_of(integer()),
        "num_model_layers": integer(),
    },
    {"n_group": integer(1), "topk_group": integer(), "checkpoint": anything},
)
PLUGIN = record(
    {
        "engine": one_of(*ENGINES),
        "plan": text(200),
        "made_by": text(),
        "model": MODEL,
        "ranks": integer(1),
        "slots": integer(1),
        "replicas": integer(),
        "power": one_of(POWER),
        "request_scorer": boolean,
        "permuted": record({"possible": boolean, "why_not": text()}),
        "tables_sha256": SHA256,
        "digest": SHA256,
    },
)
PLAN = record(
    {
        "model": MODEL,
        "topology": record({"ranks": integer(1), "nodes": integer(1)}),
        "placement": grid((None, None, None), 0, 65_535),
    },
    {"outputs": map_of(anything), "tables_sha256": SHA256, "digest": SHA256},
)


@dataclass(frozen=True, eq=False)
class PlanFacts:
    """A plan, as far as an engine needs it.

    Fields:
        path: where it was read.
        fingerprint: of the plan.
        model: what placement and checkpoint must agree on; keys as in plan.json.
        experts_LRS: int32 [L, R, S], experts of layer l on rank r in slot order.
        load_LE: int64 [L, E], activations of the requests that the plan was fitted on.
        tables: the request scorer's arrays by name (TABLES); empty where the plan has none.
        why_not_permuted: what keeps a permuted checkpoint from expressing the placement; "" for
            nothing.
    """

    path: str
    fingerprint: str
    model: dict[str, Any]
    experts_LRS: np.ndarray
    load_LE: np.ndarray
    tables: dict[str, np.ndarray]
    why_not_permuted: str = ""

    @property
    def num_ranks(self) -> int:
        return self.experts_LRS.shape[1]

    @property
    def orders_LE(self) -> np.ndarray:
        """Expert of the model that stands at each place of a permuted checkpoint, int64 [L, E].
        Raises InputError where no permutation expresses the placement."""
        if self.why_not_permuted:
            raise InputError(f"{self.path}: experts cannot be relabelled at load: {self.why_not_permuted}")
        return self.experts_LRS.reshape(len(self.experts_LRS), -1).astype(np.int64)

    def hosts_LEG(self, num_groups: int) -> np.ndarray:
        """Whether a group of consecutive ranks hosts expert e at layer l, bool [L, E, G]."""
        num_layers, num_ranks, _ = self.experts_LRS.shape
        hosts = np.zeros((num_layers, self.model["num_experts"], num_groups), bool)
        layer, rank, _ = np.indices(self.experts_LRS.shape)
        hosts[layer, self.experts_LRS, rank // (num_ranks // num_groups)] = True
        return hosts


def read_plan_facts(path: str | Path) -> PlanFacts:
    """The facts of a plan directory, or of one that a plug-in's export wrote. Raises InputError
    where it is neither, or damaged."""
    path = Path(path)
    is_plugin = (path / FACTS_FILE).is_file()
    where = path / (FACTS_FILE if is_plugin else "plan.json")
    kind, format = ("plug-in directory", FORMAT) if is_plugin else ("plan", "semmoe-plan")
    facts = read_document(lambda: read_bounded(where), str(path), where.name, kind=kind, format=format, version=VERSION)
    validate(facts, PLUGIN if is_plugin else PLAN, str(where))
    if "digest" in facts and digest_of(facts) != facts["digest"]:
        raise InputError(f"{where} was edited after it was written: its digest is not that of its content")
    tables_file = inside(path, TABLES_FILE, str(path))
    if not tables_file.is_file():
        raise InputError(f"{path} is not a whole {kind}: it holds no {TABLES_FILE}")
    if "tables_sha256" in facts and _hash(tables_file) != facts["tables_sha256"]:
        raise InputError(f"{tables_file} is not what {where} was written with: it was changed")
    read = _plugin_facts if is_plugin else _plan_facts
    found = read(path, facts, _read_tables(tables_file, "" if is_plugin else PLAN_PREFIX, placed=is_plugin))
    _check(found, str(tables_file))
    return found


def _plugin_facts(path: Path, facts: dict[str, Any], tables: dict[str, np.ndarray]) -> PlanFacts:
    experts_LRS, load_LE = tables.pop(PLACEMENT), tables.pop(LOAD)
    why_not = "" if facts["permuted"]["possible"] else facts["permuted"]["why_not"]
    return PlanFacts(str(path), facts["plan"], facts["model"], experts_LRS, load_LE, tables, why_not)


def _plan_facts(path: Path, facts: dict[str, Any], tables: dict[str, np.ndarray]) -> PlanFacts:
    outputs, load_LE = facts.get("outputs", {}), tables.pop(LOAD)
    try:
        experts_LRS = np.asarray(facts["placement"], np.int32)
    except ValueError:
        raise InputError(f"{path}/plan.json: placement is not a table of layers, ranks and slots") from None
    model = {key: value for key, value in facts["model"].items() if key != "checkpoint"}
    replicas = experts_LRS.shape[1] * experts_LRS.shape[2] - model["num_experts"]
    known = f"{replicas // experts_LRS.shape[1]} replica slots per rank" if replicas else ""
    why_not = "" if outputs.get("permuted_checkpoint", not replicas) else str(outputs.get("why_not") or known)
    return PlanFacts(
        str(path), fingerprint_of(DEFAULTS | model, experts_LRS), model, experts_LRS, load_LE, tables, why_not
    )


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_tables(file: Path, prefix: str, *, placed: bool) -> dict[str, np.ndarray]:
    """The scorer's tables without their prefix, the load, and with `placed` the placement. Without
    a scorer none of its tables is there."""
    from safetensors import SafetensorError, safe_open

    wanted = {LOAD: LOAD, **({PLACEMENT: PLACEMENT} if placed else {})}
    try:
        with safe_open(file, framework="numpy") as tensors:
            there = set(tensors.keys())
            if prefix + TABLES[0] in there:
                wanted |= {prefix + name: name for name in TABLES}
            if lacking := sorted(wanted.keys() - there):
                raise InputError(f"{file} lacks the tensor {lacking[0]}")
            return {name: np.asarray(tensors.get_tensor(key)) for key, name in wanted.items()}
    except (SafetensorError, OSError, TypeError) as error:
        raise InputError(f"{file} is damaged: {error}") from None


def _check(plan: PlanFacts, where: str) -> None:
    """Raise InputError where shapes, types or values do not fit each other."""
    num_layers, num_experts = plan.model["num_layers"], plan.model["num_experts"]
    placed = plan.experts_LRS.ndim == 3 and plan.experts_LRS.dtype == np.int32
    if not placed or len(plan.experts_LRS) != num_layers or plan.experts_LRS.max(initial=0) >= num_experts:
        raise InputError(f"{plan.path}: the placement is not one of {num_layers} layers of {num_experts} experts")
    if plan.experts_LRS.min(initial=0) < 0 or not plan.hosts_LEG(1).all():
        raise InputError(f"{plan.path}: the placement leaves an expert without a rank")
    shapes = {LOAD: (plan.load_LE, (num_layers, num_experts), "i")}
    if plan.tables:
        ids_V, topic_VD = plan.tables["ids_V"], plan.tables["topic_VD"]
        sizes = {"V": ids_V.size, "D": topic_VD.shape[-1] if topic_VD.ndim else 0, "R": plan.num_ranks}
        for name, table in plan.tables.items():
            shapes[name] = (
                table,
                tuple(sizes[axis] for axis in name.rpartition("_")[2]),
                "i" if table is ids_V else "f",
            )
        if (np.diff(ids_V.astype(np.int64)) <= 0).any() or ids_V.min(initial=0) < 0:
            raise InputError(f"{where}: ids_V does not ascend from 0")
    for name, (table, shape, kind) in shapes.items():
        if table.shape != shape or table.dtype.kind != kind:
            raise InputError(f"{where}: {name} is {table.dtype} {list(table.shape)}, expected {list(shape)}")
        if kind == "f" and not np.isfinite(table).all():
            raise InputError(f"{where}: {name} holds values that are no finite numbers")
