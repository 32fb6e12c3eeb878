"""Decoder layers of the usual pre-norm shape, by the names that Transformers gives their parts:

hidden -> input_layernorm -> self_attn -> + residual
-> post_attention_layernorm -> mlp -> + residual
"""

from collections.abc import Callable
from typing import Any

import torch

from semmoe.profiles.capture.layers import find_moe_layers
from semmoe.profiles.errors import InputError
from semmoe.profiles.families import layer_number

PARTS = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")

# The output of a layer for hidden states and the arguments that the model names.
LayerForward = Callable[[torch.Tensor, dict[str, Any]], torch.Tensor]


def decoder_layers(model: Any, name: str) -> list[Any]:
    """The decoder layers in order. Raises InputError where they lack a part of the usual shape."""
    moe = find_moe_layers(model)
    number = layer_number(moe[0].name)
    stack = model.get_submodule(moe[0].name.split(f".{number}.")[0])
    for place, layer in enumerate(stack):
        missing = [part for part in PARTS if not hasattr(layer, part)]
        if missing:
            raise InputError(f"--scheduler tp: layer {place} of {name} has no {missing[0]}; use --scheduler dp")
    return list(stack)


def attend(layer: Any, hidden_states: torch.Tensor, named: dict[str, Any]) -> torch.Tensor:
    """Norm and attention, without the residual."""
    output = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **named)
    return output[0] if isinstance(output, tuple) else output


def feed_forward(layer: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Norm, router, experts and shared experts, without the residual."""
    output = layer.mlp(layer.post_attention_layernorm(hidden_states))
    return output[0] if isinstance(output, tuple) else output


def replace_forward(layer: Any, run: LayerForward) -> None:
    """Let the model call `run` for this layer."""

    def forward(hidden_states: torch.Tensor, **named: Any) -> torch.Tensor:
        return run(hidden_states, named)

    layer.forward = forward
