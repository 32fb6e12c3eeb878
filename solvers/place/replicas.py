"""The replica rule: which copy of an expert serves a token.

A copy is chosen by a static rule: the token's own rank, else its own node, else the copy whose rank
carries least. The rule is one array, which evaluation and every runtime share, so that what is
scored is what runs. Which experts get copies: solvers/place/copies.py.

Shape letters: L MoE layers, E experts, R ranks.
"""

import numpy as np

from semmoe.solvers.placement import Topology


def serving_LRE(hosts_LER: np.ndarray, load_LE: np.ndarray, topology: Topology) -> np.ndarray:
    """Rank that serves expert e for a token that lives on rank r, int32 [L, R, E].

    The token's own rank where it hosts the expert; else a host on the same node, else any host: the
    one with least load so far, hottest experts first. `hosts_LER`: bool. `load_LE`: activations of
    the fitted requests.
    """
    return np.stack([serve_RE(hosts_ER, load_E, topology) for hosts_ER, load_E in zip(hosts_LER, load_LE, strict=True)])


def serve_RE(hosts_ER: np.ndarray, load_E: np.ndarray, topology: Topology) -> np.ndarray:
    """`serving_LRE` of one layer, int32 [R, E]."""
    num_experts, num_ranks = hosts_ER.shape
    node_of_R = topology.node_of_R.tolist()
    serving_RE = np.empty((num_ranks, num_experts), np.int32)
    carried_R = np.zeros(num_ranks)
    copies_E = hosts_ER.sum(axis=1)
    # Every source rank sends an equal share. Experts with one copy leave no choice, so their load
    # is laid first.
    share_E = load_E / num_ranks
    single = copies_E == 1
    serving_RE[:, single] = hosts_ER[single].argmax(axis=1)
    np.add.at(carried_R, serving_RE[0, single], load_E[single])
    several = np.flatnonzero(~single)
    for e in several:
        hosts = np.flatnonzero(hosts_ER[e])
        serving_RE[hosts, e] = hosts
        carried_R[hosts] += share_E[e]
    # Few hosts and many ranks: plain numbers are faster than arrays here.
    carried = carried_R.tolist()
    for e in several[np.argsort(-load_E[several], kind="stable")]:
        hosts, share = np.flatnonzero(hosts_ER[e]).tolist(), float(share_E[e])
        chosen_R = list(range(num_ranks))
        near_N = {node: [host for host in hosts if node_of_R[host] == node] for node in set(node_of_R)}
        for rank in np.flatnonzero(~hosts_ER[e]).tolist():
            chosen = min(near_N[node_of_R[rank]] or hosts, key=carried.__getitem__)
            chosen_R[rank] = chosen
            carried[chosen] += share
        serving_RE[:, e] = chosen_R
    return serving_RE


def served_load_R(serving_RE: np.ndarray, load_E: np.ndarray) -> np.ndarray:
    """Activations that each rank serves where every rank sends an equal share, float64 [R]."""
    num_ranks = len(serving_RE)
    share_RE = np.broadcast_to(load_E / num_ranks, serving_RE.shape)
    return np.bincount(serving_RE.reshape(-1), share_RE.reshape(-1), num_ranks)
