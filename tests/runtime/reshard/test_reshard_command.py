"""`semmoe reshard` as users run it, and that a real model says the same before and after."""

import json
import typing
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from random_plans import random_plan
from tiny_models import tiny_model
from typer.testing import CliRunner

from semmoe.commands.reshard import reshard
from semmoe.options import Layout, Verify
from semmoe.profiles.checkpoint import checkpoint_identity
from semmoe.profiles.demo.paths import demo_model_path
from semmoe.profiles.errors import InputError
from semmoe.profiles.numbering import LAYOUTS
from semmoe.profiles.safetensors_file import read_shard
from semmoe.runtime.reshard.logits import compare_logits
from semmoe.runtime.reshard.records import ReshardOptions
from semmoe.runtime.reshard.reshard import VERIFY, reshard_checkpoint
from semmoe.runtime.reshard.undo import undo_reshard
from semmoe.solvers.plan import Plan

pytest.importorskip("transformers")
app = typer.Typer()
app.command()(reshard)
SHARED_MODELS = Path(__file__).parents[4] / "shared" / "models"


def run(*words: object) -> typing.Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny checkpoint, `model`, and a plan for it, `plan`."""
    path = tmp_path_factory.mktemp("tiny")
    tiny_model("qwen3_moe").save_pretrained(path / "model")
    random_plan(path / "model").save(path / "plan")
    return path


def test_choices_are_those_of_the_function() -> None:
    assert tuple(Layout) == LAYOUTS and tuple(Verify) == VERIFY


def test_a_plan_says_that_it_was_traced_on_another_checkpoint(tiny: Path, tmp_path: Path) -> None:
    plan, own = Plan.load(tiny / "plan"), checkpoint_identity(tiny / "model")
    assert own is not None
    for checkpoint, same in ((own, True), ({**own, "router_sha256": 64 * "0"}, False), (None, None)):
        replace(plan, model=replace(plan.model, checkpoint=checkpoint)).save(tmp_path / "plan")
        result = run(tiny / "model", tmp_path / "plan", "-o", tmp_path / "out", "--force", "--json")
        assert result.exit_code == 0, result.output
        facts = json.loads(result.stdout)
        assert facts["same_checkpoint"] is same
        said = [line for line in result.stderr.splitlines() if "was traced on another checkpoint" in line]
        assert len(said) == (same is False) == len(facts["notes"])


def test_reshard_and_undo(tiny: Path, tmp_path: Path) -> None:
    result = run(tiny / "model", tiny / "plan", "-o", tmp_path / "out", "--verify", "logits", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["layout"] == "permuted" and facts["verified"] == "logits" and facts["logits_difference"] < 1e-4
    assert facts["num_layers"] == 3 and facts["experts_moved"] > 0
    assert result.stderr.splitlines() == [  # and no bars of what loads the models
        f"semmoe: wrote {tmp_path / 'out'} (3 layers, 1 files, 0.00 GB; bytes and logits compared)"
    ]
    back = run("--undo", tmp_path / "out", "-o", tmp_path / "back")
    assert back.exit_code == 0, back.output
    name = "model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (tiny / "model" / name).read_bytes()


def test_ranks(tiny: Path, tmp_path: Path) -> None:
    result = run(tiny / "model", tiny / "plan", "-o", tmp_path / "out", "--layout", "ranks", "--verify", "none")
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir()) == ["rank-000", "rank-001", "shared"]
    assert "next: semmoe run " in result.stderr and "vllm" not in result.stderr  # no engine reads this layout


def test_usage(tiny: Path, tmp_path: Path) -> None:
    assert run(tiny / "model", "-o", tmp_path / "out").exit_code == 2
    assert run("--undo", tiny / "model", tiny / "plan", "-o", tmp_path / "out").exit_code == 2
    assert run("--undo", tiny / "model", "-o", tmp_path / "out", "--link").exit_code == 2


@pytest.mark.parametrize(
    ("family", "left_behind"),
    [
        ("qwen3_moe", "model.layers.1.mlp.gate.weight"),
        ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias"),
        ("deepseek_v4", "layers.0.ffn.gate.tid2eid"),
    ],
)
def test_logits_show_a_tensor_that_was_left_behind(family: str, left_behind: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path / "model")
    reshard_checkpoint(tmp_path / "model", random_plan(tmp_path / "model"), tmp_path / "out")
    compare_logits(tmp_path / "model", tmp_path / "out")
    source, out = (read_shard(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    tensor, same = (next(t for t in shard.tensors if t.name.endswith(left_behind)) for shard in (source, out))
    data = bytearray(out.path.read_bytes())
    place = out.header_bytes + same.begin
    start = source.header_bytes + tensor.begin
    data[place : place + same.num_bytes] = source.path.read_bytes()[start : start + tensor.num_bytes]
    out.path.write_bytes(data)
    with pytest.raises(InputError, match="the relabelled model is another model"):
        compare_logits(tmp_path / "model", tmp_path / "out")


@pytest.mark.skipif(not SHARED_MODELS.is_dir(), reason="needs the shared models")
@pytest.mark.parametrize("name", ["moe-4m", "moe-16m"])
def test_a_trained_model_writes_the_same_text(name: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, out = SHARED_MODELS / name, tmp_path / "out"
    result = reshard_checkpoint(source, random_plan(source, ranks=4), out, ReshardOptions(verify="logits"))
    assert result.logits_difference is not None and result.logits_difference < 1e-4
    texts = []
    for path in (source, out):
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        ids = [tokenizer(text, return_tensors="pt").input_ids for text in ("The history of", "def main(", "x = 3")]
        texts.append([tokenizer.decode(model.generate(i, max_new_tokens=40, do_sample=False)[0]) for i in ids])
    assert texts[0] == texts[1]
    assert all(len(text) > 20 for text in texts[0])


def test_demo_is_the_embedded_model_beside_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "notes.txt").write_text("no model")
    random_plan(demo_model_path(), ranks=2).save(tmp_path / "p")
    found = run("demo", "p", "-o", "placed")
    assert found.exit_code == 0, found.output
    assert (tmp_path / "placed" / "config.json").exists()


def test_the_bytes_done_end_at_their_total(tiny: Path, tmp_path: Path) -> None:
    """Headers are part of the files, not of what is copied."""
    told = []
    reshard_checkpoint(
        tiny / "model", Plan.load(tiny / "plan"), tmp_path / "out", progress=lambda *words: told.append(words)
    )
    undo_reshard(tmp_path / "out", tmp_path / "back", progress=lambda *words: told.append(words))
    assert [what for what, done, total in told if done == total] == ["writing", "checking", "writing"]
