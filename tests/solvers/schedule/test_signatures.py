"""Requests of a decode pool scheduled by routing that is known when they get there."""

import numpy as np
import pytest

from semmoe.profiles.counts import profile_traces
from semmoe.profiles.split import only_phase
from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic
from semmoe.profiles.trace import RoutingTrace
from semmoe.solvers.demands import Demands
from semmoe.solvers.place.solve import solve_placement
from semmoe.solvers.placement import Topology
from semmoe.solvers.schedule.fit import fit_schedule
from semmoe.solvers.schedule.request_scorer import request_shares_BR
from semmoe.solvers.schedule.simulate import FIRST_TOKENS, simulate

SIZES = {"batch_tokens": 128, "window": 32, "seed": 0}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    path = tmp_path_factory.mktemp("signatures") / "t"
    write_synthetic(path, SyntheticWorld(num_requests=40, tokens_per_request=64, num_layers=2))
    trace = RoutingTrace.open(path)
    profile = profile_traces([trace])
    demands = Demands(load_cap=2, effort="fast", objective="dp")
    placement = solve_placement(profile, Topology(4), demands, method="semmoe").placement
    return trace, placement, fit_schedule(profile.sample, placement, seed=0)


def local_share(batch, placement, homes_TL, rows_T) -> float:
    hosts = placement.hosts_LER[np.arange(2)[None, :, None], batch.expert_ids_TLK, homes_TL[:, :, None]]
    return float(hosts[rows_T].mean())


def test_a_prompts_own_routing_is_the_signature(world) -> None:
    trace, placement, schedule = world
    view = only_phase(trace, "generated", with_prompts=True)
    batch = view.load()
    assert batch.prompts_apart.request_ids == batch.request_ids and batch.prompts_apart.is_prompt_T.all()
    assert only_phase(trace, "generated").load().prompts_apart is None
    homes_TL, imbalance = simulate("dp-prompt", batch, placement, schedule, **SIZES)
    assert (homes_TL == homes_TL[batch.starts_B1[:-1]][batch.request_of_T]).all() and imbalance < 1.5
    plain_TL, _ = simulate("dp-roundrobin", batch, placement, schedule, **SIZES)
    oracle_TL, _ = simulate("dp-oracle", batch, placement, schedule, **SIZES)
    everything = np.ones(batch.num_tokens, bool)
    known, plain, oracle = (local_share(batch, placement, h, everything) for h in (homes_TL, plain_TL, oracle_TL))
    assert plain < known <= oracle
    # The same requests of the whole trace are sent to the same ranks, by the same rows.
    shares_BR = request_shares_BR(batch.prompts_apart, placement.hosts_LER)
    assert shares_BR.sum(axis=1) == pytest.approx(1)
    whole_TL, _ = simulate("dp-prompt", trace.load(), placement, schedule, **SIZES)
    assert (whole_TL[~trace.load().is_prompt_T] == homes_TL).all()


def test_first_tokens_live_where_requests_in_turn_do(world) -> None:
    trace, placement, schedule = world
    batch = only_phase(trace, "generated").load()
    homes_TL, _ = simulate("dp-first-tokens", batch, placement, schedule, **SIZES)
    plain_TL, _ = simulate("dp-roundrobin", batch, placement, schedule, **SIZES)
    first_T = np.arange(batch.num_tokens) - batch.starts_B1[batch.request_of_T] < FIRST_TOKENS
    assert 0 < first_T.sum() < batch.num_tokens
    assert (homes_TL[first_T] == plain_TL[first_T]).all()
    later = [local_share(batch, placement, h, ~first_T) for h in (plain_TL, homes_TL)]
    assert later[0] < later[1]
