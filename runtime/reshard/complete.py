"""Whether the routers and the experts of a checkpoint are all there, told from names and types
before anything is written.

A checkpoint that lacks a tensor of one expert would come out lacking it under another expert's
name; engines then load random numbers, or what memory held. What should be there is told by
comparison: the experts of a layer have the same tensors, and so have the layers of a stack. Where
some are stored in another precision than others, with other tensors, the types differ too: a tensor
is missing only where everything that is there has the types of a fuller record.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from semmoe.profiles.errors import InputError
from semmoe.profiles.safetensors_file import INDEX_NAME
from semmoe.runtime.reshard.keys import Key, Role, classify_one, classify_written
from semmoe.runtime.reshard.model import RoutedModel
from semmoe.runtime.reshard.source import Checkpoint

# Scales of activations: calibration may leave them out for an expert that no token came to.
CALIBRATED = re.compile(r"(?:^|[._])input_(?:scale|amax|global_scale|zero_point)\w*$")

Groups = dict[tuple[str, str, str], dict[int, dict[str, str]]]  # where, kind, projection -> member -> name -> type


def classify_checkpoint(checkpoint: Checkpoint, model: RoutedModel, layers: set[int]) -> dict[str, Key]:
    """The role of every tensor, by name. Raises InputError where something of an expert would be
    left behind, or is not there.

    A tensor that the index does not select goes the way of the selected one of its name; it cannot
    be the reason of a refusal but where that is impossible.
    """
    keys = {tensor.name: classify_one(tensor, model, layers, shard.path) for shard, tensor in checkpoint.selected()}
    check_complete(checkpoint, keys, model.num_experts, layers)
    for shard in checkpoint.shards:
        for tensor in shard.tensors:
            if checkpoint.selects(shard, tensor):
                continue
            key = classify_written(tensor, model, layers, shard.path)
            if keys.setdefault(tensor.name, key) != key:
                raise InputError(
                    f"{tensor.name} of {shard.path} (shape {list(tensor.shape)}) is not the one that {INDEX_NAME} "
                    "selects, and cannot move with it: remove it"
                )
    return keys


def check_complete(checkpoint: Checkpoint, keys: Mapping[str, Key], num_experts: int, layers: set[int]) -> None:
    """Raise InputError unless each layer of the plan has a router and all its experts, whole, in
    every stack."""
    check_experts(keys, num_experts, layers, checkpoint.path)
    for (where, kind, _), members in comparable_records(checkpoint, keys).items():
        check_alike(members, where, kind, checkpoint.path)


def check_experts(keys: Mapping[str, Key], num_experts: int, layers: set[int], path: Path) -> None:
    """Raise InputError unless each layer of the plan has a router and something of every expert,
    in every stack."""
    experts, routers, fused = defaultdict(set), set(), set()
    for name, key in keys.items():
        place = key.stack, key.layer
        if key.role is Role.EXPERT:
            experts[place].add(key.expert)
        elif key.role is Role.ROWS and not key.router:
            fused.add(place)
        elif key.router and key.role in (Role.ROWS, Role.COLUMNS) and name.endswith("weight"):
            routers.add(place)
    places = {(key.stack, key.layer) for key in keys.values() if key.role is not Role.KEEP}
    for layer in sorted(layers):
        if not any(number == layer for _, number in places):
            raise InputError(f"layer {layer} of {path} has no experts, the plan places experts there")
    for stack, layer in sorted(places):
        missing = set(range(num_experts)) - experts[stack, layer] if (stack, layer) in experts else set()
        if missing:
            raise InputError(f"layer {layer} ({stack}) of {path} lacks expert {min(missing)} of {num_experts}")
        if (stack, layer) not in experts and (stack, layer) not in fused:
            raise InputError(f"layer {layer} ({stack}) of {path} has a router but no experts that semmoe knows")
        if (stack, layer) not in routers:
            raise InputError(f"layer {layer} ({stack}) of {path} has experts but no router that semmoe knows")


def comparable_records(checkpoint: Checkpoint, keys: Mapping[str, Key]) -> Groups:
    """Names and types of tensors, by member (expert or layer) of groups whose members should
    have the same."""
    groups: Groups = defaultdict(lambda: defaultdict(dict))
    for _, tensor in checkpoint.selected():
        key = keys[tensor.name]
        if key.role is Role.KEEP or CALIBRATED.search(tensor.name):
            continue
        stack = f"{key.stack}: layer"
        if key.role is Role.EXPERT:
            name, layer = tensor.name[key.end + 1 :], f"layer {key.layer} ({key.stack}), expert"
            projection = name.partition(".")[0]
            groups[layer, "expert", projection][key.expert][name] = tensor.dtype
            groups[layer, "expert", ""][key.expert][projection] = ""
            groups[stack, "layer", "experts"][key.layer][f"{projection} of its experts"] = ""
        else:
            name = tensor.name.removeprefix(f"{key.stack}.{key.layer}.")
            groups[stack, "layer", "router" if key.router else "fused"][key.layer][name] = tensor.dtype
    return groups


def check_alike(members: Mapping[int, dict[str, str]], where: str, kind: str, path: Path) -> None:
    """Raise InputError where the record of a member is a part of another member's."""
    owners = {
        frozenset(members[member].items()): member for member in sorted(members, reverse=True)
    }  # the first of each
    if len(owners) == 1:
        return
    for member, record in sorted(members.items()):
        for fuller, owner in owners.items():
            if record.items() < fuller:
                lost = min(fuller - record.items())[0]
                raise InputError(f"{where} {member} of {path} lacks {lost}, which {kind} {owner} has")
