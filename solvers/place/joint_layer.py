"""One layer of the joint method: a first placement of its experts, and better ones once its tokens
have homes.

A first placement looks at what tokens use together (`semmoe.solvers.place.partition`): whole
routing groups, nodes before ranks, or ranks before nodes. Then homes and experts are chosen in
turn. A token lives on its request's rank where that is known; else each token id has a home,
balanced and fractional, learned from the other tokens of its id. What experts are judged by follows
the dispatch kind: remote ranks (per-rank), activations away from home (per-expert), remote nodes
and then ranks inside the node (per-node).

Follows arXiv 2503.04398 in the alternation, with exact gains in place of greedy scores.

Shape letters: T tokens, E experts, K top-k, R ranks, J load vectors, X token kinds, U token ids.
"""

from typing import NamedTuple

import numpy as np

from semmoe.solvers.place.nodes import (
    best_in_nodes,
    group_ranks,
    label_ranks,
    node_costs,
    partition_in_blocks,
    place_in_nodes,
    polish_in_nodes,
)
from semmoe.solvers.place.partition import EFFORTS, Effort, Problem, best_polished, load_limits, partition, polish
from semmoe.solvers.place.remote_gains import token_kinds
from semmoe.solvers.placement import Topology
from semmoe.solvers.schedule.transport import balanced_shares

PRIOR = 4.0  # tokens of the average id that smooth the row of a token id
HOMELESS_SHARE = 0.5  # part of the traffic taken to come from ranks that no schedule chose
TIE_SHARE = 0.1  # of remote cost and pairs beside activations at home: they decide between equals


class Layer(NamedTuple):
    """What one layer is placed for; sent to a worker process."""

    affinity_EE: np.ndarray  # int64: tokens that chose both experts; the diagonal is the load
    load_JE: np.ndarray  # float64
    expert_ids_TK: np.ndarray  # the sample's rows, bounded by the effort; E = empty slot
    token_index_T: np.ndarray  # int64, -1 unknown
    seed: int
    num_groups: int  # routing groups of the model, each of consecutive experts
    home_T: np.ndarray | None = None  # rank of each row's request, int64 [T]
    start_E: np.ndarray | None = None  # placement to go on from, int64 [E]


class Network(NamedTuple):
    """Where experts go, and what rows between them cost; the same for all layers."""

    num_ranks: int
    num_nodes: int
    cost_RR: np.ndarray | None  # of one row from rank to rank, symmetric, mean 1 between ranks
    per_expert: bool  # a row for every activation
    per_node: bool  # a row for every node, of several, that a token touches

    @classmethod
    def of(cls, topology: Topology, dispatch: str) -> "Network":
        per_node = dispatch == "per-node" and topology.num_nodes > 1
        # Rows that travel once per node do not pay for pairs of ranks.
        cost_RR = None if per_node or topology.cost_RR is None else scaled_costs(topology.cost_RR)
        return cls(topology.num_ranks, topology.num_nodes, cost_RR, dispatch == "per-expert", per_node)


class Search(NamedTuple):
    """How a layer is searched, and what counts."""

    effort: Effort
    load_cap: float
    lar_weight: float  # remote ranks that one more local activation per token is worth


def blocks_of_groups(layer: Layer, network: Network, search: Search) -> np.ndarray:
    """Rank of each expert, int64 [E]: routing groups kept whole, on whole blocks of ranks."""
    options = {"load_cap": search.load_cap, "seed": layer.seed}
    problem = _counted(layer, network, search).problem
    return partition_in_blocks(problem, network.num_ranks, layer.num_groups, search.effort, **options)


def nodes_then_ranks(layer: Layer, network: Network, search: Search) -> np.ndarray:
    """Rank of each expert, int64 [E]: fewest remote nodes, then fewest remote ranks, then homes of
    token ids."""
    counted = _counted(layer, network, search)
    options = {"load_cap": search.load_cap, "seed": layer.seed, "num_groups": layer.num_groups}
    rank_of_E = place_in_nodes(counted.problem, network.num_ranks, network.num_nodes, search.effort, **options)
    return _with_homes(rank_of_E, counted, layer, network, search)


def ranks_then_nodes(layer: Layer, network: Network, search: Search) -> np.ndarray:
    """Rank of each expert, int64 [E]: fewest remote ranks, those touched together near each other,
    then homes of token ids."""
    counted, num_ranks = _counted(layer, network, search), network.num_ranks
    contiguous = layer.num_groups > 1
    rank_of_E = partition(counted.problem, num_ranks, search.effort, seed=layer.seed, contiguous=contiguous)
    if network.cost_RR is not None:
        share_TR = home_shares(layer, rank_of_E, num_ranks)
        touched_TR = rank_counts_TR(layer.expert_ids_TK, rank_of_E, num_ranks) > 0
        rank_of_E = label_ranks(share_TR.T @ touched_TR, network.cost_RR, seed=layer.seed)[rank_of_E]
    else:
        options = {"effort": EFFORTS["fast"], "seed": layer.seed}
        rank_of_E = group_ranks(rank_of_E, counted.problem, num_ranks, network.num_nodes, **options)
    return _with_homes(rank_of_E, counted, layer, network, search)


def from_start(layer: Layer, network: Network, search: Search) -> np.ndarray:
    """Rank of each expert, int64 [E]: the layer's start, bettered for where its requests live."""
    assert layer.start_E is not None
    return _with_homes(layer.start_E, _counted(layer, network, search), layer, network, search)


class _Counted(NamedTuple):
    """A layer's rows counted: the problem without homes, the kind of each row, int64 [T], and rows
    of each kind, float64 [X]."""

    problem: Problem
    kind_T: np.ndarray
    weight_X: np.ndarray


def _counted(layer: Layer, network: Network, search: Search) -> _Counted:
    num_ranks, num_experts = network.num_ranks, len(layer.affinity_EE)
    kinds_XK, kind_T = token_kinds(layer.expert_ids_TK, num_experts)
    weight_X = np.bincount(kind_T, minlength=len(kinds_XK)).astype(np.float64)
    # Co-activation is counted over all tokens, costs over the rows at hand: both in tokens of these
    # rows.
    rows_share = layer.expert_ids_TK.size / max(float(np.trace(layer.affinity_EE)), 1.0)
    problem = Problem(
        affinity_EE=layer.affinity_EE * rows_share,
        expert_ids_XK=kinds_XK,
        cost_XR=np.repeat(weight_X[:, None], num_ranks, axis=1),
        home_ER=np.zeros((num_experts, num_ranks)),
        closeness_RR=np.eye(num_ranks),
        load_JE=layer.load_JE,
        limit_J=load_limits(layer.load_JE, num_ranks, search.load_cap),
    )
    return _Counted(problem, kind_T, weight_X)


def _with_homes(rank_of_E: np.ndarray, counted: _Counted, layer: Layer, network: Network, search: Search) -> np.ndarray:
    """The placement after turns of homes and experts, until nothing changes: one turn at least
    where requests have homes."""
    for turn in range(max(search.effort.rounds, layer.home_T is not None)):
        # Step 1: where tokens live, given the experts.
        share_TR = home_shares(layer, rank_of_E, network.num_ranks)
        # Step 2: experts, given where tokens live.
        judged = _judged(counted, layer, network, search, share_TR)
        better_E = _refined(rank_of_E, judged, counted.weight_X, network, search.effort.polish_steps, layer.seed + turn)
        if np.array_equal(better_E, rank_of_E):
            break
        rank_of_E = better_E
    return rank_of_E


def home_shares(layer: Layer, rank_of_E: np.ndarray, num_ranks: int) -> np.ndarray:
    """Where each row of the layer will live, float64 [T, R]: its request's rank, or the balanced
    row of its token id."""
    if layer.home_T is not None:
        return np.eye(num_ranks)[layer.home_T]
    count_TR = rank_counts_TR(layer.expert_ids_TK, rank_of_E, num_ranks).astype(np.float64)
    known_T = layer.token_index_T >= 0
    if not known_T.any():
        # No ids to go by: what a good predictor gets from earlier layers is close to the token's
        # own best rank.
        return balanced_shares(count_TR, np.ones(len(count_TR)))
    index_T = np.where(known_T, layer.token_index_T, layer.token_index_T.max() + 1)
    _, index_T = np.unique(index_T, return_inverse=True)
    weight_U = np.bincount(index_T).astype(np.float64)
    sum_UR = np.stack([np.bincount(index_T, column_T) for column_T in count_TR.T], axis=1)
    mean_R = count_TR.mean(axis=0)
    share_UR = balanced_shares((sum_UR + PRIOR * mean_R) / (weight_U + PRIOR)[:, None], weight_U)
    return share_UR[index_T]


def _judged(counted: _Counted, layer: Layer, network: Network, search: Search, share_TR: np.ndarray) -> Problem:
    """The problem with homes: touching a rank is free to the share of tokens that live there.

    Half of the cost stays that of tokens without a schedule: a placement must serve requests that
    no table foresaw.
    """
    problem, cost_RR = counted.problem, network.cost_RR
    num_kinds, num_ranks = problem.cost_XR.shape
    free_XR = np.stack([np.bincount(counted.kind_T, column_T, num_kinds) for column_T in share_TR.T], axis=1)
    local_ER = _activations_ER(layer.expert_ids_TK, share_TR, len(problem.affinity_EE))
    if network.per_expert:
        # One row per activation: locality alone counts.
        worth_ER = local_ER if cost_RR is None else -local_ER @ cost_RR
        cost_XR, pairs_EE = TIE_SHARE * (problem.cost_XR - free_XR), TIE_SHARE * problem.affinity_EE
        return problem._replace(cost_XR=cost_XR, home_ER=worth_ER, affinity_EE=pairs_EE)
    # Node first is for every kind of traffic: homes of requests decide over half of the cost only.
    kept = HOMELESS_SHARE if layer.home_T is None or network.per_node else 0.0
    cost_XR = problem.cost_XR - (1 - kept) * free_XR
    if cost_RR is not None:
        # A rank costs what it is away from the home: on average over all ranks where no schedule
        # chose one.
        away_RR = cost_RR * num_ranks / (num_ranks - 1)
        cost_XR = kept * problem.cost_XR * away_RR.mean(axis=0) + (1 - kept) * free_XR @ cost_RR
    return problem._replace(cost_XR=cost_XR, home_ER=search.lar_weight * local_ER)


def _refined(
    rank_of_E: np.ndarray, judged: Problem, weight_X: np.ndarray, network: Network, steps: int, seed: int
) -> np.ndarray:
    """The placement after swaps on what tokens with homes pay; the same where that is no better."""
    if network.per_node:
        cost_XN = node_costs(judged, weight_X, network.num_nodes)
        return best_in_nodes([rank_of_E, polish_in_nodes(rank_of_E, judged, cost_XN, steps, seed)], judged, cost_XN)
    return best_polished([rank_of_E, polish(rank_of_E, judged, steps, seed)], judged, network.num_ranks)


def _activations_ER(expert_ids_TK: np.ndarray, share_TR: np.ndarray, num_experts: int) -> np.ndarray:
    """Activations of each expert by tokens that live on each rank, float64 [E, R]."""
    flat, top_k = expert_ids_TK.reshape(-1), expert_ids_TK.shape[1]
    columns = [np.bincount(flat, np.repeat(c, top_k), num_experts + 1)[:num_experts] for c in share_TR.T]
    return np.stack(columns, axis=1)


def rank_counts_TR(expert_ids_TK: np.ndarray, rank_of_E: np.ndarray, num_ranks: int) -> np.ndarray:
    """Experts of each row on each rank, int64 [T, R]."""
    rank_TK = np.append(rank_of_E, num_ranks)[expert_ids_TK]
    keys_TK = np.arange(len(rank_TK))[:, None] * (num_ranks + 1) + rank_TK
    counts = np.bincount(keys_TK.reshape(-1), minlength=len(rank_TK) * (num_ranks + 1))
    return counts.reshape(len(rank_TK), num_ranks + 1)[:, :num_ranks]


def scaled_costs(cost_RR: np.ndarray) -> np.ndarray:
    """Costs both ways together, symmetric float64 [R, R], of mean 1 between different ranks."""
    cost_RR = (cost_RR + cost_RR.T) / 2
    off = ~np.eye(len(cost_RR), dtype=bool)
    return cost_RR / max(float(cost_RR[off].mean()), 1e-300)
