"""A directory that appears whole or not at all.

It is filled as `.NAME.partial` beside its name and renamed at the end. A lock in it tells a run
that is going on from what a killed run left: the latter is removed and written afresh.
"""

import fcntl
import json
import os
import shutil
from pathlib import Path
from types import TracebackType

from semmoe.profiles.errors import InputError

SPARE_BYTES = 32 << 20  # room for configs, indices and the sidecar


class OutputDirectory:
    """Context manager: fill `partial`, then call `finish`. Without it, or after an error, nothing
    is left.

    `marker`: the file by which a directory that `force` may replace is known. `source` is what is
    being read.
    """

    def __init__(self, out: Path, source: Path, *, marker: str, force: bool) -> None:
        self.out = out.resolve()  # of a link to a directory, the directory: the disk that its owner chose
        self.partial = self.out.with_name(f".{self.out.name}.partial")
        self.lock = self.partial / ".lock"
        self.descriptor = -1
        self.finished = False
        check_target(self.out, source, marker=marker, force=force)

    def __enter__(self) -> "OutputDirectory":
        try:
            self.partial.mkdir(exist_ok=True)
            self.descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT)
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self.descriptor)
            raise InputError(f"another run is writing {self.out}") from None
        except OSError as error:
            raise InputError(f"cannot write {self.out}: {error.strerror}") from None
        for left in self.partial.iterdir():
            if left != self.lock:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.finished:
            shutil.rmtree(self.partial, ignore_errors=True)
        os.close(self.descriptor)
        if isinstance(error, OSError):
            # A full disk is told of a descriptor, without a name.
            where = f" ({error.filename})" if error.filename else ""
            raise InputError(f"cannot write {self.out}: {error.strerror or error}{where}") from None

    def finish(self) -> None:
        """Give the directory its name; what had it before goes."""
        self.lock.unlink()
        replaced = self.out.with_name(f".{self.out.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if self.out.exists():
            self.out.rename(replaced)
        self.partial.rename(self.out)
        self.finished = True
        shutil.rmtree(replaced, ignore_errors=True)


def check_target(out: Path, source: Path, *, marker: str, force: bool) -> None:
    """Raise InputError where writing `out` would overwrite something else or touch the source."""
    here, there = out.resolve(), source.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise InputError(f"{out} and {source} lie in each other: choose another name")
    if not out.parent.is_dir():
        raise InputError(f"cannot write {out}: the directory {out.parent} does not exist")
    if not out.exists():
        return
    if os.path.ismount(out) or os.path.samefile(out, "."):
        raise InputError(
            f"{out} is a mount point or the current directory, which cannot be replaced: name one inside it"
        )
    if out.is_dir() and not any(out.iterdir()):
        return
    if not force:
        raise InputError(f"{out} is there already: choose another name, or replace it with --force")
    if not (out / marker).is_file():
        raise InputError(f"{out} holds no {marker}: --force replaces only what semmoe wrote")
    try:
        if not json.loads((out / marker).read_text(encoding="utf-8"))["format"].startswith("semmoe-"):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{out / marker} is not one of semmoe's: --force replaces only what semmoe wrote") from None


def check_space(directory: Path, num_bytes: int) -> None:
    """Raise InputError where the disk has no room for `num_bytes` more."""
    free = shutil.disk_usage(directory).free
    if free < num_bytes + SPARE_BYTES:
        raise InputError(
            f"the disk of {directory.parent} has {free / 1e9:.2f} GB free, {(num_bytes + SPARE_BYTES) / 1e9:.2f} GB are needed"
        )
