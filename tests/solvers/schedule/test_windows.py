"""Request windows: literals, capacities that always hold, and the order of arrival."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from semmoe.solvers.schedule.windows import (
    assign_masked_round_robin,
    assign_requests,
    request_tokens_B,
    window_imbalance,
    windows_of,
)


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


def test_one_long_request_leaves_its_rank_to_itself():
    rank_of_B = assign_requests(np.array([[1.0, 0.0]] * 4), np.array([300, 100, 100, 100]))
    assert (rank_of_B[1:] != rank_of_B[0]).all()


@settings(max_examples=25, deadline=None)
@given(requests=st.integers(2, 60), ranks=st.integers(2, 8), seed=st.integers(0, 10**6))
def test_the_order_within_a_window_decides_nothing(requests, ranks, seed):
    rng = np.random.default_rng(seed)
    scores_BR, tokens_B = rng.normal(size=(requests, ranks)), rng.integers(10, 400, requests)
    order = rng.permutation(requests)
    rank_of_B = assign_requests(scores_BR, tokens_B)
    np.testing.assert_array_equal(assign_requests(scores_BR[order], tokens_B[order]), rank_of_B[order])


def test_every_window_is_balanced_by_itself():
    # Each window would rather be on one rank: the first on rank 0, the second on rank 1.
    scores_BR = np.repeat([[1.0, 0.0], [0.0, 1.0]], 6, axis=0)
    tokens_B = np.full(12, 10)
    rank_of_B = assign_requests(scores_BR, tokens_B, window=6)
    assert np.bincount(rank_of_B[:6]).tolist() == np.bincount(rank_of_B[6:]).tolist() == [3, 3]
    assert window_imbalance(rank_of_B, tokens_B, 2, window=6) == 1
    apart = np.repeat([0, 1], 6)
    assert window_imbalance(apart, tokens_B, 2, window=12) == 1 < window_imbalance(apart, tokens_B, 2, window=6) == 2
    assert window_imbalance(apart, 0 * tokens_B, 2) == 1


@pytest.mark.parametrize(("requests", "sizes"), [(256, [256]), (257, [129, 128]), (600, [200] * 3), (0, [0])])
def test_windows_are_nearly_equal_runs(requests, sizes):
    windows = windows_of(requests, 256)
    assert [len(window) for window in windows] == sizes
    assert np.concatenate(windows).tolist() == list(range(requests))


def test_a_request_counts_as_what_reaches_the_experts():
    assert request_tokens_B(np.array([3, 5]), 1).tolist() == [3, 5]  # the one token of an answer never does
    assert request_tokens_B(np.array([3, 5]), 8).tolist() == [10, 12]


def test_masked_round_robin_gives_every_rank_one_request_a_round():
    scores_BR = np.array([[9, 1, 0], [8, 2, 5], [7, 1, 3], [0, 4, 9], [0, 1, 8]])
    assert assign_masked_round_robin(scores_BR).tolist() == [0, 2, 1, 2, 1]
