"""The one way to write: beside the name, under a temporary one, and renamed when whole. And the one
way from a name that a file holds to a path (`inside`), because somebody else may have written it.

So a file or a directory that semmoe writes is there whole or not at all, whatever stops the run,
and a reader never sees half of one.
"""

import fcntl
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from semmoe.profiles.errors import InputError

LONGEST_NAME = 255  # bytes, of Linux file systems
UNFIT = re.compile(r"[\0-\x1f\x7f\\]")  # control characters; and what is a separator elsewhere
BLOB = re.compile(r"(models|datasets|spaces)--[^/]+/blobs/([0-9a-f]{40}|[0-9a-f]{64})")  # a file of the hub's cache


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


def wrong_name(name: object, *, folders: int = 0, ending: str = "") -> str:
    """What is wrong with a name that a file holds, in words; "" where nothing is.

    Parameters:
        name: what stands there, of any type.
        folders: how many folders may stand before the file's own name.
        ending: how it must end.
    """
    if not isinstance(name, str) or not name:
        return "expected a name"
    parts = name.split("/")
    if name.startswith("/"):
        return "a name inside the directory was expected, this one is absolute"
    if any(part in ("", ".", "..") for part in parts) or len(parts) > folders + 1:
        within = "a single name" if not folders else f"a name below at most {folders} folders"
        return f"expected {within}, without '..'"
    if UNFIT.search(name):
        return "expected a name without control characters and backslashes"
    if any(len(part.encode(errors="replace")) > LONGEST_NAME for part in parts):
        return f"expected a name of at most {LONGEST_NAME} bytes"
    return "" if name.endswith(ending) else f"expected a name that ends in {ending}"


def inside(folder: Path, name: object, where: str, *, folders: int = 0, ending: str = "") -> Path:
    """The path of a file of `folder` by the name that a file of somebody else gives it.

    Parameters:
        folder: what the path may not leave.
        name: what stands in the file.
        where: file and key that hold the name, for the message.
        folders, ending: as `wrong_name` takes them.

    Raises InputError for any other name (`wrong_name`), and where that is there already as a
    directory, a device, a pipe, or a link out of the folder; a link to the hub cache's own blobs
    passes. A name of nothing passes: who reads it says what is missing.
    """
    if wrong := wrong_name(name, folders=folders, ending=ending):
        raise InputError(f"{where} is {shortened(name)}: {wrong}")
    path = folder / str(name)
    if wrong := wrong_file(folder, path):
        raise InputError(f"{where} is {shortened(name)}: {path} is {wrong}")
    return path


def wrong_file(folder: Path, path: Path) -> str:
    """What keeps a path below `folder` from being read as its file, in words; "" for nothing."""
    try:
        mode = path.stat().st_mode
    except OSError:  # nothing there, also at the end of a link
        mode = stat.S_IFREG
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        return f"{kinds.get(stat.S_IFMT(mode), 'a device')}, expected a file"
    target, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if target.is_relative_to(home) or BLOB.fullmatch("/".join(target.parts[-3:])):
        return ""
    return f"a link out of {folder} (to {target}), expected a file in it"


def shortened(value: object) -> str:
    """A value as messages show it: on one line, not long."""
    text = ascii(value) if not isinstance(value, list | dict) else type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."
