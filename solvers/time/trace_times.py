"""Times of plans on a trace, and of a trace alone: what a layer takes with contiguous experts and
with those that load packing places, fitted and timed on different requests.

Shape letter: B requests.
"""

import numpy as np

from semmoe.profiles.counts import profile_traces
from semmoe.profiles.errors import InputError
from semmoe.profiles.split import holdout_requests, request_keys
from semmoe.profiles.trace import RoutingTrace
from semmoe.solvers.deployment import Deployment
from semmoe.solvers.evaluate.against import Against, deployments_beside
from semmoe.solvers.evaluate.score_plan import BETTER, scored_batch
from semmoe.solvers.evaluate.time_report import TimeReport
from semmoe.solvers.place.baselines import baselines
from semmoe.solvers.placement import Topology
from semmoe.solvers.plan import Plan
from semmoe.solvers.schedule.simulate import Setting
from semmoe.solvers.time.hardware import TimeAsked
from semmoe.solvers.time.predict import PLAN, predict

HOLDOUT = 0.5


def trace_times(trace: RoutingTrace, num_ranks: int, asked: TimeAsked, setting: Setting) -> TimeReport:
    """Times of the baselines on `num_ranks` ranks of one node, on the half of the requests that
    load packing did not see. Raises InputError for a trace of one request, or of loads only."""
    trace.require_tokens("a predicted time")
    if trace.num_requests < 2:
        raise InputError(f"{trace.path}: a time needs a request to place by and another to time")
    held_out_B = holdout_requests(trace.requests(), holdout=HOLDOUT, holdout_domains=[], seed=setting.seed)
    profile = profile_traces([trace], [~held_out_B], seed=setting.seed)
    topology = Topology(num_ranks)
    deployments = {
        name: Deployment(placement, profile.load_LE, topology)
        for name, placement in baselines(profile.load_LE, topology, trace.info.n_group).items()
    }
    batch = scored_batch([trace], [np.asarray(held_out_B)], seed=setting.seed)
    return predict(deployments, batch, trace.info.model, asked, setting=setting)


def plan_times(
    plans: dict[str, Plan], trace: RoutingTrace, asked: TimeAsked, setting: Setting, against: Against = BETTER
) -> dict[str, TimeReport]:
    """Times of each plan beside its own baselines, on the requests that no plan was fitted on.
    Raises InputError where there is none."""
    unseen_B = ~np.isin(request_keys(trace.requests()), np.concatenate([plan.fitted_keys for plan in plans.values()]))
    if not unseen_B.any():
        raise InputError(f"--hardware: every request of {trace.path} was used to fit a plan: give another trace")
    batch = scored_batch([trace], [unseen_B], seed=setting.seed)
    found = {}
    for name, plan in plans.items():
        beside = deployments_beside(plan.deployment, plan.model.n_group, against)
        options = {"setting": setting, "against": against.name or None}
        found[name] = predict({PLAN: plan.deployment, **beside}, batch, trace.info.model, asked, **options)
    return found
