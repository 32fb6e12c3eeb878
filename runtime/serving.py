"""Who serves an expert that several ranks host, for tokens of each rank: a fixed table, so that what runs is what was predicted.

The token's own rank, else a rank of its node, else any rank; among several, the one with the fewest experts to serve so far.

Shape letters: L MoE layers, R ranks, E experts.
"""

import numpy as np

from solvers.placement import Placement, Topology


def serving_table(placement: Placement, topology: Topology) -> np.ndarray:
    """Rank that serves expert e for tokens that live on rank r, int64 [L, R, E]."""
    hosts_LER, node_of_R = placement.hosts_LER, topology.node_of_R
    num_layers, num_experts, num_ranks = hosts_LER.shape
    serving_LRE = np.empty((num_layers, num_ranks, num_experts), np.int64)
    if not placement.num_replicas:
        serving_LRE[:] = placement.rank_of_LE[:, None]
        return serving_LRE
    for layer in range(num_layers):
        served_R = np.zeros(num_ranks, np.int64)
        for expert in range(num_experts):
            hosts = np.flatnonzero(hosts_LER[layer, expert])
            for home in range(num_ranks):
                near = hosts[node_of_R[hosts] == node_of_R[home]]
                choices = [home] if home in hosts else (near if len(near) else hosts)
                rank = min(choices, key=lambda r: (served_R[r], r))
                serving_LRE[layer, home, expert] = rank
                served_R[rank] += 1
    return serving_LRE
