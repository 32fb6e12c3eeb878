"""Plans against each other: how many experts move from one to the next, with ranks as named and
with ranks renamed.

An expert moves when a rank must load weights that it does not hold. Names of ranks are arbitrary,
so two plans may differ by names alone: the least number of moves over all renamings is a linear
assignment of the new ranks to the old ones by the experts they share. Renaming keeps the traffic
only where it keeps ranks of one node together, and one renaming must serve all layers where a
schedule sends requests to ranks; both are respected here.

Shape letters: L MoE layers, R ranks, S slots per rank, N nodes, M ranks per node.
"""

from typing import NamedTuple

import numpy as np

from semmoe.profiles.errors import InputError
from semmoe.solvers.placement import EMPTY, Placement, Topology


class Moves(NamedTuple):
    """Expert copies that ranks must load to get from one placement to another."""

    as_named_L: np.ndarray  # int64 [L]: ranks keep their names
    renamed_L: np.ndarray  # int64 [L]: after the one best renaming of the new ranks, the same at every layer
    per_layer_L: np.ndarray  # int64 [L]: a renaming for every layer; for plans without a schedule only
    old_rank_of_R: np.ndarray  # int64 [R]: the old rank that takes the experts of each new rank, under the one renaming


def count_moves(old: Placement, new: Placement, topology: Topology) -> Moves:
    """Moves from `old` to `new`; `topology`: the nodes that a renaming must keep together.

    Raises InputError where the two are not placements of the same experts over the same number of
    ranks.
    """
    for name in ("num_layers", "num_experts", "num_ranks"):
        if getattr(old, name) != getattr(new, name):
            what = name.removeprefix("num_")
            raise InputError(
                f"moves are counted between plans of one shape: {getattr(old, name)} against {getattr(new, name)} {what}"
            )
    # Experts that new rank r and old rank q share, int64 [L, R, R].
    shared_LRR = np.einsum("ler,leq->lrq", new.hosts_LER.astype(np.int64), old.hosts_LER.astype(np.int64))
    copies = (new.experts_LRS != EMPTY).sum(axis=(1, 2))
    old_rank_of_R = _best_renaming_R(shared_LRR.sum(0), topology)
    ranks = np.arange(new.num_ranks)
    per_layer = [shared_RR[ranks, _best_renaming_R(shared_RR, topology)].sum() for shared_RR in shared_LRR]
    return Moves(
        as_named_L=copies - np.trace(shared_LRR, axis1=1, axis2=2),
        renamed_L=copies - shared_LRR[:, ranks, old_rank_of_R].sum(1),
        per_layer_L=copies - np.array(per_layer),
        old_rank_of_R=old_rank_of_R,
    )


def _best_renaming_R(shared_RR: np.ndarray, topology: Topology) -> np.ndarray:
    """The old rank for each new rank that keeps most experts in place, int64 [R]; ranks of one node
    stay together.

    Exact: the best renaming inside every pair of nodes, then the best pairing of nodes.
    """
    from scipy.optimize import linear_sum_assignment

    if topology.cost_RR is not None:  # ranks differ by what reaches them: no renaming keeps the cost
        return np.arange(topology.num_ranks)
    nodes, inside = topology.num_nodes, topology.ranks_per_node
    blocks_NNMM = shared_RR.reshape(nodes, inside, nodes, inside).swapaxes(1, 2)
    pairs = [[linear_sum_assignment(block, maximize=True) for block in row] for row in blocks_NNMM]
    kept_NN = np.array([[blocks_NNMM[i, j][pairs[i][j]].sum() for j in range(nodes)] for i in range(nodes)])
    _, old_node_of_N = linear_sum_assignment(kept_NN, maximize=True)
    renaming = [node * inside + pairs[i][node][1] for i, node in enumerate(old_node_of_N)]
    return np.concatenate(renaming).astype(np.int64)


def expert_bytes(hidden_size: int, expert_size: int, dtype_bytes: float, *, num_matrices: int = 3) -> int:
    """Bytes of one expert's weights: gate, up and down matrices of hidden x expert size. Biases
    and scales are left out."""
    return round(num_matrices * hidden_size * expert_size * dtype_bytes)
