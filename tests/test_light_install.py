"""`pip install semmoe` without an extra: everything but running a model works without PyTorch, and
what needs more says so in one line with the command to type."""

import json
from pathlib import Path

import pytest
from checkpoint_factory import CONFIG, write_checkpoint
from checkpoint_specs import assert_same_files, per_expert_model
from engine_samples import config, sample_files
from environments import outside

from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic

MODELS = "pip install 'semmoe[models]'"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A trace, a checkpoint that it could be of, and files of every engine."""
    root = tmp_path_factory.mktemp("light")
    experts, layers = CONFIG["num_experts"], CONFIG["num_hidden_layers"]
    write_synthetic(
        root / "t",
        SyntheticWorld(num_layers=layers, num_experts=experts, top_k=2, num_requests=60, tokens_per_request=40),
    )
    write_checkpoint(root / "checkpoint", per_expert_model(), shards=2)
    (root / "config.json").write_text(json.dumps(config()))
    (root / "engines").mkdir()
    sample_files(root / "engines")
    return root


@pytest.fixture(scope="module")
def semmoe(light, folder):
    """A command in the environment without PyTorch: what it prints."""

    def run(*words: str) -> str:
        done = outside(light, "semmoe", *words, cwd=folder)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="module")
def plans(semmoe) -> tuple[str, str]:
    place = ("place", "t", "--ranks", "2", "--no-refit")
    semmoe(*place, "--certify", "-o", "p")
    semmoe(*place, "--method", "metis", "--processes", "2", "-o", "q")
    return "p", "q"


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("sglang", "s.jsonl"),
        ("vllm", "v.jsonl"),
        ("trtllm", "stats"),
        ("megatron", "router_trace_rank0.jsonl"),
        ("eplb", "load.npy"),
        ("eplb", "load.json"),
    ],
)
def test_traces_of_engines_are_imported(semmoe, tmp_path, kind, file):
    out = str(tmp_path / "t")
    semmoe("trace", "--from", kind, f"engines/{file}", "--model", "config.json", "-o", out)
    assert json.loads(semmoe("show", out, "--json"))["layers"] == 4


def test_plans_are_shown_reported_compared_and_drawn(semmoe, plans, folder):
    for path in ("t", *plans):
        semmoe("show", path)
    for name in ("report.html", "report.png"):
        semmoe("report", plans[0], "t", "--what-if", "4", "-o", name)
    semmoe("report", "t", "-o", "health.html")
    semmoe("compare", *plans, "t", "--expert-bytes", "9", "-o", "compare.html")
    for name in ("report.html", "report.png", "health.html", "compare.html"):
        assert (folder / name).stat().st_size > 1000


@pytest.mark.parametrize(
    ("kind", "file", "more"),
    [
        ("sglang", "map.json", ("--model", "checkpoint")),
        ("trtllm", "map.yaml", ()),
        ("vllm", "map.jsonl", ("--format", "pr41141")),
        ("vllm-ascend", "ascend.json", ()),
        ("eplb", "map.safetensors", ()),
        ("eplb", "map.npz", ()),
    ],
)
def test_maps_are_written_and_read(semmoe, plans, tmp_path, kind, file, more):
    semmoe("export", plans[0], "--to", kind, *more, "-o", str(tmp_path / file))
    semmoe("place", "t", "--ranks", "2", "--import", kind, str(tmp_path / file), "-o", str(tmp_path / "p"))


@pytest.mark.parametrize("layout", ["permuted", "ranks"])
def test_a_checkpoint_is_resharded_and_given_back_byte_by_byte(semmoe, plans, folder, tmp_path, layout):
    out, back = tmp_path / "out", tmp_path / "back"
    done = json.loads(semmoe("reshard", "checkpoint", plans[0], "--layout", layout, "-o", str(out), "--json"))
    assert (done["layout"], done["verified"]) == (layout, "bytes")
    semmoe("reshard", "--undo", str(out), "-o", str(back))
    assert_same_files(folder / "checkpoint", back)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["trace", "demo", "--data", "demo", "-o", "x"], "running a model needs torch and transformers"),
        (["trace", "demo", "--dataset", "a/b", "-o", "x"], "running a model needs torch and transformers"),
        (["trace", "demo", "--hash-layers", "-o", "x"], "running a model needs torch and transformers"),
        (["run", "demo", "--plan", "p", "--prompts", "demo"], "running a model needs torch and transformers"),
        (["run", "--replay", "t", "--plan", "p", "--hidden-size", "8"], "--replay needs torch and transformers"),
        (["demo", "-o", "x"], "the demo, which runs a model, needs torch and transformers"),
        (
            ["reshard", "checkpoint", "p", "--verify", "logits", "-o", "x"],
            "--verify logits runs both models, which needs torch and transformers",
        ),
        (
            ["trace", "--from", "sglang-recorder", "engines/token.pt", "-o", "x"],
            "engines/token.pt: reading a .pt file needs torch",
        ),
        (["trace", "--from", "eplb", "engines/load.pt", "-o", "x"], "engines/load.pt: reading a .pt file needs torch"),
        (["export", "p", "--to", "eplb", "-o", "x.pt"], "writing a .pt file needs torch"),
        (["report", "p", "t", "--tokenizer", "demo"], "--tokenizer needs tokenizers"),
        (
            ["trace", "--from", "sglang", "engines/s.jsonl", "--model", "a/b", "-o", "x"],
            "a/b is no file here, and asking the hub for it needs transformers",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_needs_an_extra_says_so_in_one_line(light, plans, folder, words, reason):
    done = outside(light, "semmoe", *words, cwd=folder)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"semmoe: {reason}: {MODELS}\n")
    assert not (folder / "x").exists() and not (folder / "x.pt").exists()


def test_a_router_needs_its_own_extra(light, plans, folder):
    done = outside(light, "semmoe", "route", plans[0], "--upstream", "http://127.0.0.1:9", cwd=folder)
    reason = "semmoe route needs starlette and uvicorn and httptools and uvloop and orjson: pip install 'semmoe[route]'"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"semmoe: {reason}\n")
