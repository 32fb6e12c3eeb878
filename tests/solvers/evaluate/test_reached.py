"""Ranks that a token reaches: every way to ask gives the count by hand, for any number of ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic
from semmoe.profiles.trace import RoutingTrace, TraceBatch
from semmoe.solvers.evaluate.metrics import metrics_XL, score, uniform_scores
from semmoe.solvers.evaluate.reached import rank_rows_LRR, reached_ranks, reached_T, reached_TR
from semmoe.solvers.evaluate.sums import traffic_sums
from semmoe.solvers.health.drift import rem_T
from semmoe.solvers.place.remote_gains import remote_cost
from semmoe.solvers.placement import Topology

RANKS = [1, 2, 7, 63, 64, 65, 96, 128, 256, 1000]


def batch_of(ids_TLK: np.ndarray, num_requests: int = 4) -> TraceBatch:
    """A batch of nearly equal requests without token ids."""
    num_tokens = len(ids_TLK)
    starts_B1 = np.linspace(0, num_tokens, num_requests + 1).astype(np.int64)
    zeros_B = np.zeros(num_requests, np.int64)
    return TraceBatch(
        [f"r{b}" for b in range(num_requests)],
        [""] * num_requests,
        starts_B1,
        ids_TLK,
        np.full(num_tokens, -1, np.int32),
        np.zeros(num_tokens, bool),
        zeros_B,
        zeros_B,
        np.zeros(num_requests + 1, np.int64),
        np.empty(0, np.int32),
    )


def routed(seed: int, top_k: int, *, num_experts: int = 512, num_tokens: int = 60) -> np.ndarray:
    """Choices of two layers, [T, 2, K]: different experts for each token, some slots empty."""
    rng = np.random.default_rng(seed)
    ids_TLK = rng.random((num_tokens, 2, num_experts)).argsort(axis=2)[:, :, :top_k]
    ids_TLK[rng.random(ids_TLK.shape) < 0.05] = num_experts
    return ids_TLK.astype(np.uint16)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(RANKS), st.sampled_from([1, 3, 8, 20]))
def test_every_form_of_the_count_is_the_count_by_hand(seed, num_ranks, top_k):
    rng = np.random.default_rng(seed + 1)
    ids_TK = routed(seed, top_k)[:, 0]
    rank_of_E = rng.integers(0, num_ranks, 512)
    by_hand = [{int(rank_of_E[e]) for e in ids_K if e < 512} for ids_K in ids_TK]
    assert reached_T(ids_TK, rank_of_E, num_ranks).tolist() == [len(ranks) for ranks in by_hand]
    assert [set(np.flatnonzero(needed_R)) for needed_R in reached_TR(ids_TK, rank_of_E, num_ranks)] == by_hand
    assert remote_cost(rank_of_E, ids_TK, np.ones((len(ids_TK), num_ranks))) == sum(map(len, by_hand))
    # With replicas the ranks depend on where the token lives.
    serving_RE, home_T = rng.integers(0, num_ranks, (num_ranks, 512)), rng.integers(0, num_ranks, len(ids_TK))
    ranks_KT, first_KT = reached_ranks(ids_TK, serving_RE, home_T)
    for t, ids_K in enumerate(ids_TK):
        expected = {int(serving_RE[home_T[t], e]) for e in ids_K if e < 512}
        assert sorted(ranks_KT[first_KT[:, t], t].tolist()) == sorted(expected)


@pytest.mark.parametrize("num_ranks", [4, 64, 65, 96, 128, 256])
@pytest.mark.parametrize("dispatch", ["per-rank", "per-expert"])
@pytest.mark.parametrize("replicated", [False, True])
def test_rows_between_ranks_add_up_to_the_metrics(num_ranks, dispatch, replicated):
    rng = np.random.default_rng(num_ranks)
    batch, topology = batch_of(routed(0, 8)), Topology(num_ranks)
    serving_LRE = rng.integers(0, num_ranks, (2, num_ranks, 512))
    if not replicated:
        serving_LRE[:] = serving_LRE[:, :1]
    for homes_TL in (None, rng.integers(0, num_ranks, (batch.num_tokens, 2)).astype(np.int16)):
        sums = traffic_sums(batch, serving_LRE, topology, dispatch=dispatch, homes_TL=homes_TL)
        rows_LRR = rank_rows_LRR(batch, serving_LRE, dispatch=dispatch, homes_TL=homes_TL)
        away_LRR = rows_LRR * (1 - np.eye(num_ranks))
        np.testing.assert_allclose(away_LRR.sum(1), sums.ingress_GLP.sum(0) / batch.num_tokens, atol=1e-12)
        np.testing.assert_allclose(away_LRR.sum(2), sums.egress_GLP.sum(0) / batch.num_tokens, atol=1e-12)
        if dispatch == "per-rank":
            metrics = metrics_XL(sums.resampled(np.ones((1, 4))), topology, dispatch)
            np.testing.assert_allclose(away_LRR.sum((1, 2)), metrics["rem"][0])


@pytest.mark.parametrize(("num_ranks", "reached"), [(128, 7.89), (256, 8.0)])
def test_traffic_between_many_ranks_is_not_that_of_64(num_ranks, reached):
    """Top-8 of 256 experts at random reach nearly 8 ranks; ranks as bits of one word gave half."""
    rng = np.random.default_rng(1)
    ids_TLK = rng.random((2000, 2, 256)).argsort(axis=2)[:, :, :8].astype(np.uint16)
    serving_LRE = np.broadcast_to(np.arange(256) * num_ranks // 256, (2, num_ranks, 256))
    rows_LRR = rank_rows_LRR(batch_of(ids_TLK), serving_LRE, dispatch="per-rank")
    assert rows_LRR.sum((1, 2)).mean() == pytest.approx(reached, rel=0.005)
    assert rem_T(ids_TLK.transpose(1, 0, 2), serving_LRE[:, 0], num_ranks).mean() == pytest.approx(
        rows_LRR.sum((1, 2)).mean() * (1 - 1 / num_ranks)
    )  # of learning curves and drift
    away = (rows_LRR * (1 - np.eye(num_ranks))).sum((1, 2)).mean()
    assert away == pytest.approx(uniform_scores(256, 8, Topology(num_ranks))["rem"], rel=0.005)


def test_quick_rem_agrees_with_the_metrics(tmp_path):
    write_synthetic(tmp_path / "t", SyntheticWorld(num_requests=20))
    batch, topology = RoutingTrace.open(tmp_path / "t").load(), Topology(4)
    rank_of_LE = np.random.default_rng(0).permuted(np.tile(np.arange(32) % 4, (4, 1)), axis=1)
    serving_LRE = np.broadcast_to(rank_of_LE[:, None], (4, 4, 32))
    sums = traffic_sums(batch, serving_LRE, topology, dispatch="per-rank")
    scores = score(sums, topology, dispatch="per-rank", num_resamples=2)
    ids_LTK = np.moveaxis(batch.expert_ids_TLK, 1, 0)
    assert rem_T(ids_LTK, rank_of_LE, 4).mean() == pytest.approx(scores.means["rem"])
