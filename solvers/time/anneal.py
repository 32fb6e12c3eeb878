"""Balance of a layer's experts by random swaps that may cost a little at first: what the busiest
rank takes on average over batches has many local optima, and descent ends in the nearest.

Shape letters: E experts, R ranks, M batches.
"""

import numpy as np

from semmoe.solvers.time.swaps import LayerBatches, Prices, expert_work

WARM, COLD = 0.03, 0.0015  # of what the busiest rank has beyond the mean at the start


def anneal_balance(
    batches: LayerBatches, rank_of_E: np.ndarray, prices: Prices, *, num_ranks: int, seed: int, steps: int
) -> np.ndarray:
    """The placement with the least work of the busiest rank, mean over batches, that `steps` random
    swaps meet, int64 [E], with as many experts on every rank as the given one; of equal ones the
    first."""
    rng = np.random.default_rng([seed, 43])
    rank_of_E = rank_of_E.astype(np.int64)
    us_EM = np.ascontiguousarray(_additive(batches, prices, num_ranks).T)
    us_RM = np.zeros((num_ranks, us_EM.shape[1]))
    np.add.at(us_RM, rank_of_E, us_EM)
    now = least = float(us_RM.max(0).mean())
    best_E, warmth = rank_of_E.copy(), now - float(us_RM.mean())
    for step, (i, j) in enumerate(rng.integers(0, len(rank_of_E), (steps if warmth > 0 else 0, 2)).tolist()):
        a, b = rank_of_E[i], rank_of_E[j]
        if a == b:
            continue
        change_M = us_EM[j] - us_EM[i]
        before = us_RM[a].copy(), us_RM[b].copy()
        us_RM[a] += change_M
        us_RM[b] -= change_M
        then = float(us_RM.max(0).mean())
        if then > now and rng.random() >= np.exp((now - then) / (warmth * WARM * (COLD / WARM) ** (step / steps))):
            us_RM[a], us_RM[b] = before
            continue
        now, rank_of_E[i], rank_of_E[j] = then, b, a
        if now < least:
            least, best_E = now, rank_of_E.copy()
    return best_E


def _additive(batches: LayerBatches, prices: Prices, num_ranks: int) -> np.ndarray:
    """What each expert adds to the time of a rank that is as busy as the mean one, us, float64 [M,
    E]: a rank's experts take nearly the sum."""
    work_FME = expert_work(batches.activations_ME, batches.tile)
    mean_F = work_FME.sum(2).mean(1) / num_ranks
    more_FX = mean_F[:, None] + np.diag(mean_F) / 100
    slope_F = (prices.experts(*more_FX) - prices.experts(*mean_F)) / np.maximum(mean_F / 100, 1e-300)
    return np.tensordot(slope_F, work_FME, 1)
