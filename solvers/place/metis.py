"""Placement by METIS on the co-activation graph: best of several seeds and of both schemes, then
exact counts and load.

METIS (Karypis and Kumar, 1998, through pymetis) balances one vertex weight, here the load, and only
within a tolerance; its result depends strongly on seed and scheme. So the best of several runs is
taken, each made exact first.

Shape letters: L MoE layers, E experts, R ranks.
"""

import numpy as np

from semmoe.solvers.place.exact_counts import best_within_cap, is_within_cap, repair_load

LARGEST_WEIGHT = 1_000_000  # METIS adds weights in 32 bits


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
    """Rank of each expert, int64 [L, E]: most co-activation within ranks among the runs that keep
    the load cap.

    `co_activation_LEE`, `load_LE`: counts, int64. `num_seeds` runs of each scheme (k-way and
    recursive bisection). With several nodes experts are split over nodes first, then over the ranks
    of each: best of as many runs every time.
    """
    return np.stack(
        [
            _in_nodes(affinity_EE, load_E, num_ranks, num_nodes, load_cap, seed, num_seeds)
            for affinity_EE, load_E in zip(co_activation_LEE, load_LE, strict=True)
        ]
    )


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
    partitions = [
        metis_partition(affinity_EE, load_E, num_parts, seed + i, recursive)
        for i in range(num_seeds)
        for recursive in (False, True)
    ]
    return best_within_cap(partitions, affinity_EE, load_E, num_parts, load_cap)


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
