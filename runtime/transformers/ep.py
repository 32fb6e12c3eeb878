"""SemmoeEP: the expert-parallel implementation "semmoe" of Transformers, for any placement with or
without replicas.

Transformers (5.23, distributed/expert_parallel.py) hands an implementation the batch of this rank
with global expert ids, and the experts' own forward on local ids; families differ only inside that
forward (biases, interleaved or transposed weights, clamped activations), so one implementation
serves all of them, and the router stays in the model's own order.

A layer in five steps, all shapes known on the host after one small exchange:
1. where each choice is served (runtime/layer/permute.py), and the split sizes;
2. rows leave, one per token and rank, with their slots and weights;
3. meanwhile the choices that this rank serves for its own tokens run;
4. received rows run, their weighted outputs are added, one row each goes back;
5. what comes back is added to the tokens, in float32.

Shape letters: T tokens of this rank, K top-k, E experts, R ranks, S slots per rank, D hidden size,
M rows sent, N rows received, L layers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface

from semmoe.runtime.layer.exchange import exchange_sizes, start_rows, wait_for
from semmoe.runtime.layer.permute import (
    find_destinations,
    local_pairs,
    pack_rows,
    received_pairs,
    remote_rows,
    unpack_rows,
)
from semmoe.runtime.ranks.failures import naming
from semmoe.runtime.ranks.stopwatch import Stopwatch
from semmoe.solvers.placement import Placement

NAME = "semmoe"


@dataclass(frozen=True, eq=False)
class LayerTables:
    """Where the experts of one layer are served, for tokens of one rank."""

    layer: int  # counted over MoE layers
    name: str  # for people
    rank_of_E: torch.Tensor  # int64 [E + 1]; the id E is an empty slot, which rank R serves: nobody
    slot_of_E: torch.Tensor  # int64 [E + 1], on that rank
    slots_per_rank: int


@dataclass(frozen=True, eq=False)
class Counters:
    """What one rank did, per layer; integers."""

    tokens_L: np.ndarray  # rows of its own tokens
    activations_L: np.ndarray  # choices of its own tokens
    local_L: np.ndarray  # of them served by itself
    served_L: np.ndarray  # choices that it served, for any rank
    rows_LR: np.ndarray  # rows sent to each rank on dispatch; as many come back
    bytes_LR: (
        np.ndarray
    )  # bytes sent to each rank, both ways of its own rows' trip: what it sent out and what it sent back

    @classmethod
    def zeros(cls, num_layers: int, num_ranks: int) -> "Counters":
        per_layer = [np.zeros(num_layers, np.int64) for _ in range(4)]
        return cls(*per_layer, *(np.zeros((num_layers, num_ranks), np.int64) for _ in range(2)))


@dataclass(eq=False)
class RankState:
    """What the expert layers of a rank share: the clock, the counts, and which rows of the
    current batch are tokens."""

    stopwatch: Stopwatch
    counters: Counters
    valid_T: torch.Tensor | None = field(default=None)  # int64 indices of rows that are not padding; None: all are
    empty_T: torch.Tensor | None = field(default=None)  # bool: rows that no expert serves
    chosen_TK: torch.Tensor = field(default_factory=lambda: torch.zeros((0, 0)))  # choices of the layer that ran last


@dataclass(frozen=True, eq=False)
class ExpertLayer:
    """One expert layer of one rank."""

    tables: LayerTables
    rank: int
    num_ranks: int
    group: dist.ProcessGroup
    state: RankState
    hidden_size: int
    dtype: torch.dtype  # of the rows that travel; weights travel in float32
    top_k: int


# Weighted outputs [P, D] of rows [P, D] for slots [P, 1] and weights [P, 1].
RunExperts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def layer_tables(
    placement: Placement, serving_LRE: np.ndarray, rank: int, names: list[str], device: torch.device
) -> list[LayerTables]:
    """Tables of `rank` for every layer. `serving_LRE`: rank that serves expert e for tokens of
    rank r."""
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


def dispatch_layer(
    layer: ExpertLayer,
    run_experts: RunExperts,
    hidden_TD: torch.Tensor,
    expert_ids_TK: torch.Tensor,
    weight_TK: torch.Tensor,
) -> torch.Tensor:
    """Weighted expert output of each token, [T, D], in the dtype of the hidden rows; 0 for
    padding."""
    state = layer.state
    state.stopwatch.mark("attention")
    rows_TD, weight_TK = hidden_TD.to(layer.dtype), weight_TK.float()
    if state.empty_T is not None:
        expert_ids_TK = expert_ids_TK.masked_fill(state.empty_T[:, None], len(layer.tables.rank_of_E) - 1)
    if state.valid_T is None:
        return _exchange(layer, run_experts, rows_TD, expert_ids_TK, weight_TK).to(hidden_TD.dtype)
    valid_T = state.valid_T
    output_TD = torch.zeros_like(hidden_TD)
    sums_TD = _exchange(layer, run_experts, rows_TD[valid_T], expert_ids_TK[valid_T], weight_TK[valid_T])
    output_TD[valid_T] = sums_TD.to(hidden_TD.dtype)
    return output_TD


def join_empty(layer: ExpertLayer, run_experts: RunExperts) -> None:
    """A rank without tokens takes part in the layer: it serves the others' rows."""
    device = layer.tables.rank_of_E.device
    layer.state.stopwatch.mark("attention")
    hidden_TD = torch.empty((0, layer.hidden_size), dtype=layer.dtype, device=device)
    expert_ids_TK = torch.empty((0, layer.top_k), dtype=torch.int64, device=device)
    _exchange(layer, run_experts, hidden_TD, expert_ids_TK, expert_ids_TK.float())


def _exchange(
    layer: ExpertLayer,
    run_experts: RunExperts,
    hidden_TD: torch.Tensor,
    expert_ids_TK: torch.Tensor,
    weight_TK: torch.Tensor,
) -> torch.Tensor:
    """The five steps; float32 [T, D]."""
    tables, rank, watch = layer.tables, layer.rank, layer.state.stopwatch
    layer.state.chosen_TK = expert_ids_TK
    slots, top_k = tables.slots_per_rank, expert_ids_TK.shape[1]

    def run_pairs(rows_PD: torch.Tensor, slot_P: torch.Tensor, weight_P: torch.Tensor) -> torch.Tensor:
        return run_experts(rows_PD, slot_P[:, None], weight_P[:, None]).float()

    # 1. Who serves what. The one read-back to the host: rows and pairs to and from every rank, and
    # how many rows are tokens.
    to = find_destinations(expert_ids_TK, tables.rank_of_E, tables.slot_of_E, layer.num_ranks)
    tokens_R = torch.full_like(to.rows_R, len(hidden_TD))
    if layer.state.empty_T is not None:
        tokens_R -= layer.state.empty_T.sum()
    sent_R3 = torch.stack([to.rows_R, to.pairs_R, tokens_R], 1)
    watch.mark("dispatch")
    with naming(rank, f"the exchange of split sizes at {tables.name}"):
        sizes_R6 = torch.cat([sent_R3, exchange_sizes(sent_R3, layer.group)], 1)
        sent_rows, sent_pairs, tokens, received_rows, served_pairs, _ = sizes_R6.T.tolist()
    watch.mark("wait")
    sent_rows[rank] = received_rows[rank] = 0
    local, remote = sent_pairs[rank], sum(served_pairs) - served_pairs[rank]
    # 2. Remote rows leave.
    rows = remote_rows(to, weight_TK, rank=rank, slots_per_rank=slots, num_rows=sum(sent_rows))
    packed_MB = pack_rows(hidden_TD, rows)
    with naming(rank, f"dispatch at {tables.name}"):
        packed_NB, travelling = start_rows(packed_MB, sent_rows, received_rows, layer.group)
    watch.mark("dispatch")
    # 3. Local choices run while rows travel.
    output_TD = torch.zeros(hidden_TD.shape, dtype=torch.float32, device=hidden_TD.device)
    if local:
        token_P, slot_P, weight_P = local_pairs(to, weight_TK, rank=rank, num_pairs=local)
        output_TD.index_add_(0, token_P, run_pairs(hidden_TD.index_select(0, token_P), slot_P, weight_P))
    watch.mark("experts")
    with naming(rank, f"dispatch at {tables.name}"):
        wait_for(travelling)
    watch.mark("dispatch")
    # 4. Received rows run; one row each goes back.
    received_ND, slot_NK, weight_NK = unpack_rows(
        packed_NB, hidden_TD.shape[1], top_k, hidden_TD.dtype, weight_TK.dtype
    )
    result_ND = torch.zeros(received_ND.shape, dtype=torch.float32, device=hidden_TD.device)
    if remote:
        row_P, slot_P, weight_P = received_pairs(slot_NK, weight_NK, slots_per_rank=slots, num_pairs=remote)
        result_ND.index_add_(0, row_P, run_pairs(received_ND.index_select(0, row_P), slot_P, weight_P))
    watch.mark("experts")
    with naming(rank, f"combine at {tables.name}"):
        back_MD, travelling = start_rows(result_ND.to(layer.dtype), received_rows, sent_rows, layer.group)
        wait_for(travelling)
    # 5. What came back is added to its tokens.
    output_TD.index_add_(0, rows.token_M, back_MD.float())
    watch.mark("combine")
    counters, number = layer.state.counters, tables.layer
    counters.tokens_L[number] += tokens[rank]
    counters.activations_L[number] += sum(sent_pairs)
    counters.local_L[number] += local
    counters.served_L[number] += local + remote
    counters.rows_LR[number] += sent_rows
    counters.bytes_LR[number] += np.asarray(sent_rows) * packed_MB.shape[1]
    counters.bytes_LR[number] += np.asarray(received_rows) * back_MD.shape[1] * back_MD.element_size()
    return output_TD


class SemmoeEP(EPImplementation):
    """Transformers' view of an expert layer: built once for every experts module.

    The loader sets `experts.semmoe_layer`. A module without it holds the contiguous share of a
    plain `DistributedConfig(ep_size=R, ep_implementation="semmoe")`.
    """

    def __init__(self, experts: nn.Module, ep_mesh: Any, tp_mesh: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        if tp_mesh.size() > 1:
            raise ValueError('ep_implementation="semmoe": every rank holds its own batch, set tp_size=1')
        layer = getattr(experts, "semmoe_layer", None)
        self.layer: ExpertLayer = layer or contiguous_layer(experts, ep_mesh)

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        rows_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        ids_TK, weight_TK = (t.reshape(len(rows_TD), -1) for t in (top_k_index, top_k_weights))
        return dispatch_layer(self.layer, self.experts_forward, rows_TD, ids_TK, weight_TK).reshape(hidden_states.shape)


def contiguous_layer(experts: nn.Module, ep_mesh: Any) -> ExpertLayer:
    """The layer of an experts module that Transformers itself split into contiguous runs."""
    slots, num_ranks = int(experts.num_experts), ep_mesh.size()  # pyright: ignore
    weight = next(experts.parameters())
    expert_E = torch.arange(slots * num_ranks, device=weight.device if weight.device.type != "meta" else None)
    tables = LayerTables(0, "an expert layer", expert_E // slots, expert_E % slots, slots)
    config = experts.config.get_text_config()  # pyright: ignore
    state = RankState(Stopwatch(weight.device), Counters.zeros(1, num_ranks))
    return ExpertLayer(
        tables,
        ep_mesh.get_local_rank(),
        num_ranks,
        ep_mesh.get_group(),
        state,
        int(config.hidden_size),
        weight.dtype,
        int(config.num_experts_per_tok),
    )


def register() -> None:
    """Make "semmoe" known to Transformers as a value of `DistributedConfig.ep_implementation`."""
    EPImplementationInterface.register(NAME, SemmoeEP)
