"""Metrics of summed traffic: LAR, REM, NODE, LINK and imbalances, with bootstrap intervals over
requests.

Every metric is a ratio of sums over requests (`semmoe.solvers.evaluate.sums`), and groups of
requests are resampled. Definitions: arXiv 2503.04398 section 2 (LAR); hypergraph connectivity with
a home pin (REM, NODE); docs/concepts.md.

Shape letters: L MoE layers, G groups of requests, X resamples.
"""

from dataclasses import dataclass
from math import comb

import numpy as np

from semmoe.profiles.errors import InputError
from semmoe.solvers.evaluate.sums import TrafficSums
from semmoe.solvers.placement import Topology, part_sizes

DISPATCH_KINDS = {
    "per-rank": "one row per token and rank (DeepEP normal and V2, semmoe run): bytes follow REM",
    "per-expert": "one row per token and expert (plain all-to-all-v, DeepEP low-latency): bytes follow 1 - LAR",
    "per-node": "one row per token and node, then fan-out inside it (DeepEP internode): bytes follow NODE",
    "gather": "all-gather or all-reduce: the same bytes whatever the placement",
}
METRICS = ("lar", "rem", "node", "link", "load_imbalance", "load_imbalance_median", "token_imbalance")


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

    Parameters:
        sums: traffic summed by groups of requests, layers and ranks.
        topology: the ranks, for NODE and LINK.
        dispatch: one of DISPATCHES, what a remote expert costs.
        num_resamples: draws of the bootstrap.
        seed: of the draws.
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
    uniformly, of experts that ranks share evenly and that have no copy. Closed form."""

    def distinct(parts: int) -> float:
        # A part is missed when all K experts lie in the others.
        sizes, counts = np.unique(part_sizes(num_experts, parts), return_counts=True)
        missed = [comb(num_experts - int(size), top_k) / comb(num_experts, top_k) for size in sizes]
        return float(sum(count * (1 - miss) for count, miss in zip(counts.tolist(), missed, strict=True)))

    ranks, nodes = topology.num_ranks, topology.num_nodes
    rem = distinct(ranks) * (1 - 1 / ranks)
    return {"lar": 1 / ranks, "rem": rem, "node": distinct(nodes) * (1 - 1 / nodes)}
