"""Where a reshard may be written: not over something else, not where the disk has no room."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from semmoe.profiles.document import parse_json, read_bounded
from semmoe.profiles.errors import InputError
from semmoe.profiles.files import check_directory_target, new_directory

SPARE_BYTES = 32 << 20  # room for configs, indices and the sidecar


@contextmanager
def output_directory(out: Path, source: Path, *, marker: str, force: bool) -> Iterator[Path]:
    """A directory to fill that becomes `out`, of one run at a time.

    `source` is what is being read, `marker` the file by which a directory that `force` may replace
    is known. Raises InputError as check_target and new_directory do.
    """
    check_target(out, source, marker=marker, force=force)
    with new_directory(out) as folder:
        yield folder


def check_target(out: Path, source: Path, *, marker: str, force: bool) -> None:
    """Raise InputError where writing `out` would overwrite something else or touch the source."""
    here, there = out.resolve(), source.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise InputError(f"{out} and {source} lie in each other: choose another name")
    if not out.parent.is_dir():
        raise InputError(f"cannot write {out}: the directory {out.parent} does not exist")
    check_directory_target(out)
    if not out.exists():
        return
    if out.is_dir() and not any(out.iterdir()):
        return
    if not force:
        raise InputError(f"{out} is there already: choose another name, or replace it with --force")
    if not (out / marker).is_file():
        raise InputError(f"{out} holds no {marker}: --force replaces only what semmoe wrote")
    try:
        if not parse_json(read_bounded(out / marker))["format"].startswith("semmoe-"):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{out / marker} is not one of semmoe's: --force replaces only what semmoe wrote") from None


def check_space(directory: Path, num_bytes: int) -> None:
    """Raise InputError where the disk has no room for `num_bytes` more."""
    free = shutil.disk_usage(directory).free
    if free < num_bytes + SPARE_BYTES:
        raise InputError(
            f"the disk of {directory.parent} has {free / 1e9:.2f} GB free, {(num_bytes + SPARE_BYTES) / 1e9:.2f} GB are needed"
        )
