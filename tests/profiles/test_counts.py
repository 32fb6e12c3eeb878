"""Counts equal a plain loop, add up over parts, and stay exact in a bounded sample."""

import numpy as np
import pytest

from semmoe.profiles.counts import co_activation_EE, count_batches, profile_traces, request_expert_BE, token_expert_UE
from semmoe.profiles.errors import InputError
from semmoe.profiles.split import holdout_requests, request_keys
from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic
from semmoe.profiles.trace import RoutingTrace, TraceInfo
from semmoe.profiles.trace_writer import TraceWriter


def test_co_activation_equals_a_plain_loop_and_skips_empty_slots():
    rng = np.random.default_rng(0)
    ids_TK = np.array([rng.permutation(6)[:3] for _ in range(200)], np.uint8)  # 5 is the empty slot of 5 experts
    expected = np.zeros((5, 5), int)
    for row in ids_TK:
        for a in row:
            for b in row:
                if a < 5 and b < 5:
                    expected[a, b] += 1
    np.testing.assert_array_equal(co_activation_EE(ids_TK, 5), expected)


def test_counts_add_up_over_any_parts(tmp_path):
    write_synthetic(tmp_path / "t", SyntheticWorld(num_requests=30))
    trace = RoutingTrace.open(tmp_path / "t")
    whole = count_batches([trace.load()], trace.info)
    halves = [trace.load(np.arange(30) % 2 == i) for i in range(2)]
    for one, other in zip(whole, count_batches(halves, trace.info), strict=True):
        np.testing.assert_array_equal(one, other)
    profile = profile_traces([trace])
    np.testing.assert_array_equal(profile.load_LE, whole[1])
    assert profile.load_LE.sum() == 30 * 64 * 4 * 4


def test_token_and_request_tables(tmp_path):
    token_index_T = np.array([0, 1, 0, -1])
    ids_TK = np.array([[0, 1], [2, 3], [0, 2], [1, 3]], np.uint8)
    table = token_expert_UE(token_index_T, ids_TK, 2, 3).toarray()
    np.testing.assert_array_equal(table, [[2, 1, 1], [0, 0, 1]])  # id 3 of 3 experts is empty, row 3 has no token
    np.testing.assert_array_equal(request_expert_BE(np.array([0, 0, 1, 1]), ids_TK, 2, 3), [[1, 1, 1], [1, 1, 1]])


def test_a_profile_keeps_a_bounded_sample_and_counts_all(tmp_path):
    write_synthetic(tmp_path / "t", SyntheticWorld(num_requests=40))
    trace = RoutingTrace.open(tmp_path / "t")
    keep = np.arange(40) < 30
    profile = profile_traces([trace], [keep], sample_ids=10 * 64 * 16, seed=3)
    assert profile.num_tokens == 30 * 64 and profile.sample.num_requests == 10
    assert set(profile.sample.request_ids) <= set(np.array(trace.load().request_ids)[keep])


def test_several_traces_must_be_of_one_model(tmp_path):
    write_synthetic(tmp_path / "a", SyntheticWorld(num_requests=5))
    write_synthetic(tmp_path / "b", SyntheticWorld(num_requests=5, num_experts=16))
    traces = [RoutingTrace.open(tmp_path / name) for name in "ab"]
    with pytest.raises(InputError, match="another model"):
        profile_traces(traces)


def test_holdout_is_by_request_and_by_domain(tmp_path):
    with TraceWriter(tmp_path / "t", TraceInfo("m", 1, 4, 1, (0,))) as writer:
        for i in range(10):
            writer.add(f"r{i}", np.zeros((2, 1, 1), int), domain="even" if i % 2 == 0 else "odd")
    requests = RoutingTrace.open(tmp_path / "t").requests()
    chosen = holdout_requests(requests, holdout=0.3, holdout_domains=[], seed=0)
    assert chosen.sum() == 3
    np.testing.assert_array_equal(chosen, holdout_requests(requests, holdout=0.3, holdout_domains=[], seed=0))
    np.testing.assert_array_equal(
        holdout_requests(requests, holdout=0.3, holdout_domains=["odd"], seed=0), np.arange(10) % 2 == 1
    )
    for options, message in [
        ({"holdout": 1.5, "holdout_domains": []}, "--holdout is 1.5"),
        ({"holdout": 0.2, "holdout_domains": ["x"]}, "no request has the domain 'x'; domains are: even, odd"),
        ({"holdout": 0.2, "holdout_domains": ["odd", "even"]}, "cannot be split"),
    ]:
        with pytest.raises(InputError, match=message):
            holdout_requests(requests, seed=0, **options)
    assert len(set(request_keys(requests).tolist())) == 10
