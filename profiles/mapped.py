"""Large arrays in a temporary file that this process and its workers map: one copy in memory,
however many look at it.

A worker process that is sent an array gets a copy of it; one that is sent a `MappedView` maps the
same pages of the file, and a view's own strides go along. Where the system allows it (/proc) the
file has no name, so nothing is left even by a kill.
"""

import errno
import os
import shutil
import tempfile
import weakref
from typing import NamedTuple

import numpy as np

from semmoe.profiles.errors import InputError
from semmoe.profiles.files import write_by_pages

SMALL_BYTES = 32_000_000  # arrays up to this size stay in memory
ZEROS = 2**20  # bytes of them that are made at a time


class MappedView(NamedTuple):
    """Where an array lies in a file: what `open_view` needs."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int  # bytes of the file before the first element


def mapped_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array to fill, zeros at first: mapped from a temporary file that goes when the array does,
    or in memory where it is small.

    Its blocks are written: a page of a file that the disk has no block for ends the process when it
    is written (SIGBUS), and it maps pages that were written ten times as fast as blocks that were
    allocated. Raises InputError where the temporary directory has no room for it.
    """
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if size <= SMALL_BYTES:
        return np.zeros(shape, dtype)
    directory = tempfile.gettempdir()
    descriptor, name = tempfile.mkstemp(prefix="semmoe-", dir=directory)
    path = f"/proc/{os.getpid()}/fd/{descriptor}"
    if os.path.exists(path):
        os.unlink(name)
    else:
        path = name
    try:
        if size > shutil.disk_usage(directory).free:  # known without filling the disk first
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for left in range(size, 0, -ZEROS):
            write_by_pages(descriptor, memoryview(bytes(min(left, ZEROS))))
    except OSError as error:
        _remove(descriptor, name if path == name else None)
        raise InputError(
            f"{directory} has no room for {size // 2**20} MiB of routing ({error.strerror}): set TMPDIR to a larger place"
        ) from None
    array = np.memmap(path, dtype, mode="r+", shape=shape)
    weakref.finalize(array, _remove, descriptor, name if path == name else None)
    return array


def mapped_copy(array: np.ndarray) -> np.ndarray:
    """The array itself where it is mapped or small; otherwise a copy that workers can map."""
    if view_of(array) is not None or array.nbytes <= SMALL_BYTES:
        return array
    copy = mapped_empty(array.shape, array.dtype)
    copy[...] = array
    return copy


def _remove(descriptor: int, name: str | None) -> None:
    os.close(descriptor)
    if name is not None:
        os.unlink(name)


def view_of(array: np.ndarray) -> MappedView | None:
    """Where the array lies in a mapped file; None where it is in memory."""
    base = array
    while base is not None and not (isinstance(base, np.memmap) and not isinstance(base.base, np.ndarray)):
        base = base.base if isinstance(base, np.ndarray) else None
    if base is None:
        return None
    offset = array.__array_interface__["data"][0] - base.__array_interface__["data"][0]
    return MappedView(str(base.filename), array.dtype.str, array.shape, array.strides, int(base.offset + offset))


def open_view(view: MappedView, *, writable: bool = False) -> np.ndarray:
    """The same elements, read-only unless they are to be filled."""
    # A transposed or sliced view may end before the file does, but never reaches beyond it.
    flat = np.memmap(view.path, np.uint8, mode="r+" if writable else "r")
    return np.ndarray(view.shape, np.dtype(view.dtype), flat, view.offset, view.strides)
