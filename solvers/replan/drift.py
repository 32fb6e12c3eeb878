"""Drift: what a budgeted re-placement would gain on traffic that a plan was not made from.

Loads that changed are no reason to move; a gain that is shown on requests which the re-placement
was not fitted on is (`semmoe.solvers.replan.decision`).

Shape letter: B requests.
"""

import shlex

import numpy as np

from semmoe.profiles.counts import RoutingProfile
from semmoe.profiles.progress import Stages, unshown_stages
from semmoe.profiles.sample import sample_requests
from semmoe.profiles.split import only_phase, request_keys, whole_of
from semmoe.profiles.trace import RoutingTrace
from semmoe.solvers.evaluate.report import Drift
from semmoe.solvers.plan import Plan
from semmoe.solvers.replan.decision import DECIDING_IDS, LEAST_REQUESTS, profile_of
from semmoe.solvers.replan.frontiers import Budget
from semmoe.solvers.replan.replan import Solver, demands_of


def drift_of(
    plan: Plan, trace: RoutingTrace, *, plan_path: str, seed: int = 0, progress: Stages = unshown_stages
) -> Drift | None:
    """The finding; None where fewer than 20 requests are new to the plan, or no move keeps its
    slots. `plan_path`: for the command."""
    trace = only_phase(whole_of(trace), plan.options.get("phase", "all"))
    unseen_B = ~np.isin(request_keys(trace.requests()), plan.fitted_keys)
    if unseen_B.sum() < LEAST_REQUESTS or plan.placement.num_wasted or plan.topology.num_ranks == 1:
        return None
    info, budget = trace.info, Budget()
    most = DECIDING_IDS // (info.num_layers * info.top_k)
    batch = sample_requests([trace], [unseen_B], max_tokens=most, seed=seed)
    none_LEE = np.zeros((info.num_layers, info.num_experts, info.num_experts), np.int64)
    profile = profile_of(RoutingProfile(info, batch.num_tokens, none_LEE[:, 0], none_LEE, batch), batch)
    found = Solver(plan, demands_of(plan), budget).decision(profile, forced=False, progress=progress)
    assert found.gain is not None and found.lo is not None and found.hi is not None
    share = found.moves / int((plan.placement.experts_LRS >= 0).sum())
    command = shlex.join(["semmoe", "place", trace.path, "--from-plan", plan_path, "-o", f"{plan_path}-next"])
    gains = (
        f"moving {share:.0%} of the experts would save {found.gain:.3f} [{found.lo:.3f}, {found.hi:.3f}] {found.unit}"
    )
    sentence = (
        f"Drift: {gains}: {command}"
        if found.move
        else f"Drift: none that is worth a move: {gains}, which is no more than chance."
    )
    values = (found.gain, found.lo, found.hi, found.unit, found.moves, share, found.requests, found.move)
    return Drift(*values, sentence, command if found.move else "")
