"""Algorithm 1 of Semantic Parallelism (arXiv 2503.04398), as published: greedy experts and greedy
requests in turn.

What the paper leaves open is filled plainly. Affinity of two experts: co-activation over the mean
pair. Affinity of experts and requests: activations over the mean. Affinity of requests: cosine of
their expert counts. All weights are 1, theta is 1/2, eight rounds, 64 random swaps each. Requests
are clustered per layer, as there is no word on labels across layers. The paper has no load cap: the
placement is brought under it at the end, by the swaps that lose least co- activation.

Shape letters: L MoE layers, B requests, E experts, R ranks (clusters).
"""

import numpy as np

from semmoe.profiles.counts import RoutingProfile, request_expert_BE
from semmoe.solvers.place.baselines import place_load
from semmoe.solvers.place.exact_counts import equalize
from semmoe.solvers.placement import Topology, part_sizes

ROUNDS = 8
SWAPS = 64
THETA = 0.5


def place_paper(profile: RoutingProfile, topology: Topology, *, load_cap: float, seed: int) -> np.ndarray:
    """The placement that the published algorithm finds.

    Parameters:
        profile: counts of the requests to fit, and a sample of them.
        topology: its ranks; nodes and costs are not looked at.
        load_cap: most load of a rank over the mean, kept at the end where it can be.
        seed: of the first homes and of the random swaps.

    Returns:
        Rank of each expert, int64 [L, E].
    """
    request_T, num_ranks = profile.sample.request_of_T, topology.num_ranks
    num_requests, num_experts = profile.sample.num_requests, profile.info.num_experts
    balanced_LE = place_load(profile.load_LE, num_ranks)
    placed = []
    for layer, load_E in enumerate(profile.load_LE):
        use_BE = request_expert_BE(request_T, profile.sample.expert_ids_TLK[:, layer], num_requests, num_experts)
        affinity_EE = profile.co_activation_LEE[layer]
        rank_of_E = place_layer(affinity_EE, use_BE, load_E, num_ranks, np.random.default_rng([seed, layer]))
        placed.append(equalize(rank_of_E, affinity_EE, load_E, num_ranks, load_cap, balanced_LE[layer]))
    return np.stack(placed)


def place_layer(
    affinity_EE: np.ndarray, use_BE: np.ndarray, load_E: np.ndarray, num_ranks: int, rng: np.random.Generator
) -> np.ndarray:
    """Rank of each expert, int64 [E]: the pair of clusterings with the least theta-weighted
    imbalance and remote share.

    Parameters:
        affinity_EE: co-activations, float [E, E].
        use_BE: activations of each expert by request, float [B, E].
        load_E: activations, float [E].
        num_ranks: R.
        rng: of the clusterings.
    """
    experts_EE = affinity_EE - np.diag(np.diagonal(affinity_EE)).astype(np.float64)
    experts_EE /= max(experts_EE.mean(), 1e-12)
    share_BE = use_BE / max(use_BE.mean(), 1e-12)
    unit_BE = use_BE / np.maximum(np.linalg.norm(use_BE, axis=1, keepdims=True), 1e-12)
    requests_BB = unit_BE @ unit_BE.T
    length_B = use_BE.sum(axis=1)
    rank_of_B = rng.permutation(np.arange(len(use_BE)) % num_ranks)
    best: tuple[float, np.ndarray] | None = None
    for _ in range(ROUNDS):
        homes_ER = share_BE.T @ np.eye(num_ranks)[rank_of_B]
        rank_of_E = _expert_step(experts_EE, homes_ER, load_E.astype(np.float64), num_ranks)
        rank_of_E = _random_swaps(rank_of_E, experts_EE, homes_ER, rng)
        local_BR = share_BE @ np.eye(num_ranks)[rank_of_E]
        rank_of_B = _request_step(requests_BB, local_BR, length_B, num_ranks)
        tokens_R = np.bincount(rank_of_B, length_B, num_ranks)
        imbalance = float(np.abs(tokens_R - tokens_R.mean()).sum() / max(tokens_R.sum(), 1))
        remote = 1 - float(local_BR[np.arange(len(use_BE)), rank_of_B].sum() / max(share_BE.sum(), 1e-12))
        score = THETA * imbalance + (1 - THETA) * remote
        if best is None or score < best[0]:
            best = score, rank_of_E
    assert best is not None
    return best[1]


def _expert_step(experts_EE: np.ndarray, homes_ER: np.ndarray, load_E: np.ndarray, num_ranks: int) -> np.ndarray:
    """Experts by descending load, each to the open cluster with most affinity less load."""
    num_experts = len(load_E)
    rank_of_E = np.full(num_experts, -1)
    near_ER, load_R = np.zeros((num_experts, num_ranks)), np.zeros(num_ranks)
    room_R = part_sizes(num_experts, num_ranks)
    for e in np.argsort(-load_E, kind="stable"):
        score_R = near_ER[e] + homes_ER[e] - load_R
        rank = int(np.argmax(np.where(room_R > 0, score_R, -np.inf)))
        rank_of_E[e] = rank
        near_ER[:, rank] += experts_EE[:, e]
        load_R[rank] += load_E[e] / max(load_E.mean(), 1e-12)
        room_R[rank] -= 1
    return rank_of_E


def _random_swaps(
    rank_of_E: np.ndarray, experts_EE: np.ndarray, homes_ER: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Random pairs exchanged where the affinity of both kinds grows."""
    rank_of_E = rank_of_E.copy()
    for e, f in rng.integers(0, len(rank_of_E), (SWAPS, 2)):
        a, b = rank_of_E[e], rank_of_E[f]
        if a == b:
            continue
        on_a, on_b = rank_of_E == a, rank_of_E == b
        gain = (
            experts_EE[e, on_b].sum()
            - experts_EE[e, on_a].sum()
            + experts_EE[f, on_a].sum()
            - experts_EE[f, on_b].sum()
        )
        gain += homes_ER[e, b] - homes_ER[e, a] + homes_ER[f, a] - homes_ER[f, b] - 2 * experts_EE[e, f]
        if gain > 0:
            rank_of_E[e], rank_of_E[f] = b, a
    return rank_of_E


def _request_step(requests_BB: np.ndarray, local_BR: np.ndarray, length_B: np.ndarray, num_ranks: int) -> np.ndarray:
    """Requests by descending length, each to the open cluster with most affinity to its requests
    and experts."""
    num_requests = len(length_B)
    rank_of_B = np.full(num_requests, -1)
    near_BR, room_R = np.zeros((num_requests, num_ranks)), np.full(num_ranks, -(-num_requests // num_ranks))
    for b in np.argsort(-length_B, kind="stable"):
        rank = int(np.argmax(np.where(room_R > 0, near_BR[b] + local_BR[b], -np.inf)))
        rank_of_B[b] = rank
        near_BR[:, rank] += requests_BB[:, b]
        room_R[rank] -= 1
    return rank_of_B
