"""What is read from a checkpoint's safetensors files without loading the model: where tensors lie,
and hash routing tables.

DeepSeek-V4 routes its first MoE layers by a table from token id to experts (`gate.tid2eid`, [V,
K]). The table is exact for every token, seen or not, so `semmoe trace MODEL --hash-layers` copies
it to a file of its own:

    safetensors, one tensor "layer.{l}" per hash layer, l counted over MoE layers from 0:
    uint8 or uint16 [V, K], expert ids by token id; metadata: format "semmoe-hash-layers",
    version "1", model, num_experts, model_layers (JSON list, the model's numbers of those layers)

Shape letters: V vocabulary, K top-k.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from semmoe.profiles.errors import InputError

HASH_FORMAT = "semmoe-hash-layers"
EMBEDDING_ENDS = (
    "embed_tokens.weight",
    "embed.weight",
    "wte.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
)


MAX_FEATURES = 256  # columns of an embedding that are kept
EMBEDDING_BLOCK = 8192  # rows of an embedding in memory at a time


def checkpoint_files(folder: Path) -> dict[str, str]:
    """File name of every tensor in a checkpoint folder, from its index or its files' headers;
    empty where it holds no safetensors."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise InputError(f"{index} is not an index of tensors: {error}") from None
    files = {}
    for file in sorted(folder.glob("*.safetensors")):
        with _open(file) as tensors:
            files |= {key: file.name for key in tensors.keys()}
    return files


def _open(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="numpy")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} cannot be read as safetensors: {error}") from None


def tensor_shape(file: Path, key: str) -> list[int]:
    """Shape of a tensor, from the file's header."""
    with _open(file) as tensors:
        return list(tensors.get_slice(key).get_shape())


def embedding_reference(
    checkpoint: str, folder: Path, revision: str | None, name: str, shape: list[int]
) -> dict[str, Any] | None:
    """Where the input embedding [V, D] of a model lies: checkpoint, revision, file, key and shape.
    None where no tensor fits.

    `name`: the parameter's name in the loaded model, `shape` its shape; a file may use another name
    for it.
    """
    files = checkpoint_files(folder)
    candidates = [key for key in files if key == name] or [key for key in files if key.endswith(EMBEDDING_ENDS)]
    for key in candidates:
        file = folder / files[key]
        if file.exists() and tensor_shape(file, key) == shape:
            return {"checkpoint": checkpoint, "revision": revision, "file": files[key], "key": key, "shape": shape}
    return None


def input_embedding(reference: dict[str, Any] | None) -> np.ndarray | None:
    """The input embedding that a trace refers to, float32 [V, F]; None where it refers to none, or
    the file is not here.

    More than MAX_FEATURES columns are projected at random to that many, which keeps distances
    (Johnson and Lindenstrauss, 1984) and bounds what a ridge regression on them costs.
    """
    if reference is None or not reference.get("file"):
        return None
    file = Path(reference["checkpoint"]) / reference["file"]
    if not file.is_file():
        return None
    rows, columns = reference["shape"]
    matrix_VD = _map_matrix(file, reference["key"], rows, columns)
    projection_DF = None
    if columns > MAX_FEATURES:
        rng = np.random.default_rng(0)
        projection_DF = rng.standard_normal((columns, MAX_FEATURES), np.float32) / np.sqrt(np.float32(MAX_FEATURES))
    features_VF = np.empty((rows, min(columns, MAX_FEATURES)), np.float32)
    for start in range(0, rows, EMBEDDING_BLOCK):
        block = _as_float32(matrix_VD[start : start + EMBEDDING_BLOCK])
        features_VF[start : start + len(block)] = block if projection_DF is None else block @ projection_DF
    return features_VF


def _map_matrix(file: Path, key: str, rows: int, columns: int) -> np.ndarray:
    """A matrix of a safetensors file, mapped and not read: float32 or float16 [V, D], or
    bfloat16 as uint16."""
    try:
        with open(file, "rb") as data:
            size = int.from_bytes(data.read(8), "little")
            header = json.loads(data.read(size))
        entry = header[key]
        dtype = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[entry["dtype"]]
        if entry["shape"] != [rows, columns]:
            raise InputError(f"{file}: {key} has shape {entry['shape']}, the trace says {[rows, columns]}")
        return np.memmap(file, dtype, "r", offset=8 + size + entry["data_offsets"][0], shape=(rows, columns))
    except KeyError as error:
        raise InputError(f"{file}: {key} is missing or of a type that is no embedding: {error}") from None
    except (ValueError, OSError, TypeError) as error:
        raise InputError(f"{file} cannot be read as safetensors: {error}") from None


def _as_float32(block: np.ndarray) -> np.ndarray:
    """Values of a mapped block; bfloat16 (as uint16) is the upper half of a float32."""
    return (block.astype(np.uint32) << 16).view(np.float32) if block.dtype == np.uint16 else block.astype(np.float32)


def read_hash_layers(folder: Path) -> dict[int, np.ndarray]:
    """Token-to-experts tables of the hash-routed layers of a checkpoint by model layer number:
    int64 [V, K] each; empty without any."""
    from semmoe.profiles.capture.layers import layer_number

    files = checkpoint_files(folder)
    tables = {}
    for key in (k for k in files if k.endswith(".tid2eid")):
        number = layer_number(key)
        if number is not None:
            with _open(folder / files[key]) as tensors:
                tables[number] = np.asarray(tensors.get_tensor(key), np.int64)
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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, str(temporary), metadata)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
