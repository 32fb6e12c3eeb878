"""compare_plans: several plans on the requests that none of them was fitted on, and what it takes
to get from one to another.

Shape letters: L MoE layers, B requests, G groups of requests, X resamples.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np

from semmoe.profiles.errors import InputError
from semmoe.profiles.progress import Progress, unshown
from semmoe.profiles.split import only_phase, phase_of, phase_shares, request_keys
from semmoe.profiles.trace import RoutingTrace, TraceBatch, TraceInfo
from semmoe.solvers.evaluate.against import BASELINES, Against, deployments_beside
from semmoe.solvers.evaluate.foreign_order import refuse_foreign_order
from semmoe.solvers.evaluate.metrics import metrics_XL, resamples_XG
from semmoe.solvers.evaluate.report import Report, ScoreRow, random_row
from semmoe.solvers.evaluate.score_plan import BETTER, score_batch, scored_batch
from semmoe.solvers.evaluate.sums import TrafficSums, deployment_sums
from semmoe.solvers.evaluate.time_report import TimeReport
from semmoe.solvers.json_record import JsonRecord
from semmoe.solvers.place.moves import count_moves
from semmoe.solvers.placement import Topology
from semmoe.solvers.plan import Plan
from semmoe.solvers.schedule.simulate import Setting

COMPARE_FORMAT = "semmoe-compare"
COMPARE_VERSION = 1
PAIRED = ("rem", "link", "load_imbalance")

Change = tuple[float, float, float]  # a difference, and the ends of its interval


@dataclass(frozen=True)
class ComparedPlan(JsonRecord):
    """A plan of a comparison."""

    plan: str  # its path as given
    fingerprint: str
    method: str
    seed: int
    ranks: int
    nodes: int
    replicas: int


@dataclass(frozen=True)
class Difference(JsonRecord):
    """A plan against the first, or the baseline that was asked for, tokens at random homes, paired
    over requests."""

    plan: str
    against: str
    rem: Change
    link: Change
    load_imbalance: Change


@dataclass(frozen=True)
class LayerMoves(JsonRecord):
    """Copies to load at one layer."""

    layer: int
    experts: int
    experts_renamed: int
    experts_renamed_per_layer: int


@dataclass(frozen=True)
class PlanMoves(JsonRecord):
    """Copies that ranks must load to get from one plan to another (solvers/place/moves.py)."""

    from_: str
    to: str
    slots: int
    experts: int
    experts_renamed: int
    experts_renamed_per_layer: int
    bytes: int
    bytes_renamed: int
    bytes_renamed_per_layer: int
    old_rank_of: list[int]
    layers: list[LayerMoves]


@dataclass(frozen=True)
class NoMoves(JsonRecord):
    """Two plans of different shape, and what differs."""

    from_: str
    to: str
    why_not: str


@dataclass(frozen=True)
class PhaseScores(JsonRecord):
    """The comparison on the tokens of one phase."""

    phase: str
    requests: int
    tokens: int
    rows: list[ScoreRow]
    differences: list[Difference]


@dataclass(frozen=True)
class CurvePoint(JsonRecord):
    """A placement between two plans. Gain: cost per token that it saves over the old plan, on
    requests that it was not fitted on, in the curve's unit; kept: part of the free one's."""

    kind: str  # "keep", "budget", "plan", "free" or "eplb"
    name: str
    moves: int
    share: float  # of the slots in use
    gain: float
    lo: float
    hi: float
    kept: float | None
    rem: float
    load: float


@dataclass(frozen=True)
class GainCurve(JsonRecord):
    """What budgets of moves from the first plan keep of the gain of a free re-placement."""

    unit: str
    fitted_requests: int
    scored_requests: int
    points: list[CurvePoint]


@dataclass(frozen=True, kw_only=True)
class Comparison(JsonRecord):
    """Plans side by side. `to_json()` gives it as one JSON object.

    Fields:
        format, version: of the JSON object.
        trace, model, dispatch: what they were scored on, and how rows are counted.
        plans: facts of each plan.
        requests, tokens: how many were scored.
        phase, phase_shares: whose tokens were scored, and the share of each phase in the trace.
        phases: the same on each phase alone, where plans were made for different ones.
        against: what the plans are held against: the first of them, or as asked.
        rows: metrics of every plan under every schedule; `placement` is the plan's name.
        baselines: contiguous experts and load packing in the slots of the first plan.
        differences: each plan against that, paired over requests, with 95 % intervals.
        bytes_per_expert: bytes of one expert's weights, 0 where not known.
        moves: copies of experts, and bytes, to get from one plan to another.
        curve: gain kept against moves from the first of two plans (solvers/replan/curve.py).
        time: of each plan, by name, where hardware is given.

    Source: solvers/evaluate/compare.py; docs/formats.md.
    """

    format: str = COMPARE_FORMAT
    version: int = COMPARE_VERSION
    trace: str
    model: str
    dispatch: str
    phase: str = "all"
    phase_shares: dict[str, float] | None = None
    phases: list[PhaseScores] | None = None
    against: str = ""
    plans: list[ComparedPlan]
    requests: int
    tokens: int
    rows: list[ScoreRow]
    differences: list[Difference]
    bytes_per_expert: int
    moves: list[PlanMoves | NoMoves]
    baselines: list[ScoreRow] = field(default_factory=list)
    curve: GainCurve | None = None
    time: dict[str, TimeReport] | None = None


def compare_plans(
    plans: dict[str, Plan],
    trace: RoutingTrace,
    *,
    bytes_per_expert: int,
    against: Against = BETTER,
    setting: Setting,
    progress: Progress = unshown,
) -> tuple[Comparison, list[str]]:
    """The comparison, and notes.

    Parameters:
        plans: two or more of one model, by name; the first is what the others are held against.
        trace: requests to score on; those that a plan was fitted on are left out.
        bytes_per_expert: of an expert's weights, 0 where it is not known.
        against: a baseline, at as many slots as each plan has, or another plan; the first plan
            where none is named.
        setting: how schedules are simulated.

    Raises InputError where plans and trace are of different models, or where no request is new to
    every plan and the plans' own held-out scores are not of the same requests either.
    """
    trace.require_tokens("a comparison")
    for name, plan in plans.items():
        plan.model.check(trace.info, f"{trace.path} (against {name})")
    first = next(iter(plans.values()))
    requests = request_keys(trace.requests())
    unseen_B = ~np.isin(requests, np.concatenate([plan.fitted_keys for plan in plans.values()]))
    unseen_B &= ~against.seen(requests)
    if unseen_B.any():
        batch = scored_batch([trace], [unseen_B], seed=setting.seed)
        for plan in plans.values():
            refuse_foreign_order(plan, batch, trace.info, trace.path)
        reports = _scored_reports(plans, batch, trace.info, against, setting, progress)
        progress(len(plans), len(plans) + 1)
        differences = _differences(plans, batch, against, setting.seed)
        left_out = int((~unseen_B).sum())
        said = f"{left_out} requests of {trace.path} were used to fit one of the plans and are left out"
        notes = [said] if left_out else []
    else:
        reports = _recorded_reports(plans, trace)
        differences = []
        notes = [
            f"every request of {trace.path} was used to fit a plan: these are the plans' own held-out scores, of the same requests, "
            "without paired differences (another trace, or place --no-refit, gives them)"
        ]
    for name, plan in plans.items():
        if plan.dispatch != first.dispatch:
            notes.append(f"{name} was made for {plan.dispatch} dispatch, here rows are counted as for {first.dispatch}")
    rows = [replace(row, placement=name) for name, report in reports.items() for row in report.plan_rows]
    rows += _rows_of_baseline(against.name, plans, reports)
    last = list(reports.values())[-1]
    comparison = Comparison(
        trace=trace.path,
        model=trace.info.model,
        dispatch=first.dispatch,
        phase=phase_of(trace),
        phase_shares=phase_shares([trace]),
        against=against.name or next(iter(plans)),
        plans=[_plan_facts(name, plan) for name, plan in plans.items()],
        requests=last.requests,
        tokens=last.tokens,
        rows=rows,
        differences=differences,
        bytes_per_expert=bytes_per_expert,
        baselines=[row for row in next(iter(reports.values())).rows if row.placement in BASELINES],
        moves=[_moves(a, b, plans, bytes_per_expert) for a, b in combinations(plans, 2)],
    )
    return comparison, notes


def compare_phases(
    plans: dict[str, Plan],
    trace: RoutingTrace,
    phase: str | None,
    *,
    bytes_per_expert: int,
    against: Against = BETTER,
    setting: Setting,
    progress: Progress = unshown,
) -> tuple[Comparison, list[str]]:
    """`compare_plans` on the tokens of a phase; None: of the phase that all plans were made for, or
    of both phases and of each alone where plans were made for different ones."""
    options = {"bytes_per_expert": bytes_per_expert, "against": against, "setting": setting, "progress": progress}
    with_prompts = setting.score_from == "prompt"
    made = {plan.options.get("phase", "all") for plan in plans.values()}
    if phase or len(made) == 1:
        return compare_plans(plans, only_phase(trace, phase or made.pop(), with_prompts=with_prompts), **options)
    comparison, notes = compare_plans(plans, trace, **options)
    phases = []
    for name, share in phase_shares([trace]).items():
        if share:
            alone, _ = compare_plans(plans, only_phase(trace, name, with_prompts=with_prompts), **options)
            phases.append(PhaseScores(name, alone.requests, alone.tokens, alone.rows, alone.differences))
    return replace(comparison, phases=phases), notes


def _plan_facts(name: str, plan: Plan) -> ComparedPlan:
    topology = plan.topology
    sizes = (topology.num_ranks, topology.num_nodes, plan.placement.num_replicas)
    return ComparedPlan(name, plan.fingerprint, plan.method, plan.seed, *sizes)


def _scored_reports(
    plans: dict[str, Plan],
    batch: TraceBatch,
    info: TraceInfo,
    against: Against,
    setting: Setting,
    progress: Progress,
) -> dict[str, Report]:
    """Every plan on the same requests; rows are counted as for the first plan's dispatch."""
    dispatch = next(iter(plans.values())).dispatch
    reports = {}
    for number, (name, plan) in enumerate(plans.items()):
        progress(number, len(plans) + 1)
        deployment = replace(plan.deployment, dispatch=dispatch)
        reports[name] = score_batch(deployment, batch, info, against=against, setting=setting)
    return reports


def _recorded_reports(plans: dict[str, Plan], trace: RoutingTrace) -> dict[str, Report]:
    """The plans' own held-out scores, which must be of the same requests."""
    reports = {name: plan.scores for name, plan in plans.items() if plan.scores}
    splits = {
        str((p.trace.get("fingerprints"), p.scores and p.scores.requests, _split_of(p), p.dispatch))
        for p in plans.values()
    }
    first = next(iter(plans.values()))
    if len(splits) > 1 or first.trace.get("fingerprints") != [trace.fingerprint] or len(reports) < len(plans):
        raise InputError(
            f"every request of {trace.path} was used to fit one of the plans: nothing is left to compare them on; "
            "give another trace, or place with --no-refit"
        )
    return reports


def _split_of(plan: Plan) -> tuple[Any, ...]:
    return tuple(plan.split.get(name) for name in ("holdout", "holdout_domains", "seed"))


def _rows_of_baseline(name: str, plans: dict[str, Plan], reports: dict[str, Report]) -> list[ScoreRow]:
    """The row of what was asked for: a plan once, a baseline in the slots and by the load of each
    plan."""
    if name in BASELINES:
        rows = {plan: random_row(report.rows, name) for plan, report in reports.items()}
        return [replace(row, placement=f"{name} beside {plan}") for plan, row in rows.items()]
    first = next(iter(reports.values()))
    return [row for row in first.rows if name and name not in plans and row.placement == name]


def _differences(plans: dict[str, Plan], batch: TraceBatch, against: Against, seed: int) -> list[Difference]:
    """Every plan against the one baseline, or every other plan against the first; tokens at random
    homes, on the same resamples of the requests."""
    (first_name, first), *others = plans.items()
    found = []
    for name, plan in plans.items() if against.name else others:
        deployment = replace(plan.deployment, dispatch=first.dispatch)
        held = first.deployment
        if against.name:
            held = deployments_beside(deployment, plan.model.n_group, against)[against.name]
        topologies = held.topology, plan.topology
        sums = deployment_sums(held, batch), deployment_sums(deployment, batch)
        changes = paired_differences(*sums, topologies, PAIRED, dispatch=first.dispatch, seed=seed)
        found.append(Difference(name, against.name or first_name, *changes))
    return found


def paired_differences(
    first: TrafficSums,
    second: TrafficSums,
    topologies: tuple[Topology, Topology],
    metrics: Iterable[str],
    *,
    dispatch: str,
    seed: int,
    num_resamples: int = 400,
) -> list[Change]:
    """Second minus first of each metric, mean over layers, and the 95 % interval over the same
    resamples of the same requests.

    Requests differ more from each other than plans do on one request, so the interval of the
    difference is much narrower than those of the two values.
    """
    num_groups = len(first.tokens_G)
    assert num_groups == len(second.tokens_G), "differences are taken on the same requests"
    weights_XG = np.concatenate([np.ones((1, num_groups)), resamples_XG(first.tokens_G, num_resamples, seed)])
    values = [
        metrics_XL(sums.resampled(weights_XG), topology, dispatch)
        for sums, topology in zip((first, second), topologies, strict=True)
    ]
    changes = []
    for metric in metrics:
        difference_X = values[1][metric].mean(1) - values[0][metric].mean(1)
        low, high = np.quantile(difference_X[1:], [0.025, 0.975])
        changes.append((float(difference_X[0]), float(low), float(high)))
    return changes


def _moves(old_name: str, new_name: str, plans: dict[str, Plan], bytes_per_expert: int) -> PlanMoves | NoMoves:
    """Moves between two plans; with a reason instead of numbers where they are not of one shape."""
    old, new = plans[old_name], plans[new_name]
    try:
        moves = count_moves(old.placement, new.placement, new.topology)
    except InputError as error:
        return NoMoves(old_name, new_name, str(error))
    moved_LM = np.stack([moves.as_named_L, moves.renamed_L, moves.per_layer_L], axis=1)
    copies = moved_LM.sum(0).tolist()
    return PlanMoves(
        old_name,
        new_name,
        new.placement.experts_LRS.size - new.placement.num_empty,
        *copies,
        *(count * bytes_per_expert for count in copies),
        old_rank_of=moves.old_rank_of_R.tolist(),
        layers=[LayerMoves(layer, *counts) for layer, counts in enumerate(moved_LM.tolist())],
    )
