"""Placement by partitions of the co-activation graph, METIS or spectral, made exact in counts and
load.

METIS (Karypis and Kumar, 1998, through pymetis) balances one vertex weight, here the load, and only
within a tolerance; its result depends strongly on seed and scheme, so the best of several runs is
taken, each made exact first. Spectral: normalised embedding (Shi and Malik, 2000; Ng, Jordan and
Weiss, 2002), then k-means whose assignment step is a linear assignment over replicated columns, so
that every cluster has its exact share of the experts at every step.

Shape letters: L MoE layers, E experts, R ranks, M embedding axes.
"""

import numpy as np

from semmoe.solvers.place.exact_counts import best_within_cap, is_within_cap, repair_load
from semmoe.solvers.placement import part_sizes

LARGEST_WEIGHT = 1_000_000  # METIS adds weights in 32 bits
QUICK_CAP = 1.05
QUICK_SEEDS = 3  # METIS runs of each scheme: with one, luck hides what a curve should show


def place_metis(
    co_activation_LEE: np.ndarray,
    load_LE: np.ndarray,
    num_ranks: int,
    *,
    load_cap: float,
    seed: int,
    num_seeds: int = 10,
    num_nodes: int = 1,
) -> np.ndarray:
    """The best of several METIS runs: most co-activation within ranks among those that keep the
    load cap.

    Parameters:
        co_activation_LEE: tokens that chose both experts, int64 [L, E, E]; loads on the diagonal.
        load_LE: activations, int64 [L, E].
        num_ranks: R, which share the experts evenly.
        load_cap: most load of a rank over the mean.
        seed: of the first run.
        num_seeds: runs of each scheme (k-way and recursive bisection).
        num_nodes: with several, experts are split over nodes first, then over the ranks of each:
            best of as many runs every time.

    Returns:
        Rank of each expert, int64 [L, E].
    """
    return np.stack(
        [
            _in_nodes(affinity_EE, load_E, num_ranks, num_nodes, load_cap, seed, num_seeds)
            for affinity_EE, load_E in zip(co_activation_LEE, load_LE, strict=True)
        ]
    )


def place_quickly(co_activation_LEE: np.ndarray, num_ranks: int, seed: int) -> np.ndarray:
    """Rank of each expert, int64 [L, E], by few runs of METIS: what curves, drift and what-if
    tables fit again and again."""
    load_LE = np.diagonal(co_activation_LEE, axis1=1, axis2=2)
    return place_metis(co_activation_LEE, load_LE, num_ranks, load_cap=QUICK_CAP, seed=seed, num_seeds=QUICK_SEEDS)


def _in_nodes(
    affinity_EE: np.ndarray, load_E: np.ndarray, num_ranks: int, num_nodes: int, load_cap: float, seed: int, seeds: int
) -> np.ndarray:
    """Rank of each expert of one layer, int64 [E]."""
    if num_nodes in (1, num_ranks):
        return _best_of(affinity_EE, load_E, num_ranks, load_cap, seed, seeds)
    # Half of the slack for the nodes, so that ranks inside a full node still find room.
    node_of_E = _best_of(affinity_EE, load_E, num_nodes, 1 + (load_cap - 1) / 2, seed, seeds)
    per_node = num_ranks // num_nodes
    rank_of_E = np.empty(len(load_E), np.int64)
    for node in range(num_nodes):
        experts = np.flatnonzero(node_of_E == node)
        # The cap is on the mean of all ranks, not of this node's.
        share = float(load_E[experts].sum()) * num_nodes / max(float(load_E.sum()), 1.0)
        inside_E = _best_of(
            affinity_EE[np.ix_(experts, experts)], load_E[experts], per_node, load_cap / max(share, 1e-9), seed, seeds
        )
        rank_of_E[experts] = node * per_node + inside_E
    # Where a node's own ranks cannot be levelled, swaps between nodes may, or a placement that does
    # not look at nodes.
    rank_of_E = repair_load(rank_of_E, affinity_EE, load_E, num_ranks, load_cap)
    if is_within_cap(rank_of_E, load_E, num_ranks, load_cap):
        return rank_of_E
    flat_E = _best_of(affinity_EE, load_E, num_ranks, load_cap, seed, seeds)
    return flat_E if is_within_cap(flat_E, load_E, num_ranks, load_cap) else rank_of_E


def _best_of(
    affinity_EE: np.ndarray, load_E: np.ndarray, num_parts: int, load_cap: float, seed: int, num_seeds: int
) -> np.ndarray:
    if num_parts == 1:
        return np.zeros(len(load_E), np.int64)
    if num_parts >= len(load_E):
        return np.arange(len(load_E))
    partitions = [
        metis_partition(affinity_EE, load_E, num_parts, seed + i, recursive)
        for i in range(num_seeds)
        for recursive in (False, True)
    ]
    return best_within_cap(partitions, affinity_EE, load_E, num_parts, load_cap)


def metis_partition(
    affinity_EE: np.ndarray, load_E: np.ndarray, num_ranks: int, seed: int, recursive: bool
) -> np.ndarray:
    """One METIS run: part of each expert, int64 [E]. The parts may differ in size.

    Parameters:
        affinity_EE: weights of edges, float [E, E]; the diagonal is not looked at.
        load_E: weights of vertices, float [E].
        num_ranks: R.
        seed: of METIS.
        recursive: recursive bisection in place of k-way.
    """
    import pymetis

    off_EE = affinity_EE - np.diag(affinity_EE.diagonal())
    weights_EE = np.ceil(off_EE * (LARGEST_WEIGHT / max(off_EE.max(), 1))).astype(np.int64)
    # One adjacency row per expert; zero weights are not edges.
    neighbours = [np.flatnonzero(row) for row in weights_EE]
    starts = np.concatenate([[0], np.cumsum([len(n) for n in neighbours])])
    edge_weights = np.concatenate([row[n] for row, n in zip(weights_EE, neighbours, strict=True)])
    vertex_weights = np.ceil(load_E * (LARGEST_WEIGHT / len(load_E) / max(load_E.max(), 1))).astype(np.int64) + 1
    _, part = pymetis.part_graph(
        num_ranks,
        adjacency=pymetis.CSRAdjacency(starts, np.concatenate(neighbours)),
        eweights=edge_weights,
        vweights=vertex_weights,
        recursive=recursive,
        options=pymetis.Options(seed=seed),
    )
    return np.asarray(part, np.int64)


def place_spectral(
    co_activation_LEE: np.ndarray,
    load_LE: np.ndarray,
    num_ranks: int,
    *,
    load_cap: float,
    seed: int,
    num_starts: int = 6,
) -> np.ndarray:
    """The best of several spectral partitions: most co-activation within ranks, under the load cap
    where feasible. Arguments as of `place_metis`; `num_starts`: k-means seeds.

    Returns:
        Rank of each expert, int64 [L, E].
    """
    if num_ranks == 1:
        return np.zeros(load_LE.shape, np.int64)
    if num_ranks >= load_LE.shape[1]:
        return np.tile(np.arange(load_LE.shape[1]), (len(load_LE), 1))
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
    """Partitions in even shares, int64 [E] each, from different k-means seeds; load is not looked
    at.

    Parameters:
        affinity_EE: what experts are worth to each other, float [E, E].
        num_ranks: R.
        seed: of the first start; the others count on from it.
        num_starts: k-means seeds.
    """
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
    """Cluster of each point, int64 [E], clusters of even sizes (`part_sizes`); k-means++ start.

    Parameters:
        points_EM: float [E, M].
        num_ranks: R, clusters.
        seed: of the start.
        max_rounds: rounds of assignment, at most.
    """
    from scipy.optimize import linear_sum_assignment

    rng = np.random.default_rng(seed)
    sizes_R = part_sizes(len(points_EM), num_ranks)
    rank_of_column = np.repeat(np.arange(num_ranks), sizes_R)
    centers_RM = _spread_centers(points_EM, num_ranks, rng)
    rank_of_E = np.full(len(points_EM), -1)
    for _ in range(max_rounds):
        # Squared distances up to a constant of each point, which no assignment looks at.
        distance_ER = (centers_RM**2).sum(1) - 2 * points_EM @ centers_RM.T
        _, column_E = linear_sum_assignment(np.repeat(distance_ER, sizes_R, axis=1))
        if np.array_equal(rank_of_column[column_E], rank_of_E):
            break
        rank_of_E = rank_of_column[column_E]
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
