"""The one baseline that a report holds a plan against: what engines do without us, or another
plan.

Verdict, headline, tables and pictures all take the row that `Report.against` names.
"""

from dataclasses import dataclass, replace

import numpy as np

from semmoe.profiles.errors import InputError
from semmoe.solvers.deployment import Deployment
from semmoe.solvers.place.baselines import baselines
from semmoe.solvers.placement import Topology
from semmoe.solvers.plan import ModelFacts, Plan
from semmoe.solvers.slots import Slots

BASELINES = {"contiguous": "contiguous experts", "load": "experts packed by load"}


@dataclass(frozen=True, eq=False)
class Against:
    """What a plan is held against.

    Fields:
        name: a key of BASELINES, or the path of a plan; "": the better of BASELINES, at as many
            slots as the plan has.
        deployment: of a plan; None where `name` is a baseline.
        fitted_keys: uint64, requests that a plan was fitted on (`Plan.fitted_keys`).
    """

    name: str = ""
    deployment: Deployment | None = None
    fitted_keys: np.ndarray | None = None

    @property
    def words(self) -> str:
        """What it is, in a sentence."""
        return words_of(self.name)

    def seen(self, keys_B: np.ndarray) -> np.ndarray:
        """Which requests of these keys (uint64 [B]) it was fitted on, bool [B]."""
        return np.zeros(len(keys_B), bool) if self.fitted_keys is None else np.isin(keys_B, self.fitted_keys)


def words_of(name: str) -> str:
    """A baseline by name, in a sentence."""
    return BASELINES.get(name, f"the plan {name}" if name else "the better of contiguous experts and load packing")


def read_against(text: str | None, model: ModelFacts, topology: Topology) -> Against:
    """What `--against` names: contiguous, load or the directory of a plan; nothing: the better of
    the two. Raises InputError where a plan is not one of this model on as many ranks."""
    if not text or text in BASELINES:
        return Against(text or "")
    plan = Plan.load(text)
    for name in ("num_layers", "num_experts", "top_k", "model_layers"):
        if getattr(plan.model, name) != getattr(model, name):
            raise InputError(
                f"--against {text}: it has {name} {getattr(plan.model, name)}, the plan {getattr(model, name)}"
            )
    sizes = [(t.num_ranks, t.num_nodes) for t in (plan.topology, topology)]
    if sizes[0] != sizes[1]:
        there, here = (f"{ranks} ranks on {nodes} node{'s' * (nodes > 1)}" for ranks, nodes in sizes)
        raise InputError(f"--against {text}: it is for {there}, the plan for {here}")
    name = f"./{text}" if text == "plan" else text  # rows of the plan itself have that name
    return Against(name, plan.deployment, plan.fitted_keys)


def deployments_beside(deployment: Deployment, num_groups: int, against: Against) -> dict[str, Deployment]:
    """What is scored beside a deployment with tokens at random homes, by name: the baselines in as
    many slots, and the plan that it is held against.

    `num_groups`: routing groups of the model, which packing by load puts onto nodes first.
    """
    topology, slots = deployment.topology, Slots.of(deployment.placement)
    placed = baselines(deployment.load_LE, topology, num_groups, slots=slots)
    found = {name: replace(deployment, placement=placement, schedule=None) for name, placement in placed.items()}
    if against.deployment:
        found[against.name] = same_network(against.deployment, deployment)
    return found


def same_network(other: Deployment, deployment: Deployment) -> Deployment:
    """The placement of `other`, tokens at random homes, with the ranks, the dispatch and the
    replica rule of `deployment`."""
    same = {name: getattr(deployment, name) for name in ("topology", "dispatch", "replica_choice")}
    return replace(other, schedule=None, **same)
