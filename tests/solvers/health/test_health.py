"""Health of synthetic traces with and without structure, and the pieces it is made of."""

import json
from dataclasses import replace

import numpy as np
import pytest

from semmoe.profiles.errors import InputError
from semmoe.profiles.split import domain_groups
from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic
from semmoe.profiles.trace import RoutingTrace, TraceInfo
from semmoe.profiles.trace_writer import TraceWriter
from semmoe.solvers.health.drift import load_distance
from semmoe.solvers.health.health import fit_power_law, trace_health
from semmoe.solvers.health.record import Health


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> RoutingTrace:
    path = tmp_path_factory.mktemp("health") / "t"
    write_synthetic(path, SyntheticWorld(num_requests=80, tokens_per_request=40, num_layers=3))
    return RoutingTrace.open(path)


def levels(health: Health) -> dict[str, str]:
    return {f.topic: f.level for f in health.findings}


def test_a_structured_trace_is_healthy(trace):
    health = trace_health(trace, seed=0, ranks=4)
    assert levels(health)["structure"] == "good" and health.structure.lift > 2
    points = health.learning.points
    assert points[-1].rem < 0.6 * health.learning.contiguous_rem
    assert all(a.tokens < b.tokens for a, b in zip(points, points[1:], strict=False))
    assert points[-1].tokens == 64 * 40
    rates = [p.rate for p in health.unseen]
    assert rates == sorted(rates, reverse=True) and 0 <= rates[-1] < rates[0] <= 1
    assert Health.from_json(json.loads(json.dumps(health.to_json()))) == health
    assert [row.domain for row in health.domains] == [f"domain-{i}" for i in range(4)]
    assert trace_health(trace, seed=0, ranks=4) == health


def test_random_routing_has_no_structure(tmp_path):
    rng = np.random.default_rng(0)
    info = TraceInfo(model="noise", num_layers=2, num_experts=16, top_k=4, model_layers=(0, 1))
    with TraceWriter(tmp_path / "t", info) as writer:
        for i in range(60):
            writer.add(f"r{i}", np.argsort(rng.random((64, 2, 16)), axis=2)[:, :, :4])
    health = trace_health(RoutingTrace.open(tmp_path / "t"), seed=0)
    assert levels(health)["structure"] == "bad" and levels(health)["token ids"] == "watch"
    assert health.unseen is None and health.domains is None
    assert abs(health.structure.lift - 1) < 0.1


def test_a_change_of_traffic_half_way_is_noticed(tmp_path):
    rng = np.random.default_rng(0)
    info = TraceInfo(model="drift", num_layers=1, num_experts=16, top_k=2, model_layers=(0,))
    with TraceWriter(tmp_path / "t", info) as writer:
        for i in range(60):
            # First pairs (0 1)(2 3)..., then (0 9)(1 10)...: what was together is apart.
            first = rng.integers(0, 8, (50, 1))
            pair = np.stack([2 * first, 2 * first + 1], 2) if i < 30 else np.stack([first, (first + 1) % 8 + 8], 2)
            writer.add(f"r{i}", pair)
    health = trace_health(RoutingTrace.open(tmp_path / "t"), seed=0, ranks=4)
    assert levels(health)["time"] == "watch"
    assert health.time.rem_later > health.time.rem_mixed + 0.1


def test_few_requests_are_said_to_be_too_few(tmp_path):
    write_synthetic(tmp_path / "t", SyntheticWorld(num_requests=3, tokens_per_request=8, num_layers=2))
    health = trace_health(RoutingTrace.open(tmp_path / "t"), seed=0)
    assert levels(health)["size"] == "bad" and health.learning is None and health.time is None


def test_counts_are_refused(trace, tmp_path):
    info = replace(trace.info, kind="counts")
    counts = RoutingTrace(trace.path, info, trace.facts, trace._filesystem)
    with pytest.raises(InputError, match="holds only expert loads"):
        trace_health(counts, seed=0)


def test_the_power_law_is_found_again():
    tokens_N = 1000.0 * 2 ** np.arange(8)
    law = fit_power_law(tokens_N, 1.5 + 20 * tokens_N**-0.5)
    assert (law.floor, law.scale, law.power) == pytest.approx((1.5, 20, 0.5))


def test_load_distance_is_the_share_that_must_move():
    assert load_distance(np.array([[3, 1, 0]]), np.array([[1, 1, 2]])) == pytest.approx(0.5)


def test_many_domains_become_few():
    names, index_B = domain_groups(["a", "", "a"])
    assert (names, index_B.tolist()) == (["(none)", "a"], [1, 0, 1])
    names, _ = domain_groups([f"mmlu/{i}" for i in range(20)] + ["gpqa/x"])
    assert names == ["gpqa", "mmlu"]
    names, index_B = domain_groups([f"d{i:02d}" for i in range(30)], most=5)
    assert len(names) == 5 and "other" in names and index_B.max() == 4
