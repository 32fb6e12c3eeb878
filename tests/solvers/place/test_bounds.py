"""Bounds hold for the best placement of small cases, and say something."""

from itertools import permutations

import numpy as np
import pytest

from semmoe.profiles.counts import co_activation_EE
from semmoe.solvers.place.bounds import certify, co_activation_bound, local_activation_bound, remote_rank_bound
from semmoe.solvers.place.exact import solve_exact
from semmoe.solvers.place.exact_counts import co_activation_within
from semmoe.solvers.place.remote_gains import remote_cost
from semmoe.solvers.place.swap import rank_loads


def _all_placements(num_experts: int, num_ranks: int) -> list[np.ndarray]:
    start = np.repeat(np.arange(num_ranks), num_experts // num_ranks)
    return [np.array(p) for p in set(permutations(start.tolist()))]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("slack", [1.05, 2.0])
def test_bound_is_above_every_placement(seed: int, slack: float) -> None:
    rng = np.random.default_rng(seed)
    ids_TK = np.stack([rng.permutation(8)[:3] for _ in range(200)])
    ids_TK[: 100 * (seed % 2)] = np.sort(ids_TK[: 100 * (seed % 2)] // 2)  # some structure, some not
    member_TE = np.zeros((200, 8))
    member_TE[np.arange(200)[:, None], ids_TK] = 1
    affinity_EE = member_TE.T @ member_TE
    load_E = np.diagonal(affinity_EE)
    limit = slack * load_E.sum() / 2
    allowed = [p for p in _all_placements(8, 2) if rank_loads(p, load_E[None], 2).max() <= limit]
    values = [((affinity_EE * (p[:, None] == p)).sum() - load_E.sum()) / 2 for p in allowed]
    bound = co_activation_bound(affinity_EE, load_E, limit, 2, iterations=300)
    assert bound >= max(values) - 1e-6
    assert bound <= 1.1 * max(values)
    reached = certify(allowed[int(np.argmax(values))], affinity_EE, load_E, limit, 2, iterations=300)
    assert reached.reached == pytest.approx(max(values)) and 0 <= reached.gap < 0.1


def test_the_load_limit_is_part_of_the_bound() -> None:
    # Two hot experts are always together; the limit keeps them apart.
    affinity_EE = np.array([[90, 80, 1, 1], [80, 90, 1, 1], [1, 1, 9, 8], [1, 1, 8, 9]], float)
    load_E = np.diagonal(affinity_EE)
    assert co_activation_bound(affinity_EE, load_E, 200.0, 2, iterations=400) >= 88 - 1e-6
    assert co_activation_bound(affinity_EE, load_E, 100.0, 2, iterations=400) < 20


def test_remote_rank_bound() -> None:
    def bound(co_activation: float, experts: int = 32) -> float:
        affinity_EE = np.zeros((experts, experts))
        affinity_EE[:4, :4] = 10  # ten tokens, all with the same four experts
        return remote_rank_bound(co_activation, affinity_EE, 10, 4, 4)

    assert bound(0) == pytest.approx(4) and bound(60) == pytest.approx(1)
    assert bound(20) == pytest.approx(2)  # 2 + 2 on two ranks
    assert bound(40) == pytest.approx(1.5)
    assert bound(60, experts=8) == pytest.approx(2)  # ranks hold two experts


@pytest.mark.parametrize("empty_share", [0.0, 0.3, 1.0])
def test_no_placement_touches_fewer_ranks_than_the_bound(empty_share: float) -> None:
    rng = np.random.default_rng(5)
    ids_TK = np.array([rng.permutation(8)[:3] for _ in range(200)])
    ids_TK[rng.random(ids_TK.shape) < empty_share] = 8  # no expert in this slot
    affinity_EE = co_activation_EE(ids_TK, 8)
    bounds = []
    for _ in range(40):
        rank_of_E = rng.permutation(np.repeat(np.arange(4), 2))
        rank_TK = np.append(rank_of_E, 4)[ids_TK]
        touched = np.mean([len(set(row) - {4}) for row in rank_TK.tolist()])
        bounds.append(remote_rank_bound(co_activation_within(rank_of_E, affinity_EE), affinity_EE, 200, 3, 4))
        assert bounds[-1] <= touched + 1e-9
        assert bounds[-1] >= 0.9 * touched  # and it says something
    assert len(set(np.round(bounds, 6))) > 1 or empty_share == 1


def test_local_activation_bound() -> None:
    own_UE = np.kron(np.eye(2), np.full((3, 2), 5))
    assert local_activation_bound(own_UE, 2) == pytest.approx(1)
    assert local_activation_bound(np.full((6, 4), 5), 2) == pytest.approx(0.5)


@pytest.mark.parametrize("seed", range(4))
def test_exact_is_the_best_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids_XK = np.stack([rng.permutation(7)[:3] for _ in range(30)])  # 6 is an empty slot
    home_ER = rng.random((6, 3)) * (seed % 2)
    cost_XR = rng.random((30, 3)) if seed > 1 else np.ones((30, 3))
    load_JE = np.bincount(ids_XK.ravel(), minlength=7)[None, :6].astype(float)
    limit_J = load_JE.sum(axis=1) / 3 * 1.15

    def value(p: np.ndarray) -> float:
        return remote_cost(p, ids_XK, cost_XR) - home_ER[np.arange(6), p].sum()

    allowed = [p for p in _all_placements(6, 3) if rank_loads(p, load_JE, 3).max() <= limit_J[0]]
    found = solve_exact(ids_XK, cost_XR, home_ER, load_JE, limit_J)
    assert rank_loads(found, load_JE, 3).max() <= limit_J[0]
    assert value(found) == pytest.approx(min(value(p) for p in allowed))
