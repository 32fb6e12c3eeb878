"""Is there structure to use? Lift of held-out co-activation inside groups, against a
degree-preserving shuffle.

Experts are grouped on one half of the requests; on the other half, the pairs of a token's experts
that fall into one group are counted. The shuffle deals all choices anew over the tokens, different
experts to each, so loads and top-k stay and co-activation goes; it is grouped and counted in the
same way, so that groups found in noise do not count as structure.

Shape letters: T tokens, L MoE layers, K top-k, E experts.
"""

from typing import NamedTuple

import numpy as np

from semmoe.profiles.counts import co_activation_EE
from semmoe.profiles.trace import TraceBatch, TraceInfo
from semmoe.solvers.place.exact_counts import co_activation_within, equal_counts
from semmoe.solvers.place.graph import spectral_starts

LEAST_PAIRS = 100  # held-out pairs that chance puts into one group: fewer, and their noise passes for lift
LEAST_SHARE = 0.05  # of the pairs that even choices would put into one group: less is no chance to compare with
LEAST_LIFT = 1.1  # below this, groups save less than the noise between traces


class Structure(NamedTuple):
    """Lift over the shuffle per layer, float64 [L] (1 where it is not known), and what it means."""

    lift_L: np.ndarray
    num_groups: int
    verdict: str


def measure_structure(batch: TraceBatch, info: TraceInfo, *, seed: int) -> Structure | None:
    """Structure of a trace's requests; None where requests or tokens are too few to split, or
    experts too few to group."""
    num_groups = next((g for g in (8, 4, 2) if info.num_experts % g == 0 and info.num_experts > g), None)
    if num_groups is None or batch.num_requests < 4 or info.top_k < 2:
        return None
    rng = np.random.default_rng(seed)
    learn_B = np.zeros(batch.num_requests, bool)
    learn_B[rng.permutation(batch.num_requests)[: batch.num_requests // 2]] = True
    learn_T = np.repeat(learn_B, np.diff(batch.starts_B1))
    pairs_by_chance = (~learn_T).sum() * info.top_k * (info.top_k - 1) / 2 / num_groups
    if not learn_T.any() or pairs_by_chance < LEAST_PAIRS:
        return None
    shares = [
        tuple(
            _share_within(ids, learn_T, info.num_experts, num_groups, seed) for ids in (ids_TK, _shuffled(ids_TK, rng))
        )
        for ids_TK in np.moveaxis(batch.expert_ids_TLK, 1, 0)
    ]
    # Where chance puts next to nothing into a group, no lift over it is known.
    least = LEAST_SHARE / num_groups
    lift_L = np.array([found / chance if chance > least else 1.0 for found, chance in shares])
    found = lift_L.mean() >= LEAST_LIFT
    verdict = "structured: placement can save traffic" if found else "no structure found: placement will save little"
    return Structure(lift_L, num_groups, verdict)


def _shuffled(ids_TK: np.ndarray, rng: np.random.Generator, *, max_rounds: int = 100) -> np.ndarray:
    """The same ids in random cells, no id twice in a row where `max_rounds` of random exchanges
    reach that. [T, K]."""
    cells = rng.permutation(ids_TK.reshape(-1))
    shuffled_TK = cells.reshape(ids_TK.shape)  # the same memory
    rows = np.flatnonzero(_repeats_T(shuffled_TK))
    for _ in range(max_rounds):
        if not len(rows):
            break
        order_TK = np.argsort(shuffled_TK[rows], axis=1, kind="stable")
        in_order_TK = np.take_along_axis(shuffled_TK[rows], order_TK, axis=1)
        row, column = np.nonzero(in_order_TK[:, 1:] == in_order_TK[:, :-1])
        repeated = rows[row] * ids_TK.shape[1] + order_TK[row, column + 1]
        partners = rng.choice(len(cells), size=len(repeated), replace=False)
        cells[repeated], cells[partners] = cells[partners], cells[repeated]
        changed = np.union1d(rows, partners // ids_TK.shape[1])  # no other row can have become one
        rows = changed[_repeats_T(shuffled_TK[changed])]
    return shuffled_TK


def _repeats_T(ids_TK: np.ndarray) -> np.ndarray:
    """Whether a row holds an id twice, bool [T]."""
    ids_KT = np.ascontiguousarray(ids_TK.T)
    found_T = np.zeros(len(ids_TK), bool)
    for i, ids_T in enumerate(ids_KT):
        found_T |= (ids_KT[i + 1 :] == ids_T).any(axis=0)
    return found_T


def _share_within(ids_TK: np.ndarray, learn_T: np.ndarray, num_experts: int, num_groups: int, seed: int) -> float:
    """Share of held-out pairs whose experts are in one group, of groups learned on the rows of
    `learn_T`."""
    learned_EE = co_activation_EE(ids_TK[learn_T], num_experts)
    held_out_EE = co_activation_EE(ids_TK[~learn_T], num_experts)
    start_E = spectral_starts(learned_EE, num_groups, seed=seed, num_starts=1)[0]
    group_of_E = equal_counts(start_E, learned_EE, num_groups)
    pairs = (held_out_EE.sum() - held_out_EE.diagonal().sum()) / 2
    return co_activation_within(group_of_E, held_out_EE) / max(pairs, 1)
