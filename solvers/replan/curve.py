"""Gain kept against moves: from an old plan, what re-placements within budgets gain on new
requests, between leaving it as it is and placing anew.

Half of the requests that neither plan was fitted on are fitted, the other half scored: the curve is
what a re-placement would have brought, not what it fits. Its ends: the old plan; a free
re-placement, its ranks renamed to the old ones; and EPLB's packing run again, as engines do.

Shape letters: L MoE layers, B requests.
"""

from dataclasses import replace

import numpy as np

from semmoe.profiles.counts import RoutingProfile
from semmoe.profiles.progress import Progress, unshown
from semmoe.profiles.sample import sample_requests
from semmoe.profiles.split import only_phase, request_keys, whole_of
from semmoe.profiles.trace import RoutingTrace
from semmoe.solvers.evaluate.compare import CurvePoint, GainCurve
from semmoe.solvers.evaluate.metrics import metrics_XL
from semmoe.solvers.evaluate.sums import deployment_sums
from semmoe.solvers.place.baselines import baselines
from semmoe.solvers.place.moves import count_moves
from semmoe.solvers.place.solve import solve_placement
from semmoe.solvers.placement import Placement
from semmoe.solvers.plan import Plan
from semmoe.solvers.replan.decision import DECIDING_IDS, LEAST_REQUESTS, gains_of, halves
from semmoe.solvers.replan.frontiers import Budget, search_frontiers
from semmoe.solvers.replan.replan import demands_of, worth_of
from semmoe.solvers.replan.tasks import NewTraffic
from semmoe.solvers.slots import Slots
from semmoe.solvers.workers import layer_map

SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)


def gain_curve(
    plans: dict[str, Plan], trace: RoutingTrace, *, seed: int, progress: Progress = unshown
) -> GainCurve | None:
    """The curve from the first of two plans, with the second as a point on it; None where they are
    of different shape, hold experts twice on a rank, or fewer than 20 requests are new to both."""
    (old_name, old), (new_name, new) = plans.items()
    same = (
        old.placement.experts_LRS.shape == new.placement.experts_LRS.shape
        and old.topology.num_nodes == new.topology.num_nodes
    )
    trace = only_phase(whole_of(trace), old.options.get("phase", "all"))
    seen = np.concatenate([plan.fitted_keys for plan in plans.values()])
    unseen_B = ~np.isin(request_keys(trace.requests()), seen)
    if not same or old.placement.num_wasted or new.placement.num_wasted or unseen_B.sum() < LEAST_REQUESTS:
        return None
    info = trace.info
    most = DECIDING_IDS // (info.num_layers * info.top_k)
    batch = sample_requests([trace], [unseen_B], max_tokens=most, seed=seed)
    none_LEE = np.zeros((info.num_layers, info.num_experts, info.num_experts), np.int64)
    fitted, scored = halves(RoutingProfile(info, batch.num_tokens, none_LEE[:, 0], none_LEE, batch), seed)
    found = {("keep", old_name): old.placement, ("plan", new_name): new.placement}
    demands = replace(demands_of(old), effort="fast")
    slots = int((old.placement.experts_LRS[0] >= 0).sum())
    with layer_map(1, info.num_experts) as run:
        traffic = NewTraffic(fitted, old.placement, old.topology, demands, worth_of(old), slots)
        frontiers = search_frontiers(traffic, run, progress)
    for share in SHARES:
        found["budget", f"{100 * share:.4g}%"] = frontiers.within(Budget(share)).placement
    found["free", "free re-placement"] = solve_placement(fitted, old.topology, demands, method="semmoe").placement
    found["eplb", "EPLB run again"] = _packed(fitted, old)
    points = [_point(kind, name, placement, old, scored, seed) for (kind, name), placement in found.items()]
    free = next(point.gain for point in points if point.kind == "free")
    points = [replace(point, kept=point.gain / free if free > 0 else None) for point in points]
    points.sort(key=lambda point: (point.moves, point.gain))
    return GainCurve(worth_of(old).unit, fitted.sample.num_requests, scored.sample.num_requests, points)


def _packed(profile: RoutingProfile, old: Plan) -> Placement:
    """EPLB's packing, in as many slots as the old plan has."""
    slots = Slots.of(old.placement)
    return baselines(profile.load_LE, old.topology, old.model.n_group, slots=slots)["load"]


def _point(kind: str, name: str, placement: Placement, old: Plan, scored: RoutingProfile, seed: int) -> CurvePoint:
    """One placement, on the scored requests. A free placement's and EPLB's ranks are renamed."""
    topology = old.topology
    counted = count_moves(old.placement, placement, topology)
    moves = int((counted.renamed_L if kind in ("free", "eplb") else counted.as_named_L).sum())
    before = replace(old.deployment, schedule=None)
    after = replace(before, placement=placement)
    gains_X = gains_of(scored.sample, before, after, worth_of(old), seed).mean(axis=1)
    sums = deployment_sums(after, scored.sample)
    metrics = metrics_XL(sums.resampled(np.ones((1, len(sums.tokens_G)))), topology, old.dispatch)
    lo, hi = (float(q) for q in np.quantile(gains_X[1:], [0.025, 0.975]))
    slots = int((old.placement.experts_LRS >= 0).sum())
    rem, load = (float(metrics[metric].mean()) for metric in ("rem", "load_imbalance"))
    return CurvePoint(kind, name, moves, moves / slots, float(gains_X[0]), lo, hi, None, rem, load)
