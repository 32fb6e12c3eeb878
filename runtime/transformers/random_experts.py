"""Experts of Transformers with random weights, as a replay runs them: gated, one grouped matrix
product for all."""

import torch
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from semmoe.runtime.layer.tables import RunExperts


def random_experts(
    slots: int, *, hidden_size: int, expert_size: int, device: torch.device, dtype: torch.dtype
) -> RunExperts:
    """`slots` experts of width `expert_size` on rows of `hidden_size` values."""
    config = Qwen3MoeConfig(hidden_size=hidden_size, moe_intermediate_size=expert_size, num_experts=slots)
    config._experts_implementation = "grouped_mm"
    experts = Qwen3MoeExperts(config).to(device=device, dtype=dtype)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.02)
    return experts.forward
