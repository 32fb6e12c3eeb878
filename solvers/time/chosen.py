"""Numbers that are asked for as `auto`: chosen by the predicted time, tokens at random homes, of
requests that a quick placement for bytes was not fitted on."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from semmoe.profiles.counts import RoutingProfile, count_batches
from semmoe.profiles.errors import InputError
from semmoe.profiles.sample import select_requests
from semmoe.solvers.demands import Demands
from semmoe.solvers.place.exact_counts import LEAST_REQUESTS
from semmoe.solvers.place.solve import solve_placement
from semmoe.solvers.placement import Topology
from semmoe.solvers.time.batches import pool_of
from semmoe.solvers.time.fit import fit_of
from semmoe.solvers.time.hardware import TimeAsked, costing_of
from semmoe.solvers.time.minimize import links_of, prices_of
from semmoe.solvers.time.swaps import mean_time

CHOICES = {"load_cap": (1.02, 1.05, 1.1, 1.2), "lar_weight": (0.0, 0.25, 0.5, 1.0)}  # by demand
LEARNED_SHARE = 0.7  # of the requests that are placed by; the others are timed


def chosen_by_time(
    profile: RoutingProfile, topology: Topology, demands: Demands, asked: TimeAsked, method: str, names: Iterable[str]
) -> Demands:
    """The demands with those of CHOICES that are named set to what takes least time, one after the
    other; of equal ones the first. Raises InputError where there are too few requests."""
    sample, info = profile.sample, profile.info
    if sample.num_requests < LEAST_REQUESTS:
        options = ", ".join(f"--{name.replace('_', '-')} auto" for name in names)
        raise InputError(f"{options} needs {LEAST_REQUESTS} requests, not {sample.num_requests}: give a number")
    keep_B = np.random.default_rng([demands.seed, 41]).random(sample.num_requests) < LEARNED_SHARE
    keep_B[0], keep_B[-1] = True, False
    learned, rest = select_requests(sample, keep_B), select_requests(sample, ~keep_B)
    part = RoutingProfile(info, *count_batches([learned], info), learned)
    costing = costing_of(asked, info, topology, prompts=float(sample.is_prompt_T.mean()))
    fit = fit_of(pool_of(rest, costing.phase), costing, topology.num_ranks, demands)
    levels_UR, prices = links_of(costing, topology).levels_UR, prices_of(costing, topology)
    once = replace(demands, effort="fast", slots=0, replicas=0, redundant=None, spare="empty")

    def time_of(asked: Demands) -> float:
        placed = solve_placement(part, topology, asked, method=method).placement.rank_of_LE
        total = 0.0
        for layer, rank_of_E in enumerate(placed):
            batches = fit.layer(rest.expert_ids_TLK[:, layer], info.num_experts, int(costing.values["experts.tile"]))
            total += mean_time(batches, rank_of_E, levels_UR, prices, num_ranks=topology.num_ranks)
        return total

    chosen: dict[str, float] = {}
    for name in names:
        tried = [replace(once, **chosen, **{name: value}) for value in CHOICES[name]]
        chosen[name] = getattr(min(tried, key=time_of), name)
    return replace(demands, **chosen)
