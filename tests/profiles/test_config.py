"""moe_facts against the real configuration classes and the real modules of every family;
read_config and its errors."""

import json
import os

import pytest
from tiny_models import FAMILIES, tiny_config

from semmoe.profiles.capture.loading import find_model
from semmoe.profiles.config import moe_facts, read_config
from semmoe.profiles.errors import InputError
from semmoe.profiles.families import FAMILIES as SPECIAL

QWEN3 = {
    "model_type": "qwen3_moe",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 6,
    "vocab_size": 1000,
}


def facts_of(**changes):
    return moe_facts({k: v for k, v in {**QWEN3, **changes}.items() if v != "absent"})


def test_plain_config_gives_what_a_trace_wants():
    assert moe_facts(QWEN3) == {
        "model_type": "qwen3_moe",
        "num_layers": 6,
        "num_experts": 128,
        "top_k": 8,
        "model_layers": (0, 1, 2, 3, 4, 5),
        "num_model_layers": 6,
        "vocab_size": 1000,
        "n_group": 1,
        "topk_group": 1,
        "empty_slots": False,
    }


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({"first_k_dense_replace": 2}, (2, 3, 4, 5)),
        ({"mlp_only_layers": [0, 5]}, (1, 2, 3, 4)),
        ({"decoder_sparse_step": 2}, (1, 3, 5)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, (1, 5)),
        ({"moe_layer_freq": 2, "first_k_dense_replace": 1}, (2, 4)),
        ({"moe_layer_freq": [0, 1, 1, 0, 1, 1]}, (1, 2, 4, 5)),
        ({"mlp_layer_types": ["dense", "sparse", "sparse", "dense", "hash_moe", "moe"]}, (1, 2, 4, 5)),
        ({"model_type": "llama4", "interleave_moe_layer_step": 2}, (1, 3, 5)),
        ({"model_type": "llama4", "moe_layers": [2, 4]}, (2, 4)),
        ({"model_type": "step3p7", "moe_layers_enum": "3,4"}, (3, 4)),
        ({"model_type": "jamba", "expert_layer_period": 3, "expert_layer_offset": 1}, (1, 4)),
        ({"model_type": "ernie4_5_moe", "moe_layer_interval": 2, "moe_layer_end_index": -1}, (1, 3, 5)),
        ({"model_type": "ernie4_5_moe", "moe_layer_start_index": 3, "moe_layer_end_index": 4}, (3, 4)),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "ME*-ME"}, (1, 5)),
        ({"model_type": "nemotron_h", "layers_block_type": ["moe", "mlp", "moe"]}, (0, 2)),
        ({"model_type": "lfm2_moe"}, (2, 3, 4, 5)),
        ({"model_type": "deepseek_v3"}, (3, 4, 5)),
        ({"model_type": "deepseek_v3", "first_k_dense_replace": 1}, (1, 2, 3, 4, 5)),
        ({"model_type": "hunyuan_v1_moe", "num_experts_per_tok": "absent", "moe_topk": [8] * 6}, tuple(range(6))),
    ],
)
def test_dense_layers_in_every_spelling(changes, layers):
    facts = facts_of(**changes)
    assert facts["model_layers"] == layers and facts["num_layers"] == len(layers) and facts["top_k"] == 8


def test_groups_null_means_none_and_absent_means_the_familys():
    assert facts_of(model_type="deepseek_v3")["n_group"] == 8
    assert facts_of(model_type="deepseek_v3", n_group=None, topk_group=None)["topk_group"] == 1
    assert facts_of(model_type="kimi_linear", num_expert_group=4, topk_group=2)["n_group"] == 4


def test_nested_configurations():
    inner = {**QWEN3, "model_type": "qwen3_omni_moe_text"}
    nested = moe_facts({"model_type": "qwen3_omni_moe", "thinker_config": {"text_config": inner, "vision_config": {}}})
    assert nested == {**moe_facts(QWEN3), "model_type": "qwen3_omni_moe"}
    dbrx = moe_facts({"model_type": "dbrx", "n_layers": 3, "ffn_config": {"moe_num_experts": 16, "moe_top_k": 4}})
    assert (dbrx["num_experts"], dbrx["top_k"], dbrx["num_layers"]) == (16, 4, 3)


def test_longcat_and_encoder_decoders():
    longcat = {
        "n_routed_experts": 512,
        "zero_expert_num": 256,
        "moe_topk": 12,
        "num_layers": 28,
        "num_hidden_layers": 56,
    }
    facts = moe_facts({"model_type": "longcat_flash", **longcat})
    assert (facts["num_layers"], facts["num_experts"], facts["empty_slots"]) == (28, 512, True)
    switch = moe_facts(
        {"model_type": "switch_transformers", "num_experts": 8, "num_layers": 4, "num_decoder_layers": 4}
    )
    assert switch["num_model_layers"] == 8 and switch["top_k"] == 1
    nllb = {
        "num_experts": 8,
        "encoder_layers": 4,
        "decoder_layers": 4,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 4,
    }
    assert moe_facts({"model_type": "nllb-moe", **nllb})["model_layers"] == (1, 3, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": "absent"}, "the number of experts is None"),
        ({"num_experts": 1}, "has 1 experts: it is not a Mixture-of-Experts model"),
        ({"num_experts_per_tok": "absent"}, "top-k is None"),
        ({"num_experts_per_tok": "8"}, "top-k is '8'"),
        ({"num_experts_per_tok": [[2], [2]]}, r"top-k is \[\[2\], \[2\]\]"),
        ({"num_hidden_layers": 10**30}, "the number of layers is 10+, expected an integer from 0 to 1000000"),
        ({"num_hidden_layers": "absent"}, "the number of layers is None"),
        ({"first_k_dense_replace": 6}, "no Mixture-of-Experts layer among its 6 layers"),
        ({"enable_moe_block": False}, "no Mixture-of-Experts layer"),
    ],
)
def test_a_missing_fact_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        facts_of(**changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_as_transformers_saves_it(family):
    """The layers that hold experts in the family's real modules are the ones that its saved
    configuration names."""
    import torch
    from tiny_models import model_class

    config = tiny_config(family)
    with torch.device("meta"):
        model = model_class(family)(config)
    saved = json.loads(config.to_json_string(use_diff=True))
    towers = ("vision", "audio", "sam", "visual", "encoder")
    found = {}
    for name, module in model.named_modules():
        parts = name.split(".")
        is_experts = parts[-1] == "experts" or (family == "jetmoe" and parts[-1] == "mlp")
        stack = "blocks" if family == "dbrx" else "layers"
        if is_experts and stack in parts and not any(p.startswith(towers) for p in parts[:-1]):
            found[int(parts[parts.index(stack) + 1])] = module
    if not found:  # a tiny configuration may have fewer layers than the family has dense ones
        with pytest.raises(InputError, match="no Mixture-of-Experts layer"):
            moe_facts(saved)
        return
    facts = moe_facts(saved)
    assert sorted(found) == list(facts["model_layers"])
    assert facts["num_model_layers"] > max(found)
    for module in found.values():
        if hasattr(module, "num_experts") and not facts["empty_slots"]:
            assert module.num_experts == facts["num_experts"]


@pytest.mark.parametrize("family", sorted(name for name, family in SPECIAL.items() if family.defaults))
def test_defaults_are_those_of_the_classes(family):
    """A file that leaves out the keys with defaults means what the class says without them."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if family == "kimi_k2":  # custom code on the hub, DeepSeek V3's configuration
        assert SPECIAL[family] == SPECIAL["deepseek_v3"]
        return
    if family == "nllb_moe":  # written so in older files
        assert SPECIAL[family] == SPECIAL["nllb-moe"]
        return
    saved = CONFIG_MAPPING[family]().to_dict()
    whole = moe_facts(saved)
    optional = {
        "mlp_layer_types",
        "n_group",
        "topk_group",
        "num_expert_group",
        "moe_layer_end_index",
        "moe_layer_start_index",
    }
    optional |= {"first_k_dense_replace", "num_dense_layers", "mlp_only_layers"}
    optional |= {"expert_layer_period", "expert_layer_offset"}
    bare = {k: v for k, v in saved.items() if k not in optional}
    for key in ("text_config",):
        if isinstance(bare.get(key), dict):
            bare[key] = {k: v for k, v in bare[key].items() if k not in optional}
    assert moe_facts(bare) == whole


@pytest.mark.parametrize(
    ("model_type", "method", "groups"),
    [("deepseek_v2", None, 1), ("deepseek_v2", "greedy", 1), ("deepseek_v2", "group_limited_greedy", 8),
     ("deepseek_v3", "greedy", 8)],
)  # fmt: skip
def test_only_routers_that_read_topk_method_ignore_groups(model_type, method, groups):
    config = (
        QWEN3 | {"model_type": model_type, "n_group": 8, "topk_group": 4} | ({"topk_method": method} if method else {})
    )
    facts = moe_facts(config)
    assert (facts["n_group"], facts["topk_group"]) == (groups, min(groups, 4))


def test_read_config_of_a_file_a_directory_and_neither(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    assert read_config(tmp_path) == read_config(tmp_path / "config.json") == QWEN3
    with pytest.raises(InputError, match="does not exist: expected a config.json"):
        read_config(tmp_path / "absent.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no config.json"):
        read_config(tmp_path / "empty")
    for text, message in (("{", "is not JSON"), ("[1]", "holds a list")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(InputError, match=message):
            read_config(tmp_path / "bad.json")


def test_read_config_of_a_hub_id_that_is_not_cached(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="neither a file here nor a model of the hub"):
        read_config("nobody-at-all/no-such-model")


def test_without_a_network_a_hub_id_is_refused_at_once(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")  # a name that no network knows (RFC 2606)
    with pytest.raises(InputError, match="the hub cannot be reached to look for it"):
        find_model("nobody-at-all/no-such-model")
    with pytest.raises(InputError, match="the hub cannot be reached, and its cache does not hold it"):
        read_config("nobody-at-all/no-such-model")


@pytest.mark.parametrize("name", ["/no/such/model", "./model", "~/model", "a/b/c", "model/"])
def test_a_path_that_is_not_there_is_no_hub_id(name):
    with pytest.raises(InputError, match="does not exist: expected a checkpoint directory, a hub id or demo"):
        find_model(name)


def test_demo_is_the_embedded_model():
    assert moe_facts(read_config("demo"))["num_experts"] == 32


def moe_block(num_experts, top_k):
    return {"block_type": "moe", "n_routed_experts": num_experts, "num_experts_per_tok": top_k}


def test_blocks_of_a_pruned_model_each_with_its_top_k():
    mamba = {"block_type": "mamba"}
    config = {"model_type": "nemotron_h_puzzle", "block_configs": [mamba, moe_block(8, 3), mamba, moe_block(8, 2)]}
    facts = moe_facts(config)
    assert (facts["num_experts"], facts["top_k"], facts["empty_slots"]) == (8, 3, True)
    assert facts["model_layers"] == (1, 3) and facts["num_model_layers"] == 4
    nested = moe_facts({"model_type": "x", "text_config": {**config, "block_configs": [{"ffn": moe_block(8, 2)}] * 2}})
    assert (nested["top_k"], nested["empty_slots"], nested["model_layers"]) == (2, False, (0, 1))
    config["block_configs"][3] = moe_block(4, 2)
    with pytest.raises(InputError, match="the number of experts differs between layers .8 in layer 1; 4 in layer 3"):
        moe_facts(config)


def test_top_k_may_differ_by_layer():
    config = {"model_type": "x", "num_hidden_layers": 2, "num_experts": 8, "moe_topk": [2, 3]}
    assert (moe_facts(config)["top_k"], moe_facts(config)["empty_slots"]) == (3, True)
    with pytest.raises(InputError, match="differs between layers .8 in layer 0; 4 in layer 1, 2"):
        moe_facts({**config, "num_hidden_layers": 3, "num_experts": [8, 4, 4]})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("decoder_sparse_step", "1"),
        ("decoder_sparse_step", 0),
        ("mlp_only_layers", 5),
        ("mlp_only_layers", [[0]]),
        ("moe_layers", "1,x"),
        ("moe_layer_freq", 1.5),
        ("moe_layer_start_index", []),
        ("mlp_layer_types", "dense"),
        ("n_group", True),
        ("zero_expert_num", -1),
        ("vocab_size", 10**30),
        ("model_type", ["qwen3_moe"]),
    ],
)
def test_a_key_of_another_type_is_no_default(key, value):
    assert facts_of(**{key: None})["num_experts"] == 128
    with pytest.raises(InputError, match=f"config.json: {key}.* is "):
        facts_of(**{key: value})


def test_a_config_is_a_file_that_says_everything_once(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"num_experts": 8, "time_step_limit": [0.0, Infinity], "num_experts": 8}')  # as Mamba's are
    assert read_config(tmp_path)["num_experts"] == 8
    file.write_text('{"num_experts": 8, "num_experts": 4}')
    with pytest.raises(InputError, match="the key 'num_experts' stands twice in an object, with two values"):
        read_config(tmp_path)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(InputError, match="cannot be read: it is a pipe, expected a file"):
        read_config(tmp_path)
