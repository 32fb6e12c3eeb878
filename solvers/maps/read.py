"""The way back: an expert map that an engine runs today, read into a placement and scored.

Each reader takes a file as the engine itself would take it (solvers/maps/write.py lists them) and
refuses what the engine would refuse or, worse, quietly misread. What the readers return is checked
by Placement: every expert somewhere, none twice on a rank.

Shape letters: L MoE layers, E experts, R ranks, S slots per rank, P slots of all ranks (R * S), M
rows of a file, B requests.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from semmoe.profiles.counts import profile_traces
from semmoe.profiles.engines.recorder import load_pt
from semmoe.profiles.errors import InputError
from semmoe.profiles.trace import RoutingTrace, hash_file
from semmoe.solvers.deployment import Deployment
from semmoe.solvers.evaluate.metrics import DISPATCH_KINDS
from semmoe.solvers.evaluate.score_plan import baselines, score_placements
from semmoe.solvers.maps.write import FORMAT, KINDS, sidecar_path
from semmoe.solvers.placement import Placement, Topology
from semmoe.solvers.plan import ModelFacts, Plan
from semmoe.solvers.schedule.simulate import Setting

TRTLLM_KEYS = {"num_slots", "initial_global_assignments", "layer_updates_per_iter"}


def import_placement(kind: str, file: Path, model: ModelFacts, topology: Topology) -> Placement:
    """The placement in an engine's file, for the ranks of `topology`.

    Raises InputError, one line with the file, where it is damaged, of another kind, or for another
    model or number of ranks.
    """
    readers = {
        "sglang": _read_sglang,
        "trtllm": _read_trtllm,
        "vllm": _read_vllm,
        "vllm-ascend": _read_ascend,
        "eplb": _read_eplb,
    }
    if kind not in readers:
        raise InputError(f"--import is {kind!r}, expected one of {', '.join(KINDS)}")
    where = str(file)
    # Rows of all layers of the file are checked, under their numbers there; then those of the MoE
    # layers are taken.
    rows_MP, layer_of_M, wanted_L = readers[kind](file, model, topology)
    num_slots = rows_MP.shape[1]
    if num_slots % topology.num_ranks:
        raise InputError(f"{where}: {num_slots} slots do not divide over {topology.num_ranks} ranks")
    if num_slots < model.num_experts:
        raise InputError(f"{where}: {num_slots} slots cannot hold the model's {model.num_experts} experts")
    if rows_MP.min() < 0 or rows_MP.max() >= model.num_experts:
        bad = rows_MP.min() if rows_MP.min() < 0 else rows_MP.max()
        raise InputError(f"{where} names expert {bad}, the model has experts 0..{model.num_experts - 1}")
    experts_MRS = rows_MP.astype(np.int32).reshape(len(rows_MP), topology.num_ranks, -1)
    try:
        Placement(experts_MRS, model.num_experts)
    except InputError as error:
        # Placement counts rows from 0; the file may number its layers otherwise.
        said = re.sub(r"^layer (\d+)", lambda m: f"layer {layer_of_M[int(m[1])]}", str(error))
        # EPLB often makes such maps (its issue 22): the second slot serves nobody who could not use
        # the first.
        why = (
            f" of {topology.num_ranks}, which wastes the slot: a plan cannot hold that; place afresh, or name the ranks that "
            "the map was made for"
            if "twice" in said
            else ""
        )
        raise InputError(f"{where}: {said}{why}") from None
    index = {layer: m for m, layer in enumerate(layer_of_M)}
    return Placement(experts_MRS[[index[layer] for layer in wanted_L]], model.num_experts)


def import_plan(
    traces: list[RoutingTrace],
    topology: Topology,
    *,
    kind: str,
    file: Path,
    dispatch: str,
    setting: Setting,
    made_by: str,
) -> Plan:
    """A plan of the imported map, scored on all requests of the traces: none of them was used to
    make it.

    The exception is a map that `semmoe export` wrote from a plan for the same trace; a note of the
    plan says so.
    """
    if dispatch not in DISPATCH_KINDS:
        raise InputError(f"dispatch {dispatch!r} is none of {', '.join(DISPATCH_KINDS)}")
    for trace in traces:
        trace.require_tokens("the score of an imported map")
    model = ModelFacts.of(traces[0].info)
    topology.check_experts(model.num_experts)
    placement = import_placement(kind, file, model, topology)
    profile = profile_traces(traces, seed=setting.seed)
    everything = [np.ones(trace.num_requests, bool) for trace in traces]
    scores = score_placements(
        Deployment(placement, profile.load_LE, topology, dispatch),
        traces,
        everything,
        beside=baselines(profile.load_LE, topology, profile.info.n_group),
        setting=setting,
    )
    num_requests = sum(trace.num_requests for trace in traces)
    fingerprints = [trace.fingerprint for trace in traces]
    notes = [
        f"the map of {file} was not made from this trace: all {num_requests} requests are scored; the load baseline is packed "
        "on the same requests, which flatters its balance"
    ]
    if set(exported_from(file).get("trace", {}).get("fingerprints", [])) & set(fingerprints):
        notes = [
            f"{file} was exported from a plan for this very trace: these scores are not held out, "
            "`semmoe report` on the plan has those that are"
        ]
    return Plan(
        placement=placement,
        topology=topology,
        model=model,
        method="imported",
        seed=setting.seed,
        dispatch=dispatch,
        load_LE=profile.load_LE,
        fitted_keys=np.empty(0, np.uint64),
        options={"import": kind, "sha256": hash_file(file)},
        trace={
            "fingerprints": fingerprints,
            "requests": num_requests,
            "tokens": sum(trace.num_tokens for trace in traces),
        },
        split={
            "holdout": 1.0,
            "holdout_domains": [],
            "seed": setting.seed,
            "held_out_requests": num_requests,
            "training_requests": 0,
            "refit": False,
        },
        scores=scores,
        notes=notes,
        made_by=made_by,
    )


def exported_from(file: Path) -> dict[str, Any]:
    """What FILE.semmoe.json says of where the file came from; empty where there is none or it is
    of other bytes."""
    try:
        origin = json.loads(sidecar_path(file).read_text(encoding="utf-8"))
        good = isinstance(origin, dict) and origin.get("format") == FORMAT and origin.get("sha256") == hash_file(file)
        return origin if good else {}
    except (OSError, ValueError):
        return {}


Rows = tuple[np.ndarray, list[int], list[int]]  # rows [M, P], layer number of each row, layers wanted of them


def _read_sglang(file: Path, model: ModelFacts, topology: Topology) -> Rows:
    where = str(file)
    value = _object(where, load_pt(file) if file.suffix == ".pt" else _read_json(file))
    # A recorder's dump holds the map that the server ran at its end, under a name of its own.
    key = "last_physical_to_logical_map" if "last_physical_to_logical_map" in value else "physical_to_logical_map"
    if key not in value:
        hint = ": these are loads, semmoe trace reads them" if "logical_count" in value else ""
        raise InputError(f"{where} has no physical_to_logical_map{hint}")
    if key == "physical_to_logical_map" and len(value) > 1:
        extra = next(k for k in value if k != key)
        raise InputError(f"{where} has the key {str(extra)[:40]!r}: SGLang takes physical_to_logical_map alone")
    rows_MP = _ids(where, key, value[key], 2)
    depth = model.num_model_layers or len(rows_MP)
    if len(rows_MP) != depth or max(model.model_layers) >= depth:
        expected = model.num_model_layers or f"more than {max(model.model_layers)}"
        raise InputError(f"{where} has {len(rows_MP)} rows, expected {expected}: one for every layer of the model")
    return rows_MP, list(range(len(rows_MP))), list(model.model_layers)


def _read_trtllm(file: Path, model: ModelFacts, topology: Topology) -> Rows:
    import yaml

    where = str(file)
    try:
        # Not libyaml's loader: it is faster than this one's second, and crashes where brackets nest
        # deep.
        value = _object(where, yaml.load(_read_text(file), yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{where} is not YAML: {_first_line(error)}") from None
    for key in value:
        if key not in TRTLLM_KEYS:
            raise InputError(
                f"{where} has the key {str(key)[:40]!r}: TensorRT-LLM takes {', '.join(sorted(TRTLLM_KEYS))}"
            )
    table = value.get("initial_global_assignments")
    if not isinstance(table, dict) or not table:
        raise InputError(f"{where} has no initial_global_assignments by layer: there is no map in it")
    for layer in table:
        if not isinstance(layer, int) or isinstance(layer, bool) or layer < 0:
            raise InputError(f"{where}: {str(layer)[:40]!r} is not the number of a layer")
    for layer in model.model_layers:
        if layer not in table:
            raise InputError(f"{where} has no row for layer {layer}, which has experts: TensorRT-LLM would stop there")
    rows_MP = _ids(where, "initial_global_assignments", list(table.values()), 2)
    if value.get("num_slots") != rows_MP.shape[1]:
        raise InputError(f"{where}: num_slots is {value.get('num_slots')!r}, its rows have {rows_MP.shape[1]} slots")
    return rows_MP, list(table), list(model.model_layers)


def _read_vllm(file: Path, model: ModelFacts, topology: Topology) -> Rows:
    """Any of the three formats; the file itself tells which."""
    where = str(file)
    value = _read_json(file)
    layers = list(range(model.num_layers))
    if isinstance(value, list):  # pr49572
        flat = bool(value) and not isinstance(value[0], list)
        rows_MP = _ids(where, "the map", [value] * model.num_layers if flat else value, 2)
        return _moe_rows(where, rows_MP, model), layers, layers
    value = _object(where, value)
    if "expert_to_ep_rank" in value:  # pr34811
        rank_of_E = _ids(where, "expert_to_ep_rank", value["expert_to_ep_rank"], 1)
        if len(rank_of_E) != model.num_experts:
            raise InputError(f"{where} has ranks of {len(rank_of_E)} experts, the model has {model.num_experts}")
        counts_R = np.bincount(np.clip(rank_of_E, 0, topology.num_ranks), minlength=topology.num_ranks)
        if rank_of_E.min() < 0 or rank_of_E.max() >= topology.num_ranks or len(set(counts_R.tolist())) > 1:
            raise InputError(
                f"{where} does not give each of the ranks 0..{topology.num_ranks - 1} the same number of experts"
            )
        row_P = np.argsort(rank_of_E, kind="stable")
        return np.tile(row_P, (model.num_layers, 1)), layers, layers
    if value.get("record_type") != "eplb_initial_mapping":
        raise InputError(
            f"{where} is no map of pr41141, pr49572 or pr34811: its record_type is {value.get('record_type')!r}"
        )
    if value.get("version") != 1:
        raise InputError(f"{where} has version {value.get('version')!r}, expected 1")
    table = _object(f"{where}: initial_global_assignments", value.get("initial_global_assignments"))
    if set(table) != {str(layer) for layer in layers}:
        raise InputError(f"{where} has rows for layers {_some(table)}, expected MoE layers 0..{model.num_layers - 1}")
    rows_MP = _ids(where, "initial_global_assignments", [table[str(layer)] for layer in layers], 2)
    for key, is_ in (("num_slots", rows_MP.shape[1]), ("num_redundant_experts", rows_MP.shape[1] - model.num_experts)):
        if value.get(key) != is_:
            raise InputError(f"{where}: {key} is {value.get(key)!r}, its rows make it {is_}")
    return rows_MP, layers, layers


def _read_ascend(file: Path, model: ModelFacts, topology: Topology) -> Rows:
    where = str(file)
    value = _object(where, _read_json(file))
    layers = list(range(model.num_layers))
    entries = value.get("layer_list")
    if not isinstance(entries, list) or value.get("moe_layer_count") != len(entries):
        raise InputError(f"{where} has no layer_list of moe_layer_count ({value.get('moe_layer_count')!r}) layers")
    experts: list[Any] = []
    for number, entry in enumerate(entries):
        entry = _object(f"{where}: layer {number}", entry)
        devices = entry.get("device_list")
        # The engine takes layers and devices by their place in the list: an id that says otherwise
        # would be misread.
        if entry.get("layer_id") != number or not isinstance(devices, list):
            raise InputError(
                f"{where}: entry {number} has layer_id {entry.get('layer_id')!r}, expected {number} and a device_list"
            )
        if not len(devices) == entry.get("device_count") == topology.num_ranks:
            raise InputError(f"{where}: layer {number} has {len(devices)} devices, expected {topology.num_ranks}")
        for rank, device in enumerate(devices):
            device = _object(f"{where}: layer {number}, device {rank}", device)
            if device.get("device_id") != rank:
                raise InputError(f"{where}: layer {number}, device {rank} has device_id {device.get('device_id')!r}")
            experts.append(device.get("device_expert"))
    rows_MP = _ids(where, "device_expert", experts, 2).reshape(len(entries), -1)
    return _moe_rows(where, rows_MP, model), layers, layers


def _read_eplb(file: Path, model: ModelFacts, topology: Topology) -> Rows:
    """The three tables by name, the tuple that rebalance_experts returns, or phy2log alone."""
    where = str(file)
    value = _read_tensors(file)
    if isinstance(value, (tuple, list)) and len(value) == 3 and hasattr(value[0], "shape"):
        value = dict(zip(("phy2log", "log2phy", "logcnt"), value, strict=True))
    tables = value if isinstance(value, dict) else {"phy2log": value}
    if "phy2log" not in tables:
        raise InputError(f"{where} has no phy2log, but {_some(tables)}")
    rows_LP = _moe_rows(where, _ids(where, "phy2log", tables["phy2log"], 2), model)
    if "logcnt" in tables:
        logcnt_LE = _ids(where, "logcnt", tables["logcnt"], 2)
        experts = np.arange(model.num_experts)
        counts_LE = np.stack(
            [np.searchsorted(r, experts, "right") - np.searchsorted(r, experts) for r in np.sort(rows_LP)]
        )
        if not np.array_equal(logcnt_LE, counts_LE):
            raise InputError(f"{where}: logcnt does not count the experts of phy2log")
    layers = list(range(model.num_layers))
    return rows_LP, layers, layers


def _read_tensors(file: Path) -> Any:
    if file.suffix == ".pt":
        return load_pt(file)
    if file.suffix not in (".safetensors", ".npz", ".npy"):
        raise InputError(f"{file}: an EPLB map has a name that ends in .pt, .safetensors, .npz or .npy")
    if not file.is_file():
        raise InputError(f"{file} {'is not a file' if file.exists() else 'does not exist'}")
    try:
        if file.suffix == ".safetensors":
            from safetensors.numpy import load_file

            return load_file(file)
        value = np.load(file, allow_pickle=False)
        return value if isinstance(value, np.ndarray) else {name: value[name] for name in value.files}
    except Exception as error:  # zipfile, numpy and safetensors raise half a dozen kinds for a damaged file
        raise InputError(f"{file} is damaged: {_first_line(error)}") from None


def _moe_rows(where: str, rows_MP: np.ndarray, model: ModelFacts) -> np.ndarray:
    if len(rows_MP) != model.num_layers:
        raise InputError(f"{where} has {len(rows_MP)} rows, expected {model.num_layers}: one for every MoE layer")
    return rows_MP


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{file} does not exist") from None
    except UnicodeDecodeError:
        raise InputError(f"{file} is not text in UTF-8") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None


def _read_json(file: Path) -> Any:
    try:
        return json.loads(_read_text(file))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON: {_first_line(error)}") from None


def _object(where: str, value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: a {type(value).__name__}, expected an object with named keys")
    return value


def _ids(where: str, name: str, value: Any, ndim: int) -> np.ndarray:
    """Nested lists or a tensor as integers with `ndim` axes; nothing else passes, not even whole
    floats."""
    try:
        array = np.asarray(value.numpy() if hasattr(value, "numpy") else value)
    except ValueError:
        raise InputError(f"{where}: {name} has rows of unequal length") from None
    except (TypeError, RuntimeError) as error:  # a tensor that numpy has no type for
        raise InputError(f"{where}: {name} is no plain tensor of integers: {_first_line(error)}") from None
    if array.ndim != ndim or array.dtype.kind not in "iu" or not array.size:
        shape = list(array.shape)
        raise InputError(f"{where}: {name} is {array.dtype} of shape {shape}, expected integers with {ndim} axes")
    return array


def _some(names: Any) -> str:
    text = ", ".join(map(str, list(names)[:5]))
    return text if len(text) <= 60 else f"{text[:57]}..."


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (" ".join(lines) if lines else type(error).__name__)[:160]
