"""What a report shows beside its rows: matrices of one layer, traffic between ranks, and load of
each rank, of the placement that was scored.

Shape letters: L MoE layers, T tokens, E experts, R ranks, B requests, G groups of
requests, D domains.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from semmoe.profiles.counts import co_activation_EE, profile_traces
from semmoe.profiles.embedding import input_embedding
from semmoe.profiles.split import domain_groups, request_keys, split_requests
from semmoe.profiles.trace import RoutingTrace, TraceBatch
from semmoe.solvers.deployment import Deployment
from semmoe.solvers.evaluate.decision import deployed_schedule
from semmoe.solvers.evaluate.metrics import score
from semmoe.solvers.evaluate.reached import rank_rows_LRR
from semmoe.solvers.evaluate.report import LayerScores, Report, random_row
from semmoe.solvers.evaluate.score_plan import scored_batch
from semmoe.solvers.evaluate.sums import deployment_sums, resampling_groups
from semmoe.solvers.plan import Plan
from semmoe.solvers.schedule.fit import fit_schedule
from semmoe.solvers.schedule.request_scorer import fit_request_scorer
from semmoe.solvers.schedule.simulate import Setting, simulate

ILLUSTRATION = "the pictures show the requests that the placement was fitted on: an illustration, not evidence"


class Scored(NamedTuple):
    """The deployment that a report's numbers are about, and the requests they come from."""

    deployment: Deployment  # its load is that of the requests it was fitted on
    fit_B: np.ndarray  # bool [B]: requests of the trace to learn from
    score_B: np.ndarray  # bool [B]: requests of the trace to score on; never learned from where `held_out`
    held_out: bool
    note: str
    batch: TraceBatch | None = None  # of `score_B`, where it was read already


@dataclass(frozen=True, eq=False)
class Details:
    """Arrays and rows for pictures. "before" is what the report holds the plan against, "after" the
    plan."""

    scored: Scored
    layer: int  # the layer of median saving
    pairs_EE: np.ndarray  # co-activation of that layer, int64
    before_of_E: np.ndarray  # first rank that hosts each expert there, before, int64
    home_of_E: np.ndarray  # first rank that hosts each expert there, under the plan, int64
    schedule: str  # where tokens live in rows_RR["after"]
    against: str  # name of what is before
    rows_RR: dict[str, np.ndarray]  # rows per token from rank to rank, mean over layers, by placement, float64
    load_LR: dict[str, np.ndarray]  # load of each rank over the mean, by placement, float64
    rem_G: dict[str, np.ndarray]  # remote ranks per token of each group of requests at random homes, float64
    domains: list[str]  # of the requests
    load_LDE: np.ndarray  # load of each expert over the mean of its layer and domain, float64
    home_of_LE: np.ndarray  # first rank that hosts each expert under the plan, int64


def scored_requests(
    plan: Plan, trace: RoutingTrace, *, scheduled: bool, requests_only: bool = False, processes: int = 1
) -> Scored:
    """Which placement and requests stand behind `score_plan` on this trace.

    A plan that was fitted on the whole trace after scoring keeps the placement that was scored, so
    that pictures and table speak of the same thing. Where that does not give the recorded scores
    on the held-out requests, or is not there (several traces, an older plan), the stored placement
    is shown on the requests it was fitted on, and `held_out` is False.

    Parameters:
        plan, trace: of one model.
        scheduled: whether the schedule is looked at. That of a scored placement is not kept (it
            would double the plan), so it is fitted again, on the training requests.
        requests_only: whether of the schedule only the scorer of requests is looked at, which is
            fitted in a moment; the rest is then that of the plan.
        processes: worker processes of that fit.
    """
    requests = trace.requests()
    unseen_B = ~np.isin(request_keys(requests), plan.fitted_keys)
    if unseen_B.any():
        return Scored(plan.deployment, ~unseen_B, unseen_B, True, "")
    everything = np.ones(trace.num_requests, bool)
    fallback = Scored(plan.deployment, everything, everything, False, ILLUSTRATION)
    if plan.trace.get("fingerprints") != [trace.fingerprint]:
        return fallback
    if plan.scored is None:
        why = "the plan does not hold the placement that was scored (semmoe place writes it now)"
        return fallback._replace(note=f"{why}: {ILLUSTRATION}")
    split = plan.split
    (held_out_B,) = split_requests(
        [trace], holdout=split["holdout"], holdout_domains=split["holdout_domains"], seed=split["seed"]
    )
    deployment = replace(plan.deployment, placement=plan.scored.placement, load_LE=plan.scored.load_LE, schedule=None)
    batch = scored_batch([trace], [held_out_B], seed=plan.seed)
    sums = deployment_sums(deployment, batch)
    again = score(sums, plan.topology, dispatch=plan.dispatch, num_resamples=1).means["rem"]
    if plan.scores is None or abs(again - random_row(plan.scores.rows, "plan").rem) > 1e-6:
        return fallback
    if scheduled and plan.deployment.schedule:
        profile = profile_traces([trace], [~held_out_B], seed=plan.seed)
        if requests_only:
            scorer = fit_request_scorer(profile.sample, deployment.placement.hosts_LER, seed=plan.seed)
            fitted = replace(plan.deployment.schedule, request=scorer)
        else:
            embedding_VD = input_embedding(trace.info.embedding)
            fitted = fit_schedule(
                profile.sample, deployment.placement, seed=plan.seed, embedding_VD=embedding_VD, processes=processes
            )
        deployment = replace(deployment, schedule=fitted)
    note = "the pictures show the placement that was scored, fitted on the training requests alone"
    return Scored(deployment, ~held_out_B, held_out_B, True, note, batch)


def report_details(trace: RoutingTrace, report: Report, scored: Scored, before: tuple[str, Deployment]) -> Details:
    """Pictures' arrays of a report. `before`: name and deployment of what it holds the plan
    against. Traffic between ranks is that of the schedule that the headline is about."""
    deployment = scored.deployment
    layer = _typical_layer(report.layers, before[0])
    batch = scored.batch or scored_batch([trace], [scored.score_B], seed=report.setting.seed)
    schedule = deployed_schedule(report) if deployment.schedule else "random"
    rows_RR, load_LR, rem_G = {}, {}, {}
    names, domain_of_B = domain_groups(batch.domains)
    group_of_B, _ = resampling_groups(domain_of_B)
    for name, deployed in (("before", before[1]), ("after", deployment)):
        homes_TL = simulated_homes_TL(deployed, schedule if deployed.schedule else "random", batch, report.setting)
        rows_LRR = rank_rows_LRR(
            batch, deployed.serving_LRE, dispatch=deployed.dispatch, homes_TL=homes_TL, moving=deployed.moving
        )
        rows_RR[name] = rows_LRR.mean(0)
        sums = deployment_sums(deployed, batch, group_of_B=group_of_B)
        told_G = sums.tokens_G > 0
        rem_G[name] = sums.remote_ranks_GL[told_G].mean(1) / sums.tokens_G[told_G]
        load = sums.load_GLR.sum(0)
        load_LR[name] = load / np.maximum(load.mean(1, keepdims=True), 1e-12)
    return Details(
        scored=scored,
        layer=layer,
        pairs_EE=co_activation_EE(batch.expert_ids_TLK[:, layer], trace.info.num_experts),
        before_of_E=before[1].placement.hosts_LER[layer].argmax(1),
        against=before[0],
        home_of_E=deployment.placement.hosts_LER[layer].argmax(1),
        schedule=schedule,
        rows_RR=rows_RR,
        load_LR=load_LR,
        rem_G=rem_G,
        domains=names,
        load_LDE=_loads_by_domain(batch, domain_of_B, len(names), trace.info.num_experts),
        home_of_LE=deployment.placement.hosts_LER.argmax(2),
    )


def _loads_by_domain(batch: TraceBatch, domain_of_B: np.ndarray, num_domains: int, num_experts: int) -> np.ndarray:
    """Load of each expert over the mean expert of its layer and domain, float64 [L, D, E]; 0 for a
    domain without a token. `domain_of_B`: int64 [B]."""
    domain_of_T = np.repeat(domain_of_B, np.diff(batch.starts_B1))
    num_layers = batch.expert_ids_TLK.shape[1]
    cell_of_T1 = domain_of_T[:, None] * num_experts
    load_LDE = np.empty((num_layers, num_domains, num_experts))
    for layer in range(num_layers):
        cells = (cell_of_T1 + batch.expert_ids_TLK[:, layer]).ravel()
        load_LDE[layer] = np.bincount(cells, minlength=num_domains * num_experts).reshape(num_domains, num_experts)
    return load_LDE / np.maximum(load_LDE.mean(2, keepdims=True), 1e-12)


def simulated_homes_TL(deployment: Deployment, name: str, batch: TraceBatch, setting: Setting) -> np.ndarray | None:
    """Where a batch's tokens live under a schedule of the deployment, int16 [T, L]; None for
    "random"."""
    if name == "random":
        return None
    assert deployment.schedule is not None, f"{name} needs tables"
    return simulate(name, batch, deployment.placement, deployment.schedule, **setting.sizes()).homes_TL


def _typical_layer(layers: list[LayerScores], baseline: str) -> int:
    """The layer whose saving of remote ranks is the median of all."""
    saving = [random_row(layer.rows, baseline).rem - random_row(layer.rows, "plan").rem for layer in layers]
    return int(np.argsort(saving, kind="stable")[len(saving) // 2])
