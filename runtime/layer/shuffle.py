"""Shuffled reduce-scatter and all-gather: every token is summed up on the rank where its experts
are predicted to be.

Attention over shared heads leaves a partial sum of every token on every rank. The reduce-scatter
hands rank d the tokens whose home is d (arXiv 2503.04398, section on intra-request scheduling);
between it and the all-gather, residual, norm, router and experts work on that slice only. The order
of the slices (runtime/serving/equal_slices.py) and its inverse restore the tokens. The experts that
a slice's router chose ride on the all-gather (2 bytes each), for they predict the homes of later
layers.

Both collectives send the bytes of the fused ones. With gloo on CPUs, whose reduce-scatter is an
all-reduce that throws most away, large slices go around a ring, small ones directly.

Shape letters: T tokens of the batch (the same on every rank), R ranks, D hidden size, K top-k, N
tokens of this rank's slice.
"""

import torch
import torch.distributed as dist

from semmoe.runtime.layer.exchange import in_pairs, ring_gather, ring_sum, start_parts, wait_for
from semmoe.runtime.layer.permute import aligned

LARGE_SLICE_BYTES = 1 << 16


def scatter_sums(shuffled_TD: torch.Tensor, counts_R: list[int], rank: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Sums over all ranks of this rank's slice, [N, D] in its order. `shuffled_TD`: this rank's
    partial sums, slice after slice."""
    num_ranks, own = len(counts_R), counts_R[rank]
    part_R = shuffled_TD.split(counts_R)
    if around_the_ring(shuffled_TD, counts_R, group):
        return ring_sum(part_R, group)
    received, work = start_parts(part_R, [own] * num_ranks, group)
    wait_for(work)
    return received.view(num_ranks, own, shuffled_TD.shape[1]).sum(0, dtype=torch.float32).to(shuffled_TD.dtype)


def around_the_ring(rows: torch.Tensor, counts_R: list[int], group: dist.ProcessGroup) -> bool:
    """Whether slices are so large that streams side by side cost more than the R - 1 steps of a
    ring. All ranks decide alike."""
    return max(counts_R) * rows.shape[1] * rows.element_size() >= LARGE_SLICE_BYTES and in_pairs(rows, group)


def pack_slice(slice_ND: torch.Tensor, chosen_NK: torch.Tensor) -> torch.Tensor:
    """Hidden rows and chosen experts (int16) of a slice as bytes, uint8 [N, B]: one gather
    carries both."""
    num_slice, top_k = chosen_NK.shape
    _, row_bytes = slice_sections(slice_ND.shape[1], top_k, slice_ND.dtype)
    packed_NB = torch.empty((num_slice, row_bytes), dtype=torch.uint8, device=slice_ND.device)
    hidden_ND, packed_NK = unpack_slices(packed_NB, slice_ND.shape[1], top_k, slice_ND.dtype)
    hidden_ND.copy_(slice_ND)
    packed_NK.copy_(chosen_NK)
    return packed_NB


def slice_sections(hidden_size: int, top_k: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of a packed row before the chosen experts, and in all."""
    chosen_at = aligned(hidden_size * dtype.itemsize)
    return chosen_at, aligned(chosen_at + 2 * top_k)


def gather_slices(packed_NB: torch.Tensor, counts_R: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """The packed rows of all ranks, slice after slice, [T, B]."""
    if around_the_ring(packed_NB, counts_R, group):
        return ring_gather(packed_NB, counts_R, group)
    gathered_TB, work = start_parts([packed_NB] * len(counts_R), counts_R, group)
    wait_for(work)
    return gathered_TB


def unpack_slices(
    packed_TB: torch.Tensor, hidden_size: int, top_k: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of packed rows: hidden [T, D] and chosen experts int16 [T, K], in the order of
    `packed_TB`."""
    chosen_at, _ = slice_sections(hidden_size, top_k, dtype)
    hidden_TD = packed_TB[:, : hidden_size * dtype.itemsize].view(dtype)
    return hidden_TD, packed_TB[:, chosen_at : chosen_at + 2 * top_k].view(torch.int16)
