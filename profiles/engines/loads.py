"""Loads of experts without tokens: TensorRT-LLM's statistics and the matrices that EPLB takes.

TensorRT-LLM (EXPERT_STATISTIC_ITER_RANGE, EXPERT_STATISTIC_PATH): meta_info.json and
rank{r}.safetensors with keys "{iteration}_{layer}", counts of logical ids [E], to be summed over
ranks; layers have their numbers in the model. EPLB (`rebalance_experts(weight, ...)`): a matrix [L,
E] of counts, or windows of them [W, L, E], as .npy, .pt or .json; a JSON or .pt dictionary with
"logical_count" (SGLang's --init-expert-location takes it) is the same. So are CSV files and JSON
lists of (layer, expert, count), one file a rank or several, added up; without a count every line
is one activation.

Shape letters: W windows, L layers, E experts.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from semmoe.profiles.document import parse_json
from semmoe.profiles.engines.columns import MOST_EXPERTS
from semmoe.profiles.engines.containers import container_of
from semmoe.profiles.engines.load_rows import counted_rows, load_of
from semmoe.profiles.engines.recorder import array_of, load_pt
from semmoe.profiles.engines.records import EngineLoad, LeftOut, input_lines, integer
from semmoe.profiles.errors import InputError
from semmoe.profiles.files import shortened
from semmoe.profiles.safetensors_file import INTEGERS, read_shard


def read_trtllm(files: list[Path], facts: dict[str, Any] | None, dropped: LeftOut) -> Iterator[EngineLoad]:
    """One load for each iteration of each statistics directory, summed over its ranks."""
    for path in files:
        folder = path if path.is_dir() else path.parent
        if not (folder / "meta_info.json").is_file():
            raise InputError(f"{path} is not a directory of expert statistics: {folder} holds no meta_info.json")
        meta = _meta(folder / "meta_info.json")
        ranks = _rank_files(folder)
        load: dict[int, dict[int, np.ndarray]] = {}
        for file in ranks:
            counts = list(_tensors(file))
            if not counts:
                raise InputError(f"{file} holds no counts: loads add up over all ranks")
            for key, count_E in counts:
                where = f"{file}, {shortened(key)}"
                match = re.fullmatch(r"(\d{1,9})_(\d{1,9})", key)
                if match is None:
                    raise InputError(f"{where}: expected a key of the form iteration_layer")
                if count_E.shape != (meta["num_experts"],) or count_E.min() < 0:
                    raise InputError(
                        f"{where}: {count_E.dtype} {list(count_E.shape)}, expected {meta['num_experts']} counts from 0"
                    )
                layers = load.setdefault(int(match[1]), {})
                layers[int(match[2])] = layers.get(int(match[2]), 0) + count_E.astype(np.int64)
        layer_ids = tuple(sorted({layer for layers in load.values() for layer in layers}))
        for iteration in sorted(load):
            if missing := sorted(set(layer_ids) - set(load[iteration])):
                raise InputError(f"{folder}: iteration {iteration} lacks layer {missing[0]}")
            yield EngineLoad(
                f"{folder}, iteration {iteration}",
                f"{folder.name}:{iteration}" if len(files) > 1 else str(iteration),
                np.stack([load[iteration][layer] for layer in layer_ids]),
                meta["num_experts_per_token"],
                layer_ids,
            )


def _meta(path: Path) -> dict[str, int]:
    value = _json(path)
    found = {}
    for key in ("num_experts", "num_experts_per_token"):
        number = integer(str(path), value, key) if isinstance(value, dict) else None
        if not number:
            raise InputError(f"{path}: no {key}")
        found[key] = number
    if not found["num_experts_per_token"] <= found["num_experts"] < MOST_EXPERTS:
        raise InputError(
            f"{path}: {found['num_experts_per_token']} of {found['num_experts']} experts a token cannot be"
        )
    return found


def _rank_files(folder: Path) -> list[Path]:
    ranks = {int(m[1]): p for p in folder.glob("rank*.safetensors") if (m := re.fullmatch(r"rank(\d+)", p.stem))}
    if not ranks:
        raise InputError(f"{folder} holds no rank*.safetensors")
    if missing := sorted(set(range(max(ranks) + 1)) - set(ranks)):
        raise InputError(f"{folder} lacks rank{missing[0]}.safetensors: loads add up over all ranks")
    return [ranks[r] for r in sorted(ranks)]


def _tensors(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    shard = read_shard(file)
    for tensor in sorted(shard.tensors, key=lambda t: t.name):
        if tensor.dtype not in INTEGERS:
            raise InputError(f"{file}, {tensor.name}: type {tensor.dtype}, expected counts from 0")
        yield tensor.name, shard.map(tensor, INTEGERS[tensor.dtype])


def _json(path: Path) -> Any:
    try:
        return parse_json(b"".join(line for _, line in input_lines(path)))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None


def read_eplb(files: list[Path], facts: dict[str, Any] | None, dropped: LeftOut) -> Iterator[EngineLoad]:
    """The windows of each matrix; a matrix without an axis of windows is one."""
    if counted := [file for file in files if container_of(file) == "text"]:
        yield counted_rows(counted, facts)
    for file in files:
        if file in counted:
            continue
        value = _matrix(file)
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            yield load_of(file, [(f"{file}, item {i}", row) for i, row in enumerate(value)], facts)
            continue
        if isinstance(value, dict):
            if "logical_count" not in value:
                raise InputError(f"{file}: keys {sorted(map(str, value))[:5]}, expected logical_count")
            value = value["logical_count"]
        try:
            ndim = np.ndim(_nested(value) if isinstance(value, list) else value)
        except (ValueError, RecursionError):
            raise InputError(f"{file}: the lists of the load matrix nest too deep") from None
        if ndim not in (2, 3):
            raise InputError(
                f"{file}: a matrix with {ndim} axes, expected [layers, experts] or [windows, layers, experts]"
            )
        load = array_of(str(file), "the load matrix", value, ndim).astype(np.int64)
        for window, load_LE in enumerate(load if ndim == 3 else load[None]):
            name = f"{file.stem}:{window}" if ndim == 3 else file.stem
            yield EngineLoad(f"{file}, window {window}" if ndim == 3 else str(file), name, load_LE)


def _nested(value: Any) -> Any:
    """A nested list down to its first elements: enough to count its axes even where its rows are
    uneven."""
    return [_nested(value[0])] if isinstance(value, list) and value else value


def _matrix(file: Path) -> Any:
    kind = container_of(file)
    if kind == "pt" or file.suffix in (".pt", ".pth"):
        return load_pt(file)
    if kind == "npy" or file.suffix == ".npy":
        try:
            return np.load(file, mmap_mode="r", allow_pickle=False)  # mapped, it must be as long as it says
        except FileNotFoundError:
            raise InputError(f"{file} does not exist") from None
        except (ValueError, EOFError, OSError, OverflowError) as error:
            raise InputError(f"{file} is not a .npy array: {error}") from None
    if kind == "json":
        return _json(file)
    raise InputError(f"{file} is {kind}, expected a load matrix in .npy, .pt or .json, or CSV")
