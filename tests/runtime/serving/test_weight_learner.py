"""Weights that learn while a model serves: as the simulation has it, the same on all ranks, and
worth it on unknown traffic."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from cases import learner_cases

from semmoe.profiles.counts import profile_traces
from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic
from semmoe.profiles.trace import RoutingTrace
from semmoe.runtime.ranks.group import Group
from semmoe.runtime.ranks.launch import launch
from semmoe.runtime.serving import weight_learner
from semmoe.runtime.serving.token_homes import TokenHomes
from semmoe.solvers.place.baselines import place_contiguous
from semmoe.solvers.placement import Placement
from semmoe.solvers.schedule import simulate
from semmoe.solvers.schedule.fit import fit_schedule
from semmoe.solvers.schedule.simulate import TP_SCHEDULES

CPU = torch.device("cpu")


@pytest.fixture
def alone() -> Iterator[Group]:
    """The group of one rank."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield Group(0, 1, CPU, "gloo", dist.group.WORLD)  # pyright: ignore
    dist.destroy_process_group()


@pytest.mark.parametrize("num_experts", [8, 200])  # of 200 experts one of five earlier layers learns
def test_weights_learn_online_as_in_the_simulation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: Group, num_experts: int
) -> None:
    layers = range(6)
    sizes = {"num_layers": 6, "num_experts": num_experts, "top_k": 2, "num_requests": 24, "tokens_per_request": 30}
    write_synthetic(tmp_path / "t", SyntheticWorld(**sizes))  # pyright: ignore
    batch = profile_traces([RoutingTrace.open(tmp_path / "t")], seed=0).sample
    placement = Placement.from_ranks(place_contiguous(6, num_experts, 2), 2)
    schedule = fit_schedule(batch, placement, seed=0)
    # A step after every two requests, there and here.
    requests = [np.arange(*bounds) for bounds in zip(batch.starts_B1[:-1], batch.starts_B1[1:], strict=True)]
    groups = [np.concatenate(requests[i : i + 2]) for i in range(0, 24, 2)]
    monkeypatch.setattr(simulate, "request_groups", lambda batch, rng: groups)
    monkeypatch.setattr(weight_learner, "LEARN_EVERY", 60)
    scores = {
        name: [TP_SCHEDULES[name](batch, placement, schedule, np.random.default_rng(0))(layer) for layer in layers]
        for name in ("tp-context", "tp-learning")
    }
    homes = TokenHomes("learning", schedule, placement, 2, group=alone, device=CPU)
    for request, rows in enumerate(requests):
        is_prompt_T = batch.is_prompt_T[rows]
        for part in [rows[is_prompt_T], *rows[~is_prompt_T, None]]:
            homes.begin(
                batch.token_ids_T[part], np.full(len(part), request), is_prompt=bool(batch.is_prompt_T[part[0]])
            )
            for layer in layers:
                np.testing.assert_allclose(homes.scores_TR(layer), scores["tp-learning"][layer][part], atol=1e-3)
                homes.record(layer, torch.from_numpy(batch.expert_ids_TLK[part, layer].astype(np.int16)))
            homes.finish()
    # What was learned is not lost in the tolerance.
    changes = [np.abs(a - b).max() for a, b in zip(scores["tp-learning"], scores["tp-context"], strict=True)]
    assert np.mean(changes) > 0.02


def test_all_ranks_end_up_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_synthetic(
        tmp_path / "t", SyntheticWorld(num_layers=4, num_experts=8, top_k=2, num_requests=12, tokens_per_request=30)
    )
    # 4 layers on 1 rank; on 3 ranks, of which one has two; on 5, of which one has none.
    alone, *others = [launch(learner_cases.learn, (str(tmp_path / "t"), size), size) for size in (1, 3, 5)]
    for found in others:
        assert found["equal"]
        np.testing.assert_allclose(found["weights"], alone["weights"], atol=1e-5)
    plan = learner_cases.plan_weights(str(tmp_path / "t"))
    assert (
        np.mean(np.abs(np.array(alone["weights"]) - plan).max(axis=(1, 2)) > 0.002) >= 0.5
    )  # most layers have learned
