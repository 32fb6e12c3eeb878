"""`semmoe push` and `semmoe pull`, and hf:// URLs in other commands, against a stand-in on this
machine."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from stand_ins.stand_in_hub import TOKEN, stand_in_hub
from typer.testing import CliRunner

from semmoe.main import app
from semmoe.profiles.errors import InputError
from semmoe.profiles.hub.publish import repository
from semmoe.profiles.hub.urls import shown, why
from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trace t and a plan p of it."""
    path = tmp_path_factory.mktemp("hub")
    write_synthetic(path / "t", SyntheticWorld(num_requests=40, num_layers=2))
    words = ["place", str(path / "t"), "--ranks", "4", "--method", "contiguous", "-o", str(path / "p")]
    assert CliRunner().invoke(app, words).exit_code == 0
    return path


@pytest.fixture
def hub(folder):
    """A stand-in hub, and commands that talk to it from the folder."""
    with stand_in_hub() as (served, address):
        environment = os.environ | {
            "HF_ENDPOINT": address,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(folder / "cache"),
            "HF_HUB_OFFLINE": "0",
        }

        def semmoe(*words: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "semmoe", *words]
            ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
            assert TOKEN not in ended.stdout + ended.stderr
            return ended

        yield served, semmoe


def test_a_trace_is_pushed_placed_and_pulled(hub, folder):
    served, semmoe = hub
    pushed = semmoe("push", "t", "me/routing", "--private", "--json")
    assert pushed.returncode == 0, pushed.stderr
    assert json.loads(pushed.stdout)["url"] == "hf://datasets/me/routing" and served.private == {"me/routing": True}
    files = served.repos["me/routing"]
    assert files["part-00000.parquet"] == (folder / "t" / "part-00000.parquet").read_bytes()
    card = files["README.md"].decode()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["configs"][0]["data_files"] == "*.parquet" and "semmoe" in metadata["tags"]
    assert "| requests | 40 |" in card and "semmoe place hf://datasets/me/routing" in card
    placed = semmoe("place", "hf://datasets/me/routing", "--ranks", "4", "--method", "load", "-o", "q")
    assert placed.returncode == 0, placed.stderr
    assert any(authorization == f"Bearer {TOKEN}" for _, _, authorization in served.calls)
    files["part-00000.parquet"] = files["part-00000.parquet"][:-9] + b"x" * 9
    damaged = semmoe("pull", "me/routing", "u")
    assert damaged.returncode == 1 and "was changed after it was written" in damaged.stderr
    assert "hf://datasets/me/routing" in damaged.stderr and not (folder / "u").exists()


def test_a_plan_is_pushed_once_reported_and_pulled(hub, folder):
    served, semmoe = hub
    assert semmoe("push", "p", "me/plan").returncode == 0
    again = semmoe("push", "p", "me/plan")
    assert again.returncode == 1 and "holds a trace or a plan already" in again.stderr and len(served.messages) == 1
    served.repos["me/plan"] |= {"README.md": b"mine", "part-00007.parquet": b"of a trace", "notes.txt": b"mine"}
    assert semmoe("push", "p", "hf://datasets/me/plan", "--force").returncode == 0
    assert set(served.repos["me/plan"]) == {"plan.json", "tables.safetensors", "README.md", "notes.txt"}
    assert served.repos["me/plan"]["README.md"] == b"mine"
    reported = semmoe("report", "hf://datasets/me/plan", "t", "--json")
    assert reported.returncode == 0 and json.loads(reported.stdout)["plan"] == "hf://datasets/me/plan"
    pulled = semmoe("pull", "me/plan", "r")
    assert pulled.returncode == 0, pulled.stderr
    for name in ("plan.json", "tables.safetensors"):
        assert (folder / "r" / name).read_bytes() == (folder / "p" / name).read_bytes()
    assert semmoe("pull", "me/plan", "r").returncode == 1
    assert semmoe("pull", "me/plan", "r", "--force").returncode == 0


def test_what_the_hub_refuses_is_one_line_without_the_token(hub, folder):
    served, semmoe = hub
    missing = semmoe("show", "hf://datasets/me/nothing")
    assert missing.returncode == 1 and missing.stderr.startswith("semmoe: hf://datasets/me/nothing is not a trace")
    served.refuse = 403  # the stand-in repeats the token in its answer
    for words in (["show", "hf://datasets/me/routing"], ["push", "p", "me/plan"]):
        refused = semmoe(*words)
        assert refused.returncode == 1 and refused.stderr.count("\n") == 1, refused.stderr
        assert "hf://datasets/me/" in refused.stderr and "403 Forbidden" in refused.stderr
    assert not served.repos


def test_pull_reads_any_url_and_replaces_nothing_else(folder, tmp_path):
    import fsspec

    fsspec.filesystem("memory").put(str(folder / "p"), "/plans/p", recursive=True)
    pulled = CliRunner().invoke(app, ["pull", "memory://plans/p", str(tmp_path / "p"), "--json"])
    assert pulled.exit_code == 0 and json.loads(pulled.stdout)["kind"] == "plan"
    shown_plan = CliRunner().invoke(app, ["show", "memory://plans/p"])
    assert shown_plan.exit_code == 0 and "contiguous" in shown_plan.output
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    refused = CliRunner().invoke(app, ["pull", "memory://plans/p", str(tmp_path / "mine"), "--force"])
    assert isinstance(refused.exception, InputError) and (tmp_path / "mine" / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["plan", "a/b/c", "a b/c", "hf://datasets/", "../x"])
def test_a_name_that_is_no_data_set_is_refused(name):
    with pytest.raises(InputError, match="expected OWNER/NAME"):
        repository(name)


def test_credentials_are_not_repeated():
    assert shown("https://me:secret@host/path") == "https://host/path"
    assert shown("a@b") == "a@b" and shown("hf://datasets/me/x@main/y") == "hf://datasets/me/x@main/y"
    said = why(OSError(f"Authorization: Bearer {TOKEN} for https://me:secret@host/p\nmore"))
    assert TOKEN not in said and "secret" not in said and "more" not in said
