"""What each rank reads of a checkpoint: the dense part, and its own experts numbered by slot. Told
from the headers, once for all ranks; a rank parses no header.

Three sources: a plain checkpoint of the hub (per-expert keys, or fused tensors cut to rows), a
`permuted` reshard (the same, with the contiguous placement that it was made for), and a `ranks`
reshard (the rank's own directory beside the shared one).

Shape letters: L MoE layers, R ranks, S slots per rank.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from semmoe.profiles.config import read_config
from semmoe.profiles.errors import InputError
from semmoe.profiles.families import IDENTITY_EXPERTS, PER_EXPERT
from semmoe.profiles.safetensors_file import Shard, Tensor
from semmoe.runtime.reshard.complete import classify_checkpoint
from semmoe.runtime.reshard.keys import Key, Role, is_expert, split_key
from semmoe.runtime.reshard.model import check_plan, routed_model
from semmoe.runtime.reshard.ranks import SHARED, rank_directory
from semmoe.runtime.reshard.relabel import block_bytes
from semmoe.runtime.reshard.sidecar import SIDECAR, read_sidecar
from semmoe.runtime.reshard.source import Checkpoint, open_checkpoint
from semmoe.solvers.place.baselines import place_contiguous
from semmoe.solvers.placement import Placement
from semmoe.solvers.plan import Plan

Slots = Mapping[int, list[int]]  # model layer -> experts of a rank in slot order


class StoredTensor(NamedTuple):
    """A tensor that a rank reads, and where its bytes lie."""

    name: str  # the checkpoint's, with the slot in place of the expert's number
    file: str  # relative to the checkpoint
    dtype: str  # as safetensors writes it
    shape: tuple[int, ...]
    pieces: tuple[tuple[int, int], ...]  # (offset, bytes) in the file, end to end in the tensor
    layer: int = -1  # model layer of its experts; -1: no experts
    slot: int = 0  # of the first of them
    experts: tuple[int, ...] = ()  # the checkpoint's numbers, slot by slot


@dataclass(frozen=True, eq=False)
class RankCheckpoint:
    """What one rank knows of a checkpoint on disk."""

    layout: str  # "plain", "permuted" or "ranks"
    placement: Placement  # of all ranks, in the checkpoint's own expert numbers
    bytes_of_file: dict[str, int]  # files that are read, relative to the checkpoint
    tensors: list[StoredTensor]


def rank_checkpoints(path: Path, plan: Plan) -> list[RankCheckpoint]:
    """What every rank reads of the checkpoint at `path`, by rank; every header is parsed once.

    Raises InputError where a file is damaged, or plan and checkpoint do not belong together.
    """
    layout, placement = find_layout(path, plan)
    slots = [
        {number: placement.held(layer, rank).tolist() for layer, number in enumerate(plan.model.model_layers)}
        for rank in range(placement.num_ranks)
    ]
    if layout == "ranks":
        unread = unread_experts(read_config(path / SHARED))
        shared = [t for t in dense_tensors(open_checkpoint(path / SHARED), f"{SHARED}/") if not unread(t.name)]
        tensors = []
        for rank, own in enumerate(slots):
            name = rank_directory(rank)
            tensors.append([*shared, *tensors_of_directory(open_checkpoint(path / name), own, f"{name}/")])
    else:
        checkpoint = open_checkpoint(path)
        if layout == "plain":
            check_plan(checkpoint, plan)
        tensors = tensors_of_whole(checkpoint, placement.num_experts, slots)
    return [
        RankCheckpoint(
            layout, placement, {name: (path / name).stat().st_size for name in sorted({t.file for t in own})}, own
        )
        for own in tensors
    ]


def find_layout(path: Path, plan: Plan) -> tuple[str, Placement]:
    """The layout of a checkpoint and the placement that its expert numbers realise. Raises
    InputError for a reshard that was made for another plan."""
    if not (path / SIDECAR).is_file():
        return "plain", plan.placement
    facts = read_sidecar(path)
    if facts["plan"]["fingerprint"] != plan.fingerprint:
        raise InputError(
            f"{path} was resharded for plan {facts['plan']['fingerprint']}, this plan is {plan.fingerprint}: they must be the same"
        )
    if facts["layout"] == "ranks":
        return "ranks", plan.placement
    # Relabelled experts, router and all: the model's own order is the placement now.
    num_ranks = plan.placement.num_ranks
    rank_of_LE = place_contiguous(plan.placement.num_layers, plan.placement.num_experts, num_ranks)
    return "permuted", Placement.from_ranks(rank_of_LE, num_ranks)


def whole_tensor(shard: Shard, tensor: Tensor, folder: str) -> StoredTensor:
    """The tensor as it is."""
    piece = (shard.header_bytes + tensor.begin, tensor.num_bytes)
    return StoredTensor(tensor.name, f"{folder}{shard.name}", tensor.dtype, tensor.shape, (piece,))


def dense_tensors(checkpoint: Checkpoint, folder: str) -> Iterator[StoredTensor]:
    """Every tensor of a directory as it is."""
    for shard, tensor in checkpoint.selected():
        yield whole_tensor(shard, tensor, folder)


def tensors_of_directory(checkpoint: Checkpoint, slots: Slots, folder: str) -> Iterator[StoredTensor]:
    """A rank's own directory of a `ranks` reshard: per-expert keys are renumbered, fused tensors
    are in slot order already."""
    for tensor in dense_tensors(checkpoint, folder):
        _, layer, rest = split_key(tensor.name)
        if found := PER_EXPERT.match(rest):
            expert = int(found["expert"])
            slot = slots[layer].index(expert)
            begin, end = (len(tensor.name) - len(rest) + place for place in found.span("expert"))
            name = f"{tensor.name[:begin]}{slot}{tensor.name[end:]}"
            yield tensor._replace(name=name, layer=layer, slot=slot, experts=(expert,))
        else:
            yield tensor._replace(layer=layer, experts=tuple(slots[layer]))


def tensors_of_whole(
    checkpoint: Checkpoint, num_experts: int, slots: list[dict[int, list[int]]]
) -> list[list[StoredTensor]]:
    """All tensors that are not experts, and those of each rank's experts, by rank."""
    config = read_config(checkpoint.path)
    unread = unread_experts(config)
    keys = classify_checkpoint(checkpoint, routed_model(config, num_experts), set(slots[0]))
    places = places_of_experts(slots)
    parts: list[list[StoredTensor]] = [[] for _ in slots]
    for shard, tensor in checkpoint.selected():
        key, whole = keys[tensor.name], whole_tensor(shard, tensor, "")
        if not is_expert(key):
            if not unread(tensor.name):
                for part in parts:
                    part.append(whole)
        elif key.role is Role.ROWS:
            for part, own in zip(parts, slots, strict=True):
                if own[key.layer]:
                    part.append(rows_of_experts(shard, tensor, key, own[key.layer], num_experts))
        else:
            for rank, slot in places[key.layer, key.expert]:
                name = key.renamed(tensor.name, slot)
                # Not `_replace`, which takes three times as long: there are tens of thousands.
                parts[rank].append(StoredTensor(name, *whole[1:5], key.layer, slot, (key.expert,)))
    return parts


def unread_experts(config: dict[str, Any]) -> Callable[[str], bool]:
    """Whether a tensor outside the placed experts is an identity expert's of LongCat, whose
    weights nothing reads."""
    has_identities = bool(config.get(IDENTITY_EXPERTS))
    return lambda name: has_identities and PER_EXPERT.match(split_key(name)[2]) is not None


def places_of_experts(slots: list[dict[int, list[int]]]) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """(model layer, expert) -> the (rank, slot) pairs that hold it."""
    places: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for rank, of_layer in enumerate(slots):
        for layer, experts in of_layer.items():
            for slot, expert in enumerate(experts):
                places.setdefault((layer, expert), []).append((rank, slot))
    return places


def rows_of_experts(shard: Shard, tensor: Tensor, key: Key, experts: list[int], num_experts: int) -> StoredTensor:
    """The rows of some experts of a fused tensor, neighbours in one piece."""
    block, _ = block_bytes(tensor, key, num_experts, shard.path)
    begin = shard.header_bytes + tensor.begin
    pieces = tuple((begin + first * block, (end - first) * block) for first, end in runs(experts))
    shape = (tensor.shape[0] // num_experts * len(experts), *tensor.shape[1:])
    return StoredTensor(tensor.name, shard.name, tensor.dtype, shape, pieces, key.layer, 0, tuple(experts))


def runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Consecutive numbers as (begin, end) pairs, in order: [4, 5, 6, 1] -> (4, 7), (1, 2)."""
    begin = 0
    for place in range(1, len(numbers) + 1):
        if place == len(numbers) or numbers[place] != numbers[place - 1] + 1:
            yield numbers[begin], numbers[place - 1] + 1
            begin = place
