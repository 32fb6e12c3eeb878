"""As deployed, through the command line: ranks that do not divide the experts, phases apart, one
named baseline, the rule by which copies serve."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from semmoe.main import app
from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic

FAST = ("--effort", "fast", "--no-refit", "--processes", "1", "--holdout", "0.5")


def run(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, (words, result.stderr, result.exception)
    return result.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A trace of 16 experts, and plans for its prompts and its answers on 5 ranks of 4 slots."""
    root = tmp_path_factory.mktemp("shapes")
    world = SyntheticWorld(num_layers=2, num_experts=16, num_requests=48, tokens_per_request=24, num_domains=2)
    write_synthetic(root / "t", world)
    for phase in ("prompt", "generated"):
        run("place", root / "t", "--ranks", 5, "--phase", phase, *FAST, "-o", root / phase)
    return root


def test_a_plan_of_a_phase_says_so(made: Path) -> None:
    facts = json.loads(run("show", made / "prompt", "--json"))
    assert (facts["slots_per_rank"], facts["copies_per_layer"], facts["phase"]) == (4, 4, "prompt")
    assert facts["prompt_share"] == facts["generated_share"] == 0.5
    trace = json.loads(run("show", made / "t", "--phase", "generated", "--json"))
    assert (trace["phase"], trace["tokens"], trace["prompt_share"]) == ("generated", 48 * 12, 0.5)
    report = json.loads(run("report", made / "prompt", made / "t", "--json"))
    assert (report["phase"], report["tokens"]) == ("prompt", 24 * 12)
    other = json.loads(run("report", made / "prompt", made / "t", "--phase", "all", "--json"))
    assert (other["phase"], other["tokens"]) == ("all", 24 * 24)


def test_plans_of_phases_are_shown_on_each_others(made: Path) -> None:
    found = json.loads(run("compare", made / "prompt", made / "generated", made / "t", "--json"))
    assert found["phase"] == "all" and found["against"] == str(made / "prompt")
    assert [(p["phase"], p["tokens"]) for p in found["phases"]] == [("prompt", 24 * 12), ("generated", 24 * 12)]
    for part in found["phases"]:
        assert {row["placement"] for row in part["rows"]} == {str(made / "prompt"), str(made / "generated")}
    alone = json.loads(
        run(
            "compare",
            made / "prompt",
            made / "generated",
            made / "t",
            "--phase",
            "prompt",
            "--against",
            "load",
            "--json",
        )
    )
    assert "phases" not in alone and [d["against"] for d in alone["differences"]] == ["load", "load"]
    assert sum(row["placement"].startswith("load beside ") for row in alone["rows"]) == 2


@pytest.mark.parametrize("against", ["contiguous", "load", "generated"])
def test_one_baseline_for_verdict_tables_and_page(made: Path, tmp_path: Path, monkeypatch, against: str) -> None:
    monkeypatch.chdir(made)
    page = tmp_path / "page.md"
    words = ("report", "prompt", "t", "--against", against, "--hidden-size", 64, "-o", page, "--json")
    report = json.loads(run(*words))
    assert report["against"] == report["verdict"]["against"] == against
    assert list(report["costs"]["rows"][0]["bytes"])[:2] == [against, "plan"]
    assert against in {row["placement"] for row in report["rows"]}
    name = {"contiguous": "contiguous experts", "load": "experts packed by load"}.get(against, "the plan generated")
    assert name in report["verdict"]["sentence"]
    assert f"before: {against}" in page.read_text(encoding="utf-8") or name in page.read_text(encoding="utf-8")


def test_copies_serve_by_the_named_rule(made: Path) -> None:
    rem = {}
    for rule in ("own-rank-then-node-then-load", "cover", "vllm"):
        report = json.loads(run("report", made / "prompt", made / "t", "--replica-choice", rule, "--json"))
        assert report["replica_choice"] == rule
        rem[rule] = {row["placement"]: row["rem"] for row in report["rows"] if row["schedule"] == "random"}
    assert rem["cover"]["plan"] < rem["own-rank-then-node-then-load"]["plan"]
    assert len({found["plan"] for found in rem.values()}) == 3
    engine = json.loads(
        run("report", made / "prompt", made / "t", "--replica-choice", "engine", "--engine", "vllm", "--json")
    )
    assert engine["replica_choice"] == "vllm"
    refused = CliRunner().invoke(app, ["report", str(made / "prompt"), str(made / "t"), "--replica-choice", "engine"])
    assert refused.exit_code == 1 and "--replica-choice engine needs --engine NAME" in str(refused.exception)


@pytest.mark.parametrize("kind", ["sglang", "trtllm", "vllm", "vllm-ascend", "eplb"])
def test_maps_of_uneven_ranks_come_back(made: Path, tmp_path: Path, kind: str) -> None:
    ending = {"trtllm": ".yaml", "eplb": ".npz"}.get(kind, ".json")
    more = {"vllm": ("--format", "pr49572"), "sglang": ("--num-hidden-layers", 2)}.get(kind, ())
    run("export", made / "prompt", "--to", kind, *more, "-o", tmp_path / f"map{ending}")
    words = ("--import", kind, tmp_path / f"map{ending}", "-o", tmp_path / "q")
    run("place", made / "t", "--ranks", 5, *words)
    placements = [
        json.loads((path / "plan.json").read_text())["placement"] for path in (made / "prompt", tmp_path / "q")
    ]
    assert placements[0] == placements[1]


def test_empty_slots_are_for_checkpoints_alone(made: Path, tmp_path: Path) -> None:
    run("place", made / "t", "--ranks", 5, "--spare", "empty", "--certify", *FAST, "-o", tmp_path / "p")
    facts = json.loads(run("show", tmp_path / "p", "--json"))
    assert (facts["empty_slots_per_layer"], facts["permuted_checkpoint"]) == (4, "possible")
    refused = CliRunner().invoke(app, ["export", str(tmp_path / "p"), "--to", "eplb", "-o", str(tmp_path / "m.npz")])
    assert refused.exit_code == 1 and "4 slots a layer are empty" in str(refused.exception)


def test_more_ranks_than_experts(made: Path, tmp_path: Path) -> None:
    report = json.loads(
        run("place", made / "t", "--ranks", 20, "--redundant", 4, *FAST, "-o", tmp_path / "p", "--json")
    )
    assert report["ranks"] == 20 and {row["placement"] for row in report["rows"]} == {"plan", "contiguous", "load"}
