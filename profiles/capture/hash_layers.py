"""Hash routing tables, copied from a checkpoint without running the model.

DeepSeek-V4 routes its first MoE layers by a table from token id to experts (`gate.tid2eid`, [V,
K]). The table is exact for every token, seen or not, so `semmoe trace MODEL --hash-layers` copies
it to a file of its own:

    safetensors, one tensor "layer.{l}" per hash layer, l counted over MoE layers from 0:
    uint8 or uint16 [V, K], expert ids by token id; metadata: format "semmoe-hash-layers",
    version "1", model, num_experts, model_layers (JSON list, the model's numbers of those layers)

Shape letters: V vocabulary, K top-k.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from semmoe.profiles.errors import InputError
from semmoe.profiles.families import layer_number
from semmoe.profiles.files import write_file
from semmoe.profiles.safetensors_file import INTEGERS, read_shard, tensor_files

HASH_FORMAT = "semmoe-hash-layers"
TABLE_ENDS = ".tid2eid"


def read_hash_layers(folder: Path) -> dict[int, np.ndarray]:
    """Token-to-experts tables of the hash-routed layers of a checkpoint by model layer number:
    int64 [V, K] each; empty without any."""
    tables = {}
    for key, file in tensor_files(folder).items():
        if key.endswith(TABLE_ENDS) and (number := layer_number(key)) is not None:
            shard = read_shard(folder / file)
            table = shard.find(key)
            if table.dtype not in INTEGERS:
                raise InputError(f"{shard.path}: {key} holds expert ids as {table.dtype}, expected integers")
            tables[number] = shard.map(table, INTEGERS[table.dtype]).astype(np.int64)
    return dict(sorted(tables.items()))


def write_hash_layers(
    path: Path, tables: dict[int, np.ndarray], model_layers: list[int], num_experts: int, model: str
) -> None:
    """Write the tables of a model with MoE layers `model_layers` to `path`; raises InputError
    where it exists or an id is out of range."""
    if path.exists():
        raise InputError(f"{path} is there already: choose another name")
    dtype = np.uint8 if num_experts <= 256 else np.uint16
    tensors = {}
    for number, table_VK in tables.items():
        if table_VK.min() < 0 or table_VK.max() >= num_experts:
            raise InputError(f"the table of layer {number} names expert {table_VK.max()}, the model has {num_experts}")
        tensors[f"layer.{model_layers.index(number)}"] = table_VK.astype(dtype)
    metadata = {
        "format": HASH_FORMAT,
        "version": "1",
        "model": model,
        "num_experts": str(num_experts),
        "model_layers": json.dumps(list(tables)),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    write_file(path, save(tensors, metadata))
