"""SGLang's map: `--init-expert-location FILE`, as SGLang 0.5.23 reads it in
srt/eplb/expert_location.py.

Shape letters: M rows of a file, P slots of all ranks.
"""

import shlex
from pathlib import Path
from typing import Any

from semmoe.profiles.engines.containers import is_pt
from semmoe.profiles.engines.recorder import load_pt
from semmoe.profiles.errors import InputError
from semmoe.solvers.maps.engine import (
    MOST_DRAFT_LAYERS,
    Engine,
    Rows,
    Wanted,
    identity_row,
    ids_of,
    num_extra_slots,
    object_of,
    read_json,
)
from semmoe.solvers.placement import Topology
from semmoe.solvers.plan import ModelFacts, Plan


def make_map(wanted: Wanted) -> dict[str, Any]:
    """A row for every layer of the model, dense layers included, under the only key allowed."""
    if not wanted.depth:
        raise InputError("SGLang wants a row for every layer and the plan does not say how many: --num-hidden-layers")
    rows = [identity_row(wanted.placement) for _ in range(wanted.depth)]
    for layer, row in zip(wanted.model.model_layers, wanted.placement.physical_to_logical_LP.tolist(), strict=True):
        rows[layer] = row
    return {"physical_to_logical_map": rows}


def read_map(file: Path, model: ModelFacts, topology: Topology) -> Rows:
    where = str(file)
    value = object_of(where, load_pt(file) if is_pt(file) else read_json(file))
    # A recorder's dump holds the map that the server ran at its end, under a name of its own.
    key = "last_physical_to_logical_map" if "last_physical_to_logical_map" in value else "physical_to_logical_map"
    if key not in value:
        hint = ": these are loads, semmoe trace reads them" if "logical_count" in value else ""
        raise InputError(f"{where} has no physical_to_logical_map{hint}")
    if key == "physical_to_logical_map" and len(value) > 1:
        extra = next(k for k in value if k != key)
        raise InputError(f"{where} has the key {str(extra)[:40]!r}: SGLang takes physical_to_logical_map alone")
    rows_MP = ids_of(where, key, value[key], 2)
    depth = model.num_model_layers or len(rows_MP)
    num_draft = len(rows_MP) - depth
    if not 0 <= num_draft <= MOST_DRAFT_LAYERS or max(model.model_layers) >= depth:
        expected = model.num_model_layers or f"more than {max(model.model_layers)}"
        raise InputError(f"{where} has {len(rows_MP)} rows, expected {expected}: one for every layer of the model")
    return Rows(rows_MP[:depth], list(range(depth)), list(model.model_layers), num_draft)


def launch_lines(plan: Plan, file: str, format: str) -> list[str]:
    ranks, extra = plan.placement.num_ranks, num_extra_slots(plan.placement)
    return [
        f"start SGLang with: --tp-size {ranks} --dp-size {ranks} --enable-dp-attention --ep-size {ranks}"
        + (f" --nnodes {plan.topology.num_nodes}" if plan.topology.num_nodes > 1 else "")
        + (f" --ep-num-redundant-experts {extra}" if extra else "")
        + f" --moe-a2a-backend deepep --init-expert-location {shlex.quote(file)}",
        "with --moe-a2a-backend none the same bytes move whatever the placement"
        + (", and redundant experts need --ep-dispatch-algorithm dynamic" if extra else ""),
    ]


ENGINE = Engine((".json",), make_map, read_map, launch_lines)
