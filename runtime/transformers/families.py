"""Families whose expert layers are not called like the others', and what makes them so:
experts(hidden_states, top_k_index, top_k_weights).

Llama 4 runs all experts on all tokens, scaled by scores that are 0 except at the chosen ones: its
blocks pick the chosen ones instead; the weight scales what goes into an expert, not what comes out.
LongCat and Zaya choose "no expert" for some slots: these reach the dispatch as the empty slot E,
and LongCat's identity experts are added where the token lives. DBRX's experts add an axis to what
they return.

Shape letters: T tokens, K top-k, E experts, S experts held, P (token, choice) pairs, D hidden size.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from semmoe.profiles.families import FAMILIES, IDENTITY_EXPERTS
from semmoe.runtime.layer.tables import RunExperts


def choose_explicitly(model: nn.Module) -> None:
    """Give Llama 4's blocks and experts forwards that name their choice; other families are left
    alone."""
    for module in model.modules():
        if type(module).__name__ == FAMILIES["llama4"].block:
            experts: Any = module.experts
            experts.is_transposed = True  # [S, D, 2 I] and [S, I, D]
            experts.__class__ = type("Llama4TextExperts", (type(experts),), {"forward": _llama4_experts})
            module.__class__ = type("Llama4TextMoe", (type(module),), {"forward": _llama4_block})


def _llama4_block(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Shared expert and chosen experts, [T, D], and the router's logits."""
    rows_TD = hidden_states.reshape(-1, self.hidden_dim)
    score_TE, logits_TE = self.router(rows_TD)
    weight_TK, index_TK = score_TE.topk(self.top_k, dim=-1)
    return self.shared_expert(rows_TD) + self.experts(rows_TD, index_TK, weight_TK), logits_TE


def _llama4_experts(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Sum of the chosen experts' outputs of weighted rows, [T, D]."""

    def expert(number: int, rows_PD: torch.Tensor, weight_P1: torch.Tensor) -> torch.Tensor:
        gate, up = (rows_PD * weight_P1 @ self.gate_up_proj[number]).chunk(2, dim=-1)
        return (up * self.act_fn(gate)) @ self.down_proj[number]

    return _expert_by_expert(expert, self.num_experts, hidden_states, top_k_index, top_k_weights)


def _longcat_experts(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Weighted sum of the chosen experts' outputs, [T, D]; Transformers' own fails for one
    choice per row."""

    def expert(number: int, rows_PD: torch.Tensor, weight_P1: torch.Tensor) -> torch.Tensor:
        gate, up = linear(rows_PD, self.gate_up_proj[number]).chunk(2, dim=-1)
        return linear(self.act_fn(gate) * up, self.down_proj[number]) * weight_P1

    return _expert_by_expert(expert, self.num_routed_experts, hidden_states, top_k_index, top_k_weights)


def _expert_by_expert(
    expert: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor],
    num_experts: int,
    hidden_TD: torch.Tensor,
    index_TK: torch.Tensor,
    weight_TK: torch.Tensor,
) -> torch.Tensor:
    """Rows sorted by expert, one call for each expert that has some, outputs added up per token."""
    order_P = index_TK.reshape(-1).argsort(stable=True)
    token_P = order_P // index_TK.shape[1]
    rows_PD, weight_P1 = hidden_TD[token_P], weight_TK.reshape(-1, 1)[order_P].to(hidden_TD.dtype)
    sizes = torch.bincount(index_TK.reshape(-1), minlength=num_experts).tolist()
    parts = enumerate(zip(rows_PD.split(sizes), weight_P1.split(sizes), strict=True))
    outputs = [expert(number, rows, weights) for number, (rows, weights) in parts if len(rows)]
    return (
        torch.zeros_like(hidden_TD).index_add_(0, token_P, torch.cat(outputs))
        if outputs
        else torch.zeros_like(hidden_TD)
    )


def leave_out_empty_slots(module: Any, num_experts: int) -> None:
    """Choices of no expert go to the dispatch as the id E; LongCat's identity experts cost one
    multiplication here."""
    dispatch, identities = module.forward, getattr(module, IDENTITY_EXPERTS, 0)

    def forward(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        # Zaya's router rewrites "skip this layer" to expert 0 with weight 0.
        empty_TK = top_k_index >= num_experts if identities else top_k_weights == 0
        output = dispatch(hidden_states, top_k_index.masked_fill(empty_TK, num_experts), top_k_weights)
        if not identities:
            return output
        own_T1 = top_k_weights.masked_fill(~empty_TK, 0).sum(-1, keepdim=True)
        return output + (hidden_states * own_T1).to(output.dtype)

    module.forward = forward


def local_experts(module: Any) -> RunExperts:
    """The module's own work on rows of experts that it holds."""
    own_forward = module.forward
    if type(module).__name__ == FAMILIES["longcat_flash"].experts:
        return MethodType(_longcat_experts, module)
    if type(module).__name__ == FAMILIES["dbrx"].experts:
        return lambda rows, slots, weights: own_forward(rows, slots, weights).reshape(rows.shape)
    return own_forward
