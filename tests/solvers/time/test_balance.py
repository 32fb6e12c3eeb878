"""Balance over batches: as many experts on every rank, and near the best there is."""

from itertools import combinations

import numpy as np

from semmoe.solvers.place.baselines import place_load
from semmoe.solvers.time.balance import balance_layer


def busiest(n_ME, rank_of_E, num_ranks):
    load_MR = n_ME @ np.eye(num_ranks)[rank_of_E]
    return (load_MR.max(1) / load_MR.mean(1)).mean()


def test_the_best_of_all_halves_is_found():
    rng = np.random.default_rng(3)
    n_ME = rng.gamma(2.0, 10.0, 10) * rng.gamma(8.0, 1 / 8, (200, 10))
    start_E = place_load(n_ME.sum(0)[None], 2)[0].astype(np.int64)
    halves = [np.isin(np.arange(10), half).astype(int) for half in combinations(range(10), 5)]
    best = min(busiest(n_ME, half_E, 2) for half_E in halves)
    found_E = balance_layer(n_ME, start_E, 2, effort="default", seed=0)
    assert np.bincount(found_E).tolist() == [5, 5]
    assert best * (1 - 1e-6) <= busiest(n_ME, found_E, 2) <= best * 1.001
    assert busiest(n_ME, start_E, 2) > best * 1.001  # loads alone do not tell


def test_unequal_numbers_of_experts_stay_and_nothing_gets_worse():
    rng = np.random.default_rng(4)
    n_ME = rng.gamma(2.0, 10.0, (50, 11))
    start_E = np.array([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2])
    found_E = balance_layer(n_ME, start_E, 3, effort="fast", seed=1)
    assert np.bincount(found_E).tolist() == [4, 4, 3]
    assert busiest(n_ME, found_E, 3) <= busiest(n_ME, start_E, 3)
    idle_E = balance_layer(np.zeros((4, 11)), start_E, 3, effort="fast", seed=1)
    assert np.bincount(idle_E).tolist() == [4, 4, 3]
