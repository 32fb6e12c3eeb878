"""Rank labels that agree across layers, for Attention-DP: a request lives on one rank for the whole depth of the model.

Each layer is solved by itself, so its rank labels are arbitrary. Labels and the request -> rank map are chosen
together: given the map, the best labels of a layer are a linear assignment over (part, rank); given the labels, the
map is a balanced assignment of requests. Several starts, the best kept.

Shape letters: B requests, L MoE layers, E experts, R ranks.
"""

import numpy as np

from solvers.balanced_table import balanced_homes

MAX_ROUNDS = 20


def part_usage_BLR(rank_of_LE: np.ndarray, request_expert_LBE: np.ndarray, num_ranks: int) -> np.ndarray:
    """Activations of request b on part r of layer l, float64 [B, L, R]."""
    member_LER = np.eye(num_ranks)[rank_of_LE]
    return np.einsum("lbe,ler->blr", request_expert_LBE, member_LER, optimize=True)


def align_labels(
    rank_of_LE: np.ndarray,
    request_expert_LBE: np.ndarray,
    weight_B: np.ndarray,
    num_ranks: int,
    *,
    seed: int,
    starts: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The placement with its ranks renamed per layer, int64 [L, E], and the rank of every request, int64 [B].

    Renaming changes no load and no co-activation. `weight_B`: tokens of each request, which the ranks share equally.
    """
    usage_BLR = part_usage_BLR(rank_of_LE, request_expert_LBE, num_ranks)
    best: tuple[float, np.ndarray, np.ndarray] | None = None
    for start in range(starts):
        value, label_LR, home_B = _align_from(usage_BLR, weight_B, np.random.default_rng([seed, start]))
        if best is None or value > best[0]:
            best = value, label_LR, home_B
    assert best is not None
    return np.take_along_axis(best[1], rank_of_LE, axis=1), best[2]


def _align_from(
    usage_BLR: np.ndarray, weight_B: np.ndarray, rng: np.random.Generator
) -> tuple[float, np.ndarray, np.ndarray]:
    """Local activations reached from one random order of layers, the new label of every part [L, R], and the homes
    [B].
    """
    from scipy.optimize import linear_sum_assignment

    num_requests, num_layers, num_ranks = usage_BLR.shape
    label_LR = np.tile(np.arange(num_ranks), (num_layers, 1))
    # Layers are matched one after the other to what the layers so far agree on.
    score_BR = np.zeros((num_requests, num_ranks))
    for layer in rng.permutation(num_layers):
        if score_BR.any():
            centred_BR = score_BR - score_BR.mean(axis=1, keepdims=True)
            _, label_LR[layer] = linear_sum_assignment(-(usage_BLR[:, layer].T @ centred_BR))
        score_BR[:, label_LR[layer]] += usage_BLR[:, layer]
    value, home_B = -np.inf, np.zeros(num_requests, np.int64)
    for _ in range(MAX_ROUNDS):
        unit_BR = score_BR / np.maximum(weight_B, 1)[:, None]
        homes_B = balanced_homes(unit_BR, weight_B.astype(np.float64))
        member_BR = np.eye(num_ranks)[homes_B]
        labels_LR = label_LR.copy()
        for layer in range(num_layers):
            _, labels_LR[layer] = linear_sum_assignment(-(usage_BLR[:, layer].T @ member_BR))
        score_BR = np.zeros((num_requests, num_ranks))
        for layer in range(num_layers):
            score_BR[:, labels_LR[layer]] += usage_BLR[:, layer]
        reached = float(score_BR[np.arange(num_requests), homes_B].sum())
        if reached <= value + 1e-9:
            break
        value, label_LR, home_B = reached, labels_LR, homes_B
    return value, label_LR, home_B
