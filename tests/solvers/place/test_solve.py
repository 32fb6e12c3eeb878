"""Methods find planted groups, keep exact counts and the load cap; their pieces equal brute
force."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_profiles import profile_of, random_rows

from semmoe.profiles.counts import RoutingProfile, co_activation_EE, profile_traces
from semmoe.profiles.errors import InputError
from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic
from semmoe.profiles.trace import RoutingTrace
from semmoe.solvers.demands import Demands
from semmoe.solvers.place.baselines import baselines, place_load
from semmoe.solvers.place.exact_counts import (
    co_activation_within,
    equal_counts,
    equalize,
    improve_within_cap,
    is_within_cap,
    rank_load_R,
    repair_load,
    resampled_loads,
    swap_gain_EE,
)
from semmoe.solvers.place.graph import balanced_k_means
from semmoe.solvers.place.replicas import served_load_R, serving_LRE
from semmoe.solvers.place.solve import METHODS, load_notes, solve_placement
from semmoe.solvers.placement import Topology


def random_affinity(rng: np.random.Generator, experts: int) -> np.ndarray:
    return co_activation_EE(np.array([rng.permutation(experts)[:3] for _ in range(300)]), experts)


def solve(profile: RoutingProfile, ranks: int, *, method: str, load_cap: float, seed: int = 0, **demands):
    """The placement and what it could not keep."""
    demanded = Demands(load_cap=load_cap, seed=seed, **demands)
    solved = solve_placement(profile, Topology(ranks), demanded, method=method)
    return solved.placement, solved.notes


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    path = tmp_path_factory.mktemp("planted") / "t"
    group_of_LE = write_synthetic(path, SyntheticWorld(num_requests=120, noise=0.05))
    return group_of_LE, profile_traces([RoutingTrace.open(path)])


@pytest.mark.parametrize("method", ["metis", "spectral", "semmoe"])
def test_planted_groups_are_found(planted, method):
    group_of_LE, profile = planted
    placement, _ = solve(profile, 4, method=method, load_cap=2.0, seed=1)
    for layer in range(4):
        pairs = {tuple(p) for p in np.stack([group_of_LE[layer], placement.rank_of_LE[layer]], axis=1)}
        assert len(pairs) == 4, f"layer {layer}: groups and ranks are not one to one"


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.sampled_from([(4, 2), (6, 3), (8, 4), (12, 4), (12, 12), (5, 1)]),
    skew=st.floats(0, 3),
    load_cap=st.floats(1.0, 2.0),
)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_keeps_counts_and_repeats(method, seed, shape, skew, load_cap):
    experts, ranks = shape
    tokens = 16 if method == "exact" else 60  # a proof takes seconds of many
    profile = profile_of(random_rows(np.random.default_rng(seed), experts, tokens, skew), experts)
    first, notes = solve(profile, ranks, method=method, load_cap=load_cap, seed=seed)
    again, _ = solve(profile, ranks, method=method, load_cap=load_cap, seed=seed)
    assert first.experts_LRS.shape == (1, ranks, experts // ranks)
    np.testing.assert_array_equal(np.sort(first.experts_LRS.reshape(-1)), np.arange(experts))
    np.testing.assert_array_equal(first.experts_LRS, again.experts_LRS)
    rank_of_E, load_E = first.rank_of_LE[0], profile.load_LE[0]
    within = is_within_cap(rank_of_E, load_E, ranks, load_cap)
    assert within == (not notes)
    balanced_E = place_load(profile.load_LE, ranks)[0]
    if method in ("metis", "spectral", "semmoe") and is_within_cap(balanced_E, load_E, ranks, load_cap):
        assert within, "the load cap can be kept, as packing by load shows"


def test_swap_gains_equal_recomputing():
    rng = np.random.default_rng(1)
    affinity_EE = random_affinity(rng, 8)
    rank_of_E = rng.permutation(np.repeat(np.arange(4), 2))
    gain_EE = swap_gain_EE(rank_of_E, affinity_EE, 4)
    before = co_activation_within(rank_of_E, affinity_EE)
    for e, f in itertools.combinations(range(8), 2):
        if rank_of_E[e] != rank_of_E[f]:
            swapped = rank_of_E.copy()
            swapped[[e, f]] = swapped[[f, e]]
            assert co_activation_within(swapped, affinity_EE) - before == pytest.approx(gain_EE[e, f])


def test_small_cases_reach_the_brute_force_optimum():
    rng = np.random.default_rng(2)
    for seed in range(5):
        profile = profile_of(random_rows(rng, 6, 300, top_k=3), 6)
        co_EE, load_E = profile.co_activation_LEE[0], profile.load_LE[0]
        feasible = [
            co_activation_within(np.array(r), co_EE)
            for r in set(itertools.permutations([0, 0, 0, 1, 1, 1]))
            if is_within_cap(np.array(r), load_E, 2, 1.1)
        ]
        placement, _ = solve(profile, 2, method="metis", load_cap=1.1, seed=seed)
        assert co_activation_within(placement.rank_of_LE[0], co_EE) == pytest.approx(max(feasible))


def test_counts_and_load_are_repaired_and_improved():
    rng = np.random.default_rng(3)
    affinity_EE = random_affinity(rng, 12)
    load_E = affinity_EE.diagonal() * np.r_[np.full(4, 3), np.full(8, 1)]
    lopsided_E = np.array([0] * 9 + [1, 2, 2])
    equal_E = equal_counts(lopsided_E, affinity_EE, 3)
    assert np.bincount(equal_E).tolist() == [4, 4, 4]
    repaired_E = repair_load(equal_E, affinity_EE, load_E, 3, 1.1)
    assert rank_load_R(repaired_E, load_E, 3).max() <= 1.1 * load_E.sum() / 3
    improved_E = improve_within_cap(repaired_E, affinity_EE, load_E, 3, 1.1)
    assert co_activation_within(improved_E, affinity_EE) >= co_activation_within(repaired_E, affinity_EE)
    assert is_within_cap(improved_E, load_E, 3, 1.1)
    balanced_E = place_load(load_E[None], 3)[0]
    assert is_within_cap(equalize(lopsided_E, affinity_EE, load_E, 3, 1.1, balanced_E), load_E, 3, 1.1)


def test_what_cannot_be_repaired_starts_again_from_repaired_packing():
    load_E = np.array([3.0, 11, 14, 17, 10, 8, 6, 9])
    stuck_E, packed_E = np.array([1, 1, 1, 0, 1, 0, 0, 0]), place_load(load_E[None], 2)[0]
    none_EE = np.zeros((8, 8))
    assert repair_load(stuck_E, none_EE, load_E, 2, 1.02).tolist() == stuck_E.tolist()
    assert not is_within_cap(stuck_E, load_E, 2, 1.02) and not is_within_cap(packed_E, load_E, 2, 1.02)
    assert is_within_cap(equalize(stuck_E, none_EE, load_E, 2, 1.02, packed_E), load_E, 2, 1.02)


def test_an_infeasible_cap_is_said():
    ids_TK = np.array([[0]] * 100 + [[1], [2], [3]])
    _, notes = solve(profile_of(ids_TK, 4, layers=3), 2, method="metis", load_cap=1.05)
    assert notes == ["load cap 1.05 is exceeded in 3 of 3 layers, worst 1.961 (layers 0-2)"]
    assert load_notes(np.array([[0, 0, 1, 1]]), np.array([[1, 1, 1, 1]]), 2, 1.05) == []


def test_resamples_over_the_cap_are_said():
    # Balanced over all requests; one resample uses the experts of rank 1 twice as much.
    load_LJE = np.array([[[1, 1, 1, 1], [1, 1, 2, 2]], [[1, 1, 1, 1], [2, 1, 2, 1]]])
    rank_of_LE = np.array([[0, 0, 1, 1], [0, 0, 1, 1]])
    said = ["in 2 resamples of the requests, load cap 1.1 is exceeded in 1 of 2 layers, worst 1.333 (layers 0)"]
    assert load_notes(rank_of_LE, load_LJE, 2, 1.1, whose="in 2 resamples of the requests, load") == said


def halves() -> RoutingProfile:
    """Twelve requests: six ask experts 0 and 1, six ask 2 and 3."""
    return profile_of(np.array([[0, 1]] * 60 + [[2, 3]] * 60), 4)


def test_a_cap_that_holds_in_all_requests_alone_is_exceeded_in_resamples_and_said():
    _, notes = solve(halves(), 2, method="metis", load_cap=1.05)
    assert notes == []
    _, notes = solve(halves(), 2, method="metis", load_cap=1.05, robust=4)
    load_JR = resampled_loads(halves(), 4, 0)[0, 1:] @ np.kron(np.eye(2), np.ones((2, 1)))
    worst = load_JR.max(1) / load_JR.mean(1)
    assert worst.max() > 1.05
    assert notes == [
        f"in 4 resamples of the requests, load cap 1.05 is exceeded in 1 of 1 layers, worst {worst.max():.3f} (layers 0)"
    ]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_replica_slots_hold_other_experts_of_every_method(method):
    profile = profile_of(random_rows(np.random.default_rng(0), 8, 80, skew=2), 8, layers=2)
    placement, _ = solve(profile, 4, method=method, load_cap=1.5, replicas=1)
    assert placement.experts_LRS.shape == (2, 4, 3) and placement.num_replicas == 1
    with pytest.raises(InputError, match="a rank can host 6 more experts at most"):
        solve(profile, 4, method=method, load_cap=1.5, replicas=7)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("replicas", [0, 2])
def test_what_a_method_returns_holds_the_loads_of_its_ranks(method, replicas):
    profile = profile_of(random_rows(np.random.default_rng(1), 8, 80, skew=2), 8, layers=2)
    solved = solve_placement(profile, Topology(4, 2), Demands(load_cap=1.5, replicas=replicas), method=method)
    assert solved.loads_LR.shape == (2, 4) and np.allclose(solved.loads_LR.sum(1), profile.load_LE.sum(1))
    hosts_LER = solved.placement.hosts_LER
    assert (solved.loads_LR <= np.einsum("le,ler->lr", profile.load_LE, hosts_LER) + 1e-9).all()
    assert bool(solved.notes) == bool((solved.loads_LR.max(1) > 1.5 * solved.loads_LR.mean(1) * (1 + 1e-9)).any())
    assert solved.rounds == (3 if method == "semmoe" else 1)  # a first placement, and two turns


@pytest.mark.parametrize("method", ["metis", "load"])
def test_resamples_over_the_cap_are_said_with_replicas_too(method):
    placement, notes = solve(halves(), 2, method=method, load_cap=1.0, robust=4, replicas=1)
    serving_RE = serving_LRE(placement.hosts_LER, halves().load_LE, Topology(2))[0]
    served = [served_load_R(serving_RE, load_E) for load_E in resampled_loads(halves(), 4, 0)[0, 1:]]
    worst = max(load_R.max() / load_R.mean() for load_R in served)
    assert placement.num_replicas == 1 and (worst > 1 or method == "load")
    said = "as served with replicas, in 4 resamples of the requests, load cap 1.0 is exceeded in 1 of 1 layers"
    assert notes == ([f"{said}, worst {worst:.3f} (layers 0)"] if worst > 1 else [])


def test_exact_keeps_the_cap_in_resamples():
    # Co-activation would put 0, 1 and 2, 3 together: one rank would serve all of a kind of request.
    placement, notes = solve(halves(), 2, method="exact", load_cap=1.05)
    assert sorted(map(sorted, placement.experts_LRS[0].tolist())) == [[0, 1], [2, 3]] and notes == []
    placement, notes = solve(halves(), 2, method="exact", load_cap=1.05, robust=4)
    assert len({0, 1} & set(placement.experts_LRS[0, 0].tolist())) == 1 and notes == []
    # Three kinds of request, two experts each, on three experts and an idle one: no placement
    # serves every resample evenly.
    ids_TK = np.array([[0, 1]] * 30 + [[0, 2]] * 30 + [[1, 2]] * 30)
    with pytest.raises(InputError, match="no placement keeps every load cap"):
        solve(profile_of(ids_TK, 4), 2, method="exact", load_cap=1.0, robust=3)


def test_metis_on_nodes_keeps_the_cap_where_it_does_without_them():
    for seed in (0, 9, 18):  # nodes first get stuck above the cap in the last two
        rng = np.random.default_rng(seed)
        popular_E, topic_ZE = np.exp(rng.normal(0, 1.3, 16)), np.exp(rng.normal(0, 2, (6, 16)))
        weights_TE = (popular_E * topic_ZE)[np.arange(300) % 6]
        ids_TK = np.array([rng.choice(16, 4, replace=False, p=w / w.sum()) for w in weights_TE])
        profile, demands = profile_of(ids_TK, 16), Demands(load_cap=1.03, seed=seed, dispatch="per-node")
        for nodes in (1, 2):
            solved = solve_placement(profile, Topology(4, nodes), demands, method="metis")
            assert solved.notes == [], (seed, nodes)


def test_balanced_k_means_separates_clouds():
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal(center, 0.1, (5, 2)) for center in ((0, 0), (5, 0), (0, 5))])
    cluster = balanced_k_means(points, 3, seed=0).reshape(3, 5)
    assert (cluster == cluster[:, :1]).all() and len(set(cluster[:, 0])) == 3


def test_the_load_row_of_a_report_is_what_the_load_method_places():
    profile = profile_of(random_rows(np.random.default_rng(0), 16, 200, skew=2), 16, layers=2)
    grouped = replace(profile, info=replace(profile.info, n_group=4, topk_group=2))
    topology = Topology(4, 2)
    placement = solve_placement(grouped, topology, Demands(load_cap=9), method="load").placement
    row = baselines(grouped.load_LE, topology, 4)["load"]
    assert row.experts_LRS.tolist() == placement.experts_LRS.tolist()
    node_of_LE = row.rank_of_LE // 2
    assert (node_of_LE.reshape(2, 4, 4) == node_of_LE.reshape(2, 4, 4)[:, :, :1]).all()  # groups stay on a node
    assert row.experts_LRS.tolist() != baselines(grouped.load_LE, topology)["load"].experts_LRS.tolist()
