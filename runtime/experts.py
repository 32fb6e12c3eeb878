"""SemmoeEP: the expert-parallel implementation "semmoe" of Transformers, for any placement with or without replicas.

Transformers (5.23, distributed/expert_parallel.py) hands an implementation the batch of this rank with global expert ids, and the experts'
own forward on local ids; families differ only inside that forward (biases, interleaved or transposed weights, clamped activations), so one
implementation serves all of them, and the router stays in the model's own order.

A layer in five steps, all shapes known on the host after one small exchange:
1. where each choice is served (runtime/permute.py), and the split sizes;
2. rows leave, one per token and rank, with their slots and weights;
3. meanwhile the choices that this rank serves for its own tokens run;
4. received rows run, their weighted outputs are added, one row each goes back;
5. what comes back is added to the tokens, in float32.

Shape letters: T tokens of this rank, K top-k, E experts, R ranks, S slots per rank, D hidden size, M rows sent, N rows received, L layers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface

from runtime.exchange import exchange_sizes, start_rows
from runtime.permute import (
    find_destinations,
    local_pairs,
    pack_rows,
    received_pairs,
    remote_rows,
    row_sections,
    unpack_rows,
)
from runtime.stopwatch import Stopwatch
from solvers.placement import Placement

NAME = "semmoe"


class ExchangeError(RuntimeError):
    """A collective of an expert layer failed or timed out; says which."""


@dataclass(frozen=True, eq=False)
class LayerTables:
    """Where the experts of one layer are served, for tokens of one rank."""

    layer: int  # counted over MoE layers
    name: str  # for people
    rank_of_E: torch.Tensor  # int64 [E]
    slot_of_E: torch.Tensor  # int64 [E], on that rank
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
    """What the expert layers of a rank share: the clock, the counts, and which rows of the current batch are tokens."""

    stopwatch: Stopwatch
    counters: Counters
    valid_T: torch.Tensor | None = field(default=None)  # int64 indices of rows that are not padding; None: all are


@dataclass(frozen=True, eq=False)
class ExpertLayer:
    """One expert layer of this rank: its tables, the group, and the shared state."""

    tables: LayerTables
    rank: int
    group: dist.ProcessGroup
    state: RankState
    num_ranks: int
    run_experts: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    hidden_size: int
    top_k: int


def layer_tables(
    placement: Placement, serving_LRE: np.ndarray, rank: int, names: list[str], device: torch.device
) -> list[LayerTables]:
    """Tables of `rank` for every layer. `serving_LRE`: rank that serves expert e for tokens of rank r."""
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
                torch.as_tensor(rank_of_E, device=device),
                torch.as_tensor(slot_of_E, device=device),
                placement.slots_per_rank,
            )
        )
    return tables


def dispatch_layer(
    layer: ExpertLayer, hidden_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weight_TK: torch.Tensor
) -> torch.Tensor:
    """Weighted expert output of each token, [T, D], in the dtype of the hidden rows."""
    state = layer.state
    state.stopwatch.mark("attention")
    if state.valid_T is None:
        return _exchange(layer, hidden_TD, expert_ids_TK, weight_TK)
    valid_T = state.valid_T
    output_TD = torch.zeros_like(hidden_TD)
    output_TD[valid_T] = _exchange(layer, hidden_TD[valid_T], expert_ids_TK[valid_T], weight_TK[valid_T])
    return output_TD


def join_empty(layer: ExpertLayer, hidden_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    """A rank without tokens takes part in the layer: it serves the others' rows."""
    device = layer.tables.rank_of_E.device
    layer.state.stopwatch.mark("attention")
    _exchange(
        layer,
        torch.empty((0, layer.hidden_size), dtype=hidden_dtype, device=device),
        torch.empty((0, layer.top_k), dtype=torch.int64, device=device),
        torch.empty((0, layer.top_k), dtype=weight_dtype, device=device),
    )


def _exchange(
    layer: ExpertLayer, hidden_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weight_TK: torch.Tensor
) -> torch.Tensor:
    tables, rank, watch = layer.tables, layer.rank, layer.state.stopwatch
    slots = tables.slots_per_rank
    # 1. Who serves what. The one read-back to the host: rows and pairs to and from every rank.
    to = find_destinations(expert_ids_TK, tables.rank_of_E, tables.slot_of_E, layer.num_ranks)
    sizes_R2 = torch.stack([to.rows_R, to.pairs_R], 1)
    watch.mark("dispatch")
    with _naming(layer, "announcing its rows"):
        received_R2 = exchange_sizes(sizes_R2, layer.group)
        (sent_rows, sent_pairs), (received_rows, received_pairs_R) = torch.stack([sizes_R2, received_R2]).mT.tolist()
    watch.mark("wait")
    local = sent_pairs[rank]
    sent_rows[rank] = received_rows[rank] = received_pairs_R[rank] = 0
    # 2. Remote rows leave.
    rows = remote_rows(to, weight_TK, rank=rank, slots_per_rank=slots, num_rows=sum(sent_rows))
    with _naming(layer, "dispatch"):
        packed, travelling = start_rows(pack_rows(hidden_TD, rows), sent_rows, received_rows, layer.group)
    watch.mark("dispatch")
    # 3. Local choices run while rows travel.
    output_TD = torch.zeros(hidden_TD.shape, dtype=torch.float32, device=hidden_TD.device)
    if local:
        token_P, slot_P, weight_P = local_pairs(to, weight_TK, rank=rank, num_pairs=local)
        output_TD.index_add_(0, token_P, _run_pairs(layer, hidden_TD[token_P], slot_P, weight_P))
    watch.mark("experts")
    with _naming(layer, "dispatch"):
        _finish(travelling)
    watch.mark("dispatch")
    # 4. Received rows run; one row each goes back.
    received_ND, slot_NK, weight_NK = unpack_rows(
        packed, hidden_TD.shape[1], weight_TK.shape[1], hidden_TD.dtype, weight_TK.dtype
    )
    result_ND = torch.zeros(received_ND.shape, dtype=torch.float32, device=hidden_TD.device)
    if pairs := sum(received_pairs_R):
        row_P, slot_P, weight_P = received_pairs(slot_NK, weight_NK, slots_per_rank=slots, num_pairs=pairs)
        result_ND.index_add_(0, row_P, _run_pairs(layer, received_ND[row_P], slot_P, weight_P))
    watch.mark("experts")
    with _naming(layer, "combine"):
        back_MD, travelling = start_rows(result_ND.to(hidden_TD.dtype), received_rows, sent_rows, layer.group)
        _finish(travelling)
    # 5. What came back is added to its tokens.
    output_TD.index_add_(0, rows.token_M, back_MD.float())
    watch.mark("combine")
    _count(layer, len(hidden_TD), sent_rows, sent_pairs, received_rows, local + pairs, packed.shape[1], hidden_TD)
    return output_TD.to(hidden_TD.dtype)


def _run_pairs(
    layer: ExpertLayer, hidden_PD: torch.Tensor, slot_P: torch.Tensor, weight_P: torch.Tensor
) -> torch.Tensor:
    """Weighted output of each (row, slot) pair, float32 [P, D], grouped by expert inside the family's own forward."""
    return layer.run_experts(hidden_PD, slot_P[:, None], weight_P[:, None]).float()


def _finish(work: dist.Work | None) -> None:
    if work is not None:
        work.wait()


def _count(
    layer: ExpertLayer,
    num_tokens: int,
    sent_rows: list[int],
    sent_pairs: list[int],
    received_rows: list[int],
    served: int,
    row_bytes: int,
    hidden_TD: torch.Tensor,
) -> None:
    counters, number = layer.state.counters, layer.tables.layer
    counters.tokens_L[number] += num_tokens
    counters.activations_L[number] += sum(sent_pairs)
    counters.local_L[number] += sent_pairs[layer.rank]
    counters.served_L[number] += served
    counters.rows_LR[number] += sent_rows
    result_bytes = hidden_TD.shape[1] * hidden_TD.element_size()
    counters.bytes_LR[number] += np.asarray(sent_rows) * row_bytes + np.asarray(received_rows) * result_bytes


class _naming:
    """Turns a failure of a collective into an ExchangeError that names the layer, the rank and the step."""

    def __init__(self, layer: ExpertLayer, step: str) -> None:
        self._layer, self._step = layer, step

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            reason = str(error).split("\n")[0]
            raise ExchangeError(
                f"rank {self._layer.rank}: {self._step} of {self._layer.tables.name} failed: {reason}"
            ) from error


class SemmoeEP(EPImplementation):
    """Transformers' view of an expert layer. `experts.semmoe_layer` (an ExpertLayer without `run_experts`) is set by the loader."""

    def __init__(self, experts: nn.Module, ep_mesh: Any, tp_mesh: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        if tp_mesh.size() > 1:
            raise ValueError(
                'ep_implementation="semmoe" needs every rank to hold its own batch: set tp_size=1 in the DistributedConfig'
            )
        self.layer = bind_layer(experts, self.experts_forward, ep_mesh)

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return dispatch_layer(self.layer, hidden_states, top_k_index, top_k_weights)
