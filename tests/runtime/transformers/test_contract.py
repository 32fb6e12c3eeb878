"""What semmoe takes for granted of Transformers beyond its documented interface, name by name.

runtime/transformers is the only room of the runtime that uses these names, profiles/capture reads a
few more. A release that moves one fails here first, with the name in the message.

Releases that were tried: OLDEST and NEWEST, with this file, the families of tests/runtime/serving
and whole runs (test_run.py). pyproject.toml allows what lies between, and a test holds it to that.
Below OLDEST, 5.17.0 passes all of these too, but lacks families that tests/profiles trace. This
file alone still passes at 5.5.4, 5.10.4 and 5.14.1, where families' own forwards fail: DeepSeek-V2
with groups of experts in 5.5 and 5.10, DBRX in 5.14.

To try another release, install it beside the environment and put it first:

    pip install --target /some/folder --no-deps transformers==X
    PYTHONPATH=/some/folder pytest tests/runtime/transformers tests/runtime/serving
"""

import importlib
import inspect
import re
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import BROKEN, FAMILIES, tiny_input_ids, tiny_model
from torch import nn

from semmoe.profiles.capture.layers import find_moe_layers
from semmoe.runtime.transformers.attention_heads import GROUPED, LATENT
from semmoe.runtime.transformers.decoder_layers import PARTS, decoder_layers
from semmoe.runtime.transformers.forward import cache_name
from semmoe.runtime.transformers.kv_cache import is_joinable
from semmoe.runtime.transformers.placed_model import built_with

OLDEST, NEWEST = "5.19.0", "5.24.0"
BELOW = "5.25"  # the first release after NEWEST that may change what this file names


def test_pyproject_allows_the_releases_that_were_tried() -> None:
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    found = {line for requirements in lists for line in requirements if re.match(r"transformers\b", line)}
    assert found == {f"transformers>={OLDEST.removesuffix('.0')},<{BELOW}"}


def family_class(family: str, name: str) -> Any:
    if find_spec(f"transformers.models.{family}") is None:
        pytest.skip(f"Transformers {transformers.__version__} has no {family}")
    return getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


# ---- experts modules (ep.py, families.py; profiles/capture/layers.py)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral", "olmoe", "glm4_moe"])
def test_experts_take_rows_choices_and_weights(family: str) -> None:
    layer = find_moe_layers(tiny_model(family))[0]
    experts: Any = layer.module
    assert parameters(type(experts).forward)[:4] == ["self", "hidden_states", "top_k_index", "top_k_weights"] or (
        family == "gpt_oss" and "rout" in parameters(type(experts).forward)[2]
    )
    assert experts.num_experts == layer.num_experts
    assert all(len(tensor) == layer.num_experts for tensor in experts.parameters())
    width = experts.down_proj.shape[2 if getattr(experts, "is_transposed", False) else 1]
    assert width == experts.config.hidden_size
    # One choice per row, ids below num_experts, the sum over choices: what dispatch makes of it.
    rows_TD = torch.randn(5, width)
    index_TK = torch.rand(5, layer.num_experts).argsort(1)[:, :2]
    weight_TK = torch.rand(5, 2)
    with torch.inference_mode():
        together = experts(rows_TD, index_TK, weight_TK)
        apart = sum(experts(rows_TD, index_TK[:, k : k + 1], weight_TK[:, k : k + 1]) for k in range(2))
    torch.testing.assert_close(together.reshape(rows_TD.shape), apart.reshape(rows_TD.shape), atol=1e-4, rtol=1e-4)


def test_the_implementation_of_experts_is_chosen_by_the_configuration() -> None:
    experts: Any = find_moe_layers(tiny_model("qwen3_moe"))[0].module
    before = experts.config._experts_implementation
    rows_TD, index_TK, weight_TK = torch.randn(6, 32), torch.tensor([[0, 3]] * 6), torch.rand(6, 2)
    outputs = []
    with torch.inference_mode():
        for implementation in ("eager", "grouped_mm"):
            experts.config._experts_implementation = implementation
            assert experts.config._experts_implementation == implementation
            outputs.append(experts(rows_TD, index_TK, weight_TK))
    assert before in ("eager", "grouped_mm", "batched_mm")
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


def test_experts_of_a_replay_are_built_from_three_sizes() -> None:
    config_class = family_class("qwen3_moe", "Qwen3MoeConfig")
    experts = family_class("qwen3_moe", "Qwen3MoeExperts")(
        config_class(hidden_size=8, moe_intermediate_size=4, num_experts=3)
    )
    assert {len(tensor) for tensor in experts.parameters()} == {3}


def test_llama4_scales_what_goes_into_an_expert() -> None:
    block, experts = family_class("llama4", "Llama4TextMoe"), family_class("llama4", "Llama4TextExperts")
    router = family_class("llama4", "Llama4Router")
    source = inspect.getsource(block.__init__) + inspect.getsource(experts.__init__) + inspect.getsource(router)
    for name in (
        "top_k",
        "hidden_dim",
        "router",
        "shared_expert",
        "num_experts",
        "gate_up_proj",
        "down_proj",
        "act_fn",
    ):
        assert re.search(rf"self\.{name}\b", source), name
    assert "* router_scores" in inspect.getsource(block.forward)  # scores meet the rows before the experts do
    assert "router_scores, router_logits" in inspect.getsource(router.forward)


def test_longcat_has_identity_experts_behind_the_others() -> None:
    source = inspect.getsource(family_class("longcat_flash", "LongcatFlashExperts"))
    for name in ("num_routed_experts", "zero_expert_num", "total_experts", "gate_up_proj", "down_proj", "act_fn"):
        assert name in source, name


def test_dbrx_keeps_experts_as_rows_of_matrices() -> None:
    assert "moe_num_experts" in inspect.getsource(family_class("dbrx", "DbrxExpertGLU"))
    assert parameters(family_class("dbrx", "DbrxExperts").forward)[1:4] == [
        *("hidden_states", "top_k_index", "top_k_weights")
    ]


def test_zaya_rewrites_a_skipped_layer_to_weight_0() -> None:
    assert parameters(family_class("zaya", "ZayaExperts").forward)[1:4] == [
        *("hidden_states", "top_k_index", "top_k_weights")
    ]


def test_jetmoe_returns_the_order_of_its_choices() -> None:
    assert "index_sorted_experts, batch_index, batch_gates, expert_size, logits" in inspect.getsource(
        family_class("jetmoe", "JetMoeTopKGating").forward
    )


# ---- loading (placed_model.py, rank_weights.py; profiles/capture/loading.py)


class Unread:
    """A tensor that says its shape and type and is read by indexing: all that the loader may ask
    of one."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return {torch.float32: "F32", torch.bfloat16: "BF16"}[self._tensor.dtype]

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._tensor[index]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_model_is_loaded_from_unread_tensors(tmp_path: Path, family: str) -> None:
    from safetensors.torch import load_file

    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    tensors = {name: Unread(tensor) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    seen = []
    loaded, report = built_with(type(model), seen.append).from_pretrained(
        None,
        config=model.config,
        state_dict=tensors,
        dtype=torch.float32,
        device_map=torch.device("cpu"),
        output_loading_info=True,
    )
    assert len(seen) == 1 and isinstance(seen[0], nn.Module) and not report["missing_keys"]
    ids = tiny_input_ids(family)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_classes_are_found_by_configuration() -> None:
    model = tiny_model("qwen3_moe")
    assert transformers.AutoModelForCausalLM._model_mapping.get(type(model.config), None) is type(model)
    assert transformers.AutoModelForCausalLM._model_mapping.get(nn.Module, None) is None
    assert type(model).config_class is type(model.config) and type(model).can_generate()
    assert model.config.get_text_config() is model.config and model.base_model is model.model


# ---- one forward pass (forward.py, kv_cache.py)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_names_of_a_forward_pass(family: str) -> None:
    model = tiny_model(family)
    names = parameters(model.forward)
    for name in ("input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep", cache_name(model)):
        assert name in names, name
    with torch.inference_mode():
        output = model(input_ids=tiny_input_ids(family), use_cache=True, logits_to_keep=1)
    assert output.logits.shape[:2] == (2, 1)
    cache = getattr(output, cache_name(model))
    assert is_joinable(cache)
    for layer in cache.layers:
        assert layer.is_initialized and layer.get_seq_length() == 12
        assert layer.keys.shape[:2] == layer.values.shape[:2] and layer.keys.shape[-2] == 12


def test_layers_of_a_cache_grow_on_the_right() -> None:
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    full, sliding = DynamicLayer(), DynamicSlidingWindowLayer(sliding_window=4)
    rows = torch.arange(6.0).reshape(1, 1, 6, 1)
    for layer in (full, sliding):
        assert not layer.is_initialized
        layer.update(rows, rows)
    assert full.keys[0, 0, :, 0].tolist() == list(range(6))
    assert sliding.keys[0, 0, :, 0].tolist() == [3, 4, 5]  # one less than the window
    assert sliding.cumulative_length == sliding.get_seq_length() == 6
    assert DynamicCache().layers == []


def test_a_cache_of_another_kind_is_not_joined() -> None:
    model = tiny_model("qwen3_next")
    with torch.inference_mode():
        output = model(input_ids=tiny_input_ids("qwen3_next"), use_cache=True)
    assert not is_joinable(getattr(output, cache_name(model)))


# ---- decoder layers and heads (decoder_layers.py, attention_heads.py)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "olmoe"])
def test_parts_of_a_decoder_layer(family: str) -> None:
    model = tiny_model(family)
    for layer in decoder_layers(model, family):
        assert all(hasattr(layer, part) for part in PARTS)
        names = parameters(type(layer).forward)
        assert names[1] == "hidden_states"  # given by place, the others by name
        attention = parameters(type(layer.self_attn).forward)
        assert attention[1] == "hidden_states" and "attention_mask" in attention and "position_embeddings" in attention
        assert len(parameters(type(layer.mlp).forward)) == 2


@pytest.mark.parametrize(("family", "names"), [("qwen3_moe", GROUPED), ("gpt_oss", GROUPED), ("deepseek_v3", LATENT)])
def test_parts_of_an_attention_module(family: str, names: tuple[str, ...]) -> None:
    attention = tiny_model(family).model.layers[0].self_attn
    assert all(hasattr(attention, name) for name in names)
    assert hasattr(attention, "num_key_value_groups") or names is LATENT
    if names is LATENT:
        assert isinstance(attention.q_lora_rank, int) and attention.num_heads == 4
        assert isinstance(attention.q_b_proj, nn.Linear) and isinstance(attention.kv_b_proj, nn.Linear)
    else:
        assert all(isinstance(getattr(attention, f"{name}_proj"), nn.Linear) for name in "qkvo")
        assert attention.head_dim == 8
    if family == "gpt_oss":
        assert attention.sinks.shape == (4,)
    if family == "qwen3_moe":
        assert attention.q_norm.weight.shape == attention.k_norm.weight.shape == (8,)


def test_olmoe_norms_all_heads_at_once() -> None:
    attention = tiny_model("olmoe").model.layers[0].self_attn
    assert attention.q_norm.weight.shape == (32,) and attention.q_proj.out_features == 32


# ---- recording (profiles/capture/hooks.py)


def test_fused_experts_give_way_to_a_hook() -> None:
    source = inspect.getsource(importlib.import_module("transformers.integrations.mxfp4"))
    assert '"_is_hooked"' in source or not hasattr(find_moe_layers(tiny_model("gpt_oss"))[0].module, "forward_routed")


def test_families_that_this_release_breaks_are_named() -> None:
    assert not set(BROKEN) & set(FAMILIES)
