"""Layout "ranks" for another plan: files of ranks whose experts change are put together anew from
those of all ranks.

The original is taken as it was, by its stored headers, and divided as write_ranks divides it; then
each stretch of it is looked up in the files of the reshard, on the rank's own files first.

Shape letters: L MoE layers, R ranks, S slots per rank.
"""

import shutil
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from semmoe.profiles.config import read_config
from semmoe.profiles.errors import InputError
from semmoe.profiles.progress import Stages
from semmoe.profiles.safetensors_file import Shard, Tensor, parse_index, read_shard
from semmoe.runtime.reshard.card import add_section
from semmoe.runtime.reshard.complete import classify_checkpoint
from semmoe.runtime.reshard.copy import FilePlan, Part, Piece, merged, total_bytes, write_files
from semmoe.runtime.reshard.model import routed_model
from semmoe.runtime.reshard.output_directory import check_space, output_directory
from semmoe.runtime.reshard.ranks import (
    SHARED,
    Division,
    check_written,
    rank_directory,
    split_files,
    write_indices,
    written_entry,
)
from semmoe.runtime.reshard.records import ReshardOptions, ReshardResult, size_facts
from semmoe.runtime.reshard.replan.keep import can_link, kept_file
from semmoe.runtime.reshard.sidecar import (
    SIDECAR,
    SOURCE_FILE,
    plan_facts,
    read_source_headers,
    write_sidecar,
)
from semmoe.runtime.reshard.source import Checkpoint, copy_others, open_checkpoint
from semmoe.runtime.reshard.undo import first_home, joined_file
from semmoe.solvers.plan import Plan


def replan_ranks(
    placed: Path, facts: dict[str, Any], new: Plan, out: Path, options: ReshardOptions, progress: Stages | None
) -> ReshardResult:
    """Write `out`. Raises InputError where the plan is not for the layers of the reshard."""
    layers = tuple(facts["model_layers"])
    if layers != new.model.model_layers:
        raise InputError(f"{placed / SIDECAR} has the layers {list(layers)}, the plan {list(new.model.model_layers)}")
    # 1. The original by its headers, divided among the ranks of the new plan.
    before = Before.of(placed, facts)
    held = [
        {number: new.placement.held(layer, rank) for layer, number in enumerate(layers)}
        for rank in range(new.placement.num_ranks)
    ]
    model = routed_model(read_config(placed / SHARED), facts["num_experts"])
    keys = classify_checkpoint(before.source, model, set(layers))
    division = Division(before.source, keys, facts["num_experts"], held)
    wanted = split_files(division, link=False)
    # 2. Where the bytes are now; files that are there as they are to be stay.
    with output_directory(out, placed, marker=SIDECAR, force=options.force) as folder:
        link = can_link(next(iter(before.written.values())).path, folder)
        files = [before.found(file, link=link) for file in wanted]
        check_space(folder, total_bytes(files) + before.source.other_bytes)
        (folder / SHARED).mkdir()
        copy_others(before.source, folder / SHARED)
        sums = write_files(files, folder, verify=options.compares, progress=progress)
        write_indices(before.source, files, folder)
        if options.compares:
            anew = [before.is_anew(file) for file in files]
            checked = [
                file if is_anew else replace(file, link=placed / file.name)
                for file, is_anew in zip(wanted, anew, strict=True)
            ]
            check_written(division, checked, folder)
        told = {
            "layout": "ranks",
            "plan": plan_facts(new),
            "made_by": options.made_by,
            "num_experts": facts["num_experts"],
            "model_layers": list(layers),
            "placement": new.placement.experts_LRS.tolist(),
            **({"headers_sha256": facts["headers_sha256"]} if "headers_sha256" in facts else {}),
            "files": {
                f.name: facts["files"][f.name] if f.link else written_entry(f, sums.get(f.name, [])) for f in files
            },
        }
        shutil.copyfile(placed / SOURCE_FILE, folder / SOURCE_FILE)
        write_sidecar(folder, told)
        add_section(folder, told)
    return ReshardResult(
        out=str(out),
        layout="ranks",
        num_layers=len(layers),
        experts_moved=_arriving(np.asarray(facts["placement"]), new.placement.experts_LRS),
        **size_facts(files),
        verified=options.verify,
    )


def _arriving(old_LRS: np.ndarray, new_LRS: np.ndarray) -> int:
    """Experts that ranks did not hold."""
    old_ranks = [set(old_S.tolist()) for old_RS in old_LRS for old_S in old_RS]
    new_ranks = [set(new_S.tolist()) - {-1} for new_RS in new_LRS for new_S in new_RS]
    return sum(len(then - now) for now, then in zip(old_ranks, new_ranks, strict=False))


@dataclass(frozen=True, eq=False)
class Before:
    """A reshard of the layout, and the original that it holds."""

    written: Mapping[str, Shard]
    source: Checkpoint  # its files are not there: their bytes are where `joined` says
    joined: Mapping[str, Mapping[str, FilePlan]]  # by directory that is asked first, and file of the original

    @classmethod
    def of(cls, placed: Path, facts: dict[str, Any]) -> "Before":
        headers = read_source_headers(placed, facts)
        written = {name: read_shard(placed / name) for name in facts["files"]}
        shared, experts_LRS = open_checkpoint(placed / SHARED), np.asarray(facts["placement"], np.int64)
        joined = {}
        for rank in range(experts_LRS.shape[1]):
            homes = {
                layer: [first_home(experts_RS, e, rank) for e in range(int(facts["num_experts"]))]
                for layer, experts_RS in zip(facts["model_layers"], experts_LRS, strict=True)
            }
            first = rank_directory(rank)
            joined[first] = {
                name: joined_file(name, entry, written, homes, first=first) for name, entry in headers["files"].items()
            }
        shards = tuple(
            Shard(placed / name, len(file.header), file.size, headers["files"][name]["metadata"], tensors_of(entry))
            for (name, entry), file in zip(headers["files"].items(), joined[rank_directory(0)].values(), strict=True)
        )
        where = f"{placed / SOURCE_FILE}: index"
        index = parse_index(headers["index"], where) if headers["index"] else None
        return cls(written, replace(shared, shards=shards, index=index), joined)

    def found(self, file: FilePlan, *, link: bool) -> FilePlan:
        """A file of the new division from files of this reshard; the same file where that is what
        it is."""
        directory, name = file.name.split("/")
        there = self.written.get(file.name)
        if directory == SHARED:
            if there is None:
                raise InputError(f"{self.source.path.parent} lacks {file.name}: the reshard is not complete")
            return kept_file(file.name, there, link=link)
        joined = self.joined.get(directory, self.joined[rank_directory(0)])
        parts = merged(piece for part in file.parts for piece in pieces_of(part, joined[name].parts))
        found = replace(file, parts=tuple(parts))
        if there is not None and is_file(found, there):
            return kept_file(file.name, there, link=link)
        return found

    def is_anew(self, file: FilePlan) -> bool:
        """Whether a file was put together."""
        there = self.written.get(file.name)
        return not file.link and not (there is not None and is_file(file, there))


def tensors_of(entry: dict[str, Any]) -> tuple[Tensor, ...]:
    """The tensors of a stored header."""
    return tuple(Tensor(name, dtype, tuple(shape), begin, end) for name, dtype, shape, begin, end in entry["tensors"])


def is_file(file: FilePlan, there: Shard) -> bool:
    """Whether a file is one that is there: its header, and its bytes in their places."""
    rest = Piece(there.path, there.header_bytes, there.header_bytes, there.size - there.header_bytes)
    if file.parts != ((rest,) if rest.num_bytes else ()) or file.size != there.size:
        return False
    with there.path.open("rb") as stream:
        return stream.read(there.header_bytes) == file.header


def pieces_of(part: Part, laid: Sequence[Part]) -> list[Piece]:
    """A stretch of a file, as pieces of those that its parts are in."""
    assert isinstance(part, Piece)
    pieces, place, end = list[Piece](), part.source_offset, part.source_offset + part.num_bytes
    number = bisect_right(laid, place, key=lambda p: p.offset) - 1
    while place < end:
        inside = laid[number]
        assert isinstance(inside, Piece)
        size = min(end, inside.offset + inside.num_bytes) - place
        offset = part.offset + place - part.source_offset
        pieces.append(Piece(inside.source, inside.source_offset + place - inside.offset, offset, size))
        place, number = place + size, number + 1
    return pieces
