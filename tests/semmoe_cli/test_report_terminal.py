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
from semmoe.terminal.tables import print_report, times_cells


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
    print_report(Report.from_json(report), as_json=False)
    assert Report.from_json(report).to_json() == report
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width and "on one node" in " ".join(lines[:3])
    start = next(i for i, line in enumerate(lines) if line.startswith("contiguous"))
    assert ("[" in lines[start]) == intervals and "\x1b" not in "".join(lines)
    assert any("dp-roundrobin" in line for line in lines), "a name is cut"
    values = [re.sub(r"\[.*?\]", lambda m: " " * len(m[0]), line) for line in lines[start - 1 : start + 2]]
    points = [{i for i, c in enumerate(line) if c == "."} for line in values]
    assert points[0] == points[1] == points[2], "digits are not aligned"


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
