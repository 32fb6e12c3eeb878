"""Rows between pairs of ranks, and how many ranks a token reaches: what pictures and learning
curves need beside the metrics.

Shape letters: L MoE layers, T tokens, K top-k, E experts, R ranks.
"""

from collections.abc import Iterable

import numpy as np

from semmoe.profiles.trace import TraceBatch, TraceInfo
from semmoe.solvers.evaluate.metrics import Homes


def rank_rows_LRR(
    batches: Iterable[TraceBatch],
    info: TraceInfo,
    serving_LRE: np.ndarray,
    *,
    dispatch: str,
    homes: Homes | None = None,
) -> np.ndarray:
    """Rows from the rank where a token lives (first axis) to the rank that serves it (second), per
    token, float64 [L, R, R].

    The diagonal holds what stays on a rank. `serving_LRE`: rank that serves expert e for a token of
    rank r, integers [L, R, E]. One row per token and rank, or per token and expert where `dispatch`
    is "per-expert". `homes` None: every token lives on a uniformly random rank, and each rank sends
    its share of the expectation.
    """
    num_ranks = serving_LRE.shape[1]
    rows_LRR = np.zeros((info.num_layers, num_ranks, num_ranks))
    num_tokens = 0
    replicated = bool((serving_LRE != serving_LRE[:, :1]).any())
    for batch in batches:
        num_tokens += batch.num_tokens
        homes_TL = None if homes is None else homes(batch)
        for layer in range(info.num_layers):
            ids_TK = batch.expert_ids_TLK[:, layer]
            for rank in range(num_ranks):
                if homes_TL is not None:
                    ids_from_TK, share = ids_TK[homes_TL[:, layer] == rank], 1.0
                elif replicated or rank == 0:
                    ids_from_TK, share = ids_TK, 1 / num_ranks
                else:  # the same for every home: copy what rank 0 sends
                    continue
                rows_R = _rows_R(ids_from_TK, serving_LRE[layer, rank], num_ranks, dispatch)
                target = slice(None) if homes_TL is None and not replicated else rank
                rows_LRR[layer, target] += rows_R * share
    return rows_LRR / max(num_tokens, 1)


def _rows_R(ids_TK: np.ndarray, serving_E: np.ndarray, num_ranks: int, dispatch: str) -> np.ndarray:
    """Rows to each rank, int64 [R]: tokens that need it, or activations that it serves."""
    if dispatch == "per-expert":
        ranks_TK = np.append(serving_E, num_ranks)[ids_TK]
        return np.bincount(ranks_TK.reshape(-1), minlength=num_ranks + 1)[:num_ranks]
    masks_T = rank_masks_T(ids_TK, serving_E)
    return np.array([int(((masks_T >> np.uint64(rank)) & np.uint64(1)).sum()) for rank in range(num_ranks)])


def rank_masks_T(ids_TK: np.ndarray, rank_of_E: np.ndarray) -> np.ndarray:
    """Ranks that each token needs, one bit per rank, uint64 [T]; at most 64 ranks. Empty slots
    need none."""
    bit_E = np.append(np.uint64(1) << rank_of_E.astype(np.uint64), np.uint64(0))
    return np.bitwise_or.reduce(bit_E[ids_TK], axis=1)


def reached_T(ids_TK: np.ndarray, rank_of_E: np.ndarray) -> np.ndarray:
    """Number of distinct ranks that each token needs, uint8 [T]; at most 64 ranks."""
    return np.bitwise_count(rank_masks_T(ids_TK, rank_of_E))
