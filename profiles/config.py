"""The facts of a Mixture-of-Experts model that its config.json states, whatever the family calls
them.

Families spell the same facts differently (num_experts, num_local_experts, n_routed_experts, ...),
nest them (text_config, thinker_config, ffn_config), and say in a dozen ways which layers are dense.
The spellings, and what a family's files leave out, are in families.py; a key that is null is stated
and has no default.
"""

import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from semmoe.profiles.demo.paths import demo_model_path
from semmoe.profiles.document import (
    Check,
    Wrong,
    boolean,
    integer,
    list_of,
    null_or,
    parse_json,
    read_bounded,
    record,
    shortened,
    text,
    validate,
)
from semmoe.profiles.errors import InputError, require_extra
from semmoe.profiles.families import IDENTITY_EXPERTS, NESTED, NUM_EXPERTS, TOP_K, Family, find_family

ENDPOINT = "https://huggingface.co"
ZERO_EXPERTS = (IDENTITY_EXPERTS, "num_zero_experts", "n_zero_experts", "moe_num_zero_experts", "num_identity_experts")
BLOCK_PARTS = ("ffn", "mlp", "moe", "feed_forward")  # where an entry of block_configs keeps what it says of experts
MOST = 1_000_000  # experts, layers or choices of a model; beyond that a config is damaged


def whole(low: int) -> Check:
    """A number of a configuration: null where it says nothing, a list where parts of the model
    differ (text and vision experts of Ernie VL, or layers)."""
    one, several = integer(low, 10**9), list_of(integer(low, 10**9), least=1)
    return lambda value, at: None if value is None else (several if isinstance(value, list) else one)(value, at)


def which_layers(value: Any, at: str) -> None:
    """Numbers of layers, as a list or as text."""
    numbers = [word.strip() for word in value.split(",")] if isinstance(value, str) else value
    if not isinstance(numbers, list) or not all(
        type(n) is int or (isinstance(n, str) and n.isdigit()) for n in numbers
    ):
        raise Wrong(f"{at} is {shortened(value)}, expected numbers of layers")


STATED_TYPE = null_or(text(200, r"[^\x00-\x1f\x7f/\\]*", "the name of a model type"))
# What is read with a default where a family does not state it: a wrong type would be silence.
STATED = record(
    {},
    {
        "model_type": STATED_TYPE,
        **dict.fromkeys(("vocab_size", *ZERO_EXPERTS), null_or(integer(0, 10**9))),
        **dict.fromkeys(("n_group", "num_expert_group", "topk_group"), null_or(integer(0, 10**9))),
        **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "dense_mlp_idx"), whole(0)),
        **dict.fromkeys(("moe_layer_num_skipped", "moe_layer_start_index", "expert_layer_offset"), whole(0)),
        **dict.fromkeys(("moe_layer_interval", "interleave_moe_layer_step", "moe_layer_freq"), whole(0)),
        **dict.fromkeys(("decoder_sparse_step", "expert_layer_period"), whole(1)),
        "moe_layer_end_index": whole(-1),
        **dict.fromkeys(("enable_moe_block", "is_moe"), null_or(boolean)),
        "mlp_only_layers": null_or(list_of(integer(0, 10**9))),
        **dict.fromkeys(("moe_layers", "moe_layers_enum"), null_or(which_layers)),
        **dict.fromkeys(("mlp_layer_types", "layers_block_type"), null_or(list_of(text(100)))),
        "hybrid_override_pattern": null_or(text()),
    },
)


def read_config(path: str | Path) -> dict[str, Any]:
    """config.json of a model: a file, a directory that holds one (a checkpoint), the id of a model
    of the hub, or "demo".

    Only a hub id imports transformers. Raises InputError where there is none or it is not a JSON
    object.
    """
    file = demo_model_path() if str(path) == "demo" else Path(path)
    if file.is_dir():
        file = file / "config.json"
        if not file.exists():
            raise InputError(f"{path} holds no config.json: expected a checkpoint directory")
    elif not file.exists():
        file = _hub_config(str(path))
    try:
        config = parse_json(read_bounded(file), unique=True)
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not JSON: {error}") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None
    if not isinstance(config, dict):
        raise InputError(f"{file} holds a {type(config).__name__}, expected the JSON object of a model's config.json")
    return config


def _hub_config(name: str) -> Path:
    if not is_hub_id(name):
        raise InputError(f"{name} does not exist: expected a config.json, a checkpoint directory or a hub id")
    require_extra(f"{name} is no file here, and asking the hub for it", "transformers")
    from transformers.utils.hub import cached_file

    reachable = hub_in_reach()
    try:
        found = cached_file(name, "config.json", local_files_only=not reachable)
    except (OSError, ValueError) as error:
        reason = (
            str(error).splitlines()[0] if reachable else "the hub cannot be reached, and its cache does not hold it"
        )
        raise InputError(f"{name} is neither a file here nor a model of the hub: {reason}") from None
    if found is None:
        raise InputError(f"{name} has no config.json on the hub")
    return Path(found)


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that names the experts of the language model; with the outer
    keys beneath it."""
    if any(config.get(key) for key in (*NUM_EXPERTS, "block_configs")):
        return config
    for key in NESTED:
        inner = config.get(key)
        if isinstance(inner, dict):
            found = text_config(inner if key != "ffn_config" else {**inner, "model_type": config.get("model_type", "")})
            if any(found.get(name) for name in (*NUM_EXPERTS, "block_configs")):
                return {**config, **found}
    return config


def moe_facts(config: dict[str, Any]) -> dict[str, Any]:
    """What TraceInfo wants of a model: `TraceInfo(model=..., made_by=..., **moe_facts(config))`.

    Keys: model_type (the outermost), num_layers (MoE layers), num_experts, top_k, model_layers
    (number of each MoE layer in the model, encoder before decoder), num_model_layers, vocab_size (0
    = unknown), n_group, topk_group (1 where the router has no groups), empty_slots (the router can
    choose no routed expert: identity experts or a skip class; or layers differ in top-k, which is
    then the largest). Raises InputError where the file
    lacks a fact, or the model has no experts.
    """
    validate(config, record({}, {"model_type": STATED_TYPE}), "config.json")
    inner = _with_blocks(text_config(config))
    validate(inner, STATED, "config.json")
    model_type = str(config.get("model_type") or inner.get("model_type") or "")
    family = find_family(model_type, str(inner.get("model_type") or ""))
    facts = {**family.defaults, **inner}
    name = model_type or "config.json"
    _refuse_uneven_experts(facts, name)
    num_experts = _uniform(facts, NUM_EXPERTS, f"{name}: the number of experts", first_of_list=True)
    if num_experts < 2:
        raise InputError(f"{name} has {num_experts} experts: it is not a Mixture-of-Experts model")
    facts, top_k_differs = _widest_top_k(facts, family.top_k)
    top_k = _uniform(facts, family.top_k, f"{name}: top-k")
    num_model_layers, model_layers = _model_layers(facts, family, name)
    if not model_layers:
        raise InputError(f"{name} has no Mixture-of-Experts layer among its {num_model_layers} layers")
    grouped = not (family.greedy and inner.get("topk_method", "greedy") == "greedy")
    return {
        "model_type": model_type,
        "num_layers": len(model_layers),
        "num_experts": num_experts,
        "top_k": top_k,
        "model_layers": tuple(model_layers),
        "num_model_layers": num_model_layers,
        "vocab_size": _integer(facts.get("vocab_size"), 0),
        "n_group": _group(facts, inner, ("n_group", "num_expert_group")) if grouped else 1,
        "topk_group": _group(facts, inner, ("topk_group",)) if grouped else 1,
        "empty_slots": any(_integer(facts.get(key), 0) for key in ZERO_EXPERTS) or family.skips or top_k_differs,
    }


def _with_blocks(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts with those of `block_configs`, one entry a layer, as lists over the layers that
    route (pruned hybrids: Nemotron-H Puzzle)."""
    blocks = facts.get("block_configs")
    if not isinstance(blocks, list) or not blocks or not all(isinstance(block, dict) for block in blocks):
        return facts
    flat = [
        {**block, **next((block[k] for k in BLOCK_PARTS if isinstance(block.get(k), dict)), {})} for block in blocks
    ]
    moe = {i: block for i, block in enumerate(flat) if _is_moe_block(block)}
    if not moe:
        return facts
    found: dict[str, Any] = {"layers_block_type": ["moe" if i in moe else "other" for i in range(len(flat))]}
    for keys in (NUM_EXPERTS, TOP_K):
        key = next((k for k in keys if any(block.get(k) is not None for block in moe.values())), None)
        if key is not None:
            found[key] = [block.get(key, facts.get(key)) for block in moe.values()]
    return {**facts, **found}


def _is_moe_block(block: dict[str, Any]) -> bool:
    """Whether a layer of block_configs routes: it says so, or it has several experts."""
    if str(block.get("block_type", block.get("type", "moe"))).lower() != "moe" or block.get("no_op") is True:
        return False
    return any(_integer(block.get(key), 0) > 1 for key in NUM_EXPERTS) or block.get("block_type") == "moe"


def _refuse_uneven_experts(facts: dict[str, Any], name: str) -> None:
    """Raise InputError where the layers have different numbers of experts, with the layers."""
    value = next((facts[key] for key in NUM_EXPERTS if facts.get(key) is not None), None)
    blocks = facts.get("layers_block_type") or []
    routed = [i for i, kind in enumerate(blocks) if kind in ("moe", "E")] if isinstance(blocks, list) else []
    if not isinstance(value, list) or not all(isinstance(v, int) for v in value) or len(set(value)) < 2:
        return
    layers = routed if len(routed) == len(value) else list(range(len(value)))
    if len(value) == 2 and len(routed) != 2:
        return  # text and vision experts (Ernie VL)
    by_number = {number: [layer for layer, v in zip(layers, value, strict=True) if v == number] for number in value}
    said = "; ".join(f"{number} in layer {', '.join(map(str, where))}" for number, where in by_number.items())
    raise InputError(f"{name}: the number of experts differs between layers ({said}); a trace has one for all layers")


def _widest_top_k(facts: dict[str, Any], keys: tuple[str, ...]) -> tuple[dict[str, Any], bool]:
    """The facts with one top-k where layers differ in it, the largest: the slots past a layer's own
    are empty; and whether they do."""
    key = next((key for key in keys if facts.get(key) is not None), None)
    value = facts.get(key) if key is not None else None
    if not isinstance(value, list) or not value or not all(isinstance(v, int) and 0 < v <= MOST for v in value):
        return facts, False
    return {**facts, str(key): max(value)}, len(set(value)) > 1


def _integer(value: Any, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def _uniform(facts: dict[str, Any], keys: tuple[str, ...], what: str, *, first_of_list: bool = False) -> int:
    """The first of `keys` that is set. A list holds equal values per layer, or (Ernie VL) text
    experts first."""
    value = next((facts[key] for key in keys if facts.get(key) is not None), None)
    if isinstance(value, list) and value and all(isinstance(v, int) for v in value):
        if len(set(value)) > 1 and not first_of_list:
            raise InputError(f"{what} differs by layer ({sorted(set(value))}); a trace has one for all layers")
        value = value[0]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST:
        raise InputError(f"{what} is {value!r}, expected an integer from 0 to {MOST} in one of {', '.join(keys)}")
    return value


def _group(facts: dict[str, Any], given: dict[str, Any], keys: tuple[str, ...]) -> int:
    """A group count: the file's own key in any spelling, else the family's default; null means
    no groups, 1."""
    value = next((given[key] for key in keys if key in given), facts.get(keys[0]))
    return max(1, _integer(value, 1))


def _model_layers(facts: dict[str, Any], family: Family, name: str) -> tuple[int, list[int]]:
    """How many layers the model has and which of them, counted from 0, route to experts."""
    if family.encoder_decoder:
        return _encoder_decoder_layers(facts, family, name)
    blocks = facts.get("layers_block_type") or facts.get("hybrid_override_pattern")  # Nemotron-H: one letter a layer
    if blocks and ("moe" in blocks or "E" in blocks):
        return len(blocks), [i for i, kind in enumerate(blocks) if kind in ("moe", "E")]
    num_layers = _uniform(facts, family.num_layers, f"{name}: the number of layers")
    return num_layers, [i for i in range(num_layers) if _is_moe_layer(facts, i, num_layers)]


def _is_moe_layer(facts: dict[str, Any], layer: int, num_layers: int) -> bool:
    """Whether one layer routes: an explicit list decides; the rules that a family has must all
    hold."""
    kinds = facts.get("mlp_layer_types")
    if isinstance(kinds, list):
        return layer < len(kinds) and kinds[layer] != "dense"
    listed = facts.get("moe_layers", facts.get("moe_layers_enum"))
    if isinstance(listed, str | list):
        numbers = listed.split(",") if isinstance(listed, str) else listed
        return layer in [int(i) for i in numbers if str(i).strip()]
    frequency = facts.get("moe_layer_freq")
    if isinstance(frequency, list):
        return layer < len(frequency) and bool(frequency[layer])
    if facts.get("enable_moe_block") is False or facts.get("is_moe") is False:
        return False
    dense = next((facts[k] for k in ("num_dense_layers", "dense_mlp_idx", "moe_layer_num_skipped") if facts.get(k)), 0)
    last = _integer(facts.get("moe_layer_end_index"), -1)
    period = _integer(facts.get("expert_layer_period"), 1)
    interleave = _integer(facts.get("interleave_moe_layer_step"), 1) or 1
    return (
        layer >= max(_integer(facts.get("first_k_dense_replace"), 0), _integer(dense, 0))
        and layer >= _integer(facts.get("moe_layer_start_index"), 0)
        and layer <= (num_layers - 1 if last == -1 else last)
        and layer not in (facts.get("mlp_only_layers") or [])
        and (layer + 1) % (_integer(facts.get("decoder_sparse_step"), 1) or 1) == 0
        and (layer + 1) % (_integer(facts.get("moe_layer_interval"), 1) or 1) == 0
        and layer % (_integer(frequency, 1) or 1) == 0
        and layer % period == _integer(facts.get("expert_layer_offset"), 0) % period
        and (layer + 1) % interleave == 0
    )


def _encoder_decoder_layers(facts: dict[str, Any], family: Family, name: str) -> tuple[int, list[int]]:
    """Switch and NLLB: the encoder's layers first, then the decoder's."""
    switch = family.encoder_decoder == "i % step == 1"
    encoder = _uniform(facts, ("num_layers", "encoder_layers"), f"{name}: the number of encoder layers")
    decoder = _integer(facts.get("num_decoder_layers") or facts.get("decoder_layers"), encoder)
    layers, start = [], 0
    for count, side in ((encoder, "encoder"), (decoder, "decoder")):
        step = _integer(facts.get(f"{side}_sparse_step"), 4)
        sparse = _integer(facts.get(f"num_sparse_{side}_layers"), -1)
        if switch and sparse >= 0:
            step = count // sparse if sparse else count
        at = 1 if switch else step - 1  # the class's own rule: i % step == 1, against (i + 1) % step == 0
        layers += [start + i for i in range(count) if step > 0 and (step == 1 or i % step == at)]
        start += count
    return start, layers


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a hub id, "name" or "namespace/name", and not that of a
    path."""
    parts = name.split("/")
    return len(parts) <= 2 and not name.endswith(".json") and all(p and p[0] not in ".~" for p in parts)


def hub_in_reach() -> bool:
    """False where the hub's host name cannot be found, so that only its cache is left: its client
    would try for half a minute. Behind a proxy the answer is always True."""
    if getproxies():
        return True
    host = urlsplit(os.environ.get("HF_ENDPOINT") or ENDPOINT).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True
