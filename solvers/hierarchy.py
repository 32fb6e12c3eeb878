"""Placement in two levels: experts to blocks of ranks (nodes, or routing groups), then to ranks inside each block.

Nodes: first the fewest remote nodes, then the fewest remote ranks within each node. Whole groups: for models with
group-limited routing whose placement must be a permutation of the router, groups stay together (deepseek-v3: any other
permutation changes which experts are eligible).

Shape letters: E experts, R ranks, N blocks, G routing groups, X token kinds, K top-k, J load vectors.
"""

import numpy as np

from solvers.partition import Effort, Problem, load_limits, partition


def partition_in_blocks(
    problem: Problem, num_ranks: int, num_blocks: int, whole_groups: bool, effort: Effort, *, load_cap: float, seed: int
) -> np.ndarray:
    """Rank of each expert, int64 [E].

    `whole_groups`: the blocks are the model's routing groups of consecutive experts. More groups than ranks: each rank
    gets whole groups. Otherwise each group fills consecutive ranks, group i the i-th run of them.
    """
    num_experts = len(problem.affinity_EE)
    if whole_groups:
        group_E = np.arange(num_experts) // (num_experts // num_blocks)
        if num_blocks >= num_ranks:
            return partition(merged(problem, group_E, num_ranks), num_ranks, effort, seed=seed, contiguous=True)[
                group_E
            ]
        block_of_E = group_E
    else:
        # Half of the slack for the nodes, so that ranks inside a full node still find room.
        nodes = restricted(problem, np.arange(num_experts), num_blocks, 1 + (load_cap - 1) / 2)
        block_of_E = partition(nodes, num_blocks, effort, seed=seed, contiguous=True)
    ranks_per_block = num_ranks // num_blocks
    rank_of_E = np.empty(num_experts, np.int64)
    for block in range(num_blocks):
        experts = np.flatnonzero(block_of_E == block)
        inside = restricted(problem, experts, ranks_per_block, load_cap)
        limit_J = np.maximum(problem.limit_J, load_limits(inside.load_JE, ranks_per_block, 1.0))
        inside = inside._replace(limit_J=limit_J)
        local_E = partition(inside, ranks_per_block, effort, seed=seed + block, contiguous=False)
        rank_of_E[experts] = block * ranks_per_block + local_E
    return rank_of_E


def restricted(problem: Problem, experts: np.ndarray, num_parts: int, load_cap: float) -> Problem:
    """The problem of placing only `experts` (ascending ids) on `num_parts` parts: the rest are empty slots."""
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


def merged(problem: Problem, group_E: np.ndarray, num_ranks: int) -> Problem:
    """The problem of placing whole groups: a token's experts of one group count once."""
    num_groups = int(group_E.max()) + 1
    member_EG = np.eye(num_groups)[group_E]
    ids_XK = np.sort(np.append(group_E, num_groups)[problem.expert_ids_XK], axis=1)
    ids_XK[:, 1:][ids_XK[:, 1:] == ids_XK[:, :-1]] = num_groups
    load_JG = problem.load_JE @ member_EG
    return Problem(
        affinity_EE=member_EG.T @ problem.affinity_EE @ member_EG,
        expert_ids_XK=ids_XK,
        cost_XR=problem.cost_XR,
        home_ER=np.zeros((num_groups, num_ranks)),
        closeness_RR=problem.closeness_RR,
        load_JE=load_JG,
        limit_J=np.maximum(problem.limit_J, load_limits(load_JG, num_ranks, 1.0)),
    )
