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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from semmoe.profiles.errors import InputError
from semmoe.profiles.progress import Stages
from semmoe.profiles.safetensors_file import INDEX_NAME, Shard, Tensor, make_header, read_shard
from semmoe.runtime.reshard.audit import unaccounted
from semmoe.runtime.reshard.card import add_section
from semmoe.runtime.reshard.complete import classify_checkpoint
from semmoe.runtime.reshard.copy import FilePlan, Part, Piece, check_parts, merged, total_bytes, write_files
from semmoe.runtime.reshard.keys import KEEP, Key, Role, is_expert
from semmoe.runtime.reshard.model import check_plan, top_k_notes
from semmoe.runtime.reshard.output_directory import check_space, output_directory
from semmoe.runtime.reshard.records import ReshardOptions, ReshardResult, size_facts
from semmoe.runtime.reshard.relabel import block_bytes
from semmoe.runtime.reshard.sidecar import SIDECAR, hash_bytes, plan_facts, write_sidecar, write_source_headers
from semmoe.runtime.reshard.source import Checkpoint, copy_others
from semmoe.solvers.placement import EMPTY, part_sizes
from semmoe.solvers.plan import Plan

SHARED = "shared"

Slots = Mapping[int, np.ndarray]  # model layer -> experts of a rank in slot order


@dataclass(frozen=True, eq=False)
class Division:
    """A checkpoint and what of it each rank gets."""

    source: Checkpoint
    keys: Mapping[str, Key]
    num_experts: int
    ranks: Sequence[Slots]

    def slots(self, directory: str) -> Slots:
        """The slots of a directory of the layout; none for the shared one."""
        return {} if directory == SHARED else self.ranks[int(directory.removeprefix("rank-"))]


def rank_directory(rank: int) -> str:
    return f"rank-{rank:03d}"


def write_ranks(
    source: Checkpoint, plan: Plan, out: Path, options: ReshardOptions, progress: Stages | None
) -> ReshardResult:
    """Write the layout above. Raises InputError where the plan is for another model or a file is
    damaged."""
    model = check_plan(source, plan)
    layers, experts_LRS = plan.model.model_layers, plan.placement.experts_LRS
    num_ranks = plan.placement.num_ranks
    ranks = [
        {number: plan.placement.held(layer, rank) for layer, number in enumerate(layers)} for rank in range(num_ranks)
    ]
    division = Division(source, classify_checkpoint(source, model, set(layers)), model.num_experts, ranks)
    files = split_files(division, link=options.link)
    with output_directory(out, source.path, marker=SIDECAR, force=options.force) as folder:
        check_space(folder, total_bytes(files) + source.other_bytes)
        (folder / SHARED).mkdir()
        copy_others(source, folder / SHARED)
        sums = write_files(files, folder, verify=options.compares, progress=progress)
        write_indices(source, files, folder)
        if options.compares:
            check_written(division, files, folder)
        facts = {
            "layout": "ranks",
            "plan": plan_facts(plan),
            "made_by": options.made_by,
            "num_experts": model.num_experts,
            "model_layers": list(layers),
            "placement": experts_LRS.tolist(),
            "headers_sha256": write_source_headers(folder, source),
            "files": {f.name: written_entry(f, sums.get(f.name, [])) for f in files},
        }
        write_sidecar(folder, facts)
        add_section(folder, facts)
    kept = {name for name, key in division.keys.items() if key.role is Role.KEEP}
    audit = unaccounted(source, kept, model.num_experts) if options.compares else ()
    home_E = np.repeat(np.arange(num_ranks), part_sizes(model.num_experts, num_ranks))
    is_held_LRS = experts_LRS != EMPTY
    return ReshardResult(
        out=str(out),
        layout="ranks",
        num_layers=len(layers),
        experts_moved=int(((home_E[experts_LRS] != np.arange(num_ranks)[None, :, None]) & is_held_LRS).sum()),
        **size_facts(files),
        verified=options.verify,
        left_out=source.left_out,
        notes=(*source.unselected_notes(), *top_k_notes(source, plan), *audit),
    )


def split_files(division: Division, *, link: bool) -> list[FilePlan]:
    """The files of `shared` and of every rank."""
    files, keys = [], division.keys
    for shard in division.source.shards:
        rest = [tensor for tensor in shard.tensors if not is_expert(keys[tensor.name])]
        if link and len(rest) == len(shard.tensors):
            files.append(FilePlan(f"{SHARED}/{shard.name}", b"", shard.size, (), shard.path))
            continue
        if rest:
            files.append(pack_file(division, SHARED, shard, rest))
        for rank, slots in enumerate(division.ranks):
            mine = [tensor for tensor in shard.tensors if on_rank(keys[tensor.name], slots)]
            if mine:
                files.append(pack_file(division, rank_directory(rank), shard, mine))
    return files


def on_rank(key: Key, slots: Slots) -> bool:
    held = slots[key.layer] if is_expert(key) else ()
    return is_expert(key) and (len(held) > 0 if key.role is Role.ROWS else key.expert in held)


def pack_file(division: Division, directory: str, shard: Shard, tensors: Sequence[Tensor]) -> FilePlan:
    """A file of a directory with some tensors of a shard, fused ones cut down to the experts
    there."""
    slots = division.slots(directory)
    packed, sources, place = [], [], 0
    for tensor in tensors:
        key = division.keys[tensor.name]
        parts = source_parts(shard, tensor, key, slots, division.num_experts)
        shape = tensor.shape
        if key.role is Role.ROWS and not key.router:
            shape = (shape[0] // division.num_experts * len(slots[key.layer]), *shape[1:])
        size = sum(part.num_bytes for part in parts)
        packed.append(Tensor(tensor.name, tensor.dtype, shape, place, place + size))
        sources.append(parts)
        place += size
    header = make_header(tuple(packed), shard.metadata)
    laid: list[Part] = []
    for tensor, parts in zip(packed, sources, strict=True):
        laid += lay(parts, len(header) + tensor.begin)
    return FilePlan(f"{directory}/{shard.name}", header, len(header) + place, tuple(merged(laid)))


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


def write_indices(source: Checkpoint, files: Sequence[FilePlan], root: Path) -> None:
    """An index in every directory with more than one safetensors file, of what the source's index
    selects."""
    for directory in sorted({file.name.split("/")[0] for file in files}):
        shards = [read_shard(root / file.name) for file in files if file.name.split("/")[0] == directory]
        if len(shards) > 1:
            pairs = [(shard, tensor) for shard in shards for tensor in shard.tensors if source.selects(shard, tensor)]
            weight_map = {tensor.name: shard.name for shard, tensor in pairs}
            size = sum(tensor.num_bytes for _, tensor in pairs)
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
            (root / directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def check_written(division: Division, files: Sequence[FilePlan], root: Path) -> None:
    """Raise InputError unless the headers on the disk ask for just the bytes that were copied."""
    expected = written_parts(division, files, root)
    for file in files:
        if not file.link:
            check_parts(root / file.name, expected[file.name], file.parts)


def written_parts(division: Division, files: Sequence[FilePlan], root: Path) -> dict[str, list[Part]]:
    """What every written file must hold, told from its own header. Raises InputError where a
    tensor is not anywhere."""
    keys = division.keys
    tensors = {(s.name, tensor.name): (s, tensor) for s in division.source.shards for tensor in s.tensors}
    due = {(SHARED, *place) for place in tensors if not is_expert(keys[place[1]])}
    for rank, mine in enumerate(division.ranks):
        due |= {(rank_directory(rank), *place) for place in tensors if on_rank(keys[place[1]], mine)}
    parts: dict[str, list[Part]] = {}
    for file in files:
        directory, shard_name = file.name.split("/")
        written, expected = read_shard(root / file.name), []
        for tensor in written.tensors:
            due.discard((directory, shard_name, tensor.name))
            shard, original = tensors[shard_name, tensor.name]
            key = keys[tensor.name] if directory != SHARED else KEEP
            pieces = source_parts(shard, original, key, division.slots(directory), division.num_experts)
            if tensor.dtype != original.dtype or sum(p.num_bytes for p in pieces) != tensor.num_bytes:
                raise InputError(f"{written.path} holds {tensor.name} in another size: nothing was kept")
            expected += lay(pieces, written.header_bytes + tensor.begin)
        if not file.link:
            parts[file.name] = merged(expected)
    if due:
        directory, shard_name, name = min(due)
        raise InputError(f"{root / directory / shard_name} lacks {name}: nothing was kept")
    return parts


def written_entry(file: FilePlan, sums: list[list[int]]) -> dict[str, Any]:
    if file.link:
        return {"bytes": file.size, "linked": True}
    return {"bytes": file.size, "header_sha256": hash_bytes(file.header), "checksums": sums}
