"""Slots of a rank: what was asked for, and numbers that work where it does not fit."""

import pytest

from semmoe.profiles.errors import InputError
from semmoe.solvers.demands import Demands
from semmoe.solvers.placement import part_sizes
from semmoe.solvers.slots import Slots


@pytest.mark.parametrize(
    ("experts", "ranks", "asked", "slots"),
    [
        (32, 5, {}, Slots(7)),
        (32, 40, {}, Slots(1)),
        (256, 72, {"redundant": 32}, Slots(4)),
        (160, 12, {}, Slots(14)),
        (256, 320, {"redundant": 64}, Slots(1)),
        (32, 4, {"replicas": 2}, Slots(10)),
        (32, 5, {"replicas": 2}, Slots(9)),
        (32, 5, {"slots": 8}, Slots(8)),
        (32, 5, {"spare": "empty"}, Slots(7, copies=False)),
        (32, 4, {"redundant": 0}, Slots(8)),
    ],
)
def test_slots_that_were_asked_for(experts: int, ranks: int, asked: dict, slots: Slots) -> None:
    assert Demands(**asked).slots_of(experts, ranks) == slots


@pytest.mark.parametrize(
    ("experts", "ranks", "asked", "message"),
    [
        (256, 72, {"redundant": 30}, "256 \\+ 30 slots do not divide over 72 ranks; --redundant 32 would"),
        (256, 72, {"redundant": 40}, "--redundant 32 or 104 would"),
        (256, 72, {"redundant": 5}, "--redundant 32 would"),
        (8, 2, {"redundant": 10}, "2 ranks can hold 0 to 8 copies of 8 experts; --redundant 8 would"),
        (32, 5, {"slots": 6}, "5 ranks hold 32 experts in 7 to 32 slots each"),
        (32, 5, {"slots": 33}, "5 ranks hold 32 experts in 7 to 32 slots each"),
        (32, 5, {"replicas": 26}, "a rank can host 25 more experts at most"),
        (32, 5, {"slots": 8, "replicas": 1}, "--slots and --replicas all say how many slots a rank has"),
        (32, 5, {"spare": "empty", "replicas": 1}, "--spare empty holds every expert once, in 7 slots a rank"),
    ],
)
def test_refusals_name_numbers_that_work(experts: int, ranks: int, asked: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Demands(**asked).slots_of(experts, ranks)


def test_even_shares() -> None:
    assert part_sizes(32, 5).tolist() == [7, 7, 6, 6, 6]
    assert part_sizes(3, 5).tolist() == [1, 1, 1, 0, 0]
