"""Entropic transport: masses that come out equal, capped or within limits, and rows too heavy for
one rank."""

import numpy as np
import pytest

from semmoe.solvers.schedule import transport
from semmoe.solvers.schedule.transport import (
    SlotPrices,
    balanced_homes,
    balanced_prices,
    balanced_shares,
    capped_prices,
    scaled,
    scaled_in_slots,
    softmax,
)


def test_prices_split_a_frequent_row_over_the_ranks():
    scores_TR, weight_T = np.array([[1.0, 0.0], [0.0, 0.2]]), np.array([9.0, 1.0])
    prices_R, temperature = balanced_prices(scores_TR, weight_T, sweeps=200, cooling=0.05)
    shares_TR = softmax(scores_TR - prices_R, temperature)
    np.testing.assert_allclose(weight_T @ shares_TR, [5, 5], atol=0.05)
    assert 0 < shares_TR[0, 1] < 1


def test_the_cap_holds_where_few_sweeps_do_not_balance():
    rng = np.random.default_rng(1)
    scores_UR, weight_U = rng.random((300, 6)) ** 4, rng.pareto(1.0, 300) + 1
    prices_R, temperature = capped_prices(scores_UR, weight_U, cap=1.02, sweeps=2, cooling=0.1)
    mass_R = weight_U @ softmax(scores_UR - prices_R, temperature)
    assert mass_R.max() <= 1.02 * mass_R.mean()


def test_single_precision_gives_nearly_the_same_shares():
    rng = np.random.default_rng(2)
    scores_VR, weight_V, steps = rng.normal(size=(500, 4)), rng.random(500), np.repeat([1.0, 0.3, 0.1], 8)
    (twice_RV, twice_R), (once_RV, once_R) = (
        scaled(scores_VR, weight_V, steps, least=1e-9, single=single) for single in (False, True)
    )
    assert twice_RV.dtype == np.float64 and once_RV.dtype == np.float32
    np.testing.assert_allclose(once_RV, twice_RV, atol=1e-4)
    np.testing.assert_allclose(once_R, twice_R, atol=1e-4)
    np.testing.assert_allclose(twice_RV @ weight_V, weight_V.sum() / 4, rtol=0.02)


@pytest.mark.parametrize("steps", [np.repeat([1.0, 0.3, 0.1], 8), np.geomspace(1.0, 0.02, 24)])
def test_over_many_ranks_a_kept_kernel_gives_nearly_the_same(steps, monkeypatch):
    rng = np.random.default_rng(3)
    scores_VR = rng.normal(size=(400, 40)) + np.linspace(0, 6, 40)  # prices have a long way to go
    weight_V = rng.pareto(1.5, 400) + 0.1
    found_RV, found_R = scaled(scores_VR, weight_V, steps, least=1e-9)
    capped_R, temperature = capped_prices(scores_VR, weight_V, cap=1.05, sweeps=6, cooling=0.2)
    mass_R = weight_V @ softmax(scores_VR - capped_R, temperature)
    assert mass_R.max() <= 1.0501 * mass_R.mean()
    monkeypatch.setattr(transport, "MANY_RANKS", 40)
    plain_RV, plain_R = scaled(scores_VR, weight_V, steps, least=1e-9)
    np.testing.assert_allclose(found_R - found_R.mean(), plain_R - plain_R.mean(), atol=1e-4)
    np.testing.assert_allclose(found_RV, plain_RV, atol=2e-3)


def test_experts_fill_their_slots_and_keep_the_limits_of_load():
    rng = np.random.default_rng(3)
    load_LJE = rng.random((2, 1, 12)) + 0.2
    limit_LJ = 1.05 * load_LJE.sum(axis=2) / 3
    worth_LER, prices = 3 * rng.normal(size=(2, 12, 3)) + [4, 0, 0], SlotPrices.zero(load_LJE, 3)
    for _ in range(5):  # goes on from the prices before
        share_LER, net_LER, prices = scaled_in_slots(worth_LER, load_LJE, limit_LJ, prices, sweeps=40)
    np.testing.assert_allclose(share_LER.sum(axis=1), 4, atol=0.05)
    assert (load_LJE @ share_LER <= limit_LJ[:, :, None] * 1.02).all()
    np.testing.assert_allclose(share_LER, softmax(net_LER, 1.0))


def test_balanced_shares_split_what_is_too_heavy():
    score_VR = np.array([[1.0, 0.0], [0.9, 0.0], [0.2, 0.0]])
    share_VR = balanced_shares(score_VR, np.array([6.0, 2.0, 2.0]))
    assert np.allclose(share_VR.sum(axis=1), 1)
    assert abs(np.array([6.0, 2, 2]) @ share_VR - 5).max() < 0.25
    assert share_VR[2, 1] > 0.9 and 0.3 < share_VR[0, 0] < 1


def test_balanced_homes_fill_evenly():
    score_VR = np.random.default_rng(0).random((100, 4)) + [1, 0, 0, 0]
    assert np.bincount(balanced_homes(score_VR, np.ones(100)), minlength=4).max() <= 26
    assert (np.bincount(balanced_homes(np.zeros((8, 4)), np.ones(8)), minlength=4) == 2).all()
