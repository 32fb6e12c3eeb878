"""Responses of SGLang and vLLM servers that returned the routed experts of every token.

SGLang (`--enable-return-routed-experts`, srt/state_capturer/routed_experts.py): base64 of raw
little-endian int32 [rows, layers, k] in `meta_info.routed_experts` of /generate, or in
`choices[i].sglext.routed_experts` (older: sgl_ext). vLLM (config/aux_output.py): base64 of a .npy
array of the same shape, uint8 or uint16, in `choices[i].routed_experts` over HTTP, or in
`outputs[i].routed_experts` of an offline RequestOutput written as JSON.

Both give logical ids of prompt and generated tokens; the last sampled token was never routed and
has no row, so there are sequence length - 1 - start rows. `prompt_routed_experts`, where given,
holds the rows of the prompt and comes first.

Shape letters: T rows, L layers of the record, K top-k.
"""

import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from semmoe.profiles.engines.records import (
    EngineRequest,
    base64_bytes,
    integer,
    integer_array,
    json_objects,
    token_list,
)
from semmoe.profiles.errors import InputError

PROMPT_IDS = ("prompt_token_ids", "prompt_ids", "input_ids")
EXTENSIONS = ("sglext", "sgl_ext")  # where SGLang keeps the routing on its OpenAI routes
NPY_MAGIC = b"\x93NUMPY"
OUTPUT_IDS = ("output_ids", "output_token_ids", "token_ids")


def read_sglang(files: list[Path], facts: dict[str, Any] | None, dropped: Counter[str]) -> Iterator[EngineRequest]:
    """Requests of SGLang responses in both shapes. Without routed_experts_shape, `facts` say
    layers and top-k."""
    shape = None if facts is None else (facts["num_model_layers"], facts["top_k"])
    for file in files:
        for where, record in json_objects(file):
            for index, part in enumerate(_sglang_parts(where, record)):
                place = where if index == 0 else f"{where}, choice {index}"
                if part.get("routed_experts") is None:
                    raise InputError(
                        f"{place}: no routed_experts; the server needs --enable-return-routed-experts, the request "
                        "return_routed_experts"
                    )
                ids_TLK = _raw_ids(place, part, shape)
                shape = shape or ids_TLK.shape[1:]
                start = integer(place, part, "routed_experts_start_len")
                yield _request(place, file, record, part, ids_TLK, start)


def _sglang_parts(where: str, record: dict[str, Any]) -> list[dict[str, Any]]:
    """One flat dictionary for each sequence of a response: the routing, its lengths, its ids."""
    choices = record.get("choices")
    if choices is None:
        if not isinstance(record.get("meta_info"), dict):
            raise InputError(f"{where}: neither meta_info nor choices: not a response of SGLang")
        return [{**record, **record["meta_info"]}]
    return [{**choice, **_extension(choice, record)} for choice in _dictionaries(where, "choices", choices)]


def _extension(choice: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    holders = (choice, record) if len(record["choices"]) == 1 else (choice,)
    found = [h[key] for h in holders for key in EXTENSIONS if isinstance(h.get(key), dict)]
    return found[0] if found else {}


def _dictionaries(where: str, name: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(v, dict) for v in value):
        raise InputError(f"{where}: {name} is not a list of objects")
    return value


def _raw_ids(where: str, part: dict[str, Any], shape: tuple[int, ...] | None) -> np.ndarray:
    """int32 [T, L, K] of base64 text over raw bytes."""
    data = base64_bytes(where, part["routed_experts"])
    if data.startswith(NPY_MAGIC):
        raise InputError(f"{where}: routed_experts is a .npy array, as vLLM writes it: --from vllm reads that")
    if len(data) % 4:
        raise InputError(f"{where}: routed_experts has {len(data)} bytes, expected int32 values of 4 bytes")
    values = np.frombuffer(data, "<i4")
    if part.get("routed_experts_shape") is not None:
        stated = integer_array(where, "routed_experts_shape", part["routed_experts_shape"], 1).tolist()
        if len(stated) != 3 or int(np.prod(stated)) != values.size or min(stated) < 0:
            raise InputError(f"{where}: routed_experts holds {values.size} values, its shape says {stated}")
        return values.reshape(stated)
    if shape is None:
        raise InputError(f"{where}: no routed_experts_shape; name the model's config.json with --model")
    if values.size % int(np.prod(shape)):
        raise InputError(
            f"{where}: routed_experts holds {values.size} values, expected rows of {shape[0]} layers x top-{shape[1]}"
        )
    return values.reshape(-1, *shape)


def read_vllm(files: list[Path], facts: dict[str, Any] | None, dropped: Counter[str]) -> Iterator[EngineRequest]:
    """Requests of vLLM in both shapes: HTTP responses, and RequestOutput or CompletionOutput
    written as JSON."""
    for file in files:
        for where, record in json_objects(file):
            name = next((key for key in ("choices", "outputs") if record.get(key) is not None), None)
            for index, part in enumerate([record] if name is None else _dictionaries(where, name, record[name])):
                place = where if index == 0 else f"{where}, {name} {index}"
                if part.get("routed_experts") is None:
                    if any(isinstance(part.get(key), dict) for key in ("meta_info", *EXTENSIONS)):
                        raise InputError(f"{place}: this is a response of SGLang: --from sglang reads that")
                    raise InputError(f"{place}: no routed_experts; the server needs --enable-return-routed-experts")
                ids_TLK = _npy_ids(place, part["routed_experts"])
                prompt = part.get("prompt_routed_experts", record.get("prompt_routed_experts"))
                if prompt is not None:
                    prompt_TLK = _npy_ids(place, prompt)
                    if prompt_TLK.shape[1:] != ids_TLK.shape[1:]:
                        raise InputError(
                            f"{place}: prompt_routed_experts has shape {list(prompt_TLK.shape)}, "
                            f"routed_experts {list(ids_TLK.shape)}"
                        )
                    ids_TLK = np.concatenate([prompt_TLK, ids_TLK])
                    if part.get("prompt_tokens") is None:
                        part = {**part, "prompt_rows": len(prompt_TLK)}
                start = integer(place, {**record, **part}, "routed_experts_prompt_start")
                yield _request(place, file, record, part, ids_TLK, start)


def _npy_ids(where: str, value: Any) -> np.ndarray:
    """Integers [T, L, K] of base64 text over .npy bytes, or of nested lists."""
    if isinstance(value, list):
        return integer_array(where, "routed_experts", value, 3)
    try:
        array = np.load(io.BytesIO(base64_bytes(where, value)), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{where}: routed_experts is not a .npy array: {error}") from None
    return integer_array(where, "routed_experts", array, 3)


def _request(
    where: str, file: Path, record: dict[str, Any], part: dict[str, Any], ids_TLK: np.ndarray, start: int | None
) -> EngineRequest:
    """A request of one sequence of a response: its name, ids and lengths wherever the response
    has them."""
    prompt = token_list(where, {**record, **part}, *PROMPT_IDS)
    output = token_list(where, part, *OUTPUT_IDS)
    usage = record["usage"] if isinstance(record.get("usage"), dict) else {}
    several = next((len(record[key]) for key in ("choices", "outputs") if isinstance(record.get(key), list)), 1) > 1
    num_prompt = len(prompt) if prompt is not None else integer(where, {**usage, **part}, "prompt_tokens")
    # The usage of a response adds up its choices: one choice's length is known only where it is
    # alone.
    counted = part if several else {**usage, **part}
    num_output = len(output) if output is not None else integer(where, counted, "completion_tokens")
    if num_prompt is None and part.get("prompt_rows"):
        num_prompt = (start or 0) + part["prompt_rows"]
    elif num_prompt is not None and num_output is not None:
        start = _first_row(where, len(ids_TLK), start, num_prompt, num_output)
    start = start or 0
    tokens = None
    if prompt is not None:
        tokens = prompt if output is None else np.concatenate([prompt, output])
        if len(tokens) < start + len(ids_TLK):
            tokens = None  # the generated ids are not in the response: better no sequence than half of one
    name = next((str(h[k]) for h in (part, record) for k in ("request_id", "id", "rid") if h.get(k) is not None), "")
    line = where.removeprefix(f"{file}, line ")
    return EngineRequest(
        where=where,
        expert_ids_TLK=ids_TLK,
        request_id=(name or f"{file.name}:{line.split(', choice')[0].replace(', item ', '.')}")
        + (f"/{part.get('index', 0)}" if several else ""),
        domain=str(record.get("domain") or ""),
        token_ids=tokens,
        num_prompt_tokens=num_prompt,
        first_position=start,
        repetition=bool(record.get("repetition", part.get("repetition", False))),
        model=str(record.get("model") or ""),
    )


def _first_row(where: str, num_rows: int, start: int | None, num_prompt: int, num_output: int) -> int:
    """Position of the first row; checks that the rows end one token before the sequence does."""
    last = num_prompt + num_output - 1
    if start is None:
        start = last - num_rows
    if start < 0 or start + num_rows != last:
        raise InputError(
            f"{where}: {num_rows} rows from position {max(start, 0)}, expected {last - max(start, 0)} for "
            f"{num_prompt} prompt and {num_output} generated tokens (the last one has no row)"
        )
    return start
