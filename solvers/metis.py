"""Placement by METIS on the co-activation graph: best of several seeds and of both schemes, then exact counts and load.

METIS (Karypis and Kumar, 1998, through pymetis) balances one vertex weight, here the load, and only within a tolerance; its result
depends strongly on seed and scheme. So the best of several runs is taken, each made exact first.

Shape letters: L MoE layers, E experts, R ranks.
"""

import numpy as np

from solvers.equalize import best_within_cap

LARGEST_WEIGHT = 1_000_000  # METIS adds weights in 32 bits


def place_metis(
    co_activation_LEE: np.ndarray,
    load_LE: np.ndarray,
    num_ranks: int,
    *,
    load_cap: float,
    seed: int,
    num_seeds: int = 10,
) -> np.ndarray:
    """Rank of each expert, int64 [L, E]: most co-activation within ranks among the runs that keep the load cap.

    `co_activation_LEE`, `load_LE`: counts, int64. `num_seeds` runs of each scheme (k-way and recursive bisection).
    """
    if num_ranks == 1:
        return np.zeros(load_LE.shape, np.int64)
    placed = []
    for affinity_EE, load_E in zip(co_activation_LEE, load_LE, strict=True):
        partitions = [
            metis_partition(affinity_EE, load_E, num_ranks, seed + i, recursive)
            for i in range(num_seeds)
            for recursive in (False, True)
        ]
        placed.append(best_within_cap(partitions, affinity_EE, load_E, num_ranks, load_cap))
    return np.stack(placed)


def metis_partition(
    affinity_EE: np.ndarray, load_E: np.ndarray, num_ranks: int, seed: int, recursive: bool
) -> np.ndarray:
    """One METIS run: part of each expert, int64 [E]. The parts may differ in size."""
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
