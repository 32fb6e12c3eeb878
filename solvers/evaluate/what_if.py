"""The same model and traffic on other numbers of ranks: a quick placement per number, fitted and
scored on different requests.

Shape letters: B requests, R ranks.
"""

from collections.abc import Callable

import numpy as np

from semmoe.profiles.counts import profile_traces
from semmoe.profiles.errors import InputError
from semmoe.profiles.trace import RoutingTrace, TraceBatch
from semmoe.solvers.deployment import Deployment
from semmoe.solvers.evaluate.metrics import score
from semmoe.solvers.evaluate.report import Skipped, WhatIf, WhatIfRow
from semmoe.solvers.evaluate.score_plan import baselines, scored_batch
from semmoe.solvers.evaluate.sums import deployment_sums
from semmoe.solvers.place.graph import place_quickly
from semmoe.solvers.placement import Placement, Topology

# Microseconds per layer of deployments on a batch (semmoe.solvers.time.predict), by name.
LayerTimes = Callable[[dict[str, Deployment], TraceBatch], dict[str, float]]
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

    Numbers that the experts do not divide over are left out and named. More ranks than
    `ranks_per_node` fill several nodes.
    """
    if (fit_B & score_B).any() or not fit_B.any() or not score_B.any():
        raise InputError(f"{trace.path}: what-if needs requests to learn from and other requests to score on")
    profile = profile_traces([trace], [fit_B], seed=seed)
    batch = scored_batch([trace], [score_B], seed=seed)
    rows, skipped = [], []
    for num_ranks in ranks:
        try:
            nodes = num_ranks // ranks_per_node if num_ranks % ranks_per_node == 0 else 1
            topology = Topology(num_ranks, max(nodes, 1))
            topology.check_experts(trace.info.num_experts)
        except InputError as error:
            skipped.append(Skipped(num_ranks, str(error)))
            continue
        # With one expert on a rank every placement is the same.
        rank_of_LE = np.broadcast_to(np.arange(num_ranks), (trace.info.num_layers, num_ranks))
        if num_ranks < trace.info.num_experts:
            rank_of_LE = place_quickly(profile.co_activation_LEE, num_ranks, seed)
        placements = {
            "metis": Placement.from_ranks(rank_of_LE, num_ranks),
            **baselines(profile.load_LE, topology, profile.info.n_group),
        }
        deployments = {
            name: Deployment(placement, profile.load_LE, topology, dispatch) for name, placement in placements.items()
        }
        us = times(deployments, batch)
        for name, deployment in deployments.items():
            sums = deployment_sums(deployment, batch)
            scores = score(sums, topology, dispatch=dispatch, seed=seed)
            shown = {metric: scores.means[metric] for metric in SHOWN}
            intervals = {metric: scores.intervals[metric] for metric in SHOWN}
            rows.append(
                WhatIfRow(num_ranks, topology.num_nodes, name, **shown, ci=intervals, us_per_layer=us.get(name))
            )
    return WhatIf(int(fit_B.sum()), int(score_B.sum()), rows, skipped)
