"""What goes where, by hand: 2 ranks with 2 slots each, experts 0 and 1 on rank 0, 2 and 3 on
rank 1."""

import torch
from torch.testing import assert_close

from semmoe.runtime.layer.permute import (
    find_destinations,
    local_pairs,
    pack_rows,
    received_pairs,
    remote_rows,
    row_sections,
    unpack_rows,
)

RANK_OF_E, SLOT_OF_E = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
IDS_TK = torch.tensor([[0, 2], [2, 3], [0, 1]])
WEIGHT_TK = torch.tensor([[0.75, 0.25], [0.5, 0.5], [1.0, 0.0]])
HIDDEN_TD = torch.arange(9.0).reshape(3, 3)


def test_destinations() -> None:
    to = find_destinations(RANK_OF_E[IDS_TK], SLOT_OF_E[IDS_TK], 2)
    assert to.rank_TK.tolist() == [[0, 1], [1, 1], [0, 0]]
    assert to.slot_TK.tolist() == [[0, 0], [0, 1], [0, 1]]
    assert to.needs_RT.tolist() == [[True, False, True], [True, True, False]]
    assert (to.rows_R.tolist(), to.pairs_R.tolist()) == ([2, 2], [3, 3])


def test_a_token_goes_once_to_a_rank() -> None:
    to = find_destinations(RANK_OF_E[IDS_TK], SLOT_OF_E[IDS_TK], 2)
    rows = remote_rows(to, WEIGHT_TK, rank=0, slots_per_rank=2, num_rows=2)
    assert rows.token_M.tolist() == [0, 1]
    assert rows.slot_MK.tolist() == [[2, 0], [0, 1]]  # 2: served elsewhere
    assert rows.weight_MK.tolist() == [[0.0, 0.25], [0.5, 0.5]]


def test_rows_are_grouped_by_rank() -> None:
    ids_TK = torch.tensor([[0, 2, 5], [5, 4, 1]])
    to = find_destinations(ids_TK // 2, ids_TK % 2, 3)
    rows = remote_rows(to, torch.ones(2, 3), rank=1, slots_per_rank=2, num_rows=4)
    assert rows.token_M.tolist() == [0, 1, 0, 1]  # rank 0 gets tokens 0 and 1, then rank 2
    assert rows.slot_MK.tolist() == [[0, 2, 2], [2, 2, 1], [2, 2, 1], [1, 0, 2]]


def test_local_choices_stay() -> None:
    to = find_destinations(RANK_OF_E[IDS_TK], SLOT_OF_E[IDS_TK], 2)
    token_P, slot_P, weight_P = local_pairs(to, WEIGHT_TK, rank=0, num_pairs=3)
    assert (token_P.tolist(), slot_P.tolist(), weight_P.tolist()) == ([0, 2, 2], [0, 0, 1], [0.75, 1.0, 0.0])


def test_received_rows_name_their_work() -> None:
    slot_MK = torch.tensor([[2, 0], [0, 1]], dtype=torch.int16)
    row_P, slot_P, weight_P = received_pairs(
        slot_MK, torch.tensor([[0.0, 0.25], [0.5, 0.5]]), slots_per_rank=2, num_pairs=3
    )
    assert (row_P.tolist(), slot_P.tolist(), weight_P.tolist()) == ([0, 1, 1], [0, 0, 1], [0.25, 0.5, 0.5])


def test_packed_rows_come_out_as_they_went_in() -> None:
    to = find_destinations(RANK_OF_E[IDS_TK], SLOT_OF_E[IDS_TK], 2)
    rows = remote_rows(to, WEIGHT_TK, rank=0, slots_per_rank=2, num_rows=2)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        packed = pack_rows(HIDDEN_TD.to(dtype), rows)
        hidden_MD, slot_MK, weight_MK = unpack_rows(packed, 3, 2, dtype, torch.float32)
        assert_close(hidden_MD, HIDDEN_TD[:2].to(dtype), rtol=0, atol=0)
        assert_close(slot_MK, rows.slot_MK, rtol=0, atol=0)
        assert_close(weight_MK, rows.weight_MK, rtol=0, atol=0)


def test_sections_of_a_row_are_aligned() -> None:
    assert row_sections(3, 2, torch.float32, torch.float32) == (16, 24, 32)  # 12 -> 16, + 8, + 4 -> 32
    assert row_sections(2880, 4, torch.bfloat16, torch.float32) == (5760, 5776, 5784)


def test_nothing_to_send() -> None:
    to = find_destinations(RANK_OF_E[IDS_TK[:0]], SLOT_OF_E[IDS_TK[:0]], 2)
    rows = remote_rows(to, WEIGHT_TK[:0], rank=0, slots_per_rank=2, num_rows=0)
    hidden_MD, slot_MK, _ = unpack_rows(pack_rows(HIDDEN_TD[:0], rows), 3, 2, torch.float32, torch.float32)
    assert (list(hidden_MD.shape), list(slot_MK.shape)) == ([0, 3], [0, 2])
    assert [len(part) for part in received_pairs(slot_MK, torch.zeros(0, 2), slots_per_rank=2, num_pairs=0)] == [
        0,
        0,
        0,
    ]
