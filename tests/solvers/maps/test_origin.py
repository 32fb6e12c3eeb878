"""A map and the file beside it are one: an unfinished write leaves both as they were."""

import json
import resource
from pathlib import Path

import pytest

from semmoe.profiles.document import indented
from semmoe.profiles.errors import InputError
from semmoe.profiles.files import write_file
from semmoe.profiles.trace import hash_file
from semmoe.solvers.maps.origin import FORMAT, VERSION, exported_from, sidecar_path, write_pair


def origin(path: Path, content: bytes, plan: str) -> dict:
    write_file(path.with_name("scratch"), content)
    facts = {"format": FORMAT, "version": VERSION, "made_by": "test", "kind": "sglang"}
    facts |= {"sha256": hash_file(path.with_name("scratch")), "plan": plan, "ranks": 2, "nodes": 1, "slots": 8}
    path.with_name("scratch").unlink()
    return facts | {"model": {}, "trace": {}}


def pair(path: Path) -> tuple[bytes, bytes]:
    return path.read_bytes(), sidecar_path(path).read_bytes()


def test_a_map_has_its_own_origin_at_every_moment(tmp_path: Path) -> None:
    path, old, new = tmp_path / "map.json", b"old map", b"new map"
    write_pair(path, old, origin(path, old, "a"))
    assert exported_from(path) == origin(path, old, "a")
    before = pair(path)
    # As a kill leaves it between the two renames, and after the second.
    write_file(sidecar_path(path), indented(origin(path, new, "b") | {"replaces": origin(path, old, "a")}))
    assert exported_from(path) == origin(path, old, "a")
    write_file(path, new)
    assert exported_from(path) == origin(path, new, "b")
    write_file(path, b"by hand")
    assert exported_from(path) is None
    write_pair(path, old, origin(path, old, "a"))
    assert pair(path) == before and sorted(p.name for p in tmp_path.iterdir()) == ["map.json", "map.json.semmoe.json"]
    sidecar_path(path).write_text(json.dumps(origin(path, new, "b") | {"replaces": {"sha256": 3}}))
    with pytest.raises(InputError, match="map.json.semmoe.json: replaces: it lacks the key"):
        exported_from(path)


def test_a_full_disk_leaves_the_pair_as_it_was(tmp_path: Path) -> None:
    path, old, new = tmp_path / "map.json", b"old map", b"new map" * 1000
    facts, limit = origin(path, new, "b"), resource.getrlimit(resource.RLIMIT_FSIZE)
    write_pair(tmp_path / "other.json", old, origin(path, old, "a"))
    write_pair(path, old, origin(path, old, "a"))
    before = pair(path)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limit[1]))  # the map is larger
        for target in (path, tmp_path / "fresh.json"):
            with pytest.raises(InputError, match="^cannot write .*json: File too large"):
                write_pair(target, new, facts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert pair(path) == before and not list(tmp_path.glob("fresh*")) and not list(tmp_path.glob(".*"))
