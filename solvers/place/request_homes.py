"""Requests and experts placed together for Attention-DP, over all layers at once: homes of
requests, and rank labels that agree across layers.

A request lives on one rank for all layers. Local activations are linear in the experts' ranks once
the requests' are given, and the other way round, so each side is relaxed to shares that prices
balance (`semmoe.solvers.schedule.transport`), and both are cooled in turn: deterministic annealing
(Rose, 1998) of a two-sided clustering. A start costs a few matrix products, some hundred times less
than searching every layer by swaps, and ends in better optima than alternating hard choices does.

Where each layer is solved by itself, its rank labels are arbitrary. Labels and the request -> rank
map are then chosen together: given the map, the best labels of a layer are a linear assignment over
(part, rank); given the labels, the map is a balanced assignment of requests. Several starts, the
best kept.

Counts of every request at every expert grow with the requests, where everything else about a trace
is bounded. So homes and labels are learned from a random choice of requests, as many as MAX_COUNTS
numbers allow.

Shape letters: B requests, L MoE layers, E experts, R ranks, J load vectors.
"""

from typing import Any

import numpy as np

from semmoe.profiles.counts import RoutingProfile, request_expert_BE, request_rows
from semmoe.profiles.trace import TraceBatch
from semmoe.solvers.placement import part_sizes
from semmoe.solvers.schedule.transport import SlotPrices, balanced_homes, balanced_prices, scaled_in_slots, softmax

COOLING = (1.5, 1.2, 1.0, 0.8, 0.6, 0.4, 0.3)  # temperatures of requests, in spreads of their scores
EXPERT_TEMPERATURE = 0.1  # in standard deviations of an expert's worth over the ranks
SWEEPS = 20  # of prices at each temperature
MAX_REQUESTS = 1_024  # that the annealing looks at
MAX_ROUNDS = 20  # of labels and homes in turn, from each start
MAX_COUNTS = 2**26  # counts of requests at experts of all layers: 4,519 requests of 58 x 256, 268 MB


def anneal_requests(
    usage_LBE: np.ndarray,
    weight_B: np.ndarray,
    load_LJE: np.ndarray,
    limit_LJ: np.ndarray,
    num_ranks: int,
    *,
    seed: int,
    starts: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Experts and requests with most local activations, of several random starts.

    Parameters:
        usage_LBE: activations of each request, float32.
        weight_B: tokens of each request, which the ranks share equally.
        load_LJE, limit_LJ: load vectors and what a rank may carry of each, activations. The limits
            hold for the shares before they are rounded, so a little overload may be left to a swap
            search.
        num_ranks: R; they share the experts evenly.
        seed, starts: of the first start, and how many.

    Returns:
        Rank of each expert, int64 [L, E], and of each request, int64 [B].
    """
    num_layers, num_requests, num_experts = usage_LBE.shape
    sample = np.arange(num_requests)
    if num_requests > MAX_REQUESTS:
        sample = np.sort(np.random.default_rng([seed, 13]).choice(num_requests, MAX_REQUESTS, replace=False))
    usage_BX = usage_LBE[:, sample].transpose(1, 0, 2).reshape(len(sample), -1)  # X: layer and expert
    tokens_B = np.maximum(weight_B[sample].astype(np.float64), 1)
    mean_LJ = np.maximum(load_LJE.mean(axis=2), 1e-300)
    unit_LJE, unit_limit_LJ = load_LJE / mean_LJ[:, :, None], limit_LJ / mean_LJ
    best: tuple[float, np.ndarray] | None = None
    for start in range(starts):
        share_BR = softmax(np.random.default_rng([seed, start]).normal(size=(len(sample), num_ranks)), 3.0)
        experts = _Experts(unit_LJE, unit_limit_LJ, num_ranks)
        for temperature in COOLING:
            worth_XR = usage_BX.T @ share_BR.astype(usage_BX.dtype)
            member_LER = experts.shares(worth_XR.reshape(num_layers, num_experts, num_ranks))
            score_BR = usage_BX @ member_LER.reshape(-1, num_ranks).astype(usage_BX.dtype) / tokens_B[:, None]
            prices_R, scale = balanced_prices(score_BR, tokens_B, sweeps=SWEEPS, start=temperature, cooling=temperature)
            share_BR = softmax(score_BR - prices_R, scale)
        value = float((tokens_B[:, None] * share_BR * score_BR).sum())
        if best is None or value > best[0]:
            best = value, experts.rounded()
    assert best is not None
    share_BR = usage_shares_BR(best[1], usage_LBE, num_ranks)
    return best[1], balanced_homes(share_BR, weight_B.astype(np.float64))


class _Experts:
    """Shares of experts on ranks at a low temperature, and the prices of slots and of load that
    go on from one call to the next."""

    def __init__(self, load_LJE: np.ndarray, limit_LJ: np.ndarray, num_ranks: int) -> None:
        self.load_LJE, self.limit_LJ = load_LJE, limit_LJ
        self.prices = SlotPrices.zero(load_LJE, num_ranks)

    def shares(self, worth_LER: np.ndarray) -> np.ndarray:
        """Rows that sum to 1, float64 [L, E, R]: E / R experts on each rank, and loads within
        the limits, nearly."""
        worth_LER = worth_LER - worth_LER.mean(axis=2, keepdims=True, dtype=np.float64)
        scale_L = EXPERT_TEMPERATURE * np.sqrt((worth_LER**2).mean(axis=(1, 2)))
        worth_LER /= np.maximum(scale_L, 1e-300)[:, None, None]
        share_LER, self.net_LER, self.prices = scaled_in_slots(
            worth_LER, self.load_LJE, self.limit_LJ, self.prices, sweeps=SWEEPS
        )
        return share_LER

    def rounded(self) -> np.ndarray:
        """Rank of each expert at the last prices, int64 [L, E], in exactly even shares."""
        from scipy.optimize import linear_sum_assignment

        _, num_experts, num_ranks = self.net_LER.shape
        rank_of_S = np.repeat(np.arange(num_ranks), part_sizes(num_experts, num_ranks))
        return np.stack([rank_of_S[linear_sum_assignment(-net_ER[:, rank_of_S])[1]] for net_ER in self.net_LER])


class _PartUsage:
    """Activations of requests on the parts of all layers, both ways round: what homes and labels
    add up of it is the product with a matrix of few ones.

    Sums of counts are exact in any order in double precision, and in single where they stay below
    2^24.
    """

    def __init__(self, rank_of_LE: np.ndarray, request_expert_LBE: np.ndarray, num_ranks: int) -> None:
        most = max(float(usage_BE.sum(dtype=np.float64)) for usage_BE in request_expert_LBE)
        dtype = np.float32 if most < 2**24 else np.float64
        num_layers, num_requests, _ = request_expert_LBE.shape
        self.shape_LR = num_layers, num_ranks
        self.usage_BX = np.empty((num_requests, num_layers * num_ranks), dtype)  # X: layer and part
        for layer, (usage_BE, rank_of_E) in enumerate(zip(request_expert_LBE, rank_of_LE, strict=True)):
            parts = slice(layer * num_ranks, (layer + 1) * num_ranks)
            self.usage_BX[:, parts] = part_counts_BR(usage_BE, rank_of_E, num_ranks)
        self.usage_XB = np.ascontiguousarray(self.usage_BX.T)

    def of_layer(self, layer: int) -> np.ndarray:
        """One layer's, [R, B]."""
        num_ranks = self.shape_LR[1]
        return self.usage_XB[layer * num_ranks : (layer + 1) * num_ranks]

    def labelled_BR(self, label_LR: np.ndarray) -> np.ndarray:
        """Activations of each request on each rank where parts are labelled so, float64 [B, R]."""
        label_X = label_LR.reshape(-1)
        return np.ascontiguousarray((_ones(label_X, self.shape_LR[1]) @ self.usage_XB).T, np.float64)

    def at_homes_LRR(self, home_B: np.ndarray) -> np.ndarray:
        """Activations of each layer's parts from the requests of each rank, float64 [L, part,
        rank]."""
        worth_RX = _ones(home_B, self.shape_LR[1]) @ self.usage_BX
        return worth_RX.reshape(-1, *self.shape_LR).transpose(1, 2, 0).astype(np.float64)


def _ones(row_of_C: np.ndarray, num_rows: int) -> Any:
    """Sparse float32 [rows, C]: a one in each column."""
    from scipy.sparse import csr_array

    ends = np.cumsum(np.bincount(row_of_C, minlength=num_rows))
    columns = np.argsort(row_of_C, kind="stable")
    return csr_array((np.ones(len(row_of_C), np.float32), columns, np.append(0, ends)), (num_rows, len(row_of_C)))


def align_labels(
    rank_of_LE: np.ndarray,
    request_expert_LBE: np.ndarray,
    weight_B: np.ndarray,
    num_ranks: int,
    *,
    num_nodes: int = 1,
    seed: int,
    starts: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The placement with its ranks renamed per layer, and homes of requests. Renaming changes no
    load and no co-activation.

    Parameters:
        rank_of_LE: int [L, E].
        request_expert_LBE: activations of each request.
        weight_B: tokens of each request, which the ranks share equally.
        num_ranks: R.
        num_nodes: nodes whose ranks stay together.
        seed, starts: of the first order of layers, and how many orders.

    Returns:
        Rank of each expert, int64 [L, E], and of each request, int64 [B].
    """
    usage = _PartUsage(rank_of_LE, request_expert_LBE, num_ranks)
    best: tuple[float, np.ndarray, np.ndarray] | None = None
    for start in range(starts):
        value, label_LR, home_B = _align_from(usage, weight_B, num_nodes, np.random.default_rng([seed, start]))
        if best is None or value > best[0]:
            best = value, label_LR, home_B
    assert best is not None
    return np.take_along_axis(best[1], rank_of_LE, axis=1), best[2]


def _align_from(
    usage: _PartUsage, weight_B: np.ndarray, num_nodes: int, rng: np.random.Generator
) -> tuple[float, np.ndarray, np.ndarray]:
    """Local activations reached from one random order of layers, the new label of every part [L,
    R], and the homes [B]."""
    (num_layers, num_ranks), num_requests = usage.shape_LR, len(weight_B)
    label_LR = np.tile(np.arange(num_ranks), (num_layers, 1))
    # Layers are matched one after the other to what the layers so far agree on.
    score_RB = np.zeros((num_ranks, num_requests))
    for layer in rng.permutation(num_layers):
        usage_RB = usage.of_layer(layer)
        if score_RB.any():
            centred_RB = score_RB - score_RB.mean(axis=0)
            label_LR[layer] = best_labels(usage_RB @ centred_RB.T, num_nodes)
        score_RB[label_LR[layer]] += usage_RB
    score_BR = np.ascontiguousarray(score_RB.T)
    value, home_B = -np.inf, np.zeros(num_requests, np.int64)
    for _ in range(MAX_ROUNDS):
        unit_BR = score_BR / np.maximum(weight_B, 1)[:, None]
        homes_B = balanced_homes(unit_BR, weight_B.astype(np.float64))
        labels_LR = np.stack([best_labels(worth_RR, num_nodes) for worth_RR in usage.at_homes_LRR(homes_B)])
        score_BR = usage.labelled_BR(labels_LR)
        reached = float(score_BR[np.arange(num_requests), homes_B].sum())
        if reached <= value + 1e-9:
            break
        value, label_LR, home_B = reached, labels_LR, homes_B
    return value, label_LR, home_B


def best_labels(worth_RR: np.ndarray, num_nodes: int) -> np.ndarray:
    """New label of every part, int64 [R], at the highest summed worth[part, label]; parts of a node
    stay on one node."""
    from scipy.optimize import linear_sum_assignment

    size = len(worth_RR) // num_nodes
    inner, total_NN = {}, np.zeros((num_nodes, num_nodes))
    for part in range(num_nodes):
        for node in range(num_nodes):
            block = worth_RR[part * size : (part + 1) * size, node * size : (node + 1) * size]
            _, inner[part, node] = linear_sum_assignment(-block)
            total_NN[part, node] = block[np.arange(size), inner[part, node]].sum()
    _, node_of_part = linear_sum_assignment(-total_NN)
    return np.concatenate([node * size + inner[part, int(node)] for part, node in enumerate(node_of_part)])


def chosen_requests(profile: RoutingProfile, seed: int, max_counts: int = MAX_COUNTS) -> np.ndarray:
    """Requests of the sample that usage is counted for, ascending int64: all, or a random
    choice."""
    num_requests = profile.sample.num_requests
    allowed = max(1, max_counts // (profile.info.num_layers * profile.info.num_experts))
    if num_requests <= allowed:
        return np.arange(num_requests)
    return np.sort(np.random.default_rng([seed, 17]).choice(num_requests, allowed, replace=False))


def request_usage_LBE(sample: TraceBatch, requests_B: np.ndarray, num_experts: int) -> np.ndarray:
    """Activations of the requests (ascending numbers) at every layer, float32 [L, B, E]."""
    rows_T, index_T = request_rows(sample, requests_B)
    if len(rows_T) == sample.num_tokens:
        rows_T = slice(None)
    num_layers = sample.expert_ids_TLK.shape[1]
    usage_LBE = np.empty((num_layers, len(requests_B), num_experts), np.float32)
    for layer in range(num_layers):
        ids_TK = sample.expert_ids_TLK[:, layer][rows_T]
        usage_LBE[layer] = request_expert_BE(index_T, ids_TK, len(requests_B), num_experts)
    return usage_LBE


def usage_shares_BR(rank_of_LE: np.ndarray, usage_LBE: np.ndarray, num_ranks: int) -> np.ndarray:
    """Share of each request's activations on each rank over all layers, float64 [B, R]."""
    count_BR = np.zeros((usage_LBE.shape[1], num_ranks))
    for usage_BE, rank_of_E in zip(usage_LBE, rank_of_LE, strict=True):
        count_BR += part_counts_BR(usage_BE, rank_of_E, num_ranks)
    return count_BR / np.maximum(count_BR.sum(axis=1, keepdims=True), 1)


def part_counts_BR(usage_BE: np.ndarray, rank_of_E: np.ndarray, num_ranks: int) -> np.ndarray:
    """Activations of each request on each rank at one layer, float64 [B, R]."""
    # Counts are exact in the usage's own precision: no copy of it is made.
    return (usage_BE @ np.eye(num_ranks, dtype=usage_BE.dtype)[rank_of_E]).astype(np.float64)
