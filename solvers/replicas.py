"""Extra slots: which experts get a second home, and which copy serves a token.

Extra slots go by affinity first: the experts that the rank's own tokens use most and that are not there yet, most of
all those that busy ranks serve now. The rest go by load: the hottest experts per copy, to the rank with least load. A
copy is chosen by a static rule: the token's own rank, else its own node, else the copy whose rank carries least. The
rule is one array, which evaluation and every runtime share, so that what is scored is what runs.

Shape letters: T tokens, L MoE layers, E experts, K top-k, R ranks, S slots per rank.
"""

import numpy as np

from solvers.balanced_table import balanced_homes
from solvers.placement import Topology

SAMPLE_ROWS = 32_768  # tokens per layer that decide on copies


def serving_LRE(hosts_LER: np.ndarray, load_LE: np.ndarray, topology: Topology) -> np.ndarray:
    """Rank that serves expert e for a token that lives on rank r, int32 [L, R, E].

    The token's own rank where it hosts the expert; else a host on the same node, else any host: the one with least
    load so far, hottest experts first. `hosts_LER`: bool. `load_LE`: activations of the fitted requests.
    """
    return np.stack(
        [_serving_RE(hosts_ER, load_E, topology) for hosts_ER, load_E in zip(hosts_LER, load_LE, strict=True)]
    )


def _serving_RE(hosts_ER: np.ndarray, load_E: np.ndarray, topology: Topology) -> np.ndarray:
    num_experts, num_ranks = hosts_ER.shape
    node_of_R = topology.node_of_R
    serving_RE = np.empty((num_ranks, num_experts), np.int32)
    carried_R = np.zeros(num_ranks)
    copies_E = hosts_ER.sum(axis=1)
    # Every source rank sends an equal share. Experts with one copy leave no choice, so their load is laid first.
    share_E = load_E / num_ranks
    single = copies_E == 1
    serving_RE[:, single] = hosts_ER[single].argmax(axis=1)
    np.add.at(carried_R, serving_RE[0, single], load_E[single])
    several = np.flatnonzero(~single)
    for e in several:
        hosts = np.flatnonzero(hosts_ER[e])
        serving_RE[hosts, e] = hosts
        carried_R[hosts] += share_E[e]
    for e in several[np.argsort(-load_E[several], kind="stable")]:
        hosts = np.flatnonzero(hosts_ER[e])
        for rank in np.flatnonzero(~hosts_ER[e]):
            near = hosts[node_of_R[hosts] == node_of_R[rank]]
            choices = near if len(near) else hosts
            chosen = choices[np.argmin(carried_R[choices])]
            serving_RE[rank, e] = chosen
            carried_R[chosen] += share_E[e]
    return serving_RE


def add_replicas(
    rank_of_LE: np.ndarray,
    expert_ids_TLK: np.ndarray,
    load_LE: np.ndarray,
    topology: Topology,
    *,
    replicas: int,
    load_slots: int = 0,
) -> np.ndarray:
    """Experts of every rank in slot order, int32 [L, R, S]: its own in ascending order, then `replicas` copies.

    `expert_ids_TLK`: a sample of tokens, each taken to live on the rank where it has most experts, in equal numbers per
    rank. The last `load_slots` copies of each rank go by load instead of affinity. No expert is twice on one rank.
    """
    num_ranks = topology.num_ranks
    num_experts = rank_of_LE.shape[1]
    replicas = min(replicas, num_experts - num_experts // num_ranks)
    layers = []
    for layer, rank_of_E in enumerate(rank_of_LE):
        hosts_ER = np.eye(num_ranks, dtype=bool)[rank_of_E]
        own_RS = [np.flatnonzero(rank_of_E == rank).tolist() for rank in range(num_ranks)]
        by_affinity = max(replicas - load_slots, 0)
        ids_TK = expert_ids_TLK[:: max(1, len(expert_ids_TLK) // SAMPLE_ROWS), layer]
        for _ in range(by_affinity):
            # One copy per rank at a time: tokens then choose their homes again with the new copies.
            wanted_ER = np.where(hosts_ER, -np.inf, _wanted_ER(ids_TK, hosts_ER, load_LE[layer], topology))
            for rank in range(num_ranks):
                expert = int(np.argmax(wanted_ER[:, rank]))
                own_RS[rank].append(expert)
                hosts_ER[expert, rank] = True
        for _ in range(replicas - by_affinity):
            _add_by_load(own_RS, hosts_ER, load_LE[layer], topology)
        layers.append(own_RS)
    return np.array(layers, np.int32)


def _wanted_ER(expert_ids_TK: np.ndarray, hosts_ER: np.ndarray, load_E: np.ndarray, topology: Topology) -> np.ndarray:
    """How much tokens that live on rank r want expert e there, float64 [E, R]; tokens live where most of their experts
    are.

    A use counts by the square of the load of the rank that serves it now: copies then also relieve the busiest ranks.
    """
    num_experts, num_ranks = hosts_ER.shape
    padded_ER = np.vstack([hosts_ER, np.zeros((1, num_ranks), bool)])
    count_TR = np.zeros((len(expert_ids_TK), num_ranks))
    for ids_T in expert_ids_TK.T:
        count_TR += padded_ER[ids_T]
    home_T = balanced_homes(count_TR, np.ones(len(count_TR)))
    flat = (expert_ids_TK.astype(np.int64) * num_ranks + home_T[:, None]).reshape(-1)
    use_ER = np.bincount(flat, minlength=(num_experts + 1) * num_ranks).reshape(-1, num_ranks)[:num_experts]
    serving_ER = _serving_RE(hosts_ER, load_E, topology).T
    carried_R = np.bincount(serving_ER.reshape(-1), use_ER.reshape(-1), num_ranks)
    return use_ER * (carried_R / max(carried_R.mean(), 1e-300))[serving_ER] ** 2


def _add_by_load(own_RS: list[list[int]], hosts_ER: np.ndarray, load_E: np.ndarray, topology: Topology) -> None:
    """One copy to every rank, the least loaded rank first: the expert with most load per copy that it does not host."""
    carried_R = (load_E[:, None] * hosts_ER / hosts_ER.sum(axis=1, keepdims=True)).sum(axis=0)
    for rank in np.argsort(carried_R, kind="stable"):
        per_copy_E = np.where(hosts_ER[:, rank], -np.inf, load_E / hosts_ER.sum(axis=1))
        expert = int(np.argmax(per_copy_E))
        own_RS[rank].append(expert)
        hosts_ER[expert, rank] = True
