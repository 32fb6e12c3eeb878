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
from semmoe.solvers.place.replicas import MovingRule, copies_of
from semmoe.solvers.placement import EMPTY, Placement

# Weighted outputs [P, D] of rows [P, D] for slots [P, 1] and weights [P, 1].
RunExperts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Copies:
    """What a rule looks at that chooses copies token by token (solvers/place/replicas.py)."""

    rule: str  # one of MOVING
    rank: int  # of the tokens
    hosts_ER: torch.Tensor  # bool [E + 1, R]; nobody hosts the id E
    copies_EC: torch.Tensor  # int64 [E + 1, C]: ranks of each expert in ascending order; R of the id E
    count_E: torch.Tensor  # int64 [E + 1]: how many they are; 1 of the id E
    slot_RE: torch.Tensor  # int64 [R + 1, E + 1]: slot of each expert on each rank that hosts it


@dataclass(frozen=True, eq=False)
class LayerTables:
    """Where the experts of one layer are served, for tokens of one rank."""

    layer: int  # counted over MoE layers
    name: str  # for people
    rank_of_E: torch.Tensor  # int64 [E + 1]; the id E is an empty slot, which rank R serves: nobody
    slot_of_E: torch.Tensor  # int64 [E + 1], on that rank
    slots_per_rank: int
    copies: Copies | None = None  # None: the static tables say it all


@dataclass(eq=False)
class RankState:
    """What the expert layers of a rank share: the clock, the counts, and which rows of the
    current batch are tokens."""

    stopwatch: Stopwatch
    counters: Counters
    valid_T: torch.Tensor | None = None  # int64 indices of rows that are not padding; None: all are
    empty_T: torch.Tensor | None = None  # bool: rows that no expert serves
    chosen_TK: torch.Tensor = field(default_factory=lambda: torch.zeros((0, 0)))  # choices of the layer that ran last
    unmoved: "Callable[[int, torch.Tensor], None] | None" = (
        None  # hears the choices of each layer once experts have moved
    )
    instead: "ServeTokens | None" = None  # what runs expert layers in place of the exchange, while a run is probed

    @classmethod
    def fresh(cls, num_layers: int, group: Group) -> "RankState":
        """Nothing counted yet."""
        return cls(Stopwatch(group.device), Counters.zeros(num_layers, group.size))

    def restart(self) -> None:
        """Forget what was counted and measured so far."""
        self.counters = Counters.zeros(len(self.counters.tokens_L), self.counters.rows_LR.shape[1])
        self.stopwatch.restart()


@dataclass(eq=False)
class ExpertLayer:
    """One expert layer of one rank; it gets other tables when experts have moved."""

    tables: LayerTables
    group: Group
    state: RankState
    hidden_size: int
    dtype: torch.dtype  # of the rows that travel; weights travel in float32
    top_k: int


# What semmoe.runtime.layer.dispatch.serve_tokens is.
ServeTokens = Callable[[ExpertLayer, RunExperts, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def layer_tables(
    placement: Placement,
    serving_LRE: np.ndarray,
    rank: int,
    names: list[str],
    device: torch.device,
    *,
    moving: MovingRule | None = None,
) -> list[LayerTables]:
    """Where the experts of every layer are served for tokens of `rank`.

    Parameters:
        placement: experts of each rank in slot order, in the numbers that the router speaks of.
        serving_LRE: int [L, R, E], the rank that serves expert e for tokens of rank r.
        names: of the layers, for people; as many as the placement has layers.
        moving: what chooses copies token by token, in place of `serving_LRE`.

    Returns:
        One LayerTables per layer, tensors on `device`.
    """
    slot_LRE = np.zeros(serving_LRE.shape, np.int64)
    layer, ranks, slot = np.nonzero(placement.experts_LRS != EMPTY)
    slot_LRE[layer, ranks, placement.experts_LRS[layer, ranks, slot]] = slot
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
                None if moving is None else _copies(moving, number, slot_LRE[number], rank, device),
            )
        )
    return tables


def _copies(moving: MovingRule, layer: int, slot_RE: np.ndarray, rank: int, device: torch.device) -> Copies:
    """The tables of a rule that moves; `slot_RE`: int64 [R, E]."""
    hosts_ER = moving.hosts_LER[layer]
    copies_EC, count_E = copies_of(hosts_ER)
    tables = {
        "hosts_ER": np.pad(hosts_ER, ((0, 1), (0, 0))),
        "copies_EC": np.pad(copies_EC, ((0, 1), (0, 0)), constant_values=hosts_ER.shape[1]),
        "count_E": np.append(count_E, 1),
        "slot_RE": np.pad(slot_RE, ((0, 1), (0, 1))),
    }
    return Copies(moving.name, rank, **{name: torch.as_tensor(table, device=device) for name, table in tables.items()})
