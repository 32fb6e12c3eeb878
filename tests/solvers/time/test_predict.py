"""Predicted times: the worked example on gpt-oss, counts against a plain loop, and verdicts of
settings in which placement could not help."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from semmoe.profiles.counts import RoutingProfile, profile_traces
from semmoe.profiles.counts import count_batches as count_traces
from semmoe.profiles.engines.imports import ImportOptions, import_trace
from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic
from semmoe.profiles.trace import RoutingTrace, TraceBatch
from semmoe.solvers.demands import Demands
from semmoe.solvers.deployment import Deployment
from semmoe.solvers.make_plan import split_requests
from semmoe.solvers.place.baselines import baselines
from semmoe.solvers.place.replicas import OWN_RULE
from semmoe.solvers.place.solve import solve_placement
from semmoe.solvers.placement import Placement, Topology
from semmoe.solvers.schedule.simulate import Setting
from semmoe.solvers.time import predict as predicting
from semmoe.solvers.time.batches import pool_of, random_homes
from semmoe.solvers.time.counted import Drawn, Served, count_batches, count_drawn
from semmoe.solvers.time.hardware import TimeAsked
from semmoe.solvers.time.minimize import solve_for_time
from semmoe.solvers.time.predict import predict

GPT = Path(__file__).parents[4] / "shared" / "traces" / "gpt-oss-20b.sglang.jsonl.gz"
RANKS = 8


@pytest.fixture(autouse=True)
def few_batches(monkeypatch):
    monkeypatch.setattr(predicting, "RESAMPLED_IDS", 3_000_000)
    monkeypatch.setattr(predicting, "LEAST_RESAMPLES", 4)


@pytest.fixture(scope="module")
def gpt_trace(tmp_path_factory):
    """gpt-oss, and which half of its requests is held out."""
    if not GPT.exists():
        pytest.skip("the shared traces are not here")
    path = tmp_path_factory.mktemp("gpt") / "t"
    import_trace("sglang", [GPT], path, ImportOptions(repetition="drop"))
    trace = RoutingTrace.open(path)
    (held_B,) = split_requests([trace], holdout=0.5, holdout_domains=[], seed=0)
    return trace, held_B


@pytest.fixture(scope="module")
def gpt(gpt_trace):
    """The held-out half of gpt-oss, and the loads of the other half."""
    trace, held_B = gpt_trace
    return trace.load(held_B), profile_traces([trace], [~held_B]).load_LE


def times(gpt, *, nodes: int = 1, **asked):
    batch, load_LE = gpt
    topology = Topology(RANKS, nodes)
    placed = baselines(load_LE, Topology(RANKS))  # as in the example: the same placements on any network
    deployments = {name: Deployment(p, load_LE, topology) for name, p in placed.items()}
    asked = TimeAsked(**({"hardware": "h100"} | asked))
    return predict({"plan": deployments["load"], **deployments}, batch, "", asked, setting=Setting())


PREFILL = {"phase": "prompt", "tokens_per_rank": 4096, "backend": "deepep-normal"}
EXAMPLE = [
    ({**PREFILL}, 3042, 2413),
    ({**PREFILL, "overlap": "two-batch", "other_us": 450.0}, 2760, 2263),
    ({**PREFILL, "nodes": 8}, 6915, 5567),
    ({"phase": "generated", "tokens_per_rank": 64, "backend": "deepep-normal"}, 139.9, 132.9),
    ({"phase": "generated", "tokens_per_rank": 64, "backend": "deepep-ll"}, 145.8, 137.8),
    ({"phase": "generated", "tokens_per_rank": 128, "backend": "deepep-normal"}, 183.8, 166.4),
    ({"phase": "generated", "tokens_per_rank": 128, "backend": "deepep-ll"}, 192.4, 173.2),
]


@pytest.mark.parametrize(("asked", "contiguous", "load"), EXAMPLE)
def test_the_worked_example(gpt, asked, contiguous, load):
    found = times(gpt, **asked)
    assert found.row("contiguous").us["total"] == pytest.approx(contiguous, rel=0.02)
    assert found.row("load").us["total"] == pytest.approx(load, rel=0.02)
    if asked == PREFILL:
        us = found.row("contiguous").us
        assert us["dispatch"] + us["combine"] == pytest.approx(765, rel=0.02)
        assert us["experts"] == pytest.approx(2277, rel=0.02)


LAYERS = (3, 11, 20)
SIZES = {"hidden_size": 2880, "expert_size": 2880, "weights": "mxfp4"}


@pytest.fixture(scope="module")
def few(gpt_trace):
    """Three layers of gpt-oss: what is fitted, what is held out, and the plan for bytes."""
    trace, held_B = gpt_trace
    fitted, held = (some_layers(trace.load(chosen_B)) for chosen_B in (~held_B, held_B))
    info = replace(trace.info, num_layers=len(LAYERS), model_layers=LAYERS, model="")
    profile = RoutingProfile(info, *count_traces([fitted], info), fitted)
    placed = solve_placement(
        profile, Topology(RANKS), Demands(effort="fast", objective="tp"), method="semmoe"
    ).placement
    return profile, held, placed


def some_layers(batch: TraceBatch) -> TraceBatch:
    return replace(batch, expert_ids_TLK=batch.expert_ids_TLK[:, LAYERS, :])


def judged(few, placement: Placement, nodes: int, asked: TimeAsked):
    profile, held, _ = few
    topology = Topology(RANKS, nodes)
    placed = {"plan": placement, **baselines(profile.load_LE, topology)}
    deployments = {name: Deployment(p, profile.load_LE, topology) for name, p in placed.items()}
    return predict(deployments, held, "", asked, setting=Setting())


# Settings in which published placements changed no latency (../shared/reference/hardware.md): also
# a placement that is made for the time of the very setting is not worth it there.
NO_GAIN = [
    ({"backend": "nccl-gather", "phase": "generated"}, "whatever the placement"),  # every rank joins: sglang 36820
    ({"backend": "nccl-gather", "phase": "prompt"}, "whatever the placement"),
    ({"engine": "vllm", "phase": "prompt"}, "whatever the placement"),  # the same, by the engine's default
    ({"backend": "self-balancing", "phase": "generated"}, "evens out the load itself"),
    ({"engine": "vllm-ascend", "phase": "generated", "tokens_per_rank": 4}, ""),  # sgl-kernel-npu 799
    (
        {"hardware": "h20", "backend": "deepep-ll", "phase": "generated", "tokens_per_rank": 8},
        "not rows",
    ),  # sglang 19772
    ({"backend": "deepep-ll", "phase": "generated", "tokens_per_rank": 1}, "latency"),
]


@pytest.mark.parametrize(("asked", "why"), NO_GAIN)
def test_where_nothing_helps_the_verdict_says_so(few, asked, why):
    asked = TimeAsked(**({"hardware": "h100"} | SIZES | asked))
    placement = solve_for_time(few[0], Topology(RANKS), Demands(effort="fast"), asked).placement
    found = judged(few, placement, 1, asked)
    assert found.verdict is not None and found.verdict.decision == "not worth it", found.saved
    assert any(why in reason for reason in found.verdict.cannot_help)


# Where fewer rows are no less time: a plan for bytes against load packing.
BYTES_ONLY = [
    ({"backend": "deepep-ll", "phase": "generated", "tokens_per_rank": 128}, "changes balance and not rows"),
    (
        {"backend": "nccl-a2a", "phase": "prompt", "tokens_per_rank": 1024},
        "changes balance and not rows",
    ),  # tt-metal 56304
    ({**PREFILL, "overlap": "two-batch", "other_us": 2000.0}, "hides the exchanges"),
    ({"backend": "self-balancing", "phase": "prompt"}, "evens out the load itself"),
]


@pytest.mark.parametrize(("asked", "why"), BYTES_ONLY)
def test_fewer_bytes_that_save_no_time_are_not_recommended(few, asked, why):
    found = judged(few, few[2], 1, TimeAsked(**({"hardware": "h100"} | SIZES | asked)))
    assert found.verdict is not None and found.verdict.decision != "recommend"
    assert any(why in reason for reason in found.verdict.cannot_help)


def test_what_is_saved_in_each_domain(few):
    found = judged(few, few[2], 8, TimeAsked(hardware="h100", **SIZES, **PREFILL))
    assert found.saved is not None and len(found.domains) == 9
    pool = pool_of(few[1], "prompt")
    assert sum(domain.tokens for domain in found.domains) == sum(map(len, pool.rows_B))
    assert sum(domain.requests for domain in found.domains) == pool.num_requests
    # Batches of a domain are as large as others; a few requests are less even.
    assert all(0.8 < domain.us / found.row("plan").us["total"] < 1.6 for domain in found.domains)
    shares = [domain.saved for domain in found.domains]
    assert min(shares) < found.saved.share < max(shares)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = SyntheticWorld(num_layers=2, num_experts=16, num_groups=4, top_k=3, num_requests=40)
    path = tmp_path_factory.mktemp("world") / "t"
    write_synthetic(path, made)
    return RoutingTrace.open(path).load()


@pytest.mark.parametrize("kind", ["per-rank", "per-expert", "per-node", "gather"])
@pytest.mark.parametrize(("replicas", "rule"), [(0, OWN_RULE), (1, OWN_RULE), (1, "cover"), (1, "vllm"), (1, "sglang")])
@pytest.mark.parametrize("own_first", [False, True])
def test_counts_are_those_of_a_plain_loop(world, kind, replicas, rule, own_first):
    rng = np.random.default_rng(3)
    own = np.stack([rng.permutation(16).reshape(4, 4) for _ in range(2)])
    copies = (own[:, [1, 2, 3, 0], :1]) if replicas else own[:, :, :0]
    placement = Placement(np.concatenate([own, copies], axis=2).astype(np.int32), 16)
    deployment = Deployment(placement, np.ones((2, 16), np.int64), Topology(4, 2), replica_choice=rule)
    node_R = np.arange(4) // 2
    ids_LTK = world.expert_ids_TLK.transpose(1, 0, 2)
    rows = random_homes(pool_of(world, "prompt"), np.arange(40), (4, 8), "prompt", rng)
    moving = deployment.moving
    where = Served(ids_LTK, deployment.serving_LRE, node_R, kind, 4, moving, own_first)
    found, again = count_batches(where, rows[None]), count_drawn(where, Drawn.of(rows[None], ids_LTK, 4, 16))
    for field in fields(found):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(found, field.name))
    home = np.arange(32) // 8
    for layer in range(2):
        ranks_TK = deployment.serving_LRE[layer][home[:, None], world.expert_ids_TLK[rows, layer]]
        if moving is not None:
            ranks_TK = moving.ranks_TK(layer, world.expert_ids_TLK[rows, layer], home)
        sent, to_node, n, own = np.zeros((4, 4)), np.zeros((4, 2)), np.zeros((4, 16)), np.zeros(4)
        for row, source, targets in zip(rows, home, ranks_TK.tolist(), strict=True):
            experts = world.expert_ids_TLK[row, layer]
            for target, expert in zip(targets, experts, strict=True):
                n[target, expert] += 1
                own[target] += own_first and target == source
            for target in targets if kind == "per-expert" else set(targets):
                sent[source, target] += 1
            for node in {node_R[t] for t in targets} - {node_R[source]}:
                to_node[source, node] += 1
        np.fill_diagonal(sent, 0)
        near = node_R[:, None] == node_R
        fast, cards = sent * near, sent * ~near
        if kind == "per-node":
            place = np.arange(4) % 2
            fast = sent * (place[:, None] != place)
            entered = [sum(to_node[s, node_R[d]] for s in range(4) if place[s] == place[d]) for d in range(4)]
            assert found.nic_ML[0, layer] == max(to_node.sum(1).max(), *entered)
            assert found.nvl_ML[0, layer] == fast.sum(0).max()
        elif kind == "per-expert":
            assert found.nvl_ML[0, layer] == max(fast.sum(0).max(), fast.sum(1).max())
            assert found.nic_ML[0, layer] == max(cards.sum(0).max(), cards.sum(1).max())
        np.testing.assert_array_equal(found.rows_MLR[0, layer], n.sum(1))
        np.testing.assert_array_equal(found.own_MLR[0, layer], own)
        np.testing.assert_array_equal(found.active_MLR[0, layer], (n > 0).sum(1))
        np.testing.assert_array_equal(found.padded_MLR[0, layer], (np.ceil(n / 4) * 4).sum(1))


def test_batches_are_filled_as_they_run(world):
    pool, rng = pool_of(world, "prompt"), np.random.default_rng(0)
    whole = random_homes(pool, np.arange(40), (4, 16), "prompt", rng)
    per_request = np.bincount(world.request_of_T[whole], minlength=40)
    lengths = np.array([len(rows) for rows in pool.rows_B])
    # Requests come whole, but for the last one.
    assert ((per_request == 0) | (per_request == lengths)).sum() >= 39
    decode = random_homes(pool, np.arange(40), (4, 16), "generated", rng)
    assert len(np.unique(decode)) == 64
    assert pool_of(world, "generated").note == "" or "no generated tokens" in pool_of(world, "generated").note
