"""A quick placement and its REM, on arrays in memory: what learning curves, drift and what-if
tables fit again and again.

Shape letters: L MoE layers, T tokens, K top-k, E experts, R ranks, B requests.
"""

import numpy as np

from semmoe.profiles.counts import co_activation_EE
from semmoe.profiles.trace import TraceBatch
from semmoe.solvers.evaluate.reached import reached_T
from semmoe.solvers.place.metis import place_metis

LOAD_CAP = 1.05
NUM_SEEDS = 3  # METIS runs of each scheme: with one, luck hides what a curve should show


def fit_ranks_LE(ids_LTK: np.ndarray, num_experts: int, num_ranks: int, seed: int) -> np.ndarray:
    """A quick placement by co-activation, int64 [L, E]."""
    pairs_LEE = np.stack([co_activation_EE(ids_TK, num_experts) for ids_TK in ids_LTK])
    return fit_counts_LE(pairs_LEE, num_ranks, seed)


def fit_counts_LE(pairs_LEE: np.ndarray, num_ranks: int, seed: int) -> np.ndarray:
    load_LE = np.diagonal(pairs_LEE, axis1=1, axis2=2)
    return place_metis(pairs_LEE, load_LE, num_ranks, load_cap=LOAD_CAP, seed=seed, num_seeds=NUM_SEEDS)


def rem_T(ids_LTK: np.ndarray, rank_of_LE: np.ndarray, num_ranks: int) -> np.ndarray:
    """Remote ranks of each token at a random home, mean over layers, float64 [T]."""
    reached = sum(
        reached_T(ids_TK, ranks_E, num_ranks).astype(np.float64)
        for ids_TK, ranks_E in zip(ids_LTK, rank_of_LE, strict=True)
    )
    return np.asarray(reached) / len(ids_LTK) * (1 - 1 / num_ranks)


def random_share_B(batch: TraceBatch, share: float, seed: int) -> np.ndarray:
    """A random share of the requests, at least one and not all, bool [B]."""
    chosen_B = np.zeros(batch.num_requests, bool)
    count = min(max(1, round(share * batch.num_requests)), batch.num_requests - 1)
    chosen_B[np.random.default_rng(seed).permutation(batch.num_requests)[:count]] = True
    return chosen_B
