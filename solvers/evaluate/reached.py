"""Which ranks a token reaches, for any number of ranks: the one count behind REM, the pictures of
traffic, learning curves, replicas and the exact objective of placement.

A token reaches a rank when the rank serves one of its experts; a rank that serves several counts
once. Choices are looked up and sorted by rank, so that the first of each run is a distinct rank,
and nothing grows with the number of ranks.

Shape letters: L MoE layers, T tokens, K top-k, E experts, R ranks.
"""

from typing import NamedTuple

import numpy as np

from semmoe.profiles.trace import TraceBatch
from semmoe.solvers.place.replicas import MovingRule

EXCHANGED_ROWS = 16  # sorted by exchanges up to here: K * (K - 1) / 2 of them


class Reached(NamedTuple):
    """Ranks that tokens need, choices first: what is counted from them then runs along the
    tokens."""

    ranks_KT: np.ndarray  # int16 [K, T], ascending along K: rank that serves each choice, R for an empty slot
    first_KT: np.ndarray  # bool [K, T]: first choice of its rank, so true once for every rank that is reached


def reached_ranks(ids_TK: np.ndarray, serving_RE: np.ndarray, home_T: np.ndarray | None = None) -> Reached:
    """Ranks that serve the choices of every token at one layer.

    Parameters:
        ids_TK: chosen experts, integers [T, K]; E stands for an empty slot, which nobody serves.
        serving_RE: rank that serves expert e for a token that lives on rank r, integers [R, E].
        home_T: rank where each token lives, integers [T]; None where it makes no difference (equal
            rows of `serving_RE`).
    """
    num_ranks = len(serving_RE)
    ranks_KT = _sorted_columns(_serving_KT(ids_TK, serving_RE, home_T))
    return Reached(ranks_KT, first_of_run(ranks_KT) & (ranks_KT < num_ranks))


def reached_of(ranks_TK: np.ndarray, num_ranks: int) -> Reached:
    """The ranks of choices that are known already, integers [T, K]; R for an empty slot."""
    ranks_KT = _sorted_columns(np.ascontiguousarray(ranks_TK.T).astype(np.int16))
    return Reached(ranks_KT, first_of_run(ranks_KT) & (ranks_KT < num_ranks))


def reached_T(ids_TK: np.ndarray, rank_of_E: np.ndarray, num_ranks: int) -> np.ndarray:
    """Number of distinct ranks that each token needs, int64 [T]. `ids_TK`: integers, E for an
    empty slot; `rank_of_E`: integers."""
    return reached_ranks(ids_TK, _alike_RE(rank_of_E, num_ranks)).first_KT.sum(0)


def reached_TR(ids_TK: np.ndarray, rank_of_E: np.ndarray, num_ranks: int) -> np.ndarray:
    """Whether each token needs each rank, bool [T, R]: the table of `reached_T`, where every
    pair is weighed."""
    ranks_KT = _serving_KT(ids_TK, _alike_RE(rank_of_E, num_ranks), None)
    needed_TR = np.zeros((len(ids_TK), num_ranks + 1), bool)
    needed_TR[np.arange(len(ids_TK)), ranks_KT] = True
    return needed_TR[:, :num_ranks]


def rank_rows_LRR(
    batch: TraceBatch,
    serving_LRE: np.ndarray,
    *,
    dispatch: str,
    homes_TL: np.ndarray | None = None,
    moving: MovingRule | None = None,
) -> np.ndarray:
    """Rows from the rank where a token lives to the rank that serves it, per token.

    Parameters:
        batch: tokens with their choices.
        serving_LRE: rank that serves expert e for a token of rank r, integers [L, R, E].
        dispatch: one row per token and expert for "per-expert", else one per token and rank.
        homes_TL: where tokens live, integers [T, L]; None: on a uniformly random rank, and each
            rank sends its share of the expectation.
        moving: what chooses copies token by token, in place of `serving_LRE`.

    Returns:
        float64 [L, R, R], sender first; the diagonal holds what stays on a rank.
    """
    num_layers, num_ranks, _ = serving_LRE.shape
    rows_LRR = np.zeros((num_layers, num_ranks, num_ranks))
    replicated = moving is not None or bool((serving_LRE != serving_LRE[:, :1]).any())

    def rows_R(layer: int, home_T: np.ndarray) -> np.ndarray:
        """Rows between all pairs, flat [R * (R + 1)]; what goes to rank R is not routed."""
        ids_TK = batch.expert_ids_TLK[:, layer]
        if moving is None:
            ranks_KT, first_KT = reached_ranks(ids_TK, serving_LRE[layer], home_T)
        else:
            ranks_KT, first_KT = reached_of(moving.ranks_TK(layer, ids_TK, home_T), num_ranks)
        keys_KT = home_T * (num_ranks + 1) + ranks_KT
        sent = keys_KT if dispatch == "per-expert" else keys_KT[first_KT]
        return np.bincount(sent.reshape(-1), minlength=num_ranks * (num_ranks + 1))

    for layer in range(num_layers):
        if homes_TL is not None:
            sent = rows_R(layer, homes_TL[:, layer].astype(np.int64))
            rows_LRR[layer] = sent.reshape(num_ranks, -1)[:, :num_ranks]
            continue
        for rank in range(num_ranks) if replicated else (0,):
            sent = rows_R(layer, np.full(batch.num_tokens, rank)).reshape(num_ranks, -1)[rank, :num_ranks]
            rows_LRR[layer, rank if replicated else slice(None)] = sent * (1 / num_ranks)
    return rows_LRR / max(batch.num_tokens, 1)


def first_of_run(sorted_KT: np.ndarray) -> np.ndarray:
    """True where a value differs from the one before it in its column, bool [K, T]."""
    first = np.ones(sorted_KT.shape, bool)
    first[1:] = sorted_KT[1:] != sorted_KT[:-1]
    return first


def _alike_RE(rank_of_E: np.ndarray, num_ranks: int) -> np.ndarray:
    """Experts without replicas as what serves them for every rank."""
    return np.broadcast_to(rank_of_E, (num_ranks, len(rank_of_E)))


def _serving_KT(ids_TK: np.ndarray, serving_RE: np.ndarray, home_T: np.ndarray | None) -> np.ndarray:
    """Rank that serves each choice, int16 [K, T]; R for an empty slot."""
    ids_KT = np.ascontiguousarray(ids_TK.T).astype(np.intp)
    padded_RE = np.pad(serving_RE, ((0, 0), (0, 1)), constant_values=len(serving_RE)).astype(np.int16)
    if home_T is not None and (padded_RE != padded_RE[0]).any():
        ids_KT += home_T.astype(np.intp) * padded_RE.shape[1]
    return padded_RE.reshape(-1).take(ids_KT)


def _sorted_columns(values_KT: np.ndarray) -> np.ndarray:
    """Every column in ascending order. Of a few rows, by exchanges of neighbouring rows, which
    run along the columns."""
    top_k = len(values_KT)
    if top_k > EXCHANGED_ROWS:
        return np.sort(values_KT, axis=0)
    rows = list(values_KT)
    for turn in range(top_k):
        for i in range(turn % 2, top_k - 1, 2):
            rows[i], rows[i + 1] = np.minimum(rows[i], rows[i + 1]), np.maximum(rows[i], rows[i + 1])
    return np.stack(rows) if rows else values_KT
