"""EPLB's tables: what its rebalance_experts returns (eplb.py), in a container of tensors.

Shape letters: L MoE layers, E experts, P slots of all ranks, X most copies of an expert.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np

from semmoe.profiles.engines.containers import container_of
from semmoe.profiles.engines.recorder import load_pt, pt_bytes
from semmoe.profiles.errors import InputError
from semmoe.solvers.maps.engine import Engine, Rows, Wanted, first_line, ids_of, moe_rows, some_of
from semmoe.solvers.placement import Placement, Topology
from semmoe.solvers.plan import ModelFacts


def eplb_tables(placement: Placement) -> dict[str, np.ndarray]:
    """phy2log [L, P], log2phy [L, E, X] padded with -1, logcnt [L, E]; int64."""
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


def make_map(wanted: Wanted) -> dict[str, np.ndarray]:
    return eplb_tables(wanted.placement)


def render(value: dict[str, Any], ending: str) -> bytes:
    """The tables in the container of the ending."""
    if ending == ".pt":
        return pt_bytes(value)
    if ending == ".npz":
        buffer = io.BytesIO()
        np.savez(buffer, **value)
        return buffer.getvalue()
    from safetensors.numpy import save

    return save({name: np.ascontiguousarray(array) for name, array in value.items()})


def read_map(file: Path, model: ModelFacts, topology: Topology) -> Rows:
    """The three tables by name, the tuple that rebalance_experts returns, or phy2log alone; or
    what each rank holds, [layers, ranks, slots], or vLLM's expert_map of every rank, [layers,
    ranks, experts]: an expert's slot there, or -1."""
    where = str(file)
    value = _read_tensors(file)
    if isinstance(value, (tuple, list)) and len(value) == 3 and hasattr(value[0], "shape"):
        value = dict(zip(("phy2log", "log2phy", "logcnt"), value, strict=True))
    tables = value if isinstance(value, dict) else {"phy2log": value}
    if "phy2log" not in tables:
        raise InputError(f"{where} has no phy2log, but {some_of(tables)}")
    phy2log = tables["phy2log"]
    if len(getattr(phy2log, "shape", ())) == 3:
        phy2log = _slots_of_ranks(where, ids_of(where, "the map", phy2log, 3), model, topology)
    rows = moe_rows(where, ids_of(where, "phy2log", phy2log, 2), model)
    if "logcnt" in tables:
        logcnt_LE = ids_of(where, "logcnt", tables["logcnt"], 2)
        experts = np.arange(model.num_experts)
        logcnt_LE = logcnt_LE[: model.num_layers]
        sorted_LP = np.sort(rows.experts_MP)
        counts_LE = np.stack([np.searchsorted(r, experts, "right") - np.searchsorted(r, experts) for r in sorted_LP])
        if not np.array_equal(logcnt_LE, counts_LE):
            raise InputError(f"{where}: logcnt does not count the experts of phy2log")
    return rows


def _slots_of_ranks(where: str, map_LRX: np.ndarray, model: ModelFacts, topology: Topology) -> np.ndarray:
    """Experts by slot, integers [L, P], of a map with an axis of ranks."""
    num_ranks, num_columns = map_LRX.shape[1:]
    if num_ranks != topology.num_ranks:
        raise InputError(
            f"{where} is a map of {num_ranks} ranks ({list(map_LRX.shape)}), expected {topology.num_ranks}"
        )
    if map_LRX.min() >= 0:
        return map_LRX.reshape(len(map_LRX), -1)  # experts of every rank, slot by slot
    held_LR = (map_LRX >= 0).sum(axis=2)
    num_slots = int(held_LR.max())
    in_order_LRX = np.sort(map_LRX, axis=2)[:, :, num_columns - num_slots :]
    if num_columns != model.num_experts or (held_LR != num_slots).any() or (in_order_LRX != np.arange(num_slots)).any():
        raise InputError(
            f"{where}: a map of shape {list(map_LRX.shape)} with -1 gives each expert its slot on each rank: expected "
            f"{model.num_experts} columns, and the slots 0..{max(num_slots - 1, 0)} once on every rank"
        )
    slot_LRE = np.where(map_LRX < 0, num_slots, map_LRX)
    return np.argsort(slot_LRE, axis=2, kind="stable")[:, :, :num_slots].reshape(len(map_LRX), -1)


def _read_tensors(file: Path) -> Any:
    """What the file holds, whatever its name."""
    kind = container_of(file)
    if kind == "pt" or file.suffix in (".pt", ".pth"):
        return load_pt(file)
    if kind not in ("safetensors", "npz", "npy"):
        raise InputError(
            f"{file} is {kind}, expected a map as .pt, .safetensors, .npz or .npy: damaged, or of another kind"
        )
    try:
        if kind == "safetensors":
            from safetensors.numpy import load_file

            return load_file(file)
        value = np.load(file, allow_pickle=False)
        return value if isinstance(value, np.ndarray) else {name: value[name] for name in value.files}
    except Exception as error:  # zipfile, numpy and safetensors raise half a dozen kinds for a damaged file
        raise InputError(f"{file} is damaged: {first_line(error)}") from None


ENGINE = Engine((".pt", ".safetensors", ".npz"), make_map, read_map, lambda plan, file, format: [], render)
