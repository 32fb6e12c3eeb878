"""What each rank reads of a checkpoint: its own experts by slot, from bytes, without headers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cases.rank_cases import with_replicas
from random_plans import random_plan
from safetensors.torch import load_file
from tiny_models import tiny_model

from semmoe.profiles.errors import InputError
from semmoe.runtime.reshard import source
from semmoe.runtime.reshard.records import ReshardOptions
from semmoe.runtime.reshard.reshard import reshard_checkpoint
from semmoe.runtime.transformers.rank_parts import rank_checkpoints, runs
from semmoe.runtime.transformers.rank_weights import held_experts, rank_tensors
from semmoe.solvers.plan import Plan


def checkpoint_of(folder: Path, family: str, replicas: int = 1) -> Plan:
    tiny_model(family).save_pretrained(folder)
    return with_replicas(random_plan(folder, ranks=2, grouped=False, seed=1), replicas)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "dbrx"])
def test_a_rank_reads_its_experts_by_slot(tmp_path: Path, family: str) -> None:
    plan = checkpoint_of(tmp_path, family)
    whole = load_file(tmp_path / "model.safetensors")
    for rank, checkpoint in enumerate(rank_checkpoints(tmp_path, plan)):
        np.testing.assert_array_equal(
            held_experts(checkpoint, plan.model.model_layers), plan.placement.experts_LRS[:, rank]
        )
        with rank_tensors(tmp_path, checkpoint) as tensors:
            assert {t.name for t in checkpoint.tensors} == set(tensors)
            for stored in checkpoint.tensors:
                read = tensors[stored.name]
                assert list(read[...].shape) == read.get_shape()
                if not stored.experts:
                    assert torch.equal(read[...], whole[stored.name])
                elif len(stored.experts) > 1:
                    rows = whole[stored.name].unflatten(0, (plan.placement.num_experts, -1))
                    assert torch.equal(read[...], rows[list(stored.experts)].flatten(0, 1))
                else:
                    name = stored.name.replace(f"experts.{stored.slot}.", f"experts.{stored.experts[0]}.")
                    assert torch.equal(read[...], whole[name])


@pytest.mark.parametrize("layout", ["plain", "permuted", "ranks"])
def test_every_header_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    plan = checkpoint_of(tmp_path / "m", "qwen3_moe", replicas=0)
    if layout != "plain":
        reshard_checkpoint(tmp_path / "m", plan, tmp_path / "out", ReshardOptions(layout=layout, verify="none"))
    folder = tmp_path / ("m" if layout == "plain" else "out")
    read_shard, parsed = source.read_shard, []
    monkeypatch.setattr(source, "read_shard", lambda path: parsed.append(path) or read_shard(path))
    rank_checkpoints(folder, plan)
    assert sorted(parsed) == sorted(folder.rglob("*.safetensors"))


def test_files_that_changed_since_are_refused(tmp_path: Path) -> None:
    plan = checkpoint_of(tmp_path, "qwen3_moe")
    checkpoint, file = rank_checkpoints(tmp_path, plan)[0], tmp_path / "model.safetensors"
    with rank_tensors(tmp_path, checkpoint) as tensors:
        file.write_bytes(file.read_bytes()[:-10_000])
        with pytest.raises(InputError, match="model.safetensors ends within .*: it has been cut short"):
            for tensor in tensors.values():
                tensor[...]
    with pytest.raises(InputError, match="has .* bytes, .* when its header was read"):
        with rank_tensors(tmp_path, checkpoint):
            pass
    file.unlink()
    with pytest.raises(InputError, match="cannot be read: No such file"):
        with rank_tensors(tmp_path, checkpoint):
            pass


def test_runs_of_numbers() -> None:
    assert list(runs([4, 5, 6, 1])) == [(4, 7), (1, 2)]
