"""Exact counts and the load cap, for any partition. A graph partitioner only bounds imbalance: this
makes it exact.

Shape letters: E experts, R ranks.
"""

import numpy as np

from semmoe.solvers.place.baselines import place_load


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
    """The partition with exactly E / R experts per rank, by the moves that lose least affinity.
    int64 [E]."""
    rank_of_E = rank_of_E.copy()
    capacity = len(rank_of_E) // num_ranks
    off_EE = affinity_EE - np.diag(affinity_EE.diagonal())
    while True:
        counts_R = np.bincount(rank_of_E, minlength=num_ranks)
        if counts_R.max() == capacity:
            return rank_of_E
        to_ER = off_EE @ np.eye(num_ranks)[rank_of_E]
        gain_ER = to_ER - to_ER[np.arange(len(rank_of_E)), rank_of_E][:, None]
        gain_ER[counts_R[rank_of_E] <= capacity] = -np.inf
        gain_ER[:, counts_R >= capacity] = -np.inf
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
    [E]."""
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
    """
    rank_of_E = repair_load(equal_counts(rank_of_E, affinity_EE, num_ranks), affinity_EE, load_E, num_ranks, load_cap)
    if is_within_cap(rank_of_E, load_E, num_ranks, load_cap):
        return rank_of_E
    balanced_E = repair_load(balanced_E, affinity_EE, load_E, num_ranks, load_cap)
    if is_within_cap(balanced_E, load_E, num_ranks, load_cap):
        return improve_within_cap(balanced_E, affinity_EE, load_E, num_ranks, load_cap)
    return min((rank_of_E, balanced_E), key=lambda p: rank_load_R(p, load_E, num_ranks).max())


def best_within_cap(
    partitions: list[np.ndarray], affinity_EE: np.ndarray, load_E: np.ndarray, num_ranks: int, load_cap: float
) -> np.ndarray:
    """The best of several partitions after `equalize`, int64 [E], improved by swaps under the cap
    until none gains.

    Where no partition can be brought under the cap, the one that comes nearest to it is returned.
    """
    balanced_E = place_load(load_E[None], num_ranks)[0]
    placed = [equalize(part_E, affinity_EE, load_E, num_ranks, load_cap, balanced_E) for part_E in partitions]
    feasible = [p for p in placed if is_within_cap(p, load_E, num_ranks, load_cap)]
    if not feasible:
        return min(placed, key=lambda p: rank_load_R(p, load_E, num_ranks).max())
    best_E = max(feasible, key=lambda p: co_activation_within(p, affinity_EE))
    return improve_within_cap(best_E, affinity_EE, load_E, num_ranks, load_cap)
