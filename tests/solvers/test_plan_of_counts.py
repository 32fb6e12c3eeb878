"""Plans of loads: placed, scored for balance alone, and honest about it."""

import numpy as np
import pytest

from semmoe.commands.show import describe_path
from semmoe.profiles.errors import InputError
from semmoe.profiles.trace import RoutingTrace, TraceInfo
from semmoe.profiles.trace_writer import TraceWriter
from semmoe.solvers.demands import Demands
from semmoe.solvers.make_plan import PlanOptions, make_plan
from semmoe.solvers.placement import Topology
from semmoe.solvers.plan import Plan

LOAD_WLE = np.random.default_rng(0).integers(0, 40, (2, 4, 16))
LOAD_WLE[:, 0] = 0
LOAD_WLE[:, 2, 5] = 0


@pytest.fixture
def counts(tmp_path):
    info = TraceInfo("m", num_layers=4, num_experts=16, top_k=2, model_layers=(1, 2, 3, 4), kind="counts")
    with TraceWriter(tmp_path / "t", info) as writer:
        writer.add_counts(["a", "b"], LOAD_WLE)
    return RoutingTrace.open(tmp_path / "t")


def test_loads_are_placed_and_scored_for_balance(counts, tmp_path):
    plan = make_plan([counts], Topology(4), Demands(), PlanOptions(method="load"))
    assert plan.scores is None and "traffic is not scored" in plan.notes[0]
    assert plan.notes[-1] == "layers without any count keep their experts in order: 1"
    np.testing.assert_array_equal(plan.placement.experts_LRS[0], np.arange(16).reshape(4, 4))
    load_LR = np.zeros((4, 4))
    np.add.at(load_LR, (np.arange(4)[:, None], plan.placement.rank_of_LE), LOAD_WLE.sum(0))
    expected = (load_LR[1:].max(1) / load_LR[1:].mean(1)).mean()
    rows = {row["placement"]: row["load_imbalance"] for row in plan.options["balance"]}
    assert rows["plan"] == rows["load"] == pytest.approx(expected) and rows["contiguous"] > rows["plan"]
    plan.save(tmp_path / "p")
    facts = Plan.load(tmp_path / "p").facts()
    assert facts["scored"].startswith("for balance only") and facts["fitted_load_imbalance"] == pytest.approx(expected)
    with_replicas = make_plan([counts], Topology(4), Demands(replicas=1), PlanOptions(method="load"))
    assert with_replicas.placement.slots_per_rank == 5
    contiguous = make_plan([counts], Topology(4), Demands(), PlanOptions(method="contiguous"))
    np.testing.assert_array_equal(contiguous.placement.rank_of_LE, np.tile(np.arange(16) // 4, (4, 1)))


def test_what_needs_routing_is_refused_by_name(counts):
    for options, demands, message in (
        (PlanOptions(), Demands(), "method semmoe needs routing per token: --method load or"),
        (PlanOptions(method="load", certify=True), Demands(), "--certify needs routing per token"),
        (PlanOptions(method="load"), Demands(robust=3), "--robust needs routing per token"),
    ):
        with pytest.raises(InputError, match=message):
            make_plan([counts], Topology(4), demands, options)


def test_layers_without_counts_are_no_unused_experts(counts):
    facts = describe_path(counts.path, seed=0)
    assert facts["layers_without_counts"] == [1]
    assert facts["unused_expert_share"] == pytest.approx((LOAD_WLE.sum(0)[1:] == 0).mean())
