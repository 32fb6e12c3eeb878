"""compare_plans: several plans on the requests that none of them was fitted on, and what it takes
to get from one to another.

Shape letters: L MoE layers, B requests.
"""

from itertools import combinations
from typing import Any

import numpy as np

from semmoe.profiles.errors import InputError
from semmoe.profiles.progress import Progress, unshown
from semmoe.profiles.split import request_keys
from semmoe.profiles.trace import RoutingTrace
from semmoe.solvers.evaluate.pictures import placement_sums, scored_batch
from semmoe.solvers.evaluate.score_plan import baselines, score_placements
from semmoe.solvers.place.moves import count_moves, paired_difference
from semmoe.solvers.plan import Plan
from semmoe.solvers.schedule.schedule import Schedule
from semmoe.solvers.schedule.simulate import Setting

COMPARE_FORMAT = "semmoe-compare"
COMPARE_VERSION = 1
PAIRED = ("rem", "link", "load_imbalance")


def compare_plans(
    plans: dict[str, Plan],
    trace: RoutingTrace,
    *,
    bytes_per_expert: int,
    setting: Setting,
    progress: Progress = unshown,
) -> tuple[dict[str, Any], list[str]]:
    """The comparison object (docs/formats.md) and notes. `plans`: two or more, by name; the first
    is what the others are held against.

    Raises InputError where plans and trace are of different models, or where no request is new to
    every plan and the plans' own held-out scores are not of the same requests either.
    """
    trace.require_tokens("a comparison")
    for name, plan in plans.items():
        plan.model.check(trace.info, f"{trace.path} (against {name})")
    first_name, first = next(iter(plans.items()))
    requests = request_keys(trace.requests())
    unseen_B = ~np.isin(requests, np.concatenate([plan.fitted_keys for plan in plans.values()]))
    if unseen_B.any():
        rows, sizes = _scored_rows(plans, trace, unseen_B, setting, progress)
        progress(len(plans), len(plans) + 1)
        differences = _differences(plans, trace, unseen_B, setting.seed)
        left_out = int((~unseen_B).sum())
        notes = (
            [f"{left_out} requests of {trace.path} were used to fit one of the plans and are left out"]
            if left_out
            else []
        )
    else:
        rows, sizes = _recorded_rows(plans, trace)
        differences = []
        notes = [
            f"every request of {trace.path} was used to fit a plan: these are the plans' own held-out scores, of the same requests, "
            "without paired differences (another trace, or place --no-refit, gives them)"
        ]
    for name, plan in plans.items():
        if plan.dispatch != first.dispatch:
            notes.append(f"{name} was made for {plan.dispatch} dispatch, here rows are counted as for {first.dispatch}")
    comparison = {
        "format": COMPARE_FORMAT,
        "version": COMPARE_VERSION,
        "trace": trace.path,
        "model": trace.info.model,
        "dispatch": first.dispatch,
        "plans": [_plan_facts(name, plan) for name, plan in plans.items()],
        **sizes,
        "rows": rows,
        "differences": differences,
        "bytes_per_expert": bytes_per_expert,
        "moves": [_moves(a, b, plans, bytes_per_expert) for a, b in combinations(plans, 2)],
    }
    return comparison, notes


def _plan_facts(name: str, plan: Plan) -> dict[str, Any]:
    return {
        "plan": name,
        "fingerprint": plan.fingerprint,
        "method": plan.method,
        "seed": plan.seed,
        "ranks": plan.topology.num_ranks,
        "nodes": plan.topology.num_nodes,
        "replicas": plan.placement.num_replicas,
    }


def _scored_rows(
    plans: dict[str, Plan],
    trace: RoutingTrace,
    unseen_B: np.ndarray,
    setting: Setting,
    progress: Progress,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    dispatch = next(iter(plans.values())).dispatch
    rows, sizes = [], {}
    for number, (name, plan) in enumerate(plans.items()):
        progress(number, len(plans) + 1)
        report = score_placements(
            {"plan": plan.placement, **baselines(plan.load_LE, plan.topology, plan.model.n_group)},
            [trace],
            [unseen_B],
            plan.topology,
            load_LE=plan.load_LE,
            dispatch=dispatch,
            schedule=Schedule.from_tables(plan.tables),
            setting=setting,
        )
        rows += [{**row, "placement": name} for row in report["rows"] if row["placement"] == "plan"]
        sizes = {"requests": report["requests"], "tokens": report["tokens"]}
    return rows, sizes


def _recorded_rows(plans: dict[str, Plan], trace: RoutingTrace) -> tuple[list[dict[str, Any]], dict[str, int]]:
    splits = {
        str((p.trace.get("fingerprints"), p.scores.get("requests"), _split_of(p), p.dispatch)) for p in plans.values()
    }
    first = next(iter(plans.values()))
    if len(splits) > 1 or first.trace.get("fingerprints") != [trace.fingerprint]:
        raise InputError(
            f"every request of {trace.path} was used to fit one of the plans: nothing is left to compare them on; "
            "give another trace, or place with --no-refit"
        )
    rows = [
        {**row, "placement": name}
        for name, plan in plans.items()
        for row in plan.scores["rows"]
        if row["placement"] == "plan"
    ]
    return rows, {"requests": first.scores["requests"], "tokens": first.scores["tokens"]}


def _split_of(plan: Plan) -> tuple[Any, ...]:
    return tuple(plan.split.get(name) for name in ("holdout", "holdout_domains", "seed"))


def _differences(plans: dict[str, Plan], trace: RoutingTrace, unseen_B: np.ndarray, seed: int) -> list[dict[str, Any]]:
    """Every other plan against the first, tokens at random homes, on the same resamples of the
    requests."""
    first_name, first = next(iter(plans.items()))
    batch = scored_batch(trace, unseen_B, seed=seed)
    sums = {
        name: placement_sums(plan.placement, plan.load_LE, batch, trace, plan.topology, dispatch=first.dispatch)
        for name, plan in plans.items()
    }
    return [
        {
            "plan": name,
            "against": first_name,
            **{
                metric: list(
                    paired_difference(
                        sums[first_name],
                        sums[name],
                        (first.topology, plan.topology),
                        metric,
                        dispatch=first.dispatch,
                        seed=seed,
                    )
                )
                for metric in PAIRED
            },
        }
        for name, plan in plans.items()
        if name != first_name
    ]


def _moves(old_name: str, new_name: str, plans: dict[str, Plan], bytes_per_expert: int) -> dict[str, Any]:
    """Moves between two plans; with a reason instead of numbers where they are not of one shape."""
    old, new = plans[old_name], plans[new_name]
    found: dict[str, Any] = {"from": old_name, "to": new_name}
    try:
        moves = count_moves(old.placement, new.placement, new.topology)
    except InputError as error:
        return found | {"why_not": str(error)}
    slots = new.placement.num_layers * new.placement.num_ranks * new.placement.slots_per_rank
    as_named, renamed, per_layer = (
        int(moves_L.sum()) for moves_L in (moves.as_named_L, moves.renamed_L, moves.per_layer_L)
    )
    return found | {
        "slots": slots,
        "experts": as_named,
        "experts_renamed": renamed,
        "experts_renamed_per_layer": per_layer,
        "bytes": as_named * bytes_per_expert,
        "bytes_renamed": renamed * bytes_per_expert,
        "bytes_renamed_per_layer": per_layer * bytes_per_expert,
        "old_rank_of": moves.old_rank_of_R.tolist(),
        "layers": [
            {"layer": layer, "experts": int(a), "experts_renamed": int(b), "experts_renamed_per_layer": int(c)}
            for layer, (a, b, c) in enumerate(zip(moves.as_named_L, moves.renamed_L, moves.per_layer_L, strict=True))
        ],
    }
