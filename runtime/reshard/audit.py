"""A second look at what a reshard leaves as it is, for --verify bytes: it shares nothing with the
classifier (keys.py), so that what one of them overlooks the other names.

Whatever lies beside moved experts and has an axis of as many entries, blocks of as many rows, or a
name that could be an expert's is dense for a reason told here, or it is named to the user.
"""

import re
from collections import defaultdict
from collections.abc import Collection

from semmoe.profiles.safetensors_file import Tensor
from semmoe.runtime.reshard.source import Checkpoint

PLACE = re.compile(r"^(.*?\d+)\.(.+)$")  # up to the first number: a layer
NUMBERED = re.compile(r"(?:^|\.)experts?\.(\d+)\.")
WORDS = re.compile(r"[._]")
EXPERT_WORDS = frozenset(("expert", "experts", "routed"))
ROUTER_WORDS = frozenset(("gate", "router"))
# Parts of a layer that are no mixture of experts, and what is one for all of its experts.
DENSE_WORDS = frozenset(
    ("attn", "attention", "attentions", "mamba", "conv", "conv1d", "ssm", "indexer", "shared", "share", "embed", "ln")
)
NORMS = re.compile(r"norm(?:\.|_|$)")
SHOWN = 12  # patterns that are named one by one

Place = tuple[str, str]  # up to the layer's number, and the rest


def split_place(name: str) -> Place:
    """The layer of a tensor and its name there; no layer is a layer of its own."""
    found = PLACE.match(name)
    return (found[1], found[2]) if found else ("", name)


def unaccounted(source: Checkpoint, kept: Collection[str], num_experts: int) -> tuple[str, ...]:
    """A line for every kind of tensor that was left as it is and could be an expert's.

    `kept`: names of the tensors that a reshard leaves as they are.
    """
    layers: dict[str, list[tuple[str, Tensor]]] = defaultdict(list)
    blocks: dict[str, set[str]] = defaultdict(set)  # modules of a layer in which something moved
    for _, tensor in source.selected():
        layer, rest = split_place(tensor.name)
        if tensor.name in kept:
            layers[layer].append((rest, tensor))
        else:
            blocks[layer].add(rest.partition(".")[0])
    kinds: dict[tuple[str, tuple[int, ...], str], int] = defaultdict(int)
    for layer, tensors in layers.items():
        if layer not in blocks and has_own_router(tensors):
            continue  # a tower or an MTP head: router and experts stay in one order
        for rest, tensor in tensors:
            if reason := suspicion(rest, tensor.shape, num_experts, blocks.get(layer, set())):
                kinds[re.sub(r"\d+", "*", layer) + "." * bool(layer) + rest, tensor.shape, reason] += 1
    lines = [
        f"left as it is: {name} {list(shape)} ({count} tensor{'s' * (count > 1)}): {reason}"
        for (name, shape, reason), count in kinds.items()
    ]
    more = [f"left as it is: {len(lines) - SHOWN} more kinds of tensors like these"] if len(lines) > SHOWN else []
    return (*lines[:SHOWN], *more)


def has_own_router(tensors: list[tuple[str, Tensor]]) -> bool:
    """Whether the tensors of a layer are experts and the router that chooses among them."""
    words = [set(WORDS.split(rest)) for rest, _ in tensors]
    return any(w & ROUTER_WORDS for w in words) and any(w & EXPERT_WORDS for w in words)


def suspicion(rest: str, shape: tuple[int, ...], num_experts: int, blocks: set[str]) -> str:
    """Why a tensor that was left could be an expert's, in words; "" where it could not."""
    words = set(WORDS.split(rest))
    number = NUMBERED.search(rest)
    if words & DENSE_WORDS or (number and int(number[1]) >= num_experts) or shape in ((), (1,)):
        return ""
    if blocks and num_experts in shape:
        return f"an axis has as many entries as there are experts, {num_experts}"
    if NORMS.search(rest) and len(shape) == 1:
        return ""
    if words & EXPERT_WORDS:
        return f"its name could be an expert's, no axis is one of {num_experts} experts"
    inside = rest.partition(".")[0] in blocks and not words & ROUTER_WORDS
    if inside and "latent" not in words and shape[0] and shape[0] % num_experts == 0:
        return f"it lies beside experts, and its {shape[0]} rows divide by {num_experts}"
    return ""
