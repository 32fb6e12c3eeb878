"""Metrics equal a token-by-token loop, expectations equal the mean over all homes, intervals
cover."""

from dataclasses import fields

import numpy as np
import pytest

from semmoe.profiles.trace import RoutingTrace, TraceInfo
from semmoe.profiles.trace_writer import TraceWriter
from semmoe.solvers.evaluate import every_home
from semmoe.solvers.evaluate.metrics import metrics_XL, resamples_XG, score, uniform_scores
from semmoe.solvers.evaluate.sums import TrafficSums, traffic_sums
from semmoe.solvers.placement import Topology

INFO = TraceInfo("m", num_layers=2, num_experts=8, top_k=3, model_layers=(0, 1), empty_slots=True)
TOPOLOGY = Topology(4, 2)


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    path = tmp_path_factory.mktemp("t") / "t"
    rng = np.random.default_rng(0)
    with TraceWriter(path, INFO) as writer:
        for i, tokens in enumerate((6, 1, 0, 9)):
            picks = [[rng.permutation(8)[:3] for _ in range(2)] for _ in range(tokens)]
            ids = np.array(picks).reshape(-1, 2, 3)
            ids[:1, 0, 1] = 8  # an empty slot
            writer.add(f"r{i}", ids)
    return RoutingTrace.open(path).load()


def serving_of(rng: np.random.Generator, replicated: bool) -> np.ndarray:
    one = rng.integers(0, 4, (2, 1, 8))
    return rng.integers(0, 4, (2, 4, 8)) if replicated else np.broadcast_to(one, (2, 4, 8))


def loop_metrics(batch, serving_LRE, homes_TL, dispatch):
    """The definitions, one token at a time: dict of [L] arrays."""
    out = {name: np.zeros(2) for name in ("lar", "rem", "node", "link", "load_imbalance", "token_imbalance")}
    tokens, targets = batch.num_tokens, 2 if dispatch == "per-node" else 4
    for layer in range(2):
        local = routed = rem = node = 0
        load, home_count, ingress, egress = np.zeros(4), np.zeros(4), np.zeros(targets), np.zeros(targets)
        for t in range(tokens):
            home = homes_TL[t, layer]
            home_count[home] += 1
            ranks = [serving_LRE[layer, home, e] for e in batch.expert_ids_TLK[t, layer] if e < 8]
            routed += len(ranks)
            local += sum(r == home for r in ranks)
            np.add.at(load, ranks, 1)
            rem += len(set(ranks) - {home})
            node += len({r // 2 for r in ranks} - {home // 2})
            if dispatch == "per-expert":
                rows = [(home, r) for r in ranks if r != home]
            elif dispatch == "per-node":
                rows = [(home // 2, n) for n in {r // 2 for r in ranks} - {home // 2}]
            else:
                rows = [(home, r) for r in set(ranks) - {home}]
            for source, target in rows:
                egress[source] += 1
                ingress[target] += 1
        out["lar"][layer], out["rem"][layer], out["node"][layer] = local / routed, rem / tokens, node / tokens
        out["link"][layer] = max(ingress.max(), egress.max()) / (tokens / targets)
        out["load_imbalance"][layer] = load.max() / load.mean()
        out["token_imbalance"][layer] = home_count.max() / home_count.mean()
    return out


@pytest.mark.parametrize("dispatch", ["per-rank", "per-expert", "per-node"])
@pytest.mark.parametrize("replicated", [False, True])
def test_metrics_of_given_homes_equal_the_loop(batch, dispatch, replicated):
    rng = np.random.default_rng(1)
    serving_LRE, homes_TL = serving_of(rng, replicated), rng.integers(0, 4, (batch.num_tokens, 2))
    sums = traffic_sums(batch, serving_LRE, TOPOLOGY, dispatch=dispatch, homes_TL=homes_TL)
    found = metrics_XL(sums.resampled(np.ones((1, 4))), TOPOLOGY, dispatch)
    for name, expected_L in loop_metrics(batch, serving_LRE, homes_TL, dispatch).items():
        np.testing.assert_allclose(found[name][0], expected_L, err_msg=name)


@pytest.mark.parametrize("dispatch", ["per-rank", "per-expert", "per-node"])
@pytest.mark.parametrize("replicated", [False, True])
def test_random_homes_are_the_mean_over_all_homes(batch, dispatch, replicated, monkeypatch):
    monkeypatch.setattr(every_home, "MAX_CELLS", 12)  # a few tokens at a time
    serving_LRE = serving_of(np.random.default_rng(2), replicated)
    sums = traffic_sums(batch, serving_LRE, TOPOLOGY, dispatch=dispatch)
    found = metrics_XL(sums.resampled(np.ones((1, 4))), TOPOLOGY, dispatch)
    every = [np.full((batch.num_tokens, 2), rank) for rank in range(4)]
    fixed = [loop_metrics(batch, serving_LRE, homes_TL, dispatch) for homes_TL in every]
    # Sums of each rank and group, as if every fourth token lived on each rank.
    homed = [traffic_sums(batch, serving_LRE, TOPOLOGY, dispatch=dispatch, homes_TL=homes_TL) for homes_TL in every]
    for field in fields(TrafficSums):
        expected = np.mean([getattr(sums_of_home, field.name) for sums_of_home in homed], axis=0)
        np.testing.assert_allclose(getattr(sums, field.name), expected, atol=1e-12, err_msg=field.name)
    for name in ("lar", "rem", "node"):
        np.testing.assert_allclose(found[name][0], np.mean([f[name] for f in fixed], axis=0), err_msg=name)
    if not replicated:
        np.testing.assert_allclose(found["lar"][0], 0.25)
    np.testing.assert_allclose(found["token_imbalance"][0], 1.0)


def test_sums_of_groups_are_those_of_their_requests(batch):
    from semmoe.profiles.sample import select_requests

    serving_LRE = serving_of(np.random.default_rng(3), False)
    whole = traffic_sums(batch, serving_LRE, TOPOLOGY, dispatch="per-rank")
    np.testing.assert_allclose(whole.tokens_G, [6, 1, 0, 9])
    for first in (0, 2):
        part = select_requests(batch, np.arange(4) // 2 == first // 2)
        alone = traffic_sums(part, serving_LRE, TOPOLOGY, dispatch="per-rank")
        np.testing.assert_allclose(whole.ingress_GLP[first : first + 2], alone.ingress_GLP)


def test_sums_may_be_grouped_by_the_caller(batch):
    serving_LRE, group_of_B = serving_of(np.random.default_rng(3), False), np.array([1, 0, 1, 2])
    grouped = traffic_sums(batch, serving_LRE, TOPOLOGY, dispatch="per-rank", group_of_B=group_of_B)
    single = traffic_sums(batch, serving_LRE, TOPOLOGY, dispatch="per-rank")
    for group in range(3):
        np.testing.assert_allclose(grouped.load_GLR[group], single.load_GLR[group_of_B == group].sum(0))


def test_gather_moves_the_same_rows_whatever_the_placement(batch):
    for seed in (4, 5):
        serving_LRE = serving_of(np.random.default_rng(seed), False)
        sums = traffic_sums(batch, serving_LRE, TOPOLOGY, dispatch="gather")
        assert (metrics_XL(sums, TOPOLOGY, "gather")["link"] == 3).all()


def test_intervals_cover_the_mean_and_shrink_with_requests(tmp_path):
    rng = np.random.default_rng(0)
    info = TraceInfo("m", 1, 8, 2, (0,))
    widths = []
    for number in (20, 320):
        with TraceWriter(tmp_path / str(number), info) as writer:
            for i in range(number):
                group = rng.integers(0, 4)  # every request keeps to one group, so requests differ
                ids = np.array([[rng.permutation(2)[:2] + 2 * (group if i % 2 else k)] for k in range(4)])
                writer.add(f"r{i}", ids.reshape(4, 1, 2))
        batch = RoutingTrace.open(tmp_path / str(number)).load()
        serving_LRE = np.broadcast_to(np.array([0, 1, 0, 1, 2, 2, 3, 3]), (1, 4, 8))
        sums = traffic_sums(batch, serving_LRE, Topology(4), dispatch="per-rank")
        scores = score(sums, Topology(4), dispatch="per-rank")
        low, high = scores.intervals["rem"]
        assert low < scores.means["rem"] < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_requests_without_rows_are_no_evidence():
    sums = TrafficSums.zeros(4, 1, 2, 2)
    sums.tokens_G[:] = [50, 0, 0, 0]
    sums.activations_GL[0], sums.local_GL[0], sums.load_GLR[0] = 100, 50, 50
    found = score(sums, Topology(2), dispatch="per-rank")
    assert found.intervals["lar"] == (0.5, 0.5) and found.intervals["load_imbalance"] == (1, 1)
    draws_XG = resamples_XG(np.array([5.0, 0, 5, 0]), 200, 0)
    assert (draws_XG[:, [1, 3]] == 0).all() and (draws_XG.sum(1) == 2).all() and len(np.unique(draws_XG[:, 0])) == 3


def test_loads_of_nothing_and_of_few_ranks_are_numbers():
    sums = TrafficSums.zeros(1, 3, 4, 4)
    sums.tokens_G[:] = 8
    sums.load_GLR[0, 1] = [6, 2, 0, 0]  # the lower half serves nothing: a median of 1
    sums.load_GLR[0, 2] = [8, 0, 0, 0]
    found = metrics_XL(sums, Topology(4), "per-rank")
    assert found["load_imbalance"].tolist() == [[1, 3, 4]] and found["load_imbalance_median"].tolist() == [[1, 6, 4]]


def test_uniform_scores_equal_simulation():
    rng = np.random.default_rng(0)
    picks = np.array([rng.permutation(16)[:4] for _ in range(20_000)]) // 4
    distinct = np.mean([len(set(row)) for row in picks])
    assert uniform_scores(16, 4, Topology(4))["rem"] == pytest.approx(distinct * 0.75, rel=0.01)
