"""Where a model family is declared: every fact about families that semmoe relies upon, once.

Most families need no entry: their config.json spells the facts in one of the ways below, their
experts module takes (hidden_states, index of the chosen experts, weights), and their checkpoints
name tensors in one of the patterns below. FAMILIES holds what is special about the others.

The spellings of config.json are those of the configuration classes of Transformers 5.23, and of
older files that these classes still read; the names of tensors are its hub layouts
(transformers/conversion_mapping.py), with the suffixes of compressed-tensors, FP8, MXFP4, GPTQ, AWQ
and ModelOpt checkpoints. No torch here: a command that reads a config.json or a header needs none.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# ---- config.json: the spellings of one fact, and where language models are nested

NUM_EXPERTS = ("n_routed_experts", "num_experts", "moe_num_experts", "num_local_experts")
TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
    "experts_per_token",
    "num_selected_experts",
)
NUM_LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
NUM_MTP_LAYERS = (
    "num_nextn_predict_layers",
    "num_mtp_modules",
    "num_mtp_layers",
    "mtp_num_hidden_layers",
    "mtp_num_layers",
)
NESTED = ("text_config", "thinker_config", "language_config", "llm_config", "ffn_config")
IDENTITY_EXPERTS = "zero_expert_num"  # routed experts that return their input (LongCat): classes after the others

# ---- modules of a loaded model: the second argument of an experts module, the router's choice

INDEX_NAMES = ("top_k_index", "router_indices", "selected_experts", "topk_indices", "top_k_indices", "topk_ids")

# ---- families


@dataclass(frozen=True)
class Family:
    """What is special about a family; the default is a family with nothing special."""

    defaults: Mapping[str, Any] = field(default_factory=dict)  # of keys that its config.json may leave out
    num_layers: tuple[str, ...] = NUM_LAYERS  # spellings of the number of layers
    top_k: tuple[str, ...] = TOP_K
    encoder_decoder: str = ""  # how its sparse steps count: the layers i with i % step == 1 or (i + 1) % step == 0
    skips: bool = False  # its router may choose no expert at all
    greedy: bool = False  # it reads topk_method, whose default "greedy" ignores the groups of experts
    router_extras: str | int = IDENTITY_EXPERTS  # classes of its router after the routed experts: a key, or a number
    vision_experts: bool = False  # one list of experts on disk, the first half for text; routers [H, E]
    block: str = ""  # class of its MoE block, of its router and of its experts, where they are handled apart
    router: str = ""
    experts: str = ""
    untraceable: str = ""  # why the choices of its routers cannot be recorded or used
    unshardable: str = ""  # why its experts cannot be moved in a checkpoint
    unmoved_by: tuple[str, ...] = ()  # engines whose own class of it lacks what they need to move experts


GROUPS_8_4 = {"n_group": 8, "topk_group": 4}
DEEPSEEK_V3 = Family({"first_k_dense_replace": 3, **GROUPS_8_4})
DENSE_1, DENSE_3 = Family({"first_k_dense_replace": 1}), Family({"first_k_dense_replace": 3})
INKLING = Family(router_extras="n_shared_experts")  # sinks
BY_CAPACITY = "its routers drop tokens over an expert's capacity, so a choice depends on the rest of the batch"
BY_POSITION = "its router drops tokens by position in the batch"
NLLB = Family(
    {"top_k": 2},
    top_k=(*TOP_K, "top_k"),
    encoder_decoder="(i + 1) % step == 0",
    untraceable=BY_CAPACITY,
    unshardable=BY_POSITION,
)

FAMILIES: dict[str, Family] = {
    "afmoe": Family({"num_dense_layers": 1}),
    "axk1": Family({"first_k_dense_replace": 1, **GROUPS_8_4}),
    "axk2": DENSE_1,
    "bailing_hybrid": Family({"first_k_dense_replace": 2, **GROUPS_8_4}),
    "beam": DEEPSEEK_V3,
    "dbrx": Family(experts="DbrxExperts", unmoved_by=("sglang",)),
    "deepseek": Family(unmoved_by=("sglang",)),
    "deepseek_ocr2": Family(greedy=True),
    "deepseek_v2": Family(greedy=True),
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v32": DEEPSEEK_V3,
    "doge": Family(
        untraceable="its experts are single rows found by product keys, not modules that a rank can host",
        unshardable="its product-key router scores a grid, not single experts",
    ),
    "ernie4_5_moe": Family({"moe_layer_start_index": 1}, unmoved_by=("sglang",)),
    "ernie4_5_vl_moe": Family({"first_k_dense_replace": 1}, vision_experts=True),
    "exaone_moe": DENSE_1,
    "flint": Family({"mlp_only_layers": [0, 1]}),
    "glm4_moe": DENSE_1,
    "glm4_moe_lite": DENSE_1,
    "glm4v_moe": DENSE_1,
    "glm5_next": DENSE_3,
    "glm_moe_dsa": DENSE_3,
    "gpt_oss": Family(unmoved_by=("vllm",)),
    "granitemoe": Family(unmoved_by=("sglang", "vllm")),
    "grok-1": Family(unmoved_by=("sglang",)),
    "hy_v3": DENSE_1,
    "hy_v4": DENSE_1,
    "inkling": INKLING,
    "inkling2": INKLING,
    "inkling2_loop": INKLING,
    "inkling_mm_model": INKLING,
    "jamba": Family({"expert_layer_period": 2, "expert_layer_offset": 1}),
    "jetmoe": Family(router="JetMoeTopKGating"),
    "kimi_k2": DEEPSEEK_V3,
    "kimi_linear": DENSE_1,
    "laguna": DENSE_1,
    "lfm2_moe": Family({"num_dense_layers": 2}),
    "llama4": Family(block="Llama4TextMoe", router="Llama4Router", unmoved_by=("sglang",)),
    # num_hidden_layers counts attention blocks here: two of them make one layer with experts.
    "longcat_flash": Family(num_layers=("num_layers", *NUM_LAYERS), experts="LongcatFlashExperts"),
    "mimo_v2_flash": DENSE_1,
    "mistral_large4": DENSE_1,
    "mixtral": Family(unmoved_by=("sglang",)),
    "nllb-moe": NLLB,
    "nllb_moe": NLLB,
    "olmoe": Family(unmoved_by=("sglang", "vllm")),
    "phimoe": Family(unmoved_by=("sglang",)),
    "step3p7": DENSE_3,
    "switch_transformers": Family(
        {"top_k": 1},
        top_k=(*TOP_K, "top_k"),
        encoder_decoder="i % step == 1",
        untraceable=BY_CAPACITY,
        unshardable=BY_POSITION,
    ),
    "unlimited_ocr": Family({"first_k_dense_replace": 1}, greedy=True),
    "vitpose_backbone": Family(untraceable="its experts are chosen by data set, not by token"),
    "zaya": Family(skips=True, router_extras=1, experts="ZayaExperts"),
}


def find_family(*model_types: str) -> Family:
    """What is special about a model of these types, the outer one first.

    The language model inside a multimodal one has its own ("glm4v_moe_text"); a type without an
    entry (qwen3_omni_moe_thinker_text) has nothing special.
    """
    bare = [(t, t.removesuffix("_text"), t.removesuffix("_text").removesuffix("_vl")) for t in model_types]
    return next((FAMILIES[name] for names in bare for name in names if name in FAMILIES), Family())


# ---- names of tensors in checkpoints, inside the layer unless said otherwise

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
    r"(?:(?:[._]{1,2}(?:weight|bias|bias_bf16|blocks|scales|scale|scale_inv|packed|shape|global_scale|zero_point|qweight|"
    r"qzeros|g_idx|input|input_scale|input_amax|scale_2|weight_scale|weight_scale_inv|weight_scale_2|weight_packed|"
    r"weight_shape|weight_global_scale|input_global_scale|weight_zero_point|alpha|amax|quantizer|weight_quantizer|"
    r"input_quantizer|output_quantizer|pre_quant_scale|scale_1|scale_3|global))+)?"
)
FUSED_PROJECTION = (
    r"(?:gate_up_proj|gate_and_up_projs|gate_proj|up_proj|down_proj|down_projs|gate_projs|up_projs|"
    r"fc[123]|w13|w[123]|input_linear|output_linear)"
)
FUSED = re.compile(rf"^(?:{MOE}\.)?experts\.{FUSED_PROJECTION}{QUANT}$")
# Without a module named experts: Granite and JetMoE (linear layers with an expert axis), Step 3
# (one per projection).
IN_BLOCK = r"(?:(?:block_sparse_moe|mlp)\.(?:input|output)_linear|moe\.(?:gate|up|down)_proj)"
FUSED_IN_BLOCK = re.compile(rf"^{IN_BLOCK}{QUANT}$")
BESIDE_FUSED = re.compile(rf"^{IN_BLOCK}[._]")  # whatever else a stacked projection has
FUSED_ROWS = re.compile(r"^ffn\.experts\.mlp\.(?:w1|v1|w2)$")  # DBRX: [E * I, H]
SHARED_BY_EXPERTS = re.compile(rf"^(?:{MOE}\.)?(?:experts\.)?(?:pre|post)_expert_(?:norm|proj)\.weight$")
# By name one for all experts of a layer, norms and projections around them (Kimi K3's
# routed_expert_down_proj), unless the shape says otherwise.
AROUND_EXPERTS = re.compile(
    rf"^(?:{MOE}\.)?(?:experts\.(?=[a-z_]*(?:norm|latent))|(?=[a-z_]*(?:norm|proj|latent|linear)))"
    rf"[a-z_]+(?:\.weight|\.bias)?{QUANT}$"
)
LATENT = re.compile(rf"^{MOE}\.\w*latent")
# What may be of any shape beside experts of other names: a dense network beside them (Gemma 4).
DENSE_BESIDE = re.compile(r"^(?:mlp|feed_forward)\.(?:gate|up|down|gate_up)_proj\.|(?:^|[._])(?:layer)?norm\.")

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
OF_EXPERTS = re.compile(rf"^(?:{MOE}\.)?experts\.|[._]\d+(?:[._]|$)")  # of their module, or with a number
NUMBERED = re.compile(r"[._]\d+(?:[._]|$)")
OF_BLOCK = re.compile(rf"^{MOE}\.")


def layer_number(name: str) -> int | None:
    """The first number in a module path or tensor key: its layer."""
    numbers = re.findall(r"(?:^|\.)(\d+)\.", name)
    return int(numbers[0]) if numbers else None
