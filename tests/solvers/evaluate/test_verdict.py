"""The verdict: which decision an interval leads to, what each dispatch kind counts, and that the
interval is paired."""

import numpy as np
import pytest

from semmoe.solvers.evaluate.report import ScoreRow
from semmoe.solvers.evaluate.sums import TrafficSums
from semmoe.solvers.evaluate.verdict import Saving, best_row, judge, saving
from semmoe.solvers.placement import Topology


def sums_of(remote_G: np.ndarray, local_G: np.ndarray) -> TrafficSums:
    """Sums of groups of 100 tokens with 4 activations each, one layer, two ranks."""
    sums = TrafficSums.zeros(len(remote_G), 1, 2, 2)
    sums.tokens_G[:] = 100
    sums.activations_GL[:] = 400
    sums.local_GL[:, 0] = local_G
    sums.remote_ranks_GL[:, 0] = remote_G
    sums.remote_nodes_GL[:, 0] = remote_G / 10
    sums.load_GLR[:] = 200
    return sums


@pytest.mark.parametrize(
    ("low", "high", "decision", "level"),
    [
        (0.20, 0.30, "recommend", "good"),
        (0.01, 0.04, "not worth it", "bad"),
        (-0.30, -0.20, "not worth it", "bad"),
        (0.02, 0.20, "insufficient evidence", "watch"),
    ],
)
def test_the_interval_decides(low, high, decision, level):
    found = judge(Saving((low + high) / 2, low, high, 100, 10_000), dispatch="per-rank")
    assert (found.decision, found.level) == (decision, level)
    assert (found.tokens_needed is None) == (decision != "insufficient evidence")


def test_tokens_needed_grow_with_the_square_of_the_interval():
    near = judge(Saving(0.10, 0.04, 0.16, 100, 10_000), dispatch="per-rank")
    wide = judge(Saving(0.10, -0.05, 0.25, 100, 10_000), dispatch="per-rank")
    assert near.tokens_needed == 14_400 and wide.tokens_needed == 90_000
    never = judge(Saving(0.05, 0.0, 0.1, 100, 10_000), dispatch="per-rank")
    assert never.tokens_needed is None and "more tokens than any trace" in never.sentence


def test_few_requests_are_no_evidence_and_gather_never_pays():
    few = judge(Saving(0.5, 0.45, 0.55, 5, 1_000), dispatch="per-rank")
    assert few.decision == "insufficient evidence" and few.tokens_needed == 4_000
    assert judge(Saving(0.5, 0.45, 0.55, 500, 1_000), dispatch="gather").decision == "not worth it"


def test_the_sentence_names_the_schedule_and_the_numbers():
    for schedule, opening in (
        ("random", "Recommend: at least 5% is saved (placement alone"),
        ("dp-scorer", "With the plug-in or router, recommend: at least 5% is saved (placement with dp-scorer"),
        ("tp-context", "Research only: at least 5% is saved (placement with tp-context"),
    ):
        sentence = judge(Saving(0.25, 0.2, 0.3, 100, 1_000), dispatch="per-rank", schedule=schedule).sentence
        assert sentence == (f"{opening} saves 25.0% of the bytes against contiguous experts, interval 20.0% to 30.0%).")


@pytest.mark.parametrize(
    ("dispatch", "share"), [("per-rank", 0.25), ("per-node", 0.25), ("per-expert", 0.5), ("gather", 0)]
)
def test_what_is_saved_follows_the_dispatch_kind(dispatch, share):
    before, after = sums_of(np.full(30, 200.0), np.full(30, 100.0)), sums_of(np.full(30, 150.0), np.full(30, 250.0))
    found = saving(before, after, Topology(2, 2), dispatch=dispatch, seed=0)
    assert found.share == pytest.approx(share) and found.tokens == 3_000 and found.requests == 30


def test_the_interval_is_paired():
    # Requests differ by a factor of three, the saving hardly at all: only a paired interval sees
    # it.
    before_G = np.random.default_rng(0).uniform(100, 300, 40)
    before, after = sums_of(before_G, before_G), sums_of(0.8 * before_G, before_G)
    found = saving(before, after, Topology(2), dispatch="per-rank", seed=0)
    assert found.share == pytest.approx(0.2) and found.high - found.low < 0.001


def test_no_traffic_at_all_saves_nothing():
    nothing = sums_of(np.zeros(25), np.full(25, 400.0))
    found = saving(nothing, nothing, Topology(2), dispatch="per-rank", seed=0)
    assert (found.share, found.low, found.high) == (0, 0, 0)


def test_the_best_row_is_no_oracle_and_learning_has_to_pay():
    def best(dispatch: str, **rem: float) -> str:
        rows = [
            ScoreRow("plan", name.replace("_", "-"), 1 - value / 4, value, value / 2, value, 1, 1, 1)
            for name, value in rem.items()
        ]
        return best_row(rows, dispatch).schedule

    for dispatch in ("per-rank", "per-expert", "per-node", "gather"):
        assert best(dispatch, random=2.0, tp_context=1.5, tp_learning=1.499, tp_oracle=1.0) == "tp-context"
        assert best(dispatch, random=2.0, tp_context=1.5, tp_learning=1.45, tp_oracle=1.0) == "tp-learning"
        assert best(dispatch, random=1.0, tp_context=1.5, tp_learning=1.5) == "random"
