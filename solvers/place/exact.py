"""The best placement of a small layer, proven: a mixed-integer programme over all tokens (scipy's
HiGHS).

Minimises the cost of the ranks that tokens touch, less the worth of homes, with exact counts and
load limits. It grows with the number of distinct expert sets times ranks: meant for tests, and for
seeing what a heuristic leaves.

Shape letters: X token kinds, K top-k, E experts, R ranks, J load vectors, L MoE layers.
"""

import numpy as np

from semmoe.profiles.counts import RoutingProfile
from semmoe.profiles.errors import InputError
from semmoe.solvers.place.exact_counts import resampled_loads
from semmoe.solvers.place.partition import load_limits
from semmoe.solvers.place.remote_gains import token_kinds
from semmoe.solvers.placement import Topology, part_sizes

MAX_VARIABLES = 6_000
TIME_LIMIT = 120.0  # seconds per layer


def place_exact(
    profile: RoutingProfile, topology: Topology, *, load_cap: float, robust: int = 0, seed: int = 0
) -> np.ndarray:
    """The placement with the fewest remote ranks on the profile's sample, proven.

    Parameters:
        profile: counts of the requests to fit, and a sample of them.
        topology: its ranks; nodes and costs are not looked at.
        load_cap: most load of a rank over the mean, or what packing by load alone reaches.
        robust: resamples of the requests that each keep the load cap (`resampled_loads`).
        seed: of the resamples.

    Returns:
        Rank of each expert, int64 [L, E].

    Raises InputError where a layer is too large, has no placement under the caps, or is not solved
    to the end within the time limit.
    """
    num_ranks = topology.num_ranks
    load_LJE = resampled_loads(profile, robust, seed)
    placed = []
    for layer in range(profile.info.num_layers):
        kinds_XK, kind_T = token_kinds(profile.sample.expert_ids_TLK[:, layer], profile.info.num_experts)
        size = (len(kinds_XK) + profile.info.num_experts) * num_ranks
        if size > MAX_VARIABLES:
            raise InputError(
                f"--method exact: layer {layer} has {len(kinds_XK)} distinct expert sets on {num_ranks} ranks, "
                f"{size} variables of at most {MAX_VARIABLES}"
            )
        cost_XR = np.repeat(np.bincount(kind_T, minlength=len(kinds_XK))[:, None], num_ranks, axis=1).astype(np.float64)
        load_JE = load_LJE[layer]
        home_ER = np.zeros((profile.info.num_experts, num_ranks))
        placed.append(solve_exact(kinds_XK, cost_XR, home_ER, load_JE, load_limits(load_JE, num_ranks, load_cap)))
    return np.stack(placed)


def solve_exact(
    expert_ids_XK: np.ndarray, cost_XR: np.ndarray, home_ER: np.ndarray, load_JE: np.ndarray, limit_J: np.ndarray
) -> np.ndarray:
    """Rank of each expert, int64 [E], at the least of (cost of touched ranks - worth of homes).

    Parameters:
        expert_ids_XK: experts of each token kind, integers; E stands for an empty slot.
        cost_XR: cost of touching each rank, float, summed over a kind's tokens.
        home_ER: worth of expert e on rank r, in the units of the cost.
        load_JE, limit_J: load vectors and what a rank may carry of each, activations.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array, hstack, kron, vstack
    from scipy.sparse import eye_array as eye

    num_kinds, num_ranks = cost_XR.shape
    num_experts = len(home_ER)
    # Variables: on[e, r] (binary), then touched[x, r], which is 1 where any expert of the kind is
    # there.
    num_on, num_touched = num_experts * num_ranks, num_kinds * num_ranks
    nothing = coo_array((num_experts, num_touched))
    one_rank = hstack([kron(eye(num_experts), np.ones((1, num_ranks))), nothing])
    counts = hstack([kron(np.ones((1, num_experts)), eye(num_ranks)), coo_array((num_ranks, num_touched))])
    loads = hstack([kron(load_JE, eye(num_ranks)), coo_array((len(load_JE) * num_ranks, num_touched))])
    kind, slot = np.nonzero(expert_ids_XK < num_experts)
    expert = expert_ids_XK[kind, slot].astype(np.int64)
    rows = np.arange(len(kind) * num_ranks)
    rank = np.tile(np.arange(num_ranks), len(kind))
    on = coo_array((np.ones(len(rows)), (rows, np.repeat(expert, num_ranks) * num_ranks + rank)), (len(rows), num_on))
    touched = coo_array(
        (np.ones(len(rows)), (rows, np.repeat(kind, num_ranks) * num_ranks + rank)), (len(rows), num_touched)
    )
    implied = hstack([-on, touched])
    limit_JR = np.repeat(limit_J * (1 + 1e-12), num_ranks)
    sizes_R = part_sizes(num_experts, num_ranks)
    constraints = [
        LinearConstraint(vstack([one_rank, counts]), *[np.r_[np.ones(num_experts), sizes_R]] * 2),
        LinearConstraint(loads, ub=limit_JR),  # pyright: ignore[reportArgumentType]
        LinearConstraint(implied, 0, np.inf),
    ]
    upper = np.ones(num_on + num_touched)
    if not home_ER.any() and (cost_XR == cost_XR[:, :1]).all() and sizes_R[0] == sizes_R[-1]:
        upper[1:num_ranks] = 0  # ranks are interchangeable: expert 0 is on rank 0
    found = milp(
        np.r_[-home_ER.reshape(-1), cost_XR.reshape(-1)],
        integrality=np.r_[np.ones(num_on), np.zeros(num_touched)],
        bounds=Bounds(0, upper),  # pyright: ignore[reportArgumentType]
        constraints=constraints,
        options={"time_limit": TIME_LIMIT, "mip_rel_gap": 0},
    )
    if found.status == 2:
        raise InputError(
            "--method exact: no placement keeps every load cap; a higher --load-cap or a lower --robust may"
        )
    if found.status != 0:
        raise InputError(f"--method exact: no proven placement ({found.message})")
    return np.asarray(found.x)[:num_on].reshape(num_experts, num_ranks).argmax(axis=1)
