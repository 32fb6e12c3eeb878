"""Dumps of SGLang's expert distribution recorder (srt/eplb/expert_distribution.py): .pt files,
loaded with weights only.

stat, stat_approx: {"logical_count" [steps, layers, E]}, summed over ranks already; unused steps of
the circular buffer are zeros. per_pass: a list of records with `global_physical_count` [layers, S],
one file a rank, summed here by pass. per_token: records with `topk_ids_of_layer` [layers, T, 8] (-1
padded), one file a rank.

Ids and counts of the last two are of physical slots: `last_physical_to_logical_map` [layers, S]
takes them back to experts. It is the map at the end of the recording; with a rebalance in between,
earlier passes had another one.

Requests have no ids there. A prefill pass is cut by `extend_seq_lens` into one fragment for each
request of its batch; a decode pass, one token of each running request, stays one fragment. Where
attention is tensor parallel, ranks record the same tokens: a pass that another rank recorded alike
is left out.

Shape letters: L layers of the record, E experts, S physical slots, T tokens, K columns (8).
"""

import hashlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from semmoe.profiles.engines.containers import container_of
from semmoe.profiles.engines.load_rows import counted_rows
from semmoe.profiles.engines.records import EngineLoad, EngineRequest, LeftOut, integer, integer_array
from semmoe.profiles.errors import InputError, require_extra

REPEATED = "passes that another rank recorded alike"


def load_pt(path: Path) -> Any:
    """The content of a .pt file, loaded with weights_only=True."""
    if not path.is_file():
        raise InputError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    require_extra(f"{path}: reading a .pt file", "torch")
    import torch

    try:
        with warnings.catch_warnings():  # of what is refused in the next moment
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a dozen kinds, from pickle, zipfile and its own, with advice that would run its code
        raise InputError(
            f"{path} cannot be loaded as a .pt file of plain tensors: damaged, or another kind of file"
        ) from None


def pt_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """The content of a .pt file with a dictionary of tensors; made in memory, so that the bytes do
    not hold the name of a file. Raises InputError without torch."""
    require_extra("writing a .pt file", "torch")
    import io

    import torch

    buffer = io.BytesIO()
    torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, buffer)
    return buffer.getvalue()


def array_of(where: str, name: str, value: Any, ndim: int) -> np.ndarray:
    """A tensor, array or nested list as an array of integers with `ndim` axes."""
    try:
        array = value.numpy() if hasattr(value, "numpy") else value
    except (TypeError, RuntimeError) as error:  # sparse, bfloat16, without data: numpy has none of them
        raise InputError(f"{where}: {name} is no plain tensor of integers: {str(error).splitlines()[0]}") from None
    return integer_array(where, name, array, ndim)


def recorder_files(files: list[Path]) -> list[Path]:
    """The files themselves, with a directory standing for the dumps in it."""
    found = []
    for file in files:
        dumps = sorted(file.glob("expert_distribution_recorder_*.pt")) if file.is_dir() else [file]
        if not dumps:
            raise InputError(f"{file} holds no expert_distribution_recorder_*.pt")
        found += dumps
    return found


def read_recorder(
    files: list[Path], facts: dict[str, Any] | None, dropped: LeftOut
) -> Iterator[EngineRequest | EngineLoad]:
    """Requests of a per_token recording, loads of the other modes."""
    passes: dict[str, np.ndarray] = {}
    ranks: dict[bytes, int] = {}
    places: dict[str, str] = {}
    modes: dict[str, Path] = {}
    found = recorder_files(files)
    if found and all(container_of(file) == "text" and file.suffix != ".pt" for file in found):
        yield counted_rows(found, facts)
        return
    for file in found:
        dump = load_pt(file)
        mode = _mode(file, dump)
        modes.setdefault(mode, file)
        if len(modes) > 1:
            one, other = list(modes.items())
            raise InputError(
                f"{one[1]} is a recording of mode {one[0]}, {other[1]} of mode {other[0]}: import one mode"
            )
        if mode == "stat":
            for step, load_LE in enumerate(array_of(str(file), "logical_count", dump["logical_count"], 3)):
                yield EngineLoad(f"{file}, step {step}", f"{file.stem}:{step}", load_LE.astype(np.int64))
            continue
        map_LS = array_of(str(file), "last_physical_to_logical_map", dump.get("last_physical_to_logical_map"), 2)
        if map_LS.size == 0 or map_LS.min() < 0 or map_LS.max() >= map_LS.shape[1]:
            raise InputError(
                f"{file}: last_physical_to_logical_map of shape {list(map_LS.shape)} names an expert outside its slots"
            )
        for index, record in enumerate(dump["records"]):
            where = f"{file}, record {index}"
            if mode == "per_pass":
                window = f"pass {integer(where, record, 'forward_pass_id')}"
                load_LE = _logical_load(where, record.get("global_physical_count"), map_LS)
                places.setdefault(window, where)
                if window in passes and passes[window].shape != load_LE.shape:
                    raise InputError(
                        f"{where}: shape {list(load_LE.shape)}, another rank's is {list(passes[window].shape)}"
                    )
                passes[window] = passes.get(window, 0) + load_LE
            else:
                yield from _fragments(where, record, map_LS, ranks, dropped)
    for window, load_LE in passes.items():
        yield EngineLoad(places[window], window, load_LE)


def _mode(file: Path, dump: Any) -> str:
    if isinstance(dump, dict) and "logical_count" in dump:
        return "stat"
    records = dump.get("records") if isinstance(dump, dict) else None
    if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
        raise InputError(f"{file} holds neither logical_count nor records: not a dump of the recorder")
    if not records:
        raise InputError(f"{file} holds no record")
    return "per_token" if "topk_ids_of_layer" in records[0] else "per_pass"


def _logical_load(where: str, value: Any, map_LS: np.ndarray) -> np.ndarray:
    """Counts of experts, int64 [L, E], of counts of slots [L, S]."""
    count_LS = array_of(where, "global_physical_count", value, 2)
    if count_LS.shape != map_LS.shape:
        raise InputError(
            f"{where}: global_physical_count has shape {list(count_LS.shape)}, the map {list(map_LS.shape)}"
        )
    load_LE = np.zeros((len(map_LS), int(map_LS.max()) + 1), np.int64)
    np.add.at(load_LE, (np.arange(len(map_LS))[:, None], map_LS), count_LS.astype(np.int64))
    return load_LE


def _fragments(
    where: str, record: dict[str, Any], map_LS: np.ndarray, ranks: dict[bytes, int], dropped: LeftOut
) -> Iterator[EngineRequest]:
    slots_LTK = array_of(where, "topk_ids_of_layer", record.get("topk_ids_of_layer"), 3)
    tokens = array_of(where, "input_ids", record.get("input_ids"), 1)
    rank = integer(where, record, "rank") or 0
    number = integer(where, record, "forward_pass_id")
    if len(tokens) > slots_LTK.shape[1] or len(map_LS) != len(slots_LTK):
        raise InputError(
            f"{where}: topk_ids_of_layer has shape {list(slots_LTK.shape)} for {len(tokens)} input_ids and a map of "
            f"{len(map_LS)} layers"
        )
    slots_LTK = slots_LTK[:, : len(tokens)]  # a padded pass has more rows than tokens
    digest = hashlib.blake2b(f"{number}".encode(), digest_size=16)
    for part in (tokens, slots_LTK):
        digest.update(part.tobytes())
    if ranks.setdefault(digest.digest(), rank) != rank:
        dropped[REPEATED] += 1
        return
    ids_TLK = _logical_ids(where, slots_LTK, map_LS).transpose(1, 0, 2)
    lengths = record.get("extend_seq_lens")
    prefill = lengths is not None
    cuts = array_of(where, "extend_seq_lens", lengths, 1).tolist() if prefill else [len(tokens)]
    if sum(cuts) != len(tokens) or min(cuts, default=0) < 0:
        raise InputError(f"{where}: extend_seq_lens add up to {sum(cuts)}, there are {len(tokens)} input_ids")
    key = record.get("gatherer_key") or "primary"
    name = f"rank{rank}-pass{number}" + ("" if key == "primary" else f"-{key}")
    start = 0
    for index, length in enumerate(cuts):
        chunk = slice(start, start + length)
        start += length
        yield EngineRequest(
            where=where,
            expert_ids_TLK=ids_TLK[chunk],
            request_id=f"{name}-{index}",
            token_ids=tokens[chunk].astype(np.int32),
            num_prompt_tokens=length if prefill else 0,
            num_experts=int(map_LS.max()) + 1,
        )


def _logical_ids(where: str, slots_LTK: np.ndarray, map_LS: np.ndarray) -> np.ndarray:
    """Expert ids of slots; rows of a dense layer (all 0, or all padding) and padding stay what
    they are."""
    if slots_LTK.size == 0:
        return slots_LTK
    if slots_LTK.min() < -1 or slots_LTK.max() >= map_LS.shape[1]:
        bad = slots_LTK.min() if slots_LTK.min() < -1 else slots_LTK.max()
        raise InputError(f"{where}: topk_ids_of_layer holds slot {bad}, the map has {map_LS.shape[1]} slots")
    flat_LX = np.maximum(slots_LTK, 0).reshape(len(map_LS), -1)
    ids_LTK = np.take_along_axis(map_LS, flat_LX, axis=1).reshape(slots_LTK.shape)
    is_dense_LT1 = (slots_LTK == 0).all(axis=2, keepdims=True) & (slots_LTK.shape[2] > 1)
    return np.where((slots_LTK < 0) | is_dense_LT1, slots_LTK, ids_LTK)
