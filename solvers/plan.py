"""Plan: a placement with where it came from, and its directory on disk (docs/formats.md).

The directory holds plan.json, which people and engines read, and tables.safetensors with the arrays
that schedules and evaluation need. It is written beside its name and renamed, so a plan is there
whole or not at all. Same input and seed give the same bytes: nothing in it depends on the time, the
machine or a path.

Shape letters: L MoE layers, E experts, R ranks, S slots per rank.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from semmoe.profiles.document import line_per_key, read_document
from semmoe.profiles.errors import InputError
from semmoe.profiles.files import new_directory
from semmoe.profiles.trace import TraceInfo
from semmoe.solvers.deployment import Deployment
from semmoe.solvers.evaluate.report import Report
from semmoe.solvers.html import facts_html
from semmoe.solvers.placement import Placement, Topology
from semmoe.solvers.schedule.request_scorer import RequestScorer
from semmoe.solvers.schedule.schedule import Schedule

FORMAT = "semmoe-plan"
VERSION = 1


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

    @classmethod
    def of(cls, info: TraceInfo) -> "ModelFacts":
        return cls(**{f.name: getattr(info, f.name) for f in fields(cls)})

    def check(self, info: TraceInfo, where: str) -> None:
        """Raise InputError where the trace is not one of this model."""
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
        return Deployment(self.placement, self.load_LE, self.topology, self.dispatch, Schedule.from_tables(self.tables))

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
        }
        if "balance" in self.options:
            facts |= {"fitted_on": "expert loads", "scored": "for balance only, on the loads that it was made from"}
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
            "model": {**asdict(self.model), "model_layers": list(self.model.model_layers)},
            "topology": topology,
            "replicas": self.placement.num_replicas,
            "outputs": self.outputs,
            "trace": self.trace,
            "split": self.split,
            "notes": self.notes,
            "scores": self.scores.to_json() if self.scores else {},
            "placement": self.placement.experts_LRS.tolist(),
        }

    def save(self, path: str | Path) -> None:
        """Write the plan directory; a plan that is there already is replaced. Raises InputError
        for any other file or directory, and where it cannot be written."""
        from safetensors.numpy import save

        path = Path(path)
        check_plan_target(path)
        arrays = {"expert_load": self.load_LE.astype(np.int64), "fitted_requests": self.fitted_keys, **self.tables}
        if self.scored:
            arrays |= {"scored_placement": self.scored.placement.experts_LRS}
            arrays |= {"scored_expert_load": self.scored.load_LE.astype(np.int64)}
        tables = save({name: np.ascontiguousarray(a) for name, a in sorted(arrays.items())})
        with new_directory(path, what=f"the plan {path}") as folder:
            (folder / "plan.json").write_text(line_per_key(self.to_json()), encoding="utf-8")
            (folder / "tables.safetensors").write_bytes(tables)

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read and check a plan directory. Raises InputError where it is none, or damaged."""
        path = Path(path)
        facts = read_document(
            (path / "plan.json").read_bytes, str(path), "plan.json", kind="plan", format=FORMAT, version=VERSION
        )
        try:
            model = ModelFacts(**{**facts["model"], "model_layers": tuple(facts["model"]["model_layers"])})
            topology = facts["topology"]
            cost = np.asarray(topology["cost"], np.float64) if topology.get("cost") else None
            experts_LRS = np.asarray(facts["placement"], np.int32)
            tables = _read_tables(path)
            scored = None
            if (scored_LRS := tables.pop("scored_placement", None)) is not None:
                scored_placement = Placement(scored_LRS, model.num_experts)
                scored = ScoredPlacement(scored_placement, tables.pop("scored_expert_load"))
            return cls(
                placement=Placement(experts_LRS, model.num_experts, bool(facts["options"].get("wasted_slots"))),
                topology=Topology(topology["ranks"], topology["nodes"], cost),
                model=model,
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
        except (TypeError, ValueError) as error:
            raise InputError(f"{path / 'plan.json'} is damaged: {error}") from None

    @property
    def outputs(self) -> dict[str, Any]:
        """Which outputs can express the placement, as far as the traces told: a router that chooses
        among groups of consecutive experts keeps its choices only under permutations of whole
        groups, and a permutation has no replicas."""
        why_not, model = "", self.model
        if self.placement.num_replicas:
            why_not = f"{self.placement.num_replicas} replica slots per rank"
        elif 1 <= model.topk_group < model.n_group:
            group_LP = self.placement.physical_to_logical_LP // (model.num_experts // model.n_group)
            group_LGE = group_LP.reshape(len(group_LP), model.n_group, -1)
            num_split = int((group_LGE != group_LGE[:, :, :1]).any(axis=(1, 2)).sum())
            if num_split:
                picks = f"the router picks {model.topk_group} of {model.n_group} groups of experts"
                why_not = f"{picks}, and {num_split} of {len(group_LP)} layers split a group"
        return {"engine_map": True, "ranks_checkpoint": True, "permuted_checkpoint": not why_not, "why_not": why_not}

    @property
    def fingerprint(self) -> str:
        """Short hash of the placement and the model it is for."""
        digest = hashlib.sha256(json.dumps(asdict(self.model), sort_keys=True).encode())
        digest.update(np.ascontiguousarray(self.placement.experts_LRS).tobytes())
        return digest.hexdigest()[:16]


def check_plan_target(path: Path) -> None:
    """Raise InputError where writing a plan to `path` would overwrite something that is not a
    plan."""
    if path.exists() and not (path / "plan.json").is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path} is there and is not a plan: choose another name")
    if not path.absolute().parent.exists():
        raise InputError(f"cannot write the plan {path}: the directory {path.absolute().parent} does not exist")


def _read_tables(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    where = path / "tables.safetensors"
    try:
        return load_file(where)
    except FileNotFoundError:
        raise InputError(f"{path} is not a whole plan: it holds no tables.safetensors") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{where} is damaged: {error}") from None
