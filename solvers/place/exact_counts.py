"""Exact counts and the load cap, for any partition: the guarantee at the exit. A graph partitioner
only bounds imbalance; this makes it exact.

The cap holds for the load of all requests and, where that is asked for, of resamples of them too
(`resampled_loads`): a cap on what was fitted alone is exceeded by requests that come later.

Shape letters: B requests, L MoE layers, E experts, R ranks, J load vectors.
"""

import numpy as np

from semmoe.profiles.counts import RoutingProfile
from semmoe.profiles.errors import InputError
from semmoe.solvers.place.baselines import place_load
from semmoe.solvers.place.request_homes import MAX_COUNTS, request_usage_LBE
from semmoe.solvers.placement import part_sizes

REQUEST_SHARE = 0.5  # of the fitted requests that a resample holds
LEAST_REQUESTS = 8  # that are worth resampling or halving


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


def resampled_loads(
    profile: RoutingProfile, resamples: int, seed: int, max_counts: int = MAX_COUNTS // 2
) -> np.ndarray:
    """Load vectors that must keep the cap: of all requests, then of resamples of REQUEST_SHARE as
    many, which differ from all as much as requests to come do from those that were fitted.

    Parameters:
        profile: its sample is resampled.
        resamples: how many; 0: all requests together are the only vector.
        seed: of the resamples.
        max_counts: what may be counted at once; requests are counted block by block.

    Returns:
        float64 [L, J, E].

    Raises InputError where there are too few requests.
    """
    load_LJE = profile.load_LE.astype(np.float64)[:, None]
    if not resamples:
        return load_LJE
    (num_layers, _, num_experts), sample = load_LJE.shape, profile.sample
    if sample.num_requests < LEAST_REQUESTS:
        needs = f"{LEAST_REQUESTS} requests to resample, not {sample.num_requests}"
        raise InputError(f"--robust {resamples} needs {needs}")
    few = round(REQUEST_SHARE * sample.num_requests)
    even_B = np.full(sample.num_requests, 1 / sample.num_requests)
    weight_JB = np.random.default_rng([seed, 11]).multinomial(few, even_B, resamples).astype(np.float64)
    drawn_LJE = np.zeros((num_layers, resamples, num_experts))
    step = max(1, max_counts // (num_layers * num_experts))
    for first in range(0, sample.num_requests, step):
        block_B = np.arange(first, min(first + step, sample.num_requests))
        drawn_LJE += weight_JB[:, block_B] @ request_usage_LBE(sample, block_B, num_experts)
    return np.concatenate([load_LJE, drawn_LJE], axis=1)
