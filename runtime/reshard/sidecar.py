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

from semmoe.profiles.config import MOST
from semmoe.profiles.document import line_per_key, parse_json, read_bounded
from semmoe.profiles.errors import InputError
from semmoe.profiles.files import inside, shortened, wrong_name
from semmoe.profiles.numbering import FORMAT, SIDECAR, VERSION, hash_facts
from semmoe.profiles.progress import Stages
from semmoe.profiles.safetensors_file import INDEX_NAME, MAX_HEADER_BYTES, Shard, read_shard
from semmoe.runtime.reshard.copy import FilePlan, Written, checksums, run_tasks
from semmoe.runtime.reshard.source import Checkpoint
from semmoe.solvers.placement import EMPTY
from semmoe.solvers.plan import Plan

SOURCE_FILE = "semmoe-source.json"
LAYOUTS = ("permuted", "ranks")
OF_LAYOUT = re.compile(r"(?:shared|rank-\d{3,})/")  # the directories of layout "ranks"


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
    """semmoe.json of a reshard. Raises InputError where there is none, or it is of another kind."""
    where = checkpoint / SIDECAR
    try:
        facts = parse_json(read_bounded(where), strict=True)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{checkpoint} is not a reshard: it holds no {SIDECAR}") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{where} is not JSON: {error}") from None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT or facts.get("version") != VERSION:
        raise InputError(f"{where} is not a {FORMAT} file of version {VERSION}")
    if facts.get("layout") not in LAYOUTS or not isinstance(facts.get("files"), dict):
        raise InputError(f"{where} is damaged: it lacks the layout or the files")
    needed = {
        "permuted": ("plan", "num_experts", "new2old"),
        "ranks": ("plan", "num_experts", "model_layers", "placement"),
    }
    if missing := [key for key in needed[facts["layout"]] if key not in facts]:
        raise InputError(f"{where} is damaged: it lacks {missing[0]}")
    check_files(checkpoint, facts, where)
    check_settings(facts.get("settings", {}), where)
    if not _holds_every_expert(facts):
        raise InputError(f"{where} is damaged: its {needed[facts['layout']][-1]} does not hold every expert")
    if facts.get("sha256", hash_facts(facts)) != hash_facts(facts):
        raise InputError(f"{where} was changed after it was written")
    return facts


def check_files(checkpoint: Path, facts: dict[str, Any], where: Path) -> None:
    """Raise InputError where a file that semmoe.json names is not one of the reshard: somebody else
    may have written it."""
    ranks = facts["layout"] == "ranks"
    for name, entry in facts["files"].items():
        of = f"{where}: files[{shortened(name)}]"
        inside(checkpoint, name, f"{where}: a name of 'files'", folders=int(ranks), ending=".safetensors")
        if ranks and not OF_LAYOUT.match(name):
            raise InputError(f"{of}: expected a file of 'shared' or of a rank")
        if not isinstance(entry, dict):
            raise InputError(f"{of} is {shortened(entry)}, expected an object")
        check_count(entry.get("bytes"), f"{of}.bytes")
        if not ranks:
            check_count(entry.get("source_header_bytes"), f"{of}.source_header_bytes", most=8 + MAX_HEADER_BYTES)


def check_settings(settings: object, where: Path) -> None:
    """Raise InputError unless these are texts of Latin-1 by file name."""
    texts = list(settings.values()) if isinstance(settings, dict) else [None]
    if not all(isinstance(text, str) and max(text, default="") < "\u0100" for text in texts):
        raise InputError(f"{where}: settings is {shortened(settings)}, expected texts by file name")


def check_count(value: object, where: str, most: int = 2**63 - 1) -> None:
    """Raise InputError where a value is not a number of bytes up to `most`."""
    if type(value) is not int or not 0 <= value <= most:
        raise InputError(f"{where} is {shortened(value)}, expected a number of bytes from 0 to {most:,}")


def _holds_every_expert(facts: dict[str, Any]) -> bool:
    """Whether the orders are permutations, and every layer of the placement has all experts."""
    try:
        if type(facts["num_experts"]) is not int or not 0 < facts["num_experts"] <= MOST:
            return False
        experts = list(range(facts["num_experts"]))
        if facts["layout"] == "permuted":
            return all(sorted(order) == experts for order in facts["new2old"].values())
        placed = [sorted({expert for rank in layer for expert in rank} - {EMPTY}) for layer in facts["placement"]]
        return placed == [experts] * len(facts["model_layers"])
    except (TypeError, AttributeError):
        return False


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
    if not isinstance(headers, dict) or not isinstance(headers.get("files"), dict) or not headers["files"]:
        raise InputError(f"{where} is damaged: it lacks the files")
    if not isinstance(headers.get("index"), str | None):
        raise InputError(f"{where}: index is {shortened(headers['index'])}, expected the text of an index or null")
    for name, entry in headers["files"].items():
        of = f"{where}: files[{shortened(name)}]"
        if wrong := wrong_name(name, ending=".safetensors"):
            raise InputError(f"{where}: a name of 'files' is {shortened(name)}: {wrong}")
        if not isinstance(entry, dict) or not isinstance(entry.get("tensors"), list):
            raise InputError(f"{of} is {shortened(entry)}, expected an object with tensors")
        check_count(entry.get("header_bytes"), f"{of}.header_bytes", most=8 + MAX_HEADER_BYTES)
        if not isinstance(entry.get("metadata"), dict):
            raise InputError(f"{of}.metadata is {shortened(entry.get('metadata'))}, expected an object")
        if bad := [tensor for tensor in entry["tensors"] if not is_entry(tensor)]:
            raise InputError(f"{of}.tensors holds {shortened(bad[0])}, expected [name, type, shape, begin, end]")
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
        if "header_sha256" in file and hash_header(read_shard(path)) != file["header_sha256"]:
            raise InputError(f"{path} was changed after it was written (its header)")
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
