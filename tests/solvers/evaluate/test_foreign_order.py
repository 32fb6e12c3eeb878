"""A trace that nobody said the numbering of is refused where it fits the plan's order of experts
far better than the model's, and nowhere else."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from semmoe.profiles.errors import InputError
from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic
from semmoe.profiles.trace import RoutingTrace
from semmoe.profiles.trace_writer import TraceWriter
from semmoe.solvers.demands import Demands
from semmoe.solvers.evaluate.compare import compare_plans
from semmoe.solvers.evaluate.foreign_order import Fit, is_foreign, refuse_foreign_loads
from semmoe.solvers.make_plan import PlanOptions, make_plan, score_plan
from semmoe.solvers.placement import Topology
from semmoe.solvers.plan import Plan
from semmoe.solvers.schedule.simulate import Setting

SETTING = Setting(batch_tokens=128, window=8)
LATER = SyntheticWorld(num_requests=40)  # the first 24 are those that plans are fitted on


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Plan]:
    path = tmp_path_factory.mktemp("plans") / "t"
    write_synthetic(path, SyntheticWorld(num_requests=24))
    options = PlanOptions(setting=SETTING)
    made = {
        method: make_plan(
            [RoutingTrace.open(path)], Topology(4), Demands(load_cap=1.2), replace(options, method=method)
        )
        for method in ("spectral", "contiguous")
    }
    return made


def served(plan: Plan, path: Path, *, numbering: str | None, placed: bool) -> RoutingTrace:
    """Later traffic as a server reports it, of the model or of a reshard of the plan."""
    write_synthetic(path / "model", LATER)
    trace = RoutingTrace.open(path / "model")
    batch = trace.load()
    ids_TLK = batch.expert_ids_TLK
    if placed:
        order_LE = plan.placement.experts_LRS.reshape(plan.placement.num_layers, -1)
        ids_TLK = np.argsort(order_LE, axis=1)[np.arange(len(order_LE))[:, None], ids_TLK]
    with TraceWriter(path / "served", replace(trace.info, numbering=numbering)) as writer:
        for b, request in enumerate(batch.request_ids):
            rows = slice(batch.starts_B1[b], batch.starts_B1[b + 1])
            known = {"token_ids": batch.sequence(b), "num_prompt_tokens": int(batch.num_prompt_tokens_B[b])}
            writer.add(request, ids_TLK[rows], domain=batch.domains[b], **known)
    return RoutingTrace.open(path / "served")


def test_a_relabelled_trace_is_refused_with_the_option_to_use(plans: dict[str, Plan], tmp_path: Path) -> None:
    trace = served(plans["spectral"], tmp_path, numbering=None, placed=True)
    with pytest.raises(InputError, match="import again with --model CHECKPOINT"):
        score_plan(plans["spectral"], trace, setting=SETTING)
    with pytest.raises(InputError, match="import again with --model CHECKPOINT"):
        compare_plans({"a": plans["contiguous"], "b": plans["spectral"]}, trace, bytes_per_expert=0, setting=SETTING)


@pytest.mark.parametrize(("numbering", "placed"), [(None, False), ("model", False), ("model", True)])
def test_other_traces_are_scored(plans: dict[str, Plan], tmp_path: Path, numbering: str | None, placed: bool) -> None:
    trace = served(plans["spectral"], tmp_path, numbering=numbering, placed=placed)
    report, _ = score_plan(plans["spectral"], trace, setting=SETTING)
    assert report.requests == 16


def test_a_plan_that_moves_nothing_has_no_other_order(plans: dict[str, Plan], tmp_path: Path) -> None:
    trace = served(plans["spectral"], tmp_path, numbering=None, placed=True)
    assert score_plan(plans["contiguous"], trace, setting=SETTING)[0].requests == 16


def test_loads_alone_tell_where_experts_differ_in_them(plans: dict[str, Plan], tmp_path: Path) -> None:
    plan = plans["spectral"]
    trace = served(plan, tmp_path, numbering=None, placed=False)
    load_LE = np.tile(np.arange(32) ** 2, (4, 1))
    plan = replace(plan, load_LE=load_LE)
    order_LE = plan.placement.experts_LRS.reshape(4, -1)
    refuse_foreign_loads(plan, load_LE, trace.info, "t")
    with pytest.raises(InputError, match="t: its expert ids fit the order"):
        refuse_foreign_loads(plan, np.take_along_axis(load_LE, order_LE, axis=1), trace.info, "t")
    equal = np.full((4, 32), 100)
    refuse_foreign_loads(replace(plan, load_LE=equal), np.take_along_axis(load_LE, order_LE, axis=1), trace.info, "t")


@pytest.mark.parametrize(
    ("model", "placed", "foreign"),
    [
        (Fit(0.8, 1.0), Fit(-1.6, -0.3), False),  # as planned
        (Fit(-1.6, -0.9), Fit(0.8, 1.0), True),  # the same traffic of a reshard
        (Fit(None, -0.9), Fit(None, 1.0), True),  # loads tell nothing
        (Fit(-1.6, None), Fit(0.8, None), True),  # no tokens
        (Fit(0.1, -0.9), Fit(-0.2, 1.0), False),  # loads say the contrary
        (Fit(-0.3, -0.2), Fit(-0.4, 0.2), False),  # traffic that fits neither
        (Fit(0.3, 0.4), Fit(0.5, 0.6), False),  # a plan that hardly moves anything
        (Fit(None, None), Fit(None, None), False),
    ],
)
def test_what_counts_as_far_better(model: Fit, placed: Fit, foreign: bool) -> None:
    assert is_foreign(model, placed) == foreign
