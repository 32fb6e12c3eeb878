"""A checkpoint is told from others by its routers, however it is stored."""

import json
from pathlib import Path

import numpy as np
import pytest

from semmoe.profiles.checkpoint import checkpoint_identity, compare_checkpoint
from semmoe.profiles.errors import InputError

CONFIG = {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "vocab_size": 16,
}


def write(folder: Path, *, files: int = 1, router: float = 1.0, up: float = 1.0, **config: object) -> Path:
    """A checkpoint of two layers whose tensors lie in so many files."""
    from safetensors.numpy import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    tensors = {}
    for layer in range(2):
        tensors[f"model.layers.{layer}.mlp.gate.weight"] = np.full((4, 8), router + layer, np.float32)
        tensors[f"model.layers.{layer}.mlp.experts.0.up_proj.weight"] = np.full((2, 8), up, np.float32)
    names = {key: f"model-{place % files}.safetensors" for place, key in enumerate(tensors)}
    for file in set(names.values()):
        save_file({key: tensors[key] for key in tensors if names[key] == file}, folder / file)
    if files > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


def test_the_same_routers_are_the_same_checkpoint(tmp_path: Path) -> None:
    traced = checkpoint_identity(write(tmp_path / "a"))
    assert traced is not None and traced["config"] == {k: v for k, v in CONFIG.items() if "expert" not in k}
    assert compare_checkpoint(traced, write(tmp_path / "b", files=3, up=2.0), "b") == (True, "")
    same, line = compare_checkpoint(traced, write(tmp_path / "c", router=2.0), "c")
    assert same is False and line.startswith("the plan was traced on another checkpoint: router weights of c ")
    assert compare_checkpoint(None, tmp_path / "c", "c") == (None, "")
    (tmp_path / "empty").mkdir()
    assert compare_checkpoint(traced, tmp_path / "empty", "e") == (None, "")
    with pytest.raises(
        InputError, match="d has hidden_size 16, the plan was traced on a checkpoint with hidden_size 8"
    ):
        compare_checkpoint(traced, write(tmp_path / "d", hidden_size=16), "d")


def test_the_index_stands_for_routers_that_are_not_here(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, files=2)
        for file in (tmp_path / name).glob("*.safetensors"):
            file.unlink()
        (tmp_path / name / "model.safetensors.index.json").rename(tmp_path / name / "pytorch_model.bin.index.json")
    traced = checkpoint_identity(tmp_path / "a")
    assert traced is not None and traced["router_sha256"] is None and traced["index_sha256"]
    assert compare_checkpoint(traced, tmp_path / "b", "b") == (True, "")
    (tmp_path / "b" / "pytorch_model.bin.index.json").write_text("{}")
    assert compare_checkpoint(traced, tmp_path / "b", "b")[0] is False


def test_the_index_names_files_of_the_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "a", files=2)
    index = tmp_path / "a" / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {key: f"../{file}" for key, file in names.items()}}))
    with pytest.raises(InputError, match="expected a single name"):
        checkpoint_identity(tmp_path / "a")
