"""Small synthetic checkpoints, tensor by tensor, for layouts that no tiny model is saved in:
quantised, with MTP, sharded.

Every tensor has random bytes, so that two experts are never alike.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from semmoe.profiles.safetensors_file import DTYPE_BITS, INDEX_NAME, Tensor, make_header
from semmoe.solvers.placement import Placement, Topology
from semmoe.solvers.plan import ModelFacts, Plan

Specs = Mapping[str, tuple[str, Sequence[int]]]  # tensor name -> safetensors dtype, shape

CONFIG = {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "vocab_size": 32,
}


def write_checkpoint(
    path: Path, specs: Specs, *, config: Mapping[str, Any] = CONFIG, shards: int = 1, seed: int = 0
) -> Path:
    """A checkpoint directory with the tensors dealt over `shards` files, and an index where
    there are several."""
    path.mkdir()
    draw = np.random.default_rng(seed)
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    (path / "modeling_custom.py").write_text("# custom code\n")
    names = list(specs)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        mine = names[number::shards]
        weight_map |= dict.fromkeys(mine, file)
        write_shard(path / file, {name: specs[name] for name in mine}, draw)
    if shards > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": dict(sorted(weight_map.items()))}
        (path / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    return path


def write_shard(path: Path, specs: Specs, draw: np.random.Generator) -> None:
    """A safetensors file with random bytes (integers: small ids)."""
    tensors, data, place = [], [], 0
    for name, (dtype, shape) in specs.items():
        count = int(np.prod(shape))
        size = count * DTYPE_BITS[dtype] // 8
        if dtype == "I64":
            blob = draw.integers(0, 8, count).astype("<i8").tobytes()
        else:
            blob = draw.integers(0, 256, size, dtype=np.uint8).tobytes()
        tensors.append(Tensor(name, dtype, tuple(shape), place, place + size))
        data.append(blob)
        place += size
    path.write_bytes(make_header(tuple(tensors), {"format": "pt"}) + b"".join(data))


def read_tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a checkpoint directory: type, shape, bytes."""
    from semmoe.runtime.reshard.source import open_checkpoint

    result = {}
    for shard in open_checkpoint(path).shards:
        data = shard.path.read_bytes()[shard.header_bytes :]
        result |= {t.name: (t.dtype, t.shape, data[t.begin : t.end]) for t in shard.tensors}
    return result


def make_plan(experts_LRS: Any, *, layers: Sequence[int] = (0, 1), **facts: Any) -> Plan:
    """A plan with this placement, for a model of CONFIG unless told otherwise."""
    experts = np.asarray(experts_LRS, np.int32)
    model = {
        "model": "test",
        "model_type": "qwen3_moe",
        "num_layers": len(layers),
        "num_experts": 8,
        "top_k": 2,
        "model_layers": tuple(layers),
        "num_model_layers": 2,
        **facts,
    }
    return Plan(
        placement=Placement(experts, model["num_experts"]),
        topology=Topology(experts.shape[1]),
        model=ModelFacts(**model),
        method="random",
        seed=0,
        dispatch="per-rank",
        load_LE=np.ones((len(layers), model["num_experts"]), np.int64),
        fitted_keys=np.zeros(0, np.uint64),
    )


def random_orders(layers: int, experts: int = 8, seed: int = 0) -> np.ndarray:
    """new2old of each layer, int [L, E]."""
    return np.random.default_rng(seed).permuted(np.tile(np.arange(experts), (layers, 1)), axis=1)
