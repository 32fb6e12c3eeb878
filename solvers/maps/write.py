"""The map that a serving engine reads, made from a plan and written with where it came from.

Each engine has a file here (sglang.py, trtllm.py, ...). Where an engine accepts no further keys,
where the map came from stays in a file beside it, FILE.semmoe.json (origin.py).
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semmoe.profiles.config import moe_facts, read_config, text_config
from semmoe.profiles.errors import InputError
from semmoe.profiles.families import NUM_MTP_LAYERS, find_family
from semmoe.profiles.files import check_file_target
from semmoe.solvers.maps.engine import Wanted, num_extra_slots
from semmoe.solvers.maps.kinds import KINDS, engine_of
from semmoe.solvers.maps.launch import launch_lines
from semmoe.solvers.maps.origin import FORMAT, VERSION, sidecar_path, write_pair
from semmoe.solvers.plan import ModelFacts, Plan


@dataclass(frozen=True)
class MapOptions:
    """What a map depends on beside the plan.

    Fields:
        format: vllm, which needs it: the pull request of the build, "pr41141", "pr49572" or
            "pr34811".
        model: config.json, checkpoint directory or hub id: checks the layers, and counts the MTP
            layers.
        num_hidden_layers: sglang, trtllm: layers of the model where the plan does not know, 0 = as
            the plan says.
        num_mtp_layers: trtllm: layers after the last one, which stay unplaced.
        redundant: slots of all ranks beyond the experts, as the server will be started; None: as
            many as the plan has.
        made_by: the command, for FILE.semmoe.json.

    Source: solvers/maps/write.py; docs/engines.md says what each engine reads.
    """

    format: str = ""
    model: str | None = None
    num_hidden_layers: int = 0
    num_mtp_layers: int | None = None
    redundant: int | None = None
    made_by: str = ""


def write_map(plan: Plan, kind: str, output: Path, options: MapOptions = MapOptions()) -> list[str]:
    """Write the plan as the file that an engine of `kind` reads, and FILE.semmoe.json beside it.

    Returns lines for people: how to start the engine, and what to mind. Raises InputError where the
    engine could not use the plan, or the file is not to be written.
    """
    check_export_target(output, kind)
    depth, num_mtp_layers = options.num_hidden_layers, options.num_mtp_layers
    if options.model is not None:
        config = read_config(options.model)
        check_family(plan, kind, config)
        depth, from_config = check_config(plan, config)
        num_mtp_layers = from_config if num_mtp_layers is None else num_mtp_layers
    value = export_map(
        plan,
        kind,
        format=options.format,
        num_hidden_layers=depth,
        num_mtp_layers=num_mtp_layers or 0,
        redundant=options.redundant,
    )
    content = render(kind, value, output.suffix)
    write_export(output, kind, content, plan, format=options.format, made_by=options.made_by)
    lines = launch_lines(plan, kind, output, format=options.format)
    if kind == "trtllm" and num_mtp_layers is None:
        lines.append("no rows for MTP layers: a model that has them needs --model CONFIG or --mtp-layers N here")
    return lines


def export_map(
    plan: Plan,
    kind: str,
    *,
    format: str = "",
    num_hidden_layers: int = 0,
    num_mtp_layers: int = 0,
    redundant: int | None = None,
) -> Any:
    """The engine's object for a plan: a JSON value, or for eplb a dict of arrays.

    Parameters:
        plan: the placement and its model.
        kind: one of KINDS.
        format: vllm: the pull request of the build, one of semmoe.solvers.maps.vllm.FORMATS.
        num_hidden_layers: layers of the model, needed where the plan does not know it (0).
        num_mtp_layers: trtllm: layers after the last one, which stay unplaced.
        redundant: slots of all ranks beyond the experts, as the server will be started; None: as
            many as the plan has.

    Raises InputError where the engine could not use the plan as it is.
    """
    engine, placement = engine_of(kind, "--to"), plan.placement
    if placement.num_empty:
        raise InputError(
            f"{placement.num_empty // placement.num_layers} slots a layer are empty, which no map of an engine can say: place "
            "without --spare empty, or give the engine a permuted checkpoint (semmoe reshard) and no map"
        )
    extra = num_extra_slots(placement)
    if redundant is not None and redundant != extra:
        raise InputError(
            f"--redundant is {redundant}, the plan has {extra} redundant slots on {placement.num_ranks} ranks: "
            "a server started with another number would mix up the experts; place again with --redundant"
        )
    depth = _model_depth(plan.model, num_hidden_layers)
    return engine.make(Wanted(placement, plan.model, depth, num_mtp_layers, format))


def _model_depth(model: ModelFacts, given: int) -> int:
    """Layers of the model, from the plan or the option; 0 = unknown. Checks them against the
    plan's MoE layers."""
    if given and model.num_model_layers and given != model.num_model_layers:
        raise InputError(f"--num-hidden-layers is {given}, the plan is for a model of {model.num_model_layers} layers")
    depth = model.num_model_layers or given
    layers = model.model_layers
    if len(set(layers)) != len(layers) or min(layers) < 0 or (depth and max(layers) >= depth):
        raise InputError(
            f"the plan's MoE layers {min(layers)}..{max(layers)} do not fit a model of {depth or 'unknown'} layers"
        )
    return depth


def check_family(plan: Plan, kind: str, config: dict[str, Any]) -> None:
    """Raise InputError where a model's config.json is of another family than the plan, or of one
    whose experts the engine cannot move."""
    types = [str(found["model_type"]) for found in (config, text_config(config)) if found.get("model_type")]
    own, bare = plan.model.model_type, [found.removesuffix("_text") for found in types]
    if own and types and own.removesuffix("_text") not in bare:
        raise InputError(f"the model is of type {types[0]}, the plan is for {own}")
    for found in types:
        if kind in find_family(found).unmoved_by:
            raise InputError(f"the class that {kind} has for {found} moves no experts: use semmoe reshard instead")


def check_config(plan: Plan, config: dict[str, Any]) -> tuple[int, int]:
    """Layers of the model and MTP layers after them, from its config.json. Raises InputError where
    the plan is not for that model.

    An engine that finds no row for a MoE layer stops, or takes the wrong experts: every MoE layer
    must be in the plan.
    """
    facts, model = moe_facts(config), plan.model
    for name in ("num_experts", "top_k"):
        if facts[name] != getattr(model, name):
            raise InputError(f"the model has {name} {facts[name]}, the plan is for {name} {getattr(model, name)}")
    missing = sorted(set(facts["model_layers"]) - set(model.model_layers))
    beyond = sorted(set(model.model_layers) - set(facts["model_layers"]))
    if missing or beyond:
        what = (
            f"lacks its MoE layer {missing[0]}" if missing else f"places layer {beyond[0]}, which has no experts there"
        )
        raise InputError(f"the plan {what}: it was made for another model, or from a trace of some layers only")
    inner = text_config(config)
    mtp = next((inner[key] for key in NUM_MTP_LAYERS if isinstance(inner.get(key), int)), 0)
    return facts["num_model_layers"], mtp


def render(kind: str, value: Any, ending: str) -> bytes:
    """The file's content; same value, same bytes."""
    return KINDS[kind].render(value, ending)


def check_export_target(path: Path, kind: str) -> None:
    """Raise InputError where the engine would not read a file of this name, or another file
    would be overwritten."""
    endings = engine_of(kind, "--to").endings
    if path.suffix not in endings:
        raise InputError(f"{path}: a file for {kind} needs a name that ends in {' or '.join(endings)}")
    check_file_target(path)
    if not path.absolute().parent.is_dir():
        raise InputError(f"cannot write {path}: the directory {path.absolute().parent} does not exist")
    if path.exists() and not sidecar_path(path).is_file():
        raise InputError(f"{path} is there and semmoe export did not write it: choose another name")


def write_export(path: Path, kind: str, content: bytes, plan: Plan, *, format: str = "", made_by: str = "") -> None:
    """Write the file and, beside it, FILE.semmoe.json with where it came from, as one."""
    origin = {
        "format": FORMAT,
        "version": VERSION,
        "made_by": made_by,
        "kind": kind,
        **({"vllm_format": format} if kind == "vllm" else {}),
        "sha256": hashlib.sha256(content).hexdigest(),
        "plan": plan.fingerprint,
        "method": plan.method,
        "dispatch": plan.dispatch,
        "ranks": plan.topology.num_ranks,
        "nodes": plan.topology.num_nodes,
        "slots": int(plan.placement.physical_to_logical_LP.shape[1]),
        "model": plan.model.to_json(),
        "trace": plan.trace,
    }
    write_pair(path, content, origin)
