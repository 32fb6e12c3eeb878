"""Reports and comparisons in the terminal: tables fit it, no name is cut, and what was asked for
is there."""

import json
import re
from pathlib import Path

import pytest
from command_line import run
from typer.testing import CliRunner

from semmoe.main import app
from semmoe.pages.compare import size_text
from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic
from semmoe.solvers.evaluate.report import Report, RowTime, Times
from semmoe.terminal.tables import print_scores, times_cells


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A trace t, plans p and n that kept their held-out requests unseen, and a plan q that was
    fitted on all of t after scoring."""
    root = tmp_path_factory.mktemp("terminal")
    write_synthetic(root / "t", SyntheticWorld(num_requests=60, tokens_per_request=40, num_layers=3))
    for name, words in (("p", ["metis", "--no-refit"]), ("n", ["spectral", "--no-refit"]), ("q", ["metis"])):
        run("place", root / "t", "--ranks", 4, "--method", *words, "-o", root / name)
    return root


@pytest.mark.parametrize(("width", "intervals"), [(200, True), (130, True), (64, False), (50, False)])
def test_tables_fit_the_terminal(made, capsys, monkeypatch, width, intervals):
    monkeypatch.setattr("semmoe.terminal.tables.PIPE_WIDTH", width)
    report = json.loads(run("report", made / "p", made / "t", "--json"))
    print_scores(Report.from_json(report))
    assert Report.from_json(report).to_json() == report
    table = capsys.readouterr().out
    lines = table.splitlines()
    assert max(map(len, lines)) <= width and "on one node" in " ".join(lines[:3])
    start = next(i for i, line in enumerate(lines) if line.startswith("contiguous"))
    assert ("[" in lines[start]) == intervals == ("interval" in table) and "\x1b" not in "".join(lines)
    assert any("dp-roundrobin" in line for line in lines), "a name is cut"
    values = [re.sub(r"\[.*?\]", lambda m: " " * len(m[0]), line) for line in lines[start - 1 : start + 2]]
    points = [{i for i, c in enumerate(line) if c == "."} for line in values]
    assert points[0] == points[1] == points[2], "digits are not aligned"


@pytest.mark.parametrize(
    ("width", "intervals", "needs"), [(200, True, True), (120, True, True), (80, False, True), (50, False, False)]
)
def test_the_decision_fits_the_terminal_and_comes_first(made, monkeypatch, width, intervals, needs):
    monkeypatch.setattr("semmoe.terminal.tables.PIPE_WIDTH", width)
    printed = run("report", made / "p", made / "t")
    lines = printed.splitlines()
    assert max(len(line) for line in lines if not re.match("Next: |      ", line)) <= width
    said = " ".join(printed.split())
    assert re.match(r"(Worth|Not|Do not)[^.]*: placement (alone|with dp-scorer) saves \d+\.\d% of the bytes", said)
    assert "against" in said and "12 held-out requests" in said
    rows = [next(line for line in lines if line.startswith(name)) for name in ("today", "EPLB's way", "this plan")]
    assert all(("[" in row) == intervals for row in rows) and ("95% bootstrap" in said) == intervals
    assert ("a map or checkpoint" in rows[1]) == needs
    assert "Load risk: " in said and re.search(r"^Next: semmoe report .* -o report.html$", printed, re.M)
    assert "dp-roundrobin" not in printed and "dp-roundrobin" in run("report", made / "p", made / "t", "--all")


def test_no_line_recommends_what_another_does_not(made, tmp_path):
    """A plan that packs by load saves nothing alone; what a schedule would save is told apart."""
    out = tmp_path / "l"
    printed = run("place", made / "t", "--ranks", 4, "--method", "load", "--holdout", 0.5, "-o", out)
    assert len(re.findall(r"Not worth|Worth deploying|Not decided|Do not deploy", printed)) == 1
    assert "Recommend" not in printed
    verdict = json.loads(run("report", out, made / "t", "--json"))["verdict"]
    said = [
        verdict["sentence"],
        *(verdict[name]["sentence"] for name in ("with_schedule", "deployable") if verdict.get(name)),
    ]
    assert said[1].startswith("Research only") and not any(line.startswith("Recommend") for line in said)


def test_digits_of_times_are_aligned():
    milliseconds = {"plan": 0.0436, "contiguous": 0.074, "load": 12.0}
    rows = [RowTime(placement, "random", 1.0, ms, [ms] * 3) for placement, ms in milliseconds.items()]
    assert [row[2:] for row in times_cells(Times("", 512, 4.0, rows, 1, ""), "contiguous")] == [
        ["0.0436", "0.131", "0.59"],
        ["0.0740", "0.222", "1.00"],
        ["12.0000", "36.000", "162.16"],
    ]


@pytest.mark.parametrize("width", [50, 80])
def test_tables_of_a_comparison_cut_no_name(made, monkeypatch, width):
    monkeypatch.setattr("semmoe.terminal.tables.PIPE_WIDTH", width)
    monkeypatch.chdir(made)
    table = run("compare", "p", "n", "t", "--hidden-size", 64, "--expert-size", 32)
    lines = table.splitlines()
    assert max(map(len, lines)) <= width and "\u2026" not in table
    assert [line.split()[0] for line in lines if line.startswith(("p  ", "n  "))][:4] == ["p", "p", "n", "n"]
    assert re.search(r"^n +REM .*\[.*\] +(better|worse|same)$", table, re.M) and "kB)" in " ".join(table.split())


def test_what_is_asked_for_is_in_the_terminal_too(made):
    asked = run("report", made / "p", made / "t", "--what-if", "2,4", "--hidden-size", 64, "--tokenizer", "demo")
    for words in ("On other numbers of ranks", "least predictable", "per-expert"):
        assert words in asked
    assert "per-expert" not in run("report", made / "p", made / "t")


def test_a_certificate_is_told(made, tmp_path):
    place = ["place", made / "t", "--ranks", 4, "--method", "metis", "--no-refit", "-o", tmp_path / "c"]
    assert "of the most co-activation" in run(*place, "--certify")
    assert "of the most co-activation" in run("report", tmp_path / "c", made / "t")
    assert "of the most co-activation" not in run(*place, "--force")


def test_what_if_counts_ranks_where_some_numbers_fit_on_a_node(made, tmp_path):
    run(
        "place",
        made / "t",
        "--ranks",
        8,
        "--nodes",
        2,
        "--dispatch",
        "per-node",
        "--effort",
        "fast",
        "-o",
        tmp_path / "n",
    )
    assert "REM contiguous" in run("report", tmp_path / "n", made / "t", "--what-if", "2,8")
    assert "NODE contiguous" in run("report", tmp_path / "n", made / "t", "--what-if", "8")


def test_settings_that_a_refitted_plan_has_no_use_for_are_told(made):
    words = ["report", str(made / "q"), str(made / "t")]
    assert "stay those of --batch-tokens 512" in CliRunner().invoke(app, [*words, "--batch-tokens", "64"]).stderr
    assert "stay those" not in CliRunner().invoke(app, words).stderr


@pytest.mark.parametrize(("size", "text"), [(0, "0 bytes"), (999, "999 bytes"), (12288, "12.29 kB"), (4e9, "4.00 GB")])
def test_sizes_have_digits_to_show(size, text):
    assert size_text(size) == text
