"""Ranks that do not divide the experts, with copies and with empty slots, under other replica
rules: the tokens are plain Transformers'."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from random_plans import random_plan
from typer.testing import CliRunner

from semmoe.main import app
from semmoe.profiles.demo.paths import demo_model_path
from semmoe.runtime.reshard.records import ReshardOptions
from semmoe.runtime.reshard.reshard import reshard_checkpoint
from semmoe.runtime.reshard.undo import undo_reshard
from semmoe.solvers.place.baselines import baselines
from semmoe.solvers.placement import Topology
from semmoe.solvers.plan import Plan
from semmoe.solvers.slots import Slots

RUN = ("run", "demo", "--dtype", "float32", "--max-new-tokens", "4", "--batch-tokens", "600", "--check", "--json")


def uneven_plan(ranks: int, slots: Slots) -> Plan:
    """The demo model's 32 experts packed by a made-up load."""
    plan = random_plan(demo_model_path(), ranks=2)
    load_LE = np.random.default_rng(ranks).integers(1, 100, (plan.model.num_layers, 32))
    placement = baselines(load_LE, Topology(ranks), slots=slots)["load"]
    return replace(plan, placement=placement, topology=Topology(ranks), load_LE=load_LE)


@pytest.mark.parametrize(
    ("ranks", "slots", "rule"),
    [(3, Slots(12), "cover"), (5, Slots(7, copies=False), "own-rank-then-node-then-load"), (5, Slots(8), "vllm")],
)
def test_uneven_slots_give_the_answers_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, slots: Slots, rule: str
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    uneven_plan(ranks, slots).save(tmp_path / "p")
    texts = ["a", "def f(x):\n    return", "Die Katze", "Once upon a time there was", "word " * 40, "1 2 3"]
    lines = [json.dumps({"id": f"r{i}", "text": text}) for i, text in enumerate(texts)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    words = [*RUN, "--plan", tmp_path / "p", "--prompts", tmp_path / "prompts.jsonl", "--replica-choice", rule]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.exception
    metrics = json.loads(result.stdout)
    assert metrics["check"] == {"ok": True, "compared": 6, "mismatches": [], "ties": []}
    assert (metrics["ranks"], metrics["replica_choice"]) == (ranks, rule) and 0 < metrics["rem"] < ranks


@pytest.mark.parametrize("layout", ["ranks", "permuted"])
def test_a_reshard_of_uneven_shares_comes_back(tmp_path: Path, layout: str) -> None:
    plan = uneven_plan(5, Slots(7, copies=False))
    reshard_checkpoint(demo_model_path(), plan, tmp_path / "out", ReshardOptions(layout=layout, verify="bytes"))
    undo_reshard(tmp_path / "out", tmp_path / "back")
    for file in demo_model_path().glob("*.safetensors"):
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()
