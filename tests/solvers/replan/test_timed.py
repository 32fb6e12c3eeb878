"""Gain as predicted time: what the search is told of rows and load is what the time model says, and
a re-placement by it saves time on requests that it was not fitted on."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from semmoe.profiles.counts import profile_traces
from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic
from semmoe.profiles.trace import RoutingTrace
from semmoe.solvers.demands import Demands
from semmoe.solvers.deployment import Deployment
from semmoe.solvers.place.baselines import place_contiguous
from semmoe.solvers.placement import Placement, Topology
from semmoe.solvers.replan.frontiers import Budget, search_frontiers
from semmoe.solvers.replan.tasks import NewTraffic
from semmoe.solvers.replan.timed import TimeGain
from semmoe.solvers.time.hardware import TimeAsked

ASKED = TimeAsked(hardware="h200", hidden_size=2048, expert_size=768, tokens_per_rank=128, phase="generated")


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("timed") / "t"
    sizes = {"num_layers": 2, "num_experts": 16, "top_k": 3, "num_groups": 4, "num_requests": 32, "num_domains": 1}
    write_synthetic(folder, SyntheticWorld(**sizes, tokens_per_request=64, vocab_size=200, noise=0.03))
    return profile_traces([RoutingTrace.open(folder)], seed=0)


def contiguous(topology: Topology, profile) -> Deployment:
    rank_of_LE = place_contiguous(2, 16, topology.num_ranks)
    return Deployment(Placement.from_ranks(rank_of_LE, topology.num_ranks), profile.load_LE, topology)


def of(profile, old: Deployment, **asked) -> TimeGain:
    return TimeGain.of(replace(ASKED, **asked), profile.info, old, profile.sample, 0)


@pytest.mark.parametrize(
    ("backend", "topology", "dear"),
    [
        ("deepep-normal", Topology(4), "rank_row"),
        ("deepep-ll", Topology(4), "activation_row"),
        ("deepep-normal", Topology(4, 4), "node_row"),
        ("nccl-gather", Topology(4), ""),
    ],
)
def test_the_dearest_row_is_the_unit_of_the_search(profile, backend, topology, dear):
    old = contiguous(topology, profile)
    worth, unit = of(profile, old, backend=backend).slopes(profile.sample, old)
    rows = {name: getattr(worth, name) for name in ("rank_row", "node_row", "activation_row")}
    assert max(rows, key=lambda name: rows[name]) == dear or not dear
    assert max(rows.values()) == pytest.approx(1 if dear else 0)
    assert unit > 0 and worth.excess > 0 and worth.load_cap == 1


def test_what_the_search_is_told_of_rows_is_a_part_of_the_layers_time(profile):
    old = contiguous(Topology(4), profile)
    timed = of(profile, old, tokens_per_rank=256, phase="prompt")
    worth, unit = timed.slopes(profile.sample, old)
    us = timed.times_L(profile.sample, old)
    assert us.shape == (2,) and (us > 0).all()
    # Every token touches 2.3 remote ranks at random homes; exchanges take no more than the layer.
    assert 0 < worth.rank_row * unit * 2.2 < us.mean()


def test_moves_by_time_save_predicted_time_and_keep_their_price(profile):
    old = contiguous(Topology(4), profile)
    timed = of(profile, old)
    worth, unit = timed.slopes(profile.sample, old)
    traffic = NewTraffic(profile, old.placement, old.topology, Demands(effort="fast"), worth, 8)
    frontiers = search_frontiers(traffic, partial(map))
    found = frontiers.within(Budget(0.5))
    gains_XL = timed.gains_XL(profile.sample, old, replace(old, placement=found.placement))
    assert gains_XL[0].mean() > 0 and np.quantile(gains_XL[1:].mean(axis=1), 0.025) > 0
    assert (gains_XL[0] > 0).all() and found.moved_L.sum() <= 16
    dear = frontiers.within(Budget(0.5, price=1e9 / unit))
    assert dear.moved_L.sum() == 0


def test_a_move_takes_its_bytes_over_the_link(profile):
    old = contiguous(Topology(4), profile)
    timed = of(profile, old, tokens_per_rank=100)
    size = 3 * 2048 * 768 * 2
    slowest = size / timed.costing.values["nvl"] / 1e3
    assert timed.move_us() == pytest.approx(slowest)
    assert timed.steps(40_000) == pytest.approx(100)
    far = contiguous(Topology(16, 2), profile)
    assert of(profile, far).move_us() > timed.move_us()
