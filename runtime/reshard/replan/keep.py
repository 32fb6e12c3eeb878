"""Files of a reshard that stay as they are: linked into the new one, or copied."""

import os
from pathlib import Path

from semmoe.profiles.safetensors_file import Shard
from semmoe.runtime.reshard.copy import FilePlan, Piece


def can_link(file: Path, folder: Path) -> bool:
    """Whether `file` can be linked into `folder`: the same file system, which has hard links."""
    probe = folder / ".link"
    try:
        os.link(file.resolve(), probe)
    except OSError:
        return False
    probe.unlink()
    return True


def kept_file(name: str, shard: Shard, *, link: bool) -> FilePlan:
    """The file as it is, as `name` of the output."""
    if link:
        return FilePlan(name, b"", shard.size, (), shard.path)
    with shard.path.open("rb") as file:
        header = file.read(shard.header_bytes)
    rest = Piece(shard.path, shard.header_bytes, shard.header_bytes, shard.size - shard.header_bytes)
    return FilePlan(name, header, shard.size, (rest,) if rest.num_bytes else ())
