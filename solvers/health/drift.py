"""Drift: does a placement learned on some traffic hold on other traffic, by domain and over time?

Two answers beside each other: how far expert loads are apart, against what random groups of
requests of the same sizes show, and what REM and load imbalance become where a placement is used on
requests of a kind that it was not learned from.

Shape letters: L MoE layers, T tokens, K top-k, E experts, R ranks, B requests.
"""

from typing import NamedTuple

import numpy as np

from semmoe.profiles.counts import co_activation_EE, load_E, request_expert_BE
from semmoe.profiles.split import domain_groups
from semmoe.profiles.trace import TraceBatch
from semmoe.solvers.evaluate.reached import reached_T
from semmoe.solvers.health.record import DomainDrift, TimeDrift, WindowDrift
from semmoe.solvers.place.graph import place_quickly

MAX_DRIFT_REQUESTS = 2000
NUM_WAYS = 3  # ways to halve the requests that are averaged


def _drift_counts(ids_LTK: np.ndarray, batch: TraceBatch, num_experts: int) -> np.ndarray:
    """Activations per request, int64 [B, L, E]."""
    request_T = batch.request_of_T
    return np.stack(
        [request_expert_BE(request_T, ids_TK, batch.num_requests, num_experts) for ids_TK in ids_LTK], axis=1
    )


def load_distance(first_LE: np.ndarray, second_LE: np.ndarray) -> float:
    """Total variation between two load distributions, mean over layers: the share of activations
    that would have to change expert."""
    first = first_LE / np.maximum(first_LE.sum(1, keepdims=True), 1)
    second = second_LE / np.maximum(second_LE.sum(1, keepdims=True), 1)
    return float(np.abs(first - second).sum(1).mean() / 2)


def _distance_and_noise(
    counts_BLE: np.ndarray, in_first_B: np.ndarray, seed: int, num_draws: int = 20
) -> tuple[float, float, float]:
    """Distance between two groups of requests, and the mean and the 95th percentile of what
    random groups of those sizes show."""
    rng = np.random.default_rng(seed)
    total_LE = counts_BLE.sum(0)

    def distance(mask_B: np.ndarray) -> float:
        first_LE = counts_BLE[mask_B].sum(0)
        return load_distance(first_LE, total_LE - first_LE)

    drawn = [distance(rng.permutation(in_first_B)) for _ in range(num_draws)]
    return distance(in_first_B), float(np.mean(drawn)), float(np.quantile(drawn, 0.95))


class Fit(NamedTuple):
    """A quick placement and the tokens that it was learned from."""

    learned_T: np.ndarray  # bool [T]
    rank_of_LE: np.ndarray


def cross_fits(ids_LTK: np.ndarray, batch: TraceBatch, num_experts: int, num_ranks: int, seed: int) -> list[Fit]:
    """Placements learned on both sides of several random halvings of the requests; none where there
    are too few.

    Several, because one placement is better or worse than the next by as much as a domain may cost.

    Parameters:
        ids_LTK: expert ids by layer, integers [L, T, K], tokens in the order of the batch.
        batch: the requests, for their bounds.
        num_experts, num_ranks: E and R of the placements.
        seed: of the halvings and of the placements.
    """
    if num_ranks < 2 or batch.num_requests < 10:
        return []
    firsts = [random_share_B(batch, 0.5, seed + way)[batch.request_of_T] for way in range(NUM_WAYS)]
    sides = [side for first_T in firsts for side in (first_T, ~first_T)]
    return [Fit(side, fit_ranks_LE(ids_LTK[:, side], num_experts, num_ranks, seed)) for side in sides]


def _scored(ids_LTK: np.ndarray, chosen_T: np.ndarray, fits: list[Fit], num_ranks: int) -> tuple[float, float]:
    """REM and load imbalance (mean over layers) of chosen tokens under fits that did not learn
    from them, weighted by tokens."""
    num_tokens, total = 0, np.zeros(2)
    for fit in fits:
        scored_LTK = ids_LTK[:, chosen_T & ~fit.learned_T]
        if not scored_LTK.shape[1]:
            continue
        num_experts = fit.rank_of_LE.shape[1]
        load_LE = np.stack([load_E(ids_TK, num_experts) for ids_TK in scored_LTK])
        load_LR = np.stack([np.bincount(r, w, num_ranks) for r, w in zip(fit.rank_of_LE, load_LE, strict=True)])
        imbalance = (load_LR.max(1) / np.maximum(load_LR.mean(1), 1e-12)).mean()
        num_tokens += scored_LTK.shape[1]
        total += np.array([rem_T(scored_LTK, fit.rank_of_LE, num_ranks).mean(), imbalance]) * scored_LTK.shape[1]
    rem, imbalance = total / max(num_tokens, 1)
    return float(rem), float(imbalance)


def domain_drift(
    ids_LTK: np.ndarray, batch: TraceBatch, fits: list[Fit], num_experts: int, num_ranks: int, seed: int
) -> list[DomainDrift] | None:
    """Each domain against all others: distance of loads, and REM and load imbalance on it when
    it was left out of learning or not.

    Parameters:
        ids_LTK, batch, num_experts, num_ranks, seed: as of `cross_fits`.
        fits: its placements.

    Returns:
        One record a domain; None where there are fewer than two.
    """
    names, domain_B = domain_groups(batch.domains)
    if len(names) < 2 or not fits:
        return None
    looked_B = np.zeros(batch.num_requests, bool)
    looked_B[np.random.default_rng(seed).permutation(batch.num_requests)[:MAX_DRIFT_REQUESTS]] = True
    request_T = batch.request_of_T
    counts_BLE = _drift_counts(ids_LTK, batch, num_experts)[looked_B]
    rows = []
    for index, name in enumerate(names):
        member_B = domain_B == index
        member_T = member_B[request_T]
        if not member_T.any() or member_B.all() or not (member_B & looked_B).any():
            continue
        # As many requests to learn from as for the cross fits, drawn from the other domains where
        # they have them.
        others = np.random.default_rng([seed, index]).permutation(np.flatnonzero(~member_B))[: batch.num_requests // 2]
        learn_B = np.zeros(batch.num_requests, bool)
        learn_B[others] = True
        learn_T = learn_B[request_T]
        left_out = Fit(learn_T, fit_ranks_LE(ids_LTK[:, learn_T], num_experts, num_ranks, seed))
        rem_known, imbalance_known = _scored(ids_LTK, member_T, fits, num_ranks)
        rem_left_out, imbalance_left_out = _scored(ids_LTK, member_T, [left_out], num_ranks)
        rows.append(
            DomainDrift(
                name,
                int(member_B.sum()),
                int(member_T.sum()),
                *_distance_and_noise(counts_BLE, member_B[looked_B], seed),
                rem_known=rem_known,
                rem_left_out=rem_left_out,
                imbalance_known=imbalance_known,
                imbalance_left_out=imbalance_left_out,
            )
        )
    return rows


def time_drift(
    ids_LTK: np.ndarray,
    batch: TraceBatch,
    fits: list[Fit],
    num_experts: int,
    num_ranks: int,
    seed: int,
    num_windows: int = 10,
) -> TimeDrift | None:
    """Windows of requests in stored order against all others, and a placement of the earlier
    half scored on the later one.

    "mixed": on the same later half, after learning on as many requests drawn from the whole trace.

    Parameters:
        ids_LTK, batch, num_experts, num_ranks, seed: as of `cross_fits`.
        fits: its placements.
        num_windows: windows of equally many requests.
    """
    if batch.num_requests < 2 * num_windows or not fits:
        return None
    request_T = batch.request_of_T
    tokens_B = np.diff(batch.starts_B1)
    window_B = np.minimum((np.cumsum(tokens_B) - 1) * num_windows // max(tokens_B.sum(), 1), num_windows - 1)
    looked_B = np.linspace(0, batch.num_requests - 1, min(MAX_DRIFT_REQUESTS, batch.num_requests)).astype(int)
    counts_BLE = _drift_counts(ids_LTK, batch, num_experts)[looked_B]
    windows = [
        WindowDrift(w, *_distance_and_noise(counts_BLE, window_B[looked_B] == w, seed))
        for w in range(num_windows)
        if (window_B[looked_B] == w).any()
    ]
    early_T = (window_B < num_windows // 2)[request_T]
    if early_T.all() or not early_T.any():
        return None
    earlier = Fit(early_T, fit_ranks_LE(ids_LTK[:, early_T], num_experts, num_ranks, seed))
    rem_later, imbalance_later = _scored(ids_LTK, ~early_T, [earlier], num_ranks)
    rem_mixed, imbalance_mixed = _scored(ids_LTK, ~early_T, fits, num_ranks)
    return TimeDrift(windows, rem_later, rem_mixed, imbalance_later, imbalance_mixed)


def fit_ranks_LE(ids_LTK: np.ndarray, num_experts: int, num_ranks: int, seed: int) -> np.ndarray:
    """A quick placement by co-activation, int64 [L, E].

    Parameters:
        ids_LTK: expert ids by layer, integers [L, T, K].
        num_experts, num_ranks: E and R.
        seed: of the partition.
    """
    pairs_LEE = np.stack([co_activation_EE(ids_TK, num_experts) for ids_TK in ids_LTK])
    return place_quickly(pairs_LEE, num_ranks, seed)


def rem_T(ids_LTK: np.ndarray, rank_of_LE: np.ndarray, num_ranks: int) -> np.ndarray:
    """Remote ranks of each token at a random home, mean over layers, float64 [T]."""
    reached = sum(
        reached_T(ids_TK, ranks_E, num_ranks).astype(np.float64)
        for ids_TK, ranks_E in zip(ids_LTK, rank_of_LE, strict=True)
    )
    return np.asarray(reached) / len(ids_LTK) * (1 - 1 / num_ranks)


def random_share_B(batch: TraceBatch, share: float, seed: int) -> np.ndarray:
    """A random share of the requests, at least one and not all, bool [B]."""
    chosen_B = np.zeros(batch.num_requests, bool)
    count = min(max(1, round(share * batch.num_requests)), batch.num_requests - 1)
    chosen_B[np.random.default_rng(seed).permutation(batch.num_requests)[:count]] = True
    return chosen_B
