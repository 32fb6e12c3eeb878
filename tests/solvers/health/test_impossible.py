"""Broken captures are named by layer, whatever a placement could make of them."""

import json
from math import isfinite

import numpy as np
import pytest

from semmoe.commands.show import describe_path
from semmoe.profiles.trace import RoutingTrace, TraceInfo
from semmoe.profiles.trace_writer import TraceWriter
from semmoe.solvers.health.health import trace_health


def constant(ids):
    ids[:, 0] = [0, 1, 2, 3]


def copied_over_tokens(ids):
    ids[1::2, 2] = ids[::2, 2]


def one_row_a_request(ids):
    ids[:, 1] = ids[0, 1]


def copied_over_layers(ids):
    ids[:, 3] = ids[:, 1]


def shared(ids):
    ids[:, 2] = np.where(ids[:, 2] == 5, 31, ids[:, 2])
    ids[:, 2, 3] = 5


def write(path, change):
    info = TraceInfo("m", num_layers=4, num_experts=32, top_k=4, model_layers=(1, 2, 3, 4))
    rng = np.random.default_rng(0)
    with TraceWriter(path, info) as writer:
        for i in range(40):
            ids = np.argsort(rng.random((40, 4, 32)), axis=2)[:, :, :4]
            change(ids)
            writer.add(f"r{i}", ids, token_ids=rng.integers(0, 99, 40), num_prompt_tokens=30)
    return RoutingTrace.open(path)


def finite(value):
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list):
        return all(map(finite, value))
    return not isinstance(value, float) or (isfinite(value) and abs(value) < 1e7)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (constant, "layer 1 chose the same experts (0, 1, 2, 3) for every token"),
        (copied_over_tokens, "layer 3 repeats the row of the token before"),
        (one_row_a_request, "layer 2 repeats the row of the token before"),
        (copied_over_layers, "layer 4 has the rows of layer 2"),
        (shared, "every token chose expert 5 at layer 3"),
    ],
)
def test_a_broken_layer_is_a_bad_finding(tmp_path, change, text):
    trace = write(tmp_path / "t", change)
    health = trace_health(trace, seed=0, ranks=4)
    found = {finding.topic: finding for finding in health.findings}
    assert found["routing"].level == "bad" and text in found["routing"].text and len(health.impossible) == 1
    assert found["structure"].level == "watch" and "structure" not in found["structure"].text.lower()
    assert finite(health.to_json()) and not any(c in json.dumps(health.to_json()) for c in ("NaN", "Infinity"))
    assert text in describe_path(str(tmp_path / "t"), seed=0)["impossible_routing"][0]


def test_good_routing_has_no_such_finding(tmp_path):
    health = trace_health(write(tmp_path / "t", lambda ids: None), seed=0, ranks=4)
    assert health.impossible is None and "routing" not in {finding.topic for finding in health.findings}
