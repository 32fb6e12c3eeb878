"""Assignment under capacity: literals, capacities that always hold, nearness to the exact
optimum."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from semmoe.solvers.schedule.slices import (
    assign_equal_slices,
    assign_masked_round_robin,
    assign_requests,
    balanced_prices,
    fill_slices,
    softmax,
)


def test_overflow_goes_to_the_next_best_rank():
    # All want rank 0, which holds two: those that lose most elsewhere stay, the others take their
    # own second choice.
    scores_TR = np.array([[0.9, 0.1, 0.0], [0.8, 0.7, 0.0], [0.6, 0.1, 0.5], [0.9, 0.0, 0.2]])
    assert fill_slices(scores_TR, np.array([2, 2, 2])).tolist() == [0, 1, 2, 0]


def test_overflow_of_the_overflow_moves_on():
    # The first loses most without rank 0; of the others the last loses more without rank 1.
    scores_TR = np.array([[3.0, 2.0, 1.0], [3.0, 2.5, 1.0], [3.0, 2.9, 1.0]])
    assert fill_slices(scores_TR, np.array([1, 1, 1])).tolist() == [0, 2, 1]


def test_prices_split_a_frequent_row_over_the_ranks():
    scores_TR, weight_T = np.array([[1.0, 0.0], [0.0, 0.2]]), np.array([9.0, 1.0])
    prices_R, temperature = balanced_prices(scores_TR, weight_T, sweeps=200)
    shares_TR = softmax(scores_TR - prices_R, temperature)
    np.testing.assert_allclose(weight_T @ shares_TR, [5, 5], atol=0.05)
    assert 0 < shares_TR[0, 1] < 1


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


@settings(max_examples=40, deadline=None)
@given(requests=st.integers(1, 24), ranks=st.integers(1, 5), seed=st.integers(0, 10**6))
@example(requests=4, ranks=2, seed=4)  # 5 requests against 3, a few tokens over the cap
def test_windows_keep_the_cap_on_tokens_where_requests_are_short(requests, ranks, seed):
    rng = np.random.default_rng(seed)
    tokens_B = rng.integers(90, 110, requests * ranks)  # a balanced split exists, one request is a small part
    rank_of_B = assign_requests(rng.normal(size=(len(tokens_B), ranks)), tokens_B, token_cap=1.25)
    load_R = np.bincount(rank_of_B, tokens_B, ranks)
    assert load_R.max() <= 1.25 * load_R.mean()


def test_requests_go_to_their_ranks_when_that_is_balanced():
    scores_BR = np.array([[0.0, 0.9], [0.8, 0.1], [0.1, 0.7], [0.9, 0.0]])
    assert assign_requests(scores_BR, np.array([10, 10, 10, 10])).tolist() == [1, 0, 1, 0]


def test_a_request_moves_away_from_a_rank_that_is_full():
    rank_of_B = assign_requests(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([10, 10]), load_R=np.array([20.0, 0.0]))
    assert rank_of_B.tolist() == [1, 1]


def test_one_long_request_leaves_its_rank_to_itself():
    rank_of_B = assign_requests(np.array([[1.0, 0.0]] * 4), np.array([300, 100, 100, 100]))
    assert (rank_of_B[1:] != rank_of_B[0]).all()


def test_masked_round_robin_gives_every_rank_one_request_a_round():
    scores_BR = np.array([[9, 1, 0], [8, 2, 5], [7, 1, 3], [0, 4, 9], [0, 1, 8]])
    assert assign_masked_round_robin(scores_BR).tolist() == [0, 2, 1, 2, 1]
