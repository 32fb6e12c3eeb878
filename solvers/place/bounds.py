"""How far from the best any placement can be: upper bounds that hold for every placement under the
same constraints.

Co-activation: a placement is a matrix Z (Z[e, f] = 1 where e and f share a rank) with unit
diagonal, row sums E / R, loads Z load <= limit, Z >= 0 and 0 <= Z <= (E / R) I. The largest
<co-activation, Z> over that set (a doubly non-negative semidefinite programme) is found by ADMM;
at any iterate the multipliers y, u, v >= 0, W >= 0 give a bound that is safe without convergence:
sum y + (E / R) sum u + limit sum v + (E / R) * (sum of the R largest eigenvalues of M), M = C + W -
diag(y) - sym(u 1') - sym(v load'). Local activation by token tables: von Neumann's trace inequality
on the normalised token x expert counts.

Shape letters: L MoE layers, E experts, R ranks, U token ids, K top-k, X kinds of tokens.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from semmoe.profiles.counts import RoutingProfile, token_expert_UE
from semmoe.profiles.errors import InputError
from semmoe.profiles.progress import Progress, unshown
from semmoe.solvers.json_record import JsonRecord
from semmoe.solvers.place.exact_counts import co_activation_within, load_limit, rank_load_R
from semmoe.solvers.placement import Placement
from semmoe.solvers.schedule.windows import TOKEN_CAP

if TYPE_CHECKING:
    from scipy.sparse import csr_array

NO_BOUND = "--certify bounds placements without replicas: leave --replicas out"
NO_BOUND_UNEVEN = "--certify bounds placements without copies: add --spare empty"


@dataclass(frozen=True)
class CertifiedLayer(JsonRecord):
    """Bounds on what any placement of a layer could reach (docs/formats.md)."""

    layer: int
    co_activation: float
    co_activation_bound: float
    gap: float
    rem_bound: float
    lar_bound: float | None = None


@dataclass(frozen=True)
class Certificate(JsonRecord):
    """How far a placement is, at most, from the best under the same constraints."""

    gap: float  # mean over layers
    layers: list[CertifiedLayer]


def certificate_of(
    profile: RoutingProfile, placement: Placement, *, load_cap: float, progress: Progress = unshown
) -> Certificate:
    """How far the placement is, at most, from the best under the same constraints, on the profile
    it was fitted on.

    Parameters:
        profile: counts of the fitted requests.
        placement: without copies; InputError with them.
        load_cap: most load of a rank over the mean. A layer that could not keep it is bounded under
            the load that it has.

    Returns:
        The gap, mean over layers, and of each layer the co-activation within ranks, its upper bound
        and the gap, and the bounds that follow on REM with random homes and, where token ids are
        known, on LAR with a token table.
    """
    if placement.num_copies:
        raise InputError(NO_BOUND if placement.num_replicas else NO_BOUND_UNEVEN)
    tokens = profile.token_index()
    layers = []
    for layer, rank_of_E in enumerate(placement.rank_of_LE):
        layers.append(_layer_bounds(profile, layer, rank_of_E, placement.num_ranks, load_cap, tokens))
        progress(len(layers), profile.info.num_layers)
    return Certificate(float(np.mean([layer.gap for layer in layers])), layers)


def _layer_bounds(
    profile: RoutingProfile,
    layer: int,
    rank_of_E: np.ndarray,
    num_ranks: int,
    load_cap: float,
    tokens: tuple[np.ndarray, np.ndarray],
) -> CertifiedLayer:
    """One entry of the certificate. `tokens`: `RoutingProfile.token_index`."""
    info, load_E, affinity_EE = profile.info, profile.load_LE[layer], profile.co_activation_LEE[layer]
    # Where the cap could not be kept, the bound is for the load that the placement has.
    limit = max(load_limit(load_E, num_ranks, load_cap), float(rank_load_R(rank_of_E, load_E, num_ranks).max()))
    found = certify(rank_of_E, affinity_EE, load_E, limit, num_ranks)
    ranks_touched = remote_rank_bound(found.bound, affinity_EE, profile.num_tokens, info.top_k, num_ranks)
    rem_bound, lar_bound = ranks_touched * (1 - 1 / num_ranks), None
    ids_U, index_T = tokens
    if len(ids_U):
        counts_UE = token_expert_UE(index_T, profile.sample.expert_ids_TLK[:, layer], len(ids_U), info.num_experts)
        caps = {"load_cap": limit * num_ranks / max(float(load_E.sum()), 1.0), "token_cap": TOKEN_CAP}
        lar_bound = local_activation_bound(counts_UE, num_ranks, **caps)
    return CertifiedLayer(layer, found.reached, found.bound, found.gap, rem_bound, lar_bound)


class LayerBound(NamedTuple):
    """One layer's co-activation within ranks: what was reached, what nothing can exceed, and the
    rest as a share of it."""

    reached: float
    bound: float

    @property
    def gap(self) -> float:
        return max(0.0, 1 - self.reached / self.bound) if self.bound > 0 else 0.0


def certify(
    rank_of_E: np.ndarray,
    affinity_EE: np.ndarray,
    load_E: np.ndarray,
    limit: float,
    num_ranks: int,
    *,
    iterations: int = 200,
) -> LayerBound:
    """Certificate of one layer's placement without replicas.

    Parameters:
        rank_of_E: int [E], up to ceil(E / R) experts on each rank.
        affinity_EE: tokens that chose both experts, symmetric [E, E]; the diagonal is the load.
        load_E: activations, [E].
        limit: activations that a rank may carry.
        num_ranks: R.
        iterations: of the search for multipliers; the bound is safe after any number.
    """
    reached = co_activation_within(rank_of_E, affinity_EE)
    bound = co_activation_bound(affinity_EE, load_E, limit, num_ranks, iterations=iterations)
    return LayerBound(reached, max(bound, reached))


def co_activation_bound(
    affinity_EE: np.ndarray, load_E: np.ndarray, limit: float, num_ranks: int, *, iterations: int = 200
) -> float:
    """No placement in even shares with rank loads up to `limit` has more co-activation within
    ranks, each pair once. Arguments as of `certify`.

    Parameters:
        affinity_EE: co-activations, float [E, E], symmetric.
        load_E: activations, float [E].
        limit: most load of a rank, activations.
        num_ranks: R.
        iterations: steps of the multipliers; more of them tighten the bound.

    Returns:
        Co-activations, in the units of `affinity_EE`.
    """
    # Ranks with room for one more hold an expert that nobody chooses: every placement is one of
    # equal counts then.
    spare = -len(load_E) % num_ranks
    affinity_EE, load_E = np.pad(affinity_EE, (0, spare)), np.pad(load_E, (0, spare))
    num_experts = len(load_E)
    total = float(affinity_EE.sum() - np.trace(affinity_EE)) / 2
    size = num_experts // num_ranks
    if num_ranks == 1 or size == 1 or num_experts <= 2 or total == 0:
        return total if num_ranks == 1 else (0.0 if size == 1 or total == 0 else float(affinity_EE.max()))
    programme = _programme(affinity_EE, load_E.astype(np.float64), limit, total, num_ranks)
    pull_EE = programme.cost_EE / (4 * programme.rho)
    z_EE = np.full((num_experts, num_experts), (size - 1) / (num_experts - 1))
    np.fill_diagonal(z_EE, 1.0)
    best = 1.0
    # Scaled multipliers of the four sets: affine, non-negative, loads, spectrum.
    scaled = [-pull_EE for _ in range(4)]
    for iteration in range(1, iterations + 1):
        points = [
            _to_affine(z_EE - scaled[0], size),
            np.maximum(z_EE - scaled[1], 0),
            _to_loads(z_EE - scaled[2], programme.unit_E, programme.unit_limit),
            _to_spectrum(z_EE - scaled[3], size),
        ]
        z_EE = sum(p + s for p, s in zip(points, scaled, strict=True)) / 4 + pull_EE
        z_EE = (z_EE + z_EE.T) / 2
        scaled = [s + p - z_EE for p, s in zip(points, scaled, strict=True)]
        if iteration % 20 == 0 or iteration == iterations:
            best = min(best, _safe_bound(programme, scaled))
    return best * total


class _Programme(NamedTuple):
    """The semidefinite programme of one layer; co-activation sums to 1, loads are a unit vector."""

    half_EE: np.ndarray  # co-activation of every pair, half in each triangle; no diagonal
    start_E: np.ndarray  # part of the multipliers u that centres the rows
    cost_EE: np.ndarray  # what is left of the co-activation
    rho: float  # step of ADMM
    unit_E: np.ndarray
    unit_limit: float
    size: int  # experts on a rank
    num_ranks: int


def _programme(affinity_EE: np.ndarray, load_E: np.ndarray, limit: float, total: float, num_ranks: int) -> _Programme:
    num_experts = len(load_E)
    size = num_experts // num_ranks
    half_EE = (affinity_EE - np.diag(np.diagonal(affinity_EE))).astype(np.float64) / (2 * total)
    start_E = (half_EE.sum(axis=1) - half_EE.sum() / (2 * num_experts)) * 2 / num_experts
    cost_EE = half_EE - (start_E[:, None] + start_E[None, :]) / 2
    rho = 2 * float(np.linalg.norm(cost_EE)) / (size * np.sqrt(num_ranks))
    norm = np.linalg.norm(load_E)
    return _Programme(half_EE, start_E, cost_EE, rho, load_E / norm, float(limit / norm), size, num_ranks)


def _safe_bound(programme: _Programme, scaled: list[np.ndarray]) -> float:
    """The bound of the module docstring from the iterate's scaled multipliers, each made feasible
    first."""
    rho, size, unit_E = programme.rho, programme.size, programme.unit_E
    y_E, u_E = _affine_multipliers(-rho * scaled[0])
    u_E = u_E + programme.start_E
    w_EE = np.maximum(rho * (scaled[1] + scaled[1].T) / 2, 0)
    v_E = np.maximum(-rho * scaled[2] @ unit_E, 0)
    m_EE = programme.half_EE + w_EE - np.diag(y_E) - (u_E[:, None] + u_E[None, :]) / 2
    m_EE -= (np.outer(v_E, unit_E) + np.outer(unit_E, v_E)) / 2
    largest = np.linalg.eigvalsh(m_EE)[-programme.num_ranks :].sum()
    return float(y_E.sum() + size * u_E.sum() + programme.unit_limit * v_E.sum() + size * largest)


def _affine_multipliers(g_EE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """y, u with diag(y) + sym(u 1') nearest to g: same diagonal and same row sums."""
    g_EE = (g_EE + g_EE.T) / 2
    diagonal_E = np.diagonal(g_EE)
    return _spread(diagonal_E, g_EE.sum(axis=1) - diagonal_E)


def _to_affine(a_EE: np.ndarray, size: int) -> np.ndarray:
    """Nearest symmetric matrix with unit diagonal and row sums `size`."""
    a_EE = (a_EE + a_EE.T) / 2
    # What must be removed has diagonal a - 1 and row sums r - size.
    excess_E = np.diagonal(a_EE) - 1
    y_E, u_E = _spread(excess_E, a_EE.sum(axis=1) - size - excess_E)
    return a_EE - np.diag(y_E) - (u_E[:, None] + u_E[None, :]) / 2


def _spread(diagonal_E: np.ndarray, rest_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """y, u such that diag(y) + sym(u 1') has this diagonal, and rows that sum to `rest_E` beside
    it."""
    num = len(rest_E)
    u_E = (rest_E - rest_E.sum() / (num - 1) / 2) / (num / 2 - 1)
    return diagonal_E - u_E, u_E


def _to_loads(a_EE: np.ndarray, unit_E: np.ndarray, unit_limit: float) -> np.ndarray:
    """Nearest matrix whose rows carry at most the limit."""
    over_E = np.maximum(a_EE @ unit_E - unit_limit, 0)
    return a_EE - over_E[:, None] * unit_E[None, :]


def _to_spectrum(a_EE: np.ndarray, size: int) -> np.ndarray:
    """Nearest symmetric matrix with eigenvalues in [0, size] and trace E."""
    values_E, vectors_EE = np.linalg.eigh((a_EE + a_EE.T) / 2)
    low, high = values_E.min() - size, values_E.max()
    for _ in range(60):
        middle = (low + high) / 2
        if np.clip(values_E - middle, 0, size).sum() > len(values_E):
            low = middle
        else:
            high = middle
    kept_E = np.clip(values_E - (low + high) / 2, 0, size)
    some = kept_E > 0
    return (vectors_EE[:, some] * kept_E[some]) @ vectors_EE[:, some].T


def remote_rank_bound(
    co_activation: float, affinity_EE: np.ndarray, num_tokens: int, top_k: int, num_ranks: int
) -> float:
    """No placement with at most this co-activation within ranks has fewer ranks per token, mean
    over the counted tokens.

    A token with c experts, k_1, k_2, ... of them on the ranks it touches, holds sum k (k - 1) / 2
    pairs. The mean token is a mixture of all that a token can be: the mixture that touches fewest
    ranks, at the mean experts, pairs and pairs within ranks per token (a linear programme), bounds
    the mean. Tokens have fewer than top-k experts where slots are empty.

    Parameters:
        co_activation: tokens that chose both of two experts of a rank, summed over such pairs.
        affinity_EE: all co-activation of the counted tokens, [E, E], loads on the diagonal.
        num_tokens, top_k, num_ranks: tokens that were counted, K, R.

    Returns:
        Ranks that a token needs, its own included where it is one of them; 0 where the programme
        has no solution.
    """
    from scipy.optimize import linprog

    experts_per_rank = -(-len(affinity_EE) // num_ranks)
    activations = float(np.trace(affinity_EE))
    all_pairs = (float(affinity_EE.sum()) - activations) / 2
    full = activations == top_k * num_tokens
    kinds = {
        (count, sum(k * (k - 1) // 2 for k in parts), len(parts))
        for count in ([top_k] if full else range(top_k + 1))
        for parts in _integer_partitions(count, min(experts_per_rank, top_k))
        if len(parts) <= num_ranks
    }
    count_X, pairs_X, ranks_X = np.array(sorted(kinds), np.float64).T
    moments = np.stack([np.ones(len(kinds)), count_X, count_X * (count_X - 1) / 2])
    means = np.array([num_tokens, activations, all_pairs]) / max(num_tokens, 1)
    known = slice(1) if full else slice(3)
    found = linprog(
        ranks_X,
        A_ub=pairs_X[None],
        b_ub=[co_activation / max(num_tokens, 1)],
        A_eq=moments[known],
        b_eq=means[known],
    )
    return float(found.fun) if found.status == 0 else 0.0


def _integer_partitions(total: int, largest: int) -> list[tuple[int, ...]]:
    if total == 0:
        return [()]
    return [
        (first, *rest)
        for first in range(min(total, largest), 0, -1)
        for rest in _integer_partitions(total - first, first)
    ]


def local_activation_bound(
    token_expert_UE: "np.ndarray | csr_array", num_ranks: int, *, load_cap: float = 1.0, token_cap: float = 1.0
) -> float:
    """No placement and token table within the caps have a larger share of local activations on
    these counts.

    Parameters:
        token_expert_UE: how often each token id chose each expert, [U, E], dense or scipy sparse.
            Counting noise is in the bound: on few tokens per id it is loose.
        num_ranks: R.
        load_cap: most activations of a rank over the mean.
        token_cap: most tokens that live on a rank over the mean.

    Returns:
        A share of all activations, 0 to 1.
    """
    row_U = np.asarray(token_expert_UE.sum(axis=1)).reshape(-1).astype(np.float64)
    column_E = np.asarray(token_expert_UE.sum(axis=0)).reshape(-1).astype(np.float64)
    right_E = 1 / np.sqrt(np.maximum(column_E, 1))
    # The Gram matrix of diag(row)^-1/2 N diag(column)^-1/2: its eigenvalues are squared singular
    # values.
    weight_U = 1 / np.maximum(row_U, 1)
    if isinstance(token_expert_UE, np.ndarray):
        gram_EE = (token_expert_UE * weight_U[:, None]).T @ token_expert_UE
    else:
        gram_EE = (token_expert_UE.T @ token_expert_UE.multiply(weight_U[:, None])).toarray()
    values = np.linalg.eigvalsh(right_E[:, None] * gram_EE * right_E[None, :])[-num_ranks:]
    return float(min(1.0, np.sqrt(load_cap * token_cap) * np.sqrt(np.maximum(values, 0)).sum() / num_ranks))
