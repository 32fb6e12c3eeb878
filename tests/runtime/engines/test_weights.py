"""Weights relabelled while an engine reads them are those of the relabelled checkpoint, tensor by
tensor."""

import json
from pathlib import Path

import pytest
from random_plans import random_plan
from tiny_models import tiny_model

from semmoe.profiles.errors import InputError
from semmoe.runtime.engines.plan_files import read_plan_facts
from semmoe.runtime.engines.weights import WeightRelabeller
from semmoe.runtime.reshard.reshard import reshard_checkpoint

torch = pytest.importorskip("torch")
# Of --load-format semmoe, tests/engines; ernie4_5_moe has experts along axis 1.
SERVED = (
    "qwen2_moe",
    "qwen3_moe",
    "mixtral",
    "olmoe",
    "granitemoe",
    "gpt_oss",
    "glm4_moe",
    "deepseek_v2",
    "deepseek_v3",
)


def tensors(path: Path) -> dict:
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("family", [*SERVED, "ernie4_5_moe"])
def test_a_stream_equals_the_relabelled_checkpoint(family: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny_model(family).save_pretrained(source)
    plan = random_plan(source)
    plan.save(tmp_path / "p")
    reshard_checkpoint(source, plan, tmp_path / "out")
    config = json.loads((source / "config.json").read_text())
    relabeller = WeightRelabeller(read_plan_facts(tmp_path / "p"), config, family)
    found = dict(relabeller.relabel(name, tensor) for name, tensor in tensors(source).items())
    expected = tensors(tmp_path / "out")
    assert found.keys() == expected.keys() and relabeller.moved
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_what_cannot_be_placed_is_refused_by_name(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    random_plan(tmp_path / "source").save(tmp_path / "p")
    plan = read_plan_facts(tmp_path / "p")
    with pytest.raises(InputError, match="is a mixtral model, the plan is for qwen3_moe"):
        WeightRelabeller(plan, config | {"model_type": "mixtral"}, "m")
    with pytest.raises(InputError, match="num_experts 16, the plan is for num_experts 8"):
        WeightRelabeller(plan, config | {"num_experts": 16}, "m")
    relabeller = WeightRelabeller(plan, config, "m")
    with pytest.raises(InputError, match="does not know how to move it"):
        relabeller.relabel("model.layers.1.mlp.experts.gate_up_proj_zeros", torch.zeros(8, 4, 4))


def test_groups_that_a_plan_splits_are_refused(tmp_path: Path) -> None:
    tiny_model("deepseek_v3").save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    random_plan(tmp_path / "source", grouped=False).save(tmp_path / "p")
    with pytest.raises(InputError, match="split"):
        WeightRelabeller(read_plan_facts(tmp_path / "p"), config, "m")
