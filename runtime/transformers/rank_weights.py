"""The tensors of a checkpoint as one rank needs them: the dense part, and its own experts numbered
by slot; nothing else is read.

Three sources: a plain checkpoint of the hub (per-expert keys or fused tensors, cut to slices inside
safetensors), a `permuted` reshard (the same, with the contiguous placement that it was made for),
and a `ranks` reshard (the rank's own directory beside the shared one). Tensors are handed to
Transformers as lazy slices under the names of the checkpoint, so its own conversions (fusing,
renaming, dequantising) do the rest.

Shape letters: L MoE layers, R ranks, S slots per rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from semmoe.profiles.config import read_config
from semmoe.profiles.errors import InputError
from semmoe.runtime.reshard.complete import classify_checkpoint
from semmoe.runtime.reshard.keys import PER_EXPERT, Role, is_expert, split_key
from semmoe.runtime.reshard.model import check_plan, routed_model
from semmoe.runtime.reshard.ranks import SHARED, rank_directory
from semmoe.runtime.reshard.sidecar import SIDECAR, read_sidecar
from semmoe.runtime.reshard.source import Checkpoint, open_checkpoint
from semmoe.solvers.place.contiguous import place_contiguous
from semmoe.solvers.placement import Placement
from semmoe.solvers.plan import Plan


@dataclass(frozen=True, eq=False)
class PlacedCheckpoint:
    """A checkpoint on disk with the placement that its expert numbers realise."""

    folder: Path  # with config.json and tokenizer
    layout: str  # "plain", "permuted" or "ranks"
    placement: Placement  # in the checkpoint's own expert numbers
    model_layers: tuple[int, ...]
    root: Path


class ExpertRows:
    """Some rows of a tensor's first axis, read when asked for: what Transformers' loader takes
    for a tensor."""

    def __init__(self, whole: Any, rows: list[int]) -> None:
        self._whole, self._rows = whole, rows

    def get_shape(self) -> list[int]:
        return [len(self._rows), *self._whole.get_shape()[1:]]

    def get_dtype(self) -> str:
        return self._whole.get_dtype()

    def __getitem__(self, index: Any) -> torch.Tensor:
        pieces = [self._whole[begin:end] for begin, end in runs(self._rows)]
        return torch.cat(pieces)[index]


def runs(rows: list[int]) -> Iterator[tuple[int, int]]:
    """Consecutive rows as (begin, end) pairs, in order: [4, 5, 6, 1] -> (4, 7), (1, 2)."""
    begin = 0
    for place in range(1, len(rows) + 1):
        if place == len(rows) or rows[place] != rows[place - 1] + 1:
            yield rows[begin], rows[place - 1] + 1
            begin = place


def find_placed(path: Path, plan: Plan) -> PlacedCheckpoint:
    """What lies at `path`, checked against the plan. Raises InputError where the two do not
    belong together."""
    layers, placement = plan.model.model_layers, plan.placement
    if not (path / SIDECAR).is_file():
        check_plan(open_checkpoint(path), plan)
        return PlacedCheckpoint(path, "plain", placement, layers, path)
    facts = read_sidecar(path)
    if facts["plan"]["fingerprint"] != plan.fingerprint:
        raise InputError(
            f"{path} was resharded for plan {facts['plan']['fingerprint']}, this plan is {plan.fingerprint}: they must be the same"
        )
    if facts["layout"] == "ranks":
        return PlacedCheckpoint(path / SHARED, "ranks", placement, layers, path)
    # Relabelled experts, router and all: the model's own order is the placement now.
    rank_of_LE = place_contiguous(placement.num_layers, placement.num_experts, placement.num_ranks)
    return PlacedCheckpoint(path, "permuted", Placement.from_ranks(rank_of_LE, placement.num_ranks), layers, path)


def rank_tensors(placed: PlacedCheckpoint, rank: int) -> dict[str, Any]:
    """Lazy tensors for one rank by the checkpoint's names, experts renumbered by their slots."""
    slots = dict(zip(placed.model_layers, placed.placement.experts_LRS[:, rank].tolist(), strict=True))
    checkpoint = open_checkpoint(placed.folder)
    if placed.layout == "ranks":
        return dict(lazy_tensors(checkpoint)) | _tensors_of_directory(
            open_checkpoint(placed.root / rank_directory(rank)), slots
        )
    return _tensors_of_whole(checkpoint, placed.placement.num_experts, slots)


def lazy_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Any]]:
    """Every tensor by name, unread."""
    for shard in checkpoint.shards:
        reader = safe_open(str(shard.path), framework="pt")
        for tensor in shard.tensors:
            yield tensor.name, reader.get_slice(tensor.name)


def _tensors_of_whole(checkpoint: Checkpoint, num_experts: int, slots: dict[int, list[int]]) -> dict[str, Any]:
    """All tensors that are not experts, and the experts of `slots` cut out of the others."""
    config = read_config(checkpoint.path)
    keys = classify_checkpoint(checkpoint, routed_model(config, num_experts), set(slots))
    tensors: dict[str, Any] = {}
    for name, lazy in lazy_tensors(checkpoint):
        key = keys[name]
        if not is_expert(key):
            # LongCat's identity experts have weights that nothing reads.
            if not (config.get("zero_expert_num") and PER_EXPERT.match(split_key(name)[2])):
                tensors[name] = lazy
        elif key.role is Role.ROWS:
            per_expert = key.rows // num_experts  # 1, or the rows of an expert where all are rows of one matrix (DBRX)
            rows = [per_expert * expert + row for expert in slots[key.layer] for row in range(per_expert)]
            tensors[name] = ExpertRows(lazy, rows)
        elif key.expert in slots[key.layer]:
            tensors[key.renamed(name, slots[key.layer].index(key.expert))] = lazy
    return tensors


def _tensors_of_directory(checkpoint: Checkpoint, slots: dict[int, list[int]]) -> dict[str, Any]:
    """A rank's own directory: per-expert keys are renumbered, fused tensors are in slot order
    already."""
    tensors: dict[str, Any] = {}
    for name, lazy in lazy_tensors(checkpoint):
        _, layer, rest = split_key(name)
        if found := PER_EXPERT.match(rest):
            slot = slots[layer].index(int(found["expert"]))
            begin, end = (len(name) - len(rest) + place for place in found.span("expert"))
            tensors[f"{name[:begin]}{slot}{name[end:]}"] = lazy
        else:
            tensors[name] = lazy
    return tensors
