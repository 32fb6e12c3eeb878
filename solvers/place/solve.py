"""METHODS and solve_placement: from a profile to a placement, by name.

Shape letters: L MoE layers, E experts, R ranks, J load vectors.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from semmoe.profiles.counts import RoutingProfile
from semmoe.profiles.errors import InputError
from semmoe.profiles.progress import Progress, Stages, unshown, unshown_stages
from semmoe.profiles.trace import TraceInfo
from semmoe.solvers.demands import Demands, Solved
from semmoe.solvers.place.baselines import baselines, place_contiguous, place_load_on_nodes
from semmoe.solvers.place.copies import SAMPLE_ROWS, CopiedLayer, add_copies
from semmoe.solvers.place.exact import place_exact
from semmoe.solvers.place.exact_counts import in_linear_shares, is_within_cap, rank_load_R, resampled_loads
from semmoe.solvers.place.graph import place_metis, place_spectral
from semmoe.solvers.place.joint import place_semmoe
from semmoe.solvers.place.paper import place_paper
from semmoe.solvers.place.replicas import served_load_R, serving_LRE
from semmoe.solvers.placement import Placement, Topology
from semmoe.solvers.slots import Slots
from semmoe.solvers.workers import layer_map

PLACING, FILLING = "placing layers", "filling spare slots of layers"  # stages, as progress tells them
COPY_TURNS = {"fast": 0, "default": 2, "max": 4}
COPY_SWAPS = {"fast": 0, "default": 300, "max": 1_200}
LARGEST_TURNS = 128  # experts of a layer: a swap costs their square, and the search of the placement has had its share

Method = Callable[[RoutingProfile, Topology, Demands, Progress | None], Solved]


def _ranked(place: Callable[[RoutingProfile, Topology, Demands], np.ndarray]) -> Method:
    """A method from a function that gives the rank of each expert, int [L, E], in one go."""

    def solve(profile: RoutingProfile, topology: Topology, demands: Demands, progress: Progress | None) -> Solved:
        rank_of_LE, num_ranks = place(profile, topology, demands), topology.num_ranks
        if demands.spare == "empty":
            rank_of_LE = in_linear_shares(rank_of_LE, profile, profile.load_LE, num_ranks, demands.load_cap)
        return Solved.from_ranks(rank_of_LE, profile.load_LE, num_ranks)

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
    if method not in METHODS:
        raise InputError(f"method {method!r} is none of {', '.join(METHODS)}")
    if not 1 <= demands.load_cap < np.inf:  # nan too
        raise InputError(f"--load-cap is {demands.load_cap}, expected a number of at least 1")
    if not 0 <= demands.lar_weight < np.inf:
        raise InputError(f"--lar-weight is {demands.lar_weight}, expected a number of at least 0")
    slots = demands.slots_of(info.num_experts, topology.num_ranks)
    if demands.expressible and slots.has_spare(info.num_experts, topology.num_ranks):
        least = slots == Slots.least(info.num_experts, topology.num_ranks)
        how = "add --spare empty" if least else "leave --replicas, --slots and --redundant out"
        raise InputError(f"--expressible {demands.expressible}: a permuted checkpoint holds every expert once, {how}")
    if demands.expressible and info.n_group > 1 and method != "semmoe":
        raise InputError(
            f"--expressible {demands.expressible} needs --method semmoe: {method} does not look at routing groups"
        )


def solve_placement(
    profile: RoutingProfile,
    topology: Topology,
    demands: Demands,
    *,
    method: str,
    progress: Stages = unshown_stages,
) -> Solved:
    """Placement of the profile's experts by one of METHODS, its loads, and notes on what it could
    not keep.

    Parameters:
        profile: counts of the requests to fit, and a sample of them.
        topology: ranks, nodes and, where known, costs between ranks.
        demands: what is asked of the placement.
        method: a name of METHODS.
        progress: told of every layer that is placed, over all passes over the layers, and of every
            layer whose spare slots are filled.

    Raises InputError where the slots do not hold the experts, or a demand cannot be met by the
    method.
    """
    # Step 1: refuse what the method cannot meet, before it starts.
    check_demands(profile.info, topology, demands, method=method)
    slots = demands.slots_of(profile.info.num_experts, topology.num_ranks)
    filled = slots.has_spare(profile.info.num_experts, topology.num_ranks)
    # Step 2: every expert once, and copies in the spare slots; what engines do has copies of its
    # own.
    if filled and method in ("load", "contiguous"):
        placement = baselines(profile.load_LE, topology, profile.info.n_group, slots=slots)[method]
        solved = Solved(placement, _served_LR(placement, profile, topology))
    else:
        solved = METHODS[method](profile, topology, demands, partial(progress, PLACING))
        if filled:
            filling = Filling(demands.load_cap, demands.processes, partial(progress, FILLING))
            if method == "semmoe":
                filling = filling._replace(**_copy_search(profile.info, topology, demands))
            placement = with_copies(solved.placement, profile, topology, slots, filling)
            solved = replace(solved, placement=placement, loads_LR=_served_LR(placement, profile, topology))
    # Step 3: say what was not kept.
    return replace(solved, notes=solved.notes + _cap_notes(solved.placement, profile, topology, demands))


def _copy_search(info: TraceInfo, topology: Topology, demands: Demands) -> dict[str, int]:
    """How experts move for the sake of copies, as `add_copies` has it: where tokens of a layer
    choose their homes by themselves; in turns where layers are small enough for a second search."""
    by_request = demands.objective == "dp" or demands.dispatch == "per-expert"
    by_network = topology.num_nodes > 1 or topology.cost_RR is not None
    if by_request or by_network:
        return {}
    turns = COPY_TURNS[demands.effort] if info.num_experts <= LARGEST_TURNS else 0
    return {"turns": turns, "swaps": COPY_SWAPS[demands.effort]}


class Filling(NamedTuple):
    """How spare slots are filled. The result does not depend on `processes`."""

    load_cap: float  # most load of a rank over the mean, where copies can keep it
    processes: int = 1
    progress: Progress = unshown  # told of every layer
    turns: int = 0  # of experts and copies, and swaps of both (`add_copies`)
    swaps: int = 0


def with_copies(
    placement: Placement, profile: RoutingProfile, topology: Topology, slots: Slots, filling: Filling
) -> Placement:
    """A placement without copies with its spare slots filled, layer by layer in worker processes.

    Parameters:
        placement: every expert once.
        profile: counts, and a sample of tokens, that copies are chosen by (`add_copies`).
        topology: ranks and nodes.
        slots: of each rank.
        filling: under which cap, and how long it may search.
    """
    ids_TLK = profile.sample.expert_ids_TLK[:: max(1, profile.sample.num_tokens // SAMPLE_ROWS)]
    num_layers, options = profile.info.num_layers, {"turns": filling.turns, "swaps": filling.swaps}
    layers = (
        CopiedLayer(rank_of_E, ids_TLK[:, number], profile.load_LE[number], profile.co_activation_LEE[number])
        for number, rank_of_E in enumerate(placement.rank_of_LE)
    )
    fill = partial(add_copies, topology=topology, slots=slots.per_rank, load_cap=filling.load_cap, **options)
    filled = []
    with layer_map(filling.processes, profile.info.num_experts) as run:
        for experts_RS in run(fill, layers):
            filled.append(experts_RS)
            filling.progress(len(filled), num_layers)
    return Placement(np.stack(filled), profile.info.num_experts)


def _served_LR(placement: Placement, profile: RoutingProfile, topology: Topology) -> np.ndarray:
    """Activations that each rank serves, float64 [L, R]."""
    serving = serving_LRE(placement.hosts_LER, profile.load_LE, topology)
    return np.stack([served_load_R(s, load_E) for s, load_E in zip(serving, profile.load_LE, strict=True)])


def _cap_notes(placement: Placement, profile: RoutingProfile, topology: Topology, demands: Demands) -> list[str]:
    """Where the load cap is exceeded on the fitted requests, and in resamples of them where that
    was asked for."""
    load_LJE = resampled_loads(profile, demands.robust, demands.seed)
    loads = {"load": load_LJE[:, :1]}
    if load_LJE.shape[1] > 1:
        loads[f"in {load_LJE.shape[1] - 1} resamples of the requests, load"] = load_LJE[:, 1:]
    notes = []
    for whose, load_LCE in loads.items():
        if placement.num_copies:
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

    `load_LE`: or more vectors, [L, J, E], of which the worst counts.
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
