"""Damaged checkpoints: config.json, the index, headers of weights, tensors that are not there."""

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

from fuzzing.damage import (
    Damage,
    cuts,
    edit,
    no_document,
    no_file,
    noise,
    remove,
    rename,
    sampled,
    set_to,
)
from fuzzing.headers import headed, header_damages
from fuzzing.inputs import Input, inputs_of

RESHARD = "reshard m p -o out"
RANKS = "reshard m p --layout ranks -o out"
RUN = "run m --plan p --prompts few.jsonl --max-new-tokens 2"
TRACE = "trace m --data few.jsonl -o out"
EXPORT = "export p --to sglang --model m -o out.json"
IMPORT = "trace --from sglang sglang.jsonl --model config.json -o out"
CONFIG_READERS = (RESHARD, EXPORT)
WEIGHT_READERS = (*(RESHARD, RANKS) * 4, TRACE, RUN)

EXPERTS = "num_local_experts"  # the name that the tiny model's config.json has
# Facts of routing, and values that no model has: read by every command that asks for a config.
ROUTING = {
    EXPERTS: ("null", '"8"', "true", "8.5", "-8", "0", "1", "[]", "{}", "NaN", "1" + "0" * 30, "1000000000", '["8"]'),
    "num_experts_per_tok": ("null", '"2"', "true", "2.5", "-2", "[]", "{}", "NaN", "1000000000", "9", "0", "[2, 3, 2]"),
    "num_hidden_layers": ("null", '"3"', "true", "3.5", "-3", "0", "[]", "{}", "NaN", "1000000000", "2", "4"),
    "decoder_sparse_step": ('"1"', "-1", "1.5", "true", "[]", "{}", "0", "4"),
    "mlp_only_layers": ('"0"', "5", "{}", "true", "[0, 1, 2]", '["0"]', "[[0]]", "[null]", "[1.5]"),
    "model_type": ("5", "[]", "{}", "true", '["qwen3_moe"]', '"\\u0000"', '"../x"'),
}
# Of families that spell it otherwise: config.json of the engine samples is a DeepSeek-V2's.
OTHERS = {
    "n_routed_experts": ("null", '"16"', "true", "16.5", "-1", "0", "1", "[]", "{}", "NaN", "100000000", "[16, 8.5]"),
    "num_experts_per_tok": ("null", '"3"', "true", "-1", "[]", "17", "1000000"),
    "num_hidden_layers": ("null", '"5"', "true", "-1", "0", "[]", "1000000000", "4"),
    "first_k_dense_replace": ('"1"', "-1", "1.5", "true", "[]", "{}", "5", "1000000"),
    "n_group": ('"8"', "-1", "1.5", "true", "[]", "{}"),  # how many decides nothing: this model's router is greedy
    "topk_group": ('"8"', "-1", "1.5", "true", "[]", "{}"),
    "moe_layer_freq": ('"1"', "-1", "1.5", "true", "{}", "[0, 1]", '["x"]'),
    "mlp_layer_types": (
        '"dense"',
        "5",
        "{}",
        "true",
        "[5]",
        "[]",
        '["dense"]',
        '["what", "is", "this", "now", "then"]',
    ),
    "moe_layers": ('"x"', "5", "{}", "true", '["a"]', "[1.5]", '"1,x"', "[100]"),
    "layers_block_type": ("5", "true", "{}", '[["moe"]]', "[5]"),
    "vocab_size": ('"500"', "-1", "1.5", "true", "[]", "{}", "1" + "0" * 30),
    "zero_expert_num": ('"x"', "-1", "[1]", "1" + "0" * 30),
    "moe_layer_start_index": ('"1"', "1.5", "true", "[]"),
    "interleave_moe_layer_step": ('"1"', "-1", "1.5", "[]"),
    "expert_layer_period": ('"1"', "0", "-1", "1.5", "[]"),
}
MODEL = ("hidden_size", "head_dim", "num_attention_heads", "num_key_value_heads", "moe_intermediate_size", "vocab_size")
MODEL_VALUES = ("null", '"32"', "-1", "0", "1.5", "[]", "{}", "1000000000000", "33")


def checkpoint_inputs(base: Path, draw: random.Random) -> list[Input]:
    return [*config_inputs(draw), *index_inputs(base, draw), *weight_inputs(base, draw)]


def config_inputs(draw: random.Random) -> list[Input]:
    top_k = "num_experts_per_tok"  # which a permutation does not ask for
    values = [added(key, raw) for key, raws in ROUTING.items() for raw in raws if key != top_k]
    found = inputs_of("config.json", "m/config.json", values, CONFIG_READERS, draw)
    found += inputs_of("config.json", "m/config.json", [added(top_k, raw) for raw in ROUTING[top_k]], [EXPORT], draw)
    # A config of fewer layers or experts is a model to Transformers: no number is damage there.
    words = [added(key, raw) for key, raws in ROUTING.items() for raw in raws if not raw.lstrip("-").isdigit()]
    found += inputs_of("config.json", "m/config.json", sampled(words, 24, draw), [TRACE], draw)
    text = no_document(draw)
    found += inputs_of("config.json", "m/config.json", text, (*CONFIG_READERS, TRACE, RUN), draw)
    found += inputs_of("config.json", "config.json", [*text[:16], *cut_texts(text)], [IMPORT], draw)
    values = [added(key, raw) for key, raws in OTHERS.items() for raw in raws]
    found += inputs_of("config.json", "config.json", values, [IMPORT], draw)
    values = [added(key, raw) for key in MODEL for raw in MODEL_VALUES]
    found += inputs_of("config.json", "m/config.json", sampled(values, 24, draw), [TRACE], draw)
    return found


def cut_texts(text: list[Damage]) -> list[Damage]:
    return [damage for damage in text if damage.what.startswith("cut")][:3]


def added(key: str, raw: str) -> Damage:
    """A value of config.json, whether the file has the key or not."""
    put = set_to((key,), raw)

    def apply(file: Path) -> None:
        edit(lambda document: document.setdefault(key, 0), file)
        put.apply(file)

    return put._replace(apply=apply)


def index_inputs(base: Path, draw: random.Random) -> list[Input]:
    file = "m/model.safetensors.index.json"
    index = json.loads((base / file).read_text())
    names = list(index["weight_map"])
    expert = next(name for name in names if ".experts.3." in name)
    files = (
        "null",
        "5",
        "[]",
        "{}",
        "true",
        '""',
        '"."',
        '".."',
        '"../m/model-00001-of-00005.safetensors"',
        '"nowhere.safetensors"',
    )
    files = (
        *files,
        '"config.json"',
        '"/dev/null"',
        '"a/b.safetensors"',
        '"x\\u0000.safetensors"',
        '"model-00005-of-00005.safetensors"',
    )
    damages = [set_to(("weight_map", expert), raw) for raw in files]
    damages += [set_to(("weight_map",), raw) for raw in ("null", "5", "[]", "{}", '"x"', "true", '{"a": "b"}')]
    damages += [Damage("a tensor of another name", partial(rename, ("weight_map", expert), "model.layers.9.other"))]
    damages += [Damage("without weight_map", partial(remove, ("weight_map",)))]
    text = [damage for damage in no_document(draw) if damage.what != "absent"]  # without an index, names decide
    return inputs_of("checkpoint index", file, [*damages, *text], WEIGHT_READERS, draw)


def weight_inputs(base: Path, draw: random.Random) -> list[Input]:
    shard = "m/model-00002-of-00005.safetensors"
    damages = [*no_file(), *cuts(draw, 10), *header_damages(base / shard, draw, 60)]
    damages += noise(draw, 20, end=0.1)
    found = inputs_of("checkpoint weights", shard, damages, WEIGHT_READERS, draw)
    lost = [
        headed_and_indexed(f"without {what}", what) for what in (".gate.", ".experts.0.", ".experts.7.", ".up_proj.")
    ]
    return found + inputs_of("checkpoint weights", "m", lost, (RESHARD, RANKS), draw)


def headed_and_indexed(what: str, part: str) -> Damage:
    """A tensor of layer 1 renamed in its file and in the index: the model lacks it."""

    def apply(folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        names: dict[str, Any] = json.loads(index.read_text())["weight_map"]
        name = next(name for name in names if ".layers.1." in name and part in name)
        other = name.replace(".layers.1.", ".layers.0.").replace("mlp", "other")
        rename(("weight_map", name), other, index)
        headed(what, lambda text: text.replace(f'"{name}"', f'"{other}"')).apply(folder / names[name])

    return Damage(what, apply)
