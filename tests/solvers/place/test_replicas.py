"""Replicas: no repetition on a rank, and a static choice of the copy that serves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semmoe.solvers.place.replicas import add_replicas, served_load_R, serving_LRE
from semmoe.solvers.placement import Placement, Topology


def test_own_rank_then_own_node_then_least_loaded() -> None:
    # Expert 0 on ranks 0 and 2, expert 1 on rank 1 only, expert 2 on ranks 1 and 3; nodes are ranks
    # 0-1 and 2-3.
    hosts_LER = np.zeros((1, 3, 4), bool)
    hosts_LER[0, 0, [0, 2]] = hosts_LER[0, 1, 1] = hosts_LER[0, 2, [1, 3]] = True
    serving = serving_LRE(hosts_LER, np.array([[8, 100, 4]]), Topology(4, 2))[0]
    assert serving[:, 0].tolist() == [0, 0, 2, 2]
    assert serving[:, 1].tolist() == [1, 1, 1, 1]
    assert serving[:, 2].tolist() == [1, 1, 3, 3]
    one_node = serving_LRE(hosts_LER, np.array([[8, 100, 4]]), Topology(4, 1))[0]
    assert one_node[0, 2] == 3 and one_node[2, 2] == 3  # rank 1 carries expert 1 already


def test_copies_follow_the_tokens() -> None:
    # Ranks own {0,1} and {2,3}; the tokens of rank 0 also use expert 2, those of rank 1 expert 1.
    ids_TLK = np.array([[0, 1, 2]] * 10 + [[2, 3, 1]] * 10, np.uint8)[:, None]
    load_LE = np.bincount(ids_TLK.reshape(-1), minlength=4)[None]
    experts_LRS = add_replicas(np.array([[0, 0, 1, 1]]), ids_TLK, load_LE, Topology(2), replicas=1)
    assert experts_LRS.tolist() == [[[0, 1, 2], [2, 3, 1]]]


def test_copies_are_exchanged_for_the_cap() -> None:
    # Ranks own {0,1}, {2,3}, {4,5}; every rank's tokens like expert 0 or 2 best, yet rank 2 serves
    # the hot expert 4 to all.
    rng = np.random.default_rng(0)
    likes = {0: [0, 1, 2], 1: [2, 3, 0], 2: [4, 5, 0]}
    rows = [likes[home] if rng.random() < 0.6 else [4, *likes[home][:2]] for home in [0, 1, 2] * 200]
    ids_TLK = np.array([[row if len(set(row)) == 3 else [4, 5, 2] for row in rows]], np.uint8).transpose(1, 0, 2)
    load_LE = np.bincount(ids_TLK.reshape(-1), minlength=6)[None]
    base, topology = np.array([[0, 0, 1, 1, 2, 2]]), Topology(3)
    worst = {}
    for cap in (np.inf, 1.05):
        experts_LRS = add_replicas(base, ids_TLK, load_LE, topology, replicas=1, load_cap=cap)
        serving = serving_LRE(Placement(experts_LRS, 6).hosts_LER, load_LE, topology)[0]
        load_R = served_load_R(serving, load_LE[0])
        assert load_R.sum() == pytest.approx(load_LE.sum())
        worst[cap] = load_R.max() / load_R.mean()
    assert worst[np.inf] > 1.1 and worst[1.05] < worst[np.inf]


def test_served_load_counts_equal_shares() -> None:
    # Expert 0 (load 9) is served by rank 0 for all, expert 1 (load 6) by each rank for itself.
    assert served_load_R(np.array([[0, 0], [0, 1], [0, 2]]), np.array([9, 6])).tolist() == [11, 2, 2]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 6), st.integers(0, 3), st.integers(0, 2**31))
def test_every_rank_gets_different_experts(
    ranks: int, per_rank: int, replicas: int, load_slots: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    num_experts = ranks * per_rank
    rank_of_LE = np.stack([rng.permutation(np.repeat(np.arange(ranks), per_rank)) for _ in range(2)])
    top_k = min(3, num_experts)
    ids_TLK = np.stack([[rng.permutation(num_experts + 1)[:top_k] for _ in range(2)] for _ in range(20)])
    load_LE = np.stack([np.bincount(ids_TLK[:, i].ravel(), minlength=num_experts + 1)[:-1] for i in range(2)])
    topology = Topology(ranks)
    options = {"replicas": replicas, "load_slots": load_slots, "load_cap": 1.05}
    experts_LRS = add_replicas(rank_of_LE, ids_TLK, load_LE, topology, **options)
    placement = Placement(experts_LRS, num_experts)  # raises where an expert is missing or twice on a rank
    assert placement.num_replicas == min(replicas, num_experts - per_rank)
    assert all(placement.hosts_LER[layer, e, rank_of_LE[layer, e]] for layer in range(2) for e in range(num_experts))
    serving = serving_LRE(placement.hosts_LER, load_LE, topology)
    layer, rank, expert = np.indices(serving.shape)
    assert placement.hosts_LER[layer, expert, serving].all()
    own = placement.hosts_LER[layer, expert, rank]
    assert (serving[own] == rank[own]).all()
