"""The maps that serving engines read, made from a plan, and how to start the engine with them.

Every engine wants the same array, experts by slot with the ranks one after the other, [layers, P].
They differ in which layers have rows, and in the container (docs/engines.md). Where an engine
accepts no further keys, where the map came from stays in a file beside it.

Read from the engines' own readers: SGLang 0.5.23 srt/eplb/expert_location.py; TensorRT-LLM
llmapi/llm_args.py MoeLoadBalancerConfig; vLLM pull requests 41141, 49572 and 34811; vllm-ascend
eplb/core/eplb_utils.py; EPLB eplb.py.

Shape letters: L MoE layers, E experts, R ranks, S slots per rank, P slots of all ranks (R * S), X
most copies of an expert.
"""

import hashlib
import io
import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from semmoe.profiles.config import moe_facts, text_config
from semmoe.profiles.document import indented
from semmoe.profiles.errors import InputError
from semmoe.profiles.files import write_file
from semmoe.solvers.placement import Placement
from semmoe.solvers.plan import ModelFacts, Plan

FORMAT = "semmoe-export"
VERSION = 1
SIDECAR = ".semmoe.json"

# Kinds of --to, and how the names of their files end: SGLang and others decide by the ending how to
# read a file.
KINDS = {
    "sglang": (".json",),
    "trtllm": (".yaml", ".yml"),
    "vllm": (".json", ".jsonl"),
    "vllm-ascend": (".json",),
    "eplb": (".pt", ".safetensors", ".npz"),
}
VLLM_FORMATS = {
    "pr41141": "one JSONL record, map per layer, replicas",
    "pr49572": "JSON list per layer, replicas",
    "pr34811": "JSON rank of each expert, one map for all layers",
}
MTP_KEYS = ("num_nextn_predict_layers", "num_mtp_modules", "num_mtp_layers", "mtp_num_hidden_layers", "mtp_num_layers")

# Families whose model class lacks what the engine needs to move experts (SGLang:
# get_model_config_for_expert_location).
NOT_MOVED = {
    "sglang": ("mixtral", "olmoe", "granitemoe", "phimoe", "deepseek", "grok-1", "llama4", "dbrx", "ernie4_5_moe"),
    "vllm": ("olmoe", "gpt_oss", "granitemoe"),
}


def identity_row(num_slots: int, num_experts: int) -> list[int]:
    """Experts by slot where nothing is placed: 0, 1, ..., E - 1, and again from 0 in redundant
    slots."""
    return (np.arange(num_slots) % num_experts).tolist()


def sglang_map(placement: Placement, model: ModelFacts, num_hidden_layers: int) -> dict[str, Any]:
    """The object of --init-expert-location: a row for every layer of the model, dense layers
    included, under the only key allowed."""
    num_slots = placement.physical_to_logical_LP.shape[1]
    rows = [identity_row(num_slots, placement.num_experts) for _ in range(num_hidden_layers)]
    for layer, row in zip(model.model_layers, placement.physical_to_logical_LP.tolist(), strict=True):
        rows[layer] = row
    return {"physical_to_logical_map": rows}


def trtllm_balancer(
    placement: Placement, model: ModelFacts, num_hidden_layers: int, num_mtp_layers: int
) -> dict[str, Any]:
    """The three keys of MoeLoadBalancerConfig. Rows go by the number of the layer in the model;
    MTP layers follow the last one."""
    num_slots = placement.physical_to_logical_LP.shape[1]
    rows = dict(zip(model.model_layers, placement.physical_to_logical_LP.tolist(), strict=True))
    mtp = {num_hidden_layers + i: identity_row(num_slots, placement.num_experts) for i in range(num_mtp_layers)}
    return {
        "num_slots": num_slots,
        "initial_global_assignments": {**dict(sorted(rows.items())), **mtp},
        "layer_updates_per_iter": 0,
    }


def vllm_map(placement: Placement, *, format: str) -> Any:
    """The JSON value of one of VLLM_FORMATS. Rows are of MoE layers only, counted from 0."""
    rows_LP = placement.physical_to_logical_LP
    if format == "pr49572":
        return rows_LP.tolist()
    if format == "pr41141":
        return {
            "record_type": "eplb_initial_mapping",
            "version": 1,
            "num_redundant_experts": rows_LP.shape[1] - placement.num_experts,
            "num_slots": rows_LP.shape[1],
            "initial_global_assignments": {str(layer): row for layer, row in enumerate(rows_LP.tolist())},
        }
    if format != "pr34811":
        raise InputError(
            f"--format is {format!r}: vLLM 0.33 reads no map, choose the pull request of your build, "
            f"{', '.join(VLLM_FORMATS)}"
        )
    rank_of_LE = placement.rank_of_LE
    differs = np.flatnonzero((rank_of_LE != rank_of_LE[0]).any(axis=1))
    if len(differs):
        raise InputError(
            f"layer {differs[0]} is placed unlike layer 0, and pr34811 has one map for all layers: "
            "use pr41141 or pr49572, or reshard the checkpoint"
        )
    return {"expert_to_ep_rank": rank_of_LE[0].tolist()}


def ascend_map(placement: Placement) -> dict[str, Any]:
    """The object of vllm-ascend's expert_map_path: devices and their experts by MoE layer,
    counted from 0."""
    layers = [
        {
            "layer_id": layer,
            "device_count": placement.num_ranks,
            "device_list": [{"device_id": rank, "device_expert": row} for rank, row in enumerate(rows)],
        }
        for layer, rows in enumerate(placement.experts_LRS.tolist())
    ]
    return {"moe_layer_count": placement.num_layers, "layer_list": layers}


def eplb_tables(placement: Placement) -> dict[str, np.ndarray]:
    """What EPLB's rebalance_experts returns: phy2log [L, P], log2phy [L, E, X] padded with -1,
    logcnt [L, E]; int64."""
    phy2log_LP = placement.physical_to_logical_LP.astype(np.int64)
    num_layers, num_slots = phy2log_LP.shape
    order_LP = np.argsort(phy2log_LP, axis=1, kind="stable")
    experts_LP = np.take_along_axis(phy2log_LP, order_LP, axis=1)
    logcnt_LE = np.stack([np.bincount(row, minlength=placement.num_experts) for row in phy2log_LP])
    first_LE = np.cumsum(logcnt_LE, axis=1) - logcnt_LE
    copy_LP = np.arange(num_slots) - np.take_along_axis(first_LE, experts_LP, axis=1)
    log2phy_LEX = np.full((num_layers, placement.num_experts, logcnt_LE.max()), -1)
    log2phy_LEX[np.arange(num_layers)[:, None], experts_LP, copy_LP] = order_LP
    return {"phy2log": phy2log_LP, "log2phy": log2phy_LEX, "logcnt": logcnt_LE.astype(np.int64)}


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

    `num_hidden_layers` is needed where the plan does not know it (0). `redundant`: slots beyond the
    experts that the server will be started with, None = as many as the plan has. Raises InputError
    where the engine could not use the plan as it is.
    """
    if kind not in KINDS:
        raise InputError(f"--to is {kind!r}, expected one of {', '.join(KINDS)}")
    placement, model = plan.placement, plan.model
    extra = placement.physical_to_logical_LP.shape[1] - placement.num_experts
    if redundant is not None and redundant != extra:
        raise InputError(
            f"--redundant is {redundant}, the plan has {extra} redundant slots on {placement.num_ranks} ranks: "
            "a server started with another number would mix up the experts; place again with --replicas"
        )
    depth = _model_depth(model, num_hidden_layers)
    if kind == "sglang":
        if not depth:
            raise InputError(
                "SGLang wants a row for every layer and the plan does not say how many: --num-hidden-layers"
            )
        return sglang_map(placement, model, depth)
    if kind == "trtllm":
        if num_mtp_layers and not depth:
            raise InputError(
                "MTP layers are numbered after the last layer, and the plan does not know it: --num-hidden-layers"
            )
        return trtllm_balancer(placement, model, depth, num_mtp_layers)
    if kind == "vllm":
        return vllm_map(placement, format=format)
    return ascend_map(placement) if kind == "vllm-ascend" else eplb_tables(placement)


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
    mtp = next((inner[key] for key in MTP_KEYS if isinstance(inner.get(key), int)), 0)
    return facts["num_model_layers"], mtp


def render(kind: str, value: Any, suffix: str) -> bytes:
    """The file's content; same value, same bytes. A .pt file of eplb is torch's to write."""
    if kind == "eplb":
        if suffix == ".npz":
            buffer = io.BytesIO()
            np.savez(buffer, **value)
            return buffer.getvalue()
        from safetensors.numpy import save

        return save({name: np.ascontiguousarray(array) for name, array in value.items()})
    if kind == "trtllm":
        rows = "".join(f"  {layer}: {json.dumps(row)}\n" for layer, row in value["initial_global_assignments"].items())
        text = f"num_slots: {value['num_slots']}\ninitial_global_assignments:\n{rows}layer_updates_per_iter: 0\n"
        return text.encode()
    return (json.dumps(value) + "\n").encode()


def check_export_target(path: Path, kind: str) -> None:
    """Raise InputError where the engine would not read a file of this name, or another file
    would be overwritten."""
    if path.suffix not in KINDS[kind]:
        raise InputError(f"{path}: a file for {kind} needs a name that ends in {' or '.join(KINDS[kind])}")
    if not path.absolute().parent.is_dir():
        raise InputError(f"cannot write {path}: the directory {path.absolute().parent} does not exist")
    if path.exists() and not sidecar_path(path).is_file():
        raise InputError(f"{path} is there and semmoe export did not write it: choose another name")


def sidecar_path(path: Path) -> Path:
    return path.with_name(path.name + SIDECAR)


def write_export(path: Path, kind: str, content: bytes, plan: Plan, *, format: str = "", made_by: str = "") -> None:
    """Write the file and, beside it, FILE.semmoe.json with where it came from. Each is there
    whole or not at all."""
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
        "model": asdict(plan.model),
        "trace": plan.trace,
    }
    write_file(path, content)
    write_file(sidecar_path(path), indented(origin))


def launch_lines(plan: Plan, kind: str, path: Path, *, format: str = "") -> list[str]:
    """How to start the engine with the file, and what to mind: lines for people (docs/engines.md
    says more)."""
    placement, model = plan.placement, plan.model
    ranks, extra = placement.num_ranks, placement.physical_to_logical_LP.shape[1] - placement.num_experts
    file = str(path)
    lines = []
    if kind == "sglang":
        lines = [
            f"start SGLang with: --tp-size {ranks} --dp-size {ranks} --enable-dp-attention --ep-size {ranks}"
            + (f" --nnodes {plan.topology.num_nodes}" if plan.topology.num_nodes > 1 else "")
            + (f" --ep-num-redundant-experts {extra}" if extra else "")
            + f" --moe-a2a-backend deepep --init-expert-location {shlex.quote(file)}",
            "with --moe-a2a-backend none the same bytes move whatever the placement"
            + (", and redundant experts need --ep-dispatch-algorithm dynamic" if extra else ""),
        ]
    elif kind == "trtllm":
        lines = [
            f"add to the file of --extra_llm_api_options, with --ep_size {ranks}: enable_attention_dp: true, "
            f"moe_config: {{backend: WIDEEP, load_balancer: {file}}}"
        ]
    elif kind == "vllm":
        start = f"start a vLLM built from {format.replace('pr', 'pull request ')} (no release has it) with: "
        start += f"--data-parallel-size {ranks} --enable-expert-parallel --all2all-backend deepep_high_throughput "
        if format == "pr34811":
            lines = [f"{start}--expert-placement-strategy custom --expert-placement-file {shlex.quote(file)}"]
        else:
            options = {
                "pr41141": {"initial_mapping_path": file, "disable_online_rebalancing": True},
                "pr49572": {"initial_expert_map_path": file, "step_interval": 10**9},
            }[format]
            config = json.dumps({"num_redundant_experts": extra, **options})
            lines = [f"{start}--enable-eplb --eplb-config {shlex.quote(config)}"]
        if extra:
            lines.append("vLLM picks replicas by token number: they balance load there and bring no locality")
    elif kind == "vllm-ascend":
        config = json.dumps({"eplb_config": {"expert_map_path": file}})
        lines = [f"start vLLM-Ascend (model runner 1) with: --additional-config {shlex.quote(config)}"]
    if model.model_type in NOT_MOVED.get(kind, ()):
        lines.append(f"the engine's own class for {model.model_type} moves no experts: use semmoe reshard instead")
    return lines
