"""A model of Transformers on one rank: dense weights whole, its own experts only, and the exchange
in between.

The family's own class is built with expert tensors of S slots instead of E experts, filled with the
rank's tensors (rank_weights.py), and the exchange is put around its experts modules (ep.py).

Shape letters: L MoE layers, R ranks, S slots per rank, E experts, B requests, Q positions of a
batch, T rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from semmoe.profiles.capture.layers import MoeLayer, find_moe_layers
from semmoe.profiles.capture.loading import ModelSource, model_class, refusals
from semmoe.profiles.errors import InputError
from semmoe.runtime.layer.dispatch import join_empty
from semmoe.runtime.layer.tables import ExpertLayer, LayerTables, RankState, RunExperts, layer_tables
from semmoe.runtime.ranks.group import Group
from semmoe.runtime.transformers.ep import SlotAxis, exchange_around, hold_slots, row_width
from semmoe.runtime.transformers.families import choose_explicitly, leave_out_empty_slots, local_experts
from semmoe.runtime.transformers.rank_parts import RankCheckpoint
from semmoe.runtime.transformers.rank_weights import held_experts, rank_tensors
from semmoe.solvers.deployment import Deployment
from semmoe.solvers.placement import Placement
from semmoe.solvers.plan import Plan


@dataclass(frozen=True, eq=False)
class PlacedModel:
    """The model of this rank, its expert layers in order, and what they share."""

    model: Any
    modules: tuple[nn.Module, ...]  # the experts modules
    layers: tuple[ExpertLayer, ...]
    run_experts: tuple[RunExperts, ...]
    axes_L: tuple[list[SlotAxis], ...]  # how the tensors of each experts module hold its slots
    held_LS: np.ndarray  # int64, the expert that was read into each slot; -1 where the checkpoint does not say
    state: RankState
    group: Group

    def join_empty(self) -> None:
        """Take part in every expert layer of one forward pass of the others, without tokens."""
        for layer, run in zip(self.layers, self.run_experts, strict=True):
            join_empty(layer, run)

    def begin(self, ids_BQ: np.ndarray, kept_T: np.ndarray | None, requests: list[int], *, is_prompt: bool) -> None:
        """Before a forward pass: which rows are tokens (None: all). What the engine asks of a
        model, as ShuffledModel does."""
        self.state.valid_T = None if kept_T is None else torch.from_numpy(kept_T).to(self.group.device)

    def finish(self) -> None:
        """After a forward pass."""

    def forget(self, requests: list[int]) -> None:
        """Requests that are finished."""


def load_placed(
    source: ModelSource, root: Path, checkpoint: RankCheckpoint, plan: Plan, group: Group, *, dtype: str
) -> PlacedModel:
    """Load what `group.rank` holds of a model.

    Parameters:
        source: the model's configuration.
        root: where the checkpoint lies on this machine.
        checkpoint: what this rank reads of it (rank_parts.rank_checkpoints).
        plan: the plan that `checkpoint` was made for.
        dtype: "auto" (as stored) or the name of a floating type of PyTorch.

    Raises InputError where the family or the checkpoint does not allow it.
    """
    chosen, placement = generating_class(source), checkpoint.placement

    without: list[str] = []  # experts modules of which this rank holds none
    axes: dict[int, list[SlotAxis]] = {}

    def shrink(model: nn.Module) -> None:
        choose_explicitly(model)
        for number, layer in enumerate(placed_layers(model, plan, source.name)):
            held = len(placement.held(number, group.rank))
            axes[number] = hold_slots(layer, placement.num_experts, held, source.name)
            if not held:
                without.append(f"{layer.name}.")

    config = source.config
    with rank_tensors(root, checkpoint) as tensors, refusals(f"{source.name} cannot be loaded"):
        model, loading = built_with(chosen, shrink).from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=(config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype),
            device_map=group.device,
            output_loading_info=True,
        )
    if missing := sorted(key for key in loading["missing_keys"] if not any(name in key for name in without)):
        raise InputError(
            f"{source.name}: the checkpoint lacks {len(missing)} tensors of the model, {missing[0]} among them"
        )
    return install(model.eval(), checkpoint, plan, group, source.name, tuple(axes.values()))


def generating_class(source: ModelSource) -> Any:
    """The model's class. Raises InputError for one that does not generate text."""
    chosen: Any = model_class(source)
    if chosen is AutoModelForCausalLM:
        chosen = chosen._model_mapping.get(type(source.config), None)
        if chosen is None:
            raise InputError(f"{source.name}: model type {source.config.model_type!r} is not supported")
    if not chosen.can_generate():
        raise InputError(
            f"{source.name}: model type {source.config.model_type!r} does not generate text token by token"
        )
    return chosen


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


def install(
    model: Any, checkpoint: RankCheckpoint, plan: Plan, group: Group, name: str, axes_L: tuple[list[SlotAxis], ...]
) -> PlacedModel:
    """Put the exchange around the experts modules of a model whose weights are there."""
    placement, state = checkpoint.placement, RankState.fresh(plan.placement.num_layers, group)
    found = placed_layers(model, plan, name)
    names = [f"layer {layer.model_layer} ({layer.name})" for layer in found]
    tables_L = placed_tables(placement, plan, names, group)
    layers, runs = [], []
    for moe, tables in zip(found, tables_L, strict=True):
        layer = ExpertLayer(tables, group, state, row_width(moe.module), model.dtype, plan.model.top_k)
        run_experts = local_experts(moe.module)
        exchange_around(moe.module, layer, run_experts)
        if moe.empty_slots:
            leave_out_empty_slots(moe.module, placement.num_experts)
        layers.append(layer)
        runs.append(run_experts)
    held_LS = held_experts(checkpoint, plan.model.model_layers)
    modules = tuple(moe.module for moe in found)
    return PlacedModel(model, modules, tuple(layers), tuple(runs), axes_L, held_LS, state, group)


def placed_tables(placement: Placement, plan: Plan, names: list[str], group: Group) -> list[LayerTables]:
    """Where experts are served for this rank's tokens, layer by layer. `placement`: the plan's, in
    the checkpoint's own expert numbers."""
    serves = Deployment(placement, plan.load_LE, plan.topology, replica_choice=plan.replica_choice)
    return layer_tables(placement, serves.serving_LRE, group.rank, names, group.device, moving=serves.moving)
