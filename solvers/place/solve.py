"""METHODS and solve_placement: from a profile to a placement, by name.

Shape letters: L MoE layers, E experts, R ranks, J load vectors.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from semmoe.profiles.counts import RoutingProfile
from semmoe.profiles.errors import InputError
from semmoe.profiles.progress import Progress
from semmoe.profiles.trace import TraceInfo
from semmoe.solvers.demands import Demands, Solved
from semmoe.solvers.place.baselines import place_contiguous, place_load_on_nodes, place_load_replicated
from semmoe.solvers.place.exact import place_exact
from semmoe.solvers.place.exact_counts import cluster_loads, is_within_cap, rank_load_R
from semmoe.solvers.place.graph import place_metis, place_spectral
from semmoe.solvers.place.joint import place_semmoe
from semmoe.solvers.place.paper import place_paper
from semmoe.solvers.place.replicas import add_replicas, served_load_R, serving_LRE
from semmoe.solvers.placement import Placement, Topology

Method = Callable[[RoutingProfile, Topology, Demands, Progress | None], Solved]


def _ranked(place: Callable[[RoutingProfile, Topology, Demands], np.ndarray]) -> Method:
    """A method from a function that gives the rank of each expert, int [L, E], in one go."""

    def solve(profile: RoutingProfile, topology: Topology, demands: Demands, progress: Progress | None) -> Solved:
        return Solved.from_ranks(place(profile, topology, demands), profile.load_LE, topology.num_ranks)

    return solve


def _contiguous(profile: RoutingProfile, topology: Topology, demands: Demands) -> np.ndarray:
    return place_contiguous(profile.info.num_layers, profile.info.num_experts, topology.num_ranks)


def _load(profile: RoutingProfile, topology: Topology, demands: Demands) -> np.ndarray:
    return place_load_on_nodes(profile.load_LE, topology, profile.info.n_group)


def _metis(profile: RoutingProfile, topology: Topology, demands: Demands) -> np.ndarray:
    return place_metis(
        profile.co_activation_LEE,
        profile.load_LE,
        topology.num_ranks,
        load_cap=demands.load_cap,
        seed=demands.seed,
        num_nodes=topology.num_nodes if demands.dispatch == "per-node" else 1,
    )


def _spectral(profile: RoutingProfile, topology: Topology, demands: Demands) -> np.ndarray:
    options = {"load_cap": demands.load_cap, "seed": demands.seed}
    return place_spectral(profile.co_activation_LEE, profile.load_LE, topology.num_ranks, **options)


def _paper(profile: RoutingProfile, topology: Topology, demands: Demands) -> np.ndarray:
    return place_paper(profile, topology, load_cap=demands.load_cap, seed=demands.seed)


def _exact(profile: RoutingProfile, topology: Topology, demands: Demands) -> np.ndarray:
    return place_exact(profile, topology, load_cap=demands.load_cap, robust=demands.robust, seed=demands.seed)


METHODS: dict[str, Method] = {
    "semmoe": place_semmoe,
    "metis": _ranked(_metis),
    "spectral": _ranked(_spectral),
    "load": _ranked(_load),
    "contiguous": _ranked(_contiguous),
    "paper": _ranked(_paper),
    "exact": _ranked(_exact),
}


def check_demands(info: TraceInfo, topology: Topology, demands: Demands, *, method: str) -> None:
    """Raise InputError where no trace of the model lets the method meet the demands: known
    before anything is read."""
    topology.check_experts(info.num_experts)
    if method not in METHODS:
        raise InputError(f"method {method!r} is none of {', '.join(METHODS)}")
    if not 1 <= demands.load_cap < np.inf:  # nan too
        raise InputError(f"--load-cap is {demands.load_cap}, expected a number of at least 1")
    if not 0 <= demands.lar_weight < np.inf:
        raise InputError(f"--lar-weight is {demands.lar_weight}, expected a number of at least 0")
    own_slots = info.num_experts // topology.num_ranks
    if not 0 <= demands.replicas <= info.num_experts - own_slots:
        raise InputError(
            f"--replicas {demands.replicas}: a rank can host {info.num_experts - own_slots} more experts at most"
        )
    if demands.expressible and demands.replicas:
        raise InputError(
            f"--expressible {demands.expressible}: a permuted checkpoint holds every expert once, leave --replicas out"
        )
    if demands.expressible and info.n_group > 1 and method != "semmoe":
        raise InputError(
            f"--expressible {demands.expressible} needs --method semmoe: {method} does not look at routing groups"
        )


def solve_placement(
    profile: RoutingProfile, topology: Topology, demands: Demands, *, method: str, progress: Progress | None = None
) -> Solved:
    """Placement of the profile's experts by one of METHODS, its loads, and notes on what it could
    not keep.

    Parameters:
        profile: counts of the requests to fit, and a sample of them.
        topology: ranks, nodes and, where known, costs between ranks.
        demands: what is asked of the placement.
        method: a name of METHODS.
        progress: told of every layer that is done, over all passes over the layers.

    Raises InputError where experts do not divide over the ranks, or a demand cannot be met by the
    method.
    """
    # Step 1: refuse what the method cannot meet, before it starts.
    check_demands(profile.info, topology, demands, method=method)
    # Step 2: every expert once; packing by load alone goes on to its copies by itself.
    if method == "load" and demands.replicas:
        solved = _packed_with_replicas(profile, topology, demands)
    else:
        solved = METHODS[method](profile, topology, demands, progress)
    # Step 3: copies where the method has none.
    if demands.replicas and not solved.placement.num_replicas:
        solved = _with_replicas(solved, profile, topology, demands)
    # Step 4: say what was not kept.
    return replace(solved, notes=solved.notes + _cap_notes(solved.placement, profile, topology, demands))


def _packed_with_replicas(profile: RoutingProfile, topology: Topology, demands: Demands) -> Solved:
    experts_LRS = place_load_replicated(
        profile.load_LE,
        profile.info.num_experts + demands.replicas * topology.num_ranks,
        num_groups=profile.info.n_group,
        num_nodes=topology.num_nodes,
        num_ranks=topology.num_ranks,
    )
    placement = Placement(experts_LRS, profile.info.num_experts)
    return Solved(placement, _served_LR(placement, profile, topology))


def _with_replicas(solved: Solved, profile: RoutingProfile, topology: Topology, demands: Demands) -> Solved:
    experts_LRS = add_replicas(
        solved.placement.rank_of_LE,
        profile.sample.expert_ids_TLK,
        profile.load_LE,
        topology,
        replicas=demands.replicas,
        load_cap=demands.load_cap,
    )
    placement = Placement(experts_LRS, profile.info.num_experts)
    return replace(solved, placement=placement, loads_LR=_served_LR(placement, profile, topology))


def _served_LR(placement: Placement, profile: RoutingProfile, topology: Topology) -> np.ndarray:
    """Activations that each rank serves, float64 [L, R]."""
    serving = serving_LRE(placement.hosts_LER, profile.load_LE, topology)
    return np.stack([served_load_R(s, load_E) for s, load_E in zip(serving, profile.load_LE, strict=True)])


def _cap_notes(placement: Placement, profile: RoutingProfile, topology: Topology, demands: Demands) -> list[str]:
    """Where the load cap is exceeded on the fitted requests, and within clusters of them where
    that was asked for."""
    load_LJE = cluster_loads(profile, demands.robust, demands.seed)
    loads = {"load": load_LJE[:, :1]}
    if load_LJE.shape[1] > 1:
        loads[f"within {load_LJE.shape[1] - 1} clusters of requests, load"] = load_LJE[:, 1:]
    notes = []
    for whose, load_LCE in loads.items():
        if placement.num_replicas:
            # Copies are chosen by the load of all requests, whoever is served.
            serving = serving_LRE(placement.hosts_LER, profile.load_LE, topology)
            notes += served_notes(serving, load_LCE, demands.load_cap, whose=f"as served with replicas, {whose}")
        else:
            notes += load_notes(placement.rank_of_LE, load_LCE, topology.num_ranks, demands.load_cap, whose=whose)
    return notes


def served_notes(serving: np.ndarray, load_LCE: np.ndarray, load_cap: float, *, whose: str) -> list[str]:
    """One line where ranks with replicas serve more than the load cap; nothing otherwise.

    `serving`: rank that serves each expert for each rank, [L, R, E]. `load_LCE`: load vectors, of
    which the worst counts.
    """
    served_LCR = np.stack(
        [[served_load_R(s, load_E) for load_E in load_CE] for s, load_CE in zip(serving, load_LCE, strict=True)]
    )
    worst_L = (served_LCR.max(axis=2) / np.maximum(served_LCR.mean(axis=2), 1e-300)).max(axis=1)
    over = np.flatnonzero(worst_L > load_cap * (1 + 1e-9)).tolist()
    if not over:
        return []
    layers = f"{len(over)} of {len(load_LCE)} layers, worst {worst_L.max():.3f} (layers {_ranges(over)})"
    return [f"{whose} cap {load_cap} is exceeded in {layers}"]


def load_notes(
    rank_of_LE: np.ndarray, load_LE: np.ndarray, num_ranks: int, load_cap: float, *, whose: str = "load"
) -> list[str]:
    """One line where layers exceed the load cap on the fitted requests; nothing otherwise.

    `load_LE`: or one vector per cluster of requests, [L, J, E], of which the worst counts.
    """
    load_LJE = load_LE.reshape(len(load_LE), -1, load_LE.shape[-1])
    over = [
        layer
        for layer, load_JE in enumerate(load_LJE)
        if not all(is_within_cap(rank_of_LE[layer], load_E, num_ranks, load_cap) for load_E in load_JE)
    ]
    if not over:
        return []
    worst = max(
        rank_load_R(rank_of_LE[layer], load_E, num_ranks).max() * num_ranks / load_E.sum()
        for layer in over
        for load_E in load_LJE[layer]
        if load_E.any()
    )
    return [
        f"{whose} cap {load_cap} is exceeded in {len(over)} of {len(load_LJE)} layers, worst {worst:.3f} (layers {_ranges(over)})"
    ]


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers in words: 0-3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
