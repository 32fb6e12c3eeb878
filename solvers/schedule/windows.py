"""Requests to ranks, window by window (Attention-DP): the one rule, which `semmoe run` follows and
reports simulate.

A request stays on one rank and brings tokens to the expert layers: its prompt, and as many
generated ones as it may get. How many it will get is not known, so each counts with its budget.
Requests in order of arrival are cut into nearly equal windows, and each window is balanced by
itself: ranks go through the expert layers together, so what matters is the balance among requests
that run at the same time (docs/experiments.md). Within a window the order decides nothing.

Inside a window, prices of entropic transport give the start, then moves and swaps of requests raise
the score while the capacity in tokens holds. The paper's masked round-robin (arXiv 2503.04398,
inter-request scheduling) is here for comparison.

Shape letters: B requests, R ranks.
"""

from collections.abc import Sequence

import numpy as np

from semmoe.solvers.schedule.request_scorer import RequestScorer
from semmoe.solvers.schedule.transport import balanced_prices

WINDOW = 256  # requests that are weighed against each other
TOKEN_CAP = 1.05  # tokens of a rank over the mean in a window
SWEEPS = 100  # of prices
COOLING = 0.05  # last temperature of the sweeps over the spread of the scores


def request_tokens_B(num_prompt_tokens_B: np.ndarray, max_new_tokens: int) -> np.ndarray:
    """What each request counts as, int64 [B]: the tokens that it may bring to the expert layers.

    The last token that is generated never gets there.
    """
    return np.asarray(num_prompt_tokens_B, np.int64) + max_new_tokens - 1


def windows_of(num_requests: int, window: int) -> list[np.ndarray]:
    """Places in the order of arrival, int64, in nearly equal consecutive parts of at most
    `window`."""
    return np.array_split(np.arange(num_requests), max(1, -(-num_requests // window)))


def assign_prompts(
    scorer: RequestScorer, prompts: Sequence[np.ndarray], tokens_B: np.ndarray, *, window: int = WINDOW
) -> np.ndarray:
    """Rank of each request by the token ids of its prompt, int64 [B]; as `assign_requests`, in
    order of arrival.

    Parameters:
        scorer: the plan's.
        prompts: token ids, integers, one array each.
        tokens_B: int [B], what each request counts as (`request_tokens_B`).
        window: most requests that are weighed against each other.
    """
    return assign_requests(scorer.scores_BR(prompts), tokens_B, window=window)


def assign_requests(
    scores_BR: np.ndarray, tokens_B: np.ndarray, *, window: int = WINDOW, token_cap: float = TOKEN_CAP
) -> np.ndarray:
    """Rank of each request by its scores, with nearly equal tokens per rank in every window.

    Parameters:
        scores_BR: float [B, R], in order of arrival; gain per token of request b on rank r
        tokens_B: int [B], what each request counts as (`request_tokens_B`)
        window: most requests that are weighed against each other
        token_cap: tokens of a rank over the mean of its window, at most, where that is possible

    Returns:
        rank_of_B: int64 [B]
    """
    rank_of_B = np.zeros(len(scores_BR), np.int64)
    for requests in windows_of(len(scores_BR), window):
        rank_of_B[requests] = assign_window(scores_BR[requests], tokens_B[requests], token_cap=token_cap)
    return rank_of_B


def assign_round_robin(num_requests: int, num_ranks: int) -> np.ndarray:
    """Rank of each request, dealt out in turn: b mod R, int64 [B]."""
    return np.arange(num_requests) % num_ranks


def assign_masked_round_robin(scores_BR: np.ndarray) -> np.ndarray:
    """The paper's rule, int64 [B]: each request in turn takes its best rank that no request of
    this round of R has taken yet."""
    num_requests, num_ranks = scores_BR.shape
    rank_of_B = np.empty(num_requests, np.int64)
    for b in range(num_requests):
        if b % num_ranks == 0:
            taken_R = np.zeros(num_ranks, bool)
        rank_of_B[b] = np.where(taken_R, -np.inf, scores_BR[b]).argmax()
        taken_R[rank_of_B[b]] = True
    return rank_of_B


def window_imbalance(rank_of_B: np.ndarray, tokens_B: np.ndarray, num_ranks: int, *, window: int = WINDOW) -> float:
    """Tokens of the busiest rank over the mean, averaged over the windows; 1 where there are no
    tokens. Requests in order of arrival.

    Parameters:
        rank_of_B: int [B].
        tokens_B: int [B], what each request counts as.
        num_ranks: R.
        window: requests of a window.
    """
    loads = [
        np.bincount(rank_of_B[requests], tokens_B[requests], num_ranks)
        for requests in windows_of(len(rank_of_B), window)
    ]
    found = [load_R.max() / load_R.mean() for load_R in loads if load_R.any()]
    return float(np.mean(found)) if found else 1.0


def assign_window(scores_BR: np.ndarray, tokens_B: np.ndarray, *, token_cap: float = TOKEN_CAP) -> np.ndarray:
    """Rank of each request of one window, int64 [B], with at most token_cap x the mean number of
    tokens per rank where that is possible.

    Where single requests are too long for the cap, the excess over it is what is made small first.
    Deterministic, and the same for requests in any order (equal ones may trade places); one step
    costs B * B comparisons.
    """
    order = np.lexsort((*scores_BR.T, tokens_B))
    rank_of_B = np.empty(len(scores_BR), np.int64)
    rank_of_B[order] = _improved(scores_BR[order], tokens_B[order], token_cap)
    return rank_of_B


def _improved(scores_BR: np.ndarray, tokens_B: np.ndarray, token_cap: float) -> np.ndarray:
    """Best rank of each request net of prices, int64 [B], then the best move or swap until none
    gains."""
    num_requests, num_ranks = scores_BR.shape
    if num_requests == 0:
        return np.zeros(0, np.int64)
    size_B = np.maximum(tokens_B.astype(np.float64), 1e-9)
    gain_BR = scores_BR * size_B[:, None]
    cap = token_cap * size_B.sum() / num_ranks
    prices_R, _ = balanced_prices(scores_BR, size_B, sweeps=SWEEPS, cooling=COOLING)
    rank_of_B = (scores_BR - prices_R).argmax(axis=1)
    load_R = np.bincount(rank_of_B, size_B, num_ranks)
    # A token over the cap costs more than a token can gain. Where whole requests must move for a
    # few tokens that is not enough: the price then rises, until one token over the cap costs more
    # than any step can gain. Cheap steps come first, so little score is lost.
    spread = float(np.ptp(scores_BR)) + 1e-9
    penalty, last_penalty = 4.0 * spread, 4.0 * spread * max(float(size_B.max()), 1.0)
    for _ in range(20 * num_requests):
        move_BR, swap_BB = _step_gains(gain_BR, size_B, rank_of_B, load_R, cap, penalty)
        own_B = gain_BR[np.arange(num_requests), rank_of_B]
        if max(move_BR.max(), swap_BB.max()) <= 1e-6 * (1 + abs(own_B).max()):
            if penalty >= last_penalty or not (load_R > cap).any():
                break
            penalty *= 8
            continue
        if move_BR.max() >= swap_BB.max():
            b, rank = np.unravel_index(move_BR.argmax(), move_BR.shape)
            load_R[rank_of_B[b]] -= size_B[b]
            load_R[rank] += size_B[b]
            rank_of_B[b] = rank
        else:
            b, c = np.unravel_index(swap_BB.argmax(), swap_BB.shape)
            load_R[rank_of_B[b]] += size_B[c] - size_B[b]
            load_R[rank_of_B[c]] += size_B[b] - size_B[c]
            rank_of_B[b], rank_of_B[c] = rank_of_B[c], rank_of_B[b]
    return rank_of_B


def _step_gains(
    gain_BR: np.ndarray, size_B: np.ndarray, rank_of_B: np.ndarray, load_R: np.ndarray, cap: float, penalty: float
) -> tuple[np.ndarray, np.ndarray]:
    """What moving request b to rank r would gain, float64 [B, R], and swapping b with c, float64
    [B, B]; `penalty` for every token over the cap. -inf where nothing would change."""
    each = np.arange(len(size_B))
    own_B = gain_BR[each, rank_of_B]
    over_R = np.maximum(load_R - cap, 0)
    left_B = np.maximum(load_R[rank_of_B] - size_B - cap, 0) - over_R[rank_of_B]
    joined_BR = np.maximum(load_R + size_B[:, None] - cap, 0) - over_R
    move_BR = gain_BR - own_B[:, None] - penalty * (left_B[:, None] + joined_BR)
    move_BR[each, rank_of_B] = -np.inf
    exchanged_BB = gain_BR[:, rank_of_B] - own_B[:, None]
    shift_BB = size_B[None, :] - size_B[:, None]  # what the rank of the row's request gains in tokens
    excess_BB = np.maximum(load_R[rank_of_B][:, None] + shift_BB - cap, 0) - over_R[rank_of_B][:, None]
    swap_BB = exchanged_BB + exchanged_BB.T - penalty * (excess_BB + excess_BB.T)
    swap_BB[rank_of_B[:, None] == rank_of_B[None, :]] = -np.inf
    return move_BR, swap_BB
