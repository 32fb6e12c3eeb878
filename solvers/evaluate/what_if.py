"""The same model and traffic on other numbers of ranks: a quick placement per number, fitted and
scored on different requests.

Shape letters: B requests, R ranks.
"""

from collections.abc import Callable

import numpy as np

from semmoe.profiles.counts import RoutingProfile, profile_traces
from semmoe.profiles.errors import InputError
from semmoe.profiles.trace import RoutingTrace, TraceBatch
from semmoe.solvers.deployment import Deployment
from semmoe.solvers.evaluate.metrics import score
from semmoe.solvers.evaluate.report import Skipped, TradeOff, WhatIf, WhatIfRow
from semmoe.solvers.evaluate.score_plan import scored_batch
from semmoe.solvers.evaluate.sums import deployment_sums
from semmoe.solvers.place.baselines import baselines
from semmoe.solvers.place.graph import QUICK_CAP, place_quickly
from semmoe.solvers.place.solve import Filling, with_copies
from semmoe.solvers.placement import Placement, Topology
from semmoe.solvers.slots import Slots

# Microseconds per layer of deployments on a batch (semmoe.solvers.time.predict), by name.
LayerTimes = Callable[[dict[str, Deployment], TraceBatch], dict[str, float]]
EXTRA_SLOTS = (1, 2)  # of each rank, in the trade-off of memory
SHOWN = ("lar", "rem", "node", "link", "load_imbalance")


def what_if(
    trace: RoutingTrace,
    fit_B: np.ndarray,
    score_B: np.ndarray,
    ranks: list[int],
    *,
    ranks_per_node: int,
    dispatch: str,
    seed: int,
    times: LayerTimes = lambda deployments, batch: {},
) -> WhatIf:
    """Rows for every number of ranks: METIS, contiguous and load, scored on `score_B` and fitted on
    `fit_B` (bool [B]).

    Spare slots of numbers that the experts do not divide over hold copies. More ranks than
    `ranks_per_node` fill several nodes; numbers that leave a node half full are left out and named.
    """
    if (fit_B & score_B).any() or not fit_B.any() or not score_B.any():
        raise InputError(f"{trace.path}: what-if needs requests to learn from and other requests to score on")
    profile = profile_traces([trace], [fit_B], seed=seed)
    batch = scored_batch([trace], [score_B], seed=seed)
    rows, skipped, trade_off = [], [], []
    for num_ranks in ranks:
        if num_ranks > ranks_per_node and num_ranks % ranks_per_node:
            skipped.append(Skipped(num_ranks, f"{num_ranks} ranks do not fill nodes of {ranks_per_node}"))
            continue
        topology = Topology(num_ranks, max(num_ranks // ranks_per_node, 1))
        once = Placement.from_ranks(place_quickly(profile.co_activation_LEE, num_ranks, seed), num_ranks)
        placed = once
        if placed.num_empty:
            slots = Slots.least(trace.info.num_experts, num_ranks)
            placed = with_copies(placed, profile, topology, slots, Filling(QUICK_CAP))
        placements = {"metis": placed, **baselines(profile.load_LE, topology, profile.info.n_group)}
        deployments = {
            name: Deployment(placement, profile.load_LE, topology, dispatch) for name, placement in placements.items()
        }
        richer = _with_more_slots(once, profile, topology)
        copied = {f"+{extra}": Deployment(p, profile.load_LE, topology, dispatch) for extra, p in richer.items()}
        us = times({**deployments, **copied}, batch)
        for name, deployment in {"metis": deployments["metis"], **copied}.items():
            means = score(deployment_sums(deployment, batch), topology, dispatch=dispatch, num_resamples=1).means
            slots = deployment.placement.slots_per_rank
            sizes = (num_ranks, slots, slots * deployment.placement.num_layers)
            trade_off.append(TradeOff(*sizes, means["rem"], means["load_imbalance"], us.get(name)))
        for name, deployment in deployments.items():
            sums = deployment_sums(deployment, batch)
            scores = score(sums, topology, dispatch=dispatch, seed=seed)
            shown = {metric: scores.means[metric] for metric in SHOWN}
            intervals = {metric: scores.intervals[metric] for metric in SHOWN}
            rows.append(
                WhatIfRow(num_ranks, topology.num_nodes, name, **shown, ci=intervals, us_per_layer=us.get(name))
            )
    return WhatIf(int(fit_B.sum()), int(score_B.sum()), rows, skipped, trade_off)


def _with_more_slots(placed: Placement, profile: RoutingProfile, topology: Topology) -> dict[int, Placement]:
    """The placement with more slots of each rank, by their number, filled with copies."""
    found, least = {}, placed.slots_per_rank
    for extra in EXTRA_SLOTS:
        if least + extra <= profile.info.num_experts and topology.num_ranks > 1:
            found[extra] = with_copies(placed, profile, topology, Slots(least + extra), Filling(QUICK_CAP))
    return found
