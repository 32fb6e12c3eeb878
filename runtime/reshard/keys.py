"""What each key of a checkpoint is to its experts, in both layouts of every family of Transformers
5.23 (profiles/families.py has the names).

A key is read in three steps: the stack of layers it belongs to ("model.layers." 3
"mlp.experts.5.up_proj.weight"), the place inside the layer, and the role. Roles are recognised by
name and held to by shape: a tensor of experts or of a router with an unknown name, or with a shape
that does not fit the number of experts, is an error, so that nothing of an expert is left behind
silently (a scale that does not move with its weight ruins a model without any message).
"""

import enum
import sys
from dataclasses import dataclass
from pathlib import Path

from semmoe.profiles.errors import InputError
from semmoe.profiles.families import (
    AROUND_EXPERTS,
    ATTENTION_EXPERTS,
    BESIDE_FUSED,
    DENSE_BESIDE,
    EXPERT_LIKE,
    FURTHER_ROUTER,
    FUSED,
    FUSED_IN_BLOCK,
    FUSED_ROWS,
    LATENT,
    LAYER,
    NUMBERED,
    OF_BLOCK,
    OF_EXPERTS,
    PER_EXPERT,
    ROUTER_KEEPS,
    ROUTER_LIKE,
    ROUTER_ROWS,
    SHARED,
    SHARED_BY_EXPERTS,
    SIDE_STACK,
    VALUES,
    VECTOR,
)
from semmoe.profiles.safetensors_file import Tensor
from semmoe.runtime.reshard.model import RoutedModel


class Role(enum.Enum):
    """What a permutation of the experts does to a tensor."""

    KEEP = "keep"  # nothing
    EXPERT = "expert"  # the key names its expert: rename
    ROWS = "rows"  # the first axis is experts (possibly several rows each, possibly followed by rows that stay)
    COLUMNS = "columns"  # experts along axis 1, in the first row or in all
    VALUES = "values"  # the elements are expert ids


@dataclass(frozen=True, slots=True)
class Key:
    """A tensor with its role in a layer; where the key names an expert, its number and the place
    of that number."""

    role: Role
    stack: str = ""
    layer: int = -1
    expert: int = -1
    start: int = 0  # EXPERT: name[start:end] is the expert's number
    end: int = 0
    rows: int = 0  # ROWS and COLUMNS: how many of the axis belong to routed experts
    router: bool = False  # a tensor that decides the routing

    def renamed(self, name: str, expert: int) -> str:
        """The name of the same tensor of another expert."""
        return f"{name[: self.start]}{expert}{name[self.end :]}"


KEEP = Key(Role.KEEP)


def is_expert(key: Key) -> bool:
    """Whether a tensor goes to the ranks."""
    return key.role is Role.EXPERT or (key.role is Role.ROWS and not key.router)


def split_key(name: str) -> tuple[str, int, str]:
    """Stack, layer number and the rest of a key; layer -1 where it belongs to no layer."""
    found = LAYER.match(name)
    return (sys.intern(found["stack"]), int(found["layer"]), found["rest"]) if found else ("", -1, name)


def is_side(name: str) -> bool:
    """Whether the key belongs to a tower, an MTP head or another stack that plans do not speak
    of."""
    stack, layer, rest = split_key(name)
    return bool(SIDE_STACK.search(stack if layer >= 0 else rest))


def has_experts(tensor: Tensor, model: RoutedModel) -> bool:
    """Whether the tensor belongs to routed experts or to their router, in any layer."""
    rest = split_key(tensor.name)[2]
    if SHARED.search(rest) or ATTENTION_EXPERTS.match(rest) or SHARED_BY_EXPERTS.match(rest):
        return False
    in_block = FUSED_IN_BLOCK.match(rest) and len(tensor.shape) == 3
    named = EXPERT_LIKE.search(rest) and could_be_experts(rest, tensor.shape, model)
    return bool(named or VECTOR.match(rest) or in_block)


def classify_one(tensor: Tensor, model: RoutedModel, layers: set[int], where: Path) -> Key:
    """The role of one tensor of a checkpoint."""
    stack, layer, _ = split_key(tensor.name)
    if is_side(tensor.name):
        return KEEP
    if layer in layers:
        return classify(tensor, model, where)
    if has_experts(tensor, model) and (layer < 0 or layer < model.num_model_layers):
        place = f"layer {layer}" if stack else "no layer that semmoe can read"
        raise InputError(f"{tensor.name} belongs to the experts of {place}, the plan places none there: {where}")
    return KEEP


def classify_written(tensor: Tensor, model: RoutedModel, layers: set[int], where: Path) -> Key:
    """The role of a tensor that is not refused: it stays where it cannot be moved."""
    try:
        return classify_one(tensor, model, layers, where)
    except InputError:
        return KEEP


def could_be_experts(rest: str, shape: tuple[int, ...], model: RoutedModel) -> bool:
    """Whether a tensor of an unknown name may belong to single experts of its layer.

    Its name says so, or its first axis: as many entries as experts, or beside a stack of experts
    as many blocks of rows. What has no such axis stays, whatever its name.
    """
    one_each = shape[:1] == (model.num_experts,)
    rows = shape[0] if shape else 0
    blocks = rows > 0 and rows % model.num_experts == 0
    if EXPERT_LIKE.search(rest):
        if AROUND_EXPERTS.match(rest) and len(shape) in (1, 2) and not one_each:
            return blocks and rows > (model.hidden_size or 0)
        if OF_EXPERTS.search(rest):
            return shape not in ((), (1,)) or bool(NUMBERED.search(rest))
        return blocks or model.num_experts in shape
    if BESIDE_FUSED.match(rest):
        return blocks
    return one_each and bool(OF_BLOCK.match(rest)) and not LATENT.match(rest) and not DENSE_BESIDE.search(rest)


def classify(tensor: Tensor, model: RoutedModel, where: Path) -> Key:
    """The role of a tensor in a layer whose experts a plan permutes.

    Rows of the router after the routed experts (zero experts, shared sinks, skip) stay. Raises
    InputError for a tensor of an expert or a router that cannot be moved.
    """
    num_experts, extra_rows = model.num_experts, model.extra_rows
    stack, layer, rest = split_key(tensor.name)
    shape = tensor.shape

    def rows(role: Role, axis: int, *, router: bool, extra: tuple[int, ...]) -> Key:
        if len(shape) <= axis or shape[axis] - num_experts not in extra:
            raise InputError(
                f"{tensor.name} has shape {list(shape)}, expected {num_experts} experts on axis {axis}: {where}"
            )
        return Key(role, stack, layer, rows=num_experts, router=router)

    if SHARED.search(rest) or ATTENTION_EXPERTS.match(rest) or SHARED_BY_EXPERTS.match(rest):
        return KEEP
    if found := PER_EXPERT.match(rest):
        expert = int(found["expert"])
        if expert >= num_experts:
            # Identity experts that some writers store, and the vision experts of Ernie: they stay
            # where they are.
            if expert < num_experts + extra_rows or (model.vision_experts and expert < 2 * num_experts):
                return KEEP
            raise InputError(f"{tensor.name} is expert {expert}, expected 0..{num_experts - 1}: {where}")
        start = len(tensor.name) - len(rest)
        return Key(Role.EXPERT, stack, layer, expert, start + found.start("expert"), start + found.end("expert"))
    if VALUES.match(rest):
        return Key(Role.VALUES, stack, layer, router=True)
    if VECTOR.match(rest):
        if len(shape) == 2 and shape[0] in (1, 2):  # Ernie: [1, E], with vision experts [2, E]
            return rows(Role.COLUMNS, 1, router=True, extra=(0,))
        return rows(Role.ROWS, 0, router=True, extra=(0, extra_rows))
    if model.vision_experts and rest in ("mlp.gate.weight", "mlp.gate.weight_1"):
        return KEEP if rest.endswith("_1") else rows(Role.COLUMNS, 1, router=True, extra=(0,))
    if ROUTER_KEEPS.match(rest) and not (rest.endswith("bias") and shape == (num_experts,)):
        return KEEP
    if ROUTER_ROWS.match(rest):
        return rows(Role.ROWS, 0, router=True, extra=(0, extra_rows))
    if FUSED_ROWS.match(rest) and len(shape) == 2 and shape[0] % num_experts == 0:
        return Key(Role.ROWS, stack, layer, rows=shape[0])
    if FUSED.match(rest) or FUSED_IN_BLOCK.match(rest):
        if shape in ((), (1,)):
            return KEEP  # one scale for all experts
        return rows(Role.ROWS, 0, router=False, extra=(0,))
    further = FURTHER_ROUTER.match(rest) and num_experts in shape[:1]
    if further or ROUTER_LIKE.search(rest) or could_be_experts(rest, shape, model):
        raise InputError(
            f"{tensor.name} (shape {list(shape)}) belongs to the experts or the router of layer {layer}, "
            f"and semmoe does not know how to move it: {where}"
        )
    return KEEP
