"""vLLM-Ascend's map: `expert_map_path`, as eplb/core/eplb_utils.py reads it.

Shape letters: L MoE layers, R ranks, S slots per rank.
"""

import json
import shlex
from pathlib import Path
from typing import Any

from semmoe.profiles.errors import InputError
from semmoe.profiles.files import shortened
from semmoe.solvers.maps.engine import Engine, Rows, Wanted, ids_of, moe_rows, object_of, read_json
from semmoe.solvers.placement import Topology
from semmoe.solvers.plan import ModelFacts, Plan


def make_map(wanted: Wanted) -> dict[str, Any]:
    """Devices and their experts by MoE layer, counted from 0."""
    layers = [
        {
            "layer_id": layer,
            "device_count": wanted.placement.num_ranks,
            "device_list": [{"device_id": rank, "device_expert": row} for rank, row in enumerate(rows)],
        }
        for layer, rows in enumerate(wanted.placement.experts_LRS.tolist())
    ]
    return {"moe_layer_count": wanted.placement.num_layers, "layer_list": layers}


def read_map(file: Path, model: ModelFacts, topology: Topology) -> Rows:
    where = str(file)
    value = object_of(where, read_json(file))
    entries = value.get("layer_list")
    if not isinstance(entries, list) or value.get("moe_layer_count") != len(entries):
        raise InputError(
            f"{where} has no layer_list of moe_layer_count ({shortened(value.get('moe_layer_count'))}) layers"
        )
    experts: list[Any] = []
    for number, entry in enumerate(entries):
        entry = object_of(f"{where}: layer {number}", entry)
        devices = entry.get("device_list")
        # The engine takes layers and devices by their place in the list: an id that says otherwise
        # would be misread.
        if entry.get("layer_id") != number or not isinstance(devices, list):
            raise InputError(
                f"{where}: entry {number} has layer_id {shortened(entry.get('layer_id'))}, expected {number} and a device_list"
            )
        if not len(devices) == entry.get("device_count") == topology.num_ranks:
            raise InputError(f"{where}: layer {number} has {len(devices)} devices, expected {topology.num_ranks}")
        for rank, device in enumerate(devices):
            device = object_of(f"{where}: layer {number}, device {rank}", device)
            if device.get("device_id") != rank:
                raise InputError(
                    f"{where}: layer {number}, device {rank} has device_id {shortened(device.get('device_id'))}"
                )
            experts.append(device.get("device_expert"))
    return moe_rows(where, ids_of(where, "device_expert", experts, 2).reshape(len(entries), -1), model)


def launch_lines(plan: Plan, file: str, format: str) -> list[str]:
    config = json.dumps({"eplb_config": {"expert_map_path": file}})
    return [f"start vLLM-Ascend (model runner 1) with: --additional-config {shlex.quote(config)}"]


ENGINE = Engine((".json",), make_map, read_map, launch_lines)
