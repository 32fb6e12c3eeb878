"""Scores of a deployment and of what engines do without one, on given requests: every row of a
report, its intervals, its verdict.

Shape letters: L MoE layers, E experts, B requests.
"""

from dataclasses import replace

import numpy as np

from semmoe.profiles.errors import InputError
from semmoe.profiles.progress import Progress
from semmoe.profiles.sample import sample_requests
from semmoe.profiles.split import domain_groups, phase_of, phase_shares
from semmoe.profiles.trace import RoutingTrace, TraceBatch, TraceInfo
from semmoe.solvers.deployment import Deployment
from semmoe.solvers.evaluate.against import BASELINES, Against, deployments_beside
from semmoe.solvers.evaluate.metrics import Scores, uniform_scores
from semmoe.solvers.evaluate.report import DomainScores, Judgement, Key, LayerScores, Report, ScoreRow, Verdict
from semmoe.solvers.evaluate.rows import summed_rows
from semmoe.solvers.evaluate.sums import TrafficSums, resampling_groups
from semmoe.solvers.evaluate.verdict import best_deployable, best_row, bytes_only, judge, saving, traffic_cost
from semmoe.solvers.placement import Placement
from semmoe.solvers.schedule.simulate import AS_SERVED, Setting, available_schedules, most_that_run

BETTER = Against()  # of the two baselines
SCORED_IDS = 50_000_000  # expert ids of the requests that are scored: 100,000 tokens of 58 layers x top-8


def scored_batch(traces: list[RoutingTrace], keep: list[np.ndarray], *, seed: int) -> TraceBatch:
    """The kept requests (bool [B] per trace) in memory: all, or as many as a score looks at."""
    info = traces[0].info
    return sample_requests(traces, keep, max_tokens=SCORED_IDS // (info.num_layers * info.top_k), seed=seed)


def score_placements(
    deployment: Deployment,
    traces: list[RoutingTrace],
    keep: list[np.ndarray],
    *,
    against: Against = BETTER,
    setting: Setting,
) -> Report:
    """`score_batch` on the requests of `keep` (bool [B] per trace); of very large traces, on a
    random sample of them. Raises InputError where there is none."""
    batch = replace(scored_batch(traces, keep, seed=setting.seed), rank_of_B=None)
    if batch.num_tokens == 0:
        raise InputError(f"{traces[0].path} holds no request to score on")
    report = score_batch(deployment, batch, traces[0].info, against=against, setting=setting)
    return replace(report, phase=phase_of(traces[0]), phase_shares=phase_shares(traces))


def score_batch(
    deployment: Deployment,
    batch: TraceBatch,
    info: TraceInfo,
    *,
    against: Against = BETTER,
    setting: Setting,
    processes: int = 1,
    progress: Progress | None = None,
) -> Report:
    """The report on the requests of one batch. Raises InputError for a batch of none.

    Parameters:
        deployment: the plan, scored with tokens at random homes and under what its schedule allows.
        batch: requests that it was not fitted on.
        info: the model, for names of layers, uniform draws and routing groups.
        against: which baseline the verdict is about, or a plan that is scored like them.
        setting: how schedules are simulated.
        processes: worker processes for the rows; the result does not depend on them.
    """
    if batch.num_tokens == 0:
        raise InputError("no request is left to score on")
    others = deployments_beside(deployment, info.n_group, against)
    rows = {(name, "random"): deployed for name, deployed in {"plan": deployment, **others}.items()}
    # Random homes are summed exactly; they are no schedule to simulate.
    known = available_schedules(deployment.schedule) if deployment.schedule else []
    known += [f"dp-{setting.score_from}"] if known and setting.score_from else []
    rows |= {("plan", name): deployment for name in known if name != "random"}
    if batch.rank_of_B is not None and (batch.rank_of_B >= 0).any():
        rows[("plan", AS_SERVED)] = deployment
    names, domain_of_B = domain_groups(batch.domains)
    group_of_B, domain_of_G = resampling_groups(domain_of_B)
    options = {"processes": processes, "progress": progress}
    summed = summed_rows(rows, batch, setting, group_of_B, domain_of_G, **options)
    sums, scores = {key: row.sums for key, row in summed.items()}, {key: row.scores for key, row in summed.items()}
    dispatch = deployment.dispatch
    costs = {name: traffic_cost(ScoreRow.of((name, "random"), scores[name, "random"]), dispatch) for name in BASELINES}
    before = against.name or min(costs, key=costs.__getitem__)
    domains = []
    for domain, name in enumerate(names):
        if tokens := int(sums["plan", "random"].tokens_G[domain_of_G == domain].sum()):
            its_scores = {key: row.domain_scores[domain] for key, row in summed.items()}
            its_rows = [ScoreRow.of(key, found) for key, found in its_scores.items() if found is not None]
            domains.append(DomainScores(name, int((domain_of_B == domain).sum()), tokens, its_rows))
    return Report(
        plan="",
        trace="",
        model=info.model,
        ranks=deployment.topology.num_ranks,
        nodes=deployment.topology.num_nodes,
        dispatch=dispatch,
        replica_choice=deployment.replica_choice,
        against=before,
        requests=batch.num_requests,
        tokens=batch.num_tokens,
        setting=setting,
        uniform=uniform_scores(info.num_experts, info.top_k, deployment.topology),
        verdict=_verdict(sums, scores, deployment, before, setting.seed),
        rows=[ScoreRow.of(key, found) for key, found in scores.items()],
        domains=domains,
        layers=[
            LayerScores(i, layer, [ScoreRow.of_layer(key, found, i) for key, found in scores.items()])
            for i, layer in enumerate(info.model_layers)
        ],
    )


def notes_on_rows(report: Report, placement: Placement) -> list[str]:
    """Which rows of a report are of fewer tokens than the others, in one line; nothing where none
    are."""
    most = most_that_run(placement)
    if report.tokens <= most or not any(
        row.schedule.startswith("tp-") for row in report.rows if row.placement == "plan"
    ):
        return []
    return [f"rows tp-*: of {most:,} of the {report.tokens:,} scored tokens, drawn over all requests"]


def _verdict(
    sums: dict[Key, TrafficSums], scores: dict[Key, Scores], deployment: Deployment, against: str, seed: int
) -> Verdict:
    """Verdict on placement alone, against the placement of that name, on the best schedule that
    needs no oracle, and on the best that can be deployed.

    Where rows are per token and expert placement alone saves nothing, so there the best that can be
    deployed decides.
    """
    dispatch, rows = deployment.dispatch, {key: ScoreRow.of(key, found) for key, found in scores.items()}
    before = against, "random"
    scheduled = [row for (p, s), row in rows.items() if p == "plan" and s not in ("random", "dp-roundrobin", AS_SERVED)]
    best = best_row(scheduled, dispatch).schedule if scheduled else "random"

    def judged(schedule: str) -> Judgement:
        saved = saving(sums[before], sums["plan", schedule], deployment.topology, dispatch=dispatch, seed=seed)
        found = judge(saved, dispatch=dispatch, schedule=schedule, against=against)
        old, new = rows[before].load_imbalance, rows["plan", schedule].load_imbalance
        if new / old - 1 > max(saved.share, 0) and dispatch != "gather":
            rises = f" But the busiest rank's load rises from {old:.2f} to {new:.2f} of the mean."
            found = replace(found, sentence=found.sentence + rises)
        return bytes_only(found)

    able = best_deployable([row for (p, _), row in rows.items() if p == "plan"], dispatch)
    first = judged(able if dispatch == "per-expert" else "random")
    return Verdict(
        **vars(first),
        with_schedule=judged(best) if best != "random" else None,
        deployable=judged(able) if able != "random" else None,
    )
