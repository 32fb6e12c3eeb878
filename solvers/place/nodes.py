"""Placement on nodes: experts to nodes (or routing groups to blocks of ranks), then to ranks, then
both levels together.

With rows sent once per node, remote nodes come first and remote ranks second: `place_in_nodes`
tries the two levels in turn from several starts and then swaps experts under the exact joint cost
(`NodeGains`). With rows sent once per rank, nodes only choose which ranks are neighbours:
`group_ranks` renames the ranks so that those that tokens touch together share a node, at no change
of remote ranks or load. With a matrix of costs `label_ranks` does so for what homes and touched
ranks cost each other. Whole groups: for models with group-limited routing whose placement must be a
permutation of the router, groups stay together (deepseek-v3: any other permutation changes which
experts are eligible).

Shape letters: E experts, R ranks, N blocks or nodes, G routing groups, X token kinds, K top-k, J
load vectors.
"""

import numpy as np

from semmoe.solvers.place.exact_counts import co_activation_within
from semmoe.solvers.place.partition import PAIR_WORTH, Effort, Problem, exact_value, load_limits, partition
from semmoe.solvers.place.remote_gains import RemoteGains, remote_cost, token_kinds
from semmoe.solvers.place.swap import AffinityGains, overload, swap_search

# Remote ranks within nodes that one remote node costs as much as: a row between nodes takes a
# network card's link, about an eighth of what ranks of a node have among them. Nodes then come
# first, and ranks decide between placements that are close.
NODE_WORTH = 8.0
SLACK_OF_NODES = (
    0.5,
    1.0,
)  # parts of the cap's slack that nodes use in a start: ranks inside need some, or swaps repair what is short
LABEL_STARTS = 8  # of the search for rank labels


def place_in_nodes(
    problem: Problem, num_ranks: int, num_nodes: int, effort: Effort, *, load_cap: float, seed: int, num_groups: int = 1
) -> np.ndarray:
    """Fewest remote nodes first, then remote ranks, homes at random.

    Starts: nodes first at several node caps, routing groups kept whole where they divide over the
    nodes, and the flat placement with its ranks grouped; each is refined on the joint cost, and the
    best is returned.

    Parameters:
        problem: of all ranks, without homes.
        num_ranks, num_nodes: R, N; rank r is on node r // (R / N).
        effort: of the search for nodes; ranks inside are searched less.
        load_cap: most load of a rank over the mean.
        seed: of all searches.
        num_groups: routing groups of consecutive experts.

    Returns:
        Rank of each expert, int64 [E].
    """
    # The joint swaps level what starts differ in below the nodes, so only nodes are searched at
    # length.
    short = effort._replace(spectral_starts=1, metis_seeds=1, finalists=1, polish_steps=effort.polish_steps // 3)
    options = {"load_cap": load_cap, "seed": seed}
    contiguous = num_groups > 1
    everyone = np.arange(len(problem.affinity_EE))
    starts = []
    for slack in SLACK_OF_NODES:
        nodes = restricted(problem, everyone, num_nodes, 1 + (load_cap - 1) * slack)
        node_of_E = partition(nodes, num_nodes, effort, seed=seed, contiguous=contiguous)
        starts.append(_ranks_inside(problem, node_of_E, num_ranks, num_nodes, short, **options))
    if contiguous and num_groups % num_nodes == 0:
        group_E = groups_of_experts(len(everyone), num_groups)
        nodes = restricted(problem, everyone, num_nodes, load_cap)
        node_of_E = _partition_merged(nodes, group_E, num_nodes, short, seed)[group_E]
        starts.append(_ranks_inside(problem, node_of_E, num_ranks, num_nodes, short, **options))
    flat_E = partition(problem, num_ranks, short, seed=seed, contiguous=contiguous)
    starts.append(group_ranks(flat_E, problem, num_ranks, num_nodes, effort=short, seed=seed))
    cost_XN = problem.cost_XR[:, :num_nodes]
    steps = 2 * effort.polish_steps
    refined = [polish_in_nodes(s, problem, cost_XN, steps, seed + i) for i, s in enumerate(starts)]
    return best_in_nodes(refined, problem, cost_XN)


def partition_in_blocks(
    problem: Problem, num_ranks: int, num_groups: int, effort: Effort, *, load_cap: float, seed: int
) -> np.ndarray:
    """Rank of each expert, int64 [E], with the model's routing groups of consecutive experts kept
    whole.

    More groups than ranks: each rank gets whole groups. Otherwise each group fills consecutive
    ranks, group i the i-th run of them.

    Parameters:
        problem: what it is judged by.
        num_ranks, num_groups: R, and routing groups of the model; one divides the other.
        effort: how many starts and steps.
        load_cap: most load of a rank over the mean.
        seed: of the searches.
    """
    group_E = groups_of_experts(len(problem.affinity_EE), num_groups)
    if num_groups >= num_ranks:
        return _partition_merged(problem, group_E, num_ranks, effort, seed)[group_E]
    return _ranks_inside(problem, group_E, num_ranks, num_groups, effort, load_cap=load_cap, seed=seed)


def groups_of_experts(num_experts: int, num_groups: int) -> np.ndarray:
    """Routing group of each expert, int64 [E]: groups are consecutive."""
    return np.arange(num_experts) // (num_experts // num_groups)


def group_ranks(
    rank_of_E: np.ndarray, problem: Problem, num_ranks: int, num_nodes: int, *, effort: Effort, seed: int
) -> np.ndarray:
    """The placement with its ranks renamed so that tokens touch few nodes, int64 [E]: remote ranks
    and loads stay.

    Ranks are placed on nodes as experts are on ranks, by what tokens touch together.

    Parameters:
        rank_of_E: rank of each expert, int64 [E].
        problem: what tokens touch together.
        num_ranks, num_nodes: R and N.
        effort: how many starts and steps.
        seed: of the search.
    """
    if num_nodes in (1, num_ranks):
        return rank_of_E
    free = problem._replace(
        load_JE=np.zeros((1, len(rank_of_E))),
        limit_J=np.ones(1),
        closeness_RR=np.eye(num_nodes),
        cost_XR=np.repeat(problem.cost_XR.mean(axis=1)[:, None], num_nodes, axis=1),
    )
    node_of_R = _partition_merged(free, rank_of_E, num_nodes, effort, seed, num_groups=num_ranks)
    # Ranks of a node become neighbours, in the order they had.
    label_R = np.empty(num_ranks, np.int64)
    label_R[np.argsort(node_of_R, kind="stable")] = np.arange(num_ranks)
    return label_R[rank_of_E]


def label_ranks(pairs_RR: np.ndarray, cost_RR: np.ndarray, *, seed: int) -> np.ndarray:
    """New label of each rank, int64 [R], at low summed pairs[h, r] * cost[label h, label r]:
    quadratic assignment by swaps.

    `pairs_RR`: tokens that live on h and touch r. The labels are the old ones where no others are
    cheaper.
    """
    num_ranks = len(pairs_RR)
    cost_RR = (cost_RR + cost_RR.T) / 2
    pairs_RR = (pairs_RR + pairs_RR.T).astype(np.float64)
    none_RR, free = np.zeros((num_ranks, num_ranks)), np.zeros((1, num_ranks))
    rng = np.random.default_rng([seed, 13])
    found = [np.arange(num_ranks)]
    for start in [found[0]] + [rng.permutation(num_ranks) for _ in range(LABEL_STARTS - 1)]:
        gains = AffinityGains(start, pairs_RR, none_RR, cost_RR.max() - cost_RR)
        options = {"num_ranks": num_ranks, "steps": 20 * num_ranks, "patience": 4 * num_ranks, "seed": seed}
        found.append(swap_search(gains, free, np.ones(1), **options)[0])
    costs = [float((pairs_RR * cost_RR[np.ix_(label_R, label_R)]).sum()) for label_R in found]
    return found[int(np.argmin(np.round(np.array(costs) / max(costs[0], 1e-300), 9)))]


class NodeGains:
    """Gains of all swaps on remote nodes and remote ranks together: a gain model for `swap_search`.

    `cost_XN`: cost of touching each node, summed over a kind's tokens; NODE_WORTH times as heavy as
    the problem's `cost_XR`.
    """

    def __init__(self, rank_of_E: np.ndarray, problem: Problem, cost_XN: np.ndarray) -> None:
        num_nodes = cost_XN.shape[1]
        self.per_node = problem.home_ER.shape[1] // num_nodes
        pair_EE = PAIR_WORTH * problem.affinity_EE
        no_home_EN = np.zeros((len(rank_of_E), num_nodes))
        self.ranks = RemoteGains(rank_of_E, problem.expert_ids_XK, problem.cost_XR, problem.home_ER, pair_EE)
        self.nodes = RemoteGains(rank_of_E // self.per_node, problem.expert_ids_XK, cost_XN, no_home_EN, pair_EE)
        self.rank_of_E = self.ranks.rank_of_E
        self.weight = NODE_WORTH * self.nodes.scale / self.ranks.scale
        self._refresh()

    def swap(self, e: int, f: int) -> None:
        self.ranks.swap(e, f)
        if self.nodes.rank_of_E[e] != self.nodes.rank_of_E[f]:
            self.nodes.swap(e, f)
        self._refresh()

    def _refresh(self) -> None:
        node_of_E = self.nodes.rank_of_E
        between_EE = np.where(node_of_E[:, None] == node_of_E[None, :], np.float32(0), self.nodes.gain_EE)
        self.gain_EE = (self.ranks.gain_EE + np.float32(self.weight) * between_EE) / np.float32(1 + self.weight)


def polish_in_nodes(rank_of_E: np.ndarray, problem: Problem, cost_XN: np.ndarray, steps: int, seed: int) -> np.ndarray:
    """The placement improved on the joint cost of nodes and ranks.

    Parameters:
        rank_of_E: rank of each expert, int64 [E].
        problem: what it is judged by on ranks.
        cost_XN: cost of touching each node, float [X, N], by token kind.
        steps: of the search; half of them without a gain end it.
        seed: of how long a swapped pair stays put.

    Returns:
        int64 [E].
    """
    gains = NodeGains(rank_of_E, problem, cost_XN)
    options = {"num_ranks": problem.home_ER.shape[1], "steps": steps, "patience": max(steps // 2, 20), "seed": seed}
    return swap_search(gains, problem.load_JE, problem.limit_J, **options)[0]


def best_in_nodes(candidates: list[np.ndarray], problem: Problem, cost_XN: np.ndarray) -> np.ndarray:
    """The candidate with least overload, then the highest joint value; the first among equals."""
    num_ranks, num_nodes = problem.home_ER.shape[1], cost_XN.shape[1]

    def key(rank_of_E: np.ndarray) -> tuple[float, float]:
        node_of_E = rank_of_E // (num_ranks // num_nodes)
        nodes = PAIR_WORTH * co_activation_within(node_of_E, problem.affinity_EE)
        nodes -= remote_cost(node_of_E, problem.expert_ids_XK, cost_XN)
        return -overload(rank_of_E, problem.load_JE, problem.limit_J, num_ranks), exact_value(
            rank_of_E, problem
        ) + NODE_WORTH * nodes

    keys = [key(c) for c in candidates]
    return candidates[keys.index(max(keys))]


def node_costs(problem: Problem, weight_X: np.ndarray, num_nodes: int) -> np.ndarray:
    """Cost of touching each node, float64 [X, N]: free to the share of a kind's tokens that live on
    one of its ranks.

    `weight_X`: tokens of each kind.
    """
    free_XR = weight_X[:, None] - problem.cost_XR
    return weight_X[:, None] - free_XR.reshape(len(free_XR), num_nodes, -1).sum(axis=2)


def _ranks_inside(
    problem: Problem,
    block_of_E: np.ndarray,
    num_ranks: int,
    num_blocks: int,
    effort: Effort,
    *,
    load_cap: float,
    seed: int,
) -> np.ndarray:
    """Rank of each expert, int64 [E], given its block: each block's experts split over the
    block's ranks."""
    ranks_per_block = num_ranks // num_blocks
    rank_of_E = np.empty(len(block_of_E), np.int64)
    for block in range(num_blocks):
        experts = np.flatnonzero(block_of_E == block)
        inside = restricted(problem, experts, ranks_per_block, load_cap)
        limit_J = np.maximum(problem.limit_J, load_limits(inside.load_JE, ranks_per_block, 1.0))
        inside = inside._replace(limit_J=limit_J)
        local_E = partition(inside, ranks_per_block, effort, seed=seed + block, contiguous=False)
        rank_of_E[experts] = block * ranks_per_block + local_E
    return rank_of_E


def restricted(problem: Problem, experts: np.ndarray, num_parts: int, load_cap: float) -> Problem:
    """The problem of placing only `experts` (ascending ids) on `num_parts` parts: the rest are
    empty slots.

    Parameters:
        problem: of all experts.
        experts: int64, ascending ids.
        num_parts: parts to split them into.
        load_cap: most load of a part over their mean.
    """
    num_experts = len(problem.affinity_EE)
    local_E = np.full(num_experts + 1, len(experts))
    local_E[experts] = np.arange(len(experts))
    ids_XK = local_E[problem.expert_ids_XK]
    some_X = (ids_XK < len(experts)).sum(axis=1) > 1  # one expert touches one part wherever it is
    cost_XR = np.repeat(problem.cost_XR[some_X].mean(axis=1)[:, None], num_parts, axis=1)
    load_JE = problem.load_JE[:, experts]
    return Problem(
        affinity_EE=problem.affinity_EE[np.ix_(experts, experts)],
        expert_ids_XK=ids_XK[some_X],
        cost_XR=cost_XR,
        home_ER=np.zeros((len(experts), num_parts)),
        closeness_RR=np.eye(num_parts),
        load_JE=load_JE,
        limit_J=load_limits(load_JE, num_parts, load_cap),
    )


def _partition_merged(
    problem: Problem, group_E: np.ndarray, num_parts: int, effort: Effort, seed: int, *, num_groups: int = 0
) -> np.ndarray:
    """Part of each group, int64 [G], groups being whole: a token's experts of one group count
    once. `num_groups`: G, where the last ones may be without experts."""
    num_groups = num_groups or int(group_E.max()) + 1
    member_EG = np.eye(num_groups)[group_E]
    ids_XK = np.sort(np.append(group_E, num_groups)[problem.expert_ids_XK], axis=1)
    ids_XK[:, 1:][ids_XK[:, 1:] == ids_XK[:, :-1]] = num_groups
    kinds_YK, kind_X = token_kinds(ids_XK, num_groups)
    cost_YR = np.stack([np.bincount(kind_X, c, len(kinds_YK)) for c in problem.cost_XR[:, :num_parts].T], axis=1)
    load_JG = problem.load_JE @ member_EG
    merged = Problem(
        affinity_EE=member_EG.T @ problem.affinity_EE @ member_EG,
        expert_ids_XK=kinds_YK,
        cost_XR=cost_YR,
        home_ER=np.zeros((num_groups, num_parts)),
        closeness_RR=problem.closeness_RR,
        load_JE=load_JG,
        limit_J=np.maximum(problem.limit_J, load_limits(load_JG, num_parts, 1.0)),
    )
    return partition(merged, num_parts, effort, seed=seed, contiguous=True)
