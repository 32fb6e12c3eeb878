"""safetensors files by their headers: the one place that reads and writes headers, and the one set
of refusals.

A safetensors file is 8 bytes of length (little endian), a JSON header of that length, and one data
region in which the tensors lie end to end (https://github.com/huggingface/safetensors). Tensors are
read by mapping their bytes; a tensor is renamed by writing another header in front of the same
data. Headers are written as the safetensors library writes them, compact JSON padded with blanks,
so that a file which is renamed and renamed back is the same file.
"""

import hashlib
import json
import os
import re
import struct
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from semmoe.profiles.document import parse_json, read_bounded
from semmoe.profiles.errors import InputError
from semmoe.profiles.files import PAGE_BYTES, shortened, write_by_pages, wrong_name

INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
PIECE_BYTES = 2**20  # that are hashed and written at once
DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
DTYPE = re.compile(r"[A-Z][A-Z0-9_]*")  # one that is not known is moved as bytes
# Types of arrays that are written, in the order of the library, which puts the last ones first.
STORED = {"bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "float16": "F16"} | {
    **{"int32": "I32", "uint32": "U32", "float32": "F32", "float64": "F64", "int64": "I64", "uint64": "U64"}
}
INTEGERS = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "U16": "<u2", "U32": "<u4", "U64": "<u8"}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One entry of a header; `begin` and `end` count bytes from the start of the data region."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, eq=False)
class Shard:
    """One safetensors file: its tensors in the order of their bytes, and where the data region
    starts."""

    path: Path
    header_bytes: int  # length word and JSON together: the offset of the data region
    size: int
    metadata: dict[str, str]
    tensors: tuple[Tensor, ...]

    @cached_property  # asked for every tensor of a large checkpoint
    def name(self) -> str:
        return self.path.name

    def find(self, name: str) -> Tensor:
        """The tensor of that name. Raises InputError where there is none."""
        found = next((tensor for tensor in self.tensors if tensor.name == name), None)
        if found is None:
            raise InputError(f"{self.path} holds no tensor {name}")
        return found

    def map(self, tensor: Tensor, dtype: str) -> np.ndarray:
        """A tensor's values as numpy's `dtype`, mapped and not read."""
        if not tensor.num_bytes:
            return np.empty(tensor.shape, dtype)
        return np.memmap(self.path, dtype, "r", self.header_bytes + tensor.begin, tensor.shape)


def read_shard(path: Path) -> Shard:
    """Read and check the header of a safetensors file. Raises InputError where the file is
    damaged or cut short."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise InputError(f"{path} is no file: expected safetensors")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            word = file.read(8)
            length = struct.unpack("<Q", word)[0] if len(word) == 8 else -1
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise InputError(f"{path} is damaged: it does not begin with a safetensors header")
            text = file.read(length)
    except FileNotFoundError:
        raise InputError(f"{path} is missing: the checkpoint is not complete") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}

    def share(shape: tuple[int, ...]) -> tuple[int, ...]:  # hundreds of thousands of tensors have a few shapes
        return shapes.setdefault(shape, shape)

    try:
        entries = parse_json(text, strict=True)  # a tensor that stands twice is two tensors
        metadata = entries.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata
        if any(not isinstance(value, str) for value in metadata.values()):
            raise ValueError
        tensors = tuple(
            sorted(
                (
                    Tensor(n, sys.intern(e["dtype"]), share(tuple(e["shape"])), *e["data_offsets"])
                    for n, e in entries.items()
                ),
                key=lambda t: (t.begin, t.end),
            )
        )
        if any(type(number) is not int or number < 0 for t in tensors for number in (*t.shape, t.begin, t.end)):
            raise ValueError
        if not all(map(DTYPE.fullmatch, {t.dtype for t in tensors})):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is damaged: its safetensors header cannot be read") from None
    shard = Shard(path, 8 + length, size, metadata, tensors)
    check_offsets(shard)
    return shard


def check_offsets(shard: Shard) -> None:
    """Raise InputError unless the tensors cover the data region without gaps and the file holds
    all of it."""
    place = 0
    for tensor in shard.tensors:
        bits = DTYPE_BITS.get(tensor.dtype)
        count = 1
        for length in tensor.shape:
            count *= length
        if tensor.begin != place or (bits is not None and tensor.num_bytes * 8 != count * bits):
            raise InputError(f"{shard.path} is damaged: the offsets of {tensor.name} do not fit its shape")
        place = tensor.end
    if shard.header_bytes + place != shard.size:
        raise InputError(
            f"{shard.path} has {shard.size:,} bytes, its header describes {shard.header_bytes + place:,}: "
            "the file is cut short or damaged"
        )


def make_header(tensors: tuple[Tensor, ...], metadata: dict[str, str], *, header_bytes: int = 0) -> bytes:
    """Length word and JSON of a file with these tensors.

    Padded with blanks to `header_bytes` where the JSON fits, so that the data keeps its offset;
    else to whole pages more, so that the data keeps its place in a page and a file system may still
    share its blocks.
    """
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [tensor.begin, tensor.end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    needed = 8 + len(text)
    if not header_bytes:
        total = needed + -needed % 8
    else:
        total = header_bytes + max(0, -(-(needed - header_bytes) // PAGE_BYTES)) * PAGE_BYTES
    return struct.pack("<Q", total - 8) + text.ljust(total - 8)


def map_arrays(shard: Shard) -> dict[str, np.ndarray]:
    """All arrays of a file by name, read-only: large ones mapped and not read. Raises KeyError for
    a type that `write_arrays` does not write."""
    types = {stored: dtype for dtype, stored in STORED.items()}
    mapped = {tensor.name: shard.map(tensor, types[tensor.dtype]) for tensor in shard.tensors}
    return {name: array if array.nbytes > PIECE_BYTES else np.array(array) for name, array in mapped.items()}


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> str:
    """A new file with these arrays, byte for byte what the safetensors library writes, and its
    SHA-256 in hexadecimal. The library makes two copies of all arrays before it writes; this, none.

    Raises OSError where it cannot be written, KeyError for a type of array that it does not know.
    """
    order = sorted(arrays, key=lambda name: (-list(STORED).index(arrays[name].dtype.name), name))
    tensors, begin = [], 0
    for name in order:
        array = arrays[name]
        tensors.append(Tensor(name, STORED[array.dtype.name], array.shape, begin, begin + array.nbytes))
        begin += array.nbytes
    digest = hashlib.sha256()
    with path.open("xb", buffering=0) as file:
        header = np.frombuffer(make_header(tuple(tensors), {}), np.uint8)
        for array in (header, *(arrays[name] for name in order)):
            content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            for piece in (content[at : at + PIECE_BYTES] for at in range(0, len(content), PIECE_BYTES)):
                digest.update(piece)
                write_by_pages(file.fileno(), piece)
    return digest.hexdigest()


def read_index(path: Path) -> dict[str, Any]:
    """The index of a sharded checkpoint: {"metadata": {...}, "weight_map": {tensor: file}}."""
    try:
        return parse_index(read_bounded(path), str(path))
    except ValueError as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def parse_index(content: str | bytes, path: str) -> dict[str, Any]:
    """The index in a text that `path` names."""
    try:
        index = parse_json(content, strict=True)
    except ValueError as error:  # of the encoding too
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict) or not index["weight_map"]:
        raise InputError(f"{path} has no weight_map: expected the index of a sharded checkpoint")
    if not all(isinstance(file, str) for file in index["weight_map"].values()):
        raise InputError(f"{path} is damaged: its weight_map names something else than files")
    for file in set(index["weight_map"].values()):
        if wrong := wrong_name(file):
            raise InputError(f"{path}: weight_map names {shortened(file)}: {wrong}")
    index["weight_map"] = {key: sys.intern(file) for key, file in index["weight_map"].items()}
    return index


def tensor_files(folder: Path) -> dict[str, str]:
    """File name of every tensor in a checkpoint folder, from its index or its files' headers;
    empty where it holds no safetensors."""
    if (folder / INDEX_NAME).exists():
        return read_index(folder / INDEX_NAME)["weight_map"]
    return {
        tensor.name: file.name for file in sorted(folder.glob("*.safetensors")) for tensor in read_shard(file).tensors
    }
