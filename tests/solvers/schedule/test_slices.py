"""Equal slices: literals, capacities that always hold, nearness to the exact optimum."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from semmoe.solvers.schedule.slices import assign_equal_slices, fill_slices


def test_overflow_goes_to_the_next_best_rank():
    # All want rank 0, which holds two: those that lose most elsewhere stay, the others take their
    # own second choice.
    scores_TR = np.array([[0.9, 0.1, 0.0], [0.8, 0.7, 0.0], [0.6, 0.1, 0.5], [0.9, 0.0, 0.2]])
    assert fill_slices(scores_TR, np.array([2, 2, 2])).tolist() == [0, 1, 2, 0]


def test_overflow_of_the_overflow_moves_on():
    # The first loses most without rank 0; of the others the last loses more without rank 1.
    scores_TR = np.array([[3.0, 2.0, 1.0], [3.0, 2.5, 1.0], [3.0, 2.9, 1.0]])
    assert fill_slices(scores_TR, np.array([1, 1, 1])).tolist() == [0, 2, 1]


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(0, 70), ranks=st.integers(1, 9), seed=st.integers(0, 10**6), ties=st.booleans())
def test_slices_never_overflow_and_do_not_depend_on_chance(tokens, ranks, seed, ties):
    scores_TR = np.random.default_rng(seed).normal(size=(tokens, ranks)).astype(np.float32)
    if ties:
        scores_TR = np.round(scores_TR)
    rank_of_T = assign_equal_slices(scores_TR)
    assert rank_of_T.shape == (tokens,)
    assert np.bincount(rank_of_T, minlength=ranks).max(initial=0) <= -(-tokens // ranks)
    np.testing.assert_array_equal(rank_of_T, assign_equal_slices(scores_TR.copy()))


@pytest.mark.parametrize("value", [0.0, -3.5, 1e6])
def test_tokens_without_a_preference_are_spread(value):
    counts_R = np.bincount(assign_equal_slices(np.full((12, 4), value, np.float32)), minlength=4)
    assert counts_R.tolist() == [3, 3, 3, 3]


def test_equal_slices_come_near_the_exact_assignment():
    rng = np.random.default_rng(3)
    # Half of all tokens prefer two ranks: demand is far from equal.
    scores_TR = rng.dirichlet(np.ones(8) * 0.3, 256) + np.array([0.3, 0.2, 0, 0, 0, 0, 0, 0])
    reached = scores_TR[np.arange(256), assign_equal_slices(scores_TR)].sum()
    rows, columns = linear_sum_assignment(-np.repeat(scores_TR, 32, axis=1))
    best = scores_TR[rows, columns // 32].sum()
    assert 0.99 * best <= reached <= best + 1e-9
