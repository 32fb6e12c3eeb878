"""Balance of a layer's experts over many batches, by annealing.

The busiest rank of a batch is what a placement is paid for, so the mean over batches of the busiest
rank's activations is lowered, not the load of all batches together. Near the best that can be had
most swaps change little, and descent stops early: a swap that makes it worse is made too, less and
less readily (Kirkpatrick, Gelatt and Vecchi, Science 220, 1983).

Shape letters: M batches, E experts, R ranks, S steps.
"""

import numpy as np

STEPS_PER_EXPERT = {"fast": 250, "default": 1_000, "max": 2_000}
MOST_STEPS = 64_000
FIRST_WARMTH, LAST_WARMTH = 3e-3, 2e-5  # of the mean load: what a swap may well make worse


def balance_layer(n_ME: np.ndarray, rank_of_E: np.ndarray, num_ranks: int, *, effort: str, seed: int) -> np.ndarray:
    """A placement with as many experts on every rank as the given one, int64 [E], whose busiest
    rank has fewer activations on the mean of the batches; the given one where none is found.

    Parameters:
        n_ME: activations of each expert by batch, float.
        effort: "fast", "default" or "max".
    """
    rng = np.random.default_rng([seed, 43])
    num_experts = len(rank_of_E)
    mean_M1 = np.maximum(n_ME.sum(axis=1, keepdims=True) / num_ranks, 1e-30)
    n_EM = np.ascontiguousarray((n_ME / mean_M1).T, np.float32)
    rank_of_E = best_E = rank_of_E.astype(np.int64)
    load_RM = np.zeros((num_ranks, len(n_ME)), np.float32)
    np.add.at(load_RM, rank_of_E, n_EM)
    now = best = float(load_RM.max(axis=0).mean())
    steps = min(STEPS_PER_EXPERT[effort] * num_experts, MOST_STEPS)
    warmth_S = FIRST_WARMTH * (LAST_WARMTH / FIRST_WARMTH) ** (np.arange(steps) / steps)
    allowed_S = warmth_S * rng.exponential(size=steps)
    for (i, j), allowed in zip(rng.integers(0, num_experts, (steps, 2)), allowed_S, strict=True):
        here, there = rank_of_E[i], rank_of_E[j]
        if here == there:
            continue
        change_M = n_EM[j] - n_EM[i]
        load_RM[here] += change_M
        load_RM[there] -= change_M
        then = float(load_RM.max(axis=0).mean())
        if then - now >= allowed:
            load_RM[here] -= change_M
            load_RM[there] += change_M
            continue
        now = then
        rank_of_E = rank_of_E.copy()
        rank_of_E[i], rank_of_E[j] = there, here
        if now < best:
            best, best_E = now, rank_of_E
    return best_E
