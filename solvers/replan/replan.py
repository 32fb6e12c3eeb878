"""make_replan: from an old plan and new traffic to a plan within a budget of moves, or the old one
where no move is worth it.

Shape letters: L MoE layers, R ranks, E experts.
"""

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from semmoe.profiles.counts import RoutingProfile
from semmoe.profiles.errors import InputError
from semmoe.profiles.progress import Progress, Stages, unshown_stages
from semmoe.profiles.sample import bounded_requests
from semmoe.profiles.split import only_phase
from semmoe.profiles.trace import RoutingTrace
from semmoe.solvers.demands import Demands, Solved
from semmoe.solvers.evaluate.metrics import metrics_XL
from semmoe.solvers.evaluate.report import Report
from semmoe.solvers.evaluate.sums import deployment_sums
from semmoe.solvers.make_plan import Asked, PlanOptions, plan_of_traffic, read_traffic, score_held_out
from semmoe.solvers.place.moves import expert_bytes
from semmoe.solvers.place.replicas import served_load_R
from semmoe.solvers.place.solve import PLACING
from semmoe.solvers.placement import Placement
from semmoe.solvers.plan import Plan
from semmoe.solvers.replan.decision import DECIDING_IDS, LEAST_REQUESTS, Decision, decide, deciding_layers, of_layers
from semmoe.solvers.replan.delta import Delta, ExpertMove, LayerDelta, Moved, Ranks
from semmoe.solvers.replan.frontiers import Budget, Replaced, search_frontiers
from semmoe.solvers.replan.steps import steps_between
from semmoe.solvers.replan.tasks import NewTraffic
from semmoe.solvers.replan.timed import TimeGain
from semmoe.solvers.replan.worth import Worth
from semmoe.solvers.time.hardware import TimeAsked, costing_of
from semmoe.solvers.workers import layer_map

BYTES_PER_WEIGHT = 2.0  # of a checkpoint whose identity tells sizes and no number type: BF16
ROW_BYTES = 2 * BYTES_PER_WEIGHT  # of one element of a row, out and back


@dataclass(frozen=True)
class ReplanOptions:
    """What a re-placement may cost.

    Fields:
        budget: moves that are allowed, and the gain that each must bring.
        asked_as: the budget as typed.
        horizon_tokens: tokens until the next re-placement, from which the price of a move follows;
            None: the budget's price as it is.
        force: move whatever the decision says.

    Source: solvers/replan/replan.py; `semmoe place --help` names the same.
    """

    budget: Budget = Budget()
    asked_as: str = "25%"
    horizon_tokens: int | None = None
    force: bool = False


DECIDING = "deciding: layers"  # a stage of its own, as progress tells it


class Replan(NamedTuple):
    """A plan, what leads there, and how it does."""

    plan: Plan
    delta: Delta
    scores: Report | None  # of the plan on the held-out requests of the new traffic


def make_replan(
    traces: list[RoutingTrace],
    old: Plan,
    asked: ReplanOptions,
    options: PlanOptions,
    *,
    demands: Demands | None = None,
    progress: Stages = unshown_stages,
) -> Replan:
    """The plan for the traces' traffic that is at most a budget of moves from `old`, with schedules
    fitted anew and scores on held-out requests. Where no move is worth it, that is the old one as
    it was.

    Parameters:
        traces: the new traffic.
        old: the plan that is served.
        asked: what may move.
        options: how the plan is scored; its method is not looked at.
        demands: what the placement is asked for, where that is not what `old` was.

    Raises InputError for a trace of another model, a plan whose slots no move can keep, a horizon
    where the size of experts is not known, and fewer than 20 requests without `asked.force`.
    """
    # Step 1: refuse what cannot be, before anything is read.
    for trace in traces:
        trace.require_tokens("a re-placement")
        old.model.check(trace.info, trace.path)
    if options.time is not None:
        costing_of(options.time, traces[0].info, old.topology)
    if old.placement.num_wasted:
        raise InputError(
            f"the old plan holds experts twice on a rank ({old.placement.num_wasted} slots): no move keeps its slots"
        )
    num_requests = sum(trace.num_requests for trace in traces)
    if num_requests < LEAST_REQUESTS and not asked.force:
        raise InputError(
            f"{num_requests} requests are too few to tell whether a move is worth it (at least {LEAST_REQUESTS}): "
            "--force re-places without that test"
        )
    options = replace(options, phase=old.options.get("phase", "all"), replica_choice=old.deployment.replica_choice)
    options = replace(options, time=_time_of_phase(options.time, options.phase))
    with_prompts = options.setting.score_from == "prompt"
    traces = [only_phase(trace, options.phase, with_prompts=with_prompts) for trace in traces]
    # Step 2: the new requests, in one reading.
    demands = demands or demands_of(old)
    traffic = read_traffic(traces, options, demands, progress)
    profile = traffic.whole if options.refit else traffic.profile
    # Step 3: whether to move at all.
    timed = None
    if options.time is not None:
        timed = TimeGain.of(options.time, profile.info, old.deployment, profile.sample, demands.seed)
    solver = Solver(old, demands, replace(asked.budget, price=price_of(old, asked, timed)), timed)
    decision = solver.decision(profile, forced=asked.force, progress=progress)
    # Step 4: the plan, with schedules and scores; or scores of the old one.
    if decision.move or decision.forced:
        wanted = Asked(old.topology, demands, solver.solve)
        plan = plan_of_traffic(traces, traffic, wanted, options, progress)
        told = {"from": old.fingerprint, "moves": asked.asked_as, "decision": decision.to_json()}
        plan = replace(plan, method="replan", options=plan.options | {"replan": told})
        scores = plan.scores
    else:
        plan, scores = old, score_held_out(old.deployment, traffic, options, demands.processes, progress)
    # Step 5: what leads there.
    return Replan(plan, delta_between(old, plan, asked, decision, profile, timed), scores)


def _time_of_phase(asked: TimeAsked | None, phase: str) -> TimeAsked | None:
    """Times of the phase that the old plan is for. Raises InputError where another one is asked."""
    if asked is None or phase == "all":
        return asked
    if asked.phase not in ("", phase):
        raise InputError(f"--phase {asked.phase}: the old plan is for {phase} tokens")
    return replace(asked, phase=phase)


def demands_of(plan: Plan) -> Demands:
    """What the plan was asked for; of an imported map, what nothing says is the default."""
    known = {f.name for f in fields(Demands)}
    asked = {name: value for name, value in plan.options.items() if name in known}
    return Demands(**asked | {"load_cap": plan.load_cap, "seed": plan.seed, "dispatch": plan.dispatch})


def worth_of(plan: Plan) -> Worth:
    """Cost of the plan's rows, as its dispatch counts them, and of load above its cap."""
    return Worth.of_dispatch(plan.dispatch, plan.topology.num_nodes, plan.load_cap)


def bytes_of_expert(plan: Plan) -> int | None:
    """Bytes of one expert's weights at two bytes each, from the sizes of the traced checkpoint;
    None where they are not known."""
    config = (plan.model.checkpoint or {}).get("config", {})
    hidden, inner = config.get("hidden_size"), config.get("moe_intermediate_size")
    return expert_bytes(hidden, inner, BYTES_PER_WEIGHT) if hidden and inner else None


def price_of(plan: Plan, asked: ReplanOptions, timed: TimeGain | None = None) -> float:
    """Gain of its layer, in rows per token, that a moved expert must bring: over the horizon it
    must save as many bytes as it takes to move; with a predictor of times, as many microseconds,
    per step. Raises InputError where a size is not known."""
    if asked.horizon_tokens is None:
        return asked.budget.price
    if timed is not None:
        return timed.move_us() / timed.steps(asked.horizon_tokens)
    size = bytes_of_expert(plan)
    if size is None:
        raise InputError(
            "--horizon-tokens needs the size of an expert, and the plan does not know its checkpoint: trace it, or import "
            "with --model, or give --move-cost"
        )
    assert plan.model.checkpoint is not None
    row_bytes = ROW_BYTES * plan.model.checkpoint["config"]["hidden_size"]
    return size / row_bytes / asked.horizon_tokens


@dataclass(frozen=True, eq=False)
class Solver:
    """Re-placements of one old plan within one budget."""

    old: Plan
    demands: Demands
    budget: Budget
    timed: TimeGain | None = None

    def replaced(
        self, profile: RoutingProfile, progress: Progress | None = None, placement: Placement | None = None
    ) -> Replaced:
        """The placement with most gain on a profile. `placement`: what to start from, where that is
        not the old plan's but some layers of it."""
        placement = placement or self.old.placement
        most = self.budget.most_of_layer(placement.num_layers, int((placement.experts_LRS[0] >= 0).sum()))
        worth, unit = worth_of(self.old), 1.0
        if self.timed is not None:
            worth, unit = self.timed.slopes(profile.sample, self.old.deployment)
        traffic = NewTraffic(profile, placement, self.old.topology, self.demands, worth, most)
        budget = replace(self.budget, price=self.budget.price / unit)
        with layer_map(self.demands.processes, placement.num_experts) as run:
            return search_frontiers(traffic, run, progress).within(budget)

    def solve(self, profile: RoutingProfile, progress: Stages) -> Solved:
        """The same as a method of placement gives it."""
        placement = self.replaced(profile, partial(progress, PLACING)).placement
        deployed = replace(self.old.deployment, placement=placement, load_LE=profile.load_LE)
        served = zip(deployed.serving_LRE, profile.load_LE, strict=True)
        return Solved(placement, np.stack([served_load_R(serving_RE, load_E) for serving_RE, load_E in served]))

    def decision(self, profile: RoutingProfile, *, forced: bool, progress: Stages) -> Decision:
        """Whether to move, tested on halves of the requests."""
        fold = partial(progress, DECIDING)
        deployed = replace(self.old.deployment, load_LE=profile.load_LE, schedule=None)
        solver, placement, some = self, deployed.placement, None
        layers = deciding_layers(placement.num_layers, placement.num_experts, placement.num_ranks)
        part = len(layers) / placement.num_layers
        if part < 1 and self.timed is None:
            profile, some = of_layers(profile, layers), len(layers)
            placement = Placement(placement.experts_LRS[layers], placement.num_experts)
            deployed = replace(deployed, placement=placement, load_LE=profile.load_LE)
            moves = self.budget.moves and max(round(self.budget.moves * part), 1)
            solver = replace(self, budget=replace(self.budget, moves=moves))
        solve = partial(solver.replaced, progress=fold, placement=placement)
        options = {"seed": self.demands.seed, "timed": self.timed}
        found = decide(profile, deployed, worth_of(self.old), self.budget.price, solve, **options)
        found = replace(found, layers=some, moves=found.moves if some is None else found.moves / part)
        return replace(found, forced=forced and not found.move)


def delta_between(
    old: Plan,
    new: Plan,
    asked: ReplanOptions,
    decision: Decision,
    profile: RoutingProfile,
    timed: TimeGain | None = None,
) -> Delta:
    """What it takes to get from one plan to the other, whose experts that stay are in their
    slots."""
    info, worth = profile.info, worth_of(old)
    batch = bounded_requests(profile.sample, max_tokens=DECIDING_IDS // (info.num_layers * info.top_k), seed=old.seed)
    deployed = replace(old.deployment, load_LE=profile.load_LE, schedule=None)
    metrics, cost_L = [], []
    for placement in (old.placement, new.placement):
        sums = deployment_sums(replace(deployed, placement=placement), batch)
        metrics.append(metrics_XL(sums.resampled(np.ones((1, len(sums.tokens_G)))), old.topology, old.dispatch))
        by_rows_L = worth.cost_XL(metrics[-1], info.top_k)[0]
        cost_L.append(by_rows_L if timed is None else timed.times_L(batch, replace(deployed, placement=placement)))
    layers = []
    for layer, hosts_ER in enumerate(new.placement.hosts_LER):
        _, moves = steps_between(old.placement.experts_LRS[layer], hosts_ER, old.topology)
        rem, load = ([float(m[name][0, layer]) for m in metrics] for name in ("rem", "load_imbalance"))
        moved = sum(move.kind != "drop" for move in moves)
        gain = float(cost_L[0][layer] - cost_L[1][layer])
        model_layer = old.model.model_layers[layer]
        layers.append(
            LayerDelta(
                layer, model_layer, moved, gain, rem[0], rem[1], load[0], load[1], [ExpertMove.of(m) for m in moves]
            )
        )
    layers.sort(key=lambda layer: (not layer.moves, -layer.gain / max(layer.moved, 0.5), layer.layer))
    used, size = sum(layer.moved for layer in layers), bytes_of_expert(old)
    slots = int((old.placement.experts_LRS >= 0).sum())
    total = asked.budget.total(len(layers), slots // len(layers))
    return Delta(
        old=old.fingerprint,
        new=new.fingerprint,
        topology=Ranks(old.topology.num_ranks, old.topology.num_nodes),
        budget=Moved(total, asked.asked_as, used, slots),
        expert_bytes=size,
        bytes=None if size is None else used * size,
        decision=decision,
        layers=layers,
    )


def note_of(delta: Delta) -> str:
    """The outcome in one line."""
    found, budget = delta.decision, delta.budget
    gain = f"{found.gain:.3f} [{found.lo:.3f}, {found.hi:.3f}] {found.unit}, on requests that it was not fitted on"
    gain += f" (at {found.layers} of {len(delta.layers)} layers)" if found.layers else ""
    if not (found.move or found.forced):
        return f"no move is worth it: a re-placement within {budget.asked_as} gains {gain}, and costs {found.cost:.3f}"
    size = "" if delta.bytes is None else f", {delta.bytes / 1e9:.2f} GB"
    why = "as --force asks, though not shown to be worth it; " if found.forced else ""
    moved = f"moves {budget.used} of {budget.slots} experts ({budget.used / budget.slots:.1%}{size})"
    return f"{moved}: {why}gains {gain}, and costs {found.cost:.3f}"
