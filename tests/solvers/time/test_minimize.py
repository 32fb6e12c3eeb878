"""Placement for time: what a swap is expected to change is what it changes, and nothing that is
placed for time is slower, on the batches that it was placed by, than what it started from."""

import numpy as np
import pytest

from semmoe.profiles.counts import profile_traces
from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic
from semmoe.profiles.trace import RoutingTrace
from semmoe.solvers.demands import Demands
from semmoe.solvers.place.baselines import baselines, place_load
from semmoe.solvers.placement import Topology
from semmoe.solvers.slots import Slots
from semmoe.solvers.time.batches import pool_of
from semmoe.solvers.time.copies import CopyTask, place_copies
from semmoe.solvers.time.fit import fit_of
from semmoe.solvers.time.hardware import TimeAsked, costing_of
from semmoe.solvers.time.minimize import links_of, prices_of, solve_for_time
from semmoe.solvers.time.swaps import LayerBatches, _Level, swap_layer

ASKED = {"hardware": "h100", "hidden_size": 512, "expert_size": 256, "phase": "prompt", "tokens_per_rank": 128}


def random_batches(rng, num_experts=12, num_tokens=200, top_k=3, groups=5):
    ids = np.argsort(rng.random((num_tokens, num_experts)), axis=1)[:, :top_k]
    ids[rng.random(num_tokens) < 0.1, -1] = num_experts  # empty slots
    group = rng.integers(0, groups, num_tokens)
    weight = rng.random((4, groups))
    return LayerBatches(ids, group, weight, rng.random((6, num_experts)).astype(np.float32), num_experts, 4)


@pytest.mark.parametrize("units", [[0, 1, 2, 3], [0, 0, 1, 1]])
def test_tokens_that_reach_a_rank_after_a_swap_are_those_of_a_recount(units):
    rng = np.random.default_rng(1)
    batches = random_batches(rng)
    rank_of_E, unit_of_R = rng.permutation(12) % 4, np.array(units)
    level = _Level(batches, unit_of_R, rank_of_E)
    for rank in range(4):
        own, unit = np.flatnonzero(rank_of_E == rank), unit_of_R[rank]
        here, there = level.after_swaps(own, int(unit))
        for s, i in enumerate(own):
            for j in np.flatnonzero(unit_of_R[rank_of_E] != unit):
                swapped = rank_of_E.copy()
                swapped[[i, j]] = swapped[[j, i]]
                again = _Level(batches, unit_of_R, swapped)
                np.testing.assert_allclose(here[:, s, j], again.reach_MU[:, unit], rtol=1e-12)
                np.testing.assert_allclose(there[:, s, j], again.reach_MU[:, unit_of_R[rank_of_E[j]]], rtol=1e-12)


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    path = tmp_path_factory.mktemp("minimize") / "t"
    write_synthetic(path, SyntheticWorld(num_layers=2, num_experts=16, num_requests=80))
    return profile_traces([RoutingTrace.open(path)])


@pytest.mark.parametrize(
    ("backend", "nodes"), [("deepep-normal", 1), ("deepep-normal", 2), ("deepep-ll", 1), ("nccl-gather", 1)]
)
@pytest.mark.parametrize("phase", ["prompt", "generated"])
def test_swaps_only_gain_and_keep_counts(profile, backend, nodes, phase):
    topology = Topology(4, nodes)
    costing = costing_of(TimeAsked(**(ASKED | {"backend": backend, "phase": phase})), profile.info, topology)
    fit = fit_of(pool_of(profile.sample, phase), costing, 4, Demands(effort="fast"))
    batches = fit.layer(profile.sample.expert_ids_TLK[:, 0], 16, int(costing.values["experts.tile"]))
    # Every batch is as large as it will run, and of tokens one by one in decode.
    np.testing.assert_allclose(fit.weight_XG @ np.bincount(fit.group_T), 4 * 128)
    top_k = profile.info.top_k
    np.testing.assert_allclose(batches.n_XE.sum(1), 4 * 128 * top_k, rtol=1e-5)
    assert phase == "prompt" or np.array_equal(batches.n_XE, np.round(batches.n_XE))
    start = place_load(profile.load_LE[:1], 4)[0]
    levels, prices = links_of(costing, topology).levels_UR, prices_of(costing, topology)
    found, time = swap_layer(batches, start, levels, prices, num_ranks=4, seed=0)
    _, again = swap_layer(batches, found, levels, prices, num_ranks=4, seed=0)
    _, kicked = swap_layer(batches, start, levels, prices, num_ranks=4, seed=0, kicks=2)
    assert np.bincount(found).tolist() == [4] * 4
    assert again == pytest.approx(time) and kicked <= time
    if backend == "deepep-normal":
        rows_now, rows_before = (_Level(batches, levels[-1], p).reach_MU.max(1).mean() for p in (found, start))
        assert rows_now < rows_before  # the planted groups are found


@pytest.mark.parametrize("slots", [{"replicas": 1}, {"redundant": 4}])
def test_copies_are_never_slower_than_load_packing_with_as_many(profile, slots):
    topology, demands = Topology(4), Demands(effort="fast", **slots)
    asked = TimeAsked(**(ASKED | {"backend": "deepep-ll"}))
    solved = solve_for_time(profile, topology, demands, asked)
    assert solved.placement.slots_per_rank == 5 and not solved.placement.num_empty
    costing = costing_of(asked, profile.info, topology)
    fit = fit_of(pool_of(profile.sample, "prompt"), costing, 4, demands)
    packed = baselines(profile.load_LE, topology, slots=Slots.of(solved.placement))["load"]
    for layer in range(2):
        batches = fit.layer(profile.sample.expert_ids_TLK[:, layer], 16, 128)
        task = CopyTask(batches, profile.load_LE[layer], topology, [], prices_of(costing, topology), 0, 0)
        times = [place_copies(task, p.hosts_LER[layer])[1] for p in (solved.placement, packed)]
        assert times[0] <= times[1]


def test_the_same_seed_gives_the_same_placement(profile):
    asked = TimeAsked(**ASKED)
    found = [solve_for_time(profile, Topology(4), Demands(effort="fast"), asked).placement for _ in range(2)]
    np.testing.assert_array_equal(found[0].experts_LRS, found[1].experts_LRS)


def test_experts_that_do_not_divide_are_placed_too(profile):
    demands = Demands(effort="fast", spare="empty")
    placement = solve_for_time(profile, Topology(3), demands, TimeAsked(**ASKED)).placement
    assert sorted((placement.experts_LRS >= 0).sum(2)[0].tolist()) == [5, 5, 6]
