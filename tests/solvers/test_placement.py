"""Topologies and placements that cannot be are refused in one line; views of a placement agree."""

import numpy as np
import pytest

from semmoe.profiles.errors import InputError
from semmoe.solvers.placement import Placement, Topology


@pytest.mark.parametrize(
    ("ranks", "nodes", "message"),
    [
        (5, 1, "32 experts do not divide over 5 ranks"),
        (64, 1, "64 ranks are more than the 32 experts of a layer"),
        (8, 3, "8 ranks do not divide over 3 nodes"),
        (0, 1, "both must be at least 1"),
    ],
)
def test_impossible_topologies_are_one_line(ranks, nodes, message):
    with pytest.raises(InputError, match=message):
        Topology(ranks, nodes).check_experts(32)


@pytest.mark.parametrize(
    ("experts_LRS", "message"),
    [
        ([[[0, 0], [1, 2]]], "expert 0 is twice on rank 0"),
        ([[[0, 1], [2, 1]]], "expert 3 is on no rank"),
        ([[[0, 1], [2, 4]]], "names expert 4"),
    ],
)
def test_broken_placements_are_refused(experts_LRS, message):
    with pytest.raises(InputError, match=message):
        Placement(np.array(experts_LRS, np.int32), 4)


def test_views_of_a_placement():
    placement = Placement.from_ranks(np.array([[1, 0, 0, 1]]), 2)
    assert placement.experts_LRS.tolist() == [[[1, 2], [0, 3]]]
    assert placement.rank_of_LE.tolist() == [[1, 0, 0, 1]]
    assert placement.physical_to_logical_LP.tolist() == [[1, 2, 0, 3]]
    replicated = Placement(np.array([[[0, 1, 2], [3, 2, 0]]], np.int32), 4)
    assert replicated.num_replicas == 1 and replicated.hosts_LER[0].tolist() == [[1, 1], [1, 0], [1, 1], [0, 1]]
    with pytest.raises(InputError, match="has no single rank"):
        _ = replicated.rank_of_LE


def test_empty_slots_hold_nothing():
    placement = Placement.from_ranks(np.array([[1, 0, 0, 1, 0], [0, 1, 1, 0, 1]]), 2)
    assert placement.experts_LRS.tolist() == [[[1, 2, 4], [0, 3, -1]], [[0, 3, -1], [1, 2, 4]]]
    assert (placement.num_empty, placement.num_copies, placement.num_replicas, placement.num_wasted) == (2, 0, 0, 0)
    assert placement.rank_of_LE.tolist() == [[1, 0, 0, 1, 0], [0, 1, 1, 0, 1]]
    assert placement.order_LE.tolist() == [[1, 2, 4, 0, 3], [0, 3, 1, 2, 4]]
    filled = Placement(np.array([[[1, 2, 4], [0, 3, 1]]], np.int32), 5)
    assert (filled.num_copies, filled.num_replicas, filled.copies_in_words) == (1, 0, "a copy of an expert on 2 ranks")
    with pytest.raises(InputError, match="slot 1 of rank 1 is empty and slot 2 is not"):
        Placement(np.array([[[1, 2, 4], [0, -1, 3]]], np.int32), 5)
    alone = Placement.from_ranks(np.array([[2, 0]]), 3)  # more ranks than experts
    assert alone.experts_LRS.tolist() == [[[1], [-1], [0]]]
