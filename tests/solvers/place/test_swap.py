"""Swap search: gains against brute force, limits kept, planted structure found."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semmoe.solvers.place.exact_counts import co_activation_within
from semmoe.solvers.place.remote_gains import RemoteGains, remote_cost, token_kinds
from semmoe.solvers.place.swap import AffinityGains, affinity_value, overload, swap_search


def _random_rows(rng: np.random.Generator, rows: int, num_experts: int, top_k: int) -> np.ndarray:
    return np.stack([rng.permutation(num_experts + 1)[:top_k] for _ in range(rows)])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([(12, 3, 3), (8, 2, 4), (16, 4, 5), (6, 6, 2)]))
def test_gains_of_all_swaps_are_exact(seed: int, shape: tuple[int, int, int]) -> None:
    num_experts, num_ranks, top_k = shape
    rng = np.random.default_rng(seed)
    ids_XK = _random_rows(rng, 50, num_experts, top_k)
    cost_XR, home_ER = rng.random((50, num_ranks)), rng.random((num_experts, num_ranks))
    affinity_EE = rng.random((num_experts, num_experts))
    affinity_EE += affinity_EE.T
    closeness_RR = rng.random((num_ranks, num_ranks))
    closeness_RR += closeness_RR.T
    start = rng.permutation(np.repeat(np.arange(num_ranks), num_experts // num_ranks))
    remote = RemoteGains(start, ids_XK, cost_XR, home_ER, affinity_EE)
    affinity = AffinityGains(start, affinity_EE, home_ER, closeness_RR)

    def remote_value(rank_of_E: np.ndarray) -> float:
        homes = home_ER[np.arange(num_experts), rank_of_E].sum()
        return homes + co_activation_within(rank_of_E, affinity_EE) - remote_cost(rank_of_E, ids_XK, cost_XR)

    for model, value in (
        (remote, remote_value),
        (affinity, lambda x: affinity_value(x, affinity_EE, home_ER, closeness_RR)),
    ):
        for _ in range(6):
            e, f = rng.choice(num_experts, 2, replace=False)
            before = model.rank_of_E.copy()
            after = before.copy()
            after[[e, f]] = after[[f, e]]
            if before[e] == before[f]:
                assert model.gain_EE[e, f] == -np.inf
                continue
            assert model.gain_EE[e, f] * model.scale == pytest.approx(value(after) - value(before), abs=1e-4)
            model.swap(e, f)
            assert np.array_equal(model.rank_of_E, after)


@pytest.mark.parametrize("seed", range(5))
def test_finds_the_optimum_of_small_cases(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids_XK = _random_rows(rng, 60, 6, 3)
    cost_XR, home_ER = np.ones((60, 3)), np.zeros((6, 3))
    load_JE = np.bincount(ids_XK.ravel(), minlength=7)[None, :6].astype(float)
    limit_J = load_JE.sum(axis=1) / 3 * 1.1
    values = [
        remote_cost(np.array(x), ids_XK, cost_XR)
        for x in set(permutations([0, 0, 1, 1, 2, 2]))
        if overload(np.array(x), load_JE, limit_J, 3) == 0
    ]
    gains = RemoteGains(np.array([0, 0, 1, 1, 2, 2]), ids_XK, cost_XR, home_ER, np.zeros((6, 6)))
    found, _ = swap_search(gains, load_JE, limit_J, num_ranks=3, steps=200, patience=200, seed=0)
    assert overload(found, load_JE, limit_J, 3) == 0
    assert remote_cost(found, ids_XK, cost_XR) == min(values)


def test_planted_blocks_are_repaired() -> None:
    rng = np.random.default_rng(0)
    planted = np.repeat(np.arange(8), 8)
    affinity_EE = rng.random((64, 64)) + 3 * (planted[:, None] == planted)
    affinity_EE += affinity_EE.T
    start = planted.copy()
    moved = rng.permutation(64)[:20]
    start[moved] = start[rng.permutation(moved)]
    gains = AffinityGains(start, affinity_EE, np.zeros((64, 8)), np.eye(8))
    options = {"num_ranks": 8, "steps": 100, "patience": 50, "seed": 0}
    found, _ = swap_search(gains, np.ones((1, 64)), np.array([8.0]), **options)
    assert len(set(zip(found.tolist(), planted.tolist(), strict=True))) == 8


def test_least_overload_where_no_placement_fits() -> None:
    load_JE = np.array([[10.0, 1, 1, 1]])
    gains = AffinityGains(np.array([0, 0, 1, 1]), np.ones((4, 4)), np.zeros((4, 2)), np.eye(2))
    found, _ = swap_search(gains, load_JE, np.array([6.5]), num_ranks=2, steps=20, patience=20, seed=0)
    assert sorted(np.bincount(found, load_JE[0]).tolist()) == [2, 11]


def test_token_kinds_merge_equal_sets() -> None:
    kinds_XK, kind_T = token_kinds(np.array([[2, 0], [0, 2], [1, 3]], np.uint8), 3)
    assert kinds_XK[kind_T].tolist() == [[0, 2], [0, 2], [1, 3]]
    assert len(kinds_XK) == 2
