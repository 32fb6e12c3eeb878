"""The search of one layer: gains are what a count from scratch says, budgets are kept, and small
layers come out nearly as by trying every placement."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest

from semmoe.solvers.place.exact_counts import co_activation_within
from semmoe.solvers.place.joint_layer import Layer
from semmoe.solvers.place.remote_gains import remote_cost
from semmoe.solvers.placement import Topology
from semmoe.solvers.replan.search import PAIR_WORTH, SMOOTHING, LoadExcess, Task, search_layer
from semmoe.solvers.replan.tasks import LayerTraffic
from semmoe.solvers.replan.worth import Worth

WORTHS = {
    "per-rank": Worth(),
    "per-expert": Worth.of_dispatch("per-expert", 1, 1.05),
    "per-node": Worth.of_dispatch("per-node", 2, 1.05),
    "gather": Worth.of_dispatch("gather", 1, 1.05),
}


def traffic(num_experts: int, topology: Topology, worth: Worth, *, seed: int = 0, most: int = 0) -> LayerTraffic:
    """Rows of a layer whose experts are chosen in pairs and unequally often."""
    rng = np.random.default_rng(seed)
    weight_E = rng.random(num_experts) + 0.05
    first_T = rng.choice(num_experts, 400, p=weight_E / weight_E.sum())
    partner_E = rng.permutation(num_experts)
    second_T = np.where(rng.random(400) < 0.7, partner_E[first_T], rng.integers(0, num_experts, 400))
    second_T = np.where(second_T == first_T, num_experts, second_T)  # an empty slot
    ids_TK = np.sort(np.stack([first_T, second_T], axis=1), axis=1)
    load_E = np.bincount(ids_TK.reshape(-1), minlength=num_experts + 1)[:num_experts]
    pairs_EE = np.zeros((num_experts + 1, num_experts + 1), np.int64)
    np.add.at(pairs_EE, (ids_TK[:, 0], ids_TK[:, 1]), 1)
    pairs_EE = (pairs_EE + pairs_EE.T)[:num_experts, :num_experts]
    np.fill_diagonal(pairs_EE, load_E)
    home_T = rng.integers(0, topology.num_ranks, 400)
    layer = Layer(pairs_EE, load_E[None].astype(float), ids_TK, np.full(400, -1), seed, 1, home_T)
    old_E = np.sort(np.arange(num_experts) % topology.num_ranks)
    hosts_ER = np.eye(topology.num_ranks, dtype=bool)[rng.permutation(old_E)]
    return LayerTraffic(layer, hosts_ER, topology, worth, 0.0, most or num_experts)


def task_value(task: Task, rank_of_E: np.ndarray) -> float:
    """Less cost than nothing, in rows per token: what the search compares, counted from scratch."""
    value = float(task.home_ER[np.arange(len(rank_of_E)), rank_of_E].sum())
    value += PAIR_WORTH * co_activation_within(rank_of_E, task.affinity_EE)
    value -= remote_cost(rank_of_E, task.expert_ids_XK, task.cost_XR)
    if task.cost_XN is not None:
        per_node = task.cost_XR.shape[1] // task.cost_XN.shape[1]
        value -= remote_cost(rank_of_E // per_node, task.expert_ids_XK, task.cost_XN)
    loads = LoadExcess(rank_of_E, task.load_JE, task.worth.load_cap, task.cost_XR.shape[1])
    return value - task.worth.excess * loads.value()


@pytest.mark.parametrize("dispatch", WORTHS)
@pytest.mark.parametrize("topology", [Topology(4), Topology(4, 2), Topology(4, 1, 1.0 - np.eye(4))])
def test_gains_are_what_a_count_from_scratch_says(dispatch, topology):
    if dispatch == "per-node" and topology.num_nodes == 1:
        pytest.skip("one node")
    task = traffic(16, topology, WORTHS[dispatch]).task()
    found = search_layer(task)
    assert found.gain_M[0] == 0 and (np.diff(found.gain_M) >= 0).all()
    assert found.gain_M[-1] > 0.01
    for moves in range(17):
        rank_of_E = found.hosts_ER(moves, 16, 4).argmax(axis=1)
        assert (rank_of_E != task.old_of_E).sum() <= moves
        assert np.bincount(rank_of_E).tolist() == [4] * 4
        gain = task_value(task, rank_of_E) - task_value(task, task.old_of_E)
        assert found.gain_M[moves] == pytest.approx(gain, abs=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_small_layers_come_out_nearly_as_by_trying_every_placement(seed):
    task = traffic(6, Topology(3), Worth(), seed=seed).task()
    best_M = np.full(7, -np.inf)
    for rank_of_E in {tuple(p) for p in permutations(task.old_of_E.tolist())}:
        moves = int((np.array(rank_of_E) != task.old_of_E).sum())
        best_M[moves] = max(best_M[moves], task_value(task, np.array(rank_of_E)))
    best_M = np.maximum.accumulate(best_M) - task_value(task, task.old_of_E)
    gain_M = search_layer(task).gain_M
    assert (gain_M <= best_M + 1e-4).all()
    assert (gain_M >= 0.95 * best_M - 1e-4).all()


def test_uneven_ranks_stay_uneven():
    task = traffic(10, Topology(4), Worth()).task()
    found = search_layer(task)
    assert found.hosts_ER(10, 10, 4).sum(axis=0).tolist() == np.bincount(task.old_of_E, minlength=4).tolist()


def test_no_move_of_a_budget_of_none():
    layer = replace(traffic(16, Topology(4), Worth()), max_moves=0)
    assert layer.search().gain_M.tolist() == [0.0]


def test_relief_of_every_swap_is_the_difference_of_two_counts():
    rng = np.random.default_rng(0)
    load_JE, rank_of_E = rng.random((2, 12)), np.arange(12) % 4
    loads = LoadExcess(rank_of_E, load_JE, 1.0, 4)
    for e, f in [(0, 1), (2, 7), (5, 10)]:
        swapped = rank_of_E.copy()
        swapped[[e, f]] = swapped[[f, e]]
        then = LoadExcess(swapped, load_JE, 1.0, 4)
        assert loads.relief(e, f, rank_of_E) == pytest.approx(loads.value() - then.value())
        smooth = loads.relief(e, f, rank_of_E) + SMOOTHING * (loads.smooth() - then.smooth())
        assert loads.relief_EE(rank_of_E)[e, f] == pytest.approx(smooth, abs=1e-5)


@pytest.mark.parametrize("dispatch", WORTHS)
def test_copies_gain_within_the_budget(dispatch):
    topology = Topology(4, 2)
    layer = traffic(12, topology, WORTHS[dispatch], most=6)
    hosts_ER = layer.hosts_ER.copy()
    for rank in range(4):  # a copy on every rank
        hosts_ER[np.flatnonzero(~hosts_ER[:, rank])[0], rank] = True
    found = replace(layer, hosts_ER=hosts_ER).search()
    assert len(found.gain_M) == 7 and found.gain_M[0] == 0 and (np.diff(found.gain_M) >= 0).all()
    assert found.gain_M[-1] > 0.01
    for moves in range(7):
        new_ER = found.hosts_ER(moves, 12, 4)
        assert new_ER.any(axis=1).all() and (new_ER & ~hosts_ER).sum() <= moves
        assert np.array_equal(new_ER.sum(axis=0), hosts_ER.sum(axis=0))
