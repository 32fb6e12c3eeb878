"""The replica rule: which copy of an expert serves a token.

Ours is static: the token's own rank, else its own node, else the copy whose rank carries least; one
array, which evaluation and every runtime share, so that what is scored is what runs. `cover` looks
at all choices of a token: those that no other rank can serve are reached anyway and serve what else
they hold; the rest goes where one more rank serves most. The rules of engines are theirs, as of the
releases in docs/engines.md, so that a report promises no locality that an engine will not give:

- sglang: own rank, else own node, else the copies in fair shares; fixed per rank.
- vllm-ascend: the copy whose place among the expert's is the rank's number modulo their number.
- vllm: the same by a hash of the token's number in the batch.
- trtllm: copies in turn for the choices of each rank, which starts at its own number.

Which experts get copies: solvers/place/copies.py.

Shape letters: L MoE layers, E experts, R ranks, T tokens, K top-k, C copies.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from semmoe.profiles.errors import InputError
from semmoe.solvers.placement import Topology

OWN_RULE = "own-rank-then-node-then-load"
ENGINE_RULES = {
    "sglang": "SGLang: own rank, own node, else fair shares",
    "vllm": "vLLM: by the token's number in the batch, so copies bring balance and no locality",
    "vllm-ascend": "vLLM-Ascend: by the rank's number, so copies bring little locality",
    "trtllm": "TensorRT-LLM: in turn, offset by the rank, so copies bring balance and no locality",
}
REPLICA_RULES = (OWN_RULE, "cover", *ENGINE_RULES)
MOVING = ("cover", "vllm", "trtllm")  # rules by which tokens of one rank may choose different copies
KNUTH = 2654435761  # of vLLM's hash of token numbers
CHUNK = 8_192  # tokens whose choices and ranks are weighed at once


def check_rule(name: str) -> str:
    """The name of a rule. Raises InputError where there is none of that name."""
    if name not in REPLICA_RULES:
        raise InputError(f"--replica-choice {name}: expected {', '.join(REPLICA_RULES)}, or engine with --engine NAME")
    return name


def static_serving_LRE(rule: str, hosts_LER: np.ndarray, load_LE: np.ndarray, topology: Topology) -> np.ndarray:
    """Rank that serves expert e for a token that lives on rank r under a rule, int32 [L, R, E];
    under one that moves, where it does not decide otherwise. Arguments as of `serving_LRE`."""
    if rule == "sglang":
        return np.stack([_shared_RE(hosts_ER, topology) for hosts_ER in hosts_LER])
    if rule == "vllm-ascend":
        return np.stack([_by_number_RE(hosts_ER) for hosts_ER in hosts_LER])
    return serving_LRE(hosts_LER, load_LE, topology)


def _shared_RE(hosts_ER: np.ndarray, topology: Topology) -> np.ndarray:
    """Own rank, else the copies of the own node in turn, else all in turn."""
    num_experts, num_ranks = hosts_ER.shape
    serving_RE = np.empty((num_ranks, num_experts), np.int32)
    for e, hosts_R in enumerate(hosts_ER):
        hosts, far = np.flatnonzero(hosts_R), 0
        near_N = [hosts[topology.node_of_R[hosts] == node] for node in range(topology.num_nodes)]
        turn_N = [0] * topology.num_nodes
        for rank, node in enumerate(topology.node_of_R.tolist()):
            if hosts_R[rank]:
                serving_RE[rank, e] = rank
            elif len(near_N[node]):
                serving_RE[rank, e] = near_N[node][turn_N[node] % len(near_N[node])]
                turn_N[node] += 1
            else:
                serving_RE[rank, e] = hosts[far % len(hosts)]
                far += 1
    return serving_RE


def _by_number_RE(hosts_ER: np.ndarray) -> np.ndarray:
    """The copy whose place among the expert's is the rank's number modulo their number."""
    copies_EC, count_E = copies_of(hosts_ER)
    place_RE = np.arange(hosts_ER.shape[1])[:, None] % count_E
    return copies_EC[np.arange(len(hosts_ER)), place_RE].astype(np.int32)


def copies_of(hosts_ER: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of each expert in ascending order, int64 [E, C] with what stands behind the last of
    no use, and how many there are, int64 [E]."""
    count_E = hosts_ER.sum(axis=1)
    return np.argsort(~hosts_ER, axis=1, kind="stable")[:, : count_E.max()], count_E


@dataclass(frozen=True, eq=False)
class MovingRule:
    """A rule of MOVING over one placement: which rank serves each choice of each token."""

    name: str
    hosts_LER: np.ndarray  # bool
    serving_LRE: np.ndarray  # `static_serving_LRE`

    @cached_property
    def num_ranks(self) -> int:
        return self.hosts_LER.shape[2]

    def ranks_TK(self, layer: int, ids_TK: np.ndarray, home_T: np.ndarray) -> np.ndarray:
        """Rank that serves each choice, int64 [T, K]; R for an empty slot (id E). `home_T`: where
        tokens live, whose order is taken to be theirs in the batch of each rank."""
        ids_TK, home_T = ids_TK.astype(np.int64), home_T.astype(np.int64)
        padded_RE = np.pad(self.serving_LRE[layer], ((0, 0), (0, 1)), constant_values=self.num_ranks)
        if self.name == "cover":
            parts = [slice(a, a + CHUNK) for a in range(0, len(ids_TK), CHUNK)]
            found = [cover_TK(ids_TK[p], home_T[p], self.hosts_LER[layer], padded_RE) for p in parts]
            return np.concatenate(found) if found else ids_TK
        copies_EC, count_E = copies_of(self.hosts_LER[layer])
        copies_EC = np.vstack([copies_EC, np.full_like(copies_EC[:1], self.num_ranks)])
        count_E = np.append(count_E, 1)
        if self.name == "vllm":
            number_T1 = turns_TK(np.zeros((len(ids_TK), 1), np.int64), home_T, 1)
            number_TK = (number_T1 * KNUTH) & 0xFFFFFFFF
        else:
            number_TK = turns_TK(ids_TK, home_T, len(count_E)) + home_T[:, None]
        return copies_EC[ids_TK, number_TK % count_E[ids_TK]]


def turns_TK(ids_TK: np.ndarray, home_T: np.ndarray, num_ids: int) -> np.ndarray:
    """How many choices of the same expert by tokens of the same rank come before each, int64 [T,
    K], row by row."""
    key = (home_T[:, None] * num_ids + ids_TK).reshape(-1)
    order = np.argsort(key, kind="stable")
    place = np.empty(len(key), np.int64)
    place[order] = np.arange(len(key)) - np.searchsorted(key[order], key[order])
    return place.reshape(ids_TK.shape)


def cover_TK(ids_TK: np.ndarray, home_T: np.ndarray, hosts_ER: np.ndarray, serving_RE: np.ndarray) -> np.ndarray:
    """Rank that serves each choice so that a token reaches few ranks, int64 [T, K]; greedy.

    Parameters:
        ids_TK: int64, E for an empty slot.
        home_T: int64, where each token lives.
        hosts_ER: bool [E, R].
        serving_RE: int [R, E + 1], the static rule, which decides between equals; R for an empty
            slot.
    """
    num_ranks, top_k = hosts_ER.shape[1], ids_TK.shape[1]
    padded_ER = np.vstack([hosts_ER, np.zeros((1, num_ranks), bool)])
    rank_TK = serving_RE[home_T[:, None], ids_TK].astype(np.int64)
    open_TK = (padded_ER.sum(axis=1)[ids_TK] > 1) & (rank_TK != home_T[:, None])
    rows = np.flatnonzero(open_TK.any(axis=1))  # tokens that have a choice
    ids_TK, open_TK, preferred_TK = ids_TK[rows], open_TK[rows], rank_TK[rows].copy()
    each = np.arange(len(rows))
    hosts_TKR = padded_ER[ids_TK]
    # 1. What nobody else serves is reached anyway, and so is the own rank.
    reached_TR = np.zeros((len(rows), num_ranks + 1), bool)
    reached_TR[each[:, None], np.where(open_TK, num_ranks, preferred_TK)] = True
    reached_TR[each, home_T[rows]] = True
    reached_TR[:, num_ranks] = False
    chosen_TK = preferred_TK.copy()
    for _ in range(top_k):
        # 2. Reached ranks serve what else they hold.
        able_TKR = hosts_TKR & reached_TR[:, None, :num_ranks]
        served_TK = open_TK & able_TKR.any(axis=2)
        as_preferred_TK = reached_TR[each[:, None], preferred_TK]
        chosen_TK = np.where(served_TK & ~as_preferred_TK, able_TKR.argmax(axis=2), chosen_TK)
        open_TK = open_TK & ~served_TK
        if not open_TK.any():
            break
        # 3. One more rank: that which serves most of the rest.
        votes_TR = (hosts_TKR & open_TK[:, :, None]).sum(axis=1) * (top_k + 1)
        np.add.at(
            votes_TR, (np.repeat(each, top_k), np.minimum(preferred_TK, num_ranks - 1).reshape(-1)), open_TK.reshape(-1)
        )
        reached_TR[each, votes_TR.argmax(axis=1)] |= open_TK.any(axis=1)
    # A greedy cover may reach more than the static rule does: then that stays.
    fewer_T = _num_reached_T(chosen_TK, home_T[rows], num_ranks) < _num_reached_T(preferred_TK, home_T[rows], num_ranks)
    rank_TK[rows[fewer_T]] = chosen_TK[fewer_T]
    return rank_TK


def _num_reached_T(rank_TK: np.ndarray, home_T: np.ndarray, num_ranks: int) -> np.ndarray:
    """Ranks that serve choices of each token, its own left out, int64 [T]."""
    is_reached_TR = np.zeros((len(rank_TK), num_ranks + 1), bool)
    is_reached_TR[np.arange(len(rank_TK))[:, None], rank_TK] = True
    is_reached_TR[np.arange(len(rank_TK)), home_T] = False
    return is_reached_TR[:, :num_ranks].sum(axis=1)


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
    # Every source rank sends an equal share. At first the hosts that may serve a source share it
    # evenly, so that who comes early leaves room for who comes late.
    share_E = load_E / num_ranks
    waiting_ER = _even_shares_ER(hosts_ER, topology) * share_E[:, None]
    carried_R = (hosts_ER * share_E[:, None] + waiting_ER).sum(axis=0)
    serving_RE = np.repeat(hosts_ER.argmax(axis=1)[None].astype(np.int32), num_ranks, axis=0)
    several = np.flatnonzero(hosts_ER.sum(axis=1) > 1)
    # Few hosts and many ranks: plain numbers are faster than arrays here.
    carried = carried_R.tolist()
    for e in several[np.argsort(-load_E[several], kind="stable")]:
        hosts, share = np.flatnonzero(hosts_ER[e]).tolist(), float(share_E[e])
        for host in hosts:
            carried[host] -= float(waiting_ER[e, host])
        chosen_R = list(range(num_ranks))
        others = np.flatnonzero(~hosts_ER[e]).tolist()
        if topology.num_nodes == 1:
            loads = [carried[host] for host in hosts]
            for rank in others:
                least = loads.index(min(loads))
                chosen_R[rank] = hosts[least]
                loads[least] += share
            for host, load in zip(hosts, loads, strict=True):
                carried[host] = load
        else:
            near_N = {node: [host for host in hosts if node_of_R[host] == node] for node in set(node_of_R)}
            for rank in others:
                chosen = min(near_N[node_of_R[rank]] or hosts, key=carried.__getitem__)
                chosen_R[rank] = chosen
                carried[chosen] += share
        serving_RE[:, e] = chosen_R
    return serving_RE


def _even_shares_ER(hosts_ER: np.ndarray, topology: Topology) -> np.ndarray:
    """Ranks without the expert that each host would serve if those of its node shared the ranks
    beside them evenly, and all hosts those of nodes without one, float64 [E, R]."""
    node_of_R, per_node = topology.node_of_R, topology.ranks_per_node
    hosts_EN = hosts_ER.reshape(len(hosts_ER), topology.num_nodes, per_node).sum(axis=2)
    near_EN = (per_node - hosts_EN) / np.maximum(hosts_EN, 1)
    far_E = per_node * (hosts_EN == 0).sum(axis=1) / hosts_EN.sum(axis=1)
    return hosts_ER * (near_EN[:, node_of_R] + far_E[:, None])


def served_load_R(serving_RE: np.ndarray, load_E: np.ndarray) -> np.ndarray:
    """Activations that each rank serves where every rank sends an equal share, float64 [R]."""
    num_ranks = len(serving_RE)
    share_RE = np.broadcast_to(load_E / num_ranks, serving_RE.shape)
    return np.bincount(serving_RE.reshape(-1), share_RE.reshape(-1), num_ranks)
