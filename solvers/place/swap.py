"""Swap search: the placement of one layer improved by exchanging two experts at a time, all pairs
seen at every step.

A swap keeps the number of experts per rank, so only load caps need care. They enter as a soft
penalty whose weight rises while the placement is over a cap and falls while it is not: a search
that never leaves the feasible side freezes. Each step also looks one swap ahead for the best
placement within the caps, and the best one seen is returned. A swapped pair stays put for some
steps (tabu search, Glover 1989), so the search walks out of local optima.

What a swap gains is the business of a gain model; `AffinityGains` here is quadratic (pairs of
experts attract each other), `semmoe.solvers.place.remote_gains` counts remote ranks exactly.

Shape letters: E experts, R ranks, J load vectors (all requests, resamples of them).
"""

from typing import Protocol

import numpy as np

PENALTY_EVERY = 6  # steps between changes of the penalty weight
PENALTY_UP, PENALTY_DOWN = 1.5, 0.7
TIE = 1e-7  # values and overloads closer than this are equal
BEYOND = np.float32(-1e30)  # of a swap beyond the caps, to any gain
NEVER = np.float32(-np.inf)  # gain of a swap that is none


class GainModel(Protocol):
    """A placement and what each swap of it gains, kept up to date by `swap`."""

    rank_of_E: np.ndarray  # int64 [E]
    gain_EE: np.ndarray  # gain of exchanging e and f; -inf within a rank; in units where an average expert is worth 1

    def swap(self, e: int, f: int) -> None:
        """Exchange two experts of different ranks."""
        ...


def rank_loads(rank_of_E: np.ndarray, load_JE: np.ndarray, num_ranks: int) -> np.ndarray:
    """Load of every rank under each load vector, float64 [J, R]."""
    return np.stack([np.bincount(rank_of_E, load_E, num_ranks) for load_E in load_JE])


def overload(rank_of_E: np.ndarray, load_JE: np.ndarray, limit_J: np.ndarray, num_ranks: int) -> float:
    """Load above the limits summed over ranks and load vectors, in units of the limit; 0 exactly
    where all are kept.

    Parameters:
        rank_of_E: rank of each expert, int64 [E].
        load_JE: load vectors, float [J, E], activations.
        limit_J: what a rank may carry of each, float [J].
        num_ranks: R.
    """
    unit_JR = rank_loads(rank_of_E, load_JE, num_ranks) / np.maximum(limit_J, 1e-300)[:, None]
    return float(np.maximum(unit_JR - 1 - 1e-12, 0).sum())


def swap_search(
    gains: GainModel, load_JE: np.ndarray, limit_J: np.ndarray, *, num_ranks: int, steps: int, patience: int, seed: int
) -> tuple[np.ndarray, float]:
    """The best placement found: the least overload, then the highest gain.

    Parameters:
        gains: the placement to start from, and what swaps of it gain; left where the search ends.
        load_JE, limit_J: load vectors and what a rank may carry of each, float64.
        num_ranks: R.
        steps: swaps at most.
        patience: swaps without a better placement after which the search stops.
        seed: of how long a swapped pair stays put.

    Returns:
        Rank of each expert, int64 [E], and what it gains over the start, in units of the gains.
    """
    rng = np.random.default_rng(seed)
    guard = _LoadGuard(gains.rank_of_E, load_JE, limit_J, num_ranks)
    num_experts = len(gains.rank_of_E)
    free_at_E = np.zeros(num_experts, np.int64)
    tenure = max(1, min(num_experts // 10, 12))
    penalty = 0.3 * num_experts / num_ranks
    value, over = 0.0, guard.over()
    best_of_E, best_value, best_over, best_step = gains.rank_of_E.copy(), 0.0, over, 0
    total_EE = np.empty((num_experts, num_experts), np.float32)
    beyond_EE = np.empty((num_experts, num_experts), bool)
    for step in range(steps):
        if step % PENALTY_EVERY == PENALTY_EVERY - 1:
            penalty = min(max(penalty * (PENALTY_UP if over > TIE else PENALTY_DOWN), 1e-4), 1e6)
        # 1. The best placement within the caps that is one swap away is taken where it is the best
        # so far.
        np.greater(guard.over_EE, np.float32(TIE / 10 - over), out=beyond_EE)
        # A sum, as a masked copy of as many numbers takes ten times as long.
        np.multiply(beyond_EE, BEYOND, out=total_EE)
        total_EE += gains.gain_EE
        e, f = divmod(int(total_EE.argmax()), num_experts)
        gain = float(total_EE[e, f])
        # 2. Otherwise the best swap after the penalty, among experts that did not move lately.
        if gain < BEYOND / 2 or (best_over <= TIE and value + gain <= best_value + TIE):
            np.multiply(guard.over_EE, np.float32(-penalty), out=total_EE)
            total_EE += gains.gain_EE
            tabu = np.flatnonzero(free_at_E > step)
            total_EE[tabu] = NEVER
            total_EE[:, tabu] = NEVER
            e, f = divmod(int(total_EE.argmax()), num_experts)
            if not np.isfinite(total_EE[e, f]):
                break
        value += float(gains.gain_EE[e, f])
        guard.swap(e, f, gains.rank_of_E)
        gains.swap(e, f)
        guard.refresh(rows_of_both(gains.rank_of_E, e, f), gains.rank_of_E)
        over = guard.over()
        free_at_E[[e, f]] = step + 1 + tenure + rng.integers(0, tenure + 1, 2)
        if over < best_over - TIE or (over <= best_over + TIE and value > best_value + TIE):
            best_of_E, best_value, best_over, best_step = gains.rank_of_E.copy(), value, over, step
        elif step - best_step >= patience:
            break
    return best_of_E, best_value


def rows_of_both(rank_of_E: np.ndarray, e: int, f: int) -> np.ndarray:
    """Experts on the ranks of e and f, ascending int64."""
    return np.flatnonzero((rank_of_E == rank_of_E[e]) | (rank_of_E == rank_of_E[f]))


class _LoadGuard:
    """Loads of the ranks in units of their limits, and how each swap changes the overload."""

    def __init__(self, rank_of_E: np.ndarray, load_JE: np.ndarray, limit_J: np.ndarray, num_ranks: int) -> None:
        self.unit_JE = (load_JE / np.maximum(limit_J, 1e-300)[:, None]).astype(np.float64)
        self.load_JR = rank_loads(rank_of_E, self.unit_JE, num_ranks) - 1
        # The search compares swaps in single precision; what it returns is judged by `over`, in
        # double.
        self.small_JE = self.unit_JE.astype(np.float32)
        self.over_EE = np.zeros((len(rank_of_E), len(rank_of_E)), np.float32)
        self.refresh(np.arange(len(rank_of_E)), rank_of_E)

    def over(self) -> float:
        return float(np.maximum(self.load_JR - 1e-12, 0).sum())

    def swap(self, e: int, f: int, rank_of_E: np.ndarray) -> None:
        delta_J = self.unit_JE[:, e] - self.unit_JE[:, f]
        self.load_JR[:, rank_of_E[e]] -= delta_J
        self.load_JR[:, rank_of_E[f]] += delta_J

    def refresh(self, rows: np.ndarray, rank_of_E: np.ndarray) -> None:
        """Change of overload of all pairs with an expert of `rows`."""
        over = np.zeros((len(rows), len(rank_of_E)), np.float32)
        for unit_E, load_R in zip(self.small_JE, self.load_JR.astype(np.float32), strict=True):
            load_E = load_R[rank_of_E]
            before_E = np.maximum(load_E, 0)
            # A rank's load without one of its experts, plus the other expert.
            left_E = load_E - unit_E
            mine = left_E[rows][:, None] + unit_E
            over += np.maximum(mine, 0, out=mine)
            np.add(unit_E[rows][:, None], left_E, out=mine)
            over += np.maximum(mine, 0, out=mine)
            over -= np.add(before_E[rows][:, None], before_E, out=mine)
        self.over_EE[rows] = over
        self.over_EE[:, rows] = over.T


class AffinityGains:
    """Gains under  sum_e home[e, x_e] + 1/2 sum_ef affinity[e, f] closeness[x_e, x_f],  the
    diagonal left out.

    `affinity_EE`, `closeness_RR`: symmetric. Where experts attract each other on one rank only
    (identity closeness), a swap changes the gains of pairs with an expert on either rank: a step
    costs O(E^2 / R) and one pass for the maximum.
    """

    def __init__(
        self, rank_of_E: np.ndarray, affinity_EE: np.ndarray, home_ER: np.ndarray, closeness_RR: np.ndarray
    ) -> None:
        size = len(rank_of_E)
        off_EE = affinity_EE - np.diag(np.diagonal(affinity_EE))
        self.scale = max(float(np.abs(off_EE).sum() + np.abs(home_ER).sum()) / size, 1e-300)
        self.rank_of_E = np.array(rank_of_E, np.int64)
        self.affinity_EE = (off_EE / self.scale).astype(np.float32)
        self.closeness_RR = closeness_RR.astype(np.float32)
        own_R = np.diagonal(self.closeness_RR)
        # What an attracting pair loses when its two experts change sides.
        self.pull_RR = own_R[:, None] + own_R[None, :] - 2 * self.closeness_RR
        self.is_apart = bool((self.closeness_RR == np.eye(len(own_R))).all())
        self.value_ER = (home_ER / self.scale).astype(np.float32) + self.affinity_EE @ self.closeness_RR[self.rank_of_E]
        self.gain_EE = np.empty((size, size), np.float32)
        self._refresh(np.arange(size))

    def swap(self, e: int, f: int) -> None:
        a, b = self.rank_of_E[e], self.rank_of_E[f]
        difference_E = self.affinity_EE[e] - self.affinity_EE[f]
        self.rank_of_E[e], self.rank_of_E[f] = b, a
        if self.is_apart:
            self.value_ER[:, a] -= difference_E
            self.value_ER[:, b] += difference_E
            self._refresh(rows_of_both(self.rank_of_E, e, f))
            return
        shift_R = self.closeness_RR[b] - self.closeness_RR[a]
        touched_R = shift_R != 0
        self.value_ER[:, touched_R] += difference_E[:, None] * shift_R[touched_R]
        self._refresh(np.flatnonzero(touched_R[self.rank_of_E]))

    def _refresh(self, rows: np.ndarray) -> None:
        rank_of_E, mine = self.rank_of_E, self.rank_of_E[rows]
        own_E = self.value_ER[np.arange(len(rank_of_E)), rank_of_E]
        gain = (self.value_ER.T - own_E)[mine]
        moved = self.value_ER[rows]
        moved -= own_E[rows][:, None]
        gain += moved.take(rank_of_E, axis=1)
        attraction = self.affinity_EE[rows]
        if self.is_apart:
            attraction *= 2
        else:
            attraction *= self.pull_RR[mine].take(rank_of_E, axis=1)
        gain -= attraction
        np.copyto(gain, NEVER, where=mine[:, None] == rank_of_E)
        self.gain_EE[rows] = gain
        self.gain_EE[:, rows] = gain.T


def affinity_value(
    rank_of_E: np.ndarray, affinity_EE: np.ndarray, home_ER: np.ndarray, closeness_RR: np.ndarray
) -> float:
    """The objective of `AffinityGains` in its own units.

    Parameters:
        rank_of_E: rank of each expert, int64 [E].
        affinity_EE: what experts are worth to each other on one rank, float [E, E].
        home_ER: worth of expert e on rank r, float [E, R].
        closeness_RR: what two ranks count as one rank, float [R, R], 1 on the diagonal.
    """
    pairs_EE = affinity_EE * closeness_RR[rank_of_E[:, None], rank_of_E[None, :]]
    home = home_ER[np.arange(len(rank_of_E)), rank_of_E].sum()
    return float(home + (pairs_EE.sum() - np.trace(pairs_EE)) / 2)
