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

from semmoe.profiles.checkpoint import same_routers
from semmoe.profiles.counts import RoutingProfile, profile_split
from semmoe.profiles.embedding import input_embedding
from semmoe.profiles.errors import InputError
from semmoe.profiles.progress import AGAIN, Stages, unshown_stages
from semmoe.profiles.sample import bounded_requests
from semmoe.profiles.split import one_sided, only_phase, phase_of, phase_shares, request_keys, split_requests
from semmoe.profiles.trace import RoutingTrace
from semmoe.solvers.demands import Demands, Solved
from semmoe.solvers.deployment import Deployment
from semmoe.solvers.evaluate.against import Against, deployments_beside, words_of
from semmoe.solvers.evaluate.foreign_order import refuse_foreign_order
from semmoe.solvers.evaluate.metrics import DISPATCH_KINDS
from semmoe.solvers.evaluate.report import Report
from semmoe.solvers.evaluate.score_plan import BETTER, SCORED_IDS, notes_on_rows, score_batch, scored_batch
from semmoe.solvers.place.bounds import NO_BOUND, NO_BOUND_UNEVEN, certificate_of
from semmoe.solvers.place.replicas import OWN_RULE, check_rule
from semmoe.solvers.place.solve import FILLING, PLACING, check_demands, solve_placement
from semmoe.solvers.placement import Topology
from semmoe.solvers.plan import ModelFacts, Plan, ScoredPlacement
from semmoe.solvers.plan_of_counts import check_method, plan_of_counts
from semmoe.solvers.schedule.fit import fit_schedule, recount_tokens
from semmoe.solvers.schedule.schedule import Schedule
from semmoe.solvers.schedule.simulate import Setting
from semmoe.solvers.slots import Slots
from semmoe.solvers.time.chosen import chosen_by_time
from semmoe.solvers.time.hardware import TimeAsked, costing_of
from semmoe.solvers.time.minimize import check_for_time, solve_for_time
from semmoe.solvers.time.predict import timed_report
from semmoe.solvers.workers import layer_map

# Stages as they are told.
READING, FITTING = "reading tokens", "fitting schedules of layers"
SCORING, TIMING = "scoring on held-out requests: rows", "predicting times"
BOUNDING = "bounding what any placement could reach: layers"
AMPLE_IDS = 2**27  # expert ids of the fitted requests: 290,000 tokens of 58 layers x top-8
AMPLE = (
    "placed for the requests that were not held out, which are more than the search looks at; "
    "token tables were counted on all requests"
)
OWN_FIELDS = ("load_cap", "seed", "dispatch", "processes")  # demands that a plan holds by themselves, or not at all


@dataclass(frozen=True)
class PlanOptions:
    """How a plan is made and scored, beside what its placement is asked for.

    Fields:
        method: "semmoe", "metis", "spectral", "load", "contiguous", "paper" or "exact".
        holdout: share of the requests that is scored on and not learned from.
        holdout_domains: requests of these domains are scored on instead, where any are named.
        phase: only tokens of the "prompt" are counted, fitted and scored, or only "generated" ones;
            "all": both.
        replica_choice: the rule by which copies serve, one of REPLICA_RULES.
        refit: the plan is fitted on all requests after scoring.
        certify: bound what any placement could reach (`Report.certificate`).
        setting: how schedules are simulated.
        against: what the verdict holds the plan against.
        made_by: the command, for plan.json.
        time: the machine and batches that times are predicted for; None: none are.
        auto: demands, of `solvers.time.chosen.CHOICES`, that are chosen by predicted time on
            requests that a trial did not see.
        minimize: "time" or "bytes"; "": time where `time` is given and the method is "semmoe".

    Source: solvers/make_plan.py; `semmoe place --help` names the same.
    """

    method: str = "semmoe"
    holdout: float = 0.2
    holdout_domains: list[str] = field(default_factory=list)
    phase: str = "all"
    replica_choice: str = OWN_RULE
    refit: bool = True
    certify: bool = False
    setting: Setting = field(default_factory=Setting)
    against: Against = field(default_factory=Against)
    made_by: str = ""
    time: TimeAsked | None = None
    minimize: str = ""
    auto: tuple[str, ...] = ()

    @property
    def for_time(self) -> bool:
        """Whether placement minimises the predicted time."""
        return self.minimize == "time" or (not self.minimize and self.time is not None and self.method == "semmoe")


def make_plan(
    traces: list[RoutingTrace],
    topology: Topology,
    demands: Demands,
    options: PlanOptions,
    *,
    progress: Stages = unshown_stages,
) -> Plan:
    """The plan for the traces' model, with scores on held-out requests beside the baselines (see
    `score_batch`); of traces that hold loads only, a plan by load without them."""
    # Step 1: refuse what cannot be made, before anything is read.
    for trace in traces:
        trace.info.check_numbering(trace.path)
    if any(trace.info.kind == "counts" for trace in traces):
        check_method(traces, options.method, demands, certify=options.certify)
        only_phase(traces[0], options.phase)
        return plan_of_counts(traces, topology, demands, method=options.method, made_by=options.made_by)
    _check(traces, topology, demands, options)
    with_prompts = options.setting.score_from == "prompt"
    traces = [only_phase(trace, options.phase, with_prompts=with_prompts) for trace in traces]
    # Step 2: hold requests out and count both sides, in one reading.
    traffic = read_traffic(traces, options, demands, progress)
    # Step 3: the plan for the counts.
    if options.auto and options.time is not None:
        demands = chosen_by_time(traffic.profile, topology, demands, options.time, options.method, options.auto)
    solve = partial(_placed, topology=topology, demands=demands, options=options)
    return plan_of_traffic(traces, traffic, Asked(topology, demands, solve), options, progress)


def usual_stages(
    options: PlanOptions, demands: Demands, num_experts: int, num_ranks: int, num_ids: int = 0
) -> dict[str, float]:
    """The stages of `make_plan` in their order, each with its usual share of the time. `num_ids`:
    expert ids of the traces. Raises InputError where the slots do not fit."""
    spare = demands.slots_of(num_experts, num_ranks).has_spare(num_experts, num_ranks)
    fitted = {PLACING: 6.0} | ({FILLING: 3.0} if spare else {}) | {FITTING: 4.0}
    shares = {READING: 1.0, **fitted, SCORING: 7.0}
    shares |= {TIMING: 9.0} if options.time is not None else {}
    shares |= {BOUNDING: 2.0} if options.certify else {}
    again = {FITTING: 2.0} if _is_ample(int(num_ids * (1 - options.holdout)), options) else fitted
    return shares | ({stage + AGAIN: share for stage, share in again.items()} if options.refit else {})


class Traffic(NamedTuple):
    """Requests of traces, counted: those to learn from, those held out, and all."""

    held_out: list[np.ndarray]  # bool [B] per trace
    profile: RoutingProfile
    rest: RoutingProfile
    whole: RoutingProfile


def read_traffic(traces: list[RoutingTrace], options: PlanOptions, demands: Demands, progress: Stages) -> Traffic:
    """The traces' requests in one reading. Raises InputError where they cannot be split."""
    seed = demands.seed
    holdout = {"holdout": options.holdout, "holdout_domains": options.holdout_domains}
    held_out = split_requests(traces, **holdout, seed=seed)
    counting = partial(progress, READING)
    info = traces[0].info
    if _is_ample(sum(trace.num_tokens for trace in traces) * info.num_layers * info.top_k, options):
        with layer_map(demands.processes, info.num_experts) as run:
            return Traffic(held_out, *profile_split(traces, held_out, seed=seed, progress=counting, run=run))
    return Traffic(held_out, *profile_split(traces, held_out, seed=seed, progress=counting))


Solve = Callable[[RoutingProfile, Stages], Solved]


class Asked(NamedTuple):
    """What a placement and its schedules are fitted for, on whichever requests."""

    topology: Topology
    demands: Demands
    solve: Solve  # from the profile to the placement


def plan_of_traffic(
    traces: list[RoutingTrace], traffic: Traffic, asked: Asked, options: PlanOptions, progress: Stages
) -> Plan:
    """The plan with its schedules, scored on the held-out requests. `traces`: of the phase that was
    counted."""
    topology, demands, _ = asked
    held_out, profile, _, whole = traffic
    embedding_VD, shares = input_embedding(traces[0].info.embedding), phase_shares(traces)
    # Step 1: place the experts, and fit the schedules, on the requests that are not held out.
    fitted = _fit(profile, asked, embedding_VD, progress)
    # Step 2: score on those that are.
    rule = check_rule(options.replica_choice)
    deployment = Deployment(fitted.solved.placement, profile.load_LE, topology, demands.dispatch, fitted.schedule, rule)
    scores = replace(score_held_out(deployment, traffic, options, demands.processes, progress), phase_shares=shares)
    # Step 3: bound what any placement could reach on the requests that were fitted.
    if options.certify:
        bounding = partial(progress, BOUNDING)
        placement = fitted.solved.placement
        certificate = certificate_of(profile, placement, load_cap=demands.load_cap, progress=bounding)
        scores = replace(scores, certificate=certificate)
    # Step 4: fit again on all requests, which is what gets written beside what was scored.
    scored = None
    if options.refit:
        scored = ScoredPlacement(fitted.solved.placement, profile.load_LE)
        if _is_ample(profile.sample.expert_ids_TLK.size, options):
            del deployment  # and with it rows as large as those that are counted now
            rest = replace(fitted.schedule, token=fitted.schedule.token.without_rows())
            fitted = fitted._replace(schedule=rest)
            fitted = _recounted(fitted, whole, asked, embedding_VD, progress)
        else:
            fitted = _fit(whole, asked, embedding_VD, progress, again=AGAIN)
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
        options={k: v for k, v in asdict(demands).items() if k not in OWN_FIELDS}
        | {"phase": options.phase, "phase_shares": shares, "replica_choice": options.replica_choice}
        | _time_options(options),
        trace=_traced(traces),
        split=_split(traces, held_out, demands.seed, options),
        scores=scores,
        notes=[
            *fitted.solved.notes,
            *_notes_on_checkpoints(traces),
            *_notes_on_against(options.against, traces, held_out),
            *_notes_on_phases(options.phase, shares),
            *notes_on_rows(scores, scored.placement if scored else fitted.solved.placement),
        ],
        made_by=options.made_by,
        tables=fitted.schedule.to_tables(),
        scored=scored,
    )


def _check(traces: list[RoutingTrace], topology: Topology, demands: Demands, options: PlanOptions) -> None:
    check_rule(options.replica_choice)
    if demands.dispatch not in DISPATCH_KINDS:
        raise InputError(f"dispatch {demands.dispatch!r} is none of {', '.join(DISPATCH_KINDS)}")
    for trace in traces:
        trace.require_tokens("placement by co-activation, and its held-out scores,")
    check_demands(traces[0].info, topology, demands, method=options.method)
    slots = demands.slots_of(traces[0].info.num_experts, topology.num_ranks)
    if options.certify and slots.has_spare(traces[0].info.num_experts, topology.num_ranks):
        least = slots == Slots.least(traces[0].info.num_experts, topology.num_ranks)
        raise InputError(NO_BOUND_UNEVEN if least else NO_BOUND)
    if options.for_time:
        check_for_time(options.time, options.method, demands)
    if options.auto and (options.time is None or options.for_time):
        asked = ", ".join(f"--{name.replace('_', '-')} auto" for name in options.auto)
        raise InputError(f"{asked} needs --hardware, and --minimize bytes: --minimize time asks for neither")
    if options.time is not None:
        costing_of(options.time, traces[0].info, topology)


class _Fitted(NamedTuple):
    """A placement and its schedules, and what both were fitted on."""

    profile: RoutingProfile
    solved: Solved
    schedule: Schedule


def _placed(
    profile: RoutingProfile, progress: Stages, *, topology: Topology, demands: Demands, options: PlanOptions
) -> Solved:
    if options.for_time and options.time is not None:
        return solve_for_time(profile, topology, demands, options.time, progress=progress)
    return solve_placement(profile, topology, demands, method=options.method, progress=progress)


def _fit(
    profile: RoutingProfile, asked: Asked, embedding_VD: np.ndarray | None, progress: Stages, again: str = ""
) -> _Fitted:
    demands = asked.demands

    def told(stage: str, done: int, total: int) -> None:
        progress(stage + again, done, total)

    solved = asked.solve(profile, told)
    schedule = fit_schedule(
        profile.sample,
        solved.placement,
        seed=demands.seed,
        embedding_VD=embedding_VD,
        processes=demands.processes,
        progress=partial(told, FITTING),
    )
    return _Fitted(profile, solved, schedule)


def _is_ample(num_ids: int, options: PlanOptions) -> bool:
    """Whether requests of so many expert ids fill every bounded sample that a fit looks at, so that
    those held out, of the same kind, would change little."""
    return num_ids >= AMPLE_IDS and not options.holdout_domains


def _recounted(
    fitted: _Fitted, whole: RoutingProfile, asked: Asked, embedding_VD: np.ndarray | None, progress: Stages
) -> _Fitted:
    """What more requests of the same kind better: the counts of the token table. Searches and
    regressions look at a bounded sample, of one as of the other."""
    schedule = recount_tokens(
        fitted.schedule,
        whole.sample,
        fitted.solved.placement,
        embedding_VD=embedding_VD,
        processes=asked.demands.processes,
        progress=partial(progress, FITTING + AGAIN),
    )
    solved = replace(fitted.solved, notes=[*fitted.solved.notes, AMPLE])
    return _Fitted(whole, solved, schedule)


def _notes_on_checkpoints(traces: list[RoutingTrace]) -> list[str]:
    first = traces[0].info.checkpoint
    others = [t for t in traces[1:] if same_routers(first, t.info.checkpoint) is False]
    said = "was recorded on another checkpoint of the model: the plan names the first trace's"
    return [f"one of the traces {said}"] if others else []


def _notes_on_against(against: Against, traces: list[RoutingTrace], held_out: list[np.ndarray]) -> list[str]:
    scored = [request_keys(t.requests())[h] for t, h in zip(traces, held_out, strict=True)]
    seen = int(against.seen(np.concatenate(scored)).sum())
    said = f"{against.name} was fitted on {seen} of the held-out requests, which flatters it"
    return [said] if seen else []


def _notes_on_phases(phase: str, shares: dict[str, float]) -> list[str]:
    if phase != "all":
        return [f"placed for {phase} tokens alone, {shares[phase]:.0%} of the trace"]
    return [said] if (said := one_sided(shares)) else []


def _time_options(options: PlanOptions) -> dict[str, Any]:
    """What plan.json says of the time that was minimised; nothing where bytes were."""
    return {"minimize": "time"} if options.for_time else {}


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


def score_held_out(
    deployment: Deployment, traffic: Traffic, options: PlanOptions, processes: int, progress: Stages
) -> Report:
    """The report of a plan on requests that it was not fitted on, with times where they are asked
    for."""
    info, setting, against = traffic.profile.info, options.setting, options.against
    most = SCORED_IDS // (info.num_layers * info.top_k)
    # Where a server ran them under an earlier plan says nothing of this one.
    batch = replace(bounded_requests(traffic.rest.sample, max_tokens=most, seed=setting.seed), rank_of_B=None)
    scoring = partial(progress, SCORING)
    scored = {"against": against, "setting": setting, "processes": processes, "progress": scoring}
    report = replace(score_batch(deployment, batch, info, **scored), phase=options.phase)
    if options.time is None:
        return report
    beside = deployments_beside(deployment, info.n_group, against)
    progress(TIMING, 0, 1)
    return timed_report(report, deployment, beside, batch, options.time, against.name)


def score_plan(
    plan: Plan, trace: RoutingTrace, *, against: Against = BETTER, setting: Setting
) -> tuple[Report, list[str]]:
    """A report of the plan on a trace, and notes on which requests were scored.

    Requests that the plan, or the one that it is held against, was fitted on are never scored.
    Where that leaves none of a trace that the plan was made from, its own held-out scores are the
    answer. Raises InputError where another trace holds nothing else.
    """
    trace.require_tokens("a report")
    plan.model.check(trace.info, trace.path)
    keys_B = request_keys(trace.requests())
    unseen_B = ~np.isin(keys_B, plan.fitted_keys)
    num_seen = int((~unseen_B).sum())
    if not unseen_B.any():
        if plan.scores is None or trace.fingerprint not in plan.trace["fingerprints"]:
            made, given = plan.options.get("phase", "all"), phase_of(trace)
            of = f" (its held-out scores are of --phase {made}, not {given})" if made != given else ""
            raise InputError(
                f"the plan was fitted on every request of {trace.path}: nothing is left to score it on honestly{of}"
            )
        return plan.scores, _notes_on_own_scores(plan, plan.scores, setting, against)
    notes = [f"{num_seen} requests of this trace were used to fit the plan and are left out"] if num_seen else []
    if num_seen := int((unseen_B & against.seen(keys_B)).sum()):
        notes.append(f"{num_seen} requests of this trace were used to fit {against.name} and are left out")
        unseen_B &= ~against.seen(keys_B)
        if not unseen_B.any():
            raise InputError(f"--against {against.name} was fitted on every request of {trace.path} that is left")
    batch = scored_batch([trace], [unseen_B], seed=setting.seed)
    refuse_foreign_order(plan, batch, trace.info, trace.path)
    served, why_not = served_by(plan, trace)
    notes += [why_not] if why_not else []
    batch = batch if served else replace(batch, rank_of_B=None)
    report = score_batch(plan.deployment, batch, trace.info, against=against, setting=setting)
    notes += notes_on_rows(report, plan.placement)
    return replace(report, phase=phase_of(trace), phase_shares=phase_shares([trace])), notes


def served_by(plan: Plan, trace: RoutingTrace) -> tuple[bool, str]:
    """Whether a trace tells on which of the plan's ranks a server ran its requests; and why its
    ranks are not those, "" where it names none."""
    said = trace.info.notes.get("served")
    if not isinstance(said, dict) or said.get("ranks") is None:
        return False, ""
    if said["ranks"] != plan.topology.num_ranks:
        return (
            False,
            f"no row as-served: the server had {said['ranks']} DP ranks, the plan has {plan.topology.num_ranks}",
        )
    if said.get("plan") not in (None, plan.fingerprint):
        return False, f"no row as-served: the server ran plan {said['plan']}, this one is {plan.fingerprint}"
    return True, ""


def _notes_on_own_scores(plan: Plan, scores: Report, setting: Setting, against: Against) -> list[str]:
    split, made = plan.split, scores.setting
    notes = [
        f"the plan was fitted on all of this trace: these are the scores, on {split['held_out_requests']} held-out requests, "
        f"of the same method fitted on the other {split['training_requests']}"
    ]
    if made != setting:
        notes.append(
            f"they stay those of --batch-tokens {made.batch_tokens} --window {made.window} --seed {made.seed}: "
            "for other settings give another trace, or place with --no-refit"
        )
    if plan.replica_choice != scores.replica_choice:
        notes.append(
            f"they stay those of copies that serve by {scores.replica_choice}: for another rule give another trace, or place "
            f"with --replica-choice {plan.replica_choice}"
        )
    if against.name and against.name != scores.baseline:
        notes.append(
            f"they stay held against {words_of(scores.baseline)}: for another baseline give another trace, or place with "
            f"--against {against.name}"
        )
    return notes
