"""semmoe.json beside a resharded checkpoint: what was done, and what is needed to take it back; for
layout "ranks" also semmoe-source.json, the headers of the source.

It names the plan, the permutation of each layer, and for every safetensors file the hash of the
source's header, the hash of the written one and checksums of the written data. Nothing in it
depends on the time or the machine.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from semmoe.profiles.document import (
    MAX_JSON_BYTES,
    SHA256,
    anything,
    line_per_key,
    list_of,
    map_of,
    null_or,
    one_of,
    parse_json,
    read_bounded,
    record,
    text,
    validate,
)
from semmoe.profiles.errors import InputError
from semmoe.profiles.files import inside, shortened, wrong_name
from semmoe.profiles.numbering import FORMAT, HEADER_BYTES, SIDECAR, VERSION, hash_facts, read_reshard
from semmoe.profiles.progress import Stages
from semmoe.profiles.safetensors_file import INDEX_NAME, Shard, parse_index, read_shard
from semmoe.runtime.reshard.copy import FilePlan, Written, checksums, run_tasks
from semmoe.runtime.reshard.source import Checkpoint
from semmoe.solvers.plan import Plan

SOURCE_FILE = "semmoe-source.json"
IN_LAYOUT = re.compile(r"(?:shared|rank-\d{3,})/")  # the directories of layout "ranks"

SOURCE = record(
    {
        "format": one_of(f"{FORMAT}-source"),
        "index": null_or(text(MAX_JSON_BYTES)),
        "files": map_of(
            record(
                {"header_bytes": HEADER_BYTES, "metadata": map_of(text()), "tensors": list_of(anything)},
                {"header_sha256": SHA256},
            )
        ),
    }
)


def hash_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def hash_header(shard: Shard) -> str:
    with shard.path.open("rb") as stream:
        return hash_bytes(stream.read(shard.header_bytes))


def plan_facts(plan: Plan) -> dict[str, Any]:
    """What the sidecar keeps of a plan."""
    return {
        "fingerprint": plan.fingerprint,
        "model": plan.model.model,
        "method": plan.method,
        "seed": plan.seed,
        "ranks": plan.topology.num_ranks,
        "nodes": plan.topology.num_nodes,
        "made_by": plan.made_by,
    }


def file_entries(source: Checkpoint, files: Sequence[FilePlan], sums: Mapping[str, list[list[int]]]) -> dict[str, Any]:
    """Hashes of each safetensors file: of the source's header, and of what was written."""
    entries = {}
    for shard, file in zip(source.shards, files, strict=True):
        entry: dict[str, Any] = {
            "bytes": file.size,
            "source_header_bytes": shard.header_bytes,
            "source_header_sha256": hash_header(shard),
        }
        blob = shard.path.resolve().name  # the hub's cache names files by their SHA-256
        if len(blob) == 64 and set(blob) <= set("0123456789abcdef"):
            entry["source_sha256"] = blob
        if file.link:
            entry["linked"] = True
        else:
            entry["header_sha256"] = hash_bytes(file.header)
            entry["checksums"] = sums.get(file.name, [])
        entries[file.name] = entry
    return entries


def header_notes(files: Sequence[FilePlan], source_hashes: Mapping[str, str]) -> tuple[str, ...]:
    """Files whose header could not be restored to the letter, told from the source's; their
    tensors are the same all the same."""
    return tuple(
        f"{file.name}: same tensors, but the header is laid out differently from the original file's"
        for file in files
        if file.name in source_hashes and hash_bytes(file.header) != source_hashes[file.name]
    )


def write_sidecar(target: Path, facts: dict[str, Any]) -> None:
    """One line per key of semmoe.json, so that people find their way, and a hash of all of them
    last."""
    facts = {"format": FORMAT, "version": VERSION, **facts}
    facts["sha256"] = hash_facts(facts)
    (target / SIDECAR).write_text(line_per_key(facts), encoding="utf-8")


def read_sidecar(checkpoint: Path) -> dict[str, Any]:
    """semmoe.json of a reshard. Raises InputError where there is none, it is damaged, or names a
    file that is not one of the reshard: somebody else may have written it."""
    facts, where = read_reshard(checkpoint), checkpoint / SIDECAR
    ranks = facts["layout"] == "ranks"
    for name, entry in facts["files"].items():
        inside(checkpoint, name, f"{where}: a name of 'files'", folders=int(ranks), ending=".safetensors")
        if ranks and not IN_LAYOUT.match(name):
            raise InputError(f"{where}: files[{shortened(name)}]: expected a file of 'shared' or of a rank")
        if not {"linked", "header_sha256"} & entry.keys():
            raise InputError(f"{where}: files[{shortened(name)}] lacks the key 'header_sha256'")
        if any(offset + num_bytes > entry["bytes"] for offset, num_bytes, _ in entry.get("checksums", [])):
            raise InputError(f"{where}: files[{shortened(name)}].checksums are of more than its {entry['bytes']} bytes")
    return facts


def write_source_headers(target: Path, source: Checkpoint) -> str:
    """The headers of the source's files, and its index, from which layout "ranks" is put together
    again; their hash."""
    headers = {
        "format": f"{FORMAT}-source",
        "index": (source.path / INDEX_NAME).read_text(encoding="utf-8") if source.index else None,
        "files": {
            shard.name: {
                "header_bytes": shard.header_bytes,
                "header_sha256": hash_header(shard),
                "metadata": shard.metadata,
                "tensors": [[t.name, t.dtype, list(t.shape), t.begin, t.end] for t in shard.tensors],
            }
            for shard in source.shards
        },
    }
    content = json.dumps(headers).encode()
    (target / SOURCE_FILE).write_bytes(content)
    return hash_bytes(content)


def read_source_headers(checkpoint: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """What write_source_headers wrote. Raises InputError where it cannot be read, or is not what
    the sidecar says."""
    where = checkpoint / SOURCE_FILE
    try:
        content = read_bounded(where)
        headers = parse_json(content, strict=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{where} cannot be read: {error}") from None
    if facts.get("headers_sha256", hash_bytes(content)) != hash_bytes(content):
        raise InputError(f"{where} was changed after it was written")
    validate(headers, SOURCE, str(where))
    for name, entry in headers["files"].items():
        if wrong := wrong_name(name, ending=".safetensors"):
            raise InputError(f"{where}: a name of 'files' is {shortened(name)}: {wrong}")
        if bad := [tensor for tensor in entry["tensors"] if not is_entry(tensor)]:
            raise InputError(
                f"{where}: files.{name}.tensors holds {shortened(bad[0])}, expected [name, type, shape, begin, end]"
            )
    named = {name.rpartition("/")[2]: f"{SIDECAR} names a part of it" for name in facts["files"]}
    if headers.get("index"):
        index = parse_index(headers["index"], f"{where}: index")
        named |= dict.fromkeys(index["weight_map"].values(), "its index names it")
    if missing := sorted(named.keys() - headers["files"].keys()):
        raise InputError(f"{where}: files lacks {shortened(missing[0])}, though {named[missing[0]]}")
    return headers


def is_entry(tensor: object) -> bool:
    """Whether it is a tensor as write_source_headers stores it."""
    if not isinstance(tensor, list) or len(tensor) != 5 or not isinstance(tensor[2], list):
        return False
    numbers = [*tensor[2], *tensor[3:]]
    return all(isinstance(text, str) for text in tensor[:2]) and all(type(n) is int and n >= 0 for n in numbers)


def check_unchanged(checkpoint: Path, facts: dict[str, Any], progress: Stages | None) -> None:
    """Raise InputError where a file is not the one that the sidecar describes."""
    want = {
        (name, *entry[:2]): entry[2] for name, file in facts["files"].items() for entry in file.get("checksums", [])
    }
    for name, file in facts["files"].items():
        path = checkpoint / name
        if not path.exists() or path.stat().st_size != file["bytes"]:
            raise InputError(f"{path} is missing or has another size than when it was written")
        shard = read_shard(path) if "header_sha256" in file else None
        if shard and hash_header(shard) != file["header_sha256"]:
            raise InputError(f"{path} was changed after it was written (its header)")
        if shard and file.get("checksums") and not covers(file["checksums"], shard):
            raise InputError(f"{checkpoint / SIDECAR}: files.{name}.checksums leave out bytes of the file")
    total, done = sum(num_bytes for _, _, num_bytes in want), 0

    def keep(found: Written) -> None:
        nonlocal done
        name, offset, num_bytes, checksum = found
        if want[name, offset, num_bytes] != checksum:
            raise InputError(f"{checkpoint / name} was changed after it was written (bytes from {offset:,} on)")
        done += num_bytes
        if progress:
            progress("checking", done, total)

    tasks = (
        task for name, file in facts["files"].items() for task in checksums(checkpoint, name, file.get("checksums", []))
    )
    run_tasks(tasks, done=keep)


def covers(sums: list[list[int]], shard: Shard) -> bool:
    """Whether checksums are of all bytes behind the header of a file, once."""
    place = shard.header_bytes
    for offset, num_bytes, _ in sorted(sums):
        if offset != place:
            return False
        place += num_bytes
    return place == shard.size
