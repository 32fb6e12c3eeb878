"""Tiny random models of every MoE family in Transformers: the real classes, few weights, routing
that is spread.

`tiny_model("qwen3_moe")` builds the family's own configuration with small numbers, the class that
hub checkpoints of the family name, and seeded float32 weights. Default initialisation (std 0.02,
biases zero) would hide mistakes: experts barely change the output and a zero correction bias can be
lost without trace; so matrices get unit-order weights and every vector over experts (correction
biases, expert biases, per-expert scales) random values. `save_pretrained` writes the model as the
hub stores it, because Transformers reverses its conversion mappings on saving.
"""

import importlib
from importlib.util import find_spec
from typing import Any

import transformers

NUM_EXPERTS = 8  # of the families without groups
NUM_GROUPED_EXPERTS = 16  # 4 groups of 4, of which 2 are eligible for each token
VOCAB_SIZE = 112

# Any field of a configuration with one of these names gets this value; fields the family lacks are
# left out.
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "num_experts": NUM_EXPERTS,
    "num_local_experts": NUM_EXPERTS,
    "n_routed_experts": NUM_EXPERTS,
    "moe_num_experts": NUM_EXPERTS,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 64,
    "sliding_window": 64,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0,
    "decoder_sparse_step": 1,
    "tie_word_embeddings": False,
}
SMALL_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "embed_dim": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "encoder_layers": 1,
    "depth": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "d_model": 32,
    "image_size": 32,
    "patch_size": 8,
    "num_position_embeddings": 16,
    "out_hidden_size": 32,
    "output_dim": 32,
    "deepstack_visual_indexes": [0],
}
GROUPED = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}
COMMON_VISION = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
)

# Families whose hub checkpoints name another class than the family's ForCausalLM.
CLASS: dict[str, str] = {
    "aria": "AriaForConditionalGeneration",
    "deepseek_ocr2": "DeepseekOcr2ForConditionalGeneration",
    "diffusion_gemma": "DiffusionGemmaEncoderTextModel",
    "dots3_note": "Dots3NoteForConditionalGeneration",
    "ernie4_5_vl_moe": "Ernie4_5_VLMoeForConditionalGeneration",
    "gemma4": "Gemma4ForConditionalGeneration",
    "glm4v_moe": "Glm4vMoeForConditionalGeneration",
    "glm5_next": "Glm5NextForConditionalGeneration",
    "inkling": "InklingForConditionalGeneration",
    "inkling2": "Inkling2ForConditionalGeneration",
    "llama4": "Llama4ForConditionalGeneration",
    "minimax_m3_vl": "MiniMaxM3SparseForConditionalGeneration",
    "mistral_large4": "MistralLarge4ForConditionalGeneration",
    "muse_spark": "MuseSparkForConditionalGeneration",
    "openai_privacy_filter": "OpenAIPrivacyFilterForTokenClassification",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "qwen4_exp": "Qwen4ExpForConditionalGeneration",
    "step3p7": "Step3p7ForConditionalGeneration",
    "unlimited_ocr": "UnlimitedOcrForConditionalGeneration",
}
# Dotted paths of nested configurations -> fields, beyond SMALL and SMALL_VISION; "" is the
# configuration itself.
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}
FIRST_DENSE = ["dense", "sparse", "sparse"]
SWA_HEADS = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8}
SAM = {
    "output_channels": 16,
    "downsample_channels": [16, 32],
    "mlp_dim": 32,
    "global_attn_indexes": [0],
    "window_size": 2,
}
HYBRID_ATTENTION = ["linear_attention", "full_attention", "linear_attention"]
FIELDS: dict[str, dict[str, dict[str, Any]]] = {
    "aria": {"": {"projector_patch_to_query_dict": {"16": 4}}},
    "axk1": {"": GROUPED | {"n_routed_experts": NUM_GROUPED_EXPERTS}},
    "bailing_hybrid": {"": GROUPED | {"num_local_experts": NUM_GROUPED_EXPERTS, "layer_group_size": 2}},
    "beam": {"": GROUPED | {"num_experts": NUM_GROUPED_EXPERTS, "mlp_layer_types": FIRST_DENSE}},
    "dbrx": {
        "": {"d_model": 32, "n_heads": 4, "n_layers": 2},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_top_k": 2},
    },
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": FIRST_DENSE},
        "vision_config.sam_config": SAM,
        "vision_config.encoder_config": {"num_key_value_heads": 2},
    },
    "deepseek_v2": {
        "": GROUPED | {"topk_method": "group_limited_greedy", "n_routed_experts": NUM_GROUPED_EXPERTS},
    },
    "deepseek_v3": {"": GROUPED | {"n_routed_experts": NUM_GROUPED_EXPERTS}},
    "deepseek_v32": {"": GROUPED | {"n_routed_experts": NUM_GROUPED_EXPERTS}},
    "deepseek_v4": {"": {"o_groups": 2, "o_lora_rank": 16, "mlp_layer_types": ["hash_moe", "moe", "moe"]}},
    "diffusion_gemma": {"": {"top_k_experts": 2, "global_head_dim": 8}},
    "dots3_note": {
        "text_config": {
            "mlp_layer_types": FIRST_DENSE,
            "layer_types": ["full_attention"] * 3,
            "head_dim": 16,
            "shared_experts_intermediate_size": 16,
        },
        "vision_config": {
            "adapter_in_dim": 32,
            "adapter_out_dim": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "mlp_layer_types": ["sparse"],
            "router_scaling_factor": 1.0,
        },
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32, "downsample_hidden_size": 8},
    },
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [16, 8],
            "hidden_size": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
        }
    },
    "gemma4": {
        "text_config": {
            "enable_moe_block": True,
            "top_k_experts": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "global_head_dim": 8,
        },
        "vision_config": {"position_embedding_size": 64, "head_dim": 16, "num_key_value_heads": 2},
    },
    "glm4v_moe": {
        "text_config": {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 1, 1],
                "partial_rotary_factor": 1.0,
            }
        }
    },
    "glm5_next": {
        "text_config": {
            "qk_rope_head_dim": 0,
            "mlp_layer_types": FIRST_DENSE,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "index_kpool": 4,
            "layer_types": HYBRID_ATTENTION,
        },
        "vision_config": {"projection_intermediate_size": 16},
    },
    "glm_moe_dsa": {"": {"mlp_layer_types": FIRST_DENSE}},
    "granitemoehybrid": {"": MAMBA | {"shared_intermediate_size": 16, "layer_types": HYBRID_ATTENTION}},
    "hy_v4": {"": {"mlp_layer_types": FIRST_DENSE}},
    "inkling": {
        "text_config": SWA_HEADS
        | {"n_shared_experts": 2, "d_rel": 4, "rel_extent": 64, "logits_mup_width_multiplier": 1.0},
        "audio_config": {"n_mel_bins": 8, "mel_vocab_size": 16, "text_hidden_size": 32},
        "vision_config": {"text_hidden_size": 32},
    },
    "inkling2": {
        "text_config": SWA_HEADS | {"d_rel": 4, "rel_extent": 64, "unpadded_vocab_size": VOCAB_SIZE},
        "vision_config": {"text_hidden_size": 32, "posemb_grid_size": 4, "projection_hidden_dim": 32},
    },
    "jamba": {"": {"attn_layer_period": 3, "attn_layer_offset": 1, "mamba_dt_rank": 4}},
    "jetmoe": {"": {"kv_channels": 8}},
    "kimi_linear": {"": {"linear_head_dim": 8, "linear_num_heads": 4, "layer_types": HYBRID_ATTENTION}},
    "lfm2_moe": {"": {"layer_types": ["conv", "full_attention", "conv"]}},
    "llama4": {
        "text_config": {"intermediate_size_mlp": 24, "num_experts_per_tok": 2},
        "vision_config": {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    },
    "longcat_flash": {
        "": {"num_layers": 2, "ffn_hidden_size": 24, "expert_ffn_hidden_size": 16, "zero_expert_num": 4, "moe_topk": 3}
    },
    "mimo_v2_flash": {
        "": {
            "layer_types": ["full_attention"] * 3,
            "mlp_layer_types": FIRST_DENSE,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
            },
        }
    },
    "minimax_m3_vl": {"": {"projector_hidden_size": 32}, "text_config": {"shared_intermediate_size": 16}},
    "mistral_large4": {"vision_config": {"head_dim": 16}},
    "muse_spark": {
        "": {"out_hidden_size": 128, "projector_hidden_size": 32},
        "text_config": {"moe_hidden_size": 16},
        "audio_config": {
            "patch_sizes": [16, 6],
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "num_hidden_layers": 2,
            "out_hidden_size": 32,
        },
        "vision_config": {"pos_emb_height": 4, "pos_emb_width": 4, "max_position_embeddings": 16},
    },
    "nemotron_h": {
        "": {
            "layers_block_type": ["moe", "linear_attention", "moe", "full_attention"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "n_groups": 2,
            "ssm_state_size": 8,
            "chunk_size": 16,
            "moe_shared_expert_intermediate_size": 16,
        }
    },
    "qwen3_5_moe": {"text_config": {"layer_types": HYBRID_ATTENTION}},
    "qwen3_next": {"": {"layer_types": HYBRID_ATTENTION}},
    "qwen3_omni_moe": {
        "": {"vision_start_token_id": VOCAB_SIZE - 1},
        "audio_config": {"downsample_hidden_size": 8, "num_mel_bins": 16},
    },
    "qwen4_exp": {
        "text_config": {
            "layer_types": ["linear_attention", "indexed_attention"],
            "num_hidden_layers": 2,
            "hc_count": 2,
            "hc_lowrank": 8,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 64,
            "indexer_compress_ratio": 4,
        }
    },
    "step3p7": {"text_config": {"mlp_layer_types": FIRST_DENSE}},
    "unlimited_ocr": {"text_config": {"mlp_layer_types": FIRST_DENSE}, "vision_config.sam_config": SAM},
    "zaya": {"": {"num_experts_per_tok": 1, "router_hidden_size": 16}},
}

# Families whose own forward fails in a release of Transformers; those that a release does not have
# are left out too.
BROKEN = {"5.19.0": ["aria", "minimax_m3_vl"], "5.24.0": ["llama4"]}.get(transformers.__version__, [])
FAMILIES: tuple[str, ...] = tuple(
    family
    for family in """
    afmoe aria axk1 axk2 bailing_hybrid beam cohere2_moe dbrx deepseek_ocr2 deepseek_v2 deepseek_v3 deepseek_v32
    deepseek_v4 diffusion_gemma dots1 dots3_note ernie4_5_moe ernie4_5_vl_moe exaone_moe flex_olmo flint gemma4
    glm4_moe glm4_moe_lite glm4v_moe glm5_next glm_moe_dsa gpt_oss granitemoe granitemoe_swa granitemoehybrid
    granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 inkling inkling2 jamba jetmoe kimi_linear kolibri1 laguna lfm2_moe
    llama4 longcat_flash mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl mistral4 mistral_large4 mixtral
    muse_spark nemotron_h olmoe openai_privacy_filter phimoe qwen2_moe qwen3_5_moe qwen3_moe qwen3_next
    qwen3_omni_moe qwen3_vl_moe qwen4_exp solar_open step3p7 unlimited_ocr zaya
    """.split()
    if family not in BROKEN and find_spec(f"transformers.models.{family}") is not None
)


def model_class(model_type: str) -> type:
    """The class that hub checkpoints of the family name in `architectures`."""
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    if model_type in CLASS:
        return getattr(module, CLASS[model_type])
    return getattr(module, next(name for name in module.__all__ if name.endswith("ForCausalLM")))


def small_fields(config_class: type, table: dict[str, Any], special: dict[str, Any]) -> dict[str, Any]:
    """The fields of `table` that the class has, then every `special` field."""
    names = {name for base in config_class.__mro__ for name in getattr(base, "__annotations__", {})}
    fields = {name: value for name, value in table.items() if name in names}
    tokens = [n for n in sorted(names) if n.endswith(("_token_id", "_token_index")) and n not in table]
    fields |= {name: VOCAB_SIZE - 1 - place for place, name in enumerate(tokens)}
    return fields | special


def nested_fields(config_class: type, path: str, special: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The fields of a configuration and, as dictionaries, of the configurations inside it."""
    last = path.rsplit(".", 1)[-1]
    towers = ("vision_config", "audio_config", "sam_config", "encoder_config")
    fields = small_fields(config_class, SMALL_VISION if last in towers else SMALL, special.get(path, {}))
    for key, sub_class in config_class.sub_configs.items():
        inner = f"{path}.{key}".lstrip(".")
        if sub_class.__name__ == "AutoConfig":
            fields[key] = {k: v for k, v in SMALL_VISION.items() if k in COMMON_VISION} | special.get(inner, {})
        else:
            fields[key] = nested_fields(sub_class, inner, special)
    return fields


def tiny_config(model_type: str) -> Any:
    """The family's configuration with small numbers, nested configurations included."""
    config_class = model_class(model_type).config_class
    return config_class(**nested_fields(config_class, "", FIELDS.get(model_type, {})))


def tiny_model(model_type: str, *, seed: int = 0) -> Any:
    """A float32 model of the family in eval mode, less than a million weights, the same for the
    same seed."""
    import torch

    torch.manual_seed(seed)
    model = model_class(model_type)(tiny_config(model_type)).float().eval()
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Any, scale: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)

    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("tid2eid"):
                num_experts = model.config.n_routed_experts
                tensor.copy_(
                    torch.rand(tensor.shape[0], num_experts, generator=generator).argsort(1)[:, : tensor.shape[1]]
                )
            elif name.endswith(("correction_bias", "expert_bias", "balancing_biases", "router.bias")):
                draw(tensor, 0.1)
            elif name.endswith("per_expert_scale"):
                tensor.copy_(1 + 0.3 * torch.rand(tensor.shape, generator=generator))
            elif tensor.is_floating_point() and tensor.dim() >= 2 and 0 <= tensor.std() < 0.05:
                draw(tensor, 0.15)
    return model


def tiny_input_ids(model_type: str, *, batch: int = 2, length: int = 12, seed: int = 1) -> Any:
    """Random token ids [batch, length] int64 of the tiny vocabulary, without special tokens."""
    import torch

    return torch.randint(5, VOCAB_SIZE // 2, (batch, length), generator=torch.Generator().manual_seed(seed))
