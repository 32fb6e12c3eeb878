"""An expert layer on many ranks, for any placement with or without replicas: dispatch, experts,
combine.

Five steps, all shapes known on the host after one small exchange:
1. where each choice is served (runtime/layer/permute.py), and the split sizes;
2. rows leave, one per token and rank, with their slots and weights;
3. meanwhile the choices that this rank serves for its own tokens run;
4. received rows run, their weighted outputs are added, one row each goes back;
5. what comes back is added to the tokens, in float32.

`dispatch` hands on a record, `Dispatched`, and `combine` takes it; the counters read it too, and
the clock is marked between the steps (`run_layer`), not in them.

Shape letters: T tokens of this rank, K top-k, E experts, R ranks, D hidden size, M rows sent, N
rows received, P (row, slot) pairs.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from semmoe.runtime.layer.choices import chosen_copies
from semmoe.runtime.layer.exchange import exchange_sizes, start_rows, wait_for
from semmoe.runtime.layer.permute import (
    Destinations,
    Rows,
    find_destinations,
    local_pairs,
    pack_rows,
    received_pairs,
    remote_rows,
    unpack_rows,
)
from semmoe.runtime.layer.tables import ExpertLayer, RunExperts
from semmoe.runtime.ranks.failures import naming


class Sizes(NamedTuple):
    """What the host knows of one pass of a layer, by rank; no rows go from a rank to itself."""

    sent_rows: list[int]
    sent_pairs: list[int]  # choices of this rank's tokens
    received_rows: list[int]
    served_pairs: list[int]  # choices that this rank serves
    tokens: int  # rows that are tokens
    local: int  # choices that this rank serves for its own tokens
    remote: int  # choices that it serves for other ranks


@dataclass(frozen=True, eq=False)
class Dispatched:
    """What `dispatch` hands on: where choices are served, how much of it, and the rows on their
    way."""

    to: Destinations
    sizes: Sizes
    weight_TK: torch.Tensor  # float32
    rows: Rows  # those that left
    packed_MB: torch.Tensor  # their bytes, kept until they are sent
    packed_NB: torch.Tensor  # those that come; filled once `travelling` is done
    travelling: list[dist.Work]
    hidden_size: int
    dtype: torch.dtype  # of hidden values in rows, both ways

    @property
    def row_bytes(self) -> int:
        """Bytes of a row on its way out."""
        return self.packed_MB.shape[1]

    @property
    def result_bytes(self) -> int:
        """Bytes of a row on its way back."""
        return self.hidden_size * self.dtype.itemsize


def serve_tokens(
    layer: ExpertLayer,
    run_experts: RunExperts,
    hidden_TD: torch.Tensor,
    expert_ids_TK: torch.Tensor,
    weight_TK: torch.Tensor,
) -> torch.Tensor:
    """The output of an expert layer for this rank's batch; all ranks call it together.

    Parameters:
        run_experts: weighted outputs of rows for slots of this rank.
        hidden_TD: rows of the batch, padding included (RankState.valid_T says which are tokens).
        expert_ids_TK: int64 [T, K], the router's choice; the id E is no expert.
        weight_TK: floating [T, K], its weights.

    Returns:
        Weighted sum of the chosen experts' outputs [T, D] in the dtype of the rows; 0 for padding.
    """
    state = layer.state
    state.stopwatch.mark("attention")
    rows_TD, weight_TK = hidden_TD.to(layer.dtype), weight_TK.float()
    if state.empty_T is not None:
        expert_ids_TK = expert_ids_TK.masked_fill(state.empty_T[:, None], len(layer.tables.rank_of_E) - 1)
    if state.valid_T is None:
        return run_layer(layer, run_experts, rows_TD, expert_ids_TK, weight_TK).to(hidden_TD.dtype)
    valid_T = state.valid_T
    output_TD = torch.zeros_like(hidden_TD)
    sums_TD = run_layer(layer, run_experts, rows_TD[valid_T], expert_ids_TK[valid_T], weight_TK[valid_T])
    output_TD[valid_T] = sums_TD.to(hidden_TD.dtype)
    return output_TD


def join_empty(layer: ExpertLayer, run_experts: RunExperts) -> None:
    """A rank without tokens takes part in the layer: it serves the others' rows."""
    device = layer.tables.rank_of_E.device
    layer.state.stopwatch.mark("attention")
    hidden_TD = torch.empty((0, layer.hidden_size), dtype=layer.dtype, device=device)
    expert_ids_TK = torch.empty((0, layer.top_k), dtype=torch.int64, device=device)
    run_layer(layer, run_experts, hidden_TD, expert_ids_TK, expert_ids_TK.float())


def run_layer(
    layer: ExpertLayer,
    run_experts: RunExperts,
    hidden_TD: torch.Tensor,
    expert_ids_TK: torch.Tensor,
    weight_TK: torch.Tensor,
) -> torch.Tensor:
    """The five steps, timed and counted; float32 [T, D]. `hidden_TD` in the layer's dtype,
    `weight_TK` in float32."""
    tables, watch = layer.tables, layer.state.stopwatch
    layer.state.chosen_TK = expert_ids_TK
    if layer.state.unmoved is not None:
        layer.state.unmoved(tables.layer, expert_ids_TK)
    # 1. Who serves what.
    to = find_destinations(*chosen_copies(tables, expert_ids_TK), layer.group.size)
    watch.mark("dispatch")
    sizes = agree_on_sizes(layer, to)
    watch.mark("wait")
    # 2. Remote rows leave.
    sent = dispatch(layer, to, sizes, hidden_TD, weight_TK)
    watch.mark("dispatch")
    # 3. Local choices run while rows travel.
    output_TD = run_own_rows(layer, run_experts, sent, hidden_TD)
    watch.mark("experts")
    arrive(layer, sent)
    watch.mark("dispatch")
    # 4. Received rows run.
    result_ND = run_received_rows(layer, run_experts, sent)
    watch.mark("experts")
    # 5. One row each goes back and is added to its token.
    combine(layer, sent, result_ND, output_TD)
    watch.mark("combine")
    layer.state.counters.add(tables.layer, sent)
    return output_TD


def agree_on_sizes(layer: ExpertLayer, to: Destinations) -> Sizes:
    """The one read-back to the host: rows and pairs to and from every rank, and how many rows are
    tokens."""
    group, rank = layer.group, layer.group.rank
    tokens_R = torch.full_like(to.rows_R, len(to.rank_TK))
    if layer.state.empty_T is not None:
        tokens_R -= layer.state.empty_T.sum()
    sent_R3 = torch.stack([to.rows_R, to.pairs_R, tokens_R], 1)
    with naming(rank, f"the exchange of split sizes at {layer.tables.name}"):
        sizes_R6 = torch.cat([sent_R3, exchange_sizes(sent_R3, group.handle)], 1)
        sent_rows, sent_pairs, tokens, received_rows, served_pairs, _ = sizes_R6.T.tolist()
    sent_rows[rank] = received_rows[rank] = 0
    local = sent_pairs[rank]
    remote = sum(served_pairs) - served_pairs[rank]
    return Sizes(sent_rows, sent_pairs, received_rows, served_pairs, tokens[rank], local, remote)


def dispatch(
    layer: ExpertLayer, to: Destinations, sizes: Sizes, hidden_TD: torch.Tensor, weight_TK: torch.Tensor
) -> Dispatched:
    """Send every token's row once to each other rank that serves some of its choices."""
    rank, slots = layer.group.rank, layer.tables.slots_per_rank
    rows = remote_rows(to, weight_TK, rank=rank, slots_per_rank=slots, num_rows=sum(sizes.sent_rows))
    packed_MB = pack_rows(hidden_TD, rows)
    with naming(rank, f"dispatch at {layer.tables.name}"):
        packed_NB, travelling = start_rows(packed_MB, sizes.sent_rows, sizes.received_rows, layer.group.handle)
    kind = hidden_TD.shape[1], layer.dtype
    return Dispatched(to, sizes, weight_TK, rows, packed_MB, packed_NB, travelling, *kind)


def arrive(layer: ExpertLayer, sent: Dispatched) -> None:
    """Wait for the rows of other ranks."""
    with naming(layer.group.rank, f"dispatch at {layer.tables.name}"):
        wait_for(sent.travelling)


def run_own_rows(
    layer: ExpertLayer, run_experts: RunExperts, sent: Dispatched, hidden_TD: torch.Tensor
) -> torch.Tensor:
    """The choices that this rank serves for its own tokens, summed per token; float32 [T, D]."""
    output_TD = torch.zeros(hidden_TD.shape, dtype=torch.float32, device=hidden_TD.device)
    if sent.sizes.local:
        pairs = local_pairs(sent.to, sent.weight_TK, rank=layer.group.rank, num_pairs=sent.sizes.local)
        add_pairs(output_TD, run_experts, hidden_TD, *pairs)
    return output_TD


def run_received_rows(layer: ExpertLayer, run_experts: RunExperts, sent: Dispatched) -> torch.Tensor:
    """The choices that this rank serves for others, summed per row; float32 [N, D]."""
    top_k = sent.weight_TK.shape[1]
    received_ND, slot_NK, weight_NK = unpack_rows(
        sent.packed_NB, sent.hidden_size, top_k, sent.dtype, sent.weight_TK.dtype
    )
    result_ND = torch.zeros(received_ND.shape, dtype=torch.float32, device=received_ND.device)
    if sent.sizes.remote:
        pairs = received_pairs(
            slot_NK, weight_NK, slots_per_rank=layer.tables.slots_per_rank, num_pairs=sent.sizes.remote
        )
        add_pairs(result_ND, run_experts, received_ND, *pairs)
    return result_ND


def add_pairs(
    sums_ND: torch.Tensor,
    run_experts: RunExperts,
    hidden_ND: torch.Tensor,
    row_P: torch.Tensor,
    slot_P: torch.Tensor,
    weight_P: torch.Tensor,
) -> None:
    """Add each pair's weighted output to the sum of its row."""
    output_PD = run_experts(hidden_ND.index_select(0, row_P), slot_P[:, None], weight_P[:, None])
    sums_ND.index_add_(0, row_P, output_PD.float())


def combine(layer: ExpertLayer, sent: Dispatched, result_ND: torch.Tensor, output_TD: torch.Tensor) -> None:
    """Send results back and add what comes to its tokens in `output_TD`."""
    sizes = sent.sizes
    with naming(layer.group.rank, f"combine at {layer.tables.name}"):
        back_MD, travelling = start_rows(
            result_ND.to(layer.dtype), sizes.received_rows, sizes.sent_rows, layer.group.handle
        )
        wait_for(travelling)
    output_TD.index_add_(0, sent.rows.token_M, back_MD.float())
