"""What requests activate, expert by expert, in bounded memory: for request homes, and for loads of
clusters of requests.

Counts of every request at every expert grow with the requests, where everything else about a trace
is bounded. So homes and labels are learned from a random choice of requests, as many as MAX_COUNTS
numbers allow, and loads of clusters are summed block by block.

Shape letters: B requests, L MoE layers, E experts, R ranks, C clusters, J load vectors, F features.
"""

from collections.abc import Iterator

import numpy as np

from semmoe.profiles.counts import RoutingProfile, request_expert_BE
from semmoe.profiles.errors import InputError
from semmoe.profiles.trace import TraceBatch

MAX_COUNTS = 2**26  # counts of requests at experts of all layers: 4,519 requests of 58 x 256, 268 MB


def chosen_requests(profile: RoutingProfile, seed: int, max_counts: int = MAX_COUNTS) -> np.ndarray:
    """Requests of the sample that usage is counted for, ascending int64: all, or a random
    choice."""
    num_requests = profile.sample.num_requests
    allowed = max(1, max_counts // (profile.info.num_layers * profile.info.num_experts))
    if num_requests <= allowed:
        return np.arange(num_requests)
    return np.sort(np.random.default_rng([seed, 17]).choice(num_requests, allowed, replace=False))


def request_usage_LBE(sample: TraceBatch, requests_B: np.ndarray, num_experts: int) -> np.ndarray:
    """Activations of the requests (ascending numbers) at every layer, float32 [L, B, E]."""
    rows_T, index_T = request_rows(sample, requests_B)
    if len(rows_T) == sample.num_tokens:
        rows_T = slice(None)
    num_layers = sample.expert_ids_TLK.shape[1]
    usage_LBE = np.empty((num_layers, len(requests_B), num_experts), np.float32)
    for layer in range(num_layers):
        ids_TK = sample.expert_ids_TLK[:, layer][rows_T]
        usage_LBE[layer] = request_expert_BE(index_T, ids_TK, len(requests_B), num_experts)
    return usage_LBE


def request_rows(sample: TraceBatch, requests_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the requests, int64 [T] in order, and which of the requests each belongs to, int64
    [T]."""
    lengths_B = np.diff(sample.starts_B1)[requests_B]
    index_T = np.repeat(np.arange(len(requests_B)), lengths_B)
    first_B = sample.starts_B1[requests_B] - (np.cumsum(lengths_B) - lengths_B)
    return np.arange(len(index_T)) + first_B[index_T], index_T


def usage_shares_BR(rank_of_LE: np.ndarray, usage_LBE: np.ndarray, num_ranks: int) -> np.ndarray:
    """Share of each request's activations on each rank over all layers, float64 [B, R]."""
    count_BR = np.zeros((usage_LBE.shape[1], num_ranks))
    for usage_BE, rank_of_E in zip(usage_LBE, rank_of_LE, strict=True):
        count_BR += part_counts_BR(usage_BE, rank_of_E, num_ranks)
    return count_BR / np.maximum(count_BR.sum(axis=1, keepdims=True), 1)


def part_counts_BR(usage_BE: np.ndarray, rank_of_E: np.ndarray, num_ranks: int) -> np.ndarray:
    """Activations of each request on each rank at one layer, float64 [B, R]."""
    # Counts are exact in the usage's own precision: no copy of it is made.
    return (usage_BE @ np.eye(num_ranks, dtype=usage_BE.dtype)[rank_of_E]).astype(np.float64)


def cluster_loads(profile: RoutingProfile, clusters: int, seed: int, max_counts: int = MAX_COUNTS // 2) -> np.ndarray:
    """Load vectors that must keep the cap, float64 [L, J, E]: all requests, then each cluster of
    requests by their experts.

    Clusters are found on `chosen_requests`; every other request of the sample joins the nearest.
    """
    load_LJE = profile.load_LE.astype(np.float64)[:, None]
    if clusters < 2:
        return load_LJE
    sample, num_experts = profile.sample, profile.info.num_experts
    if clusters > sample.num_requests:
        raise InputError(f"--robust {clusters}: the profile has only {sample.num_requests} requests to cluster")
    chosen_B = chosen_requests(profile, seed, max_counts)
    usage_LBE = request_usage_LBE(sample, chosen_B, num_experts)
    cluster_B, centre_CF = k_means(_points_BF(usage_LBE), clusters, np.random.default_rng([seed, 11]))
    load_LCE = np.zeros((len(load_LJE), clusters, num_experts))
    _add_loads(load_LCE, usage_LBE, cluster_B)
    others_B = np.setdiff1d(np.arange(sample.num_requests), chosen_B, assume_unique=True)
    for block_B in _blocks(others_B, max(1, len(chosen_B) // 4)):
        usage_LBE = request_usage_LBE(sample, block_B, num_experts)
        _add_loads(load_LCE, usage_LBE, nearest(_points_BF(usage_LBE), centre_CF))
    return np.concatenate([load_LJE, load_LCE[:, load_LCE.any(axis=(0, 2))]], axis=1)


def _blocks(requests_B: np.ndarray, size: int) -> Iterator[np.ndarray]:
    yield from (requests_B[first : first + size] for first in range(0, len(requests_B), size))


def _points_BF(usage_LBE: np.ndarray) -> np.ndarray:
    """Square roots of each request's shares of its activations, float64 [B, L * E]: distances
    between them are Hellinger's."""
    share_LBE = usage_LBE / np.maximum(usage_LBE.sum(axis=2, keepdims=True), 1)
    return np.sqrt(share_LBE).transpose(1, 0, 2).reshape(usage_LBE.shape[1], -1).astype(np.float64)


def _add_loads(load_LCE: np.ndarray, usage_LBE: np.ndarray, cluster_B: np.ndarray) -> None:
    for c in np.unique(cluster_B):
        load_LCE[:, c] += usage_LBE[:, cluster_B == c].sum(axis=1, dtype=np.float64)


def k_means(points_BF: np.ndarray, clusters: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Cluster of each point, int64 [B], and the centres, float64 [C, F]; farthest-point start, at
    most 30 rounds.

    A cluster may be empty.
    """
    chosen = [int(rng.integers(len(points_BF)))]
    nearest_B = np.full(len(points_BF), np.inf)
    for _ in range(1, clusters):
        nearest_B = np.minimum(nearest_B, ((points_BF - points_BF[chosen[-1]]) ** 2).sum(axis=1))
        chosen.append(int(np.argmax(nearest_B)))
    centre_CF = points_BF[chosen]
    cluster_B = np.full(len(points_BF), -1)
    for _ in range(30):
        nearer_B = nearest(points_BF, centre_CF)
        if np.array_equal(nearer_B, cluster_B):
            break
        cluster_B = nearer_B
        for c in np.unique(cluster_B):
            centre_CF[c] = points_BF[cluster_B == c].mean(axis=0)
    return cluster_B, centre_CF


def nearest(points_BF: np.ndarray, centre_CF: np.ndarray) -> np.ndarray:
    """The nearest centre of each point, int64 [B]."""
    return np.argmin((centre_CF**2).sum(axis=1) - 2 * points_BF @ centre_CF.T, axis=1)
