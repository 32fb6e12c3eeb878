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

EMPTY = -1  # in a slot that holds no expert


def part_sizes(num_items: int, num_parts: int) -> np.ndarray:
    """Items of each of P parts that share them as evenly as can be, int64 [P]: the first I mod P
    parts get one more, as the linear split of engines does."""
    sizes_P = np.full(num_parts, num_items // num_parts)
    sizes_P[: num_items % num_parts] += 1
    return sizes_P


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
        experts_LRS: int32 [L, R, S], experts of layer l on rank r in slot order; -1 (EMPTY) in the
            last slots of a rank that holds fewer.
        num_experts: E, experts of a layer; any number of ranks may share them, more than E too.
        may_waste: a rank may hold an expert twice, as EPLB's maps do: the second slot serves
            nothing.

    Raises InputError for an expert without a slot, or twice on a rank where that must not be, and
    for an expert behind an empty slot. Source: solvers/placement.py.
    """

    experts_LRS: np.ndarray
    num_experts: int
    may_waste: bool = False

    def __post_init__(self) -> None:
        experts = self.experts_LRS
        if experts.ndim != 3:
            raise InputError(f"a placement has the axes [layers, ranks, slots], got shape {list(experts.shape)}")
        if experts.min() < EMPTY or experts.max() >= self.num_experts:
            bad = experts.min() if experts.min() < EMPTY else experts.max()
            raise InputError(f"the placement names expert {bad}, the model has experts 0..{self.num_experts - 1}")
        behind = np.argwhere((experts[:, :, 1:] != EMPTY) & (experts[:, :, :-1] == EMPTY))
        if len(behind):
            layer, rank, slot = behind[0]
            raise InputError(f"layer {layer}: slot {slot} of rank {rank} is empty and slot {slot + 1} is not")
        in_order = np.sort(experts, axis=2)
        twice = np.argwhere((in_order[:, :, 1:] == in_order[:, :, :-1]) & (in_order[:, :, 1:] != EMPTY))
        if len(twice) and not self.may_waste:
            layer, rank, slot = twice[0]
            raise InputError(f"layer {layer}: expert {in_order[layer, rank, slot]} is twice on rank {rank}")
        homeless = np.argwhere(~self.hosts_LER.any(axis=2))
        if len(homeless):
            raise InputError(f"layer {homeless[0][0]}: expert {homeless[0][1]} is on no rank")

    @classmethod
    def from_ranks(cls, rank_of_LE: np.ndarray, num_ranks: int) -> "Placement":
        """Placement without copies from each expert's rank, [L, E]; slots in ascending expert
        order. Ranks that hold fewer experts than others end in empty slots."""
        num_layers, num_experts = rank_of_LE.shape
        counts_LR = (rank_of_LE[:, :, None] == np.arange(num_ranks)).sum(1)
        least = part_sizes(num_experts, num_ranks)[[-1, 0]]
        assert counts_LR.min() == least[0] and counts_LR.max() == least[1], "ranks must share the experts evenly"
        order_LE = np.argsort(rank_of_LE, axis=1, kind="stable").astype(np.int32)
        experts_LRS = np.full((num_layers, num_ranks, least[1]), EMPTY, np.int32)
        experts_LRS[np.arange(least[1]) < counts_LR[:, :, None]] = order_LE.reshape(-1)
        return cls(experts_LRS, num_experts)

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
        """Slots per rank beyond what holds every expert once."""
        return max(self.slots_per_rank - -(-self.num_experts // self.num_ranks), 0)

    @cached_property
    def num_empty(self) -> int:
        """Slots of all layers and ranks that hold no expert."""
        return int((self.experts_LRS == EMPTY).sum())

    @cached_property
    def num_copies(self) -> int:
        """Slots of a layer that hold an expert beyond its first one, at the layer that has most;
        an expert that is twice on a rank counts."""
        return int((self.experts_LRS != EMPTY).sum(axis=(1, 2)).max()) - self.num_experts

    @cached_property
    def num_wasted(self) -> int:
        """Slots of all layers and ranks that hold an expert which their rank holds already."""
        return self.experts_LRS.size - self.num_empty - int(self.hosts_LER.sum())

    @cached_property
    def hosts_LER(self) -> np.ndarray:
        """Whether rank r hosts expert e at layer l, bool [L, E, R]."""
        hosts = np.zeros((self.num_layers, self.num_experts, self.num_ranks), bool)
        layer, rank, slot = np.nonzero(self.experts_LRS != EMPTY)
        hosts[layer, self.experts_LRS[layer, rank, slot], rank] = True
        return hosts

    @property
    def rank_of_LE(self) -> np.ndarray:
        """Rank of each expert, int64 [L, E]. Raises InputError where an expert has copies."""
        if self.num_copies:
            raise InputError(f"this placement has {self.copies_in_words}: an expert has no single rank")
        return self.hosts_LER.argmax(axis=2)

    def held(self, layer: int, rank: int) -> np.ndarray:
        """Experts of a rank at a layer in slot order, int32, without its empty slots."""
        experts_S = self.experts_LRS[layer, rank]
        return experts_S[experts_S != EMPTY]

    @property
    def order_LE(self) -> np.ndarray:
        """Experts in slot order, ranks one after the other, without the empty slots, int32 [L, E].
        Raises InputError where an expert has copies."""
        if self.num_copies:
            raise InputError(f"this placement has {self.copies_in_words}: it is no order of the experts")
        return self.experts_LRS[self.experts_LRS != EMPTY].reshape(self.num_layers, self.num_experts)

    @property
    def copies_in_words(self) -> str:
        """How many slots hold copies, for a message."""
        if self.num_copies == self.num_replicas * self.num_ranks:
            return f"{self.num_replicas} replica slots per rank"
        copies = "a copy of an expert" if self.num_copies == 1 else f"{self.num_copies} copies of experts"
        return f"{copies} on {self.num_ranks} ranks"

    @property
    def physical_to_logical_LP(self) -> np.ndarray:
        """Expert in every slot, ranks one after the other, int32 [L, R * S], -1 in empty ones: the
        map that serving engines read."""
        return self.experts_LRS.reshape(self.num_layers, -1)


def fingerprint_of(model: dict[str, Any], experts_LRS: np.ndarray) -> str:
    """Short hash of a placement and of the model it is for, as plan.json has it; which checkpoint
    was traced does not count."""
    facts = {key: value for key, value in model.items() if key != "checkpoint"}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(experts_LRS).tobytes())
    return digest.hexdigest()[:16]
