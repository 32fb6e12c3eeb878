"""Is a trace good enough to place experts by? Load skew, structure, drift, unseen tokens, and what
more tokens would bring.

All questions are put to requests that were not learned from. The placement behind the curves is
METIS with few seeds on a subset of the layers: quick, and close enough to the final method to show
where a curve goes flat.

Shape letters: L MoE layers (here: those looked at), T tokens, K top-k, E experts, R ranks, B
requests, G groups of requests, N sizes.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from semmoe.profiles.counts import co_activation_EE, profile_traces
from semmoe.profiles.progress import Progress
from semmoe.profiles.split import phase_of
from semmoe.profiles.trace import RoutingTrace, TraceBatch
from semmoe.solvers.health.drift import cross_fits, domain_drift, random_share_B, rem_T, time_drift
from semmoe.solvers.health.findings import health_findings
from semmoe.solvers.health.impossible import impossible_routing
from semmoe.solvers.health.record import (
    CurvePoint,
    Forecast,
    Health,
    Learning,
    LeftOutFacts,
    LoadFacts,
    PowerLaw,
    StructureFacts,
    UnseenPoint,
)
from semmoe.solvers.health.structure import measure_structure
from semmoe.solvers.place.graph import place_quickly

SAMPLE_IDS = 100_000_000  # expert ids that the check looks at
MAX_LAYERS = 8  # layers of the curves, evenly spaced
NUM_SIZES = 7  # training sizes of a curve, each half of the next
NUM_ORDERS = 3  # random orders of the requests that a curve is averaged over


def trace_health(trace: RoutingTrace, *, seed: int, ranks: int = 0, progress: Progress | None = None) -> Health:
    """The health of a trace. `ranks` 0: 8, or the most of 4 and 2 that the experts divide over.

    Raises InputError where the trace holds only counts, or no token.
    """
    info = trace.info
    trace.require_tokens("a health check")
    profile = profile_traces([trace], seed=seed, sample_ids=SAMPLE_IDS)
    batch, load_LE = profile.sample, profile.load_LE
    steps = iter(range(1, 7))

    def done(value: Any) -> Any:
        if progress is not None:
            progress(next(steps), 6)
        return value

    num_ranks = ranks or next((r for r in (8, 4, 2) if info.num_experts % r == 0 and info.num_experts > r), 1)
    layers = np.unique(np.linspace(0, info.num_layers - 1, min(MAX_LAYERS, info.num_layers)).astype(int))
    ids_LTK = np.ascontiguousarray(np.moveaxis(batch.expert_ids_TLK[:, layers], 1, 0))
    impossible = impossible_routing(load_LE, batch, info)
    structure = done(measure_structure(replace(batch, expert_ids_TLK=batch.expert_ids_TLK[:, layers]), info, seed=seed))
    fits = cross_fits(ids_LTK, batch, info.num_experts, num_ranks, seed)
    health = Health(
        trace=trace.path,
        model=info.model,
        layers=info.num_layers,
        experts=info.num_experts,
        top_k=info.top_k,
        requests=trace.num_requests,
        tokens=trace.num_tokens,
        sampled_tokens=batch.num_tokens,
        prompt_share=float(batch.is_prompt_T.mean()),
        phase=phase_of(trace),
        ranks=num_ranks,
        curve_layers=[int(info.model_layers[i]) for i in layers],
        load=done(_load_facts(load_LE)),
        structure=structure
        and StructureFacts(
            float(structure.lift_L.mean()), structure.lift_L.tolist(), structure.num_groups, structure.verdict
        ),
        unseen=done(_unseen_curve(batch, seed)),
        learning=done(_learning_curve(ids_LTK, batch, info.num_experts, num_ranks, seed)),
        domains=done(domain_drift(ids_LTK, batch, fits, info.num_experts, num_ranks, seed)),
        time=done(time_drift(ids_LTK, batch, fits, info.num_experts, num_ranks, seed)),
        left_out=left_out_facts(trace),
        impossible={str(info.model_layers[layer]): text for layer, text in impossible.items()} or None,
    )
    return replace(health, findings=health_findings(health))


def left_out_facts(trace: RoutingTrace) -> LeftOutFacts | None:
    """What the notes of a trace say of requests that its import left out; None where they say
    nothing that can be counted."""
    noted = trace.info.notes.get("left_out")
    if not isinstance(noted, dict):
        return None
    requests, tokens = noted.get("requests"), noted.get("tokens")
    if not requests or not isinstance(requests, dict) or not isinstance(tokens, dict):
        return None
    if not all(isinstance(n, int) and n >= 0 for n in (*requests.values(), *tokens.values())):
        return None
    num_requests, num_tokens = sum(requests.values()), sum(tokens.values())
    return LeftOutFacts(
        requests,
        num_requests / max(num_requests + trace.num_requests, 1),
        num_tokens,
        num_tokens / max(num_tokens + trace.num_tokens, 1),
    )


def _load_facts(load_LE: np.ndarray) -> LoadFacts:
    skew_L = load_LE.max(1) / np.maximum(load_LE.mean(1), 1e-12)
    share_E = np.sort(load_LE / np.maximum(load_LE.sum(1, keepdims=True), 1), axis=1)[:, ::-1].mean(0)
    return LoadFacts(
        busiest_over_mean=float(skew_L.mean()),
        busiest_over_mean_layers=skew_L.tolist(),
        unused_share=float(
            (load_LE == 0)[load_LE.any(axis=1)].sum() / max(load_LE.any(axis=1).sum() * load_LE.shape[1], 1)
        ),
        least_activations=int(load_LE.min()),
        median_activations=float(np.median(load_LE)),
        share_by_popularity=share_E.tolist(),
    )


def _sizes(num_requests: int) -> list[int]:
    """Ascending numbers of requests, each about half of the next, up to all."""
    return sorted({max(1, round(num_requests / 2**i)) for i in range(NUM_SIZES)})


def _unseen_curve(batch: TraceBatch, seed: int) -> list[UnseenPoint] | None:
    """Share of held-out tokens whose id was not in the training requests, by training size; None
    without token ids."""
    if (batch.token_ids_T < 0).all() or batch.num_requests < 5:
        return None
    held_out_B = random_share_B(batch, 0.2, seed)
    ids_T, request_T = batch.token_ids_T, batch.request_of_T
    held_T = held_out_B[request_T] & (ids_T >= 0)
    train = np.flatnonzero(~held_out_B)
    sizes = _sizes(len(train))
    tokens_N, unseen_N = np.zeros(len(sizes)), np.zeros(len(sizes))
    for order_seed in range(NUM_ORDERS):
        order = np.random.default_rng([seed, order_seed]).permutation(train)
        position_B = np.full(batch.num_requests, batch.num_requests)
        position_B[order] = np.arange(len(order))
        for i, size in enumerate(sizes):
            seen_T = position_B[request_T] < size
            tokens_N[i] += seen_T.sum() / NUM_ORDERS
            unseen_N[i] += (~np.isin(ids_T[held_T], ids_T[seen_T])).mean() / NUM_ORDERS
    return [UnseenPoint(*point) for point in zip(tokens_N.tolist(), unseen_N.tolist(), strict=True)]


def _learning_curve(
    ids_LTK: np.ndarray, batch: TraceBatch, num_experts: int, num_ranks: int, seed: int
) -> Learning | None:
    """Held-out REM of the quick method by training size, a power law through it, and what two,
    four and ten times the tokens would give."""
    if batch.num_requests < 10 or num_ranks < 2:
        return None
    held_out_B = random_share_B(batch, 0.2, seed)
    request_T = batch.request_of_T
    held_LTK = ids_LTK[:, held_out_B[request_T]]
    train = np.flatnonzero(~held_out_B)
    sizes = _sizes(len(train))
    tokens_N, rem_N = np.zeros(len(sizes)), np.zeros((len(sizes), NUM_ORDERS))
    for order_seed in range(NUM_ORDERS):
        order = np.random.default_rng([seed, 1, order_seed]).permutation(train)
        pairs_LEE, before = np.zeros((len(ids_LTK), num_experts, num_experts), np.int64), 0
        for i, size in enumerate(sizes):
            added_B = np.zeros(batch.num_requests, bool)
            added_B[order[before:size]] = True
            before = size
            added_T = added_B[request_T]
            pairs_LEE += np.stack([co_activation_EE(ids_TK[added_T], num_experts) for ids_TK in ids_LTK])
            tokens_N[i] += np.diagonal(pairs_LEE[0]).sum() / ids_LTK.shape[2] / NUM_ORDERS
            rem_N[i, order_seed] = rem_T(held_LTK, place_quickly(pairs_LEE, num_ranks, seed), num_ranks).mean()
    contiguous_LE = np.broadcast_to(np.arange(num_experts) * num_ranks // num_experts, (len(ids_LTK), num_experts))
    baseline = float(rem_T(held_LTK, contiguous_LE, num_ranks).mean())
    mean_N = rem_N.mean(1)
    law = fit_power_law(tokens_N, mean_N)
    most = float(tokens_N[-1])
    forecast = [
        Forecast(f, f * most, min(law.floor + law.scale * (f * most) ** -law.power, float(mean_N[-1])))
        for f in (2, 4, 10)
    ]
    points = [
        CurvePoint(*values)
        for values in np.stack([tokens_N, mean_N, rem_N.min(axis=1), rem_N.max(axis=1)], axis=1).tolist()
    ]
    return Learning(int(held_out_B.sum()), baseline, points, law, forecast)


def fit_power_law(tokens_N: np.ndarray, rem_N: np.ndarray) -> PowerLaw:
    """rem = floor + scale * tokens ** -power by least squares, with scale and floor at least 0.
    `tokens_N`, `rem_N`: float64, by ascending size.

    For each power on a grid the rest is linear; larger sizes weigh more, for the law is read beyond
    them.
    """
    best = (float(rem_N[-1]), 0.0, 1.0)
    least = np.inf
    weight_N = np.sqrt(np.arange(1, len(tokens_N) + 1))
    for power in np.linspace(0.1, 1.5, 29):
        columns_N2 = np.stack([np.ones(len(tokens_N)), tokens_N**-power], axis=1)
        (floor, scale), *_ = np.linalg.lstsq(columns_N2 * weight_N[:, None], rem_N * weight_N, rcond=None)
        if scale < 0 or floor < 0:
            continue
        error = float((((columns_N2 @ [floor, scale] - rem_N) * weight_N) ** 2).sum())
        if error < least:
            best, least = (float(floor), float(scale), float(power)), error
    return PowerLaw(*best)
