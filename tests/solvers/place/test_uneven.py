"""Any number of experts on any number of ranks and slots: every method, exact counts, and scores
that a count by hand gives too."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from small_profiles import profile_of, random_rows

from semmoe.profiles.errors import InputError
from semmoe.solvers.demands import Demands
from semmoe.solvers.deployment import Deployment
from semmoe.solvers.evaluate.sums import deployment_sums
from semmoe.solvers.place.baselines import baselines
from semmoe.solvers.place.bounds import certificate_of
from semmoe.solvers.place.solve import FILLING, METHODS, solve_placement
from semmoe.solvers.placement import EMPTY, Placement, Topology, part_sizes
from semmoe.solvers.slots import Slots

SHAPES = [(7, 3), (10, 4), (5, 8), (9, 9), (12, 5), (8, 6), (3, 4), (6, 3)]  # experts, ranks


def check_counts(placement: Placement, slots: Slots) -> None:
    num_layers, num_ranks, num_experts = placement.num_layers, placement.num_ranks, placement.num_experts
    assert placement.experts_LRS.shape == (num_layers, num_ranks, slots.per_rank)
    held_LR = (placement.experts_LRS != EMPTY).sum(axis=2)
    sizes_R = np.full(num_ranks, slots.per_rank) if slots.copies else part_sizes(num_experts, num_ranks)
    assert (held_LR == sizes_R).all()
    # Placement itself refuses an expert on no rank, or twice on one.
    assert placement.hosts_LER.sum() == held_LR.sum()


@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.sampled_from(SHAPES),
    spare=st.sampled_from(["copies", "empty"]),
    more=st.integers(0, 2),
    nodes=st.sampled_from([1, 2, 4]),
    objective=st.sampled_from(["tp", "dp", "both"]),
    dispatch=st.sampled_from(["per-rank", "per-node", "per-expert"]),
    groups=st.sampled_from([1, 2, 4]),
)
@example(
    seed=0, shape=(10, 4), spare="empty", more=0, nodes=2, objective="tp", dispatch="per-node", groups=1
)  # ranks are renamed for nodes, whatever the method
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_fills_the_slots(method, seed, shape, spare, more, nodes, objective, dispatch, groups):
    experts, ranks = shape
    assume(ranks % nodes == 0 and (spare == "copies" or not more))
    tokens = 16 if method == "exact" else 60  # a proof takes seconds of many
    profile = profile_of(random_rows(np.random.default_rng(seed), experts, tokens, skew=2), experts, layers=2)
    if experts % groups == 0:
        profile = replace(profile, info=replace(profile.info, n_group=groups))
    demands = Demands(load_cap=1.5, seed=seed, replicas=more, spare=spare, objective=objective, dispatch=dispatch)
    demands = replace(demands, effort="fast")
    try:
        slots = demands.slots_of(experts, ranks)
        placed = [solve_placement(profile, Topology(ranks, nodes), demands, method=method) for _ in range(2)]
    except InputError as error:  # an exact solver may prove that no placement keeps the cap
        assert "a rank can host" in str(error) or method == "exact"
        return
    check_counts(placed[0].placement, slots)
    assert placed[0].placement.experts_LRS.tolist() == placed[1].placement.experts_LRS.tolist()
    for baseline in baselines(profile.load_LE, Topology(ranks, nodes), slots=slots).values():
        check_counts(baseline, slots)


@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 10_000), shape=st.sampled_from(SHAPES), more=st.integers(0, 2), nodes=st.sampled_from([1, 2])
)
def test_scores_are_what_counting_by_hand_gives(seed, shape, more, nodes):
    experts, ranks = shape
    assume(ranks % nodes == 0 and -(-experts // ranks) + more <= experts)
    topology = Topology(ranks, nodes)
    profile = profile_of(random_rows(np.random.default_rng(seed), experts, 30), experts)
    slots = Slots(-(-experts // ranks) + more)
    deployment = Deployment(baselines(profile.load_LE, topology, slots=slots)["load"], profile.load_LE, topology)
    sums = deployment_sums(deployment, profile.sample)
    hosts_ER, node_of_R = deployment.placement.hosts_LER[0], topology.node_of_R
    remote = local = nodes_away = 0.0
    for ids_K in profile.sample.expert_ids_TLK[:, 0]:
        for home in range(ranks):
            served = [deployment.serving_LRE[0, home, e] for e in ids_K]
            for expert, rank in zip(ids_K, served, strict=True):
                assert hosts_ER[expert, rank]
                near = [r for r in range(ranks) if hosts_ER[expert, r] and node_of_R[r] == node_of_R[home]]
                assert rank == home if hosts_ER[expert, home] else not near or rank in near
            local += sum(rank == home for rank in served) / ranks
            remote += len(set(served) - {home}) / ranks
            nodes_away += len({node_of_R[rank] for rank in served} - {node_of_R[home]}) / ranks
    assert sums.local_GL.sum() == pytest.approx(local)
    assert sums.remote_ranks_GL.sum() == pytest.approx(remote)
    assert sums.remote_nodes_GL.sum() == pytest.approx(nodes_away)
    assert sums.load_GLR.sum() == pytest.approx(profile.load_LE.sum())


def test_bounds_hold_for_uneven_shares():
    profile = profile_of(random_rows(np.random.default_rng(3), 10, 400, top_k=3), 10)
    topology, demands = Topology(4), Demands(load_cap=1.3, spare="empty")
    placement = solve_placement(profile, topology, demands, method="semmoe").placement
    layer = certificate_of(profile, placement, load_cap=1.3).layers[0]
    sums = deployment_sums(Deployment(placement, profile.load_LE, topology), profile.sample)
    assert layer.rem_bound <= sums.remote_ranks_GL.sum() / profile.num_tokens
    assert 0 < layer.co_activation <= layer.co_activation_bound
    filled = solve_placement(profile, topology, Demands(load_cap=1.3), method="semmoe").placement
    with pytest.raises(InputError, match="add --spare empty"):
        certificate_of(profile, filled, load_cap=1.3)


def test_progress_names_the_stage_of_copies():
    profile = profile_of(random_rows(np.random.default_rng(5), 10, 60), 10, layers=2)
    told: list[tuple[str, int, int]] = []
    solve_placement(profile, Topology(4), Demands(objective="tp"), method="semmoe", progress=lambda *x: told.append(x))
    assert told == [
        *[("placing layers", done, 2) for done in (1, 2)],
        *[(FILLING, done, 2) for done in (1, 2)],
    ]
