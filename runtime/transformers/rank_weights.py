"""Tensors of a rank as Transformers' loader takes them: unread, under the checkpoint's names, so
that its own conversions (fusing, renaming, dequantising) do the rest.

Shape letters: L MoE layers, S slots per rank.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from semmoe.profiles.errors import InputError
from semmoe.runtime.transformers.rank_parts import RankCheckpoint, StoredTensor

DTYPES = {
    **{"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16},
    **{"I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64},
    **{"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu},
    **{"F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "C64": torch.complex64},
}


class UnreadTensor:
    """A tensor of a file, read when it is asked for: a slice of safetensors, as far as the loader
    looks at it."""

    def __init__(self, stored: StoredTensor, file: int) -> None:
        self._stored, self._file = stored, file

    def get_shape(self) -> list[int]:
        return list(self._stored.shape)

    def get_dtype(self) -> str:
        return self._stored.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        stored = self._stored
        values = torch.empty(sum(size for _, size in stored.pieces), dtype=torch.uint8)
        into, place = values.numpy().data, 0
        for offset, size in stored.pieces:
            read_into(into[place : place + size], self._file, offset, stored)
            place += size
        return values.view(DTYPES[stored.dtype]).reshape(stored.shape)[index]


def read_into(into: memoryview, file: int, offset: int, stored: StoredTensor) -> None:
    """Fill `into` from the file at `offset`; safe on many threads. Raises InputError where the
    file is shorter."""
    while into:
        got = os.preadv(file, [into], offset)
        if not got:
            raise InputError(f"{stored.file} ends within {stored.name}: it has been cut short since the run began")
        into, offset = into[got:], offset + got


@contextmanager
def rank_tensors(root: Path, checkpoint: RankCheckpoint) -> Iterator[dict[str, UnreadTensor]]:
    """The tensors of one rank by name, to be read inside the block.

    `root`: where the checkpoint lies on this machine. Raises InputError where a file is not the one
    whose header was read, or holds numbers of a type that PyTorch lacks.
    """
    for stored in checkpoint.tensors:
        if stored.dtype not in DTYPES:
            raise InputError(f"{root / stored.file} holds {stored.name} as {stored.dtype}, which PyTorch cannot read")
    with ExitStack() as opened:
        files = {name: opened.enter_context(open_file(root / name)) for name in checkpoint.bytes_of_file}
        for name, size in checkpoint.bytes_of_file.items():
            if (found := os.fstat(files[name]).st_size) != size:
                raise InputError(f"{root / name} has {found:,} bytes, {size:,} when its header was read")
        yield {stored.name: UnreadTensor(stored, files[stored.file]) for stored in checkpoint.tensors}


@contextmanager
def open_file(path: Path) -> Iterator[int]:
    """A descriptor to read `path` by. Raises InputError where it cannot be read."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    try:
        yield file
    finally:
        os.close(file)


def held_experts(checkpoint: RankCheckpoint, model_layers: tuple[int, ...]) -> np.ndarray:
    """The expert in each slot of this rank, int64 [L, S] in the checkpoint's numbers, as the
    tensors to read say; -1 where none does."""
    held_LS = np.full((len(model_layers), checkpoint.placement.slots_per_rank), -1, np.int64)
    place_of = {number: place for place, number in enumerate(model_layers)}
    for stored in checkpoint.tensors:
        if stored.experts:
            held_LS[place_of[stored.layer], stored.slot : stored.slot + len(stored.experts)] = stored.experts
    return held_LS
