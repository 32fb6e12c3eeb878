"""`semmoe try`: from answers, or a trace, to one page with a verdict for prefill and decode."""

import json

import pytest
from engine_samples import routing, sglang_record, write_lines
from typer.testing import CliRunner

from semmoe.main import app
from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic
from semmoe.solvers.time import predict as predicting

TIME = ("--hardware", "h100", "--hidden-size", "512", "--expert-size", "256", "--tokens-per-rank", "64")


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(predicting, "RESAMPLED_IDS", 300_000)
    monkeypatch.setattr(predicting, "BATCH_IDS", 300_000)


def run(*words, code=0):
    done = CliRunner().invoke(app, ["try", *(str(word) for word in words)])
    assert done.exit_code == code, done.output + str(done.exception)
    return done


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("try") / "t"
    write_synthetic(path, SyntheticWorld(num_layers=2, num_experts=16, num_requests=60))
    return path


def test_both_phases_of_a_trace_on_one_page(trace, tmp_path):
    page = tmp_path / "try.html"
    done = run(trace, "--engine", "sglang", "--ranks", 4, *TIME, "-o", page, "--json")
    found = json.loads(done.stdout)
    assert set(found) == {"prefill", "decode"}
    assert found["prefill"]["time"]["backend"] == "deepep-normal"
    assert found["decode"]["time"]["backend"] == "deepep-ll"
    text = page.read_text(encoding="utf-8")
    assert "Prefill: " in text and "Decode: " in text and "semmoe place" in text


def test_without_hardware_bytes_alone_are_told(trace, tmp_path):
    page = tmp_path / "try.md"
    found = json.loads(run(trace, "--engine", "sglang", "--ranks", 4, "-o", page, "--json").stdout)
    assert "add --hardware" in page.read_text(encoding="utf-8")
    # Each verdict is of its own tokens, and the command that is told counts the same ones.
    tokens = {name: report["tokens"] for name, report in found.items()}
    assert {name: report["phase"] for name, report in found.items()} == {"prefill": "prompt", "decode": "generated"}
    for name, phase in (("prefill", "prompt"), ("decode", "generated")):
        assert f"--engine sglang --phase {phase}" in page.read_text(encoding="utf-8")
        words = [
            "place",
            str(trace),
            "--ranks",
            "4",
            "--engine",
            "sglang",
            "--phase",
            phase,
            "--holdout",
            "0.5",
            "--json",
        ]
        placed = CliRunner().invoke(app, [*words, "-o", str(tmp_path / name)])
        assert json.loads(placed.stdout)["tokens"] == tokens[name]


def test_answers_are_imported(tmp_path):
    records = [sglang_record(routing(20, seed=n, dense=()), name=f"r{n}") for n in range(24)]
    answers = write_lines(tmp_path / "answers.jsonl", records)
    found = json.loads(run(answers, "--engine", "sglang", "--ranks", 2, *TIME, "--phase", "generated", "--json").stdout)
    assert list(found) == ["decode"] and found["decode"]["trace"] == str(answers)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--ranks", 4), 2, "--engine"),
        (("--ranks", 4, "--engine", "llamacpp"), 1, "known are sglang"),
        (("--ranks", 4, "--engine", "sglang", "--backend", "deepep-ll"), 2, "needs --hardware"),
        (("--ranks", 4, "--nodes", 3, "--engine", "sglang"), 1, "do not divide over 3 nodes"),
        (("--ranks", 4, "--engine", "sglang", "-o", "p.pdf"), 1, "ends in"),
    ],
)
def test_what_cannot_be_tried_is_refused(trace, words, code, said):
    done = run(trace, *words, code=code)
    assert said in done.output + str(done.exception)
