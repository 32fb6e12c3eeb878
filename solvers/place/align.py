"""Rank labels that agree across layers, for Attention-DP: a request lives on one rank for the whole
depth of the model.

Each layer is solved by itself, so its rank labels are arbitrary. Labels and the request -> rank map
are chosen together: given the map, the best labels of a layer are a linear assignment over (part,
rank); given the labels, the map is a balanced assignment of requests. Several starts, the best
kept.

Shape letters: B requests, L MoE layers, E experts, R ranks.
"""

import numpy as np

from semmoe.solvers.place.clusters import part_counts_BR
from semmoe.solvers.schedule.transport import balanced_homes

MAX_ROUNDS = 20


def part_usage_BLR(rank_of_LE: np.ndarray, request_expert_LBE: np.ndarray, num_ranks: int) -> np.ndarray:
    """Activations of request b on part r of layer l, float64 [B, L, R]."""
    parts = zip(request_expert_LBE, rank_of_LE, strict=True)
    return np.stack([part_counts_BR(usage_BE, rank_of_E, num_ranks) for usage_BE, rank_of_E in parts], axis=1)


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
    """The placement with its ranks renamed per layer, int64 [L, E], and the rank of every request,
    int64 [B].

    Renaming changes no load and no co-activation, and keeps the ranks of a node together.
    `weight_B`: tokens of each request, which the ranks share equally.
    """
    usage_BLR = part_usage_BLR(rank_of_LE, request_expert_LBE, num_ranks)
    best: tuple[float, np.ndarray, np.ndarray] | None = None
    for start in range(starts):
        value, label_LR, home_B = _align_from(usage_BLR, weight_B, num_nodes, np.random.default_rng([seed, start]))
        if best is None or value > best[0]:
            best = value, label_LR, home_B
    assert best is not None
    return np.take_along_axis(best[1], rank_of_LE, axis=1), best[2]


def _align_from(
    usage_BLR: np.ndarray, weight_B: np.ndarray, num_nodes: int, rng: np.random.Generator
) -> tuple[float, np.ndarray, np.ndarray]:
    """Local activations reached from one random order of layers, the new label of every part [L,
    R], and the homes [B]."""
    num_requests, num_layers, num_ranks = usage_BLR.shape
    label_LR = np.tile(np.arange(num_ranks), (num_layers, 1))
    # Layers are matched one after the other to what the layers so far agree on.
    score_BR = np.zeros((num_requests, num_ranks))
    for layer in rng.permutation(num_layers):
        if score_BR.any():
            centred_BR = score_BR - score_BR.mean(axis=1, keepdims=True)
            label_LR[layer] = best_labels(usage_BLR[:, layer].T @ centred_BR, num_nodes)
        score_BR[:, label_LR[layer]] += usage_BLR[:, layer]
    value, home_B = -np.inf, np.zeros(num_requests, np.int64)
    for _ in range(MAX_ROUNDS):
        unit_BR = score_BR / np.maximum(weight_B, 1)[:, None]
        homes_B = balanced_homes(unit_BR, weight_B.astype(np.float64))
        member_BR = np.eye(num_ranks)[homes_B]
        labels_LR = label_LR.copy()
        for layer in range(num_layers):
            labels_LR[layer] = best_labels(usage_BLR[:, layer].T @ member_BR, num_nodes)
        score_BR = np.zeros((num_requests, num_ranks))
        for layer in range(num_layers):
            score_BR[:, labels_LR[layer]] += usage_BLR[:, layer]
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
