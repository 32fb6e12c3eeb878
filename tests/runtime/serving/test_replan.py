"""semmoe run --replan: experts move between two steps, and nobody sees it but the metrics; where a
rank is killed meanwhile, finished requests are kept."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cases import rank_cases
from random_plans import random_plan
from stepped_plans import save_stepped
from tiny_models import tiny_model
from typer.testing import CliRunner

from semmoe.main import app
from semmoe.profiles.counts import profile_traces
from semmoe.profiles.demo.paths import demo_model_path
from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic
from semmoe.profiles.trace import RoutingTrace
from semmoe.runtime.ranks.launch import launch
from semmoe.runtime.reshard.records import ReshardOptions
from semmoe.runtime.reshard.reshard import reshard_checkpoint
from semmoe.solvers.placement import Placement, Topology
from semmoe.solvers.plan import Plan
from semmoe.solvers.schedule.fit import fit_schedule

RUN = ["run", "demo", "--dtype", "float32", "--max-new-tokens", "6", "--batch-tokens", "300"]
FAMILIES = {
    **dict.fromkeys(("qwen3_moe", "gpt_oss", "longcat_flash"), ["", "-permuted", "-ranks"]),
    "dbrx": [""],
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plans with schedules, each with one that follows it (`p2` after `p`): `p` of 2 ranks with
    replicas, `q` without, `u` of 3 uneven ranks; and prompts."""
    root = tmp_path_factory.mktemp("demo")
    write_synthetic(root / "t", SyntheticWorld(num_layers=4, num_experts=32, top_k=4, num_requests=40, vocab_size=4000))
    sample = profile_traces([RoutingTrace.open(root / "t")], seed=0).sample
    even = random_plan(demo_model_path(), ranks=2)
    plans = {"p": rank_cases.with_replicas(even, 2), "q": even, "u": uneven(3)}
    for name, bare in plans.items():
        old = replace(bare, tables=fit_schedule(sample, bare.placement, seed=0).to_tables())
        old.save(root / name)
        save_stepped(old, root / f"{name}2", swaps=3)
    texts = ["a", "word " * 120, "def f(x):\n    return", "Die Katze", "Once upon a time", "b", "c " * 90, "d"]
    lines = [json.dumps({"id": f"r{i}", "text": text}) for i, text in enumerate(texts)]
    (root / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return root


def uneven(ranks: int) -> Plan:
    """32 experts dealt out to a number of ranks."""
    plan = random_plan(demo_model_path(), ranks=1)
    experts_LE = plan.placement.experts_LRS[:, 0]
    rank_of_LE = np.argsort(experts_LE, axis=1) % ranks
    return replace(plan, placement=Placement.from_ranks(rank_of_LE, ranks), topology=Topology(ranks))


def words_of(demo: Path, name: str, *more: str) -> list[str]:
    words = ["--plan", str(demo / name), "--prompts", str(demo / "prompts.jsonl"), "--json"]
    return [*RUN, *words, "--replan", str(demo / f"{name}2"), *more]


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("p", ["--scheduler", "dp"]),
        ("p", ["--scheduler", "none", "--replica-choice", "cover"]),
        ("u", ["--scheduler", "dp"]),
        ("q", ["--scheduler", "tp"]),
        ("q", ["--scheduler", "tp", "--predict", "learning"]),
    ],
)
def test_tokens_are_those_of_the_model_and_metrics_say_what_moved(
    demo: Path, name: str, more: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    done = CliRunner().invoke(app, words_of(demo, name, "--after", "3", "--check", *more))
    assert done.exit_code == 0, (done.stderr, done.exception)
    metrics = json.loads(done.stdout)
    assert metrics["check"]["ok"] and metrics["check"]["compared"] == 8
    told, delta = metrics["replan"], json.loads((demo / f"{name}2" / "delta.json").read_text())
    assert (told["after"], told["old"], told["new"]) == (3, delta["old"], delta["new"])
    assert told["experts_moved"] == delta["budget"]["used"] > 0
    # Three matrices of 128 x 64 values in float32.
    assert told["bytes"] == told["experts_moved"] * expert_bytes() and told["seconds"] > 0
    assert [layer["model_layer"] for layer in told["layers"]] == [layer["model_layer"] for layer in delta["layers"]]
    assert sum(layer["bytes"] for layer in told["layers"]) == told["bytes"]
    assert [step["step"] for step in told["steps"]] == list(range(3, 3 + len(told["steps"])))
    assert sum(step["rows_saved"] for step in told["steps"]) == told["rows_saved"] != 0
    assert told["bytes_saved"] == told["rows_saved"] * (512 + 16 + 8 + 512)
    assert f"after 3 steps: {told['experts_moved']} experts move" in capfd.readouterr().err


def expert_bytes() -> int:
    config = json.loads((demo_model_path() / "config.json").read_text())
    return 3 * config["hidden_size"] * config["moe_intermediate_size"] * 4


def test_steps_after_the_move_are_those_of_a_run_under_the_new_plan(demo: Path) -> None:
    """Moved before the first step, a run sends what one under the new plan sends."""
    moved = CliRunner().invoke(app, words_of(demo, "q", "--after", "0", "--scheduler", "none"))
    words = ["--plan", str(demo / "q2"), "--prompts", str(demo / "prompts.jsonl"), "--json", "--scheduler", "none"]
    there = json.loads(CliRunner().invoke(app, [*RUN, *words]).stdout)
    words[1] = str(demo / "q")
    before = json.loads(CliRunner().invoke(app, [*RUN, *words]).stdout)
    found = json.loads(moved.stdout)
    for key in ("rows_sent", "bytes_sent", "lar", "rem", "load_imbalance"):
        assert found[key] == there[key]
    assert found["replan"]["rows_saved"] == before["rows_sent"] - there["rows_sent"]
    assert found["replan"]["bytes_saved"] == before["bytes_sent"] - there["bytes_sent"]
    assert found["replan"]["seconds_per_step"]["decode"]["before"] is None


def test_a_run_that_ends_before_moves_nothing_and_says_so(demo: Path, capfd: pytest.CaptureFixture[str]) -> None:
    done = CliRunner().invoke(app, words_of(demo, "q", "--after", "1000"))
    told = json.loads(done.stdout)["replan"]
    assert (told["after"], told["experts_moved"], told["bytes"], told["steps"]) == (None, 0, 0, [])
    assert re.search(r"the run ended after \d+ steps: no expert moved \(--after 1000\)", capfd.readouterr().err)


def test_refusals(demo: Path, tmp_path: Path) -> None:
    for words, message in (
        ([str(demo / "q")], f"{demo / 'q'} holds no delta.json"),
        ([str(demo / "p2")], f"the delta of {demo / 'p2'} starts from plan"),
        ([str(tmp_path)], "plan"),
    ):
        done = CliRunner().invoke(app, [*words_of(demo, "q", "--after", "1"), "--replan", *words])
        assert done.exit_code == 1 and message in str(done.exception), done.exception
        assert "\n" not in str(done.exception)
    for words, message in ((["--after", "1"], "needs --replan NEW"), (["--replan", "n"], "needs --after N")):
        done = CliRunner().invoke(app, [*RUN, "--plan", "p", "--prompts", "demo", *words])
        assert done.exit_code == 2 and message in " ".join(done.output.split())


def test_a_damaged_delta_is_refused_before_ranks_start(demo: Path) -> None:
    file = demo / "q2" / "delta.json"
    whole = json.loads(file.read_text())
    try:
        for damage, message in (
            (lambda moves: moves[0].update(to_slot=500), "is damaged"),
            (lambda moves: moves[0].update(expert=(moves[0]["expert"] + 1) % 32), "is damaged"),
            (lambda moves: [move.update(step=0) for move in moves], "more than one expert at once"),
            (lambda moves: moves.clear(), "leads to plan"),
        ):
            facts = json.loads(json.dumps(whole))
            damage(facts["layers"][0]["moves"])
            file.write_text(json.dumps(facts))
            done = CliRunner().invoke(app, words_of(demo, "q", "--after", "1"))
            assert done.exit_code == 1 and message in str(done.exception), (message, done.exception)
    finally:
        file.write_text(json.dumps(whole))


def test_every_layout_and_family_holds_what_its_tables_say(tmp_path: Path) -> None:
    """After the moves, the probe before a run, which knows what was read into each slot and what
    arrived, finds the model's own values."""
    for family in FAMILIES:
        tiny_model(family).save_pretrained(tmp_path / family)
        plan = random_plan(tmp_path / family)
        plan.save(tmp_path / f"{family}-old")
        save_stepped(plan, tmp_path / f"{family}-new", swaps=1)
        for layout in filter(None, FAMILIES[family]):
            options = ReshardOptions(layout=layout[1:], verify="none")
            reshard_checkpoint(tmp_path / family, plan, tmp_path / f"{family}{layout}", options)
    found = launch(rank_cases.compare_moved, (str(tmp_path), FAMILIES), 2)
    assert len(found) == sum(map(len, FAMILIES.values()))
    assert {name: off for name, off in found.items() if not off <= 1e-4} == {}


def test_a_rank_killed_while_experts_move_leaves_finished_requests(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("semmoe.runtime.serving.run.run_rank", rank_cases.killed_while_experts_move)
    (tmp_path / "many.jsonl").write_text("".join(f'{{"text": "{i}"}}\n' for i in range(200)))
    words = [*words_of(demo, "q", "--after", "9", "-o", str(tmp_path / "o")), "--prompts", str(tmp_path / "many.jsonl")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1 and "after 9 steps" in capfd.readouterr().err
    told = str(done.exception)
    found = re.fullmatch(
        rf"rank 1 was killed by SIGKILL.*; (\d+) finished requests are in {tmp_path / 'o.partial'}", told
    )
    kept = [json.loads(line) for line in (tmp_path / "o.partial").read_text().splitlines()]
    assert found and int(found[1]) == len(kept) > 0, told
    assert all(len(line["token_ids"]) == 6 or line["finish_reason"] == "stop" for line in kept)
