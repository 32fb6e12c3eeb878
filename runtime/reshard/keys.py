"""What each key of a checkpoint is to its experts: the names of every family of Transformers 5.23,
in both layouts.

A key is read in three steps: the stack of layers it belongs to ("model.layers." 3
"mlp.experts.5.up_proj.weight"), the place inside the layer, and the role. Roles are recognised by
name and held to by shape: a tensor of experts or of a router with an unknown name, or with a shape
that does not fit the number of experts, is an error, so that nothing of an expert is left behind
silently (a scale that does not move with its weight ruins a model without any message).

The names: hub layouts in transformers/conversion_mapping.py; quantised suffixes of
compressed-tensors, FP8, MXFP4, GPTQ, AWQ and ModelOpt checkpoints.
"""

import enum
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from semmoe.profiles.errors import InputError
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

LAYER = re.compile(r"^(?P<stack>(?:.*?\.)?(?:layers|blocks|h))\.(?P<layer>\d+)\.(?P<rest>.+)$")
# Stacks that no plan speaks of: towers of other modalities, MTP heads, the talker of the omni
# models. Left as they are, experts, router and all, which keeps them right.
SIDE_STACK = re.compile(
    r"(?:^|[._])(?:vision|visual|audio|vit|sam_model|qwen2_model|image_encoder|talker|code2wav|token2wav|mtp|nextn)"
    r"(?:$|[._\d])"
)
MOE = r"(?:mlp|ffn|feed_forward|mixer|block_sparse_moe|moe)"
SHARED = re.compile(r"(?:^|\.)(?:shared_|share_expert|shared\.)")
ATTENTION_EXPERTS = re.compile(r"^self_attention\.experts\.")  # JetMoE: experts of attention, with their own router

PER_EXPERT = re.compile(rf"^(?:{MOE}\.)?experts\.(?P<expert>0|[1-9]\d*)\..+$")
QUANT = (
    r"(?:(?:[._](?:weight|bias|bias_bf16|blocks|scales|scale|scale_inv|packed|shape|global_scale|zero_point|qweight|"
    r"qzeros|g_idx|input|input_scale|input_amax|scale_2|weight_scale|weight_scale_inv|weight_scale_2|weight_packed|"
    r"weight_shape|weight_global_scale|input_global_scale|weight_zero_point))+)?"
)
FUSED_PROJECTION = (
    r"(?:gate_up_proj|gate_and_up_projs|gate_proj|up_proj|down_proj|down_projs|gate_projs|up_projs|"
    r"fc[123]|w13|w[123]|input_linear|output_linear)"
)
FUSED = re.compile(rf"^(?:{MOE}\.)?experts\.{FUSED_PROJECTION}{QUANT}$")
# Without a module named experts: Granite and JetMoE (linear layers with an expert axis), Step 3
# (one per projection).
FUSED_IN_BLOCK = re.compile(
    rf"^(?:(?:block_sparse_moe|mlp)\.(?:input|output)_linear|moe\.(?:gate|up|down)_proj){QUANT}$"
)
FUSED_ROWS = re.compile(r"^ffn\.experts\.mlp\.(?:w1|v1|w2)$")  # DBRX: [E * I, H]
SHARED_BY_EXPERTS = re.compile(rf"^(?:{MOE}\.)?(?:experts\.)?(?:pre|post)_expert_(?:norm|proj)\.weight$")

ROUTER_ROWS = re.compile(
    rf"^(?:{MOE}\.)?(?:gate|router)\."
    r"(?:(?:gate|wg|classifier|layer|proj|router_mlp\.out_proj)\.)?(?:weight|bias)$"
)
VECTOR = re.compile(
    rf"^(?:{MOE}\.)?(?:(?:gate|router|experts|moe_statics|gate\.moe_statics)\.)?"
    r"(?:e_score_correction_bias|expert_bias|balancing_biases|per_expert_scale|router_bias)$"
)
VALUES = re.compile(rf"^(?:{MOE}\.)?gate\.tid2eid$")
# Tensors of a router that have no expert axis: input scales and norms, the trunk of Zaya's router,
# Inkling's scale.
ROUTER_KEEPS = re.compile(
    rf"^(?:{MOE}\.)?(?:gate|router)\."
    r"(?:scale|global_scale|norm\.weight|input_scale|router_states_scale|down_proj\.(?:weight|bias)|"
    r"router_mlp\.(?:fc\d|norm)\.(?:weight|bias))$"
)
ROUTER_LIKE = re.compile(rf"^(?:{MOE}\.)?(?:gate|router)(?:\.|_(?!proj|up_proj)|$)|tid2eid|moe_statics")
# A further router of a block, of another modality say: told from other gates by its axis of
# experts.
FURTHER_ROUTER = re.compile(rf"^{MOE}\.\w+_(?:gate|router)(?:\.|$)")
EXPERT_LIKE = re.compile(r"(?:^|[._])experts?(?:[._]|$)")
TEXT_AND_VISION = "ernie4_5_vl_moe"  # one list of experts on disk, the first half for text; routers [H, E]


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


def has_experts(tensor: Tensor) -> bool:
    """Whether the tensor belongs to routed experts or to their router, by name alone."""
    rest = split_key(tensor.name)[2]
    if SHARED.search(rest) or ATTENTION_EXPERTS.match(rest) or SHARED_BY_EXPERTS.match(rest):
        return False
    in_block = FUSED_IN_BLOCK.match(rest) and len(tensor.shape) == 3
    return bool(EXPERT_LIKE.search(rest) or VECTOR.match(rest) or in_block)


def classify_one(tensor: Tensor, model: RoutedModel, layers: set[int], where: Path) -> Key:
    """The role of one tensor of a checkpoint."""
    stack, layer, _ = split_key(tensor.name)
    if is_side(tensor.name):
        return KEEP
    if layer in layers:
        return classify(tensor, model, where)
    if has_experts(tensor) and (layer < 0 or layer < model.num_model_layers):
        place = f"layer {layer}" if stack else "no layer that semmoe can read"
        raise InputError(f"{tensor.name} belongs to the experts of {place}, the plan places none there: {where}")
    return KEEP


def classify(tensor: Tensor, model: RoutedModel, where: Path) -> Key:
    """The role of a tensor in a layer whose experts a plan permutes.

    Rows of the router after the routed experts (zero experts, shared sinks, skip) stay. Raises
    InputError for a tensor of an expert or a router that cannot be moved.
    """
    num_experts, extra_rows, model_type = model.num_experts, model.extra_rows, model.model_type
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
            if expert < num_experts + extra_rows or (model_type == TEXT_AND_VISION and expert < 2 * num_experts):
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
    if model_type == TEXT_AND_VISION and rest in ("mlp.gate.weight", "mlp.gate.weight_1"):
        return KEEP if rest.endswith("_1") else rows(Role.COLUMNS, 1, router=True, extra=(0,))
    if ROUTER_KEEPS.match(rest) and not (rest.endswith("bias") and shape == (num_experts,)):
        return KEEP
    if ROUTER_ROWS.match(rest):
        return rows(Role.ROWS, 0, router=True, extra=(0, extra_rows))
    if FUSED_ROWS.match(rest) and len(shape) == 2 and shape[0] % num_experts == 0:
        return Key(Role.ROWS, stack, layer, rows=shape[0])
    if FUSED.match(rest) or (FUSED_IN_BLOCK.match(rest) and len(shape) >= 2):
        if shape in ((), (1,)):
            return KEEP  # one scale for all experts
        return rows(Role.ROWS, 0, router=False, extra=(0,))
    further = FURTHER_ROUTER.match(rest) and num_experts in shape[:1]
    if further or EXPERT_LIKE.search(rest) or ROUTER_LIKE.search(rest):
        raise InputError(
            f"{tensor.name} (shape {list(shape)}) belongs to the experts or the router of layer {layer}, "
            f"and semmoe does not know how to move it: {where}"
        )
    return KEEP
