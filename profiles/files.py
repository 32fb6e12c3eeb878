"""The one way to write: beside the name, under a temporary one, and renamed when whole. And the one
way from a name that a file holds to a path (`inside`), because somebody else may have written it.

So a file or a directory that semmoe writes is there whole or not at all, whatever stops the run,
and a reader never sees half of one. One run at a time writes a name: it holds a lock beside it
from before the first byte until after the rename. What lies under a temporary name is of a killed
run where its lock lies there too, and is removed; without one it is somebody else's.
"""

import errno
import fcntl
import os
import re
import shlex
import shutil
import stat
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from semmoe.profiles.errors import InputError

PAGE_BYTES = 4096
LONGEST_NAME = 255  # bytes, of Linux file systems
KINDS = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}  # else a device
UNFIT = re.compile(r"[\0-\x1f\x7f\\]")  # control characters; and what is a separator elsewhere
BLOB = re.compile(r"(models|datasets|spaces)--[^/]+/blobs/([0-9a-f]{40}|[0-9a-f]{64})")  # a file of the hub's cache
CANNOT_ALLOCATE = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of a file system
LOCK_MARK = "semmoe lock"  # the first line of a lock; the holder's process, start and command follow
LOCK_TRIES_S = 0.2  # others look whether a lock is held by taking it for a moment


class Lock:
    """The right to write `path`, until `release` or the end of the process; a context manager.

    `file` is the lock's own, beside `path` where none is given. `left`: a killed run left it there,
    so what lies under temporary names is that run's. Raises InputError where another run holds it
    (by process and command), and where something else than a lock has its name.
    """

    def __init__(self, path: Path, file: Path | None = None) -> None:
        self._file = file or lock_beside(path)
        try:
            self.left, descriptor = _take(self._file, path)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from None
        self._descriptor = descriptor
        self._close = weakref.finalize(self, os.close, descriptor)

    def release(self) -> None:
        """Remove the lock; the first call does."""
        if not self._close.alive:
            return
        with suppress(OSError):
            if _is_open_file(self._descriptor, self._file):
                self._file.unlink()
        self._close()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *raised: object) -> None:
        self.release()


def lock_beside(path: Path) -> Path:
    """Where the lock of a path lies; of a link, that of what it leads to."""
    path = Path(os.path.realpath(path))
    return path.with_name(f".{path.name}.lock")


def refuse_held(path: Path, file: Path | None = None) -> None:
    """Raise InputError where another run holds the lock of `path`: for callers that want to know
    before long work."""
    try:
        descriptor = os.open(file or lock_beside(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # none, or not one: who takes it says so
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _held(descriptor, path) from None
    except OSError:
        pass
    finally:
        os.close(descriptor)


def _take(file: Path, path: Path) -> tuple[bool, int]:
    """Whether the lock was left there, and an open descriptor that holds it."""
    end, flags = time.monotonic() + LOCK_TRIES_S, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        if file.is_symlink() or (file.exists() and not file.is_file()):
            raise InputError(f"cannot write {path}: {file} is not a lock of semmoe: remove it")
        left = False
        try:
            descriptor = os.open(file, flags | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            try:
                left, descriptor = True, os.open(file, flags)
            except FileNotFoundError:  # released meanwhile
                continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_open_file(descriptor, file):  # removed by its holder before it let go
                os.close(descriptor)
                continue
            if (before := os.pread(descriptor, 64, 0)) and not before.startswith(LOCK_MARK.encode()):
                raise InputError(f"cannot write {path}: {file} is not a lock of semmoe: remove it")
            command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) if sys.argv else ""
            facts = [LOCK_MARK, str(os.getpid()), time.strftime("%Y-%m-%d %H:%M:%S"), ascii(command)[1:-1]]
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, "\n".join(facts).encode(), 0)
        except BlockingIOError:
            if time.monotonic() > end:
                held = _held(descriptor, path)
                os.close(descriptor)
                raise held from None
            os.close(descriptor)
            time.sleep(0.01)
        except BaseException:
            os.close(descriptor)
            if not left:
                with suppress(OSError):
                    file.unlink()
            raise
        else:
            return left, descriptor


def _is_open_file(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(file))
    except FileNotFoundError:
        return False


def _held(descriptor: int, path: Path) -> InputError:
    """Who writes `path`, as far as its lock says."""
    facts = os.pread(descriptor, 4096, 0).decode(errors="replace").split("\n")
    if len(facts) < 4 or facts[0] != LOCK_MARK:
        return InputError(f"another run is writing {path}")
    process, since, command = (ascii(fact)[1:-1].replace("\\\\", "\\") for fact in facts[1:4])
    command = command if len(command) <= 200 else f"{command[:197]}..."
    return InputError(f"another run is writing {path}: process {process} since {since}, {command}")


def _remove_left(temporary: Path, lock: Lock, path: Path) -> None:
    """Remove what a killed run left. Raises InputError for what is not its."""
    if not os.path.lexists(temporary):
        return
    if not lock.left or temporary.is_symlink():
        raise InputError(f"cannot write {path}: {_foreign(temporary)}")
    shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()


def _foreign(temporary: Path) -> str:
    kind = "a link" if temporary.is_symlink() else "a directory" if temporary.is_dir() else "a file"
    return f"{temporary} is {kind} that semmoe did not leave there: move it away"


def check_file_target(path: Path) -> None:
    """Raise InputError where a directory, a device or a pipe has the name of a file to write, also
    at the end of a link: for callers that want to know before long work."""
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a directory")
    if path.exists() and not path.is_file():
        raise InputError(f"cannot write {path}: it is neither a file nor absent")


def allocate(descriptor: int, size: int) -> None:
    """Make an open file `size` bytes long, on blocks that are its own. Raises OSError where the
    disk has no room; where the file system cannot promise any, the file is sparse."""
    if not size:
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in CANNOT_ALLOCATE:
            raise
        os.truncate(descriptor, size)


def write_by_pages(descriptor: int, content: memoryview) -> None:
    """Write bytes to an open file a page at a time. Raises OSError.

    For a longer write a system looks for memory of many pages that lie together, and a virtual
    machine may have to ask for each: thirty times as long (docs/experiments.md).
    """
    at = 0
    while at < len(content):
        at += os.write(descriptor, content[at : at + PAGE_BYTES])


@contextmanager
def new_file(path: Path, *, lock: Lock | None = None) -> Iterator[BinaryIO]:
    """A file to fill; at the end of the block it becomes `path`, in place of what had that name; of
    a link, in place of what it leads to.

    After an exception nothing is left of it. `lock`: what the caller holds of the directory; by
    default the file has one of its own. Raises InputError where it cannot be written, or another
    run writes it.
    """
    real = Path(os.path.realpath(path))
    check_file_target(path)
    temporary = real.with_name(f".{real.name}.tmp")
    held = lock or Lock(path)
    made = False
    try:
        _remove_left(temporary, held, path)
        with temporary.open("xb") as file:  # x follows no link
            made = True
            yield file
        temporary.replace(real)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        if made:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        if lock is None:
            held.release()


def write_file(path: Path, content: bytes | str, *, lock: Lock | None = None) -> None:
    """A whole file: bytes, or text in UTF-8. Raises InputError as `new_file` does."""
    with new_file(path, lock=lock) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def check_directory_target(path: Path, *, what: str = "") -> None:
    """Raise InputError where `new_directory` could not write `path`, for callers that want to know
    before long work.

    That is where the directory above it is missing or closed, where it is no directory, where it
    holds the current directory or a mount point, where another run writes it, and where something
    else has the temporary name. `what`: what is written, for the message.
    """
    real = Path(os.path.realpath(path))
    if real.exists() and not real.is_dir():
        raise InputError(f"cannot write {what or path}: it is there and is no directory")
    if real == (here := Path(os.path.realpath("."))) or real in here.parents or os.path.ismount(real):
        raise InputError(
            f"{path} is a mount point or the current directory, which cannot be replaced: name one inside it"
        )
    if not os.access(real.parent, os.W_OK | os.X_OK):
        why = "cannot be written to" if real.parent.is_dir() else "does not exist"
        raise InputError(f"cannot write {what or path}: the directory {real.parent} {why}")
    refuse_held(path)
    for temporary in _temporary_directories(real):
        if temporary.is_symlink() or (os.path.lexists(temporary) and not lock_beside(path).exists()):
            raise InputError(f"cannot write {path}: {_foreign(temporary)}")


def _temporary_directories(real: Path) -> tuple[Path, Path]:
    """What is filled, and what held the name before."""
    return real.with_name(f".{real.name}.partial"), real.with_name(f".{real.name}.replaced")


@contextmanager
def new_directory(path: Path, *, what: str = "") -> Iterator[Path]:
    """A directory to fill; at the end of the block it becomes `path`, in place of what had that
    name; of a link, in place of what it leads to.

    After an exception nothing is left of it. `what`: what is written, for the message. One run at a
    time writes `path`, and what a killed run left is removed. Raises InputError where it cannot be
    written (`check_directory_target`).
    """
    real = Path(os.path.realpath(path))
    folder, replaced = _temporary_directories(real)
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        check_directory_target(path, what=what)
        with Lock(path) as lock:
            if lock.left and replaced.is_dir() and not replaced.is_symlink() and not os.path.lexists(real):
                replaced.rename(real)  # killed between the two renames
            for temporary in (folder, replaced):
                _remove_left(temporary, lock, path)
            folder.mkdir()
            try:
                yield folder
                if real.exists():
                    real.rename(replaced)  # not deleted first: whatever stops us here, one of the two is whole
                folder.rename(real)
                shutil.rmtree(replaced, ignore_errors=True)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        # A full disk is told of a descriptor, without a name.
        # A name in the folder says nothing: it is gone.
        here = not error.filename or Path(str(error.filename)).is_relative_to(folder)
        where = "" if here else f" ({error.filename})"
        raise InputError(f"cannot write {what or path}: {error.strerror or error}{where}") from None


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


def open_file(path: str | Path) -> BufferedReader:
    """A file for reading its bytes. Raises OSError as `open` does, and for what is no file: a pipe
    would be waited for, a device may never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(mode := os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"it is {KINDS.get(stat.S_IFMT(mode), 'a device')}, expected a file")
    return open(descriptor, "rb")


def wrong_file(folder: Path, path: Path) -> str:
    """What keeps a path below `folder` from being read as its file, in words; "" for nothing."""
    try:
        mode = path.stat().st_mode
    except OSError:  # nothing there, also at the end of a link
        mode = stat.S_IFREG
    if not stat.S_ISREG(mode):
        return f"{KINDS.get(stat.S_IFMT(mode), 'a device')}, expected a file"
    target, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if target.is_relative_to(home) or BLOB.fullmatch("/".join(target.parts[-3:])):
        return ""
    return f"a link out of {folder} (to {target}), expected a file in it"


def shortened(value: object) -> str:
    """A value as messages show it: on one line, not long."""
    text = ascii(value) if not isinstance(value, list | dict) else type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."
