"""make_plan and score_plan: the whole way from traces to a plan with held-out scores, and from a
plan to scores on another trace.

Scores always come from requests that the scored placement was not fitted on. The plan that is
written may then be fitted on all requests: more data only helps it, and plan.json says so.

Shape letters: L MoE layers, R ranks, E experts, B requests.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from semmoe.profiles.checkpoint import same_routers
from semmoe.profiles.counts import RoutingProfile, profile_split
from semmoe.profiles.embedding import input_embedding
from semmoe.profiles.errors import InputError
from semmoe.profiles.progress import Progress, Stages, unshown_stages
from semmoe.profiles.sample import bounded_requests
from semmoe.profiles.split import holdout_requests, request_keys
from semmoe.profiles.trace import RoutingTrace
from semmoe.solvers.demands import Demands, Solved
from semmoe.solvers.deployment import Deployment
from semmoe.solvers.evaluate.metrics import DISPATCH_KINDS
from semmoe.solvers.evaluate.report import Report
from semmoe.solvers.evaluate.score_plan import SCORED_IDS, baselines, score_batch, score_placements
from semmoe.solvers.place.bounds import NO_BOUND, certificate_of
from semmoe.solvers.place.solve import check_demands, solve_placement
from semmoe.solvers.placement import Topology
from semmoe.solvers.plan import ModelFacts, Plan, ScoredPlacement
from semmoe.solvers.plan_of_counts import check_method, plan_of_counts
from semmoe.solvers.schedule.fit import fit_schedule
from semmoe.solvers.schedule.schedule import Schedule
from semmoe.solvers.schedule.simulate import Setting

OWN_FIELDS = ("load_cap", "seed", "dispatch", "processes")  # demands that a plan holds by themselves, or not at all


@dataclass(frozen=True)
class PlanOptions:
    """How a plan is made and scored, beside what its placement is asked for.

    Fields:
        method: "semmoe", "metis", "spectral", "load", "contiguous", "paper" or "exact".
        holdout: share of the requests that is scored on and not learned from.
        holdout_domains: requests of these domains are scored on instead, where any are named.
        refit: the plan is fitted on all requests after scoring.
        certify: bound what any placement could reach (`Report.certificate`).
        setting: how schedules are simulated.
        made_by: the command, for plan.json.

    Source: solvers/make_plan.py; `semmoe place --help` names the same.
    """

    method: str = "semmoe"
    holdout: float = 0.2
    holdout_domains: list[str] = field(default_factory=list)
    refit: bool = True
    certify: bool = False
    setting: Setting = field(default_factory=Setting)
    made_by: str = ""


def make_plan(
    traces: list[RoutingTrace],
    topology: Topology,
    demands: Demands,
    options: PlanOptions,
    *,
    progress: Stages = unshown_stages,
) -> Plan:
    """The plan for the traces' model, with scores on held-out requests beside the baselines (see
    `score_placements`); of traces that hold loads only, a plan by load without them."""
    # Step 1: refuse what cannot be made, before anything is read.
    for trace in traces:
        trace.info.check_numbering(trace.path)
    if any(trace.info.kind == "counts" for trace in traces):
        check_method(traces, options.method, demands, certify=options.certify)
        return plan_of_counts(traces, topology, demands, method=options.method, made_by=options.made_by)
    _check(traces, topology, demands, options)
    # Step 2: hold requests out and count both sides, in one reading.
    traffic = read_traffic(traces, options, demands.seed, progress)
    # Step 3: the plan for the counts.
    solve = partial(_placed, topology=topology, demands=demands, method=options.method)
    return plan_of_traffic(traces, traffic, Asked(topology, demands, solve), options, progress)


class Traffic(NamedTuple):
    """Requests of traces, counted: those to learn from, those held out, and all."""

    held_out: list[np.ndarray]  # bool [B] per trace
    profile: RoutingProfile
    rest: RoutingProfile
    whole: RoutingProfile


def read_traffic(traces: list[RoutingTrace], options: PlanOptions, seed: int, progress: Stages) -> Traffic:
    """The traces' requests in one reading. Raises InputError where they cannot be split."""
    holdout = {"holdout": options.holdout, "holdout_domains": options.holdout_domains}
    held_out = split_requests(traces, **holdout, seed=seed)
    counting = partial(progress, "reading tokens")
    return Traffic(held_out, *profile_split(traces, held_out, seed=seed, progress=counting))


Solve = Callable[[RoutingProfile, Progress], Solved]


class Asked(NamedTuple):
    """What a placement and its schedules are fitted for, on whichever requests."""

    topology: Topology
    demands: Demands
    solve: Solve  # from the profile to the placement


def plan_of_traffic(
    traces: list[RoutingTrace], traffic: Traffic, asked: Asked, options: PlanOptions, progress: Stages
) -> Plan:
    """The plan with its schedules, scored on the held-out requests."""
    topology, demands, _ = asked
    held_out, profile, _, whole = traffic
    embedding_VD = input_embedding(traces[0].info.embedding)
    # Step 1: place the experts, and fit the schedules, on the requests that are not held out.
    fitted = _fit(profile, asked, embedding_VD, progress)
    # Step 2: score on those that are.
    deployed = Deployment(fitted.solved.placement, profile.load_LE, topology, demands.dispatch, fitted.schedule)
    scores = score_held_out(deployed, traffic, options, demands.processes, progress)
    # Step 3: bound what any placement could reach on the requests that were fitted.
    if options.certify:
        bounding = partial(progress, "bounding what any placement could reach: layers")
        placement = fitted.solved.placement
        certificate = certificate_of(profile, placement, load_cap=demands.load_cap, progress=bounding)
        scores = replace(scores, certificate=certificate)
    # Step 4: fit again on all requests, which is what gets written beside what was scored.
    scored = None
    if options.refit:
        scored = ScoredPlacement(fitted.solved.placement, profile.load_LE)
        fitted = _fit(whole, asked, embedding_VD, progress, again=" again")
    keys = [request_keys(t.requests())[options.refit | ~h] for t, h in zip(traces, held_out, strict=True)]
    return Plan(
        placement=fitted.solved.placement,
        topology=topology,
        model=ModelFacts.of(traces[0].info),
        method=options.method,
        seed=demands.seed,
        dispatch=demands.dispatch,
        load_LE=fitted.profile.load_LE,
        fitted_keys=np.concatenate(keys),
        load_cap=demands.load_cap,
        options={k: v for k, v in asdict(demands).items() if k not in OWN_FIELDS},
        trace=_traced(traces),
        split=_split(traces, held_out, demands.seed, options),
        scores=scores,
        notes=fitted.solved.notes + _notes_on_checkpoints(traces),
        made_by=options.made_by,
        tables=fitted.schedule.to_tables(),
        scored=scored,
    )


def score_held_out(
    deployment: Deployment, traffic: Traffic, options: PlanOptions, processes: int, progress: Stages
) -> Report:
    """The deployment on the held-out requests, beside what engines do without us."""
    profile = traffic.profile
    max_tokens = SCORED_IDS // (profile.info.num_layers * profile.info.top_k)
    return score_batch(
        deployment,
        bounded_requests(traffic.rest.sample, max_tokens=max_tokens, seed=options.setting.seed),
        profile.info,
        beside=baselines(profile.load_LE, deployment.topology, profile.info.n_group),
        setting=options.setting,
        processes=processes,
        progress=partial(progress, "scoring on held-out requests: rows"),
    )


def _check(traces: list[RoutingTrace], topology: Topology, demands: Demands, options: PlanOptions) -> None:
    if demands.dispatch not in DISPATCH_KINDS:
        raise InputError(f"dispatch {demands.dispatch!r} is none of {', '.join(DISPATCH_KINDS)}")
    for trace in traces:
        trace.require_tokens("placement by co-activation, and its held-out scores,")
    check_demands(traces[0].info, topology, demands, method=options.method)
    if options.certify and demands.replicas:
        raise InputError(NO_BOUND)


class _Fitted(NamedTuple):
    """A placement and its schedules, and what both were fitted on."""

    profile: RoutingProfile
    solved: Solved
    schedule: Schedule


def _placed(
    profile: RoutingProfile, progress: Progress, *, topology: Topology, demands: Demands, method: str
) -> Solved:
    return solve_placement(profile, topology, demands, method=method, progress=progress)


def _fit(
    profile: RoutingProfile, asked: Asked, embedding_VD: np.ndarray | None, progress: Stages, again: str = ""
) -> _Fitted:
    demands = asked.demands
    solved = asked.solve(profile, partial(progress, f"placing layers{again}"))
    schedule = fit_schedule(
        profile.sample,
        solved.placement,
        seed=demands.seed,
        embedding_VD=embedding_VD,
        processes=demands.processes,
        progress=partial(progress, f"fitting schedules{again}: layers"),
    )
    return _Fitted(profile, solved, schedule)


def _notes_on_checkpoints(traces: list[RoutingTrace]) -> list[str]:
    first = traces[0].info.checkpoint
    others = [t for t in traces[1:] if same_routers(first, t.info.checkpoint) is False]
    said = "was recorded on another checkpoint of the model: the plan names the first trace's"
    return [f"one of the traces {said}"] if others else []


def _traced(traces: list[RoutingTrace]) -> dict[str, Any]:
    """Which traces a plan was made from."""
    return {
        "fingerprints": [t.fingerprint for t in traces],
        "requests": sum(t.num_requests for t in traces),
        "tokens": sum(t.num_tokens for t in traces),
    }


def _split(traces: list[RoutingTrace], held_out: list[np.ndarray], seed: int, options: PlanOptions) -> dict[str, Any]:
    """Which of their requests were held out of what was scored."""
    num_held_out = int(sum(h.sum() for h in held_out))
    return {
        "holdout": 0.0 if options.holdout_domains else options.holdout,
        "holdout_domains": options.holdout_domains,
        "seed": seed,
        "held_out_requests": num_held_out,
        "training_requests": sum(t.num_requests for t in traces) - num_held_out,
        "refit": options.refit,
    }


def score_plan(plan: Plan, trace: RoutingTrace, *, setting: Setting) -> tuple[Report, list[str]]:
    """A report of the plan on a trace, and notes on which requests were scored.

    Requests that the plan was fitted on are never scored. Where that leaves none of a trace that
    the plan was made from, its own held-out scores are the answer. Raises InputError where another
    trace holds nothing else.
    """
    trace.require_tokens("a report")
    plan.model.check(trace.info, trace.path)
    unseen_B = ~np.isin(request_keys(trace.requests()), plan.fitted_keys)
    num_seen = int((~unseen_B).sum())
    if not unseen_B.any():
        if plan.scores is None or trace.fingerprint not in plan.trace["fingerprints"]:
            raise InputError(
                f"the plan was fitted on every request of {trace.path}: nothing is left to score it on honestly"
            )
        return plan.scores, _notes_on_own_scores(plan, plan.scores.setting, setting)
    notes = [f"{num_seen} requests of this trace were used to fit the plan and are left out"] if num_seen else []
    beside = baselines(plan.load_LE, plan.topology, plan.model.n_group)
    return score_placements(plan.deployment, [trace], [unseen_B], beside=beside, setting=setting), notes


def _notes_on_own_scores(plan: Plan, made: Setting, setting: Setting) -> list[str]:
    split = plan.split
    notes = [
        f"the plan was fitted on all of this trace: these are the scores, on {split['held_out_requests']} held-out requests, "
        f"of the same method fitted on the other {split['training_requests']}"
    ]
    if made != setting:
        notes.append(
            f"they stay those of --batch-tokens {made.batch_tokens} --window {made.window} --seed {made.seed}: "
            "for other settings give another trace, or place with --no-refit"
        )
    return notes


def split_requests(
    traces: list[RoutingTrace], *, holdout: float, holdout_domains: list[str], seed: int
) -> list[np.ndarray]:
    """Held-out requests over all traces together, bool [B] per trace (see `holdout_requests`).

    Raises InputError where a request is in two of the traces: it would be learned from and scored
    on.
    """
    tables = [trace.requests() for trace in traces]
    keys = np.concatenate([request_keys(table) for table in tables])
    if repeated := len(keys) - len(np.unique(keys)):
        raise InputError(f"{repeated} requests are in more than one of the traces: give each request once")
    held_out_B = holdout_requests(pa.concat_tables(tables), holdout=holdout, holdout_domains=holdout_domains, seed=seed)
    return np.split(held_out_B, np.cumsum([t.num_rows for t in tables])[:-1])
