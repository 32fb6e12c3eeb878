"""The one way to write: beside the name, under a temporary one, and renamed when whole.

So a file or a directory that semmoe writes is there whole or not at all, whatever stops the run,
and a reader never sees half of one.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from semmoe.profiles.errors import InputError


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to fill; at the end of the block it becomes `path`, in place of what had that name.

    After an exception nothing is left of it. Raises InputError where it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_file(path: Path, content: bytes | str) -> None:
    """A whole file: bytes, or text in UTF-8. Raises InputError as `new_file` does."""
    with new_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def new_directory(path: Path, *, what: str = "", lock: bool = False) -> Iterator[Path]:
    """A directory to fill; at the end of the block it becomes `path`, in place of what had that
    name.

    After an exception nothing is left of it. `what`: what is written, for the message. With `lock`
    one run at a time writes `path`, and what a killed run left is removed. Raises InputError where
    it cannot be written.
    """
    process = "" if lock else f".{os.getpid()}"
    folder, replaced = (path.with_name(f".{path.name}{process}.{end}") for end in ("partial", "replaced"))
    held = -1
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if lock:
            held = _lock(folder / ".lock", path)
        for left in folder.iterdir():
            if left.name != ".lock":
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield folder
            if lock:
                (folder / ".lock").unlink()
            shutil.rmtree(replaced, ignore_errors=True)
            if path.exists():
                path.rename(replaced)  # not deleted first: whatever stops us here, one of the two is whole
            folder.rename(path)
            shutil.rmtree(replaced, ignore_errors=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        # A full disk is told of a descriptor, without a name.
        # A name in the folder says nothing: it is gone.
        here = not error.filename or Path(str(error.filename)).is_relative_to(folder)
        where = "" if here else f" ({error.filename})"
        raise InputError(f"cannot write {what or path}: {error.strerror or error}{where}") from None
    finally:
        if held >= 0:
            os.close(held)


def _lock(file: Path, path: Path) -> int:
    """An open descriptor that holds the lock of a directory in the making."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(f"another run is writing {path}") from None
    return descriptor
