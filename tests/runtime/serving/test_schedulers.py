"""Requests go where the report said they would: one rule for both."""

from dataclasses import replace

import numpy as np
import pytest

from semmoe.profiles.errors import InputError
from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic
from semmoe.profiles.trace import RoutingTrace, TraceBatch
from semmoe.runtime.serving.schedulers import assign
from semmoe.solvers.placement import Placement, Topology
from semmoe.solvers.plan import ModelFacts, Plan
from semmoe.solvers.schedule.fit import fit_schedule
from semmoe.solvers.schedule.schedule import Schedule
from semmoe.solvers.schedule.simulate import simulate

RANKS, SEED = 4, 3


def with_answers(batch: TraceBatch, prompts_B: np.ndarray, answers_B: np.ndarray) -> TraceBatch:
    """The requests with prompts and answers of these lengths: rows are cut at the end."""
    rows_B = prompts_B + answers_B
    kept_T = np.concatenate(
        [np.arange(first, first + rows) for first, rows in zip(batch.starts_B1[:-1], rows_B, strict=True)]
    )
    return replace(
        batch,
        starts_B1=np.concatenate([[0], np.cumsum(rows_B)]),
        expert_ids_TLK=batch.expert_ids_TLK[kept_T],
        token_ids_T=batch.token_ids_T[kept_T],
        is_prompt_T=np.concatenate([np.arange(rows) < prompt for rows, prompt in zip(rows_B, prompts_B, strict=True)]),
        num_prompt_tokens_B=prompts_B,
    )


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[TraceBatch, Plan]:
    """Requests whose answers stop early, some of them, and a plan that was fitted on others."""
    path = tmp_path_factory.mktemp("schedulers") / "t"
    group_of_LE = write_synthetic(path, SyntheticWorld(num_requests=200, tokens_per_request=90, noise=0.3, seed=5))
    trace = RoutingTrace.open(path)
    fitted_B = np.arange(trace.num_requests) // 4 % 2 == 0  # domains take turns of four
    placement = Placement.from_ranks(group_of_LE, RANKS)
    plan = Plan(
        placement=placement,
        topology=Topology(RANKS),
        model=ModelFacts.of(trace.info),
        method="planted",
        seed=0,
        dispatch="per-rank",
        load_LE=np.ones(group_of_LE.shape, np.int64),
        fitted_keys=np.zeros(0, np.uint64),
        tables=fit_schedule(trace.load(fitted_B), placement, seed=0).to_tables(),
    )
    rng, batch = np.random.default_rng(0), trace.load(~fitted_B)
    answers_B = np.minimum(rng.integers(1, 60, batch.num_requests), 40)  # a third of them run into the limit
    return with_answers(batch, rng.integers(5, 50, batch.num_requests), answers_B), plan


@pytest.mark.parametrize("window", [256, 30])
@pytest.mark.parametrize(("scheduler", "name"), [("dp", "dp-scorer"), ("none", "dp-roundrobin")])
def test_a_run_sends_requests_where_the_report_does(
    planned: tuple[TraceBatch, Plan], window: int, scheduler: str, name: str
) -> None:
    batch, plan = planned
    schedule = Schedule.from_tables(plan.tables)
    assert schedule is not None
    homes_TL, _ = simulate(name, batch, plan.placement, schedule, batch_tokens=512, window=window, seed=SEED)
    order = np.random.default_rng(SEED).permutation(batch.num_requests)  # of arrival in the report
    prompts = [batch.prompt(request) for request in order]
    # The last token of an answer has no row: 41 may be generated.
    rank_of_B = assign(scheduler, prompts, plan, max_new_tokens=41, window=window)
    np.testing.assert_array_equal(rank_of_B, homes_TL[batch.starts_B1[order], 0])
    assert set(rank_of_B.tolist()) == set(range(RANKS))


def test_the_order_of_arrival_in_one_window_does_not_matter(planned: tuple[TraceBatch, Plan]) -> None:
    batch, plan = planned
    schedule = Schedule.from_tables(plan.tables)
    assert schedule is not None
    homes_TL, _ = simulate("dp-scorer", batch, plan.placement, schedule, batch_tokens=512, window=256, seed=SEED)
    prompts = [batch.prompt(request) for request in range(batch.num_requests)]
    rank_of_B = assign("dp", prompts, plan, max_new_tokens=41)
    np.testing.assert_array_equal(rank_of_B, homes_TL[batch.starts_B1[:-1], 0])


def test_plans_that_score_no_requests_are_refused(planned: tuple[TraceBatch, Plan]) -> None:
    plan = replace(planned[1], tables={})
    with pytest.raises(InputError, match="--scheduler dp: this plan scores no requests"):
        assign("dp", [np.array([1])], plan, max_new_tokens=1)
    with pytest.raises(InputError, match="--scheduler tp: expected one of none, dp, tp"):
        assign("tp", [np.array([1])], plan, max_new_tokens=1)
