"""vLLM's maps: three pull requests, each with a file of its own; no release reads one.

Shape letters: E experts, L MoE layers, R ranks, P slots of all ranks.
"""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from semmoe.profiles.errors import InputError
from semmoe.profiles.files import shortened
from semmoe.solvers.maps.engine import (
    Engine,
    Rows,
    Wanted,
    ids_of,
    moe_rows,
    num_extra_slots,
    object_of,
    read_json,
    some_of,
)
from semmoe.solvers.placement import Topology
from semmoe.solvers.plan import ModelFacts, Plan

FORMATS = {
    "pr41141": "one JSONL record, map per layer, replicas",
    "pr49572": "JSON list per layer, replicas",
    "pr34811": "JSON rank of each expert, one map for all layers",
}


def make_map(wanted: Wanted) -> Any:
    """The JSON value of one of FORMATS. Rows are of MoE layers only, counted from 0."""
    placement, format = wanted.placement, wanted.format
    rows_LP = placement.physical_to_logical_LP
    if format == "pr49572":
        return rows_LP.tolist()
    if format == "pr41141":
        return {
            "record_type": "eplb_initial_mapping",
            "version": 1,
            "num_redundant_experts": num_extra_slots(placement),
            "num_slots": rows_LP.shape[1],
            "initial_global_assignments": {str(layer): row for layer, row in enumerate(rows_LP.tolist())},
        }
    if format != "pr34811":
        raise InputError(
            f"--format is {format!r}: vLLM 0.33 reads no map, choose the pull request of your build, {', '.join(FORMATS)}"
        )
    rank_of_LE = placement.rank_of_LE
    differs = np.flatnonzero((rank_of_LE != rank_of_LE[0]).any(axis=1))
    if len(differs):
        raise InputError(
            f"layer {differs[0]} is placed unlike layer 0, and pr34811 has one map for all layers: "
            "use pr41141 or pr49572, or reshard the checkpoint"
        )
    return {"expert_to_ep_rank": rank_of_LE[0].tolist()}


def read_map(file: Path, model: ModelFacts, topology: Topology) -> Rows:
    """Any of the three formats; the file itself tells which."""
    where = str(file)
    value = read_json(file)
    if isinstance(value, list):  # pr49572
        flat = bool(value) and not isinstance(value[0], list)
        return moe_rows(where, ids_of(where, "the map", [value] * model.num_layers if flat else value, 2), model)
    value = object_of(where, value)
    if "expert_to_ep_rank" in value:  # pr34811
        return _read_ranks(where, value, model, topology)
    if value.get("record_type") != "eplb_initial_mapping":
        raise InputError(
            f"{where} is no map of pr41141, pr49572 or pr34811: its record_type is {shortened(value.get('record_type'))}"
        )
    if value.get("version") != 1 or isinstance(value["version"], bool):
        raise InputError(f"{where} has version {shortened(value.get('version'))}, expected 1")
    table = object_of(f"{where}: initial_global_assignments", value.get("initial_global_assignments"))
    layers = range(model.num_layers)
    if set(table) != {str(layer) for layer in layers}:
        raise InputError(f"{where} has rows for layers {some_of(table)}, expected MoE layers 0..{layers[-1]}")
    rows_LP = ids_of(where, "initial_global_assignments", [table[str(layer)] for layer in layers], 2)
    for key, is_ in (("num_slots", rows_LP.shape[1]), ("num_redundant_experts", rows_LP.shape[1] - model.num_experts)):
        if value.get(key) != is_ or isinstance(value[key], bool):
            raise InputError(f"{where}: {key} is {shortened(value.get(key))}, its rows make it {is_}")
    return moe_rows(where, rows_LP, model)


def _read_ranks(where: str, value: dict[Any, Any], model: ModelFacts, topology: Topology) -> Rows:
    """The rank of each expert, alike for all layers."""
    rank_of_E = ids_of(where, "expert_to_ep_rank", value["expert_to_ep_rank"], 1)
    if len(rank_of_E) != model.num_experts:
        raise InputError(f"{where} has ranks of {len(rank_of_E)} experts, the model has {model.num_experts}")
    counts_R = np.bincount(np.clip(rank_of_E, 0, topology.num_ranks), minlength=topology.num_ranks)
    if rank_of_E.min() < 0 or rank_of_E.max() >= topology.num_ranks or len(set(counts_R.tolist())) > 1:
        raise InputError(
            f"{where} does not give each of the ranks 0..{topology.num_ranks - 1} the same number of experts"
        )
    return moe_rows(where, np.tile(np.argsort(rank_of_E, kind="stable"), (model.num_layers, 1)), model)


def launch_lines(plan: Plan, file: str, format: str) -> list[str]:
    extra = num_extra_slots(plan.placement)
    start = f"start a vLLM built from {format.replace('pr', 'pull request ')} (no release has it) with: "
    start += f"--data-parallel-size {plan.placement.num_ranks} --enable-expert-parallel "
    start += "--all2all-backend deepep_high_throughput "
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
    return lines


ENGINE = Engine((".json", ".jsonl"), make_map, read_map, launch_lines)
