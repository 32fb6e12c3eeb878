"""The input embedding of a traced model: where its checkpoint keeps it, and its values.

Shape letters: V vocabulary, D hidden size, F features.
"""

from pathlib import Path
from typing import Any

import numpy as np

from semmoe.profiles.errors import InputError
from semmoe.profiles.files import inside
from semmoe.profiles.safetensors_file import read_shard, tensor_files

NAMES_END = (
    "embed_tokens.weight",
    "embed.weight",
    "wte.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
)
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # numpy has no bfloat16: its bits
MAX_FEATURES = 256  # columns of an embedding that are kept
BLOCK_ROWS = 8192  # in memory at a time


def embedding_reference(
    checkpoint: str, folder: Path, revision: str | None, name: str, shape: list[int]
) -> dict[str, Any] | None:
    """Where the input embedding [V, D] of a model lies: checkpoint, revision, file, key and shape.
    None where no tensor fits.

    `name`: the parameter's name in the loaded model, `shape` its shape; a file may use another name
    for it.
    """
    files = tensor_files(folder)
    candidates = [key for key in files if key == name] or [key for key in files if key.endswith(NAMES_END)]
    for key in candidates:
        file = inside(folder, files[key], f"{folder}: the file of {key}")
        if file.exists() and list(read_shard(file).find(key).shape) == shape:
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
    file = inside(Path(reference["checkpoint"]), reference["file"], "the file of the trace's embedding")
    if not file.is_file():
        return None
    rows, columns = reference["shape"]
    shard = read_shard(file)
    tensor = shard.find(reference["key"])
    if list(tensor.shape) != [rows, columns]:
        raise InputError(f"{file}: {tensor.name} has shape {list(tensor.shape)}, the trace says {[rows, columns]}")
    if tensor.dtype not in DTYPES:
        raise InputError(f"{file}: {tensor.name} is of type {tensor.dtype}, expected one of {', '.join(DTYPES)}")
    matrix_VD = shard.map(tensor, DTYPES[tensor.dtype])
    projection_DF = None
    if columns > MAX_FEATURES:
        rng = np.random.default_rng(0)
        projection_DF = rng.standard_normal((columns, MAX_FEATURES), np.float32) / np.sqrt(np.float32(MAX_FEATURES))
    features_VF = np.empty((rows, min(columns, MAX_FEATURES)), np.float32)
    for start in range(0, rows, BLOCK_ROWS):
        block = _as_float32(matrix_VD[start : start + BLOCK_ROWS])
        features_VF[start : start + len(block)] = block if projection_DF is None else block @ projection_DF
    return features_VF


def _as_float32(block: np.ndarray) -> np.ndarray:
    """Values of a mapped block; bfloat16 (as uint16) is the upper half of a float32."""
    return (block.astype(np.uint32) << 16).view(np.float32) if block.dtype == np.uint16 else block.astype(np.float32)
