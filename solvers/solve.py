"""METHODS and solve_placement: from a profile to a placement, by name.

Shape letters: L MoE layers, E experts, R ranks.
"""

from collections.abc import Callable

import numpy as np

from profiles.counts import RoutingProfile
from profiles.errors import InputError
from solvers.contiguous import place_contiguous
from solvers.equalize import is_within_cap, rank_load_R
from solvers.load import place_load
from solvers.metis import place_metis
from solvers.placement import Placement, Topology
from solvers.spectral import place_spectral

Progress = Callable[[int, int], None]  # layers done, layers in all


def _contiguous(profile: RoutingProfile, topology: Topology, *, load_cap: float, seed: int) -> np.ndarray:
    return place_contiguous(profile.info.num_layers, profile.info.num_experts, topology.num_ranks)


def _load(profile: RoutingProfile, topology: Topology, *, load_cap: float, seed: int) -> np.ndarray:
    return place_load(profile.load_LE, topology.num_ranks)


def _metis(profile: RoutingProfile, topology: Topology, *, load_cap: float, seed: int) -> np.ndarray:
    return place_metis(profile.co_activation_LEE, profile.load_LE, topology.num_ranks, load_cap=load_cap, seed=seed)


def _spectral(profile: RoutingProfile, topology: Topology, *, load_cap: float, seed: int) -> np.ndarray:
    return place_spectral(profile.co_activation_LEE, profile.load_LE, topology.num_ranks, load_cap=load_cap, seed=seed)


METHODS: dict[str, Callable[..., np.ndarray]] = {
    "contiguous": _contiguous,
    "load": _load,
    "metis": _metis,
    "spectral": _spectral,
}


def solve_placement(
    profile: RoutingProfile, topology: Topology, *, method: str, load_cap: float = 1.05, seed: int = 0
) -> tuple[Placement, list[str]]:
    """Placement of the profile's experts by one of METHODS, and notes on what it could not keep.

    `load_cap`: most activations of a rank over the mean, at least 1. Raises InputError where experts do not divide over the ranks.
    """
    topology.check_experts(profile.info.num_experts)
    if method not in METHODS:
        raise InputError(f"method {method!r} is none of {', '.join(METHODS)}")
    if load_cap < 1:
        raise InputError(f"--load-cap is {load_cap}, expected at least 1")
    rank_of_LE = METHODS[method](profile, topology, load_cap=load_cap, seed=seed)
    placement = Placement.from_ranks(rank_of_LE, topology.num_ranks)
    return placement, load_notes(rank_of_LE, profile.load_LE, topology.num_ranks, load_cap)


def load_notes(rank_of_LE: np.ndarray, load_LE: np.ndarray, num_ranks: int, load_cap: float) -> list[str]:
    """One line where layers exceed the load cap on the fitted requests; nothing otherwise."""
    over = [
        layer
        for layer in range(len(load_LE))
        if not is_within_cap(rank_of_LE[layer], load_LE[layer], num_ranks, load_cap)
    ]
    if not over:
        return []
    worst = max(rank_load_R(rank_of_LE[i], load_LE[i], num_ranks).max() * num_ranks / load_LE[i].sum() for i in over)
    return [
        f"load cap {load_cap} is exceeded in {len(over)} of {len(load_LE)} layers, worst {worst:.3f} (layers {_ranges(over)})"
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
