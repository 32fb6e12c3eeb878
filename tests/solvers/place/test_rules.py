"""Rules by which copies serve: what each engine does, and the fewest remote ranks."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_profiles import profile_of, random_rows

from semmoe.profiles.errors import InputError
from semmoe.solvers.deployment import Deployment
from semmoe.solvers.evaluate.reached import rank_rows_LRR
from semmoe.solvers.evaluate.sums import deployment_sums
from semmoe.solvers.place.baselines import baselines
from semmoe.solvers.place.replicas import MOVING, REPLICA_RULES, MovingRule, check_rule, static_serving_LRE
from semmoe.solvers.placement import Placement, Topology
from semmoe.solvers.slots import Slots

# Expert 0 on ranks 0, 1 and 3, expert 1 on rank 1, expert 2 on ranks 2 and 3, expert 3 on rank 2.
HOSTS_LER = Placement(np.array([[[0, -1], [0, 1], [2, 3], [0, 2]]], np.int32), 4).hosts_LER
LOAD_LE = np.array([[8, 1, 4, 1]])


def test_static_rules_of_engines() -> None:
    nodes = Topology(4, 2)
    by_number = static_serving_LRE("vllm-ascend", HOSTS_LER, LOAD_LE, nodes)[0]
    assert by_number[:, 0].tolist() == [0, 1, 3, 0] and by_number[:, 2].tolist() == [2, 3, 2, 3]
    fair = static_serving_LRE("sglang", HOSTS_LER, LOAD_LE, nodes)[0]
    assert fair[:, 0].tolist() == [0, 1, 3, 3]  # rank 2 finds a copy on its node
    assert fair[:, 2].tolist() == [2, 3, 2, 3]  # ranks 0 and 1 take turns
    assert fair[:, 1].tolist() == [1, 1, 1, 1]


def moving(name: str) -> MovingRule:
    return MovingRule(name, HOSTS_LER, static_serving_LRE(name, HOSTS_LER, LOAD_LE, Topology(4)))


def test_tokens_take_turns_where_engines_look_at_them() -> None:
    ids_TK = np.array([[0, 4], [0, 2], [2, 0], [0, 1]])
    # Knuth's hash of 0, 1, 2, 3 modulo 3 and 2.
    numbers = [(t * 2654435761) % 2**32 for t in range(4)]
    expected = [[[0, 1, 3][n % 3], 4] for n in numbers[:1]] + [[[0, 1, 3][numbers[1] % 3], [2, 3][numbers[1] % 2]]]
    found = moving("vllm").ranks_TK(0, ids_TK, np.zeros(4, int))
    assert found[:2].tolist() == expected and found[3, 1] == 1
    # On rank 1 the first choice of an expert takes its second copy, the next one the third, ...
    turns = moving("trtllm").ranks_TK(0, ids_TK, np.array([1, 1, 1, 0]))
    assert turns.tolist() == [[1, 4], [3, 3], [2, 0], [0, 1]]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 5), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**31))
def test_cover_reaches_no_more_ranks_than_the_static_rule(ranks: int, slots: int, top_k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_experts = max(2, ranks * slots // 2)
    top_k = min(top_k, num_experts)
    load_LE = rng.integers(1, 9, (1, num_experts))
    size = Slots(max(slots, -(-num_experts // ranks)) if slots <= num_experts else num_experts)
    placement = baselines(load_LE, Topology(ranks), slots=size)["load"]
    hosts_ER, ids_TK = placement.hosts_LER[0], np.stack([rng.permutation(num_experts + 1)[:top_k] for _ in range(20)])
    home_T = rng.integers(0, ranks, 20)
    static_RE = static_serving_LRE("cover", placement.hosts_LER, load_LE, Topology(ranks))[0]
    rule = MovingRule("cover", placement.hosts_LER, static_RE[None])
    for ids_K, home, rank_K in zip(ids_TK, home_T, rule.ranks_TK(0, ids_TK, home_T), strict=True):
        choices = [np.flatnonzero(hosts_ER[e]).tolist() if e < num_experts else [ranks] for e in ids_K]
        assert all(rank in hosts for rank, hosts in zip(rank_K, choices, strict=True))
        assert all(rank == home for rank, hosts in zip(rank_K, choices, strict=True) if home in hosts)
        fewest = min(len({*found} - {home, ranks}) for found in product(*choices))
        plain = len({static_RE[home, e] for e in ids_K if e < num_experts} - {home})
        assert fewest <= len({*rank_K} - {home, ranks}) <= max(plain, fewest)


@pytest.mark.parametrize("rule", REPLICA_RULES)
def test_every_rule_is_counted_alike(rule: str) -> None:
    """Sums and rows between ranks of every rule agree with a loop over tokens and homes."""
    profile, topology = profile_of(random_rows(np.random.default_rng(1), 6, 40, top_k=3), 6), Topology(3)
    placement = baselines(profile.load_LE, topology, slots=Slots(4))["load"]
    deployment = Deployment(placement, profile.load_LE, topology, replica_choice=rule)
    assert (deployment.moving is not None) == (rule in MOVING)
    sums, ids_TK = deployment_sums(deployment, profile.sample), profile.sample.expert_ids_TLK[:, 0]
    remote = local = 0.0
    for home in range(3):
        homes_T = np.full(len(ids_TK), home)
        ranks_TK = deployment.serving_LRE[0, home][ids_TK]
        if deployment.moving is not None:
            ranks_TK = deployment.moving.ranks_TK(0, ids_TK, homes_T)
        remote += sum(len({*ranks} - {home}) for ranks in ranks_TK) / 3
        local += (ranks_TK == home).sum() / 3
    assert sums.remote_ranks_GL.sum() == pytest.approx(remote) and sums.local_GL.sum() == pytest.approx(local)
    rows_LRR = rank_rows_LRR(profile.sample, deployment.serving_LRE, dispatch="per-rank", moving=deployment.moving)
    away = rows_LRR[0].sum() - np.trace(rows_LRR[0])
    assert away * len(ids_TK) == pytest.approx(remote)


def test_unknown_rules_are_refused() -> None:
    with pytest.raises(
        InputError, match="--replica-choice nearest: expected own-rank-then-node-then-load, cover, sglang"
    ):
        check_rule("nearest")
