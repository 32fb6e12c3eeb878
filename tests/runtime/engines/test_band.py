"""The band rule: the best score among ranks that are not too busy, and never a rank that is not
there."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semmoe.profiles.errors import InputError
from semmoe.runtime.engines.band import DECISIONS, Band, Choice


def test_an_idle_server_takes_the_best_rank():
    assert Band(3).choose(np.array([0.1, 0.3, -0.4]), [0, 0, 0], tokens=50) == Choice(1, "affine")


def test_a_busy_rank_is_passed_over_for_the_next_best():
    scores = np.array([0.1, 0.3, -0.4])
    assert Band(3).choose(scores, [0, 500, 0], tokens=50) == Choice(0, "spilled")
    assert Band(3).choose(scores, [500, 500, 0], tokens=50) == Choice(2, "spilled")
    assert Band(3, float("inf")).choose(scores, [0, 500, 0], tokens=50) == Choice(1, "affine")


def test_the_band_is_that_of_the_mean_with_the_request_counted():
    scores, load = np.array([0.2, -0.2]), [120, 100]
    assert Band(2, 1.0).choose(scores, load, tokens=19) == Choice(1, "spilled")  # mean 119.5
    assert Band(2, 1.0).choose(scores, load, tokens=20) == Choice(0, "affine")


def test_ranks_that_are_down_count_for_nothing():
    scores = np.array([0.1, 0.3, -0.4])
    assert Band(3).choose(scores, [0, 0, 0], [True, False, True], tokens=5) == Choice(0, "affine")
    assert Band(3).choose(scores, [900, 0, 100], [True, False, True], tokens=5) == Choice(2, "spilled")
    assert Band(3).choose(scores, [0, 0, 0], [False] * 3) == Choice(-1, "unknown")


def test_nothing_known_leaves_the_choice_to_the_engine():
    assert Band(2).choose(np.zeros(2), [0, 0]) == Choice(-1, "unknown")


def test_equal_scores_go_to_the_less_loaded_rank():
    assert Band(3).choose(np.array([0.2, 0.2, -0.4]), [10, 5, 5], tokens=50).rank == 1


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_the_load_the_rank_is_allowed_and_within_the_band(data):
    ranks = data.draw(st.integers(1, 9))
    load = np.array(data.draw(st.lists(st.integers(0, 10_000), min_size=ranks, max_size=ranks)))
    allowed = np.array(data.draw(st.lists(st.booleans(), min_size=ranks, max_size=ranks)))
    scores = np.array(data.draw(st.lists(st.floats(-1, 1), min_size=ranks, max_size=ranks)))
    tokens, band = data.draw(st.integers(1, 4_000)), data.draw(st.floats(1, 3))
    rank, decision = Band(ranks, band).choose(scores, load, allowed, tokens=tokens)
    assert decision in DECISIONS
    if not allowed.any() or not scores.any():
        assert (rank, decision) == (-1, "unknown")
        return
    assert allowed[rank]
    limit = max(band * (load[allowed].sum() + tokens) / allowed.sum(), load[allowed].min())
    assert load[rank] <= limit and scores[rank] == scores[allowed & (load <= limit)].max()
    assert (decision == "affine") == (scores[rank] == scores[allowed].max())


@pytest.mark.parametrize("wrong", [(0, 1.1), (2, 0.9), (2, float("nan"))])
def test_a_band_that_means_nothing_is_refused(wrong):
    with pytest.raises(InputError, match="expected at least 1"):
        Band(*wrong)
