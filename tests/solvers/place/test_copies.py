"""Copies in spare slots: what they save, the load cap, and no repetition on a rank."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semmoe.profiles.counts import co_activation_EE
from semmoe.solvers.place.copies import CopiedLayer, add_copies
from semmoe.solvers.place.replicas import served_load_R, serving_LRE
from semmoe.solvers.placement import Placement, Topology, part_sizes


def test_copies_follow_the_tokens() -> None:
    # Ranks own {0,1} and {2,3}; the tokens of rank 0 also use expert 2, those of rank 1 expert 1.
    ids_TK = np.array([[0, 1, 2]] * 10 + [[2, 3, 1]] * 10, np.uint8)
    layer = CopiedLayer(np.array([0, 0, 1, 1]), ids_TK, np.bincount(ids_TK.reshape(-1), minlength=4))
    assert add_copies(layer, Topology(2), slots=3).tolist() == [[0, 1, 2], [2, 3, 1]]


def test_copies_are_exchanged_for_the_cap() -> None:
    # Ranks own {0,1}, {2,3}, {4,5}; every rank's tokens like expert 0 or 2 best, yet rank 2 serves
    # the hot expert 4 to all.
    rng = np.random.default_rng(0)
    likes = {0: [0, 1, 2], 1: [2, 3, 0], 2: [4, 5, 0]}
    rows = [likes[home] if rng.random() < 0.6 else [4, *likes[home][:2]] for home in [0, 1, 2] * 200]
    ids_TK = np.array([row if len(set(row)) == 3 else [4, 5, 2] for row in rows], np.uint8)
    layer = CopiedLayer(np.array([0, 0, 1, 1, 2, 2]), ids_TK, np.bincount(ids_TK.reshape(-1), minlength=6))
    topology, worst = Topology(3), {}
    for cap in (np.inf, 1.05):
        experts_RS = add_copies(layer, topology, slots=3, load_cap=cap)
        serving = serving_LRE(Placement(experts_RS[None], 6).hosts_LER, layer.load_E[None], topology)[0]
        load_R = served_load_R(serving, layer.load_E)
        assert load_R.sum() == pytest.approx(layer.load_E.sum())
        worst[cap] = load_R.max() / load_R.mean()
    assert worst[np.inf] > 1.1 and worst[1.05] < worst[np.inf]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 14), st.integers(0, 6), st.sampled_from([0, 12]), st.integers(0, 2**31))
def test_every_slot_is_filled_with_different_experts(
    ranks: int, num_experts: int, spare: int, swaps: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rank_of_E = rng.permutation(np.repeat(np.arange(ranks), part_sizes(num_experts, ranks)))
    slots = min(-(-num_experts // ranks) + spare, num_experts)
    ids_TK = np.stack([rng.permutation(num_experts + 1)[: min(3, num_experts)] for _ in range(20)])
    load_E = np.bincount(ids_TK.ravel(), minlength=num_experts + 1)[:-1]
    topology = Topology(ranks)
    layer = CopiedLayer(rank_of_E, ids_TK, load_E, co_activation_EE(ids_TK, num_experts))
    experts_RS = add_copies(layer, topology, slots=slots, load_cap=1.05, swaps=swaps)
    assert experts_RS.shape == (ranks, slots)
    placement = Placement(experts_RS[None], num_experts)  # raises where an expert is missing or twice on a rank
    assert placement.num_empty == 0
    assert swaps or all(placement.hosts_LER[0, e, rank_of_E[e]] for e in range(num_experts))
    serving = serving_LRE(placement.hosts_LER, load_E[None], topology)
    number, rank, expert = np.indices(serving.shape)
    assert placement.hosts_LER[number, expert, serving].all()
    own = placement.hosts_LER[number, expert, rank]
    assert (serving[own] == rank[own]).all()


def test_a_copy_of_what_outweighs_every_rank_relieves_it() -> None:
    # Four experts on six ranks of one slot: expert 0 carries half of the load, and halves of it are
    # still too much.
    rng = np.random.default_rng(0)
    ids_TK = np.array([[0, rng.integers(1, 4)] for _ in range(300)], np.uint8)
    layer = CopiedLayer(np.arange(4), ids_TK, np.bincount(ids_TK.reshape(-1), minlength=4))
    experts_RS = add_copies(layer, Topology(6), slots=1, load_cap=1.05)
    assert sorted(experts_RS.ravel().tolist()) == [0, 0, 0, 1, 2, 3]


def test_copies_over_many_ranks_keep_the_cap_and_pairs_together() -> None:
    # 24 ranks of three slots hold 64 experts and 8 copies: few tokens live beside one. Experts are
    # used in fours that stay together in two of three tokens, the first fours most.
    rng = np.random.default_rng(1)
    four_T = rng.choice(16, 6000, p=np.geomspace(1, 0.25, 16) / np.geomspace(1, 0.25, 16).sum())
    ids_TK = np.stack([4 * four + rng.permutation(4)[:3] for four in four_T])
    ids_TK[::3, 2] = (ids_TK[::3, 0] + 4 * rng.integers(1, 16, 2000)) % 64
    load_E, topology = np.bincount(ids_TK.reshape(-1), minlength=64), Topology(24)
    layer = CopiedLayer(rng.permutation(np.arange(64) % 24), ids_TK, load_E, co_activation_EE(ids_TK, 64))
    busiest, touched = {}, {}
    for swaps in (0, 200):
        hosts_ER = Placement(add_copies(layer, topology, slots=3, load_cap=1.05, swaps=swaps)[None], 64).hosts_LER[0]
        serving_RE = serving_LRE(hosts_ER[None], load_E[None], topology)[0]
        load_R = served_load_R(serving_RE, load_E)
        busiest[swaps] = load_R.max() / load_R.mean()
        touched[swaps] = np.mean([len(set(serving_RE[t % 24, ids_K])) for t, ids_K in enumerate(ids_TK)])
    assert busiest[200] <= max(1.05, busiest[0] - 0.02)
    assert touched[200] < 0.9 * touched[0]
