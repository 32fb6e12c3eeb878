"""All layers searched, in worker processes, and a placement for any budget of moves.

Shape letters: L MoE layers, E experts, R ranks, S slots per rank, M numbers of moves.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from semmoe.profiles.progress import Progress
from semmoe.solvers.placement import Placement, Topology
from semmoe.solvers.replan.budget import shared_moves_L
from semmoe.solvers.replan.search import Frontier
from semmoe.solvers.replan.steps import Move, steps_between
from semmoe.solvers.replan.tasks import LayerTraffic, NewTraffic
from semmoe.solvers.workers import LayerMap


@dataclass(frozen=True)
class Budget:
    """How much may move.

    Fields:
        share: part of all slots in use; not looked at where `moves` or `per_layer` is given.
        moves: experts in all layers together.
        per_layer: experts in each layer.
        price: gain of its layer, in the worth's unit, that a moved expert must bring.
    """

    share: float = 0.25
    moves: int | None = None
    per_layer: int | None = None
    price: float = 0.0

    def total(self, num_layers: int, slots: int) -> int:
        """Moves of all layers together; `slots`: in use at a layer."""
        if self.per_layer is not None:
            return num_layers * min(self.per_layer, slots)
        allowed = self.moves if self.moves is not None else int(self.share * num_layers * slots + 1e-9)
        return min(allowed, num_layers * slots)

    def most_of_layer(self, num_layers: int, slots: int) -> int:
        """Moves that one layer may get."""
        return min(slots, self.total(num_layers, slots), slots if self.per_layer is None else self.per_layer)


@dataclass(frozen=True, eq=False)
class Replaced:
    """A placement within a budget, and the moves that lead there."""

    placement: Placement
    moves_L: list[list[Move]]  # of each layer, in steps

    @property
    def moved_L(self) -> np.ndarray:
        """Experts that ranks load at each layer, int64 [L]."""
        return np.array([sum(move.kind != "drop" for move in moves) for moves in self.moves_L], np.int64)


@dataclass(frozen=True, eq=False)
class Frontiers:
    """The best that was found at every number of moves, layer by layer."""

    old: Placement
    topology: Topology
    layers: list[Frontier]

    @cached_property
    def gain_LM(self) -> np.ndarray:
        """Fitted gain, float64 [L, M]."""
        return np.stack([layer.gain_M for layer in self.layers])

    def within(self, budget: Budget) -> Replaced:
        """The placement with most fitted gain within the budget."""
        slots = int((self.old.experts_LRS[0] >= 0).sum())
        num_layers = len(self.layers)
        gain_LM = self.gain_LM[:, : budget.most_of_layer(num_layers, slots) + 1]
        moves_L = shared_moves_L(gain_LM, budget.total(num_layers, slots), price=budget.price)
        hosts_LER = [
            layer.hosts_ER(m, self.old.num_experts, self.old.num_ranks)
            for layer, m in zip(self.layers, moves_L, strict=True)
        ]
        found = [
            steps_between(old_RS, hosts_ER, self.topology)
            for old_RS, hosts_ER in zip(self.old.experts_LRS, hosts_LER, strict=True)
        ]
        placement = Placement(np.stack([slots_RS for slots_RS, _ in found]), self.old.num_experts)
        return Replaced(placement, [moves for _, moves in found])


def search_frontiers(traffic: NewTraffic, run: LayerMap, progress: Progress | None = None) -> Frontiers:
    """Frontiers of all layers. Raises InputError where the old placement holds an expert twice on
    a rank."""
    layers = []
    for frontier in run(_search, traffic.layers()):
        layers.append(frontier)
        if progress is not None:
            progress(len(layers), traffic.old.num_layers)
    return Frontiers(traffic.old, traffic.topology, layers)


def _search(layer: LayerTraffic) -> Frontier:
    return layer.search()
