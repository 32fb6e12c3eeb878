"""Exact counts and the load cap, for any partition: the guarantee at the exit. A graph partitioner
only bounds imbalance; this makes it exact.

The cap holds for the load of all requests and, where that is asked for, for each cluster of
requests too (`cluster_loads`). Clusters are found on a bounded choice of requests, and their loads
summed block by block.

Shape letters: B requests, L MoE layers, E experts, R ranks, C clusters, J load vectors, F features.
"""

from collections.abc import Iterator

import numpy as np

from semmoe.profiles.counts import RoutingProfile
from semmoe.profiles.errors import InputError
from semmoe.solvers.place.baselines import place_load
from semmoe.solvers.place.request_homes import MAX_COUNTS, chosen_requests, request_usage_LBE
from semmoe.solvers.placement import part_sizes


def rank_load_R(rank_of_E: np.ndarray, load_E: np.ndarray, num_ranks: int) -> np.ndarray:
    """Activations per rank, float64 [R]."""
    return np.bincount(rank_of_E, weights=load_E, minlength=num_ranks)


def load_limit(load_E: np.ndarray, num_ranks: int, load_cap: float) -> float:
    """Activations that a rank may carry: load_cap times the mean of the ranks."""
    return load_cap * float(load_E.sum()) / num_ranks


def is_within_cap(rank_of_E: np.ndarray, load_E: np.ndarray, num_ranks: int, load_cap: float) -> bool:
    """Whether the busiest rank keeps the cap (to within rounding of the product)."""
    limit = load_limit(load_E, num_ranks, load_cap)
    return bool(rank_load_R(rank_of_E, load_E, num_ranks).max() <= limit * (1 + 1e-12))


def co_activation_within(rank_of_E: np.ndarray, affinity_EE: np.ndarray) -> float:
    """Affinity between experts of the same rank, each pair once; the diagonal is left out."""
    same_EE = rank_of_E[:, None] == rank_of_E[None, :]
    return float((affinity_EE * same_EE).sum() - affinity_EE.diagonal().sum()) / 2


def swap_gain_EE(rank_of_E: np.ndarray, affinity_EE: np.ndarray, num_ranks: int) -> np.ndarray:
    """Affinity gained by exchanging the ranks of experts e and f, float64 [E, E]; meaningless
    within one rank."""
    member_ER = np.eye(num_ranks)[rank_of_E]
    off_EE = affinity_EE - np.diag(affinity_EE.diagonal())
    to_ER = off_EE @ member_ER
    own_E = to_ER[np.arange(len(rank_of_E)), rank_of_E]
    move_EE = to_ER[:, rank_of_E] - own_E[:, None]
    return move_EE + move_EE.T - 2 * off_EE


def equal_counts(rank_of_E: np.ndarray, affinity_EE: np.ndarray, num_ranks: int) -> np.ndarray:
    """The partition in even shares (`part_sizes`), by the moves that lose least affinity, int64
    [E].

    Where the ranks cannot share the experts equally, parts are renamed first: the larger ones come
    first.
    """
    sizes_R = part_sizes(len(rank_of_E), num_ranks)
    if sizes_R[0] != sizes_R[-1]:
        label_R = np.empty(num_ranks, np.int64)
        counts_R = np.bincount(rank_of_E, minlength=num_ranks)
        label_R[np.argsort(-counts_R, kind="stable")] = np.arange(num_ranks)
        rank_of_E = label_R[rank_of_E]
    return moved_to_sizes(rank_of_E, affinity_EE, sizes_R)


def moved_to_sizes(rank_of_E: np.ndarray, affinity_EE: np.ndarray, sizes_R: np.ndarray) -> np.ndarray:
    """The partition with exactly these experts on each rank, int64 [E], by the moves that lose
    least affinity. `sizes_R`: integers, E together."""
    rank_of_E, num_ranks = rank_of_E.copy(), len(sizes_R)
    off_EE = affinity_EE - np.diag(affinity_EE.diagonal())
    while True:
        counts_R = np.bincount(rank_of_E, minlength=num_ranks)
        if not (counts_R > sizes_R).any():
            return rank_of_E
        to_ER = off_EE @ np.eye(num_ranks)[rank_of_E]
        gain_ER = to_ER - to_ER[np.arange(len(rank_of_E)), rank_of_E][:, None]
        gain_ER[(counts_R <= sizes_R)[rank_of_E]] = -np.inf
        gain_ER[:, counts_R >= sizes_R] = -np.inf
        expert, rank = np.unravel_index(np.argmax(gain_ER), gain_ER.shape)
        rank_of_E[expert] = rank


def _overload_change_EE(rank_of_E: np.ndarray, load_E: np.ndarray, load_R: np.ndarray, limit: float) -> np.ndarray:
    """Change of the summed load above the limit when experts e and f exchange ranks, float64 [E,
    E]."""
    over_R = np.maximum(load_R - limit, 0)
    shift_EE = load_E[None, :] - load_E[:, None]
    mine_E = load_R[rank_of_E]
    after_EE = np.maximum(mine_E[:, None] + shift_EE - limit, 0) + np.maximum(mine_E[None, :] - shift_EE - limit, 0)
    return after_EE - over_R[rank_of_E][:, None] - over_R[rank_of_E][None, :]


def repair_load(
    rank_of_E: np.ndarray, affinity_EE: np.ndarray, load_E: np.ndarray, num_ranks: int, load_cap: float
) -> np.ndarray:
    """The placement brought under the load cap by swaps that lose least affinity per load removed,
    int64 [E].

    Where swaps get stuck above the cap, what they reached is returned: `is_within_cap` tells.

    Parameters:
        rank_of_E: rank of each expert, int64 [E].
        affinity_EE: what experts are worth to each other on one rank, float [E, E].
        load_E: activations, float [E].
        num_ranks: R.
        load_cap: most load of a rank over the mean.
    """
    rank_of_E, load_E = rank_of_E.copy(), load_E.astype(np.float64)
    limit = load_limit(load_E, num_ranks, load_cap)
    while (load_R := rank_load_R(rank_of_E, load_E, num_ranks)).max() > limit:
        change_EE = _overload_change_EE(rank_of_E, load_E, load_R, limit)
        change_EE[rank_of_E[:, None] == rank_of_E[None, :]] = 0
        loss_EE = np.maximum(-swap_gain_EE(rank_of_E, affinity_EE, num_ranks), 1e-9)
        worth_EE = np.where(change_EE < -1e-9, -change_EE / loss_EE, -1.0)
        e, f = np.unravel_index(np.argmax(worth_EE), worth_EE.shape)
        if worth_EE[e, f] <= 0:
            break
        rank_of_E[e], rank_of_E[f] = rank_of_E[f], rank_of_E[e]
    return rank_of_E


def improve_within_cap(
    rank_of_E: np.ndarray, affinity_EE: np.ndarray, load_E: np.ndarray, num_ranks: int, load_cap: float
) -> np.ndarray:
    """A placement under the cap, improved by swaps that keep it there until none gains, int64
    [E].

    Parameters:
        As of `repair_load`; the placement keeps the cap.
    """
    rank_of_E, load_E = rank_of_E.copy(), load_E.astype(np.float64)
    limit = load_limit(load_E, num_ranks, load_cap)
    while True:
        load_R = rank_load_R(rank_of_E, load_E, num_ranks)
        gain_EE = swap_gain_EE(rank_of_E, affinity_EE, num_ranks)
        gain_EE[rank_of_E[:, None] == rank_of_E[None, :]] = 0
        after_EE = load_R[rank_of_E][:, None] + load_E[None, :] - load_E[:, None]
        gain_EE[(after_EE > limit) | (after_EE.T > limit)] = 0
        e, f = np.unravel_index(np.argmax(gain_EE), gain_EE.shape)
        if gain_EE[e, f] <= 1e-9:
            return rank_of_E
        rank_of_E[e], rank_of_E[f] = rank_of_E[f], rank_of_E[e]


def equalize(
    rank_of_E: np.ndarray,
    affinity_EE: np.ndarray,
    load_E: np.ndarray,
    num_ranks: int,
    load_cap: float,
    balanced_E: np.ndarray,
) -> np.ndarray:
    """Exact counts and, where it can be had, a load under the cap, for any partition; else what
    comes nearest. int64 [E].

    `balanced_E`: a placement by load alone, from which the search starts again where repair of the
    partition gets stuck.

    Parameters:
        rank_of_E, affinity_EE, load_E, num_ranks, load_cap: as of `repair_load`; parts of any size.
        balanced_E: a placement by load alone, int64 [E], from which the search starts again where
            repair of the partition gets stuck.
    """
    rank_of_E = repair_load(equal_counts(rank_of_E, affinity_EE, num_ranks), affinity_EE, load_E, num_ranks, load_cap)
    if is_within_cap(rank_of_E, load_E, num_ranks, load_cap):
        return rank_of_E
    balanced_E = repair_load(balanced_E, affinity_EE, load_E, num_ranks, load_cap)
    if is_within_cap(balanced_E, load_E, num_ranks, load_cap):
        return improve_within_cap(balanced_E, affinity_EE, load_E, num_ranks, load_cap)
    return min((rank_of_E, balanced_E), key=lambda p: rank_load_R(p, load_E, num_ranks).max())


def in_linear_shares(
    rank_of_LE: np.ndarray, profile: RoutingProfile, load_LE: np.ndarray, num_ranks: int, load_cap: float
) -> np.ndarray:
    """The placement with one expert more on the first E mod R ranks, as engines without copies
    split them, int64 [L, E]; renaming ranks may have left others with it.

    Parameters:
        rank_of_LE: rank of each expert, int [L, E].
        profile: co-activations, which moves lose least of.
        load_LE: activations, float [L, E].
        num_ranks: R.
        load_cap: most load of a rank over the mean, kept where swaps can.
    """
    sizes_R, moved = part_sizes(rank_of_LE.shape[1], num_ranks), []
    for rank_of_E, affinity_EE, load_E in zip(rank_of_LE, profile.co_activation_LEE, load_LE, strict=True):
        if (np.bincount(rank_of_E, minlength=num_ranks) != sizes_R).any():
            rank_of_E = moved_to_sizes(rank_of_E, affinity_EE, sizes_R)
            rank_of_E = repair_load(rank_of_E, affinity_EE, load_E, num_ranks, load_cap)
        moved.append(rank_of_E)
    return np.stack(moved)


def best_within_cap(
    partitions: list[np.ndarray], affinity_EE: np.ndarray, load_E: np.ndarray, num_ranks: int, load_cap: float
) -> np.ndarray:
    """The best of several partitions after `equalize`, int64 [E], improved by swaps under the cap
    until none gains.

    Where no partition can be brought under the cap, the one that comes nearest to it is returned.

    Parameters:
        partitions: placements, int64 [E] each.
        affinity_EE, load_E, num_ranks, load_cap: as of `repair_load`.
    """
    balanced_E = place_load(load_E[None], num_ranks)[0]
    placed = [equalize(part_E, affinity_EE, load_E, num_ranks, load_cap, balanced_E) for part_E in partitions]
    feasible = [p for p in placed if is_within_cap(p, load_E, num_ranks, load_cap)]
    if not feasible:
        return min(placed, key=lambda p: rank_load_R(p, load_E, num_ranks).max())
    best_E = max(feasible, key=lambda p: co_activation_within(p, affinity_EE))
    return improve_within_cap(best_E, affinity_EE, load_E, num_ranks, load_cap)


def cluster_loads(profile: RoutingProfile, clusters: int, seed: int, max_counts: int = MAX_COUNTS // 2) -> np.ndarray:
    """Load vectors that must keep the cap: all requests, then each cluster of requests by their
    experts.

    Parameters:
        profile: its sample is clustered.
        clusters: how many; below 2 all requests together are the only vector.
        seed: of the clusters.
        max_counts: what may be counted at once. Clusters are found on as many requests
            (`chosen_requests`); every other request of the sample joins the nearest.

    Returns:
        float64 [L, J, E]; clusters that no request joined are left out.

    Raises InputError for more clusters than requests.
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
