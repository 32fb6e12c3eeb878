"""make_plan and score_plan: the whole way from traces to a plan with held-out scores, and from a
plan to scores on another trace.

Scores always come from requests that the scored placement was not fitted on. The plan that is
written may then be fitted on all requests: more data only helps it, and plan.json says so.

Shape letters: L MoE layers, R ranks, E experts, B requests.
"""

from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from semmoe.profiles.counts import RoutingProfile, profile_split, token_expert_UE
from semmoe.profiles.embedding import input_embedding
from semmoe.profiles.errors import InputError
from semmoe.profiles.progress import Progress, Stages
from semmoe.profiles.sample import bounded_requests
from semmoe.profiles.split import holdout_requests, request_keys
from semmoe.profiles.trace import RoutingTrace
from semmoe.solvers.evaluate.metrics import DISPATCH_KINDS
from semmoe.solvers.evaluate.score_plan import SCORED_IDS, baselines, score_batch, score_placements
from semmoe.solvers.place.bounds import certify as certify_layer
from semmoe.solvers.place.bounds import local_activation_bound, remote_rank_bound
from semmoe.solvers.place.exact_counts import load_limit, rank_load_R
from semmoe.solvers.place.solve import Demands, check_demands, solve_placement
from semmoe.solvers.placement import Placement, Topology
from semmoe.solvers.plan import ModelFacts, Plan
from semmoe.solvers.schedule.schedule import Schedule, fit_schedule
from semmoe.solvers.schedule.simulate import Setting
from semmoe.solvers.schedule.slices import TOKEN_CAP

NO_BOUND = "--certify bounds placements without replicas: leave --replicas out"


def make_plan(
    traces: list[RoutingTrace],
    topology: Topology,
    demands: Demands,
    *,
    method: str,
    holdout: float,
    holdout_domains: list[str],
    refit: bool,
    certify: bool,
    setting: Setting,
    made_by: str,
    progress: Stages | None = None,
) -> Plan:
    """The plan for the traces' model, with scores on held-out requests beside the baselines (see
    `score_placements`).

    `certify`: bound what any placement could reach on the requests that were fitted for scoring
    (`certificate_of`).
    """
    if demands.dispatch not in DISPATCH_KINDS:
        raise InputError(f"dispatch {demands.dispatch!r} is none of {', '.join(DISPATCH_KINDS)}")
    for trace in traces:
        trace.require_tokens("placement by co-activation, and its held-out scores,")
    check_demands(traces[0].info, topology, demands, method=method)
    if certify and demands.replicas:
        raise InputError(NO_BOUND)
    embedding_VD = input_embedding(traces[0].info.embedding)
    held_out = split_requests(traces, holdout=holdout, holdout_domains=holdout_domains, seed=demands.seed)
    fitted = [~h for h in held_out]
    show = progress or (lambda stage, done, total: None)
    profile, rest, whole = profile_split(traces, held_out, seed=demands.seed, progress=partial(show, "reading tokens"))
    options = {"topology": topology, "demands": demands, "method": method, "embedding_VD": embedding_VD}
    placement, notes, schedule = _fitted(profile, **options, show=show)
    info = profile.info
    max_tokens = SCORED_IDS // (info.num_layers * info.top_k)
    scores = score_batch(
        {"plan": placement, **baselines(profile.load_LE, topology, profile.info.n_group)},
        bounded_requests(rest.sample, max_tokens=max_tokens, seed=setting.seed),
        info,
        topology,
        load_LE=profile.load_LE,
        dispatch=demands.dispatch,
        schedule=schedule,
        setting=setting,
        processes=demands.processes,
        progress=partial(show, "scoring on held-out requests: rows"),
    )
    if certify:
        scores["certificate"] = certificate_of(
            profile, placement, demands, progress=partial(show, "bounding what any placement could reach: layers")
        )
    if refit:
        fitted = [np.ones_like(h) for h in held_out]
        profile = whole
        placement, notes, schedule = _fitted(profile, **options, show=show, again=" again")
    num_held_out = int(sum(h.sum() for h in held_out))
    asked = {k: v for k, v in asdict(demands).items() if k not in ("load_cap", "seed", "dispatch", "processes")}
    return Plan(
        placement=placement,
        topology=topology,
        model=ModelFacts.of(traces[0].info),
        method=method,
        seed=demands.seed,
        dispatch=demands.dispatch,
        load_LE=profile.load_LE,
        fitted_keys=np.concatenate([request_keys(t.requests())[f] for t, f in zip(traces, fitted, strict=True)]),
        load_cap=demands.load_cap,
        options=asked,
        trace={
            "fingerprints": [t.fingerprint for t in traces],
            "requests": sum(t.num_requests for t in traces),
            "tokens": sum(t.num_tokens for t in traces),
        },
        split={
            "holdout": 0.0 if holdout_domains else holdout,
            "holdout_domains": holdout_domains,
            "seed": demands.seed,
            "held_out_requests": num_held_out,
            "training_requests": sum(t.num_requests for t in traces) - num_held_out,
            "refit": refit,
        },
        scores=scores,
        notes=notes,
        made_by=made_by,
        tables=schedule.to_tables(),
    )


def _fitted(
    profile: RoutingProfile,
    *,
    topology: Topology,
    demands: Demands,
    method: str,
    embedding_VD: np.ndarray | None,
    show: Stages,
    again: str = "",
) -> tuple[Placement, list[str], Schedule]:
    """Placement of the profile, notes on what it could not keep, and its schedule."""
    placement, notes = solve_placement(
        profile, topology, demands, method=method, progress=partial(show, f"placing layers{again}")
    )
    schedule = fit_schedule(
        profile.sample,
        placement,
        seed=demands.seed,
        embedding_VD=embedding_VD,
        processes=demands.processes,
        progress=partial(show, f"fitting schedules{again}: layers"),
    )
    return placement, notes, schedule


def score_plan(plan: Plan, trace: RoutingTrace, *, setting: Setting) -> tuple[dict[str, Any], list[str]]:
    """A report of the plan on a trace, and notes on which requests were scored.

    Requests that the plan was fitted on are never scored. Where that leaves none of a trace that
    the plan was made from, its own held-out scores are the answer. Raises InputError where another
    trace holds nothing else.
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
        return plan.scores, _notes_on_own_scores(plan, setting)
    notes = [f"{num_seen} requests of this trace were used to fit the plan and are left out"] if num_seen else []
    scores = score_placements(
        {"plan": plan.placement, **baselines(plan.load_LE, plan.topology, plan.model.n_group)},
        [trace],
        [unseen_B],
        plan.topology,
        load_LE=plan.load_LE,
        dispatch=plan.dispatch,
        schedule=Schedule.from_tables(plan.tables),
        setting=setting,
    )
    return scores, notes


def _notes_on_own_scores(plan: Plan, setting: Setting) -> list[str]:
    split, made = plan.split, plan.scores.get("setting")
    notes = [
        f"the plan was fitted on all of this trace: these are the scores, on {split['held_out_requests']} held-out requests, "
        f"of the same method fitted on the other {split['training_requests']}"
    ]
    if made and made != asdict(setting):
        notes.append(
            f"they stay those of --batch-tokens {made['batch_tokens']} --window {made['window']} --seed {made['seed']}: "
            "for other settings give another trace, or place with --no-refit"
        )
    return notes


def certificate_of(
    profile: RoutingProfile, placement: Placement, demands: Demands, progress: Progress | None = None
) -> dict[str, Any]:
    """How far the placement is, at most, from the best under the same constraints, on the profile
    it was fitted on.

    Per layer the co-activation within ranks, its upper bound and the gap; and bounds on REM with
    random homes and on LAR with a token table that follow (docs/formats.md). Raises InputError for
    a placement with replicas.
    """
    info, num_ranks = profile.info, placement.num_ranks
    if placement.num_replicas:
        raise InputError(NO_BOUND)
    ids_U, index_T = profile.token_index()
    layers = []
    for layer, rank_of_E in enumerate(placement.rank_of_LE):
        load_E = profile.load_LE[layer]
        # Where the cap could not be kept, the bound is for the load that the placement has.
        limit = max(
            load_limit(load_E, num_ranks, demands.load_cap), float(rank_load_R(rank_of_E, load_E, num_ranks).max())
        )
        found = certify_layer(rank_of_E, profile.co_activation_LEE[layer], load_E, limit, num_ranks)
        ranks_touched = remote_rank_bound(
            found.bound, profile.co_activation_LEE[layer], profile.num_tokens, info.top_k, num_ranks
        )
        entry = {
            "layer": layer,
            "co_activation": found.reached,
            "co_activation_bound": found.bound,
            "gap": found.gap,
            "rem_bound": ranks_touched * (1 - 1 / num_ranks),
        }
        if len(ids_U):
            counts_UE = token_expert_UE(index_T, profile.sample.expert_ids_TLK[:, layer], len(ids_U), info.num_experts)
            caps = {"load_cap": limit * num_ranks / max(float(load_E.sum()), 1.0), "token_cap": TOKEN_CAP}
            entry["lar_bound"] = local_activation_bound(counts_UE, num_ranks, **caps)
        layers.append(entry)
        if progress is not None:
            progress(len(layers), info.num_layers)
    return {"gap": float(np.mean([entry["gap"] for entry in layers])), "layers": layers}


def split_requests(
    traces: list[RoutingTrace], *, holdout: float, holdout_domains: list[str], seed: int
) -> list[np.ndarray]:
    """Held-out requests over all traces together, bool [B] per trace (see `holdout_requests`).

    Raises InputError where a request is in two of the traces: it would be learned from and scored
    on.
    """
    tables = [trace.requests() for trace in traces]
    keys = np.concatenate([request_keys(table) for table in tables])
    if repeated := len(keys) - len(np.unique(keys)):
        raise InputError(f"{repeated} requests are in more than one of the traces: give each request once")
    held_out_B = holdout_requests(pa.concat_tables(tables), holdout=holdout, holdout_domains=holdout_domains, seed=seed)
    return np.split(held_out_B, np.cumsum([t.num_rows for t in tables])[:-1])
