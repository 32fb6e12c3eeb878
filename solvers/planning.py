"""make_plan and score_plan: the whole way from traces to a plan with held-out scores, and from a plan to scores on another trace.

Scores always come from requests that the scored placement was not fitted on. The plan that is written may then be fitted on all
requests: more data only helps it, and plan.json says so.

Shape letters: L MoE layers, R ranks, E experts, B requests.
"""

from typing import Any

import numpy as np

from profiles.counts import profile_traces
from profiles.errors import InputError
from profiles.split import holdout_requests, request_keys
from profiles.trace import RoutingTrace
from solvers.contiguous import place_contiguous
from solvers.evaluate import (
    DISPATCH_KINDS,
    Scores,
    report_layers,
    report_rows,
    score,
    traffic_sums,
    uniform_scores,
)
from solvers.load import place_load
from solvers.placement import Placement, Topology
from solvers.plan import ModelFacts, Plan
from solvers.solve import solve_placement

REPORT_FORMAT = "semmoe-report"
REPORT_VERSION = 1


def make_plan(
    traces: list[RoutingTrace],
    topology: Topology,
    *,
    method: str,
    dispatch: str,
    holdout: float,
    holdout_domains: list[str],
    load_cap: float,
    refit: bool,
    seed: int,
    made_by: str,
) -> Plan:
    """The plan for the traces' model, with scores on held-out requests beside the baselines (see `score_placements`)."""
    if dispatch not in DISPATCH_KINDS:
        raise InputError(f"dispatch {dispatch!r} is none of {', '.join(DISPATCH_KINDS)}")
    for trace in traces:
        trace.require_tokens("placement by co-activation, and its held-out scores,")
    topology.check_experts(traces[0].info.num_experts)
    held_out = _split(traces, holdout, holdout_domains, seed)
    profile = profile_traces(traces, [~h for h in held_out], seed=seed)
    placement, notes = solve_placement(profile, topology, method=method, load_cap=load_cap, seed=seed)
    scores = score_placements(
        {"plan": placement, **baselines(profile.load_LE, topology)},
        traces,
        held_out,
        topology,
        dispatch=dispatch,
        seed=seed,
    )
    fitted = [~h for h in held_out]
    if refit:
        fitted = [np.ones_like(h) for h in held_out]
        profile = profile_traces(traces, seed=seed)
        placement, notes = solve_placement(profile, topology, method=method, load_cap=load_cap, seed=seed)
    num_held_out = int(sum(h.sum() for h in held_out))
    return Plan(
        placement=placement,
        topology=topology,
        model=ModelFacts.of(traces[0].info),
        method=method,
        seed=seed,
        dispatch=dispatch,
        load_LE=profile.load_LE,
        fitted_keys=np.concatenate([request_keys(t.requests())[f] for t, f in zip(traces, fitted, strict=True)]),
        load_cap=load_cap,
        trace={
            "fingerprints": [t.fingerprint for t in traces],
            "requests": sum(t.num_requests for t in traces),
            "tokens": sum(t.num_tokens for t in traces),
        },
        split={
            "holdout": 0.0 if holdout_domains else holdout,
            "holdout_domains": holdout_domains,
            "seed": seed,
            "held_out_requests": num_held_out,
            "training_requests": sum(t.num_requests for t in traces) - num_held_out,
            "refit": refit,
        },
        scores=scores,
        notes=notes,
        made_by=made_by,
    )


def score_plan(plan: Plan, trace: RoutingTrace, *, seed: int = 0) -> tuple[dict[str, Any], list[str]]:
    """A report of the plan on a trace, and notes on which requests were scored.

    Requests that the plan was fitted on are never scored. Where that leaves none of a trace that the plan was made from, its own
    held-out scores are the answer. Raises InputError where another trace holds nothing else.
    """
    trace.require_tokens("a report")
    plan.model.check(trace.info, trace.path)
    unseen_B = ~np.isin(request_keys(trace.requests()), plan.fitted_keys)
    num_seen = int((~unseen_B).sum())
    if not unseen_B.any():
        if trace.fingerprint not in plan.trace["fingerprints"]:
            raise InputError(
                f"the plan was fitted on every request of {trace.path}: nothing is left to score it on honestly"
            )
        return plan.scores, [
            f"the plan was fitted on all of {trace.path}: these are the scores, on {plan.split['held_out_requests']} held-out requests, "
            f"of the same method fitted on the other {plan.split['training_requests']}"
        ]
    notes = [f"{num_seen} requests of {trace.path} were used to fit the plan and are left out"] if num_seen else []
    placements = {"plan": plan.placement, **baselines(plan.load_LE, plan.topology)}
    return score_placements(placements, [trace], [unseen_B], plan.topology, dispatch=plan.dispatch, seed=seed), notes


def baselines(load_LE: np.ndarray, topology: Topology) -> dict[str, Placement]:
    """What engines do without us: contiguous experts, and packing by load (`load_LE` of the fitted requests)."""
    num_layers, num_experts = load_LE.shape
    return {
        "contiguous": Placement.from_ranks(
            place_contiguous(num_layers, num_experts, topology.num_ranks), topology.num_ranks
        ),
        "load": Placement.from_ranks(place_load(load_LE, topology.num_ranks), topology.num_ranks),
    }


def score_placements(
    placements: dict[str, Placement],
    traces: list[RoutingTrace],
    keep: list[np.ndarray],
    topology: Topology,
    *,
    dispatch: str,
    seed: int,
) -> dict[str, Any]:
    """The report object (docs/formats.md): rows and layers of every placement on the requests of `keep` (bool [B] per trace)."""
    info = traces[0].info
    num_requests = int(sum(k.sum() for k in keep))
    if num_requests == 0:
        raise InputError(f"{traces[0].path} holds no request to score on")

    def scored(placement: Placement) -> Scores:
        shape = (info.num_layers, topology.num_ranks, info.num_experts)
        serving_LRE = np.broadcast_to(placement.rank_of_LE[:, None], shape)
        batches = (batch for trace, keep_B in zip(traces, keep, strict=True) for batch in trace.batches(keep_B))
        sums = traffic_sums(batches, info, serving_LRE, topology, dispatch=dispatch, num_requests=num_requests)
        return score(sums, topology, dispatch=dispatch, seed=seed)

    scores = {(name, "random"): scored(placement) for name, placement in placements.items()}
    tokens = sum(int(t.requests().column("num_tokens").to_numpy()[k].sum()) for t, k in zip(traces, keep, strict=True))
    return {
        "format": REPORT_FORMAT,
        "version": REPORT_VERSION,
        "plan": "",
        "trace": "",
        "model": info.model,
        "ranks": topology.num_ranks,
        "nodes": topology.num_nodes,
        "dispatch": dispatch,
        "requests": num_requests,
        "tokens": tokens,
        "uniform": uniform_scores(info.num_experts, info.top_k, topology),
        "rows": report_rows(scores),
        "layers": report_layers(scores, info),
    }


def _split(traces: list[RoutingTrace], holdout: float, domains: list[str], seed: int) -> list[np.ndarray]:
    """Held-out requests over all traces together, bool [B] per trace."""
    import pyarrow as pa

    tables = [trace.requests() for trace in traces]
    held_out_B = holdout_requests(pa.concat_tables(tables), holdout=holdout, holdout_domains=domains, seed=seed)
    return np.split(held_out_B, np.cumsum([t.num_rows for t in tables])[:-1])
