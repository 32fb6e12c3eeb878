"""Tokens to equal slices of the ranks (Attention-TP). Arithmetic only, no state.

A shuffled reduce-scatter hands every rank an equal slice of ceil(T / R) places, so the best rank
cannot be given to everyone. Prices per rank make the demand meet the places: a few sweeps of
entropic transport (solvers/schedule/transport.py), each one softmax over [T, R] and a column sum.
Places that stay empty are taken by a row that does not care where it goes: fewer tokens than ranks
then all have their best rank. Every token goes to its best rank net of price; where a slice is
full, the tokens that lose least go on to their next-best rank. runtime/serving/equal_slices.py is
the same on a GPU, which is why the rounds of overflow have a fixed number.

Cost: about 4 * sweeps * T * R flops, and T * R * 4 bytes read per sweep; at 512 tokens, 8 ranks and
24 sweeps that is 0.4 Mflop in 16 KB. What is lost against the exact assignment:
docs/experiments.md.

Shape letters: T tokens, R ranks.
"""

import numpy as np

from semmoe.solvers.schedule.transport import balanced_prices

SWEEPS = 24  # of prices
COOLING = 0.05  # last temperature of the sweeps over the spread of the scores
ROUNDS = 3  # of overflow, before what is left fills what is free: more change the locality by less than 1e-4


def assign_equal_slices(scores_TR: np.ndarray, *, sweeps: int = SWEEPS) -> np.ndarray:
    """Rank of each token, int64 [T], at most ceil(T / R) tokens per rank; higher scores are better.
    Deterministic.

    Equal scores leave the choice open: such tokens fill what the others leave free.
    """
    num_tokens, num_ranks = scores_TR.shape
    if num_tokens == 0:
        return np.zeros(0, np.int64)
    scores_TR = np.asarray(scores_TR, np.float32)
    places = -(-num_tokens // num_ranks)
    net_TR = scores_TR - slice_prices(scores_TR, places, sweeps=sweeps).astype(np.float32)
    return fill_slices(net_TR, np.full(num_ranks, places))


def slice_prices(scores_TR: np.ndarray, places: int, *, sweeps: int = SWEEPS) -> np.ndarray:
    """Price per rank at which every rank is wanted by at most `places` tokens, float64 [R]."""
    num_tokens, num_ranks = scores_TR.shape
    num_empty = num_ranks * places - num_tokens
    if num_empty == 0:
        return balanced_prices(scores_TR, sweeps=sweeps, cooling=COOLING)[0]
    rows_TR = np.vstack([scores_TR, np.zeros((1, num_ranks), scores_TR.dtype)])
    weight_T = np.append(np.ones(num_tokens), num_empty)
    return balanced_prices(rows_TR, weight_T, sweeps=sweeps, cooling=COOLING)[0]


def fill_slices(scores_TR: np.ndarray, free_R: np.ndarray) -> np.ndarray:
    """Rank of each token, int64 [T]: best rank first, overflow to the next-best one, at most free_R
    tokens per rank.

    In each round the tokens without a place ask for their best rank that has room; a rank keeps
    those that would lose most elsewhere. After ROUNDS the few that are left take what is free, in
    order.
    """
    assert free_R.sum() >= len(scores_TR), "the slices must hold all tokens"
    free_R = free_R.astype(np.int64).copy()
    rank_of_T = np.full(len(scores_TR), -1, np.int64)
    waiting = np.arange(len(scores_TR))
    for _ in range(ROUNDS):
        if not len(waiting):
            break
        open_TR = np.where(free_R > 0, scores_TR[waiting], -np.inf)
        best_T = open_TR.argmax(axis=1)
        each = np.arange(len(waiting))
        top_T = open_TR[each, best_T]
        open_TR[each, best_T] = -np.inf
        second_T = open_TR.max(axis=1)
        regret_T = np.where(np.isfinite(second_T), top_T - second_T, 0.0)
        order = np.lexsort((-regret_T, best_T))
        ranked = best_T[order]
        place_T = np.arange(len(order)) - np.searchsorted(ranked, ranked)
        kept = place_T < free_R[ranked]
        rank_of_T[waiting[order[kept]]] = ranked[kept]
        free_R -= np.bincount(ranked[kept], minlength=len(free_R))
        waiting = np.sort(waiting[order[~kept]])
    rank_of_T[waiting] = np.repeat(np.arange(len(free_R)), free_R)[: len(waiting)]
    return rank_of_T
