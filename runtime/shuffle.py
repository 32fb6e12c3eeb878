"""Shuffled reduce-scatter and all-gather: every token is summed up on the rank where its experts are predicted to be.

Attention over shared heads leaves a partial sum of every token on every rank. The reduce-scatter hands rank d the tokens whose home is d
(arXiv 2503.04398, section on intra-request scheduling); between it and the all-gather, residual, norm, router and experts work on that
slice only. The order is a stable argsort by home, and its inverse restores the tokens. The experts that a slice's router chose ride on the
all-gather (2 bytes each), for they predict the homes of later layers.

Both collectives exchange slices directly: the same bytes as the fused ones, and slices may differ by what does not divide.

Shape letters: T tokens of the batch (the same on every rank), R ranks, D hidden size, K top-k, N tokens of this rank's slice.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from runtime.exchange import exchange_in_rounds, start_rows, wait_for

LARGE_SLICE_BYTES = 1 << 16


class Slices(NamedTuple):
    """Tokens by home: `order_T` lists them rank by rank, counts_R how many each rank has."""

    order_T: np.ndarray  # int64
    counts_R: list[int]

    def own(self, rank: int) -> np.ndarray:
        """Tokens of a rank, in slice order."""
        begin = sum(self.counts_R[:rank])
        return self.order_T[begin : begin + self.counts_R[rank]]


def slices_by_home(home_T: np.ndarray, num_ranks: int) -> Slices:
    """Tokens sorted by home, ties in their own order."""
    return Slices(np.argsort(home_T, kind="stable"), np.bincount(home_T, minlength=num_ranks).tolist())


def contiguous_homes(num_tokens: int, num_ranks: int) -> np.ndarray:
    """Equal consecutive slices, int64 [T]: what a plain reduce-scatter does."""
    return np.arange(num_tokens) // max(1, -(-num_tokens // num_ranks))


def exchange_slices(
    rows_MD: torch.Tensor, slices: Slices, sent_R: list[int], received_R: list[int], group: dist.ProcessGroup
) -> torch.Tensor:
    """Rows to and from every rank: in rounds where they are large, all at once where latency counts. All ranks decide alike."""
    largest = max(slices.counts_R) * rows_MD.shape[1] * rows_MD.element_size()
    if largest >= LARGE_SLICE_BYTES:
        return exchange_in_rounds(rows_MD, sent_R, received_R, group)
    received_ND, work = start_rows(rows_MD, sent_R, received_R, group)
    wait_for(work)
    return received_ND


def scatter_sums(partial_TD: torch.Tensor, slices: Slices, rank: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Sums over all ranks of this rank's slice, [N, D] in the order of the slice."""
    num_ranks, own = len(slices.counts_R), slices.counts_R[rank]
    order_T = torch.from_numpy(slices.order_T).to(partial_TD.device)
    received = exchange_slices(partial_TD[order_T], slices, slices.counts_R, [own] * num_ranks, group)
    return received.view(num_ranks, own, partial_TD.shape[1]).sum(0, dtype=torch.float32).to(partial_TD.dtype)


def gather_slices(
    slice_ND: torch.Tensor, chosen_NK: torch.Tensor, slices: Slices, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden rows [T, D] and chosen experts [T, K] (int16) of all tokens in their own order."""
    num_ranks, own = len(slices.counts_R), len(slice_ND)
    hidden_bytes = slice_ND.contiguous().view(torch.uint8)
    packed_NB = torch.cat([hidden_bytes, chosen_NK.to(torch.int16).contiguous().view(torch.uint8)], 1)
    sent = exchange_slices(packed_NB.repeat(num_ranks, 1), slices, [own] * num_ranks, slices.counts_R, group)
    width = hidden_bytes.shape[1]
    order_T = torch.from_numpy(slices.order_T).to(slice_ND.device)
    hidden_TD = slice_ND.new_empty((len(order_T), slice_ND.shape[1]))
    hidden_TD[order_T] = sent[:, :width].contiguous().view(slice_ND.dtype)
    chosen_TK = torch.empty((len(order_T), chosen_NK.shape[1]), dtype=torch.int16, device=slice_ND.device)
    chosen_TK[order_T] = sent[:, width:].contiguous().view(torch.int16)
    return hidden_TD, chosen_TK
