"""The joint method: experts placed for the tokens and requests that will be sent to them, under
exact constraints.

Experts start from co-activation (`semmoe.solvers.place.partition`); then homes and experts are
chosen in turn. Attention-TP: each token id has a home per layer, balanced and fractional, learned
from the other tokens of its id. Attention-DP: each request has one home for all layers, so layers
share their labels. What the experts are judged by follows the dispatch kind: remote ranks
(per-rank), activations away from home (per-expert), remote nodes and then ranks inside the node
(per-node).

Follows arXiv 2503.04398 in the alternation, with exact gains in place of greedy scores.

Shape letters: T tokens, L MoE layers, E experts, K top-k, R ranks, N nodes, B requests, J load
vectors, X token kinds, G routing groups, U token ids.
"""

from collections.abc import Callable, Iterator
from itertools import count
from math import comb
from typing import NamedTuple

import numpy as np

from semmoe.profiles.counts import RoutingProfile
from semmoe.profiles.errors import InputError
from semmoe.profiles.progress import Progress
from semmoe.solvers.place.align import align_labels
from semmoe.solvers.place.clusters import (
    chosen_requests,
    cluster_loads,
    request_rows,
    request_usage_LBE,
    usage_shares_BR,
)
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
from semmoe.solvers.place.request_homes import anneal_requests
from semmoe.solvers.placement import Topology
from semmoe.solvers.schedule.transport import balanced_homes, balanced_shares
from semmoe.solvers.workers import layer_map

OBJECTIVES = ("tp", "dp", "both")
# Weight of local activations, at first and later: a strong pull makes layers agree on which
# requests go where.
LOCAL_PULL = {"dp": (4.0, 2.0), "both": (0.0, 0.0)}
# Random starts of the request map.
STARTS = {"dp": {"fast": 2, "default": 8, "max": 32}, "both": {"fast": 4, "default": 16, "max": 16}}
PRIOR = 4.0  # tokens of the average id that smooth the row of a token id
HOMELESS_SHARE = 0.5  # part of the traffic taken to come from ranks that no schedule chose


class LayerTask(NamedTuple):
    """Everything that one layer's solve needs; sent to a worker process."""

    affinity_EE: np.ndarray  # int64
    load_JE: np.ndarray  # float64
    expert_ids_TK: np.ndarray  # the sample's rows, bounded by the effort
    token_index_T: np.ndarray  # int64, -1 unknown
    home_T: np.ndarray | None  # rank of each row's request, int64 [T]
    start_E: np.ndarray | None  # placement to go on from, int64 [E]
    num_ranks: int
    num_nodes: int
    cost_RR: np.ndarray | None  # of one row from rank to rank, symmetric, mean 1 between ranks
    num_groups: int
    whole_groups: bool
    per_expert: bool
    per_node: bool
    lar_weight: float
    load_cap: float
    effort: Effort
    seed: int


def place_semmoe(
    profile: RoutingProfile,
    topology: Topology,
    *,
    load_cap: float,
    seed: int,
    dispatch: str = "per-rank",
    lar_weight: float = 0.0,
    objective: str = "tp",
    robust: int = 0,
    effort: str = "default",
    expressible: str | None = None,
    processes: int = 1,
    progress: Progress | None = None,
) -> np.ndarray:
    """Rank of each expert, int64 [L, E]; independent of `processes`.

    `lar_weight`: remote ranks that one more local activation per token is worth (per-rank and
    per-node dispatch). `objective`: the schedule that will be used, one of OBJECTIVES. `robust`:
    clusters of requests that each keep the load cap (0: all requests together only). `expressible`
    "permutation": routing groups map onto whole blocks of ranks.
    """
    if objective not in OBJECTIVES:
        raise InputError(f"objective {objective!r} is none of {', '.join(OBJECTIVES)}")
    if effort not in EFFORTS:
        raise InputError(f"effort {effort!r} is none of {', '.join(EFFORTS)}")
    info, how = profile.info, EFFORTS[effort]
    if topology.num_ranks == 1:
        return np.zeros((info.num_layers, info.num_experts), np.int64)
    rows_T = sample_rows(profile.sample.num_tokens, comb(info.num_experts, info.top_k), how.token_rows, seed)
    _, index_T = profile.token_index()
    load_LJE = cluster_loads(profile, robust, seed)
    per_node = dispatch == "per-node" and topology.num_nodes > 1
    # Rows that travel once per node do not pay for pairs of ranks.
    cost_RR = None if per_node or topology.cost_RR is None else scaled_costs(topology.cost_RR)
    whole_groups = expressible == "permutation" and 1 < info.n_group
    if whole_groups:
        check_whole_groups(info.n_group, topology.num_ranks)

    def task(
        layer: int, start_E: np.ndarray | None, rows_T: np.ndarray = rows_T, home_T: np.ndarray | None = None
    ) -> LayerTask:
        return LayerTask(
            affinity_EE=profile.co_activation_LEE[layer],
            load_JE=load_LJE[layer],
            expert_ids_TK=profile.sample.expert_ids_TLK[rows_T, layer],
            token_index_T=index_T[rows_T],
            home_T=home_T,
            start_E=start_E,
            num_ranks=topology.num_ranks,
            num_nodes=topology.num_nodes,
            cost_RR=cost_RR,
            num_groups=info.n_group,
            whole_groups=whole_groups,
            per_expert=dispatch == "per-expert",
            per_node=per_node,
            lar_weight=lar_weight,
            load_cap=load_cap,
            effort=how,
            seed=seed + 1000 * layer,
        )

    layers = range(info.num_layers)
    # Requests that get homes, and their rows that the exact objective then looks at.
    requests_B = chosen_requests(profile, seed)
    homed_T, request_T = request_rows(profile.sample, requests_B)
    chosen = sample_rows(len(homed_T), comb(info.num_experts, info.top_k), how.token_rows, seed)
    homed_T, request_T = homed_T[chosen], request_T[chosen]
    weight_B = np.diff(profile.sample.starts_B1)[requests_B].astype(np.float64)
    # Where only locality counts, requests come first; where ranks touched count, experts that are
    # chosen together do.
    annealed = objective == "dp" and dispatch == "per-expert" and not whole_groups
    turns = 0 if objective == "tp" or whole_groups else max(1, 2 * how.rounds)
    count_layer = _counter(progress, info.num_layers * (turns + (not annealed)))
    with layer_map(processes, info.num_experts) as run:
        if not annealed:
            tasks = (task(layer, None) for layer in layers)
            rank_of_LE = _collect(run(solve_layer, tasks), count_layer)
        if objective == "tp" or whole_groups:
            return rank_of_LE  # whole groups leave no labels to choose
        usage_LBE = request_usage_LBE(profile.sample, requests_B, info.num_experts)
        # Tokens are sent near by each layer's grouping of ranks into nodes: for their sake it
        # stays.
        keep_nodes = topology.num_nodes > 1 and (per_node or objective == "both")
        if annealed:
            limit_LJ = np.stack([load_limits(load_JE, topology.num_ranks, load_cap) for load_JE in load_LJE])
            rank_of_LE, home_B = anneal_requests(
                usage_LBE, weight_B, load_LJE, limit_LJ, topology.num_ranks, seed=seed, starts=STARTS["dp"][effort]
            )
        else:
            rank_of_LE, home_B = align_labels(
                rank_of_LE,
                usage_LBE,
                weight_B,
                topology.num_ranks,
                num_nodes=topology.num_nodes if keep_nodes else 1,
                seed=seed,
                starts=STARTS["both"][effort],
            )
        if (cost_RR is not None or topology.num_nodes > 1) and not keep_nodes:
            far_RR = topology.node_of_R[:, None] != topology.node_of_R if cost_RR is None else cost_RR
            pairs_RR = home_pairs_RR(profile.sample.expert_ids_TLK[homed_T], rank_of_LE, home_B[request_T])
            label_R = label_ranks(pairs_RR, far_RR.astype(np.float64), seed=seed)
            rank_of_LE, home_B = label_R[rank_of_LE], label_R[home_B]
        for turn in range(turns):
            weight = max(lar_weight, LOCAL_PULL[objective][min(turn, 1) if how.rounds else 1])
            home_T = home_B[request_T]
            starts_LE = rank_of_LE
            tasks = (task(layer, starts_LE[layer], homed_T, home_T)._replace(lar_weight=weight) for layer in layers)
            rank_of_LE = _collect(run(solve_layer, tasks), count_layer)
            share_BR = usage_shares_BR(rank_of_LE, usage_LBE, topology.num_ranks)
            home_B = balanced_homes(share_BR, weight_B)
    return rank_of_LE


def home_pairs_RR(expert_ids_TLK: np.ndarray, rank_of_LE: np.ndarray, home_T: np.ndarray) -> np.ndarray:
    """Tokens that live on rank h and touch rank r, summed over layers, float64 [R, R]."""
    num_ranks = int(rank_of_LE.max()) + 1
    home_TR = np.eye(num_ranks)[home_T]
    layers = [rank_counts_TR(expert_ids_TLK[:, i], rank_of_E, num_ranks) > 0 for i, rank_of_E in enumerate(rank_of_LE)]
    return sum((home_TR.T @ touched_TR for touched_TR in layers), np.zeros((num_ranks, num_ranks)))


def _counter(progress: Progress | None, total: int) -> Callable[[], None]:
    """A function to call at every layer that is done, over all passes over the layers."""
    done = count(1)
    return (lambda: None) if progress is None else (lambda: progress(next(done), total))


def _collect(results: Iterator[np.ndarray], count_layer: Callable[[], None]) -> np.ndarray:
    placed = []
    for rank_of_E in results:
        placed.append(rank_of_E)
        count_layer()
    return np.stack(placed)


def solve_layer(task: LayerTask) -> np.ndarray:
    """Rank of each expert of one layer, int64 [E]."""
    num_ranks, num_experts = task.num_ranks, task.affinity_EE.shape[0]
    kinds_XK, kind_T = token_kinds(task.expert_ids_TK, num_experts)
    limit_J = load_limits(task.load_JE, num_ranks, task.load_cap)
    cost_XR = np.repeat(np.bincount(kind_T, minlength=len(kinds_XK)).astype(np.float64)[:, None], num_ranks, axis=1)
    no_home_ER = np.zeros((num_experts, num_ranks))
    # Co-activation is counted over all tokens, costs over the rows at hand: both in tokens of these
    # rows.
    rows_share = task.expert_ids_TK.size / max(float(np.trace(task.affinity_EE)), 1.0)
    affinity_EE = task.affinity_EE * rows_share
    problem = Problem(affinity_EE, kinds_XK, cost_XR, no_home_ER, np.eye(num_ranks), task.load_JE, limit_J)
    contiguous = task.num_groups > 1
    if task.start_E is not None:
        rank_of_E = task.start_E
    elif task.whole_groups:
        return partition_in_blocks(
            problem, num_ranks, task.num_groups, task.effort, load_cap=task.load_cap, seed=task.seed
        )
    elif task.per_node:
        rank_of_E = place_in_nodes(
            problem,
            num_ranks,
            task.num_nodes,
            task.effort,
            load_cap=task.load_cap,
            seed=task.seed,
            num_groups=task.num_groups,
        )
    else:
        rank_of_E = partition(problem, num_ranks, task.effort, seed=task.seed, contiguous=contiguous)
        if task.cost_RR is not None:
            rank_of_E = near_labels(rank_of_E, task)
        else:
            rank_of_E = group_ranks(
                rank_of_E, problem, num_ranks, task.num_nodes, effort=EFFORTS["fast"], seed=task.seed
            )
    for turn in range(max(task.effort.rounds, task.home_T is not None)):
        share_TR = home_shares(task, rank_of_E)
        judged = scheduled_problem(problem, task, kind_T, share_TR)
        better_E = refine(rank_of_E, judged, task, cost_XR[:, 0], task.seed + turn)
        if np.array_equal(better_E, rank_of_E):
            break
        rank_of_E = better_E
    return rank_of_E


def near_labels(rank_of_E: np.ndarray, task: LayerTask) -> np.ndarray:
    """The placement with its ranks renamed: what tokens touch is near where their schedule sends
    them."""
    assert task.cost_RR is not None
    share_TR = home_shares(task, rank_of_E)
    touched_TR = rank_counts_TR(task.expert_ids_TK, rank_of_E, task.num_ranks) > 0
    return label_ranks(share_TR.T @ touched_TR, task.cost_RR, seed=task.seed)[rank_of_E]


def refine(rank_of_E: np.ndarray, judged: Problem, task: LayerTask, weight_X: np.ndarray, seed: int) -> np.ndarray:
    """The placement after swaps on what tokens with homes pay; the same where that is no better.
    `weight_X`: tokens."""
    steps = task.effort.polish_steps
    if task.per_node:
        cost_XN = node_costs(judged, weight_X, task.num_nodes)
        return best_in_nodes([rank_of_E, polish_in_nodes(rank_of_E, judged, cost_XN, steps, seed)], judged, cost_XN)
    return best_polished([rank_of_E, polish(rank_of_E, judged, steps, seed)], judged, task.num_ranks)


def home_shares(task: LayerTask, rank_of_E: np.ndarray) -> np.ndarray:
    """Where each row of the task will live, float64 [T, R]: its request's rank, or the balanced
    row of its token id."""
    if task.home_T is not None:
        return np.eye(task.num_ranks)[task.home_T]
    count_TR = rank_counts_TR(task.expert_ids_TK, rank_of_E, task.num_ranks).astype(np.float64)
    known_T = task.token_index_T >= 0
    if not known_T.any():
        # No ids to go by: what a good predictor gets from earlier layers is close to the token's
        # own best rank.
        return balanced_shares(count_TR, np.ones(len(count_TR)))
    index_T = np.where(known_T, task.token_index_T, task.token_index_T.max() + 1)
    _, index_T = np.unique(index_T, return_inverse=True)
    weight_U = np.bincount(index_T).astype(np.float64)
    sum_UR = np.stack([np.bincount(index_T, column_T) for column_T in count_TR.T], axis=1)
    mean_R = count_TR.mean(axis=0)
    share_UR = balanced_shares((sum_UR + PRIOR * mean_R) / (weight_U + PRIOR)[:, None], weight_U)
    return share_UR[index_T]


def scheduled_problem(problem: Problem, task: LayerTask, kind_T: np.ndarray, share_TR: np.ndarray) -> Problem:
    """The problem with homes: touching a rank is free to the share of tokens that live there.

    Half of the cost stays that of tokens without a schedule: a placement must serve requests that
    no table foresaw.
    """
    num_kinds = len(problem.expert_ids_XK)
    free_XR = np.stack([np.bincount(kind_T, column_T, num_kinds) for column_T in share_TR.T], axis=1)
    num_experts, num_ranks = problem.home_ER.shape
    top_k = task.expert_ids_TK.shape[1]
    flat = task.expert_ids_TK.reshape(-1)
    local_ER = np.stack(
        [np.bincount(flat, np.repeat(c, top_k), num_experts + 1)[:num_experts] for c in share_TR.T], axis=1
    )
    if task.per_expert:
        # One row per activation: locality alone counts; a little remote cost, and pairs, decide
        # between equals.
        cost_XR, pairs_EE = 0.1 * (problem.cost_XR - free_XR), 0.1 * problem.affinity_EE
        worth_ER = local_ER if task.cost_RR is None else -local_ER @ task.cost_RR
        return problem._replace(cost_XR=cost_XR, home_ER=worth_ER, affinity_EE=pairs_EE)
    # Node first is for every kind of traffic: homes of requests decide over half of the cost only.
    kept = HOMELESS_SHARE if task.home_T is None or task.per_node else 0.0
    cost_XR = problem.cost_XR - (1 - kept) * free_XR
    if task.cost_RR is not None:
        # A rank costs what it is away from the home: on average over all ranks where no schedule
        # chose one.
        away_RR = task.cost_RR * num_ranks / (num_ranks - 1)
        cost_XR = kept * problem.cost_XR * away_RR.mean(axis=0) + (1 - kept) * free_XR @ task.cost_RR
    return problem._replace(cost_XR=cost_XR, home_ER=task.lar_weight * local_ER)


def rank_counts_TR(expert_ids_TK: np.ndarray, rank_of_E: np.ndarray, num_ranks: int) -> np.ndarray:
    """Experts of each row on each rank, int64 [T, R]."""
    rank_TK = np.append(rank_of_E, num_ranks)[expert_ids_TK]
    keys_TK = np.arange(len(rank_TK))[:, None] * (num_ranks + 1) + rank_TK
    counts = np.bincount(keys_TK.reshape(-1), minlength=len(rank_TK) * (num_ranks + 1))
    return counts.reshape(len(rank_TK), num_ranks + 1)[:, :num_ranks]


def sample_rows(num_tokens: int, num_sets: int, max_rows: int, seed: int) -> np.ndarray:
    """Rows that the exact objective looks at, ascending int64: all, or a random choice.

    `num_sets`: expert sets there are at all. Few of them merge into few token kinds, so many more
    rows cost no more.
    """
    allowed = 16 * max_rows if num_sets <= 2 * max_rows else max_rows
    if num_tokens <= allowed:
        return np.arange(num_tokens)
    return np.sort(np.random.default_rng([seed, 7]).choice(num_tokens, allowed, replace=False))


def scaled_costs(cost_RR: np.ndarray) -> np.ndarray:
    """Costs both ways together, symmetric float64 [R, R], of mean 1 between different ranks."""
    cost_RR = (cost_RR + cost_RR.T) / 2
    off = ~np.eye(len(cost_RR), dtype=bool)
    return cost_RR / max(float(cost_RR[off].mean()), 1e-300)


def check_whole_groups(num_groups: int, num_ranks: int) -> None:
    """Raise InputError where a permutation of the router cannot express any placement but the
    contiguous one."""
    if num_groups % num_ranks and num_ranks % num_groups:
        raise InputError(f"{num_groups} routing groups over {num_ranks} ranks: neither number divides the other")
