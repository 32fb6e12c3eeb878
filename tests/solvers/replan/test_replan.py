"""Re-placement end to end: it moves where traffic shifted and not where it did not, within the
budget, for every dispatch kind, objective, copies and nodes; and its delta leads there and back."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from semmoe.profiles.document import line_per_key
from semmoe.profiles.errors import InputError
from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic
from semmoe.profiles.trace import RoutingTrace
from semmoe.solvers.demands import Demands
from semmoe.solvers.make_plan import PlanOptions, make_plan
from semmoe.solvers.placement import Topology
from semmoe.solvers.plan import Plan
from semmoe.solvers.replan import decision
from semmoe.solvers.replan.delta import read_delta
from semmoe.solvers.replan.frontiers import Budget
from semmoe.solvers.replan.replan import Replan, ReplanOptions, make_replan, price_of

SIZES = {"num_layers": 2, "num_experts": 16, "top_k": 3, "num_groups": 4, "num_requests": 32, "tokens_per_request": 96}
CASES = {
    "flat": ({}, Topology(4)),
    "requests": ({"objective": "dp", "dispatch": "per-expert"}, Topology(4)),
    "tokens": ({"objective": "tp"}, Topology(4)),
    "nodes": ({"dispatch": "per-node"}, Topology(4, 2)),
    "copies": ({"replicas": 1}, Topology(4, 2)),
    "clusters": ({"robust": 2}, Topology(4)),
    "gather": ({"dispatch": "gather"}, Topology(4)),
    "copies in spare slots": ({}, Topology(3)),  # 16 experts in 18 slots
    "empty slots": ({"spare": "empty"}, Topology(3)),
}


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """A trace of a planted model by seed: another seed is another structure."""
    folder = tmp_path_factory.mktemp("traces")

    @cache
    def trace(seed: int, requests: int = SIZES["num_requests"]) -> RoutingTrace:
        world = SyntheticWorld(
            **SIZES | {"num_requests": requests}, seed=seed, vocab_size=200, noise=0.03, num_domains=1
        )
        write_synthetic(folder / f"{seed}-{requests}", world)
        return RoutingTrace.open(folder / f"{seed}-{requests}")

    return trace


@cache
def old_plan(trace: RoutingTrace, case: str) -> Plan:
    asked, topology = CASES[case]
    return make_plan([trace], topology, Demands(**asked, effort="fast"), PlanOptions(refit=False))


def replanned(traces, case: str, share: float = 0.25, **asked) -> tuple[Plan, Replan]:
    old = old_plan(traces(0), case)
    return old, make_replan([traces(1)], old, ReplanOptions(Budget(share), **asked), PlanOptions(refit=False))


@pytest.mark.parametrize("budget", [Budget(0.25), Budget(moves=5)])
def test_some_layers_of_a_large_model_decide_for_all(traces, budget, monkeypatch):
    old = old_plan(traces(0), "flat")
    monkeypatch.setattr(decision, "DECIDING_CELLS", 1)
    monkeypatch.setattr(decision, "LEAST_LAYERS", 1)
    found = make_replan([traces(1)], old, ReplanOptions(budget), PlanOptions(refit=False)).delta
    assert found.decision.layers == 1 and found.decision.move
    assert 0 < found.decision.moves / 2 <= max(round(5 / 2), 4)  # of its one layer; the delta's are of both
    assert found.budget.used <= (budget.moves or 8) and found.to_json()["decision"]["layers"] == 1


@pytest.mark.parametrize("case", CASES)
def test_shifted_traffic_moves_within_the_budget_and_there_and_back(traces, case, tmp_path):
    old, found = replanned(traces, case, force=True)
    plan, delta = found.plan, found.delta
    slots = int((old.placement.experts_LRS >= 0).sum())
    assert delta.decision.move == (delta.decision.lo > 0)
    assert 0 < delta.budget.used == sum(layer.moved for layer in delta.layers) <= slots // 4
    assert (plan.placement.hosts_LER & ~old.placement.hosts_LER).sum() == delta.budget.used
    assert np.array_equal(delta.applied(old.placement).experts_LRS, plan.placement.experts_LRS)
    empty = old.placement.experts_LRS < 0
    assert np.array_equal(plan.placement.experts_LRS < 0, empty), "what was left empty stays so"
    assert empty.any() == (case == "empty slots")
    back = delta.inverse(plan.placement)
    assert np.array_equal(back.applied(plan.placement).experts_LRS, old.placement.experts_LRS)
    assert (back.old, back.new) == (plan.fingerprint, old.fingerprint)
    per_byte = [layer.gain / max(layer.moved, 0.5) for layer in delta.layers if layer.moves]
    assert per_byte == sorted(per_byte, reverse=True)
    for cut in range(len(delta.layers)):
        replace(delta, layers=delta.layers[:cut]).applied(old.placement)  # a Placement checks itself
    (tmp_path / "delta.json").write_text(line_per_key(delta.to_json()))
    assert read_delta(tmp_path) == delta


@pytest.mark.parametrize("case", ["flat"])
def test_traffic_that_did_not_shift_moves_nothing(traces, case):
    old = old_plan(traces(0), case)
    found = make_replan([traces(0, 64)], old, ReplanOptions(), PlanOptions())  # as many again, of the same structure
    assert not found.delta.decision.move
    assert found.plan is old and found.delta.old == found.delta.new
    assert found.delta.budget.used == 0 and not any(layer.moves for layer in found.delta.layers)


def test_shifted_traffic_is_shown_to_be_worth_moving_for(traces):
    old, found = replanned(traces, "flat", 0.5)
    assert found.delta.decision.move and not found.delta.decision.forced
    assert found.delta.decision.lo > 0 and found.delta.budget.used > 0
    assert found.plan.method == "replan" and found.plan.options["replan"]["from"] == old.fingerprint


def test_force_moves_without_a_gain_and_of_few_requests(traces):
    old = old_plan(traces(0), "flat")
    found = make_replan([traces(0)], old, ReplanOptions(force=True), PlanOptions())
    assert found.delta.decision.forced and not found.delta.decision.move
    few = traces(1, 8)
    with pytest.raises(InputError, match=r"8 requests are too few to tell .* \(at least 20\): --force"):
        make_replan([few], old, ReplanOptions(), PlanOptions())
    assert make_replan([few], old, ReplanOptions(force=True), PlanOptions()).delta.budget.used > 0


def test_a_price_that_no_move_pays_moves_nothing(traces):
    old, found = replanned(traces, "flat", 0.5, force=True)
    dear = ReplanOptions(budget=Budget(0.5, price=100.0))
    assert make_replan([traces(1)], old, dear, PlanOptions()).plan is old
    some = ReplanOptions(force=True, budget=Budget(0.5, price=0.1))
    then = make_replan([traces(1)], old, some, PlanOptions(refit=False)).delta
    assert 0 < then.budget.used < found.delta.budget.used
    assert then.decision.cost == pytest.approx(0.1 * then.decision.moves / 2)


def test_the_price_of_a_horizon_is_rows_of_an_expert_over_its_tokens(traces):
    old = old_plan(traces(0), "flat")
    asked = ReplanOptions(horizon_tokens=10_000)
    with pytest.raises(InputError, match="needs the size of an expert"):
        price_of(old, asked)
    config = {"hidden_size": 2880, "moe_intermediate_size": 2880}
    known = replace(old, model=replace(old.model, checkpoint={"config": config}))
    assert price_of(known, asked) == 4320 / 10_000, "gpt-oss in BF16: 4,320 rows an expert"


def test_same_input_gives_the_same_plan_on_any_number_of_processes(traces, tmp_path: Path):
    old, found = replanned(traces, "flat", force=True)
    again = make_replan(
        [traces(1)],
        old,
        ReplanOptions(Budget(0.25), force=True),
        PlanOptions(refit=False),
        demands=Demands(effort="fast", processes=2),
    )
    assert again.delta == found.delta
