"""Moves between placements: literals, renamings found again, nodes kept together, brute force."""

from itertools import permutations

import numpy as np
import pytest

from semmoe.profiles.errors import InputError
from semmoe.solvers.place.moves import count_moves, expert_bytes
from semmoe.solvers.placement import Placement, Topology


def random_placement(rng: np.random.Generator, layers: int, ranks: int, slots: int) -> Placement:
    orders = [rng.permutation(ranks * slots).reshape(ranks, slots) for _ in range(layers)]
    return Placement(np.array(orders, np.int32), ranks * slots)


def test_a_literal_case():
    old = Placement(np.array([[[0, 1], [2, 3]]], np.int32), 4)
    new = Placement(np.array([[[2, 3], [1, 0]]], np.int32), 4)
    moves = count_moves(old, new, Topology(2))
    assert (moves.as_named_L.tolist(), moves.renamed_L.tolist()) == ([4], [0])
    assert moves.old_rank_of_R.tolist() == [1, 0]


def test_slot_order_moves_nothing():
    old = random_placement(np.random.default_rng(0), 3, 4, 4)
    new = Placement(old.experts_LRS[:, :, ::-1].copy(), old.num_experts)
    assert count_moves(old, new, Topology(4)).as_named_L.sum() == 0


@pytest.mark.parametrize("seed", range(5))
def test_one_renaming_of_all_layers_is_found_again(seed):
    rng = np.random.default_rng(seed)
    old, order = random_placement(rng, 3, 4, 3), rng.permutation(4)
    moves = count_moves(old, Placement(old.experts_LRS[:, order], old.num_experts), Topology(4))
    assert moves.renamed_L.sum() == 0 and np.array_equal(moves.old_rank_of_R, order)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("nodes", [1, 2])
def test_renamings_are_the_best_of_all_that_keep_nodes_together(seed, nodes):
    rng = np.random.default_rng(seed)
    old, new, topology = random_placement(rng, 2, 4, 3), random_placement(rng, 2, 4, 3), Topology(4, nodes)
    allowed = [
        list(p)
        for p in permutations(range(4))
        if nodes == 1 or all(p[2 * n] // 2 == p[2 * n + 1] // 2 for n in range(2))
    ]

    def moved_L(order: list[int]) -> np.ndarray:
        same = (old.experts_LRS[:, order][:, :, :, None] == new.experts_LRS[:, :, None, :]).any(2)
        return (~same).sum((1, 2))

    moves = count_moves(old, new, topology)
    everywhere = np.stack([moved_L(order) for order in allowed])
    assert moves.renamed_L.sum() == everywhere.sum(1).min()
    assert np.array_equal(moves.per_layer_L, everywhere.min(0))
    assert np.array_equal(moves.as_named_L, moved_L([0, 1, 2, 3]))
    assert moves.per_layer_L.sum() <= moves.renamed_L.sum() <= moves.as_named_L.sum()


def test_a_new_replica_is_one_copy():
    old = Placement(np.array([[[0, 1], [2, 3]]], np.int32), 4)
    new = Placement(np.array([[[0, 1, 2], [2, 3, 0]]], np.int32), 4)
    assert count_moves(old, new, Topology(2)).as_named_L.tolist() == [2]


def test_a_cost_matrix_forbids_renaming():
    old = Placement(np.array([[[0, 1], [2, 3]]], np.int32), 4)
    new = Placement(np.array([[[2, 3], [1, 0]]], np.int32), 4)
    topology = Topology(2, 1, np.array([[0.0, 1.0], [2.0, 0.0]]))
    assert count_moves(old, new, topology).renamed_L.tolist() == [4]


def test_plans_of_other_shapes_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="4 against 2 ranks"):
        count_moves(random_placement(rng, 1, 4, 2), random_placement(rng, 1, 2, 4), Topology(2))


def test_expert_bytes():
    assert expert_bytes(2880, 2880, 2) == 3 * 2880 * 2880 * 2
    assert expert_bytes(8, 4, 0.5) == 48
