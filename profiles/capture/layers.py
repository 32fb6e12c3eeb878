"""Where a model of Transformers keeps its routed experts, how to read the router's choice there,
and the facts of a trace.

Almost every family hands the router's choice to a module `experts(hidden_states, top_k_index,
top_k_weights)` once per MoE layer, so a forward pre-hook on that module sees the choice itself:
correction biases, groups of experts and hash tables are in it already (top-k of the logits is not
the choice for such routers). Two families differ and are read at the router: Llama 4 returns scores
that are zero except at the chosen experts, JetMoE the order in which it sorts its (token, choice)
pairs.

Shape letters: T tokens of a forward pass, K top-k, E experts.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from semmoe.profiles.errors import InputError
from semmoe.profiles.families import FAMILIES, IDENTITY_EXPERTS, INDEX_NAMES, find_family, layer_number
from semmoe.profiles.trace import TraceInfo

Choice = tuple[torch.Tensor, torch.Tensor]  # expert ids [T, K] and their weights [T, K]


@dataclass(frozen=True, eq=False)
class MoeLayer:
    """One MoE layer of a loaded model: the module to hook, and how to read the choice from what
    the hook sees."""

    name: str  # path of the hooked module
    module: nn.Module
    model_layer: int  # number of the layer in the model, dense layers counted
    num_experts: int
    read: Callable[[tuple, dict, Any], Choice]  # positional and named arguments of the module, and its output
    after: bool = False  # the choice is in the module's output
    empty_slots: bool = False  # a choice may be no expert at all: id num_experts


def find_moe_layers(model: Any) -> list[MoeLayer]:
    """The MoE layers of `model` in layer order; an empty list for a dense model. Works on
    weights of device meta too."""
    layers = []
    if find_family(model.config.model_type).untraceable:
        return layers
    for name, module in model.named_modules():
        if (number := layer_number(name)) is not None and (layer := _moe_layer(name, module, number)) is not None:
            layers.append(layer)
    return sorted(layers, key=lambda layer: layer.model_layer)


def _moe_layer(name: str, module: Any, number: int) -> MoeLayer | None:
    kind = type(module).__name__
    if kind in ROUTERS:
        if kind == FAMILIES["jetmoe"].router and not name.endswith("mlp.router"):
            return None  # it chooses attention experts
        read, top_k = ROUTERS[kind], int(module.top_k)
        return MoeLayer(name, module, number, int(module.num_experts), lambda a, k, out: read(out, top_k), after=True)
    names = list(inspect.signature(type(module).forward).parameters)[1:4]
    if len(names) < 3 or names[1] not in INDEX_NAMES or "weight" not in names[2]:
        return None
    num_experts = int(getattr(module, "num_routed_experts", None) or module.num_experts)
    if getattr(
        module, IDENTITY_EXPERTS, 0
    ):  # LongCat: ids from num_experts on are identity experts, which cost nothing
        read = _reader(names, lambda index, weights: index.clamp(max=num_experts))
        return MoeLayer(name, module, number, num_experts, read, empty_slots=True)
    if kind == FAMILIES["zaya"].experts:  # its router rewrites "skip this layer" to expert 0 with weight 0
        read = _reader(names, lambda index, weights: index.masked_fill(weights == 0, num_experts))
        return MoeLayer(name, module, number, num_experts, read, empty_slots=True)
    return MoeLayer(name, module, number, num_experts, _reader(names))


def _reader(names: list[str], change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None) -> Callable:
    """Reads the choice from the arguments of an experts module."""

    def read(args: tuple, kwargs: dict, _output: Any) -> Choice:
        index = args[1] if len(args) > 1 else kwargs[names[1]]
        weights = args[2] if len(args) > 2 else kwargs[names[2]]
        return (index if change is None else change(index, weights)), weights

    return read


def _read_llama4(output: tuple, top_k: int) -> Choice:
    scores_TE, _logits = output
    weights, index = scores_TE.topk(top_k, dim=-1)
    return index, weights


def _read_jetmoe(output: tuple, top_k: int) -> Choice:
    """JetMoE's router returns the order that sorts its T * K choices by expert, and how many
    each expert got."""
    order, _token, weights, expert_size, _logits = output
    sizes = torch.as_tensor(expert_size, device=order.device)
    by_expert = torch.repeat_interleave(torch.arange(len(sizes), device=order.device), sizes)
    index = torch.empty_like(order).index_copy_(0, order, by_expert)
    weights = torch.empty_like(weights).index_copy_(0, order, weights)
    return index.view(-1, top_k), weights.view(-1, top_k)


ROUTERS = {FAMILIES["llama4"].router: _read_llama4, FAMILIES["jetmoe"].router: _read_jetmoe}


def explain_unsupported(model: Any, name: str) -> InputError:
    """Why a model without MoE layers cannot be traced, in one line that names its type."""
    model_type = model.config.model_type
    if reason := find_family(model_type).untraceable:
        return InputError(f"{name}: model type {model_type!r} is not supported: {reason}")
    if any(re.search(r"(^|\.)experts?(\.|$)", path) for path, _ in model.named_modules()):
        return InputError(
            f"{name}: model type {model_type!r} is not supported: no module of it takes (hidden_states, top_k_index, top_k_weights), "
            f"so the choice of its routers cannot be seen"
        )
    return InputError(
        f"{name}: model type {model_type!r} is dense: no layer routes tokens to experts, there is nothing to trace"
    )


def trace_info(
    model: Any, layers: list[MoeLayer], top_k: int, *, name: str, embedding: dict[str, Any] | None, made_by: str
) -> TraceInfo:
    """The facts of a trace of `layers`, those that take part in reading text. Raises InputError
    where their shapes differ."""
    config = model.config.get_text_config()
    counts = sorted({layer.num_experts for layer in layers})
    if len(counts) > 1:
        raise InputError(
            f"{name}: layers have different numbers of experts ({', '.join(map(str, counts))}), which no placement holds"
        )
    numbers = [layer.model_layer for layer in layers]
    if len(set(numbers)) < len(numbers):
        raise InputError(
            f"{name}: a layer has two expert modules ({', '.join(layer.name for layer in layers[:3])}, ...)"
        )
    greedy = find_family(model.config.model_type, config.model_type).greedy
    grouped = not (greedy and getattr(config, "topk_method", "greedy") == "greedy")
    stack, _, _ = re.split(r"(?:(?<=\.)|^)(\d+)\.", layers[0].name, maxsplit=1)
    vectors = model.get_input_embeddings().weight
    return TraceInfo(
        model=name,
        num_layers=len(layers),
        num_experts=counts[0],
        top_k=top_k,
        model_layers=tuple(numbers),
        num_model_layers=len(model.get_submodule(stack.rstrip("."))),
        model_type=model.config.model_type,
        vocab_size=int(vectors.shape[0]),
        n_group=int((getattr(config, "n_group", None) or 1) if grouped else 1),
        topk_group=int((getattr(config, "topk_group", None) or 1) if grouped else 1),
        empty_slots=any(layer.empty_slots for layer in layers),
        embedding=embedding,
        made_by=made_by,
    )
