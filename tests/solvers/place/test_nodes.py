"""Nodes: exact joint gains, ranks grouped at no cost, two-level structure found, routing groups
kept together where that pays."""

import numpy as np
import pytest

from semmoe.profiles.counts import RoutingProfile, count_batches
from semmoe.profiles.trace import TraceBatch, TraceInfo
from semmoe.solvers.demands import Demands
from semmoe.solvers.place.exact_counts import co_activation_within
from semmoe.solvers.place.graph import place_metis
from semmoe.solvers.place.joint import place_semmoe
from semmoe.solvers.place.joint_layer import scaled_costs
from semmoe.solvers.place.nodes import (
    NODE_WORTH,
    NodeGains,
    best_in_nodes,
    group_ranks,
    label_ranks,
    node_costs,
    partition_in_blocks,
    polish_in_nodes,
)
from semmoe.solvers.place.partition import EFFORTS, PAIR_WORTH, Problem
from semmoe.solvers.place.remote_gains import remote_cost
from semmoe.solvers.place.solve import METHODS
from semmoe.solvers.placement import Topology


def placed(profile: RoutingProfile, topology: Topology, objective: str = "tp", **demands) -> np.ndarray:
    """Rank of each expert by the joint method, int64 [L, E]."""
    return place_semmoe(profile, topology, Demands(objective=objective, **demands)).placement.rank_of_LE


def problem_of(ids_TK: np.ndarray, num_experts: int, num_ranks: int, limit: float = np.inf) -> Problem:
    num_tokens = len(ids_TK)
    member_TE = np.zeros((num_tokens, num_experts + 1))
    member_TE[np.arange(num_tokens)[:, None], ids_TK] = 1
    affinity_EE = member_TE[:, :num_experts].T @ member_TE[:, :num_experts]
    return Problem(
        affinity_EE,
        ids_TK,
        np.ones((num_tokens, num_ranks)),
        np.zeros((num_experts, num_ranks)),
        np.eye(num_ranks),
        np.diagonal(affinity_EE)[None].copy(),
        np.array([limit]),
    )


def profile_of(ids_TK: np.ndarray, num_experts: int, n_group: int = 1, num_requests: int = 4) -> RoutingProfile:
    num_tokens, top_k = ids_TK.shape
    starts_B1 = np.linspace(0, num_tokens, num_requests + 1).astype(np.int64)
    zeros = np.zeros(num_requests, np.int64)
    batch = TraceBatch(
        [str(b) for b in range(num_requests)], [""] * num_requests, starts_B1, ids_TK[:, None].astype(np.uint8),
        np.full(num_tokens, -1, np.int32), np.zeros(num_tokens, bool), zeros, zeros,
        np.zeros(num_requests + 1, np.int64), np.zeros(0, np.int32),
    )  # fmt: skip
    info = TraceInfo("made-up", 1, num_experts, top_k, (0,), n_group=n_group, topk_group=n_group)
    _, load_LE, co_activation_LEE = count_batches([batch], info)
    return RoutingProfile(info, num_tokens, load_LE, co_activation_LEE, batch)


def two_level_tokens(rng: np.random.Generator, num_tokens: int = 1200) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of 16 experts, most with all three in one quartet, the others with one in its
    sister. Quartet of each expert."""
    quartet_E = rng.permutation(np.repeat(np.arange(4), 4))
    members = [np.flatnonzero(quartet_E == q) for q in range(4)]
    ids = []
    for _ in range(num_tokens):
        q = int(rng.integers(4))
        own = rng.choice(members[q], 3, replace=False).tolist()
        ids.append(own if rng.random() < 0.7 else [*own[:2], rng.choice(members[q ^ 1])])
    return np.sort(np.array(ids), axis=1), quartet_E


def test_joint_gains_are_exact() -> None:
    rng = np.random.default_rng(0)
    ids_TK = np.stack([rng.permutation(13)[:4] for _ in range(60)])  # 12 is an empty slot
    problem = problem_of(ids_TK, 12, 6)._replace(cost_XR=rng.random((60, 6)), home_ER=rng.random((12, 6)))
    cost_XN = rng.random((60, 3))
    rank_of_E = rng.permutation(np.repeat(np.arange(6), 2))

    def value(rank_of_E: np.ndarray) -> float:
        def level(part_of_E: np.ndarray, cost: np.ndarray) -> float:
            pairs = PAIR_WORTH * co_activation_within(part_of_E, problem.affinity_EE)
            return pairs - remote_cost(part_of_E, ids_TK, cost)

        home = problem.home_ER[np.arange(12), rank_of_E].sum()
        return home + level(rank_of_E, problem.cost_XR) + NODE_WORTH * level(rank_of_E // 2, cost_XN)

    gains = NodeGains(rank_of_E, problem, cost_XN)
    for _ in range(12):
        unit = gains.ranks.scale * (1 + gains.weight)
        before = value(gains.rank_of_E)
        for e, f in [(0, 1), (2, 9), (3, 11), (7, 4)]:
            swapped_E = gains.rank_of_E.copy()
            swapped_E[[e, f]] = swapped_E[[f, e]]
            if gains.rank_of_E[e] == gains.rank_of_E[f]:
                assert gains.gain_EE[e, f] == -np.inf
            else:
                assert gains.gain_EE[e, f] * unit == pytest.approx(value(swapped_E) - before, abs=1e-3)
        e, f = rng.choice(12, 2, replace=False)
        if gains.rank_of_E[e] != gains.rank_of_E[f]:
            gains.swap(int(e), int(f))


def test_ranks_that_tokens_touch_together_share_a_node() -> None:
    # Ranks 0 and 3 are touched together, and 1 and 2.
    rank_of_E = np.array([0, 0, 1, 1, 2, 2, 3, 3])
    ids_TK = np.array([[0, 6], [1, 7], [1, 6], [2, 4], [3, 5], [3, 4]] * 5)
    grouped_E = group_ranks(rank_of_E, problem_of(ids_TK, 8, 4), 4, 2, effort=EFFORTS["fast"], seed=0)
    node_of_rank = {int(old): int(new) // 2 for old, new in zip(rank_of_E, grouped_E, strict=True)}
    assert node_of_rank[0] == node_of_rank[3] != node_of_rank[1] == node_of_rank[2]
    assert sorted(grouped_E.tolist()) == sorted(rank_of_E.tolist())
    assert group_ranks(rank_of_E, problem_of(ids_TK, 8, 4), 4, 1, effort=EFFORTS["fast"], seed=0) is rank_of_E


def test_labels_bring_homes_near_what_they_touch() -> None:
    pairs_RR = np.array([[50, 1, 9, 0], [1, 50, 0, 9], [9, 0, 50, 1], [0, 9, 1, 50.0]])
    near_RR = np.array([[0, 1, 8, 8], [1, 0, 8, 8], [8, 8, 0, 1], [8, 8, 1, 0.0]])
    label_R = label_ranks(pairs_RR, near_RR, seed=0)
    assert label_R[0] // 2 == label_R[2] // 2 != label_R[1] // 2 == label_R[3] // 2
    assert label_ranks(pairs_RR, 1 - np.eye(4), seed=0).tolist() == [0, 1, 2, 3]  # all the same: nothing is renamed


def test_a_node_is_free_to_those_who_live_there() -> None:
    problem = problem_of(np.array([[0, 1]]), 4, 4)._replace(cost_XR=np.array([[10 - 4, 10 - 1, 10, 10 - 5.0]]))
    assert node_costs(problem, np.array([10.0]), 2).tolist() == [[5.0, 5.0]]


@pytest.mark.parametrize("seed", range(2))
def test_two_levels_are_found(seed: int) -> None:
    ids_TK, quartet_E = two_level_tokens(np.random.default_rng(seed))
    profile = profile_of(ids_TK, 16)
    for dispatch in ("per-node", "per-rank", "per-expert"):
        rank_of_E = placed(profile, Topology(4, 2), load_cap=1.3, seed=0, dispatch=dispatch, effort="fast")[0]
        pairs = set(zip(rank_of_E.tolist(), quartet_E.tolist(), strict=True))
        assert len(pairs) == 4  # quartets on ranks
        assert len({(rank // 2, quartet // 2) for rank, quartet in pairs}) == 2  # their pairs on nodes
    metis_E = place_metis(
        profile.co_activation_LEE, profile.load_LE, 4, load_cap=1.3, seed=0, num_seeds=3, num_nodes=2
    )[0]
    assert len(set(zip((metis_E // 2).tolist(), (quartet_E // 2).tolist(), strict=True))) == 2


def test_grouping_costs_no_remote_rank() -> None:
    rng = np.random.default_rng(3)
    ids_TK = np.stack([rng.choice(32, 4, replace=False, p=np.arange(1, 33) / 528) for _ in range(1500)])
    profile = profile_of(ids_TK, 32)
    touched = {}
    for nodes in (1, 4):
        rank_of_E = placed(profile, Topology(8, nodes), load_cap=1.1, seed=0, effort="fast")[0]
        touched[nodes] = remote_cost(rank_of_E, ids_TK, np.ones((1500, 8)))
        touched[nodes, "node"] = remote_cost(rank_of_E // 2, ids_TK, np.ones((1500, 4)))
    assert touched[1] == touched[4]
    assert touched[4, "node"] <= touched[1, "node"]
    first_E = placed(profile, Topology(8, 4), load_cap=1.1, seed=0, effort="fast", dispatch="per-node")[0]
    assert remote_cost(first_E // 2, ids_TK, np.ones((1500, 4))) <= touched[4, "node"]


def test_joint_swaps_trade_ranks_for_nodes() -> None:
    # Nodes {0-3} and {4-7} hold every token; the start splits all of them.
    ids_TK = np.array([[0, 1], [2, 3], [0, 3], [4, 5], [6, 7], [5, 6]] * 4)
    problem = problem_of(ids_TK, 8, 4)
    start_E, cost_XN = np.array([0, 2, 1, 3, 0, 2, 1, 3]), np.ones((24, 2))
    better_E = polish_in_nodes(start_E, problem, cost_XN, 40, 0)
    assert remote_cost(better_E // 2, ids_TK, cost_XN) == 24
    assert best_in_nodes([start_E, better_E], problem, cost_XN) is better_E


def test_whole_groups_fill_blocks() -> None:
    rng = np.random.default_rng(1)
    ids_TK = np.stack([rng.choice(16, 3, replace=False) for _ in range(200)])
    rank_of_E = partition_in_blocks(problem_of(ids_TK, 16, 8, 1e9), 8, 4, EFFORTS["fast"], load_cap=2.0, seed=0)
    assert (rank_of_E.reshape(4, 4) // 2 == np.arange(4)[:, None]).all()


def test_load_goes_by_groups_to_nodes() -> None:
    # Groups {0,1} .. {6,7} of loads 10, 10, 1, 1: a heavy and a light one on each node, whole.
    profile = profile_of(np.array([[0, 1], [2, 3], [0, 1], [2, 3], [4, 5], [6, 7]]), 8, n_group=4)
    rank_of_E = METHODS["load"](profile, Topology(4, 2), Demands(), None).placement.rank_of_LE[0]
    node_G = (rank_of_E // 2).reshape(4, 2)
    assert (node_G[:, 0] == node_G[:, 1]).all()
    assert node_G[0, 0] != node_G[1, 0] and node_G[2, 0] != node_G[3, 0]


def test_costs_are_scaled_to_a_mean_of_one() -> None:
    assert scaled_costs(np.array([[0, 2, 4], [2, 0, 6], [8, 6, 0.0]])).round(4).tolist() == [
        [0, 0.4286, 1.2857], [0.4286, 0, 1.2857], [1.2857, 1.2857, 0],
    ]  # fmt: skip


def test_far_links_are_used_less_where_costs_are_given() -> None:
    ids_TK, quartet_E = two_level_tokens(np.random.default_rng(5))
    near_RR = np.array([[0, 9, 1, 9], [9, 0, 9, 1], [1, 9, 0, 9], [9, 1, 9, 0.0]])  # ranks 0 and 2 are near, 1 and 3
    for objective in ("tp", "both"):
        profile = profile_of(ids_TK, 16)
        rank_of_E = placed(profile, Topology(4, 1, near_RR), load_cap=1.3, seed=0, objective=objective)[0]
        pairs = set(zip(rank_of_E.tolist(), quartet_E.tolist(), strict=True))
        assert len(pairs) == 4
        assert len({(rank % 2, quartet // 2) for rank, quartet in pairs}) == 2
