"""What of a checkpoint's config.json a reshard depends on, and whether a plan is for that model."""

from dataclasses import dataclass
from typing import Any

from semmoe.profiles.config import moe_facts, read_config, text_config
from semmoe.profiles.errors import InputError
from semmoe.profiles.families import TOP_K, find_family
from semmoe.runtime.reshard.sidecar import SIDECAR
from semmoe.runtime.reshard.source import Checkpoint
from semmoe.solvers.plan import Plan


@dataclass(frozen=True)
class RoutedModel:
    """What of config.json decides the roles of keys."""

    num_experts: int
    extra_rows: int  # classes of the router after the routed experts
    num_model_layers: int  # layers from here on are MTP heads
    hidden_size: int = 0  # 0: unknown
    vision_experts: bool = False  # the second half of the experts on disk is of another modality


def permutation_facts(config: dict[str, Any]) -> dict[str, Any]:
    """What moe_facts says, less top-k: a permutation does not depend on it, layers may differ in
    it, and a file may leave it out."""

    def without(value: Any) -> Any:
        if isinstance(value, list):
            return [without(inner) for inner in value]
        if isinstance(value, dict):
            return {key: without(inner) for key, inner in value.items() if key not in TOP_K}
        return value

    facts = moe_facts({**without(config), TOP_K[0]: 1})
    del facts["top_k"]
    return facts


def top_k_notes(source: Checkpoint, plan: Plan) -> tuple[str, ...]:
    """A line where config.json states another top-k than the plan's trace had."""
    inner = text_config(read_config(source.path))
    stated = next((inner[key] for key in TOP_K if inner.get(key) is not None), None)
    if type(stated) is not int or stated == plan.model.top_k:
        return ()
    return (f"the plan's trace has {plan.model.top_k} experts a token, config.json says {stated}: the order holds",)


def routed_model(config: dict[str, Any], num_experts: int) -> RoutedModel:
    """What the roles of keys depend on."""
    facts = permutation_facts(config)
    family = find_family(facts["model_type"])
    extras = family.router_extras
    extra_rows = extras if isinstance(extras, int) else int(text_config(config).get(extras) or 0)
    hidden = text_config(config).get("hidden_size")
    return RoutedModel(
        num_experts,
        extra_rows,
        facts["num_model_layers"],
        hidden if type(hidden) is int else 0,
        family.vision_experts,
    )


def check_plan(source: Checkpoint, plan: Plan) -> RoutedModel:
    """Raise InputError where the checkpoint is not a model that the plan can be applied to."""
    if (source.path / SIDECAR).exists():
        raise InputError(
            f"{source.path} is a reshard already: run `semmoe reshard --undo` on it, or start from the original"
        )
    config = read_config(source.path)
    facts, wanted = permutation_facts(config), plan.model
    if reason := find_family(facts["model_type"]).unshardable:
        raise InputError(f"{facts['model_type']} cannot be resharded: {reason}")
    pairs = [("experts", facts["num_experts"], wanted.num_experts)]
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
