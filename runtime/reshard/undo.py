"""The way back: the checkpoint that a reshard of either layout was made from, the same bytes.

Shape letters: L MoE layers, R ranks, S slots per rank.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from semmoe.profiles.config import read_config
from semmoe.profiles.errors import InputError
from semmoe.profiles.families import PER_EXPERT
from semmoe.profiles.progress import Stages
from semmoe.profiles.safetensors_file import INDEX_NAME, Shard, Tensor, check_offsets, make_header, read_shard
from semmoe.runtime.reshard.card import remove_section
from semmoe.runtime.reshard.copy import FilePlan, Part, Piece, merged, total_bytes, write_files
from semmoe.runtime.reshard.keys import split_key
from semmoe.runtime.reshard.model import routed_model
from semmoe.runtime.reshard.output_directory import check_space, output_directory
from semmoe.runtime.reshard.permuted import Relabelling, fill_permuted
from semmoe.runtime.reshard.ranks import SHARED, lay, rank_directory
from semmoe.runtime.reshard.records import ReshardOptions, ReshardResult, size_facts
from semmoe.runtime.reshard.sidecar import (
    SIDECAR,
    SOURCE_FILE,
    check_unchanged,
    header_notes,
    read_sidecar,
    read_source_headers,
)
from semmoe.runtime.reshard.source import copy_others, open_checkpoint

Homes = Mapping[int, list[tuple[int, int]]]  # model layer -> first rank and slot of each expert


def undo_reshard(
    checkpoint: Path, out: Path, *, verify: str = "bytes", force: bool = False, progress: Stages | None = None
) -> ReshardResult:
    """Write as `out` the checkpoint that `checkpoint`, a reshard of either layout, was made from:
    the same bytes.

    Parameters:
        checkpoint: directory of a reshard; it is only read.
        out: directory that is written; it appears at the end, whole.
        verify: "bytes" tests the checksums of semmoe.json first, so that a reshard which was
            changed since is refused, and compares what is written; "none" trusts the disk.
        force: replace an `out` that is a reshard.
        progress: told the bytes done and the bytes in all.

    Raises InputError where the reshard is damaged or not complete; then `out` is not there.
    """
    facts = read_sidecar(checkpoint)
    undo = undo_ranks if facts["layout"] == "ranks" else undo_permuted
    return undo(checkpoint, facts, out, ReshardOptions(verify=verify, force=force), progress)


def undo_permuted(
    checkpoint: Path, facts: dict[str, Any], out: Path, options: ReshardOptions, progress: Stages | None
) -> ReshardResult:
    """Relabel the experts back, under headers of their former length."""
    source = open_checkpoint(checkpoint)
    if strangers := sorted({shard.name for shard in source.shards} ^ facts["files"].keys()):
        raise InputError(f"{checkpoint / SIDECAR} and the files of {checkpoint} differ in {strangers[0]}")
    model = routed_model(read_config(checkpoint), facts["num_experts"])
    orders = {int(layer): np.argsort(order) for layer, order in facts["new2old"].items()}
    if options.compares:
        check_unchanged(checkpoint, facts, progress)
    relabelling = replace(Relabelling.of(source, model, orders), stored=facts.get("settings", {}))
    entries = facts["files"].items()
    files = relabelling.files(header_bytes={name: entry["source_header_bytes"] for name, entry in entries})
    with output_directory(out, checkpoint, marker=SIDECAR, force=options.force) as folder:
        fill_permuted(relabelling, files, folder, compare=options.compares, progress=progress)
        remove_section(folder)
    notes = header_notes(files, {name: entry["source_header_sha256"] for name, entry in entries})
    return relabelling.result(out, files, options.verify, notes=notes)


def undo_ranks(
    checkpoint: Path, facts: dict[str, Any], out: Path, options: ReshardOptions, progress: Stages | None
) -> ReshardResult:
    """Put the source of the layout together again."""
    headers = read_source_headers(checkpoint, facts)
    layers, experts_LRS = facts["model_layers"], np.asarray(facts["placement"], np.int64)
    there = {split_key(tensor[0])[1] for entry in headers["files"].values() for tensor in entry["tensors"]}
    if strangers := sorted(set(layers) - there):
        raise InputError(f"{checkpoint / SIDECAR}: model_layers names layer {strangers[0]}, which has no tensors")
    if options.compares:
        check_unchanged(checkpoint, facts, progress)
    homes = {
        layer: [first_home(experts_RS, expert) for expert in range(int(facts["num_experts"]))]
        for layer, experts_RS in zip(layers, experts_LRS, strict=True)
    }
    written = {name: read_shard(checkpoint / name) for name in facts["files"]}
    files = [joined_file(name, entry, written, homes) for name, entry in headers["files"].items()]
    if not (checkpoint / SHARED).resolve().is_relative_to(checkpoint.resolve()):
        raise InputError(f"{checkpoint / SHARED} is a link out of {checkpoint}, expected a directory in it")
    shared = open_checkpoint(checkpoint / SHARED)
    with output_directory(out, checkpoint, marker=SIDECAR, force=options.force) as folder:
        check_space(folder, total_bytes(files) + shared.other_bytes)
        copy_others(shared, folder)
        if headers["index"]:
            (folder / INDEX_NAME).write_text(headers["index"], encoding="utf-8")
        write_files(files, folder, verify=options.compares, progress=progress)
    hashes = {name: entry["header_sha256"] for name, entry in headers["files"].items() if "header_sha256" in entry}
    return ReshardResult(
        out=str(out),
        layout="ranks",
        num_layers=len(layers),
        experts_moved=0,
        **size_facts(files),
        verified=options.verify,
        notes=header_notes(files, hashes),
    )


def first_home(experts_RS: np.ndarray, expert: int, nearest: int = 0) -> tuple[int, int]:
    """The first rank and slot that hold an expert; rank `nearest` where it does."""
    homes = np.argwhere(experts_RS == expert)
    rank, slot = next((home for home in homes if home[0] == nearest), homes[0])
    return int(rank), int(slot)


def joined_file(
    name: str, entry: dict[str, Any], written: Mapping[str, Shard], homes: Homes, *, first: str = SHARED
) -> FilePlan:
    """A file of the source from the files of `shared` and the ranks; `first`: the directory that
    is looked at before others."""
    tensors = tuple(Tensor(n, dtype, tuple(shape), begin, end) for n, dtype, shape, begin, end in entry["tensors"])
    header = make_header(tensors, entry["metadata"], header_bytes=entry["header_bytes"])
    size = len(header) + (tensors[-1].end if tensors else 0)
    check_offsets(Shard(Path(name), len(header), size, entry["metadata"], tensors))
    ranks = range(1 + max(r for home in homes.values() for r, _ in home))
    directories = dict.fromkeys([SHARED, first, *map(rank_directory, ranks)])
    index = {
        directory: {t.name: (shard, t) for t in shard.tensors}
        for directory in directories
        if (shard := written.get(f"{directory}/{name}"))
    }
    if lost := sorted({stray for found in index.values() for stray in found} - {tensor.name for tensor in tensors}):
        raise InputError(f"{lost[0]} is in a part of {name}, and {SOURCE_FILE} does not name it there")
    parts: list[Part] = []
    for tensor in tensors:
        parts += lay(joined_parts(tensor, index, homes), len(header) + tensor.begin)
    return FilePlan(name, header, size, tuple(merged(parts)))


def joined_parts(tensor: Tensor, index: Mapping[str, Mapping[str, tuple[Shard, Tensor]]], homes: Homes) -> list[Piece]:
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
