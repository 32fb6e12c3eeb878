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
from pathlib import Path
from typing import Any

import numpy as np

from semmoe.profiles.document import line_per_key, read_document
from semmoe.profiles.errors import InputError
from semmoe.profiles.files import new_directory
from semmoe.profiles.trace import TraceInfo
from semmoe.solvers.placement import Placement, Topology

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
class Plan:
    """A placement, and what it was made from and for."""

    placement: Placement
    topology: Topology
    model: ModelFacts
    method: str
    seed: int
    dispatch: str
    load_LE: np.ndarray  # int64 [L, E]: activations of the requests that the placement was fitted on
    fitted_keys: (
        np.ndarray
    )  # uint64: keys of those requests (semmoe.profiles.split.request_keys), so that none is scored on
    load_cap: float = 1.05
    options: dict[str, Any] = field(default_factory=dict)
    trace: dict[str, Any] = field(default_factory=dict)  # fingerprints and sizes of the traces
    split: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)  # the held-out report
    notes: list[str] = field(default_factory=list)
    made_by: str = ""
    tables: dict[str, np.ndarray] = field(default_factory=dict)  # schedule arrays by name

    def __post_init__(self) -> None:
        placement, model = self.placement, self.model
        if placement.num_ranks != self.topology.num_ranks:
            raise InputError(f"the placement has {placement.num_ranks} ranks, its topology {self.topology.num_ranks}")
        if (placement.num_layers, placement.num_experts) != (model.num_layers, model.num_experts):
            raise InputError(
                f"the placement has {placement.num_layers} layers of {placement.num_experts} experts, "
                f"the model {model.num_layers} of {model.num_experts}"
            )

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
            "scores": self.scores,
            "placement": self.placement.experts_LRS.tolist(),
        }

    def save(self, path: Path) -> None:
        """Write the plan directory; a plan that is there already is replaced. Raises InputError
        for any other file or directory."""
        from safetensors.numpy import save

        check_plan_target(path)
        arrays = {"expert_load": self.load_LE.astype(np.int64), "fitted_requests": self.fitted_keys, **self.tables}
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
            return cls(
                placement=Placement(experts_LRS, model.num_experts),
                topology=Topology(topology["ranks"], topology["nodes"], cost),
                model=model,
                load_LE=tables.pop("expert_load"),
                fitted_keys=tables.pop("fitted_requests"),
                tables=tables,
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
                        "scores",
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
