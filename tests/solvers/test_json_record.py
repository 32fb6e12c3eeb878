"""Records come back from JSON as they were; a value that does not fit is told with its place."""

import json

import pytest

from semmoe.solvers.evaluate.compare import Comparison, NoMoves, PlanMoves
from semmoe.solvers.evaluate.report import DomainScores, ScoreRow, WhatIf

ROW = ScoreRow("plan", "random", 0.25, 1.5, 0.5, 2, 1.1, 1.2, 1, ci={"rem": (1.0, 2.0)})
MOVES = PlanMoves("a", "b", 8, 4, 3, 2, 40, 30, 20, old_rank_of=[1, 0], layers=[])


def through_json(record):
    return type(record).from_json(json.loads(json.dumps(record.to_json())))


def test_records_round_trip_and_nothing_is_added():
    for record in (ROW, DomainScores("d", 1, 2, [ROW]), WhatIf(1, 2, [], [])):
        assert through_json(record) == record
    layer = ScoreRow.from_json({name: value for name, value in ROW.to_json().items() if name != "ci"})
    assert layer.ci is None and "ci" not in layer.to_json() and layer.interval("rem") == (1.5, 1.5)


def test_a_list_of_two_kinds_and_a_key_that_python_keeps():
    facts = {"trace": "t", "model": "m", "dispatch": "per-rank", "requests": 1, "tokens": 2, "bytes_per_expert": 0}
    moves = [MOVES, NoMoves("a", "c", "4 against 8 ranks")]
    compared = Comparison(**facts, plans=[], rows=[ROW], differences=[], moves=moves)
    assert [found["from"] for found in compared.to_json()["moves"]] == ["a", "a"]
    assert through_json(compared) == compared


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"requests": "one"}, "requests is 'one', expected int"),
        ({"requests": True}, "requests is 'True', expected int"),
        ({"rows": {}}, "rows is no list"),
        ({"rows": [[]]}, r"rows\[0\] is no object"),
        ({"rows": [{"placement": "plan"}]}, r"rows\[0\] lacks 'schedule', 'lar'"),
        ({"rows": [ROW.to_json() | {"ci": {"rem": [1.0]}}]}, r"rows\[0\]\.ci\.rem is no list of 2"),
    ],
)
def test_a_value_that_does_not_fit_is_told_with_its_place(change, message):
    with pytest.raises(ValueError, match=message):
        DomainScores.from_json(DomainScores("d", 1, 2, [ROW]).to_json() | change)
