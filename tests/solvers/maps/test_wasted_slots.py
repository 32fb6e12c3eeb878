"""Maps that EPLB users have: an expert twice on a rank, axes of ranks, draft layers, any ending."""

import json

import numpy as np
import pytest

from semmoe.profiles.errors import InputError
from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic
from semmoe.profiles.trace import RoutingTrace
from semmoe.solvers.maps.import_plan import Served, import_plan
from semmoe.solvers.maps.read import import_placement
from semmoe.solvers.placement import Topology
from semmoe.solvers.plan import ModelFacts, Plan
from semmoe.solvers.schedule.simulate import Setting

MODEL = ModelFacts("m", "", num_layers=2, num_experts=16, top_k=4, model_layers=(1, 2), num_model_layers=3)
FOUR = Topology(4)
WASTING = [expert for rank in range(4) for expert in (*range(4 * rank, 4 * rank + 4), 4 * rank)]


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("wasted") / "t"
    write_synthetic(path, SyntheticWorld(num_requests=24, tokens_per_request=16, num_layers=2, num_experts=16, top_k=4))
    return RoutingTrace.open(path)


def imported(trace, file):
    return import_plan([trace], FOUR, kind="eplb", file=file, served=Served("per-rank", Setting()), made_by="")


def test_a_wasted_slot_serves_nothing_and_is_counted(trace, tmp_path):
    np.save(tmp_path / "twice.npy", np.array([WASTING] * 2))
    np.save(tmp_path / "once.npy", np.arange(16) + np.zeros((2, 1), int))
    twice, once = (imported(trace, tmp_path / name) for name in ("twice.npy", "once.npy"))
    assert twice.placement.num_wasted == 8 == twice.options["wasted_slots"] and "wasted_slots" not in once.options
    assert any("8 of 40 slots hold an expert that their rank of 4 holds already" in note for note in twice.notes)
    assert [(row.rem, row.load_imbalance) for row in twice.scores.plan_rows] == [
        (row.rem, row.load_imbalance) for row in once.scores.plan_rows
    ]
    twice.save(tmp_path / "p")
    assert Plan.load(tmp_path / "p").facts()["wasted_slots"] == 8
    facts = json.loads((tmp_path / "p" / "plan.json").read_text())
    del facts["options"]["wasted_slots"]
    (tmp_path / "p" / "plan.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match="twice on rank 0"):
        Plan.load(tmp_path / "p", accept_edits=True)


def test_maps_with_an_axis_of_ranks_by_content_not_by_ending(tmp_path):
    import torch

    order = np.random.default_rng(0).permutation(16).reshape(4, 4)
    slot_RE = np.full((4, 16), -1)
    for rank in range(4):
        slot_RE[rank, order[rank]] = np.arange(4)
    for name, map_LRX in {"local": np.stack([slot_RE] * 2), "slots": np.stack([order] * 2)}.items():
        torch.save(torch.from_numpy(map_LRX), tmp_path / f"{name}.pth")
        torch.save(torch.from_numpy(map_LRX), tmp_path / f"{name}.bin", _use_new_zipfile_serialization=False)
        np.save(tmp_path / name, map_LRX)
        for ending in ("pth", "bin", "npy"):
            got = import_placement("eplb", tmp_path / f"{name}.{ending}", MODEL, FOUR)
            np.testing.assert_array_equal(got.experts_LRS, np.stack([order] * 2))
    with pytest.raises(InputError, match="a map of 4 ranks .*expected 2"):
        import_placement("eplb", tmp_path / "local.pth", MODEL, Topology(2))
    slot_RE[0, order[0, 0]] = 3
    np.save(tmp_path / "wrong.npy", np.stack([slot_RE] * 2))
    with pytest.raises(InputError, match="the slots 0..3 once on every rank"):
        import_placement("eplb", tmp_path / "wrong.npy", MODEL, FOUR)


def test_draft_layers_at_the_end_are_left_out(tmp_path):
    rows = [list(range(16)), list(range(15, -1, -1)), [0] * 16]
    np.save(tmp_path / "m.npy", np.array(rows))
    got = import_placement("eplb", tmp_path / "m.npy", MODEL, FOUR)
    assert got.num_layers == 2 and got.experts_LRS[1, 0, 0] == 15
    (tmp_path / "m.json").write_text(json.dumps({"physical_to_logical_map": [rows[0], *rows]}))
    assert import_placement("sglang", tmp_path / "m.json", MODEL, FOUR).experts_LRS[1, 0, 0] == 15
