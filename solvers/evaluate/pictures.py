"""What a report shows beside its rows: matrices of one layer, traffic between ranks, and load of
each rank.

Shape letters: L MoE layers, E experts, R ranks, B requests.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from semmoe.profiles.counts import co_activation_EE, profile_traces, sample_requests
from semmoe.profiles.embedding import input_embedding
from semmoe.profiles.progress import Progress
from semmoe.profiles.split import holdout_requests, request_keys
from semmoe.profiles.trace import RoutingTrace, TraceBatch
from semmoe.solvers.demands import Demands
from semmoe.solvers.evaluate.metrics import TrafficSums, score, traffic_sums
from semmoe.solvers.evaluate.reached import rank_rows_LRR
from semmoe.solvers.evaluate.score_plan import SCORED_IDS, baselines
from semmoe.solvers.evaluate.verdict import best_row
from semmoe.solvers.place.replicas import serving_LRE
from semmoe.solvers.place.solve import METHODS, solve_placement
from semmoe.solvers.placement import Placement, Topology
from semmoe.solvers.plan import Plan
from semmoe.solvers.schedule.fit import fit_schedule
from semmoe.solvers.schedule.schedule import Schedule
from semmoe.solvers.schedule.simulate import Setting, simulate


class Scored(NamedTuple):
    """The placement that a report's numbers are about, and the requests they come from."""

    placement: Placement
    schedule: Schedule | None
    load_LE: np.ndarray  # of the requests it was fitted on
    fit_B: np.ndarray  # bool [B]: requests of the trace to learn from
    score_B: np.ndarray  # bool [B]: requests of the trace to score on; never learned from where `held_out`
    held_out: bool
    note: str


@dataclass(frozen=True, eq=False)
class Details:
    """Arrays and rows for pictures. "before" is the contiguous placement, "after" the plan."""

    scored: Scored
    layer: int  # the layer of median saving
    pairs_EE: np.ndarray  # co-activation of that layer
    home_of_E: np.ndarray  # first rank that hosts each expert there, under the plan
    schedule: str  # where tokens live in rows_RR["after"]
    rows_RR: dict[str, np.ndarray]  # rows per token from rank to rank, mean over layers, by placement
    load_LR: dict[str, np.ndarray]  # load of each rank over the mean, by placement


def scored_requests(plan: Plan, trace: RoutingTrace, *, processes: int = 1, progress: Progress | None = None) -> Scored:
    """Which placement and requests stand behind `score_plan` on this trace.

    A plan that was fitted on the whole trace after scoring is solved again on its training side, so
    that pictures and table speak of the same thing. Where that does not give the recorded scores
    (several traces, another version), the stored placement is shown on the requests it was fitted
    on, and `held_out` is False.
    """
    requests = trace.requests()
    unseen_B = ~np.isin(request_keys(requests), plan.fitted_keys)
    schedule = Schedule.from_tables(plan.tables)
    if unseen_B.any():
        return Scored(plan.placement, schedule, plan.load_LE, ~unseen_B, unseen_B, True, "")
    everything = np.ones(trace.num_requests, bool)
    fallback = Scored(
        plan.placement,
        schedule,
        plan.load_LE,
        everything,
        everything,
        False,
        "the pictures show the requests that the placement was fitted on: an illustration, not evidence",
    )
    if plan.trace.get("fingerprints") != [trace.fingerprint] or plan.method not in METHODS:
        return fallback
    split = plan.split
    held_out_B = holdout_requests(
        requests, holdout=split["holdout"], holdout_domains=split["holdout_domains"], seed=split["seed"]
    )
    profile = profile_traces([trace], [~held_out_B], seed=plan.seed)
    known = {f.name for f in fields(Demands)}
    options: dict[str, Any] = {name: value for name, value in plan.options.items() if name in known}
    demands = Demands(**options, load_cap=plan.load_cap, seed=plan.seed, dispatch=plan.dispatch, processes=processes)
    placement = solve_placement(profile, plan.topology, demands, method=plan.method, progress=progress).placement
    batch = scored_batch(trace, held_out_B, seed=plan.seed)
    sums = placement_sums(placement, profile.load_LE, batch, trace, plan.topology, dispatch=plan.dispatch)
    again = score(sums, plan.topology, dispatch=plan.dispatch, num_resamples=1).means["rem"]
    recorded = [row["rem"] for row in plan.scores["rows"] if (row["placement"], row["schedule"]) == ("plan", "random")]
    if not recorded or abs(again - recorded[0]) > 1e-6:
        return fallback
    note = "the pictures show the placement that was scored, solved again on the training requests alone"
    fitted = None
    if schedule:
        embedding_VD = input_embedding(trace.info.embedding)
        fitted = fit_schedule(profile.sample, placement, seed=plan.seed, embedding_VD=embedding_VD)
    return Scored(placement, fitted, profile.load_LE, ~held_out_B, held_out_B, True, note)


def scored_batch(trace: RoutingTrace, keep_B: np.ndarray, *, seed: int) -> TraceBatch:
    """The kept requests in memory: all, or as many as a score looks at."""
    per_token = trace.info.num_layers * trace.info.top_k
    return sample_requests([trace], [keep_B], max_tokens=SCORED_IDS // per_token, seed=seed)


def placement_sums(
    placement: Placement,
    load_LE: np.ndarray,
    batch: TraceBatch,
    trace: RoutingTrace,
    topology: Topology,
    *,
    dispatch: str,
) -> TrafficSums:
    """Traffic of a batch with tokens at random homes."""
    return traffic_sums(
        [batch],
        trace.info,
        serving_LRE(placement.hosts_LER, load_LE, topology),
        topology,
        dispatch=dispatch,
        num_requests=batch.num_requests,
    )


def report_details(plan: Plan, trace: RoutingTrace, report: dict[str, Any], scored: Scored) -> Details:
    """Pictures' arrays of a report. Traffic between ranks is that of the best schedule that the
    report scored, oracles left out."""
    topology, dispatch = plan.topology, plan.dispatch
    setting = Setting(**report["setting"]) if "setting" in report else Setting()
    before = baselines(scored.load_LE, topology)["contiguous"]
    layer = _typical_layer(report)
    batch = scored_batch(trace, scored.score_B, seed=setting.seed)
    schedule = best_schedule(report) if scored.schedule else "random"
    homes_TL = None
    if schedule != "random" and scored.schedule is not None:
        homes_TL = simulate(schedule, batch, scored.placement, scored.schedule, **asdict(setting)).homes_TL
    rows_RR, load_LR = {}, {}
    for name, placement in (("before", before), ("after", scored.placement)):
        serving = serving_LRE(placement.hosts_LER, scored.load_LE, topology)
        homes = None if name == "before" or homes_TL is None else (lambda _, homes_TL=homes_TL: homes_TL)
        rows_RR[name] = rank_rows_LRR([batch], trace.info, serving, dispatch=dispatch, homes=homes).mean(0)
        sums = placement_sums(placement, scored.load_LE, batch, trace, topology, dispatch=dispatch)
        load = sums.load_GLR.sum(0)
        load_LR[name] = load / np.maximum(load.mean(1, keepdims=True), 1e-12)
    return Details(
        scored=scored,
        layer=layer,
        pairs_EE=co_activation_EE(batch.expert_ids_TLK[:, layer], trace.info.num_experts),
        home_of_E=scored.placement.hosts_LER[layer].argmax(1),
        schedule=schedule,
        rows_RR=rows_RR,
        load_LR=load_LR,
    )


def best_schedule(report: dict[str, Any]) -> str:
    """The schedule under which the plan sends least (`best_row`)."""
    return best_row([row for row in report["rows"] if row["placement"] == "plan"], report["dispatch"])["schedule"]


def _typical_layer(report: dict[str, Any]) -> int:
    """The layer whose saving of remote ranks is the median of all."""

    def rem(layer: dict[str, Any], placement: str) -> float:
        return next(r["rem"] for r in layer["rows"] if (r["placement"], r["schedule"]) == (placement, "random"))

    saving = [rem(layer, "contiguous") - rem(layer, "plan") for layer in report["layers"]]
    return int(np.argsort(saving, kind="stable")[len(saving) // 2])
