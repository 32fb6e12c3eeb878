"""What CI and scripts lean on: exit codes of --fail-under, and plans that are not replaced."""

import json
import re

import pytest
from typer.testing import CliRunner

from semmoe.main import app
from semmoe.profiles.errors import InputError, listed
from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic


def semmoe(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trace t, and plans of it: near (metis) and far (contiguous)."""
    path = tmp_path_factory.mktemp("decisions")
    write_synthetic(path / "t", SyntheticWorld(num_requests=60, num_layers=2))
    for name, method in (("near", "metis"), ("far", "contiguous")):
        words = ["place", path / "t", "--ranks", 4, "--method", method, "--no-refit", "-o", path / name]
        assert semmoe(*words).exit_code == 0
    return path


@pytest.mark.parametrize("limit, code", [(99, 3), (-50, 0)])
def test_a_report_under_the_limit_ends_with_3_after_it_was_written(folder, tmp_path, limit, code):
    page = tmp_path / "r.md"
    done = semmoe("report", folder / "near", folder / "t", "--fail-under", limit, "-o", page, "--json")
    assert done.exit_code == code, done.output
    saved = json.loads(done.stdout)["verdict"]["saved"]
    assert page.is_file() and (f"saves {100 * saved:.1f}%" in done.stderr) == (code == 3)


def test_a_comparison_fails_where_a_plan_is_worse_than_the_first(folder):
    worse = semmoe("compare", folder / "near", folder / "far", folder / "t", "--fail-under", -1)
    assert worse.exit_code == 3 and "far saves -" in worse.stderr
    assert semmoe("compare", folder / "far", folder / "near", folder / "t", "--fail-under", 10).exit_code == 0


def test_the_limit_needs_a_plan(folder):
    alone = semmoe("report", folder / "t", "--fail-under", 5)
    assert isinstance(alone.exception, InputError) and "--fail-under" in str(alone.exception)


def test_a_plan_is_replaced_only_with_force(folder, tmp_path):
    words = ["place", folder / "t", "--ranks", 4, "--method", "contiguous", "-o", tmp_path / "p"]
    assert semmoe(*words, "--name", "synthetic").exit_code == 0
    before = (tmp_path / "p" / "plan.json").read_bytes()
    refused = semmoe(*words, "--seed", 1)
    assert isinstance(refused.exception, InputError) and "replace it with --force" in str(refused.exception)
    assert (tmp_path / "p" / "plan.json").read_bytes() == before
    assert semmoe(*words, "--seed", 1, "--force").exit_code == 0
    assert json.loads((tmp_path / "p" / "plan.json").read_text())["seed"] == 1


def test_a_model_without_a_name_gets_one(folder, tmp_path):
    facts = json.loads((folder / "t" / "trace.json").read_text())
    (tmp_path / "t").mkdir()
    for file in (folder / "t").iterdir():
        (tmp_path / "t" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "t" / "trace.json").write_text(json.dumps(facts | {"model": ""}))
    words = ["place", tmp_path / "t", "--ranks", 4, "--method", "contiguous", "-o", tmp_path / "p", "--name", "mine"]
    placed = semmoe(*words, "--json")
    assert placed.exit_code == 0 and json.loads(placed.stdout)["model"] == "mine", placed.output
    assert json.loads((tmp_path / "p" / "plan.json").read_text())["model"]["model"] == "mine"
    assert semmoe("report", tmp_path / "p", tmp_path / "t").exit_code == 0
    (tmp_path / "t" / "trace.json").write_text(json.dumps(facts | {"model": "unknown"}))  # as an import writes it
    nameless = ["place", tmp_path / "t", "--ranks", 4, "--method", "contiguous", "-o", tmp_path / "r"]
    shown = [nameless, ["show", tmp_path / "t"], ["show", tmp_path / "r"], ["report", tmp_path / "r", tmp_path / "t"]]
    shown.append(["report", tmp_path / "t"])
    for command in shown:
        told = semmoe(*command)
        assert told.exit_code == 0 and not re.search(r"(?m)model +unknown|^unknown: |None:", told.output), command
    other = semmoe("place", folder / "t", "--ranks", 4, "-o", tmp_path / "q", "--name", "mine")
    assert isinstance(other.exception, InputError) and "the trace is of synthetic" in str(other.exception)


def test_domains_are_held_out_by_how_they_begin(folder, tmp_path):
    words = ["place", folder / "t", "--ranks", 4, "--method", "contiguous", "--json"]
    one = semmoe(*words, "-o", tmp_path / "one", "--holdout-domain", "domain-0", "--holdout-domain", "domain-1")
    assert one.exit_code == 0, one.output
    every = semmoe(*words, "-o", tmp_path / "every", "--holdout-domain", "domain")
    assert isinstance(every.exception, InputError) and "cannot be split" in str(every.exception)


def test_a_list_says_how_many_more():
    assert listed("abcde", 3) == "a, b, c and 2 more" and listed("abc", 3) == "a, b, c"
