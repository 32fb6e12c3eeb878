"""What of a checkpoint's config.json a reshard depends on, and whether a plan is for that model."""

from dataclasses import dataclass
from typing import Any

from semmoe.profiles.config import moe_facts, read_config, text_config
from semmoe.profiles.errors import InputError
from semmoe.runtime.reshard.sidecar import SIDECAR
from semmoe.runtime.reshard.source import Checkpoint
from semmoe.solvers.plan import Plan

NOT_RELABELLABLE = {
    "doge": "its product-key router scores a grid, not single experts",
    "switch_transformers": "its router drops tokens by position in the batch",
    "nllb-moe": "its router drops tokens by position in the batch",
    "nllb_moe": "its router drops tokens by position in the batch",
}


@dataclass(frozen=True)
class RoutedModel:
    """What of config.json decides the roles of keys."""

    model_type: str
    num_experts: int
    extra_rows: int  # classes of the router after the routed experts
    num_model_layers: int  # layers from here on are MTP heads


def routed_model(config: dict[str, Any], num_experts: int) -> RoutedModel:
    """What the roles of keys depend on."""
    facts, inner = moe_facts(config), text_config(config)
    extra = int(inner.get("zero_expert_num") or 0)
    if facts["model_type"].startswith("inkling"):
        extra = int(inner.get("n_shared_experts") or 0)
    elif facts["model_type"].startswith("zaya"):
        extra = 1
    return RoutedModel(facts["model_type"], num_experts, extra, facts["num_model_layers"])


def check_plan(source: Checkpoint, plan: Plan) -> RoutedModel:
    """Raise InputError where the checkpoint is not a model that the plan can be applied to."""
    if (source.path / SIDECAR).exists():
        raise InputError(
            f"{source.path} is a reshard already: run `semmoe reshard --undo` on it, or start from the original"
        )
    config = read_config(source.path)
    facts, wanted = moe_facts(config), plan.model
    if reason := NOT_RELABELLABLE.get(facts["model_type"]):
        raise InputError(f"{facts['model_type']} cannot be resharded: {reason}")
    pairs = [("experts", facts["num_experts"], wanted.num_experts), ("top-k", facts["top_k"], wanted.top_k)]
    if wanted.num_model_layers:
        pairs.append(("layers", facts["num_model_layers"], wanted.num_model_layers))
    for what, mine, theirs in pairs:
        if mine != theirs:
            raise InputError(f"{source.path} has {mine} {what}, the plan is for a model with {theirs}: {wanted.model}")
    # A trace may name the language model inside a multimodal one ("qwen3_5_moe_text"); both names
    # are in config.json.
    names = {
        str(name).removesuffix("_text") for name in (facts["model_type"], text_config(config).get("model_type")) if name
    }
    if names and wanted.model_type and wanted.model_type.removesuffix("_text") not in names:
        raise InputError(
            f"{source.path} is a {facts['model_type']} model, the plan is for {wanted.model_type}: {wanted.model}"
        )
    return routed_model(config, facts["num_experts"])
