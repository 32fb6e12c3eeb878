"""A model of Transformers on one rank: dense weights whole, its own experts only, and the exchange
in between.

The family's own class is built with expert tensors of S slots instead of E experts, filled with the
rank's tensors (runtime/transformers/rank_weights.py), and its experts modules get SemmoeEP through
Transformers' `ep_dispatch_experts` style.

Shape letters: L MoE layers, R ranks, S slots per rank, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.distributed.expert_parallel import EpDispatchExpertsParallel

from semmoe.profiles.capture.layers import MoeLayer, find_moe_layers
from semmoe.profiles.capture.loading import ModelSource, model_class, refusals
from semmoe.profiles.errors import InputError
from semmoe.profiles.families import IDENTITY_EXPERTS
from semmoe.runtime.ranks.group import Group
from semmoe.runtime.ranks.stopwatch import Stopwatch
from semmoe.runtime.transformers.ep import (
    NAME,
    Counters,
    ExpertLayer,
    RankState,
    RunExperts,
    join_empty,
    layer_tables,
    register,
)
from semmoe.runtime.transformers.families import choose_explicitly, leave_out_empty_slots, local_experts
from semmoe.runtime.transformers.rank_weights import PlacedCheckpoint, rank_tensors
from semmoe.solvers.plan import Plan


@dataclass(frozen=True, eq=False)
class PlacedModel:
    """The model of this rank, its expert layers in order, and what they share."""

    model: Any
    layers: tuple[ExpertLayer, ...]
    run_experts: tuple[RunExperts, ...]
    state: RankState
    group: Group

    def join_empty(self) -> None:
        """Take part in every expert layer of one forward pass of the others, without tokens."""
        for layer, run in zip(self.layers, self.run_experts, strict=True):
            join_empty(layer, run)


def load_placed(
    source: ModelSource, placed: PlacedCheckpoint, plan: Plan, serving_LRE: np.ndarray, group: Group, *, dtype: str
) -> PlacedModel:
    """Load what `group.rank` holds of the model. Raises InputError where the family or the
    checkpoint does not allow it."""
    placement = placed.placement
    chosen: Any = model_class(source)
    if chosen is AutoModelForCausalLM:
        with refusals(f"{source.name}: model type {source.config.model_type!r} is not supported"):
            chosen = chosen._model_mapping[type(source.config)]
    if not chosen.can_generate():
        raise InputError(
            f"{source.name}: model type {source.config.model_type!r} does not generate text token by token"
        )

    def shrink(model: nn.Module) -> None:
        choose_explicitly(model)
        for layer in placed_layers(model, plan, source.name):
            hold_slots(layer, placement.num_experts, placement.slots_per_rank, source.name)

    with refusals(f"{source.name} cannot be loaded"):
        config = source.config
        model, loading = built_with(chosen, shrink).from_pretrained(
            None,
            config=config,
            state_dict=rank_tensors(placed, group.rank),
            dtype=(config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype),
            device_map=group.device,
            output_loading_info=True,
        )
    if missing := sorted(loading["missing_keys"]):
        raise InputError(
            f"{source.name}: the checkpoint lacks {len(missing)} tensors of the model, {missing[0]} among them"
        )
    model.eval()
    state = RankState(Stopwatch(group.device), Counters.zeros(plan.placement.num_layers, group.size))
    layers = install(model, placed, plan, serving_LRE, state, group)
    run_experts = tuple(run for _, run in layers)
    return PlacedModel(model, tuple(layer for layer, _ in layers), run_experts, state, group)


def built_with(chosen: type, finish: Callable[[nn.Module], None]) -> Any:
    """The class `chosen`, whose new models go through `finish` before weights are loaded.

    Name and module stay those of the family: Transformers looks at both.
    """

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        chosen.__init__(self, *args, **kwargs)
        finish(self)

    return type(chosen.__name__, (chosen,), {"__init__": build, "__module__": chosen.__module__})


def placed_layers(model: nn.Module, plan: Plan, name: str) -> list[MoeLayer]:
    """The expert modules that the plan places. Raises InputError for a family that cannot be
    split by experts."""
    layers: dict[int, MoeLayer] = {}
    for layer in find_moe_layers(model):
        other = layers.get(layer.model_layer)
        if other is not None and not other.after and not layer.after:
            raise InputError(
                f"{name}: layer {layer.model_layer} has two expert modules ({other.name}, {layer.name}), a plan places one"
            )
        if other is None or other.after:  # Llama 4's router and its experts are both found
            layers[layer.model_layer] = layer
    chosen = []
    for number in plan.model.model_layers:
        layer = layers.get(number)
        if layer is None:
            raise InputError(f"{name} has no MoE layer {number}, the plan places experts there")
        if layer.after:
            raise InputError(
                f"{name}: model type {model.config.model_type!r} cannot be split over ranks: its experts are not called "  # pyright: ignore
                f"with the chosen expert ids alone"
            )
        chosen.append(layer)
    return chosen


def hold_slots(layer: MoeLayer, num_experts: int, slots: int, name: str) -> None:
    """Make room for `slots` experts instead of all: every parameter with an expert axis shrinks."""
    module: Any = layer.module
    found = False
    for owner in module.modules():
        # DBRX keeps all experts' rows in matrices one module further down.
        in_rows = owner is not module and getattr(owner, "moe_num_experts", None) == num_experts
        for key, parameter in list(owner.named_parameters(recurse=False)):
            sizes = {num_experts: slots, num_experts + (getattr(module, IDENTITY_EXPERTS, 0) or 0): slots}
            if in_rows:
                sizes = {parameter.shape[0]: parameter.shape[0] // num_experts * slots}
            if (owner is module or in_rows) and parameter.shape[0] in sizes:
                smaller = parameter.new_empty((sizes[parameter.shape[0]], *parameter.shape[1:]))
                setattr(owner, key, nn.Parameter(smaller, requires_grad=False))
                found = True
    if not found:
        raise InputError(f"{name}: {layer.name} holds no tensor with {num_experts} experts on its first axis")
    for count in ("num_experts", "num_routed_experts", "total_experts"):
        if count == "num_experts" or hasattr(module, count):
            setattr(module, count, slots)


def row_width(experts: nn.Module) -> int:
    """Values of a row that the experts take, from the shape of their last projection: [S, D, I],
    or [S, I, D] where transposed."""
    weight: Any = getattr(experts, "down_proj", None)
    if weight is None:
        return int(experts.hidden_size)  # pyright: ignore
    shape = weight.shape
    return int(shape[2] if getattr(experts, "is_transposed", False) else shape[1])


def install(
    model: Any, placed: PlacedCheckpoint, plan: Plan, serving_LRE: np.ndarray, state: RankState, group: Group
) -> list[tuple[ExpertLayer, RunExperts]]:
    """Put the exchange around the experts modules of `model`."""
    register()
    modules = placed_layers(model, plan, str(placed.folder))
    names = [f"layer {layer.model_layer} ({layer.name})" for layer in modules]
    tables = layer_tables(placed.placement, serving_LRE, group.rank, names, group.device)
    installed = []
    for layer, table in zip(modules, tables, strict=True):
        run_experts = layer.module.forward = local_experts(layer.module)
        layer.module.semmoe_layer = ExpertLayer(  # pyright: ignore
            table,
            group.rank,
            group.size,
            group.handle,
            state,
            row_width(layer.module),
            model.dtype,
            plan.model.top_k,
        )
        installed.append((layer.module.semmoe_layer, run_experts))
        EpDispatchExpertsParallel().install_forward(
            layer.module, group.mesh, tp_mesh=group.alone, ep_implementation=NAME
        )
        if layer.empty_slots:
            leave_out_empty_slots(layer.module, placed.placement.num_experts)
    return installed
