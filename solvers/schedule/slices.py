"""Assignment under capacity: tokens to equal slices of the ranks, requests to ranks within a
window. Arithmetic only, no state.

Tokens (Attention-TP). A shuffled reduce-scatter hands every rank an equal slice of ceil(T / R)
places, so the best rank cannot be given to everyone. Prices per rank make the demand meet the
places: a few sweeps of entropic transport (Sinkhorn on the rank side, cooled), each one softmax
over [T, R] and a column sum. Places that stay empty are taken by a row that does not care where it
goes: fewer tokens than ranks then all have their best rank. Every token goes to its best rank net
of price; where a slice is full, the tokens that lose least go on to their next-best rank.
runtime/serving/equal_slices.py is the same on a GPU, which is why the rounds of overflow have a
fixed number. Cost: about 4 * sweeps * T * R flops, and T * R * 4 bytes read per sweep; at 512
tokens, 8 ranks and 24 sweeps that is 0.4 Mflop in 16 KB. This loses 0.1 to 0.4 % of the locality of
the exact assignment (docs/experiments.md).

Requests (Attention-DP). A request stays on one rank and brings a known number of tokens. Prices
again give the start, then moves and swaps of requests raise the score while the capacity in tokens
holds. The paper's masked round-robin (arXiv 2503.04398, inter-request scheduling) is here for
comparison.

Shape letters: T tokens, R ranks, B requests.
"""

import numpy as np

SWEEPS = 24
COOLING = 0.05  # last temperature of the sweeps over the spread of the scores
ROUNDS = 3  # of overflow, before what is left fills what is free: more change the locality by less than 1e-4
WINDOW = 256  # requests that are weighed against each other
TOKEN_CAP = 1.05  # tokens of a rank over the mean in a window


def balanced_prices(
    scores_TR: np.ndarray,
    weight_T: np.ndarray | None = None,
    *,
    sweeps: int = SWEEPS,
    start: float = 1.0,
    cooling: float = COOLING,
) -> tuple[np.ndarray, float]:
    """Price per rank at which every rank is wanted equally, float64 [R], and the temperature at
    which that holds.

    The share of token t that goes to rank r is softmax((scores - prices) / temperature).
    `weight_T`: how much each row counts. The temperature falls geometrically from `start` to
    `cooling` times the spread of the scores (best over mean, on average).
    """
    num_tokens, num_ranks = scores_TR.shape
    prices_R = np.zeros(num_ranks)
    spread = float((scores_TR.max(axis=1) - scores_TR.mean(axis=1)).mean()) if num_tokens else 0.0
    if spread <= 0:
        return prices_R, 1.0
    weight_T = np.ones(num_tokens) if weight_T is None else weight_T
    share = weight_T.sum() / num_ranks
    temperature = start * spread
    # Ranks first: sums and maxima over the few ranks then run along the tokens, several times
    # faster in numpy.
    scores_RT = np.ascontiguousarray(scores_TR.T)
    for sweep in range(sweeps):
        temperature = spread * start * (cooling / start) ** (sweep / max(sweeps - 1, 1))
        shares_RT = scores_RT - prices_R[:, None].astype(scores_RT.dtype)
        shares_RT -= shares_RT.max(axis=0)
        shares_RT /= temperature
        np.exp(shares_RT, out=shares_RT)
        shares_RT /= shares_RT.sum(axis=0)
        prices_R = prices_R + temperature * np.log(np.maximum(shares_RT @ weight_T / share, 1e-6))
    return prices_R - prices_R.mean(), temperature


def softmax(scores_TR: np.ndarray, temperature: float) -> np.ndarray:
    """Rows (along the last axis) of non-negative shares that sum to 1, float [..., T, R]."""
    shares_TR = np.exp((scores_TR - scores_TR.max(axis=-1, keepdims=True)) / temperature)
    return shares_TR / shares_TR.sum(axis=-1, keepdims=True)


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
        return balanced_prices(scores_TR, sweeps=sweeps)[0]
    rows_TR = np.vstack([scores_TR, np.zeros((1, num_ranks), scores_TR.dtype)])
    return balanced_prices(rows_TR, np.append(np.ones(num_tokens), num_empty), sweeps=sweeps)[0]


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


def assign_requests(
    scores_BR: np.ndarray, tokens_B: np.ndarray, *, token_cap: float = TOKEN_CAP, load_R: np.ndarray | None = None
) -> np.ndarray:
    """Rank of each request of a window, int64 [B], with at most token_cap x the mean number of
    tokens per rank where that is possible.

    `scores_BR`: gain per token of request b on rank r. `load_R`: tokens that the ranks already
    hold. Where single requests are too long for the cap, the excess over it is what is made small
    first. Deterministic; one step costs B * B comparisons.
    """
    num_requests, num_ranks = scores_BR.shape
    load_R = np.zeros(num_ranks) if load_R is None else load_R.astype(np.float64)
    if num_requests == 0:
        return np.zeros(0, np.int64)
    size_B = np.maximum(tokens_B.astype(np.float64), 1e-9)
    gain_BR = scores_BR * size_B[:, None]
    cap = token_cap * (size_B.sum() + load_R.sum()) / num_ranks
    prices_R, _ = balanced_prices(scores_BR, size_B, sweeps=100)
    rank_of_B = (scores_BR - prices_R).argmax(axis=1)
    load_R = load_R + np.bincount(rank_of_B, size_B, num_ranks)
    # A token over the cap costs more than a token can gain. Where whole requests must move for a
    # few tokens that is not enough: the price then rises, until one token over the cap costs more
    # than any step can gain. Cheap steps come first, so little score is lost.
    spread = float(np.ptp(scores_BR)) + 1e-9
    penalty, last_penalty = 4.0 * spread, 4.0 * spread * max(float(size_B.max()), 1.0)
    each = np.arange(num_requests)
    for _ in range(20 * num_requests):
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
        if max(move_BR.max(), swap_BB.max()) <= 1e-6 * (1 + abs(own_B).max()):
            if penalty >= last_penalty or not over_R.any():
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
