"""Topology and Placement: the records that every solver returns and every consumer reads.

Shape letters: L MoE layers, E experts, R ranks, N nodes, S slots per rank.
"""

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from semmoe.profiles.errors import InputError


@dataclass(frozen=True, eq=False)
class Topology:
    """Ranks on nodes.

    Fields:
        num_ranks: R, ranks of the expert-parallel group.
        num_nodes: N; rank r is on node r // (R / N).
        cost_RR: float [R, R], cost of one row from rank to rank; None where nodes say it all.

    Raises InputError where ranks do not divide over nodes. Source: solvers/placement.py.
    """

    num_ranks: int
    num_nodes: int = 1
    cost_RR: np.ndarray | None = field(default=None)

    def __post_init__(self) -> None:
        if self.num_ranks < 1 or self.num_nodes < 1:
            raise InputError(f"{self.num_ranks} ranks on {self.num_nodes} nodes: both must be at least 1")
        if self.num_ranks % self.num_nodes:
            raise InputError(f"{self.num_ranks} ranks do not divide over {self.num_nodes} nodes")
        if self.cost_RR is not None and self.cost_RR.shape != (self.num_ranks, self.num_ranks):
            raise InputError(f"the cost matrix has shape {list(self.cost_RR.shape)}, expected {[self.num_ranks] * 2}")

    @property
    def ranks_per_node(self) -> int:
        return self.num_ranks // self.num_nodes

    @cached_property
    def node_of_R(self) -> np.ndarray:
        """Node of each rank, int64 [R]; ascending."""
        return np.arange(self.num_ranks) // self.ranks_per_node

    def check_experts(self, num_experts: int) -> None:
        """Raise InputError where the experts cannot be spread evenly."""
        if self.num_ranks > num_experts:
            raise InputError(f"{self.num_ranks} ranks are more than the {num_experts} experts of a layer")
        if num_experts % self.num_ranks:
            raise InputError(f"{num_experts} experts do not divide over {self.num_ranks} ranks")


@dataclass(frozen=True, eq=False)
class Placement:
    """Which experts each rank hosts at each layer. The array's shape makes slots per rank equal.

    Fields:
        experts_LRS: int32 [L, R, S], experts of layer l on rank r in slot order.
        num_experts: E, experts of a layer; S * R - E slots hold replicas.
        may_waste: a rank may hold an expert twice, as EPLB's maps do: the second slot serves
            nothing.

    Raises InputError for an expert without a slot, or twice on a rank where that must not be.
    Source: solvers/placement.py.
    """

    experts_LRS: np.ndarray
    num_experts: int
    may_waste: bool = False

    def __post_init__(self) -> None:
        experts = self.experts_LRS
        if experts.ndim != 3:
            raise InputError(f"a placement has the axes [layers, ranks, slots], got shape {list(experts.shape)}")
        if experts.min() < 0 or experts.max() >= self.num_experts:
            bad = experts.min() if experts.min() < 0 else experts.max()
            raise InputError(f"the placement names expert {bad}, the model has experts 0..{self.num_experts - 1}")
        in_order = np.sort(experts, axis=2)
        twice = np.argwhere(in_order[:, :, 1:] == in_order[:, :, :-1])
        if len(twice) and not self.may_waste:
            layer, rank, slot = twice[0]
            raise InputError(f"layer {layer}: expert {in_order[layer, rank, slot]} is twice on rank {rank}")
        homeless = np.argwhere(~self.hosts_LER.any(axis=2))
        if len(homeless):
            raise InputError(f"layer {homeless[0][0]}: expert {homeless[0][1]} is on no rank")

    @classmethod
    def from_ranks(cls, rank_of_LE: np.ndarray, num_ranks: int) -> "Placement":
        """Placement without replicas from each expert's rank, [L, E]; slots in ascending expert
        order."""
        num_layers, num_experts = rank_of_LE.shape
        counts_LR = (rank_of_LE[:, :, None] == np.arange(num_ranks)).sum(1)
        assert (counts_LR * num_ranks == num_experts).all(), "every rank must get the same number of experts"
        order_LE = np.argsort(rank_of_LE, axis=1, kind="stable").astype(np.int32)
        return cls(order_LE.reshape(num_layers, num_ranks, -1), num_experts)

    @property
    def num_layers(self) -> int:
        return self.experts_LRS.shape[0]

    @property
    def num_ranks(self) -> int:
        return self.experts_LRS.shape[1]

    @property
    def slots_per_rank(self) -> int:
        return self.experts_LRS.shape[2]

    @property
    def num_replicas(self) -> int:
        """Slots per rank beyond an even share of the experts."""
        return self.slots_per_rank - self.num_experts // self.num_ranks

    @cached_property
    def num_wasted(self) -> int:
        """Slots of all layers and ranks that hold an expert which their rank holds already."""
        return self.experts_LRS.size - int(self.hosts_LER.sum())

    @cached_property
    def hosts_LER(self) -> np.ndarray:
        """Whether rank r hosts expert e at layer l, bool [L, E, R]."""
        hosts = np.zeros((self.num_layers, self.num_experts, self.num_ranks), bool)
        layer, rank, _ = np.indices(self.experts_LRS.shape)
        hosts[layer, self.experts_LRS, rank] = True
        return hosts

    @property
    def rank_of_LE(self) -> np.ndarray:
        """Rank of each expert, int64 [L, E]. Raises InputError where an expert has replicas."""
        if self.num_replicas:
            raise InputError(
                f"this placement has {self.num_replicas} replica slots per rank: an expert has no single rank"
            )
        return self.hosts_LER.argmax(axis=2)

    @property
    def physical_to_logical_LP(self) -> np.ndarray:
        """Expert in every slot, ranks one after the other, int32 [L, R * S]: the map that
        serving engines read."""
        return self.experts_LRS.reshape(self.num_layers, -1)


def fingerprint_of(model: dict[str, Any], experts_LRS: np.ndarray) -> str:
    """Short hash of a placement and of the model it is for, as plan.json has it; which checkpoint
    was traced does not count."""
    facts = {key: value for key, value in model.items() if key != "checkpoint"}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(experts_LRS).tobytes())
    return digest.hexdigest()[:16]
