"""Token tables at the edges of what a trace may hold: no ids, or none that follows another
rarely, on more ranks than rows store."""

from dataclasses import replace

import numpy as np
import pytest

from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic
from semmoe.profiles.trace import RoutingTrace
from semmoe.solvers.place.baselines import place_contiguous
from semmoe.solvers.placement import Placement
from semmoe.solvers.schedule.fit import fit_schedule
from semmoe.solvers.schedule.schedule import Schedule
from semmoe.solvers.schedule.simulate import available_schedules, simulate
from semmoe.solvers.schedule.token_fit import MAX_CANDIDATES

SIZES = {"batch_tokens": 128, "window": 40, "seed": 0}


@pytest.mark.parametrize("ids", ["unknown", "one id"])
def test_tables_without_rows_on_more_ranks_than_rows_store(tmp_path, ids):
    info_ranks = 2 * MAX_CANDIDATES
    write_synthetic(tmp_path / "t", SyntheticWorld(num_requests=20, num_experts=2 * info_ranks, num_groups=4, seed=3))
    trace = RoutingTrace.open(tmp_path / "t")
    batch = trace.load()
    # Either there is no row at all, or one of the id itself and none of what follows it: it is
    # frequent.
    token_ids_T = np.full_like(batch.token_ids_T, -1 if ids == "unknown" else 7)
    sequences = np.full_like(batch.sequences, 7)[: 0 if ids == "unknown" else None]
    starts_B1 = batch.sequence_starts_B1 * (ids != "unknown")
    batch = replace(batch, token_ids_T=token_ids_T, sequences=sequences, sequence_starts_B1=starts_B1)
    experts = trace.info.num_experts
    placement = Placement.from_ranks(place_contiguous(trace.info.num_layers, experts, info_ranks), info_ranks)
    schedule = Schedule.from_tables(fit_schedule(batch, placement, seed=0).to_tables())
    assert schedule is not None
    assert len(schedule.token.own.ids_U) == (ids != "unknown") and len(schedule.token.after.ids_U) == 0
    for name in available_schedules(schedule):
        homes_TL = simulate(name, batch, placement, schedule, **SIZES).homes_TL
        assert homes_TL.min() >= 0 and homes_TL.max() < info_ranks
