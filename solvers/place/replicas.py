"""Extra slots: which experts get a second home, and which copy serves a token.

Extra slots go by affinity first: the experts that the rank's own tokens use most and that are not
there yet. Then copies are exchanged where a rank would serve more than the load cap. Slots may also
go by load: the hottest experts per copy, to the rank with least load. A copy is chosen by a static
rule: the token's own rank, else its own node, else the copy whose rank carries least. The rule is
one array, which evaluation and every runtime share, so that what is scored is what runs.

Shape letters: T tokens, L MoE layers, E experts, K top-k, R ranks, S slots per rank.
"""

from typing import NamedTuple

import numpy as np

from semmoe.solvers.evaluate.reached import reached_ranks
from semmoe.solvers.placement import Topology
from semmoe.solvers.schedule.transport import balanced_homes

SAMPLE_ROWS = 32_768  # tokens per layer that decide on copies
LEVEL_ROWS = 16_384  # tokens that the load is levelled on
LEVEL_STEPS = 2  # exchanges of copies per rank, at most
LEVEL_TRIALS = 4  # exchanges tried at each


def serving_LRE(hosts_LER: np.ndarray, load_LE: np.ndarray, topology: Topology) -> np.ndarray:
    """Rank that serves expert e for a token that lives on rank r, int32 [L, R, E].

    The token's own rank where it hosts the expert; else a host on the same node, else any host: the
    one with least load so far, hottest experts first. `hosts_LER`: bool. `load_LE`: activations of
    the fitted requests.
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
    load_cap: float = np.inf,
) -> np.ndarray:
    """Experts of every rank in slot order: its own in ascending order, then copies.

    Parameters:
        rank_of_LE: the placement of every expert once, int [L, E].
        expert_ids_TLK: a sample of tokens, each taken to live on the rank where it has most
            experts, in equal numbers per rank; E stands for an empty slot.
        load_LE: activations, [L, E].
        topology: ranks and nodes.
        replicas: copies on each rank.
        load_slots: the last of them, which go by load instead of affinity.
        load_cap: copies are exchanged while a rank serves more than this times the mean, where that
            helps.

    Returns:
        int32 [L, R, S], no expert twice on one rank.
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
            served = serve(ids_TK, hosts_ER, load_LE[layer], topology)
            wanted_ER = np.where(hosts_ER, -np.inf, served.use_ER)
            for rank in range(num_ranks):
                expert = int(np.argmax(wanted_ER[:, rank]))
                own_RS[rank].append(expert)
                hosts_ER[expert, rank] = True
        for _ in range(replicas - by_affinity):
            _add_by_load(own_RS, hosts_ER, load_LE[layer], topology)
        if replicas:
            ids_TK = ids_TK[:: max(1, len(ids_TK) // LEVEL_ROWS)]
            _level(own_RS, hosts_ER, ids_TK, load_LE[layer], topology, replicas, load_cap)
        layers.append(own_RS)
    return np.array(layers, np.int32)


class Served(NamedTuple):
    """What a sample of tokens makes of the copies of one layer."""

    use_ER: np.ndarray  # activations of each expert by tokens that live on each rank, int64
    serving_RE: np.ndarray
    load_R: np.ndarray  # load of each rank, float64 (`served_load_R`)
    remote: float  # ranks other than its own that a token needs, summed over tokens


def serve(expert_ids_TK: np.ndarray, hosts_ER: np.ndarray, load_E: np.ndarray, topology: Topology) -> Served:
    """Tokens sent where most of their experts are, in equal numbers per rank, and served by the
    rule."""
    num_experts, num_ranks = hosts_ER.shape
    padded_ER = np.vstack([hosts_ER, np.zeros((1, num_ranks), bool)])
    count_TR = np.zeros((len(expert_ids_TK), num_ranks))
    for ids_T in expert_ids_TK.T:
        count_TR += padded_ER[ids_T]
    home_T = balanced_homes(count_TR, np.ones(len(count_TR)))
    flat = (expert_ids_TK.astype(np.int64) * num_ranks + home_T[:, None]).reshape(-1)
    use_ER = np.bincount(flat, minlength=(num_experts + 1) * num_ranks).reshape(-1, num_ranks)[:num_experts]
    serving_RE = _serving_RE(hosts_ER, load_E, topology)
    load_R = served_load_R(serving_RE, load_E)
    reached = reached_ranks(expert_ids_TK, serving_RE, home_T)
    remote = int((reached.first_KT & (reached.ranks_KT != home_T)).sum())
    return Served(use_ER, serving_RE, load_R, float(remote))


def served_load_R(serving_RE: np.ndarray, load_E: np.ndarray) -> np.ndarray:
    """Activations that each rank serves where every rank sends an equal share, float64 [R]."""
    num_ranks = len(serving_RE)
    share_RE = np.broadcast_to(load_E / num_ranks, serving_RE.shape)
    return np.bincount(serving_RE.reshape(-1), share_RE.reshape(-1), num_ranks)


def _level(
    own_RS: list[list[int]],
    hosts_ER: np.ndarray,
    expert_ids_TK: np.ndarray,
    load_E: np.ndarray,
    topology: Topology,
    replicas: int,
    load_cap: float,
) -> None:
    """Copies exchanged for others, in place, until no rank serves more than the cap or no exchange
    brings it nearer.

    Of the exchanges that promise most relief per local use lost, the one is made that costs fewest
    remote ranks for what it relieves.
    """
    served = serve(expert_ids_TK, hosts_ER, load_E, topology)
    limit = load_cap * float(served.load_R.mean())
    tried: set[tuple[int, int, int]] = set()
    for _ in range(LEVEL_STEPS * topology.num_ranks):
        over = float(np.maximum(served.load_R - limit, 0).sum())
        if over <= 0:
            return
        best = None
        for rank, slot, expert in _exchanges(own_RS, hosts_ER, served, load_E, replicas, limit, tried)[:LEVEL_TRIALS]:
            tried.add((rank, own_RS[rank][slot], expert))
            changed_ER = hosts_ER.copy()
            changed_ER[own_RS[rank][slot], rank], changed_ER[expert, rank] = False, True
            then = serve(expert_ids_TK, changed_ER, load_E, topology)
            relief = over - float(np.maximum(then.load_R - limit, 0).sum())
            price = max(then.remote - served.remote, 1.0) / max(relief, 1e-9)
            if relief > 0 and (best is None or price < best[0]):
                best = price, rank, slot, expert, changed_ER, then
        if best is None:
            return
        _, rank, slot, expert, changed_ER, served = best
        own_RS[rank][slot] = expert
        hosts_ER[:] = changed_ER


def _exchanges(
    own_RS: list[list[int]],
    hosts_ER: np.ndarray,
    served: Served,
    load_E: np.ndarray,
    replicas: int,
    limit: float,
    tried: set[tuple[int, int, int]],
) -> list[tuple[int, int, int]]:
    """Exchanges (rank, slot, expert that comes) by expected relief of overload per local use
    lost, best first."""
    use_ER, load_R, num_ranks = served.use_ER, served.load_R, len(served.load_R)
    over = float(np.maximum(load_R - limit, 0).sum())
    found = []
    for rank, own in enumerate(own_RS):
        coming = np.flatnonzero(~hosts_ER[:, rank])
        gained = load_E[coming] / num_ranks
        for slot in range(len(own) - replicas, len(own)):
            lost = load_E[own[slot]] / num_ranks * (served.serving_RE[:, own[slot]] == rank).sum()
            use_lost = use_ER[own[slot], rank]
            others = np.flatnonzero(hosts_ER[own[slot]] & (np.arange(num_ranks) != rank))
            then_XR = np.repeat(load_R[None], len(coming), axis=0)
            then_XR[:, others[np.argmin(load_R[others])]] += lost
            then_XR[np.arange(len(coming)), served.serving_RE[rank, coming]] -= gained
            then_XR[:, rank] += gained - lost
            relief_X = over - np.maximum(then_XR - limit, 0).sum(axis=1)
            worth_X = relief_X / (np.maximum(use_lost - use_ER[coming, rank], 0) + 0.001 * use_ER.sum() / num_ranks)
            for i in np.argsort(-worth_X, kind="stable")[:LEVEL_TRIALS]:
                if relief_X[i] > 0 and (rank, own[slot], int(coming[i])) not in tried:
                    found.append((float(worth_X[i]), rank, slot, int(coming[i])))
    return [(rank, slot, expert) for _, rank, slot, expert in sorted(found, key=lambda x: -x[0])]


def _add_by_load(own_RS: list[list[int]], hosts_ER: np.ndarray, load_E: np.ndarray, topology: Topology) -> None:
    """One copy to every rank, the least loaded rank first: the expert with most load per copy
    that it does not host."""
    carried_R = (load_E[:, None] * hosts_ER / hosts_ER.sum(axis=1, keepdims=True)).sum(axis=0)
    for rank in np.argsort(carried_R, kind="stable"):
        per_copy_E = np.where(hosts_ER[:, rank], -np.inf, load_E / hosts_ER.sum(axis=1))
        expert = int(np.argmax(per_copy_E))
        own_RS[rank].append(expert)
        hosts_ER[expert, rank] = True
