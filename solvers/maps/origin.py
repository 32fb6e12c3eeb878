"""FILE.semmoe.json: where an engine's map came from, beside the map.

No file system renames two files at once, so the map is what counts: what lies beside it is written
first, and tells of the new map and of the one that it replaces until the map has its name. Killed
anywhere, a map is there with its own origin or not at all, and the old one keeps its own.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from semmoe.profiles.document import (
    SHA256,
    anything,
    indented,
    integer,
    list_of,
    map_of,
    read_bounded,
    read_document,
    record,
    text,
    validate,
)
from semmoe.profiles.errors import InputError
from semmoe.profiles.files import Lock, write_file
from semmoe.profiles.trace import hash_file

FORMAT = "semmoe-export"
VERSION = 1
ORIGIN = record(  # of FILE.semmoe.json
    {
        "made_by": text(),
        "kind": text(),
        "sha256": SHA256,
        "plan": text(),
        "ranks": integer(1),
        "nodes": integer(1),
        "slots": integer(1),
        "model": map_of(anything),
        "trace": record({}, {"fingerprints": list_of(text()), "requests": integer(), "tokens": integer()}),
    },
    {"method": text(), "dispatch": text(), "vllm_format": text(), "replaces": map_of(anything)},
)
SIDECAR = ".semmoe.json"


def sidecar_path(path: Path) -> Path:
    return path.with_name(path.name + SIDECAR)


def write_pair(path: Path, content: bytes, origin: dict[str, Any]) -> None:
    """Write a map and its origin. Raises InputError where they cannot be written; then the pair is
    what it was."""
    sidecar = sidecar_path(path)
    with Lock(path) as lock:
        before = old_origin(path) if path.exists() else None
        both = origin if before is None else origin | {"replaces": before}
        write_file(sidecar, indented(both), lock=lock)
        try:
            write_file(path, content, lock=lock)
        except BaseException:
            with suppress(InputError, OSError):
                if before is not None:
                    write_file(sidecar, indented(before), lock=lock)
                elif not path.exists():
                    sidecar.unlink()
            raise
        if before is not None:
            write_file(sidecar, indented(origin), lock=lock)


def old_origin(path: Path) -> dict[str, Any] | None:
    """What the sidecar says of the map that is there; None where that is nothing."""
    try:
        origin = exported_from(path)
    except InputError:
        return None
    return origin if origin and "sha256" in origin else None


def exported_from(file: Path) -> dict[str, Any] | None:
    """What FILE.semmoe.json says of where the file came from, with a trace that is empty where
    there is none; None where it is about other bytes. Raises InputError where it is damaged."""
    sidecar = sidecar_path(file)
    if not os.path.lexists(sidecar):  # a link to nothing is damage
        return {"trace": {}}
    origin = read_document(
        lambda: read_bounded(sidecar),
        str(sidecar.parent),
        sidecar.name,
        kind="sidecar of an engine's map",
        format=FORMAT,
        version=VERSION,
    )
    validate(origin, ORIGIN, str(sidecar))
    digest = hash_file(file)
    if origin["sha256"] != digest and "replaces" in origin:  # killed before the new map had its name
        origin = origin["replaces"]
        validate(origin, ORIGIN, f"{sidecar}: replaces")
    return {key: value for key, value in origin.items() if key != "replaces"} if origin["sha256"] == digest else None
