"""One layer's experts split over ranks: several starts, swap search on co-activation, exact remote
ranks on the best.

Starts are spectral partitions, METIS partitions and contiguous blocks; all get a short search, the
better ones a longer one (successive halving), and the best few are polished on the exact objective.
Everything is deterministic in the seed.

Shape letters: X token kinds, K top-k, E experts, R ranks, J load vectors.
"""

from typing import NamedTuple

import numpy as np

from semmoe.solvers.place.baselines import place_load
from semmoe.solvers.place.exact_counts import co_activation_within, equal_counts
from semmoe.solvers.place.graph import balanced_k_means, metis_partition, spectral_embedding
from semmoe.solvers.place.remote_gains import RemoteGains, remote_cost
from semmoe.solvers.place.swap import AffinityGains, affinity_value, overload, rank_loads, swap_search
from semmoe.solvers.placement import part_sizes

PACKING_STEPS = 100


# Remote ranks that a pair of a token's experts on one rank is worth beyond those it saves. Counts
# of whole expert sets are few, so the exact objective alone fits their noise; pairs are counted
# better, and a token with most experts on one rank is easier to send home. Held-out REM and LAR
# were both better from .1 to .2 on the real traces (docs/experiments.md).
PAIR_WORTH = 0.15


# Into many parts METIS's runs differ most: twice the seeds left .1 % fewer remote ranks at 64
# ranks, and not fewer at 8 and 32.
MANY_RANKS = 32


class Effort(NamedTuple):
    """How much is tried. Steps are swaps; small layers get up to four times the starts, because
    a step costs little."""

    spectral_starts: int
    metis_seeds: int  # two partitions each: k-way and by bisection; twice as many above MANY_RANKS
    steps: int  # of the first search from each start
    finalists: int  # searched three times as long, then polished
    polish_steps: int
    token_rows: int  # tokens that the exact objective looks at
    rounds: int  # rounds of homes and experts in turn


EFFORTS = {
    "fast": Effort(1, 1, 60, 1, 40, 16_384, 0),
    "default": Effort(2, 2, 60, 3, 120, 32_768, 1),
    "max": Effort(6, 6, 250, 6, 300, 131_072, 3),
}


class Problem(NamedTuple):
    """What a partition of one layer is judged by. Costs and homes are in tokens and activations."""

    affinity_EE: np.ndarray  # co-activation, any numbers, symmetric
    expert_ids_XK: np.ndarray  # distinct ids in a row; E = empty slot
    cost_XR: np.ndarray  # cost of touching each rank, summed over the kind's tokens; no rows: affinity decides alone
    home_ER: np.ndarray  # worth of expert e on rank r
    closeness_RR: np.ndarray
    load_JE: np.ndarray  # float64
    limit_J: np.ndarray


def load_limits(load_JE: np.ndarray, num_ranks: int, load_cap: float) -> np.ndarray:
    """What a rank may carry of each load vector, float64 [J]: load_cap times the mean.

    Where packing by load alone does not get there (one expert may be too hot), the limit is what it
    reaches.
    """
    limit_J = load_cap * load_JE.sum(axis=1) / num_ranks
    for j, load_E in enumerate(load_JE):
        packed_E = place_load(load_E[None], num_ranks)[0]
        if overload(packed_E, load_E[None], limit_J[j : j + 1], num_ranks) > 0:
            nothing_EE = np.zeros((len(load_E), len(load_E)))
            gains = AffinityGains(packed_E, nothing_EE, np.zeros((len(load_E), num_ranks)), np.eye(num_ranks))
            options = {"num_ranks": num_ranks, "steps": PACKING_STEPS, "patience": PACKING_STEPS, "seed": 0}
            packed_E, _ = swap_search(gains, load_E[None], limit_J[j : j + 1], **options)
            limit_J[j] = max(limit_J[j], rank_loads(packed_E, load_E[None], num_ranks).max())
    return limit_J


def partition(problem: Problem, num_ranks: int, effort: Effort, *, seed: int, contiguous: bool) -> np.ndarray:
    """The best partition of several starts, experts in even shares (`part_sizes`).

    Parameters:
        problem: what it is judged by; without token kinds, by affinity alone.
        num_ranks: R, parts to split into.
        effort: how many starts and steps.
        seed: of the first start of each kind, and of the searches.
        contiguous: consecutive ids are a start too (models whose routing groups are consecutive).

    Returns:
        Rank of each expert, int64 [E]; within the limits wherever the search found any such
        placement.
    """
    num_experts = len(problem.affinity_EE)
    if num_ranks == 1:
        return np.zeros(num_experts, np.int64)
    if num_ranks >= num_experts:
        return np.arange(num_experts)
    # Step 1: a short search on co-activation from every start.
    more = int(np.clip(256 // num_experts, 1, 4))
    starts = _starts(problem, num_ranks, effort, more, seed, contiguous)
    found = [search_pairs(start, problem, effort.steps, seed + i) for i, start in enumerate(starts)]
    found = _best(found, problem, num_ranks, effort.finalists * more)
    # Step 2: a longer one from the better half.
    longer = [search_pairs(rank_of_E, problem, 3 * effort.steps, seed + i) for i, rank_of_E in enumerate(found)]
    found = _best(found + longer, problem, num_ranks, effort.finalists * min(more, 2))
    if len(problem.expert_ids_XK) == 0:
        return found[0]
    # Step 3: the exact objective for the best few.
    steps = effort.polish_steps
    return best_polished([polish(f, problem, steps, seed + i) for i, f in enumerate(found)], problem, num_ranks)


def search_pairs(rank_of_E: np.ndarray, problem: Problem, steps: int, seed: int) -> np.ndarray:
    """The placement improved on pairs of experts alone. Arguments and result as of `polish`."""
    no_home_ER = np.zeros_like(problem.home_ER)
    gains = AffinityGains(rank_of_E, problem.affinity_EE, no_home_ER, problem.closeness_RR)
    options = {"num_ranks": problem.home_ER.shape[1], "steps": steps, "patience": steps // 2, "seed": seed}
    return swap_search(gains, problem.load_JE, problem.limit_J, **options)[0]


def polish(rank_of_E: np.ndarray, problem: Problem, steps: int, seed: int) -> np.ndarray:
    """The placement improved on the exact objective: worth of homes and of pairs less the remote
    cost.

    Parameters:
        rank_of_E: rank of each expert, int64 [E].
        problem: what it is judged by.
        steps: of the search; half of them without a gain end it.
        seed: of how long a swapped pair stays put.

    Returns:
        int64 [E].
    """
    pair_EE = PAIR_WORTH * problem.affinity_EE
    gains = RemoteGains(rank_of_E, problem.expert_ids_XK, problem.cost_XR, problem.home_ER, pair_EE)
    num_ranks = problem.home_ER.shape[1]
    options = {"num_ranks": num_ranks, "steps": steps, "patience": max(steps // 2, 20), "seed": seed}
    return swap_search(gains, problem.load_JE, problem.limit_J, **options)[0]


def exact_value(rank_of_E: np.ndarray, problem: Problem) -> float:
    """Worth of homes and of pairs less the remote cost: what `polish` maximises."""
    home = problem.home_ER[np.arange(len(rank_of_E)), rank_of_E].sum()
    pairs = co_activation_within(rank_of_E, problem.affinity_EE)
    return float(home) + PAIR_WORTH * pairs - remote_cost(rank_of_E, problem.expert_ids_XK, problem.cost_XR)


def best_polished(candidates: list[np.ndarray], problem: Problem, num_ranks: int) -> np.ndarray:
    """The candidate with least overload, then the highest exact value; the first among equals."""
    scores = [(-overload(c, problem.load_JE, problem.limit_J, num_ranks), exact_value(c, problem)) for c in candidates]
    return candidates[scores.index(max(scores))]


def _best(candidates: list[np.ndarray], problem: Problem, num_ranks: int, count: int) -> list[np.ndarray]:
    """The `count` best different candidates: least overload, then most affinity."""
    zero_ER = np.zeros_like(problem.home_ER)
    keyed = [
        (
            overload(c, problem.load_JE, problem.limit_J, num_ranks),
            -affinity_value(c, problem.affinity_EE, zero_ER, problem.closeness_RR),
            i,
        )
        for i, c in enumerate(candidates)
    ]
    kept: list[np.ndarray] = []
    values: set[tuple[float, float]] = set()
    for over, value, i in sorted(keyed):
        # Equal values are the same partition under other labels, in all likelihood.
        if (over, value) not in values and len(kept) < count:
            values.add((over, value))
            kept.append(candidates[i])
    return kept


def _starts(
    problem: Problem, num_ranks: int, effort: Effort, more: int, seed: int, contiguous: bool
) -> list[np.ndarray]:
    affinity_EE, load_E = problem.affinity_EE, problem.load_JE[0]
    num_experts = len(affinity_EE)
    starts = []
    if contiguous:
        starts.append(np.repeat(np.arange(num_ranks), part_sizes(num_experts, num_ranks)))
    if affinity_EE.any():
        points_EM = spectral_embedding(affinity_EE, min(num_ranks, num_experts - 1))
        rounds = 30 if num_experts <= 128 else 6
        starts += [
            balanced_k_means(points_EM, num_ranks, seed=seed + i, max_rounds=rounds)
            for i in range(effort.spectral_starts * more)
        ]
        if (affinity_EE - np.diag(np.diagonal(affinity_EE))).any():
            metis_seeds = effort.metis_seeds * more * (2 if num_ranks > MANY_RANKS else 1)
            parts = [
                metis_partition(affinity_EE, load_E, num_ranks, seed + i, recursive)
                for i in range(metis_seeds)
                for recursive in (False, True)
            ]
            starts += [equal_counts(part, affinity_EE, num_ranks) for part in parts]
    return starts or [place_load(load_E[None], num_ranks)[0].astype(np.int64)]
