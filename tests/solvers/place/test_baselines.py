"""Placement by load: the published example, equal counts, no repetition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semmoe.profiles.errors import InputError
from semmoe.solvers.place.baselines import baselines, place_contiguous, place_load, place_load_replicated
from semmoe.solvers.placement import Topology
from semmoe.solvers.slots import Slots

PUBLISHED_LOAD = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]


def test_published_example() -> None:
    experts_LRS = place_load_replicated(np.array(PUBLISHED_LOAD), 16, num_groups=4, num_nodes=2, num_ranks=8)
    assert experts_LRS.shape == (2, 8, 2)
    assert experts_LRS.reshape(2, 16).tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


def test_heaviest_first_to_the_lightest() -> None:
    assert place_load(np.array([[9, 1, 8, 2], [4, 3, 2, 1]]), 2).tolist() == [[0, 0, 1, 1], [0, 1, 1, 0]]


def test_shares_are_even_and_slots_must_hold_the_experts() -> None:
    assert place_load(np.array([[5, 4, 3, 2, 1, 1, 1]]), 2).tolist() == [[0, 1, 1, 0, 0, 1, 0]]
    assert place_contiguous(1, 7, 3).tolist() == [[0, 0, 0, 1, 1, 2, 2]]
    with pytest.raises(InputError, match="without repetition"):
        place_load_replicated(np.ones((1, 2)), 8, num_groups=1, num_nodes=1, num_ranks=2)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 6), st.integers(0, 5), st.integers(0, 3), st.integers(0, 2**31)
)
def test_no_expert_twice_on_a_rank(
    ranks_per_node: int, nodes: int, per_rank: int, extra: int, skew: int, seed: int
) -> None:
    num_ranks = ranks_per_node * nodes
    num_experts = num_ranks * per_rank
    slots = min(per_rank + extra, num_experts // nodes)
    load_LE = np.random.default_rng(seed).random((2, num_experts)) ** (1 + 4 * skew)
    experts_LRS = place_load_replicated(
        load_LE, num_ranks * slots, num_groups=nodes, num_nodes=nodes, num_ranks=num_ranks
    )
    for layer in experts_LRS:
        assert set(layer.ravel().tolist()) == set(range(num_experts))
        assert all(len(set(rank.tolist())) == slots for rank in layer)
    rank_of_LE = place_load(load_LE, num_ranks)
    assert all((np.bincount(rank_of_E) == per_rank).all() for rank_of_E in rank_of_LE)


def test_baselines_fill_the_slots_with_copies_of_the_hottest() -> None:
    load_LE = np.array([[90, 10, 10, 10, 80]])
    both = baselines(load_LE, Topology(2), slots=Slots(4))
    # Five experts in eight slots: the hottest per copy are 0, 4 and then one of the others.
    assert both["contiguous"].experts_LRS.tolist() == [[[0, 1, 2, 4], [3, 4, 0, 1]]]
    for placement in both.values():
        assert placement.hosts_LER[0].sum(axis=1).tolist() == [2, 2, 1, 1, 2]
    alone = baselines(load_LE, Topology(2))
    assert alone["contiguous"].experts_LRS.tolist() == [[[0, 1, 2], [3, 4, 0]]]
    bare = baselines(load_LE, Topology(2), slots=Slots(3, copies=False))
    assert bare["contiguous"].experts_LRS.tolist() == [[[0, 1, 2], [3, 4, -1]]]
