"""Tensor names and shapes of small checkpoints, by the way their experts are stored and
quantised."""

from pathlib import Path

D, F, E = 16, 8, 8
DENSE = {
    "model.embed_tokens.weight": ("BF16", (32, D)),
    "model.layers.0.self_attn.q_proj.weight": ("BF16", (D, D)),
    "model.layers.0.mlp.shared_experts.up_proj.weight": ("BF16", (F, D)),
    "model.layers.0.mlp.shared_expert_gate.weight": ("BF16", (1, D)),
    "lm_head.weight": ("BF16", (32, D)),
}
ROUTER = {"mlp.gate.weight": ("BF16", (E, D)), "mlp.gate.e_score_correction_bias": ("F32", (E,))}
# The tensors of one expert, by quantisation: what compressed-tensors, FP8, GPTQ, AWQ and ModelOpt
# write.
PER_EXPERT = {
    "plain": {"weight": ("BF16", (F, D))},
    "bias": {"weight": ("BF16", (F, D)), "bias": ("BF16", (F,))},
    "fp8": {"weight": ("F8_E4M3", (F, D)), "weight_scale_inv": ("F32", (1, 1))},
    "fp8_tensor": {"weight": ("F8_E4M3", (F, D)), "weight_scale": ("F32", ()), "input_scale": ("F32", ())},
    "nvfp4": {
        "weight": ("U8", (F, D // 2)),
        "weight_scale": ("F8_E4M3", (F, D // 16)),
        "weight_scale_2": ("F32", ()),
        "input_scale": ("F32", ()),
    },
    "packed": {
        "weight_packed": ("I32", (F, D // 8)),
        "weight_scale": ("BF16", (F, 1)),
        "weight_shape": ("I64", (2,)),
        "weight_global_scale": ("F32", (1,)),
    },
    "gptq": {
        "qweight": ("I32", (D // 8, F)),
        "qzeros": ("I32", (1, F // 8)),
        "scales": ("F16", (1, F)),
        "g_idx": ("I32", (D,)),
    },
    "awq": {"qweight": ("I32", (D, F // 8)), "qzeros": ("I32", (1, F // 8)), "scales": ("F16", (1, F))},
}
FUSED = {
    "mxfp4": {
        "gate_up_proj_blocks": ("U8", (E, 2 * F, 1, 8)),
        "gate_up_proj_scales": ("U8", (E, 2 * F, 1)),
        "gate_up_proj_bias": ("BF16", (E, 2 * F)),
        "down_proj_blocks": ("U8", (E, D, 1, 4)),
        "down_proj_scales": ("U8", (E, D, 1)),
        "down_proj_bias": ("BF16", (E, D)),
    },
    "plain": {"gate_up_proj": ("BF16", (E, D, 2 * F)), "down_proj": ("BF16", (E, F, D))},
    "fp8": {
        "gate_up_proj": ("F8_E4M3", (E, D, 2 * F)),
        "gate_up_proj_scale_inv": ("F32", (E, 1, 1)),
        "down_proj": ("F8_E4M3", (E, F, D)),
        "down_proj_scale_inv": ("F32", (E, 1, 1)),
        "gate_up_proj_input_scale": ("F32", ()),
    },
    "modelopt": {
        "gate_up_proj": ("U8", (E, D, F)),
        "gate_up_proj_weight_scale": ("F8_E4M3", (E, D, F // 8)),
        "gate_up_proj_weight_scale_2": ("F32", ()),
        "down_proj": ("U8", (E, F, D // 2)),
        "down_proj_weight_scale": ("F8_E4M3", (E, F, D // 16)),
        "down_proj_weight_scale_2": ("F32", (1,)),
    },
    "inkling": {
        "w13_weight": ("F8_E4M3", (E, 2 * F, D)),
        "w13_weight_scale": ("F32", (E, 1)),
        "w2_weight": ("F8_E4M3", (E, D, F)),
    },
}


def per_expert_model(kind: str = "plain", *, layers: int = 2) -> dict:
    """Tensor specs of a model with `layers` MoE layers whose experts have a tensor per
    projection and suffix."""
    specs = dict(DENSE)
    for layer in range(layers):
        specs |= {f"model.layers.{layer}.{name}": spec for name, spec in ROUTER.items()}
        for expert in range(E):
            for projection in ("gate_proj", "up_proj", "down_proj"):
                for suffix, spec in PER_EXPERT[kind].items():
                    specs[f"model.layers.{layer}.mlp.experts.{expert}.{projection}.{suffix}"] = spec
    return specs


def fused_model(kind: str = "plain", *, layers: int = 2) -> dict:
    specs = dict(DENSE)
    for layer in range(layers):
        specs |= {f"model.layers.{layer}.{name}": spec for name, spec in ROUTER.items()}
        specs |= {f"model.layers.{layer}.mlp.experts.{name}": spec for name, spec in FUSED[kind].items()}
    return specs


def rows(data: bytes, count: int) -> list[bytes]:
    size = len(data) // count
    return [data[i * size : (i + 1) * size] for i in range(count)]


def assert_same_files(first: Path, second: Path) -> None:
    names = sorted(str(p.relative_to(first)) for p in first.rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(second)) for p in second.rglob("*") if p.is_file())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
