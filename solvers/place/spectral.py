"""Placement by spectral clustering of the co-activation graph, with exact capacities.

Normalised spectral embedding (Shi and Malik, 2000; Ng, Jordan and Weiss, 2002), then k-means whose
assignment step is a linear assignment over replicated columns, so that every cluster has exactly E
/ R experts at every step.

Shape letters: L MoE layers, E experts, R ranks, M embedding axes.
"""

import numpy as np

from semmoe.solvers.place.exact_counts import best_within_cap


def place_spectral(
    co_activation_LEE: np.ndarray,
    load_LE: np.ndarray,
    num_ranks: int,
    *,
    load_cap: float,
    seed: int,
    num_starts: int = 6,
) -> np.ndarray:
    """Rank of each expert, int64 [L, E]: most co-activation within ranks among several starts,
    under the load cap where feasible."""
    if num_ranks == 1:
        return np.zeros(load_LE.shape, np.int64)
    placed = [
        best_within_cap(
            spectral_starts(affinity_EE, num_ranks, seed=seed, num_starts=num_starts),
            affinity_EE,
            load_E,
            num_ranks,
            load_cap,
        )
        for affinity_EE, load_E in zip(co_activation_LEE, load_LE, strict=True)
    ]
    return np.stack(placed)


def spectral_starts(affinity_EE: np.ndarray, num_ranks: int, *, seed: int, num_starts: int) -> list[np.ndarray]:
    """Partitions with exactly E / R experts per rank, int64 [E] each, from different k-means
    seeds; load is not looked at."""
    points_EM = spectral_embedding(affinity_EE, num_ranks)
    return [balanced_k_means(points_EM, num_ranks, seed=seed + i) for i in range(num_starts)]


def spectral_embedding(affinity_EE: np.ndarray, num_axes: int) -> np.ndarray:
    """Leading eigenvectors of the normalised co-activation, rows scaled to unit length, float64
    [E, M]."""
    from scipy.linalg import eigh

    weights_EE = affinity_EE.astype(np.float64) - np.diag(affinity_EE.diagonal())
    scale_E = 1 / np.sqrt(np.maximum(weights_EE.sum(1), 1e-12))
    size = len(weights_EE)
    _, vectors_EM = eigh(scale_E[:, None] * weights_EE * scale_E, subset_by_index=[size - num_axes, size - 1])
    return vectors_EM / np.maximum(np.linalg.norm(vectors_EM, axis=1, keepdims=True), 1e-12)


def balanced_k_means(points_EM: np.ndarray, num_ranks: int, *, seed: int, max_rounds: int = 30) -> np.ndarray:
    """Cluster of each point, int64 [E], E / R points in every cluster; k-means++ start."""
    from scipy.optimize import linear_sum_assignment

    rng = np.random.default_rng(seed)
    capacity = len(points_EM) // num_ranks
    centers_RM = _spread_centers(points_EM, num_ranks, rng)
    rank_of_E = np.full(len(points_EM), -1)
    for _ in range(max_rounds):
        # Squared distances up to a constant of each point, which no assignment looks at.
        distance_ER = (centers_RM**2).sum(1) - 2 * points_EM @ centers_RM.T
        _, column_E = linear_sum_assignment(np.repeat(distance_ER, capacity, axis=1))
        if np.array_equal(column_E // capacity, rank_of_E):
            break
        rank_of_E = column_E // capacity
        centers_RM = np.stack([points_EM[rank_of_E == rank].mean(0) for rank in range(num_ranks)])
    return rank_of_E


def _spread_centers(points_EM: np.ndarray, num_ranks: int, rng: np.random.Generator) -> np.ndarray:
    """k-means++ (Arthur and Vassilvitskii, 2007): each next centre with a chance of its squared
    distance, float64 [R, M]."""
    chosen = [int(rng.integers(len(points_EM)))]
    distance_E = np.full(len(points_EM), np.inf)
    for _ in range(1, num_ranks):
        distance_E = np.minimum(distance_E, ((points_EM - points_EM[chosen[-1]]) ** 2).sum(-1))
        weight_E = distance_E + 1e-12
        chosen.append(int(rng.choice(len(points_EM), p=weight_E / weight_E.sum())))
    return points_EM[chosen]
