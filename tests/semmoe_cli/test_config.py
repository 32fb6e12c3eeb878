"""semmoe.toml: defaults of commands; the command line wins, and what cannot be used is told."""

import json
import sys

import pytest
from typer.testing import CliRunner

from semmoe.config import read_config
from semmoe.main import app
from semmoe.profiles.errors import InputError
from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic

PLACE = ["place", "t", "--method", "contiguous"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_synthetic("t", SyntheticWorld(num_requests=40, num_layers=2))
    return tmp_path


def semmoe(*words: str, monkeypatch=None):
    if monkeypatch is not None:
        monkeypatch.setattr(sys, "argv", ["semmoe", *words])
    return CliRunner().invoke(app, list(words))


def plan_of(folder, name):
    return json.loads((folder / name / "plan.json").read_text(encoding="utf-8"))


def test_a_command_takes_its_defaults_from_the_working_directory(folder, monkeypatch):
    (folder / "semmoe.toml").write_text('ranks = 4\ndispatch = "per-expert"\nengine = "sglang"\n')
    placed = semmoe(*PLACE, "-o", "p", monkeypatch=monkeypatch)
    assert placed.exit_code == 0, placed.output
    assert "from semmoe.toml: --dispatch per-expert --engine sglang --ranks 4\n" in placed.stderr
    plan = plan_of(folder, "p")
    assert plan["made_by"] == "semmoe place --method contiguous --dispatch per-expert --engine sglang --ranks 4"
    assert semmoe(*PLACE, "-o", "q", "--ranks", "8", "--dispatch", "per-rank").exit_code == 0
    assert plan_of(folder, "q")["topology"]["ranks"] == 8
    written = semmoe("export", "p", "-o", "map.json")
    assert written.exit_code == 0 and "--to sglang" in written.stderr and (folder / "map.json").is_file()
    assert semmoe("report", "p", "t").exit_code == 0  # a plan has its own ranks
    assert "from semmoe.toml" not in semmoe("show", "p").stderr


def test_a_file_is_named_before_or_after_the_command(folder, monkeypatch):
    (folder / "semmoe.toml").write_text("ranks = 8\n")
    (folder / "two.toml").write_text("ranks = 2\n")
    for words in (["--config", "two.toml", *PLACE, "-o", "p"], [*PLACE, "-o", "q", "--config=two.toml"]):
        assert semmoe(*words, monkeypatch=monkeypatch).exit_code == 0
        assert plan_of(folder, words[words.index("-o") + 1])["made_by"].endswith("contiguous --ranks 2")


def test_the_model_is_no_file_of_an_engine(folder):
    (folder / "semmoe.toml").write_text('model = "demo"\n')
    traced = semmoe("trace", "--from", "vllm", "-o", "x")
    assert traced.exit_code == 2 and "files with --from" in traced.output


@pytest.mark.parametrize(
    "text, line",
    [
        ('dispath = "x"', "c.toml: unknown key dispath; it can hold model, ranks, engine, hardware, dispatch"),
        ('ranks = "8"', "c.toml: ranks = '8': expected a number"),
        ("ranks = true", "c.toml: ranks = True: expected a number"),
        ("engine = 8", "c.toml: engine = 8: expected a text"),
        ("ranks", "c.toml is not TOML: "),
        ('ranks = 4\ndispatch = "x"', "c.toml: dispatch = x: 'x' is not one of"),
        ("ranks = -3", "c.toml: ranks = -3: "),
        (None, "cannot read c.toml: No such file"),
    ],
)
def test_what_cannot_be_used_names_the_file_and_the_key(folder, text, line):
    if text is not None:
        (folder / "c.toml").write_text(text)
    result = semmoe(*PLACE, "-o", "p", "--config", "c.toml")
    assert isinstance(result.exception, InputError) and str(result.exception).startswith(line), result.output
    assert not (folder / "p").exists()


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "c.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="is not TOML"):
        read_config(tmp_path / "c.toml")
