"""What the ranks of the learning tests do: the same tokens run past every rank, and the weights
that each ends up with are compared."""

from typing import Any

import numpy as np


def prepared(trace: str) -> tuple[Any, Any, Any]:
    """The trace's rows, contiguous experts on two ranks, and a schedule for them."""
    from semmoe.profiles.counts import profile_traces
    from semmoe.profiles.trace import RoutingTrace
    from semmoe.solvers.place.baselines import place_contiguous
    from semmoe.solvers.placement import Placement
    from semmoe.solvers.schedule.fit import fit_schedule

    batch = profile_traces([RoutingTrace.open(trace)], seed=0).sample
    placement = Placement.from_ranks(place_contiguous(batch.expert_ids_TLK.shape[1], 8, 2), 2)
    return batch, placement, fit_schedule(batch, placement, seed=0)


def learn(trace: str, num_ranks: int) -> dict[str, Any]:
    """Whether all ranks have the same weights after all requests, and these weights as a list
    [L][F][R]."""
    import torch
    import torch.distributed as dist

    from semmoe.runtime.ranks.group import open_group
    from semmoe.runtime.serving import weight_learner
    from semmoe.runtime.serving.token_homes import TokenHomes

    weight_learner.LEARN_EVERY = 60
    batch, placement, schedule = prepared(trace)
    with open_group(timeout_s=60.0) as group, torch.inference_mode():
        homes = TokenHomes(
            "learning", schedule, placement, batch.expert_ids_TLK.shape[2], group=group, device=group.device
        )
        for request in range(batch.num_requests):
            rows = np.arange(*batch.starts_B1[request : request + 2])
            homes.begin(batch.token_ids_T[rows], np.full(len(rows), request), is_prompt=True)
            for layer in range(placement.num_layers):
                homes.slices(layer)
                homes.record(layer, torch.from_numpy(batch.expert_ids_TLK[rows, layer].astype(np.int16)))
            homes.finish()
        assert homes._tables is not None
        weight_LFR = homes._tables.weight_LFR
        gathered = [torch.empty_like(weight_LFR) for _ in range(num_ranks)]
        dist.all_gather(gathered, weight_LFR, group=group.handle)
        return {"equal": all(torch.equal(other, weight_LFR) for other in gathered), "weights": weight_LFR.tolist()}


def plan_weights(trace: str) -> np.ndarray:
    """The weights to start from, [L, F, R]."""
    return prepared(trace)[2].context.weight_LFR
