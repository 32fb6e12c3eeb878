"""An experts module of Transformers on one rank: tensors of S slots instead of E experts, and the
exchange of runtime/layer around its forward.

The module is called with this rank's rows, global expert ids and weights; its own forward then runs
on local slots. Families differ only inside that forward (biases, interleaved or transposed weights,
clamped activations), so one exchange serves all of them, and the router stays in the model's own
order.

Shape letters: T tokens of this rank, K top-k, E experts, S slots per rank, D hidden size.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from semmoe.profiles.capture.layers import MoeLayer
from semmoe.profiles.errors import InputError
from semmoe.profiles.families import IDENTITY_EXPERTS
from semmoe.runtime.layer.dispatch import serve_tokens
from semmoe.runtime.layer.tables import ExpertLayer, RunExperts

COUNTS = ("num_experts", "num_routed_experts", "total_experts")  # what experts modules call how many they hold


class SlotAxis(NamedTuple):
    """How a tensor of an experts module holds its experts."""

    name: str  # below the module
    rows: int  # of its first axis for each slot; 0: it belongs to no expert
    slots: int


def hold_slots(layer: MoeLayer, num_experts: int, slots: int, name: str) -> list[SlotAxis]:
    """Make room for `slots` experts instead of all: every parameter with an expert axis shrinks.
    Returns what every tensor of the module holds. Raises InputError where there is no such axis."""
    module: Any = layer.module
    rows_of = {key: 0 for key in module.state_dict()}
    for path, owner in module.named_modules():
        # DBRX keeps all experts' rows in matrices one module further down.
        in_rows = owner is not module and getattr(owner, "moe_num_experts", None) == num_experts
        for key, parameter in list(owner.named_parameters(recurse=False)):
            sizes = {num_experts: slots, num_experts + (getattr(module, IDENTITY_EXPERTS, 0) or 0): slots}
            if in_rows:
                sizes = {parameter.shape[0]: parameter.shape[0] // num_experts * slots}
            if (owner is module or in_rows) and parameter.shape[0] in sizes:
                smaller = parameter.new_empty((sizes[parameter.shape[0]], *parameter.shape[1:]))
                setattr(owner, key, nn.Parameter(smaller, requires_grad=False))
                rows_of[f"{path}.{key}" if path else key] = parameter.shape[0] // num_experts if in_rows else 1
    if not any(rows_of.values()):
        raise InputError(f"{name}: {layer.name} holds no tensor with {num_experts} experts on its first axis")
    for count in COUNTS:
        if count == "num_experts" or hasattr(module, count):
            setattr(module, count, slots)
    return [SlotAxis(key, rows, slots) for key, rows in rows_of.items()]


def row_width(experts: nn.Module) -> int:
    """Values of a row that the experts take, from the shape of their last projection: [S, D, I],
    or [S, I, D] where transposed."""
    weight: Any = getattr(experts, "down_proj", None)
    if weight is None:
        return int(experts.hidden_size)  # pyright: ignore
    shape = weight.shape
    return int(shape[2] if getattr(experts, "is_transposed", False) else shape[1])


def exchange_around(module: nn.Module, layer: ExpertLayer, run_experts: RunExperts) -> None:
    """Let the module's forward go through the exchange; `run_experts` is its own work on slots."""

    def forward(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        rows_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        ids_TK, weight_TK = (t.reshape(len(rows_TD), -1) for t in (top_k_index, top_k_weights))
        serve = layer.state.instead or serve_tokens
        return serve(layer, run_experts, rows_TD, ids_TK, weight_TK).reshape(hidden_states.shape)

    module.forward = forward


@contextmanager
def one_expert_at_a_time(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, experts modules run Transformers' plain loop over experts, not a grouped product."""
    configs = {id(config): config for module in modules if (config := getattr(module, "config", None)) is not None}
    before = [(config, config._experts_implementation) for config in configs.values()]
    try:
        for config in configs.values():
            config._experts_implementation = "eager"
        yield
    finally:
        for config, implementation in before:
            config._experts_implementation = implementation
