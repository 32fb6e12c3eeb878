"""Times on given hardware through the command line."""

import json

import pytest
from engine_samples import routing, sglang_record, write_lines
from typer.testing import CliRunner

from semmoe.main import app
from semmoe.profiles.engines.imports import import_trace
from semmoe.profiles.split import counted_phase, phase_shares
from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic
from semmoe.profiles.trace import RoutingTrace
from semmoe.solvers.time import predict as predicting
from semmoe.solvers.time.chosen import CHOICES

SIZES = ("--hidden-size", "512", "--expert-size", "256")
TIME = ("--hardware", "h100", "--phase", "prompt", "--tokens-per-rank", "256", *SIZES)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(predicting, "RESAMPLED_IDS", 500_000)
    monkeypatch.setattr(predicting, "BATCH_IDS", 500_000)


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("timing") / "t"
    write_synthetic(path, SyntheticWorld(num_layers=2, num_experts=16, num_requests=60))
    return str(path)


def run(*words, code=0):
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == code, done.output
    return done


def placed(trace, out, *more):
    words = ("place", trace, "--ranks", 4, "--holdout", 0.5, "--no-refit", "-o", out, "--effort", "fast", "--json")
    return json.loads(run(*words, *more).stdout)


def test_a_plan_placed_for_time_says_what_it_saves(trace, tmp_path):
    report = placed(trace, tmp_path / "p", *TIME, "--step-ms", 20, "--gpu-hour", 2, "--engine", "sglang")
    time = report["time"]
    assert (time["hardware"], time["backend"], time["phase"], time["engine"]) == (
        "h100",
        "deepep-normal",
        "prompt",
        "sglang",
    )
    assert {(row["placement"], row["schedule"]) for row in time["rows"]} >= {
        ("plan", "random"),
        ("plan", "dp-scorer"),
        ("contiguous", "random"),
        ("load", "random"),
    }
    for row in time["rows"]:
        assert row["us"]["total"] == pytest.approx(sum(row["us"][k] for k in ("dispatch", "experts", "combine")))
        assert row["deployable"] == (row["schedule"] in ("random", "dp-scorer"))
        assert row["share_of_step"] == pytest.approx(row["us"]["total"] * 2 / 20_000)
    saved, plan = time["saved"], next(r for r in time["rows"] if r["placement"] == "plan")
    others = [r["us"]["total"] for r in time["rows"] if r["placement"] in ("contiguous", "load")]
    assert plan["us"]["total"] <= min(others) and saved["ci"][0] <= saved["share"] <= saved["ci"][1]
    assert saved["usd_per_hour"] == pytest.approx(2 * 4 * saved["share_of_step"])
    assert time["sensitivity"]["low"] <= saved["share"] <= time["sensitivity"]["high"]
    assert {p["name"] for p in time["parameters"] if "assumed" in p} >= {"exchange.a", "setup"}
    assert all(("source" in p) != ("assumed" in p) for p in time["parameters"])
    assert "add --hardware" not in report["verdict"]["sentence"]
    assert any("it runs placement, with dp-scorer through a router" in note for note in time["notes"])
    facts = json.loads((tmp_path / "p" / "plan.json").read_text(encoding="utf-8"))
    assert facts["options"]["minimize"] == "time"


def test_without_hardware_nothing_is_green(trace, tmp_path):
    report = placed(trace, tmp_path / "p")
    assert "bytes only; time unknown: add --hardware" in report["verdict"]["sentence"]
    assert report["verdict"]["decision"] == "recommend" and report["verdict"]["level"] == "watch"
    assert "time" not in report
    page = tmp_path / "r.md"
    run("report", tmp_path / "p", trace, "-o", page)
    assert "add --hardware" in page.read_text(encoding="utf-8").split("\n\n")[2]


def test_reports_of_plans_of_traces_and_of_other_ranks_have_times(trace, tmp_path):
    placed(trace, tmp_path / "p", "--minimize", "bytes", *TIME)
    page = tmp_path / "r.html"
    words = ("report", tmp_path / "p", trace, *TIME, "--what-if", "2,4", "--json", "-o", page)
    report = json.loads(run(*words).stdout)
    assert report["time"]["verdict"]["sentence"]
    assert "us a layer" in page.read_text(encoding="utf-8")
    assert all(row["us_per_layer"] > 0 for row in report["what_if"]["rows"])
    placed(trace, tmp_path / "q", *TIME)
    compared = json.loads(run("compare", tmp_path / "p", tmp_path / "q", trace, *TIME, "--json").stdout)
    totals = [
        next(row["us"]["total"] for row in time["rows"] if row["placement"] == "plan")
        for time in compared["time"].values()
    ]
    assert len(totals) == 2 and totals[1] <= totals[0] * 1.01  # placed for time
    health = json.loads(run("report", trace, *TIME, "--ranks", 4, "--json").stdout)
    assert {row["placement"] for row in health["layer_time"]["rows"]} == {"contiguous", "load"}
    assert "us" in run("report", trace, *TIME, "--ranks", 4).stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--hardware", "h100"), "give --hidden-size and --expert-size"),
        (("--hardware", "h101", *SIZES), "known machines are"),
        (("--hardware", "h100", "--backend", "cpu-proxy", *SIZES), "bound by messages"),
        (("--minimize", "time"), "needs --hardware"),
        (("--hardware", "h100", "--minimize", "time", "--method", "load", *SIZES), "needs --method semmoe"),
    ],
)
def test_what_cannot_be_timed_is_refused_and_writes_nothing(trace, tmp_path, words, said):
    done = run("place", trace, "--ranks", 4, "-o", tmp_path / "p", *words, code=1)
    assert said in str(done.exception)
    assert not (tmp_path / "p").exists()


def test_options_of_time_need_hardware(trace, tmp_path):
    done = run("place", trace, "--ranks", 4, "-o", tmp_path / "p", "--backend", "deepep-ll", code=2)
    assert "needs --hardware" in done.output


def test_the_load_cap_and_the_weight_of_local_activations_are_chosen_by_time(trace, tmp_path):
    placed(trace, tmp_path / "p", *TIME, "--minimize", "bytes", "--load-cap", "auto", "--lar-weight", "auto")
    facts = json.loads((tmp_path / "p" / "plan.json").read_text(encoding="utf-8"))
    assert facts["load_cap"] in CHOICES["load_cap"] and facts["options"]["lar_weight"] in CHOICES["lar_weight"]
    assert "minimize" not in facts["options"]
    words = ("place", trace, "--ranks", 4, "-o", tmp_path / "q", "--load-cap")
    assert "needs --hardware" in str(run(*words, "auto", code=1).exception)
    assert "is no number, nor auto" in run(*words, "much", code=2).output
    said = str(run(*words, "auto", "--lar-weight", "auto", *TIME, code=1).exception)
    assert said.startswith("--load-cap auto, --lar-weight auto needs --hardware, and --minimize bytes")


def test_batches_of_a_phase_that_was_not_recorded_are_made_of_what_was(tmp_path):
    """Answers without their prompts' routing, timed as prefill: said, not refused."""
    records = [sglang_record(routing(20, seed=n, dense=()), name=f"r{n}", start=3) for n in range(24)]
    import_trace("sglang", [write_lines(tmp_path / "answers.jsonl", records)], tmp_path / "t")
    opened = RoutingTrace.open(tmp_path / "t")
    assert phase_shares([opened])["prompt"] == 0
    assert counted_phase([opened], "prompt", timed=True) == "all"
    assert counted_phase([opened], "prompt", timed=False) == "prompt"
    report = placed(str(tmp_path / "t"), tmp_path / "p", *TIME, "--method", "load")
    assert report["time"]["phase"] == "prompt"
    assert any("hold no prompt tokens" in note for note in report["time"]["notes"])
