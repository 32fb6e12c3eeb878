"""Scores of placements on given requests: every row of a report, its intervals, its verdict.

Shape letters: L MoE layers, E experts, B requests.
"""

from dataclasses import asdict
from typing import Any

import numpy as np

from semmoe.profiles.errors import InputError
from semmoe.profiles.progress import Progress
from semmoe.profiles.sample import sample_requests
from semmoe.profiles.split import domain_groups
from semmoe.profiles.trace import RoutingTrace, TraceBatch, TraceInfo
from semmoe.solvers.evaluate.metrics import (
    Scores,
    TrafficSums,
    report_domains,
    report_layers,
    report_rows,
    resampling_groups,
    score,
    uniform_scores,
)
from semmoe.solvers.evaluate.rows import summed_rows
from semmoe.solvers.evaluate.verdict import best_row, saving, traffic_cost, verdict
from semmoe.solvers.place.baselines import place_load_on_nodes
from semmoe.solvers.place.contiguous import place_contiguous
from semmoe.solvers.placement import Placement, Topology
from semmoe.solvers.schedule.schedule import Schedule
from semmoe.solvers.schedule.simulate import Setting, available_schedules

REPORT_FORMAT = "semmoe-report"
REPORT_VERSION = 1
SCORED_IDS = 50_000_000  # expert ids of the requests that are scored: 100,000 tokens of 58 layers x top-8


def baselines(load_LE: np.ndarray, topology: Topology, num_groups: int = 1) -> dict[str, Placement]:
    """What engines do without us: contiguous experts, and packing by load (`load_LE` of the fitted
    requests), which packs the model's routing groups onto nodes first."""
    num_layers, num_experts = load_LE.shape
    return {
        "contiguous": Placement.from_ranks(
            place_contiguous(num_layers, num_experts, topology.num_ranks), topology.num_ranks
        ),
        "load": Placement.from_ranks(place_load_on_nodes(load_LE, topology, num_groups), topology.num_ranks),
    }


def score_placements(
    placements: dict[str, Placement],
    traces: list[RoutingTrace],
    keep: list[np.ndarray],
    topology: Topology,
    *,
    load_LE: np.ndarray,
    dispatch: str,
    schedule: Schedule | None,
    setting: Setting,
) -> dict[str, Any]:
    """The report object (docs/formats.md): rows and layers of every placement on the requests of
    `keep` (bool [B] per trace).

    Every placement is scored with tokens at random homes; the one named "plan" also under what its
    `schedule` allows. Of very large traces, a random sample of the requests is scored. `load_LE`:
    activations of the fitted requests, for the choice of replicas.
    """
    info = traces[0].info
    max_tokens = SCORED_IDS // (info.num_layers * info.top_k)
    batch = sample_requests(traces, keep, max_tokens=max_tokens, seed=setting.seed)
    if batch.num_tokens == 0:
        raise InputError(f"{traces[0].path} holds no request to score on")
    return score_batch(
        placements, batch, info, topology, load_LE=load_LE, dispatch=dispatch, schedule=schedule, setting=setting
    )


def score_batch(
    placements: dict[str, Placement],
    batch: TraceBatch,
    info: TraceInfo,
    topology: Topology,
    *,
    load_LE: np.ndarray,
    dispatch: str,
    schedule: Schedule | None,
    setting: Setting,
    processes: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """`score_placements` on the requests of one batch; independent of `processes`. Raises
    InputError for a batch of none."""
    if batch.num_tokens == 0:
        raise InputError("no request is left to score on")
    # Random homes are summed exactly; they are no schedule to simulate.
    rows = [(name, "random") for name in placements]
    rows += [("plan", name) for name in (available_schedules(schedule) if schedule else []) if name != "random"]
    names, domain_of_B = domain_groups(batch.domains)
    group_of_B, domain_of_G = resampling_groups(domain_of_B)
    sums, token_imbalance = {}, {}
    for row, found, imbalance in summed_rows(
        rows,
        placements,
        batch,
        info,
        topology,
        load_LE=load_LE,
        dispatch=dispatch,
        schedule=schedule,
        setting=setting,
        group_of_B=group_of_B,
        processes=processes,
        progress=progress,
    ):
        sums[row] = found
        if imbalance is not None:
            token_imbalance[row] = imbalance
    scores = {key: score(s, topology, dispatch=dispatch, seed=setting.seed) for key, s in sums.items()}
    for key, value in token_imbalance.items():
        scores[key].means["token_imbalance"] = value
        scores[key].intervals["token_imbalance"] = (value, value)
    return {
        "format": REPORT_FORMAT,
        "version": REPORT_VERSION,
        "plan": "",
        "trace": "",
        "model": info.model,
        "ranks": topology.num_ranks,
        "nodes": topology.num_nodes,
        "dispatch": dispatch,
        "requests": batch.num_requests,
        "tokens": batch.num_tokens,
        "setting": asdict(setting),
        "uniform": uniform_scores(info.num_experts, info.top_k, topology),
        "verdict": _verdict(sums, scores, topology, dispatch, setting.seed),
        "rows": report_rows(scores),
        "domains": report_domains(
            sums,
            names,
            np.bincount(domain_of_B, minlength=len(names)),
            domain_of_G,
            topology,
            dispatch=dispatch,
            seed=setting.seed,
        ),
        "layers": report_layers(scores, info),
    }


def _verdict(
    sums: dict[tuple[str, str], TrafficSums],
    scores: dict[tuple[str, str], Scores],
    topology: Topology,
    dispatch: str,
    seed: int,
) -> dict[str, Any]:
    """Verdict on placement alone, against the better of the baselines, and on the best schedule
    that needs no oracle.

    Where rows are per token and expert placement alone saves nothing, so there the schedule
    decides.
    """

    metrics = {(p, s): {"schedule": s, **found.means} for (p, s), found in scores.items()}
    before = min((("contiguous", "random"), ("load", "random")), key=lambda key: traffic_cost(metrics[key], dispatch))
    rows = [row for (p, s), row in metrics.items() if p == "plan" and s not in ("random", "dp-roundrobin")]
    best = best_row(rows, dispatch)["schedule"] if rows else "random"

    def judged(schedule: str) -> dict[str, Any]:
        saved = saving(sums[before], sums["plan", schedule], topology, dispatch=dispatch, seed=seed)
        found = verdict(saved, dispatch=dispatch, schedule=schedule) | {"against": before[0]}
        loads = [scores[key].means["load_imbalance"] for key in (before, ("plan", schedule))]
        if loads[1] / loads[0] - 1 > max(saved.share, 0) and dispatch != "gather":
            found["level"] = "watch" if found["level"] == "good" else found["level"]
            found["sentence"] += (
                f" But the busiest rank's load rises from {loads[0]:.2f} to {loads[1]:.2f} of the mean."
            )
        return found

    found = judged(best if dispatch == "per-expert" else "random")
    return found | {"with_schedule": judged(best) if best != "random" else None}
