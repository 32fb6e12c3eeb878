"""Layout "ranks": one directory per rank with its experts only, and the rest of the model once.

    OUT/semmoe.json         plan, placement [L][R][S] and model layers, hashes
    OUT/semmoe-source.json  headers of the source: from them it is put together again
    OUT/shared/             config, tokenizer, ...; files of the source's names, all that is not a
                            routed expert; routers and biases stay in the model's own numbering
    OUT/rank-000/ ...       files of the source's names with the experts of that rank (replicas too)

Keys are the source's. A per-expert key keeps the number that the model gives its expert; a fused
tensor holds the rank's experts along its expert axis in slot order. Each directory with more than
one file has an index. A loader reads `shared` and its own rank, numbers the experts of layer l by
their slots in placement[l][rank], and routes with logical ids, so that replicas and grouped routers
are exact.

Shape letters: L MoE layers, R ranks, S slots per rank.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from semmoe.profiles.errors import InputError
from semmoe.profiles.progress import Stages
from semmoe.profiles.safetensors_file import INDEX_NAME, Shard, Tensor, check_offsets, make_header, read_shard
from semmoe.runtime.reshard.copy import FilePlan, Part, Piece, check_parts, merged
from semmoe.runtime.reshard.keys import KEEP, PER_EXPERT, Key, Role, split_key
from semmoe.runtime.reshard.output_directory import check_space, output_directory
from semmoe.runtime.reshard.relabel import block_bytes, classify_checkpoint, read_bytes, total_bytes
from semmoe.runtime.reshard.reshard import ReshardResult, check_plan, copy_others, other_bytes, write_all
from semmoe.runtime.reshard.sidecar import (
    SIDECAR,
    check_unchanged,
    hash_bytes,
    header_notes,
    plan_facts,
    write_sidecar,
)
from semmoe.runtime.reshard.source import Checkpoint, open_checkpoint
from semmoe.solvers.plan import Plan

SOURCE_FILE = "semmoe-source.json"
SHARED = "shared"

Slots = Mapping[int, np.ndarray]  # model layer -> experts of a rank in slot order


def rank_directory(rank: int) -> str:
    return f"rank-{rank:03d}"


def write_ranks(
    checkpoint: Path,
    plan: Plan,
    out: Path,
    *,
    link: bool,
    verify: str,
    force: bool,
    made_by: str,
    progress: Stages | None,
) -> ReshardResult:
    """Write the layout above. Raises InputError where the plan is for another model or a file is
    damaged."""
    source = open_checkpoint(checkpoint)
    model = check_plan(source, plan)
    layers, experts_LRS = plan.model.model_layers, plan.placement.experts_LRS
    keys = classify_checkpoint(source, model, set(layers))
    slots = [dict(zip(layers, experts_LRS[:, rank], strict=True)) for rank in range(plan.placement.num_ranks)]
    files = split_files(source, keys, slots, model.num_experts, link=link)
    with output_directory(out, source.path, marker=SIDECAR, force=force) as folder:
        check_space(folder, total_bytes(files) + other_bytes(source))
        (folder / SHARED).mkdir()
        copy_others(source, folder / SHARED, skip=())
        sums = write_all(files, folder, verify=verify, progress=progress)
        write_indices(files, folder)
        if verify != "none":
            expected = written_parts(source, keys, slots, model.num_experts, files, folder)
            for file in files:
                if not file.link:
                    check_parts(folder / file.name, expected[file.name], file.parts)
        headers = json.dumps(source_headers(source)).encode()
        (folder / SOURCE_FILE).write_bytes(headers)
        facts = {
            "layout": "ranks",
            "plan": plan_facts(plan),
            "made_by": made_by,
            "num_experts": model.num_experts,
            "model_layers": list(layers),
            "placement": experts_LRS.tolist(),
            "headers_sha256": hash_bytes(headers),
            "files": {f.name: written_entry(f, sums.get(f.name, [])) for f in files},
        }
        write_sidecar(folder, facts)
    home = np.arange(model.num_experts) // max(1, model.num_experts // plan.placement.num_ranks)
    moved = int((home[experts_LRS] != np.arange(plan.placement.num_ranks)[None, :, None]).sum())
    linked = sum(file.size for file in files if file.link)
    return ReshardResult(
        str(out), "ranks", len(layers), moved, len(files), total_bytes(files), linked, verify, None, source.left_out
    )


def is_expert(key: Key) -> bool:
    """Whether a tensor goes to the ranks."""
    return key.role is Role.EXPERT or (key.role is Role.ROWS and not key.router)


def split_files(
    source: Checkpoint, keys: Mapping[str, Key], slots: Sequence[Slots], num_experts: int, *, link: bool
) -> list[FilePlan]:
    """The files of `shared` and of every rank."""
    files = []
    for shard in source.shards:
        rest = [tensor for tensor in shard.tensors if not is_expert(keys[tensor.name])]
        if link and len(rest) == len(shard.tensors):
            files.append(FilePlan(f"{SHARED}/{shard.name}", b"", shard.size, (), shard.path))
            continue
        if rest:
            files.append(pack_file(f"{SHARED}/{shard.name}", shard, rest, keys, {}, num_experts))
        for rank, slots_of_layer in enumerate(slots):
            mine = [tensor for tensor in shard.tensors if on_rank(keys[tensor.name], slots_of_layer)]
            if mine:
                files.append(
                    pack_file(f"{rank_directory(rank)}/{shard.name}", shard, mine, keys, slots_of_layer, num_experts)
                )
    return files


def on_rank(key: Key, slots: Slots) -> bool:
    return is_expert(key) and (key.role is Role.ROWS or key.expert in slots[key.layer])


def pack_file(
    name: str, shard: Shard, tensors: Sequence[Tensor], keys: Mapping[str, Key], slots: Slots, num_experts: int
) -> FilePlan:
    """A file with some tensors of a shard, fused ones cut down to the experts of `slots`."""
    packed, sources, place = [], [], 0
    for tensor in tensors:
        key = keys[tensor.name]
        parts = source_parts(shard, tensor, key, slots, num_experts)
        shape = tensor.shape
        if key.role is Role.ROWS and not key.router:
            shape = (shape[0] // num_experts * len(slots[key.layer]), *shape[1:])
        size = sum(part.num_bytes for part in parts)
        packed.append(Tensor(tensor.name, tensor.dtype, shape, place, place + size))
        sources.append(parts)
        place += size
    header = make_header(tuple(packed), shard.metadata)
    laid: list[Part] = []
    for tensor, parts in zip(packed, sources, strict=True):
        laid += lay(parts, len(header) + tensor.begin)
    return FilePlan(name, header, len(header) + place, tuple(merged(laid)))


def source_parts(shard: Shard, tensor: Tensor, key: Key, slots: Slots, num_experts: int) -> list[Piece]:
    """The bytes that a tensor has in a file of the layout, in order; their offsets are set by
    `lay`."""
    begin = shard.header_bytes + tensor.begin
    if key.role is Role.ROWS and not key.router:
        block, _ = block_bytes(tensor, key, num_experts, shard.path)
        return [Piece(shard.path, begin + int(expert) * block, 0, block) for expert in slots[key.layer]]
    return [Piece(shard.path, begin, 0, tensor.num_bytes)]


def lay(parts: Sequence[Piece], offset: int) -> list[Part]:
    """The pieces one after the other from `offset` on."""
    laid: list[Part] = []
    for part in parts:
        laid.append(replace(part, offset=offset))
        offset += part.num_bytes
    return laid


def write_indices(files: Sequence[FilePlan], root: Path) -> None:
    """An index in every directory with more than one safetensors file."""
    for directory in sorted({file.name.split("/")[0] for file in files}):
        shards = [read_shard(root / file.name) for file in files if file.name.split("/")[0] == directory]
        if len(shards) > 1:
            weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
            size = sum(tensor.num_bytes for shard in shards for tensor in shard.tensors)
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
            (root / directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def written_parts(
    source: Checkpoint,
    keys: Mapping[str, Key],
    slots: Sequence[Slots],
    num_experts: int,
    files: Sequence[FilePlan],
    root: Path,
) -> dict[str, list[Part]]:
    """What every written file must hold, told from its own header. Raises InputError where a
    tensor is not anywhere."""
    tensors = {tensor.name: (shard, tensor) for shard in source.shards for tensor in shard.tensors}
    due = {(SHARED, name) for name, key in keys.items() if not is_expert(key)}
    for rank, mine in enumerate(slots):
        due |= {(rank_directory(rank), name) for name, key in keys.items() if on_rank(key, mine)}
    parts: dict[str, list[Part]] = {}
    for file in files:
        directory = file.name.split("/")[0]
        mine = {} if directory == SHARED else slots[int(directory.removeprefix("rank-"))]
        written, expected = read_shard(root / file.name), []
        for tensor in written.tensors:
            due.discard((directory, tensor.name))
            shard, original = tensors[tensor.name]
            key = keys[tensor.name] if directory != SHARED else KEEP
            pieces = source_parts(shard, original, key, mine, num_experts)
            if tensor.dtype != original.dtype or sum(p.num_bytes for p in pieces) != tensor.num_bytes:
                raise InputError(f"{written.path} holds {tensor.name} in another size: nothing was kept")
            expected += lay(pieces, written.header_bytes + tensor.begin)
        if not file.link:
            parts[file.name] = merged(expected)
    if due:
        directory, name = min(due)
        raise InputError(f"{root / directory} lacks {name}: nothing was kept")
    return parts


def written_entry(file: FilePlan, sums: list[list[int]]) -> dict[str, Any]:
    if file.link:
        return {"bytes": file.size, "linked": True}
    return {"bytes": file.size, "header_sha256": hash_bytes(file.header), "checksums": sums}


# ---- and back


def source_headers(source: Checkpoint) -> dict[str, Any]:
    """The headers of the source's files, and its index."""
    return {
        "format": "semmoe-reshard-source",
        "index": (source.path / INDEX_NAME).read_text(encoding="utf-8") if source.index else None,
        "files": {
            shard.name: {
                "header_bytes": shard.header_bytes,
                "header_sha256": hash_bytes(read_bytes(shard.path, 0, shard.header_bytes)),
                "metadata": shard.metadata,
                "tensors": [[t.name, t.dtype, list(t.shape), t.begin, t.end] for t in shard.tensors],
            }
            for shard in source.shards
        },
    }


def undo_ranks(
    checkpoint: Path, facts: dict[str, Any], out: Path, *, verify: str, force: bool, progress: Stages | None
) -> ReshardResult:
    """Put the source of the layout together again: the same files."""
    try:
        text = (checkpoint / SOURCE_FILE).read_bytes()
        headers = json.loads(text)
        experts_LRS = np.asarray(facts["placement"], np.int64)
        layers, num_experts = facts["model_layers"], int(facts["num_experts"])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{checkpoint / SOURCE_FILE} cannot be read: {error}") from None
    if facts.get("headers_sha256", hash_bytes(text)) != hash_bytes(text):
        raise InputError(f"{checkpoint / SOURCE_FILE} was changed after it was written")
    if verify != "none":
        check_unchanged(checkpoint, facts, progress)
    homes = {
        layer: [first_home(experts_RS, expert) for expert in range(num_experts)]
        for layer, experts_RS in zip(layers, experts_LRS, strict=True)
    }
    written = {name: read_shard(checkpoint / name) for name in facts["files"]}
    files = [joined_file(name, entry, written, homes) for name, entry in headers["files"].items()]
    shared = open_checkpoint(checkpoint / SHARED)
    with output_directory(out, checkpoint, marker=SIDECAR, force=force) as folder:
        check_space(folder, total_bytes(files) + other_bytes(shared))
        copy_others(shared, folder, skip=())
        if headers["index"]:
            (folder / INDEX_NAME).write_text(headers["index"], encoding="utf-8")
        write_all(files, folder, verify=verify, progress=progress)
    hashes = {name: entry["header_sha256"] for name, entry in headers["files"].items() if "header_sha256" in entry}
    notes = header_notes(files, hashes)
    return ReshardResult(str(out), "ranks", len(layers), 0, len(files), total_bytes(files), 0, verify, None, (), notes)


def first_home(experts_RS: np.ndarray, expert: int) -> tuple[int, int]:
    """The first rank and slot that hold an expert."""
    rank, slot = np.argwhere(experts_RS == expert)[0]
    return int(rank), int(slot)


def joined_file(
    name: str, entry: dict[str, Any], written: Mapping[str, Shard], homes: Mapping[int, list[tuple[int, int]]]
) -> FilePlan:
    """A file of the source from the files of `shared` and the ranks."""
    tensors = tuple(Tensor(n, dtype, tuple(shape), begin, end) for n, dtype, shape, begin, end in entry["tensors"])
    header = make_header(tensors, entry["metadata"], header_bytes=entry["header_bytes"])
    size = len(header) + (tensors[-1].end if tensors else 0)
    check_offsets(Shard(Path(name), len(header), size, entry["metadata"], tensors))
    directories = [SHARED, *(rank_directory(r) for r in range(1 + max(r for home in homes.values() for r, _ in home)))]
    index = {
        directory: {t.name: (shard, t) for t in shard.tensors}
        for directory in directories
        if (shard := written.get(f"{directory}/{name}"))
    }
    parts: list[Part] = []
    for tensor in tensors:
        parts += lay(joined_parts(tensor, index, homes), len(header) + tensor.begin)
    return FilePlan(name, header, size, tuple(merged(parts)))


def joined_parts(
    tensor: Tensor, index: Mapping[str, Mapping[str, tuple[Shard, Tensor]]], homes: Mapping[int, list[tuple[int, int]]]
) -> list[Piece]:
    """Where the bytes of a tensor of the source are now: whole in one directory, or expert by
    expert on the ranks."""
    holders = [directory for directory, tensors in index.items() if tensor.name in tensors]
    if not holders:
        raise InputError(f"{tensor.name} is in no directory: the reshard is not complete")
    _, layer, rest = split_key(tensor.name)
    if holders[0] == SHARED or PER_EXPERT.match(rest):
        shard, found = index[holders[0]][tensor.name]
        return [Piece(shard.path, shard.header_bytes + found.begin, 0, found.num_bytes)]
    pieces, block = [], tensor.num_bytes // len(homes[layer])
    for rank, slot in homes[layer]:
        shard, found = index[rank_directory(rank)][tensor.name]
        pieces.append(Piece(shard.path, shard.header_bytes + found.begin + slot * block, 0, block))
    return pieces
