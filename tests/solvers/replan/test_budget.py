"""A budget shared by layers: as good as the best of all ways to share it, and never exceeded."""

from itertools import product

import numpy as np
import pytest

from semmoe.solvers.replan.budget import shared_moves_L
from semmoe.solvers.replan.frontiers import Budget


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("price", [0.0, 0.15])
def test_shared_as_by_trying_every_way(seed, price):
    rng = np.random.default_rng(seed)
    gain_LM = np.maximum.accumulate(np.round(rng.random((3, 5)), 2), axis=1)
    gain_LM[:, 0] = 0
    for budget in range(14):
        moves_L = shared_moves_L(gain_LM, budget, price=price)
        assert moves_L.sum() <= budget
        ways = [way for way in product(range(5), repeat=3) if sum(way) <= budget]
        worths = [gain_LM[np.arange(3), way].sum() - price * sum(way) for way in ways]
        assert np.isclose(gain_LM[np.arange(3), moves_L].sum() - price * moves_L.sum(), max(worths))


def test_of_equal_gains_the_fewest_moves():
    assert shared_moves_L(np.array([[0.0, 0.0, 1.0, 1.0]] * 2), 6).tolist() == [2, 2]


def test_budgets_as_typed():
    assert Budget(0.125).total(24, 32) == 96
    assert Budget(0.25).total(3, 10) == 7, "rounded down: a budget is not exceeded"
    assert Budget(moves=40).total(24, 32) == 40
    assert Budget(moves=10_000).total(2, 32) == 64
    assert Budget(per_layer=3).total(24, 32) == 72
    assert [Budget(per_layer=3).most_of_layer(24, 32), Budget(moves=5).most_of_layer(24, 32)] == [3, 5]
