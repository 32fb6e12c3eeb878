"""Plans of traces that hold loads and no routing per token: placed by load, scored for balance.

Without the experts of a token nothing can be said of the ranks that it reaches: such a plan has no
schedule and no report, and says so.

Shape letters: L MoE layers, E experts, R ranks, W windows of counts.
"""

from dataclasses import asdict
from typing import Any

import numpy as np

from semmoe.profiles.counts import RoutingProfile
from semmoe.profiles.errors import InputError
from semmoe.profiles.trace import RoutingTrace, TraceInfo, concat_batches
from semmoe.solvers.demands import Demands
from semmoe.solvers.evaluate.metrics import DISPATCH_KINDS
from semmoe.solvers.place.baselines import baselines
from semmoe.solvers.place.replicas import served_load_R, serving_LRE
from semmoe.solvers.place.solve import solve_placement
from semmoe.solvers.placement import EMPTY, Placement, Topology, part_sizes
from semmoe.solvers.plan import ModelFacts, Plan
from semmoe.solvers.slots import Slots

METHODS_OF_COUNTS = ("load", "contiguous")
ONLY_BALANCE = "expert loads only, no routing per token: scored for balance, traffic is not scored"


def counted_load_LE(traces: list[RoutingTrace]) -> np.ndarray:
    """Activations of all windows of traces of one model, int64 [L, E]. Raises InputError where one
    is of another model, or nothing was counted."""
    info = traces[0].info
    for trace in traces[1:]:
        if wrong := info.mismatch(trace.info):
            raise InputError(f"{trace.path} is the trace of another model or kind than {traces[0].path}: {wrong}")
    load_LE = np.sum([trace.load_counts()[1].sum(axis=0) for trace in traces], axis=0)
    if not load_LE.any():
        raise InputError(f"{traces[0].path}: every load is zero")
    return load_LE


def check_method(traces: list[RoutingTrace], method: str, demands: Demands, *, certify: bool) -> None:
    """Raise InputError where a plan of counts cannot be what was asked for."""
    if method not in METHODS_OF_COUNTS:
        by = " or ".join(f"--method {name}" for name in METHODS_OF_COUNTS)
        where = next(trace.path for trace in traces if trace.info.kind == "counts")
        raise InputError(
            f"{where} holds only expert loads, and method {method} needs routing per token: {by} takes loads"
        )
    if demands.dispatch not in DISPATCH_KINDS:
        raise InputError(f"dispatch {demands.dispatch!r} is none of {', '.join(DISPATCH_KINDS)}")
    asked = {"--certify": certify, "--robust": demands.robust > 0}
    if unmet := [option for option, is_set in asked.items() if is_set]:
        raise InputError(f"{unmet[0]} needs routing per token, {traces[0].path} holds only expert loads")


def plan_of_counts(
    traces: list[RoutingTrace], topology: Topology, demands: Demands, *, method: str, made_by: str
) -> Plan:
    """The plan of traces of loads, by one of METHODS_OF_COUNTS; a layer without any count keeps its
    experts in order. `Plan.options["balance"]` holds what `balance_of` says on the same loads."""
    info, load_LE = traces[0].info, counted_load_LE(traces)
    profile = _profile(info, load_LE)
    solved = solve_placement(profile, topology, demands, method=method)
    placement, notes = solved.placement, [ONLY_BALANCE, *solved.notes]
    uncounted = np.flatnonzero(~load_LE.any(axis=1))
    if uncounted.size:
        experts_LRS = placement.experts_LRS.copy()
        experts_LRS[uncounted] = _in_order(placement)
        placement = Placement(experts_LRS, info.num_experts)
        layers = ", ".join(str(info.model_layers[layer]) for layer in uncounted)
        notes.append(f"layers without any count keep their experts in order: {layers}")
    plan = Plan(
        placement=placement,
        topology=topology,
        model=ModelFacts.of(info),
        method=method,
        seed=demands.seed,
        dispatch=demands.dispatch,
        load_LE=load_LE,
        fitted_keys=np.empty(0, np.uint64),
        load_cap=demands.load_cap,
        options={k: v for k, v in asdict(demands).items() if k in ("replicas", "expressible")},
        trace={"fingerprints": [trace.fingerprint for trace in traces], "requests": 0, "tokens": 0},
        split={
            "holdout": 0.0,
            "holdout_domains": [],
            "seed": demands.seed,
            "held_out_requests": 0,
            "training_requests": 0,
            "refit": False,
        },
        notes=notes,
        made_by=made_by,
    )
    plan.options["balance"] = balance_of(plan, load_LE)
    return plan


def balance_of(plan: Plan, load_LE: np.ndarray) -> list[dict[str, Any]]:
    """Busiest rank over the mean and over the median of a plan and of what engines do without one,
    mean over the layers that were counted. `load_LE`: activations, integers."""
    counted = load_LE.any(axis=1)
    rows = []
    beside = baselines(plan.load_LE, plan.topology, plan.model.n_group, slots=Slots.of(plan.placement))
    for name, placement in {"plan": plan.placement, **beside}.items():
        serving = serving_LRE(placement.hosts_LER, plan.load_LE, plan.topology)
        load_LR = np.stack([served_load_R(s, load_E) for s, load_E in zip(serving, load_LE, strict=True)])[counted]
        most_L = load_LR.max(axis=1)
        median_L = np.maximum(np.median(load_LR, axis=1), 1e-12)
        rows.append(
            {
                "placement": name,
                "load_imbalance": float((most_L / load_LR.mean(axis=1)).mean()),
                "load_imbalance_median": float((most_L / median_L).mean()),
            }
        )
    return rows


def _profile(info: TraceInfo, load_LE: np.ndarray) -> RoutingProfile:
    """A profile of loads alone: no token, and no two experts together."""
    none_LEE = np.zeros((info.num_layers, info.num_experts, info.num_experts), np.int64)
    return RoutingProfile(info, 0, load_LE, none_LEE, concat_batches([], info))


def _in_order(placement: Placement) -> np.ndarray:
    """Experts of every rank in order, and its spare slots those of the ranks after it: [R, S]."""
    sizes_R = part_sizes(placement.num_experts, placement.num_ranks)
    slots_S, first_R = np.arange(placement.slots_per_rank), np.cumsum(sizes_R) - sizes_R
    in_order_RS = (first_R[:, None] + slots_S) % placement.num_experts
    return np.where((slots_S < sizes_R[:, None]) | (placement.num_empty == 0), in_order_RS, EMPTY)
