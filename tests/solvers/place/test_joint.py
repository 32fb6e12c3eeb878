"""The joint method: planted structure, exact constraints under every option, no dependence on the
number of processes."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from semmoe.profiles.counts import RoutingProfile, count_batches
from semmoe.profiles.errors import InputError
from semmoe.profiles.sample import select_requests
from semmoe.profiles.synthetic import SyntheticWorld, plant_structure, synthetic_requests
from semmoe.profiles.trace import TraceBatch, TraceInfo
from semmoe.solvers.demands import Demands
from semmoe.solvers.place.exact import place_exact
from semmoe.solvers.place.exact_counts import resampled_loads
from semmoe.solvers.place.graph import place_metis
from semmoe.solvers.place.joint import chosen_stages, place_semmoe, sample_rows
from semmoe.solvers.place.paper import place_paper
from semmoe.solvers.place.partition import EFFORTS, Problem, load_limits, partition
from semmoe.solvers.place.remote_gains import remote_cost
from semmoe.solvers.place.request_homes import align_labels, anneal_requests, best_labels
from semmoe.solvers.place.swap import overload
from semmoe.solvers.placement import Topology

GROUPS = 4


def placed(profile: RoutingProfile, topology: Topology, objective: str = "tp", **demands) -> np.ndarray:
    """Rank of each expert by the joint method, int64 [L, E]."""
    return place_semmoe(profile, topology, Demands(objective=objective, **demands)).placement.rank_of_LE


@cache
def planted(noise: float = 0.05, n_group: int = 1, tokens: bool = True) -> tuple[RoutingProfile, np.ndarray]:
    """Profile of 24 requests of a planted model (3 layers, 16 experts, top-3), and its groups
    [L, E]."""
    sizes = {"num_layers": 3, "num_experts": 16, "top_k": 3, "num_groups": GROUPS, "num_domains": GROUPS}
    world = SyntheticWorld(**sizes, num_requests=24, tokens_per_request=80, vocab_size=300, noise=noise, seed=1)
    structure = plant_structure(world)
    requests = list(synthetic_requests(structure, replace(world, seed=2)))
    lengths = np.array([len(r.expert_ids_TLK) for r in requests])
    starts_B1 = np.concatenate([[0], np.cumsum(lengths)])
    token_ids_T = np.concatenate([r.token_ids[: len(r.expert_ids_TLK)] for r in requests])
    batch = TraceBatch(
        request_ids=[r.request_id for r in requests],
        domains=[r.domain for r in requests],
        starts_B1=starts_B1,
        expert_ids_TLK=np.concatenate([r.expert_ids_TLK for r in requests]).astype(np.uint8),
        token_ids_T=token_ids_T if tokens else np.full(len(token_ids_T), -1, np.int32),
        is_prompt_T=np.zeros(len(token_ids_T), bool),
        num_prompt_tokens_B=lengths // 2,
        first_position_B=np.zeros(24, np.int64),
        sequence_starts_B1=starts_B1,
        sequences=token_ids_T,
    )
    info = TraceInfo("planted", 3, 16, 3, (0, 1, 2), n_group=n_group, topk_group=max(1, n_group // 2))
    num_tokens, load_LE, co_activation_LEE = count_batches([batch], info)
    return RoutingProfile(info, num_tokens, load_LE, co_activation_LEE, batch), structure.group_of_LE


def is_exact(rank_of_LE: np.ndarray, num_ranks: int) -> bool:
    size = rank_of_LE.shape[1] // num_ranks
    return all((np.bincount(rank_of_E, minlength=num_ranks) == size).all() for rank_of_E in rank_of_LE)


@pytest.mark.parametrize(
    ("objective", "dispatch", "nodes", "stages"),
    [
        ("tp", "per-rank", 2, ["ranks"]),
        ("tp", "per-node", 2, ["nodes"]),
        ("tp", "per-node", 1, ["ranks"]),
        ("dp", "per-expert", 1, ["anneal", "strong turn", "turn"]),
        ("dp", "per-expert", 2, ["anneal", "near", "strong turn", "turn"]),
        ("dp", "per-rank", 2, ["ranks", "labels", "near", "strong turn", "turn"]),
        ("dp", "per-node", 2, ["nodes", "labels in nodes", "strong turn", "turn"]),
        ("both", "per-rank", 1, ["ranks", "labels", "strong turn", "turn"]),
        ("both", "per-rank", 2, ["ranks", "labels in nodes", "strong turn", "turn"]),
    ],
)
def test_stages_follow_objective_dispatch_and_groups(
    objective: str, dispatch: str, nodes: int, stages: list[str]
) -> None:
    demands = Demands(objective=objective, dispatch=dispatch)
    assert chosen_stages(demands, Topology(4, nodes), 8) == stages
    quick = [name for name in stages if name != "strong turn"]
    assert chosen_stages(replace(demands, effort="fast"), Topology(4, nodes), 8) == quick
    whole = replace(demands, expressible="permutation")
    assert chosen_stages(whole, Topology(4, nodes), 8) == ["blocks"]
    assert chosen_stages(whole, Topology(4, nodes), 1) == stages  # no groups to keep whole
    costs = Topology(4, 1, np.ones((4, 4)) - np.eye(4))
    if nodes == 1 and objective != "tp":
        assert "near" in chosen_stages(demands, costs, 8)


@pytest.mark.parametrize("effort", ["fast", "default"])
def test_planted_groups_are_found(effort: str) -> None:
    profile, group_of_LE = planted()
    rank_of_LE = placed(profile, Topology(4), load_cap=1.5, seed=0, effort=effort)
    assert is_exact(rank_of_LE, 4)
    for rank_of_E, group_of_E in zip(rank_of_LE, group_of_LE, strict=True):
        assert len(set(zip(rank_of_E.tolist(), group_of_E.tolist(), strict=True))) == GROUPS


@pytest.mark.parametrize(
    "options",
    [
        {"dispatch": "per-expert"},
        {"dispatch": "per-node"},
        {"lar_weight": 0.5},
        {"objective": "dp"},
        {"objective": "both", "dispatch": "per-node"},
        {"robust": 3},
    ],
)
@pytest.mark.parametrize("tokens", [True, False])
def test_every_option_keeps_counts_and_cap(options: dict, tokens: bool) -> None:
    profile, _ = planted(noise=0.3, tokens=tokens)
    rank_of_LE = placed(profile, Topology(4, 2), load_cap=1.15, seed=0, effort="fast", **options)
    assert is_exact(rank_of_LE, 4)
    load_LJE = resampled_loads(profile, options.get("robust", 0), 0)
    for rank_of_E, load_JE in zip(rank_of_LE, load_LJE, strict=True):
        assert overload(rank_of_E, load_JE[:1], load_limits(load_JE[:1], 4, 1.15), 4) == 0
    again = placed(profile, Topology(4, 2), load_cap=1.15, seed=0, effort="fast", **options)
    assert np.array_equal(rank_of_LE, again)


def test_a_cost_matrix_puts_groups_on_near_ranks() -> None:
    profile, group_of_LE = planted()
    cost_RR = np.array([[0, 9, 1, 9], [9, 0, 9, 1], [1, 9, 0, 9], [9, 1, 9, 0]], float)
    # Eight ranks' worth of experts per group would not fit; two groups per pair of near ranks do.
    rank_of_LE = placed(profile, Topology(4, 1, cost_RR), load_cap=1.5, seed=0, effort="fast")
    assert is_exact(rank_of_LE, 4)
    for rank_of_E, group_of_E in zip(rank_of_LE, group_of_LE, strict=True):
        assert len(set(zip(rank_of_E.tolist(), group_of_E.tolist(), strict=True))) == GROUPS


def test_the_number_of_processes_does_not_matter() -> None:
    profile, _ = planted(noise=0.3)
    one = placed(profile, Topology(4), load_cap=1.05, seed=3, effort="fast", objective="dp")
    seen: list[tuple[int, int]] = []
    demands = Demands(load_cap=1.05, seed=3, effort="fast", objective="dp", processes=2)
    two = place_semmoe(profile, Topology(4), demands, lambda done, total: seen.append((done, total)))
    assert np.array_equal(one, two.placement.rank_of_LE) and two.rounds == 2
    assert seen == [(done, 6) for done in range(1, 7)]  # three layers, twice


@pytest.mark.parametrize("num_ranks", [2, 4, 8, 16])
def test_whole_groups_stay_expressible(num_ranks: int) -> None:
    profile, _ = planted(noise=0.5, n_group=8)
    options = {"load_cap": 1.1, "seed": 0, "effort": "fast"}
    rank_of_LE = placed(profile, Topology(num_ranks), expressible="permutation", **options)
    assert is_exact(rank_of_LE, num_ranks)
    for rank_of_E in rank_of_LE:
        ranks_of_group = [set(r) for r in rank_of_E.reshape(8, 2).tolist()]
        if num_ranks <= 8:  # a rank holds whole groups
            assert all(len(ranks) == 1 for ranks in ranks_of_group)
        else:  # a group fills its own ranks
            assert all(len(ranks) == 2 for ranks in ranks_of_group)


def test_refusals() -> None:
    profile, _ = planted()
    with pytest.raises(InputError, match="objective 'pp'"):
        placed(profile, Topology(4), load_cap=1.1, seed=0, objective="pp")
    with pytest.raises(InputError, match="effort 'most'"):
        placed(profile, Topology(4), load_cap=1.1, seed=0, effort="most")
    few = replace(profile, sample=select_requests(profile.sample, np.arange(profile.sample.num_requests) < 7))
    with pytest.raises(InputError, match="--robust 3 needs 8 requests to resample, not 7"):
        placed(few, Topology(4), load_cap=1.1, seed=0, robust=3)


@pytest.mark.parametrize("seed", range(3))
def test_no_worse_than_metis(seed: int) -> None:
    rng = np.random.default_rng(seed)
    latent_EM = rng.normal(size=(32, 5))
    score_TE = rng.normal(size=(3000, 5)) @ latent_EM.T + rng.gumbel(size=(3000, 32))
    ids_TK = np.argsort(-score_TE, axis=1)[:, :4]
    info = TraceInfo("latent", 1, 32, 4, (0,))
    empty = np.zeros(0, np.int64)
    batch = TraceBatch(
        ["a"], [""], np.array([0, 3000]), ids_TK[:, None].astype(np.uint8), empty, empty, empty, empty, empty, empty
    )
    _, load_LE, co_activation_LEE = count_batches([batch], info)
    metis_E = place_metis(co_activation_LEE, load_LE, 4, load_cap=1.05, seed=0)[0]
    load_JE = load_LE.astype(float)
    limit_J = load_limits(load_JE, 4, 1.05)
    cost_XR = np.ones((3000, 4))
    problem = Problem(
        co_activation_LEE[0].astype(float), ids_TK, cost_XR, np.zeros((32, 4)), np.eye(4), load_JE, limit_J
    )
    ours_E = partition(problem, 4, EFFORTS["default"], seed=0, contiguous=False)
    assert overload(ours_E, load_JE, limit_J, 4) == 0
    assert remote_cost(ours_E, ids_TK, cost_XR) <= remote_cost(metis_E, ids_TK, cost_XR)


def test_align_finds_shared_labels() -> None:
    rng = np.random.default_rng(0)
    topic_B = np.repeat(np.arange(4), 5)
    true_LE = np.stack([rng.permutation(np.repeat(np.arange(4), 2)) for _ in range(5)])
    usage_LBE = 1 + 9 * (true_LE[:, None, :] == topic_B[None, :, None]).astype(float)
    relabelled_LE = np.stack([rng.permutation(4)[rank_of_E] for rank_of_E in true_LE])
    aligned_LE, home_B = align_labels(relabelled_LE, usage_LBE, np.full(20, 64), 4, seed=0, starts=4)
    assert len({(a, t) for a, t in zip(aligned_LE.ravel().tolist(), true_LE.ravel().tolist(), strict=True)}) == 4
    assert len(set(zip(home_B.tolist(), topic_B.tolist(), strict=True))) == 4


def test_labels_do_not_depend_on_how_counts_are_held() -> None:
    rng = np.random.default_rng(1)
    rank_of_LE = np.stack([rng.permutation(np.repeat(np.arange(4), 8)) for _ in range(6)])
    usage_LBE = rng.poisson(3, (6, 50, 32)).astype(np.float64)
    # Twice as large often enough, sums pass what single precision counts exactly.
    found = [align_labels(rank_of_LE, usage_LBE * size, np.full(50, 9.0), 4, seed=0, starts=2) for size in (1, 2**20)]
    for few, many in zip(*found, strict=True):
        np.testing.assert_array_equal(few, many)


def test_annealing_finds_planted_requests_under_caps_and_equal_counts() -> None:
    rng = np.random.default_rng(0)
    topic_B = rng.permutation(np.repeat(np.arange(4), 6))
    true_LE = np.stack([rng.permutation(np.repeat(np.arange(4), 3)) for _ in range(5)])
    usage_LBE = rng.poisson(2 + 6 * (true_LE[:, None, :] == topic_B[None, :, None])).astype(np.float32)
    load_LJE = usage_LBE.sum(axis=1, dtype=np.float64)[:, None]
    limit_LJ = 1.05 * load_LJE.sum(axis=2) / 4
    weight_B = usage_LBE.sum(axis=(0, 2)) / 15
    options = {"seed": 0, "starts": 4}
    rank_of_LE, home_B = anneal_requests(usage_LBE, weight_B, load_LJE, limit_LJ, 4, **options)
    assert is_exact(rank_of_LE, 4)
    assert len(set(zip(home_B.tolist(), topic_B.tolist(), strict=True))) == 4
    assert len(set(zip(rank_of_LE.ravel().tolist(), true_LE.ravel().tolist(), strict=True))) == 4
    again_LE, again_B = anneal_requests(usage_LBE, weight_B, load_LJE, limit_LJ, 4, **options)
    assert np.array_equal(rank_of_LE, again_LE) and np.array_equal(home_B, again_B)


def test_paper_and_exact_keep_their_constraints() -> None:
    profile, group_of_LE = planted()
    paper_LE = place_paper(profile, Topology(4), load_cap=1.3, seed=0)
    assert is_exact(paper_LE, 4)
    assert np.array_equal(paper_LE, place_paper(profile, Topology(4), load_cap=1.3, seed=0))
    cost_XR = np.ones((profile.num_tokens, 4))
    ids_TLK = profile.sample.expert_ids_TLK
    for layer, load_E in enumerate(profile.load_LE.astype(float)):
        assert overload(paper_LE[layer], load_E[None], load_limits(load_E[None], 4, 1.3), 4) == 0
        contiguous = remote_cost(np.repeat(np.arange(4), 4), ids_TLK[:, layer], cost_XR)
        assert remote_cost(paper_LE[layer], ids_TLK[:, layer], cost_XR) < contiguous


def test_the_joint_method_reaches_the_proven_best() -> None:
    profile, _ = planted(noise=0.1)
    best_LE = place_exact(profile, Topology(2), load_cap=1.1)
    ours_LE = placed(profile, Topology(2), load_cap=1.1, seed=0)
    cost_XR = np.ones((profile.num_tokens, 2))
    for layer in range(3):
        ids_TK = profile.sample.expert_ids_TLK[:, layer]
        best = remote_cost(best_LE[layer], ids_TK, cost_XR)
        assert remote_cost(ours_LE[layer], ids_TK, cost_XR) <= 1.002 * best
    with pytest.raises(InputError, match="distinct expert sets"):
        place_exact(planted(noise=0.9)[0], Topology(16), load_cap=1.5)


def test_labels_keep_nodes_together() -> None:
    worth_RR = np.array([[0, 0, 9, 1], [0, 0, 1, 9], [9, 1, 0, 0], [1, 9, 8, 8.0]])
    assert best_labels(worth_RR, 2).tolist() == [2, 3, 0, 1]
    worth_RR = np.array([[9, 0, 0, 0], [0, 0, 9, 0], [0, 9, 0, 0], [0, 0, 0, 1.0]])
    assert best_labels(worth_RR, 1).tolist() == [0, 2, 1, 3]
    assert sorted(best_labels(worth_RR, 2)[:2].tolist()) in ([0, 1], [2, 3])


def test_a_bounded_number_of_rows_is_looked_at() -> None:
    assert len(sample_rows(1000, 10**9, 100, 0)) == 100
    assert len(sample_rows(1000, 150, 100, 0)) == 1000  # so few sets merge into few kinds
    assert len(sample_rows(5000, 150, 100, 0)) == 1600
    assert np.array_equal(sample_rows(50, 10**9, 100, 0), np.arange(50))
