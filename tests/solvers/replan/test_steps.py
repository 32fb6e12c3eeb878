"""Moves in steps: budgets counted, slots of stayers kept, every prefix a placement that serves, one
spare slot a rank enough, there and back exact."""

import numpy as np
import pytest

from semmoe.profiles.errors import InputError
from semmoe.solvers.placement import Topology
from semmoe.solvers.replan.steps import NONE, apply_moves, inverse_moves, steps_between, transfers_of

CASES = [(8, 4, 2, 1), (12, 4, 3, 2), (12, 4, 4, 2), (16, 4, 7, 1), (7, 3, 3, 1), (6, 8, 1, 4), (9, 5, 2, 1)]


def random_slots(num_experts: int, num_ranks: int, num_slots: int, rng: np.random.Generator) -> np.ndarray:
    """Slots [R, S] that hold every expert at least once, none twice on a rank, empty ones last."""
    while True:
        slots = [rng.permutation(num_experts)[:num_slots] for _ in range(num_ranks)]
        first = rng.permutation(num_experts)
        held = [list(dict.fromkeys([*first[r::num_ranks], *slots[r]]))[:num_slots] for r in range(num_ranks)]
        if len({int(e) for row in held for e in row}) == num_experts:
            return np.array([[*row, *[NONE] * (num_slots - len(row))] for row in held], np.int32)


def hosts(slots_RS: np.ndarray, num_experts: int) -> np.ndarray:
    hosts_ER = np.zeros((num_experts, len(slots_RS)), bool)
    rank, slot = np.nonzero(slots_RS >= 0)
    hosts_ER[slots_RS[rank, slot], rank] = True
    return hosts_ER


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(6))
def test_every_prefix_serves_and_the_end_is_what_was_asked(case, seed):
    num_experts, num_ranks, num_slots, num_nodes = case
    rng = np.random.default_rng(seed)
    old_RS = random_slots(num_experts, num_ranks, num_slots, rng)
    new_ER = hosts(random_slots(num_experts, num_ranks, num_slots, rng), num_experts)
    if not np.array_equal(new_ER.sum(axis=0), (old_RS >= 0).sum(axis=1)):
        pytest.skip("ranks with another number of experts")
    topology = Topology(num_ranks, num_nodes)
    new_RS, moves = steps_between(old_RS, new_ER, topology)
    old_ER = hosts(old_RS, num_experts)
    assert np.array_equal(hosts(new_RS, num_experts), new_ER)
    assert np.array_equal(apply_moves(old_RS, moves), new_RS)
    assert sum(move.kind != "drop" for move in moves) == (new_ER & ~old_ER).sum(), "each arrival is one load"
    stays = (old_RS >= 0) & (old_ER & new_ER)[np.maximum(old_RS, 0), np.arange(num_ranks)[:, None]]
    assert (new_RS[stays] == old_RS[stays]).all(), "who stays on a rank stays in the slot"
    back = inverse_moves(new_RS, moves)
    assert np.array_equal(apply_moves(new_RS, back), old_RS)
    for start_RS, way in ((old_RS, moves), (new_RS, back)):
        check_prefixes(start_RS, way, num_experts, topology)
        check_transfers(start_RS, way)


def check_transfers(start_RS: np.ndarray, moves: list) -> None:
    """Weights that travel as told, into slots that nothing clears, end where they are to."""
    weights_RS = start_RS.copy()
    for sent in transfers_of(start_RS, moves):
        assert len({transfer.to_rank for transfer in sent}) == len(sent), "one spare a rank"
        spare = [weights_RS[transfer.from_rank, transfer.from_slot] for transfer in sent]
        for transfer, weight in zip(sent, spare, strict=True):
            assert weight == transfer.expert
            weights_RS[transfer.to_rank, transfer.to_slot] = weight
    end_RS = apply_moves(start_RS, moves)
    assert (weights_RS == end_RS)[end_RS >= 0].all()


def check_prefixes(start_RS: np.ndarray, moves: list, num_experts: int, topology: Topology) -> None:
    now_RS = start_RS.copy()
    assert [move.step for move in moves] == sorted(move.step for move in moves)
    for step in sorted({move.step for move in moves}):
        at_once = [move for move in moves if move.step == step]
        receivers = [move.to_rank for move in at_once if move.kind != "drop"]
        assert len(receivers) == len(set(receivers)), "a rank receives one expert at a time, into its spare slot"
        leaving = {(move.from_rank, move.from_slot) for move in at_once if move.kind != "copy"}
        for move in at_once:
            assert now_RS[move.from_rank, move.from_slot] == move.expert, "read where it is"
            holders = np.flatnonzero((now_RS == move.expert).any(axis=1))
            if move.kind != "drop":
                assert now_RS[move.to_rank, move.to_slot] == NONE or (move.to_rank, move.to_slot) in leaving
                near = topology.node_of_R[holders] == topology.node_of_R[move.to_rank]
                assert move.nearest_holder in holders
                assert not near.any() or topology.node_of_R[move.nearest_holder] == topology.node_of_R[move.to_rank]
        now_RS = apply_moves(now_RS, at_once)
        assert hosts(now_RS, num_experts).any(axis=1).all(), "every expert is somewhere after every step"


def test_a_swap_is_one_step_of_two_ranks():
    new_RS, moves = steps_between(np.array([[0, 1], [2, 3]]), hosts(np.array([[0, 2], [1, 3]]), 4), Topology(2))
    assert new_RS.tolist() == [[0, 2], [1, 3]]
    assert [move.step for move in moves] == [0, 0]


def test_what_no_move_keeps_is_refused():
    old_RS = np.array([[0, 1], [2, 3]])
    with pytest.raises(InputError, match="rank 0 would hold 1 experts, it has 2 slots in use"):
        steps_between(old_RS, hosts(np.array([[0, NONE, NONE], [1, 2, 3]]), 4), Topology(2))
    with pytest.raises(InputError, match="expert 3 would be on no rank"):
        steps_between(old_RS, hosts(np.array([[0, 1], [2, 0]]), 4), Topology(2))
