"""What a placement costs on given requests: LAR, REM, NODE, LINK and load imbalance, with bootstrap
intervals over requests.

Every metric is a ratio of sums, so sums are kept per group of requests and layer, and resampled. A
token's home is the rank where it lives at a layer; without a schedule it is uniformly random, and
expectations are exact, not sampled.

Definitions: arXiv 2503.04398 section 2 (LAR); hypergraph connectivity with a home pin (REM, NODE);
docs/concepts.md.

Shape letters: T tokens, L MoE layers, K top-k, E experts, R ranks, N nodes, G groups of requests, P
targets of rows (ranks or nodes), X resamples.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from math import comb
from typing import Any

import numpy as np

from semmoe.profiles.errors import InputError
from semmoe.profiles.trace import TraceBatch, TraceInfo
from semmoe.solvers.placement import Topology

DISPATCH_KINDS = {
    "per-rank": "one row per token and rank (DeepEP normal and V2, semmoe run): bytes follow REM",
    "per-expert": "one row per token and expert (plain all-to-all-v, DeepEP low-latency): bytes follow 1 - LAR",
    "per-node": "one row per token and node, then fan-out inside it (DeepEP internode): bytes follow NODE",
    "gather": "all-gather or all-reduce: the same bytes whatever the placement",
}
METRICS = ("lar", "rem", "node", "link", "load_imbalance", "load_imbalance_median", "token_imbalance")
EXCHANGED_ROWS = 16  # sorted by exchanges up to here: K * (K - 1) / 2 of them
MAX_GROUPS = 512  # requests beyond this number are resampled in groups of several

Homes = Callable[[TraceBatch], np.ndarray]  # homes of a batch's tokens, integers [T, L]


@dataclass(frozen=True, eq=False)
class TrafficSums:
    """Sums over the tokens of each group of requests. Expectations where homes are random, hence
    floats."""

    tokens_G: np.ndarray  # float64 [G]
    activations_GL: np.ndarray  # float64 [G, L]
    local_GL: np.ndarray  # activations whose expert is served by the token's own rank
    remote_ranks_GL: np.ndarray
    remote_nodes_GL: np.ndarray
    load_GLR: np.ndarray  # activations served by each rank
    home_GLR: np.ndarray  # tokens that live on each rank
    ingress_GLP: np.ndarray  # rows received by each rank (by each node where dispatch is per node)
    egress_GLP: np.ndarray

    @classmethod
    def zeros(cls, num_groups: int, num_layers: int, num_ranks: int, num_targets: int) -> "TrafficSums":
        per_layer, ranks, targets = (num_groups, num_layers), (num_ranks,), (num_targets,)
        shapes = [(num_groups,)] + [per_layer] * 4 + [per_layer + ranks] * 2 + [per_layer + targets] * 2
        return cls(*(np.zeros(shape) for shape in shapes))

    def of_groups(self, chosen_G: np.ndarray) -> "TrafficSums":
        """The sums of some groups (bool [G])."""
        return TrafficSums(*(getattr(self, f.name)[chosen_G] for f in fields(self)))

    def resampled(self, weights_XG: np.ndarray) -> "TrafficSums":
        """Weighted sums over the groups: leading axis X instead of G."""
        arrays = [getattr(self, f.name) for f in fields(self)]
        return TrafficSums(*((weights_XG @ a.reshape(len(a), -1)).reshape(-1, *a.shape[1:]) for a in arrays))


def resampling_groups(domain_of_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Group of every request (int64 [B]), and the domain of every group (int64 [G]): each group is
    of one domain.

    `domain_of_B`: number of each request's domain, from 0. A request is a group of its own up to
    MAX_GROUPS requests; of more, each domain gets its share of the groups.
    """
    num_requests = len(domain_of_B)
    if num_requests <= MAX_GROUPS:
        return np.arange(num_requests), domain_of_B
    group_of_B, domain_of_G = np.zeros(num_requests, np.int64), np.zeros(0, np.int64)
    for domain in np.unique(domain_of_B):
        members = np.flatnonzero(domain_of_B == domain)
        num_groups = max(1, len(members) * MAX_GROUPS // num_requests)
        group_of_B[members] = len(domain_of_G) + np.arange(len(members)) % num_groups
        domain_of_G = np.append(domain_of_G, np.full(num_groups, domain))
    return group_of_B, domain_of_G


def traffic_sums(
    batches: Iterable[TraceBatch],
    info: TraceInfo,
    serving_LRE: np.ndarray,
    topology: Topology,
    *,
    dispatch: str,
    num_requests: int,
    homes: Homes | None = None,
    group_of_B: np.ndarray | None = None,
) -> TrafficSums:
    """Traffic of the batches' requests under a placement.

    `serving_LRE`: rank that serves expert e for a token that lives on rank r, integers [L, R, E]
    (`semmoe.solvers.place.replicas`); equal along R without replicas. `homes` None: every token
    lives on a uniformly random rank. `num_requests`: of all batches together. `group_of_B`: the
    group of every request over all batches (its domain, say), integers [num_requests], instead of
    its number.
    """
    per_node = dispatch == "per-node"
    num_targets = topology.num_nodes if per_node else topology.num_ranks
    if group_of_B is None:
        group_of_B = np.arange(num_requests) % max(1, min(num_requests, MAX_GROUPS))
    sums = TrafficSums.zeros(int(group_of_B.max(initial=-1)) + 1, info.num_layers, topology.num_ranks, num_targets)
    replicated = bool((serving_LRE != serving_LRE[:, :1]).any())
    first_request = 0
    for batch in batches:
        group_T = group_of_B[first_request + batch.request_of_T]
        first_request += batch.num_requests
        sums.tokens_G[:] += np.bincount(group_T, minlength=len(sums.tokens_G))
        homes_TL = None if homes is None else homes(batch)
        for layer in range(info.num_layers):
            ids_TK = batch.expert_ids_TLK[:, layer]
            if homes_TL is not None:
                _add_layer(
                    sums, layer, ids_TK, serving_LRE[layer], homes_TL[:, layer], group_T, topology, dispatch, 1.0
                )
            elif replicated:
                # Who serves depends on where the token lives: the expectation is the mean over all
                # homes.
                for rank in range(topology.num_ranks):
                    home_T = np.full(len(ids_TK), rank)
                    share = 1 / topology.num_ranks
                    _add_layer(sums, layer, ids_TK, serving_LRE[layer], home_T, group_T, topology, dispatch, share)
            else:
                _add_layer(sums, layer, ids_TK, serving_LRE[layer], None, group_T, topology, dispatch, 1.0)
    return sums


def _add_layer(
    sums: TrafficSums,
    layer: int,
    ids_TK: np.ndarray,
    serving_RE: np.ndarray,
    home_T: np.ndarray | None,
    group_T: np.ndarray,
    topology: Topology,
    dispatch: str,
    weight: float,
) -> None:
    """Add one layer of one batch. `home_T` None: random homes in closed form, for a placement
    without replicas."""
    num_ranks, num_groups = topology.num_ranks, len(sums.tokens_G)
    # Choices first: everything below then runs along the tokens. An empty slot (id E) is served by
    # nobody: rank number R, which sorts last and is masked out.
    ids_KT = np.ascontiguousarray(ids_TK.T).astype(np.intp)
    padded_RE = np.pad(serving_RE, ((0, 0), (0, 1)), constant_values=num_ranks).astype(np.int16)
    if home_T is not None and (padded_RE != padded_RE[0]).any():
        ids_KT += home_T.astype(np.intp) * padded_RE.shape[1]
    ranks_KT = _sorted_columns(padded_RE.reshape(-1).take(ids_KT))
    nodes_KT = np.append(topology.node_of_R, topology.num_nodes).astype(np.int16).take(ranks_KT)
    routed_KT = ranks_KT < num_ranks
    new_rank_KT, new_node_KT = _first_of_run(ranks_KT) & routed_KT, _first_of_run(nodes_KT) & routed_KT

    def per_group(mask_KT: np.ndarray) -> np.ndarray:
        return np.bincount(group_T, weights=mask_KT.sum(axis=0, dtype=np.int16), minlength=num_groups) * weight

    def per_target(mask_KT: np.ndarray, target_KT: np.ndarray, size: int) -> np.ndarray:
        keys_KT = np.where(
            mask_KT, target_KT + group_T * size, num_groups * size
        )  # the last one is for what is masked out
        counts = np.bincount(keys_KT.reshape(-1), minlength=num_groups * size + 1)[:-1]
        return counts.reshape(num_groups, size) * weight

    sums.activations_GL[:, layer] += per_group(routed_KT)
    sums.load_GLR[:, layer] += per_target(routed_KT, ranks_KT, num_ranks)
    per_node = dispatch == "per-node"
    target_KT, num_targets = (nodes_KT, topology.num_nodes) if per_node else (ranks_KT, num_ranks)
    row_KT = {"per-node": new_node_KT, "per-expert": routed_KT}.get(dispatch, new_rank_KT)
    if home_T is None:
        sums.local_GL[:, layer] += per_group(routed_KT) / num_ranks
        sums.remote_ranks_GL[:, layer] += per_group(new_rank_KT) * (1 - 1 / num_ranks)
        sums.remote_nodes_GL[:, layer] += per_group(new_node_KT) * (1 - 1 / topology.num_nodes)
        sums.home_GLR[:, layer] += np.bincount(group_T, minlength=num_groups)[:, None] / num_ranks
        rows_GP = per_target(row_KT, target_KT, num_targets)
        sums.ingress_GLP[:, layer] += rows_GP * (1 - 1 / num_targets)
        sums.egress_GLP[:, layer] += (rows_GP.sum(1, keepdims=True) - rows_GP) / num_targets
        return
    home_T = home_T.astype(np.int64)
    home_node_T = topology.node_of_R[home_T]
    sums.local_GL[:, layer] += per_group(routed_KT & (ranks_KT == home_T))
    sums.remote_ranks_GL[:, layer] += per_group(new_rank_KT & (ranks_KT != home_T))
    sums.remote_nodes_GL[:, layer] += per_group(new_node_KT & (nodes_KT != home_node_T))
    keys_T = group_T * num_ranks + home_T
    sums.home_GLR[:, layer] += np.bincount(keys_T, minlength=num_groups * num_ranks).reshape(num_groups, -1) * weight
    home_target_T = home_node_T if per_node else home_T
    row_KT = row_KT & (target_KT != home_target_T)
    sums.ingress_GLP[:, layer] += per_target(row_KT, target_KT, num_targets)
    sent_T = np.bincount(
        group_T * num_targets + home_target_T, weights=row_KT.sum(axis=0), minlength=num_groups * num_targets
    )
    sums.egress_GLP[:, layer] += sent_T.reshape(num_groups, -1) * weight


def _sorted_columns(values_KT: np.ndarray) -> np.ndarray:
    """Every column in ascending order. Of a few rows, by exchanges of neighbouring rows, which
    run along the columns."""
    top_k = len(values_KT)
    if top_k > EXCHANGED_ROWS:
        return np.sort(values_KT, axis=0)
    rows = list(values_KT)
    for turn in range(top_k):
        for i in range(turn % 2, top_k - 1, 2):
            rows[i], rows[i + 1] = np.minimum(rows[i], rows[i + 1]), np.maximum(rows[i], rows[i + 1])
    return np.stack(rows) if rows else values_KT


def _first_of_run(sorted_KT: np.ndarray) -> np.ndarray:
    """True where a value differs from the one before it in its column, bool [K, T]."""
    first = np.ones(sorted_KT.shape, bool)
    first[1:] = sorted_KT[1:] != sorted_KT[:-1]
    return first


def resamples_XG(tokens_G: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """How often each group is in each resample, float64 [X, G]. Groups without a token say
    nothing and are never drawn."""
    telling_G = tokens_G > 0 if tokens_G.any() else np.ones(len(tokens_G), bool)
    number = int(telling_G.sum())
    draws_XG = np.zeros((num_resamples, len(tokens_G)))
    draws_XG[:, telling_G] = np.random.default_rng(seed).multinomial(number, [1 / number] * number, size=num_resamples)
    return draws_XG


def metrics_XL(sums: TrafficSums, topology: Topology, dispatch: str) -> dict[str, np.ndarray]:
    """Every metric per leading entry and layer, float64 [X, L].

    LINK is rows per token that lives on the busiest rank (or node): the larger of its ingress and
    its egress. Load that is nowhere is balanced; where most ranks serve nothing, the median is no
    measure and the mean takes its place.
    """
    tokens_X1 = np.maximum(sums.tokens_G[:, None], 1e-300)
    num_targets = sums.ingress_GLP.shape[2]
    busiest_XL = np.maximum(sums.ingress_GLP, sums.egress_GLP).max(2)
    load_mean_XL = np.maximum(sums.load_GLR.mean(2), 1e-300)
    load_median_XL = np.median(sums.load_GLR, axis=2)
    load_max_XL = np.where(sums.load_GLR.any(2), sums.load_GLR.max(2), load_mean_XL)
    load_median_XL = np.where(load_median_XL > 0, load_median_XL, load_mean_XL)
    link_XL = busiest_XL / (tokens_X1 / num_targets)
    if dispatch == "gather":
        link_XL = np.full_like(link_XL, topology.num_ranks - 1)
    return {
        "lar": sums.local_GL / np.maximum(sums.activations_GL, 1e-300),
        "rem": sums.remote_ranks_GL / tokens_X1,
        "node": sums.remote_nodes_GL / tokens_X1,
        "link": link_XL,
        "load_imbalance": load_max_XL / load_mean_XL,
        "load_imbalance_median": load_max_XL / load_median_XL,
        "token_imbalance": sums.home_GLR.max(2) / np.maximum(sums.home_GLR.mean(2), 1e-300),
    }


@dataclass(frozen=True, eq=False)
class Scores:
    """Metrics of one placement under one schedule: averages over layers, their 95 % intervals,
    and the values per layer."""

    means: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    layers: dict[str, np.ndarray]  # float64 [L] each


def score(sums: TrafficSums, topology: Topology, *, dispatch: str, num_resamples: int = 400, seed: int = 0) -> Scores:
    """Scores of the summed traffic. Intervals: percentile bootstrap over groups of requests
    (`num_resamples` draws).

    The draws are shifted by their mean deviation from the estimate: the busiest of several ranks is
    busier in every resample, so plain percentiles of LINK and of imbalances could miss the estimate
    itself.
    """
    num_groups = len(sums.tokens_G)
    if num_groups == 0:
        raise InputError("no request to score on")
    whole = metrics_XL(sums.resampled(np.ones((1, num_groups))), topology, dispatch)
    drawn = metrics_XL(sums.resampled(resamples_XG(sums.tokens_G, num_resamples, seed)), topology, dispatch)
    intervals = {}
    for name in METRICS:
        draws_X, estimate = drawn[name].mean(1), whole[name].mean()
        least = 1.0 if "imbalance" in name else 0.0
        intervals[name] = np.maximum(np.quantile(draws_X - draws_X.mean() + estimate, [0.025, 0.975]), least)
    return Scores(
        means={name: float(whole[name].mean()) for name in METRICS},
        intervals={name: (float(low), float(high)) for name, (low, high) in intervals.items()},
        layers={name: whole[name][0] for name in METRICS},
    )


def uniform_scores(num_experts: int, top_k: int, topology: Topology) -> dict[str, float]:
    """What experts and homes without any structure give: each token draws K different experts
    uniformly. Closed form."""

    def distinct(parts: int) -> float:
        # A part is missed when all K experts lie in the other E - E / parts.
        missed = comb(num_experts - num_experts // parts, top_k) / comb(num_experts, top_k)
        return parts * (1 - missed)

    ranks, nodes = topology.num_ranks, topology.num_nodes
    rem = distinct(ranks) * (1 - 1 / ranks)
    return {"lar": 1 / ranks, "rem": rem, "node": distinct(nodes) * (1 - 1 / nodes)}


def report_rows(scores: dict[tuple[str, str], Scores]) -> list[dict[str, Any]]:
    """The rows of a report: one per placement and schedule, with averages over layers and
    intervals."""
    return [
        {
            "placement": placement,
            "schedule": schedule,
            **s.means,
            "ci": {name: list(s.intervals[name]) for name in METRICS},
        }
        for (placement, schedule), s in scores.items()
    ]


def report_domains(
    sums: dict[tuple[str, str], TrafficSums],
    names: list[str],
    requests_D: np.ndarray,
    domain_of_G: np.ndarray,
    topology: Topology,
    *,
    dispatch: str,
    seed: int,
) -> list[dict[str, Any]]:
    """The rows of each domain that has tokens, with its numbers of requests and tokens. `names`,
    `requests_D`: of the domains."""
    found = []
    for domain, name in enumerate(names):
        parts = {key: whole.of_groups(domain_of_G == domain) for key, whole in sums.items()}
        tokens = int(next(iter(parts.values())).tokens_G.sum())
        if tokens:
            scores = {key: score(part, topology, dispatch=dispatch, seed=seed) for key, part in parts.items()}
            about = {"domain": name, "requests": int(requests_D[domain]), "tokens": tokens}
            found.append(about | {"rows": report_rows(scores)})
    return found


def report_layers(scores: dict[tuple[str, str], Scores], info: TraceInfo) -> list[dict[str, Any]]:
    """The same rows per layer, without intervals."""
    return [
        {
            "layer": layer,
            "model_layer": info.model_layers[layer],
            "rows": [
                {
                    "placement": placement,
                    "schedule": schedule,
                    **{name: float(s.layers[name][layer]) for name in METRICS},
                }
                for (placement, schedule), s in scores.items()
            ],
        }
        for layer in range(info.num_layers)
    ]
