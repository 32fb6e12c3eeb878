"""What an expert layer of one rank is: where each expert is served, and what the layers of a rank
share.

Shape letters: T tokens, K top-k, L MoE layers, R ranks, S slots per rank, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from semmoe.runtime.layer.counters import Counters
from semmoe.runtime.ranks.group import Group
from semmoe.runtime.ranks.stopwatch import Stopwatch
from semmoe.solvers.placement import Placement

# Weighted outputs [P, D] of rows [P, D] for slots [P, 1] and weights [P, 1].
RunExperts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class LayerTables:
    """Where the experts of one layer are served, for tokens of one rank."""

    layer: int  # counted over MoE layers
    name: str  # for people
    rank_of_E: torch.Tensor  # int64 [E + 1]; the id E is an empty slot, which rank R serves: nobody
    slot_of_E: torch.Tensor  # int64 [E + 1], on that rank
    slots_per_rank: int


@dataclass(eq=False)
class RankState:
    """What the expert layers of a rank share: the clock, the counts, and which rows of the
    current batch are tokens."""

    stopwatch: Stopwatch
    counters: Counters
    valid_T: torch.Tensor | None = None  # int64 indices of rows that are not padding; None: all are
    empty_T: torch.Tensor | None = None  # bool: rows that no expert serves
    chosen_TK: torch.Tensor = field(default_factory=lambda: torch.zeros((0, 0)))  # choices of the layer that ran last
    instead: "ServeTokens | None" = None  # what runs expert layers in place of the exchange, while a run is probed

    @classmethod
    def fresh(cls, num_layers: int, group: Group) -> "RankState":
        """Nothing counted yet."""
        return cls(Stopwatch(group.device), Counters.zeros(num_layers, group.size))

    def restart(self) -> None:
        """Forget what was counted and measured so far."""
        self.counters = Counters.zeros(len(self.counters.tokens_L), self.counters.rows_LR.shape[1])
        self.stopwatch.restart()


@dataclass(frozen=True, eq=False)
class ExpertLayer:
    """One expert layer of one rank."""

    tables: LayerTables
    group: Group
    state: RankState
    hidden_size: int
    dtype: torch.dtype  # of the rows that travel; weights travel in float32
    top_k: int


# What semmoe.runtime.layer.dispatch.serve_tokens is.
ServeTokens = Callable[[ExpertLayer, RunExperts, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def layer_tables(
    placement: Placement, serving_LRE: np.ndarray, rank: int, names: list[str], device: torch.device
) -> list[LayerTables]:
    """Where the experts of every layer are served for tokens of `rank`.

    Parameters:
        placement: experts of each rank in slot order, in the numbers that the router speaks of.
        serving_LRE: int [L, R, E], the rank that serves expert e for tokens of rank r.
        names: of the layers, for people; as many as the placement has layers.

    Returns:
        One LayerTables per layer, tensors on `device`.
    """
    slot_LRE = np.zeros(serving_LRE.shape, np.int64)
    layer, ranks, slot = np.indices(placement.experts_LRS.shape)
    slot_LRE[layer, ranks, placement.experts_LRS] = slot
    tables = []
    for number, name in enumerate(names):
        rank_of_E = serving_LRE[number, rank].astype(np.int64)
        slot_of_E = slot_LRE[number, rank_of_E, np.arange(placement.num_experts)]
        tables.append(
            LayerTables(
                number,
                name,
                torch.as_tensor(np.append(rank_of_E, placement.num_ranks), device=device),
                torch.as_tensor(np.append(slot_of_E, 0), device=device),
                placement.slots_per_rank,
            )
        )
    return tables
