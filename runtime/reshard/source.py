"""A checkpoint as bytes on disk: safetensors headers, the index, and the other files; tensors are
never loaded."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semmoe.profiles.errors import InputError
from semmoe.profiles.files import wrong_file
from semmoe.profiles.safetensors_file import INDEX_NAME, Shard, Tensor, read_index, read_shard

# Weights in other formats: a copy of them beside permuted tensors would be another model under the
# same name.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5", ".ckpt", ".ot", ".npz")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint directory: its safetensors files, its index (None for a single file), all
    else by name."""

    path: Path
    shards: tuple[Shard, ...]
    index: dict[str, Any] | None
    others: tuple[str, ...]  # relative paths of the files that are carried over as they are
    left_out: tuple[str, ...]  # relative paths of weights in other formats, links out of the checkpoint, devices

    def selects(self, shard: Shard, tensor: Tensor) -> bool:
        """Whether a loader reads this tensor: the index decides where there is one."""
        return self.index is None or self.index["weight_map"].get(tensor.name) == shard.name

    def selected(self) -> Iterator[tuple[Shard, Tensor]]:
        """The tensors that a loader reads, each with its file."""
        return ((shard, tensor) for shard in self.shards for tensor in shard.tensors if self.selects(shard, tensor))

    def unselected_notes(self) -> tuple[str, ...]:
        """One line for every file with tensors that the index does not select."""
        notes = []
        for shard in self.shards:
            if names := [tensor.name for tensor in shard.tensors if not self.selects(shard, tensor)]:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                notes.append(
                    f"{shard.name}: {INDEX_NAME} does not select {names[0]}{more}; carried along with the file"
                )
        return tuple(notes)

    @property
    def num_bytes(self) -> int:
        return sum(shard.size for shard in self.shards)

    @property
    def other_bytes(self) -> int:
        """Bytes of what copy_others copies."""
        return sum(path.stat().st_size for name in self.others if (path := self.path / name).exists())


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the headers and the index of a checkpoint directory.

    Raises InputError where there is none, a shard of the index is missing, or index and headers
    disagree.
    """
    if not path.is_dir():
        raise InputError(f"{path} is not a directory: expected a checkpoint with safetensors files")
    index = read_index(path / INDEX_NAME) if (path / INDEX_NAME).exists() else None
    listed = sorted(set(index["weight_map"].values())) if index else []
    for name in listed:
        if "/" in name or not name.endswith(".safetensors") or not (path / name).exists():
            raise InputError(f"{path / name} is missing: {INDEX_NAME} names it, the checkpoint is not complete")
    found = sorted(p.name for p in path.glob("*.safetensors"))
    if not found:
        raise InputError(f"{path} holds no safetensors file: other weight formats cannot be resharded")
    shards = tuple(read_shard(path / name) for name in found)
    if not index:
        check_names(shards, path)
    else:
        check_index(index["weight_map"], {shard.name: shard for shard in shards}, path)
    others, left_out = other_files(path)
    return Checkpoint(path, shards, index, others, left_out)


def check_names(shards: tuple[Shard, ...], path: Path) -> None:
    """Raise InputError where a tensor is in two files and no index says which of them counts."""
    found: dict[str, str] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if found.setdefault(tensor.name, shard.name) != shard.name:
                raise InputError(f"the tensor {tensor.name} is in {found[tensor.name]} and in {shard.name} of {path}")


def check_index(weight_map: dict[str, str], shards: dict[str, Shard], path: Path) -> None:
    """Raise InputError unless every tensor of the index lies in the file that the index names."""
    names = {shard: {tensor.name for tensor in shards[shard].tensors} for shard in set(weight_map.values())}
    for key, shard in weight_map.items():
        if key not in names[shard]:
            raise InputError(f"{path / shard} lacks the tensor {key} that {INDEX_NAME} expects in it")


def other_files(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Relative paths of the files to carry over, and of what is not: weights in other formats or
    places, links to directories and out of the checkpoint, pipes and devices.

    Raises InputError where config.json is such a link: without it nothing can load the output.
    """
    others, left_out = [], []
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
        left_out += [
            os.path.relpath(os.path.join(folder, f), path) for f in folders if os.path.islink(os.path.join(folder, f))
        ]
        for name in sorted(names):
            relative = os.path.relpath(os.path.join(folder, name), path)
            weights = name.endswith(WEIGHT_SUFFIXES) or name.endswith((".safetensors.index.json", ".bin.index.json"))
            if name.startswith(".") or relative == INDEX_NAME or (relative == name and name.endswith(".safetensors")):
                continue
            foreign = "" if weights else wrong_file(path, Path(folder, name))
            if foreign and relative == "config.json":
                raise InputError(f"{path / relative} is {foreign}")
            (left_out if weights or foreign else others).append(relative)
    return tuple(others), tuple(left_out)


def copy_others(source: Checkpoint, target: Path, *, skip: tuple[str, ...] = ()) -> None:
    """Carry over config, tokenizer, generation config, custom code and whatever else is not
    weights."""
    for name in source.others:
        if name not in skip:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copyfile(source.path / name, target / name)
            except FileNotFoundError:
                raise InputError(f"{source.path / name} is a link to nothing: the checkpoint is not complete") from None
