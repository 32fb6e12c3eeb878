"""What a run compares of a reshard before it serves: the checksums in semmoe.json, each file once
on every machine, by one of the ranks there, while weights are read."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from semmoe.runtime.reshard.ranks import rank_directory
from semmoe.runtime.reshard.sidecar import SIDECAR, check_unchanged, read_sidecar

Entries = dict[str, Any]  # file, relative to the checkpoint -> what semmoe.json says of it


def entries_to_verify(
    path: Path, num_ranks: int, *, wanted: bool, tell: Callable[[str], None]
) -> tuple[list[Entries], bool | None]:
    """What each rank may be asked to compare, by rank (the files of its own directory, and those
    that ranks share), and whether that is all of the checkpoint; nothing and None for a plain one,
    of which no file says what it was.

    `tell` hears of files without checksums, and where nothing is `wanted`.
    """
    if not (path / SIDECAR).is_file():
        return [{}] * num_ranks, None
    if not wanted:
        tell(f"{path} was not compared with its checksums (--no-verify)")
        return [{}] * num_ranks, False
    files = read_sidecar(path)["files"]
    known = {name: entry for name, entry in files.items() if entry.get("checksums")}
    if lacking := len(files) - len(known):
        tell(f"{lacking} of {len(files)} files of {path} were not checked: {SIDECAR} stores no checksums of them")
    own = [f"{rank_directory(rank)}/" for rank in range(num_ranks)]
    shared = {name: entry for name, entry in known.items() if not name.startswith(tuple(own))}
    return [shared | {name: known[name] for name in known if name.startswith(mine)} for mine in own], not lacking


def my_share(entries: Entries, rank: int, local_rank: int, local_size: int) -> Entries:
    """The files that this rank compares: its own, and every local_size-th of the shared ones."""
    own = f"{rank_directory(rank)}/"
    shared = sorted(name for name in entries if not name.startswith(own))
    chosen = {*shared[local_rank::local_size], *(name for name in entries if name.startswith(own))}
    return {name: entries[name] for name in sorted(chosen)}


@contextmanager
def verifying(path: Path, entries: Entries) -> Iterator[None]:
    """Compare files with their checksums beside what the block does. Raises InputError at its end
    where one was changed after it was written."""
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(check_unchanged, path, {"files": entries}, None) if entries else None
        yield
        if found:
            found.result()
