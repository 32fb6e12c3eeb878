"""Token tables at the edges of what a trace may hold: no ids, or none that follows another
rarely, on more ranks than rows store."""

from dataclasses import replace

import numpy as np
import pytest

from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic
from semmoe.profiles.trace import RoutingTrace
from semmoe.solvers.place.baselines import place_contiguous
from semmoe.solvers.placement import Placement
from semmoe.solvers.schedule import token_fit
from semmoe.solvers.schedule.fit import fit_schedule
from semmoe.solvers.schedule.schedule import Schedule
from semmoe.solvers.schedule.simulate import available_schedules, simulate
from semmoe.solvers.schedule.token_fit import MAX_CANDIDATES, best_ranks
from semmoe.solvers.schedule.token_table import PRIOR_TOKENS

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


@pytest.mark.parametrize("ranks", [9, 72, 300])
def test_best_ranks_are_those_of_the_largest_shares(ranks):
    rng = np.random.default_rng(ranks)
    shares_UR = rng.random((500, ranks)) * (rng.random((500, ranks)) < 0.5)  # many are 0, which are alike
    shares_UR[0] = 0
    best_UC = best_ranks(shares_UR, MAX_CANDIDATES)
    assert (np.diff(best_UC, axis=1) > 0).all()
    largest_UC = np.sort(shares_UR, axis=1)[:, -MAX_CANDIDATES:]
    found_UC = np.sort(np.take_along_axis(shares_UR, best_UC, axis=1), axis=1)
    np.testing.assert_allclose(found_UC, largest_UC, rtol=ranks / 2**22)


@pytest.mark.parametrize("rows", [7, 64, 10**6])
def test_rows_counted_in_blocks_add_up(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(token_fit, "BLOCK_ROWS", rows)  # of ids with more rows than a block, and with fewer
    monkeypatch.setattr(token_fit, "BLOCK_IDS", 5)
    write_synthetic(tmp_path / "t", SyntheticWorld(num_requests=8, num_experts=40, num_groups=4, vocab_size=60, seed=1))
    batch = RoutingTrace.open(tmp_path / "t").load()
    hosts_LER = np.zeros((batch.expert_ids_TLK.shape[1], 40, 36), bool)
    hosts_LER[:, np.arange(40), np.arange(40) % 36] = True
    hosts_LER[:, 3, [7, 30]] = hosts_LER[:, 11, 2] = True  # three hosts, and two
    table = token_fit.build_token_table(batch, hosts_LER, max_candidates=36)
    top_k, layer = batch.expert_ids_TLK.shape[2], 1
    served_TR = hosts_LER[layer][batch.expert_ids_TLK[:, layer]].sum(axis=1) / top_k
    for row, token_id in enumerate(table.own.ids_U.tolist()):
        sums_R = served_TR[batch.token_ids_T == token_id].sum(axis=0)
        expected_R = (sums_R + PRIOR_TOKENS * table.rare_LR[layer]) / (table.own.weight_U[row] + PRIOR_TOKENS)
        np.testing.assert_allclose(table.own.shares_LUC[layer, row], expected_R, atol=1e-3)
