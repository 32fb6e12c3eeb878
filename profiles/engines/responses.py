"""Responses of SGLang and vLLM servers that returned the routed experts of every token.

SGLang (`--enable-return-routed-experts`, srt/state_capturer/routed_experts.py): base64 of raw
little-endian int32 [rows, layers, k] in `meta_info.routed_experts` of /generate, or in
`choices[i].sglext.routed_experts` (older: sgl_ext). vLLM (config/aux_output.py): base64 of a .npy
array of the same shape, uint8 or uint16, in `choices[i].routed_experts` over HTTP, or in
`outputs[i].routed_experts` of an offline RequestOutput written as JSON.

Both give logical ids of prompt and generated tokens; the last sampled token was never routed and
has no row, so there are sequence length - 1 - start rows. `prompt_routed_experts`, where given,
holds the rows of the prompt and comes first.

A server's log holds more than good answers: errors, aborted requests, requests that did not ask for
the routing, rows that do not fit the tokens. Each is left out and counted by its reason.

Shape letters: T rows, L layers of the record, K top-k.
"""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from semmoe.profiles.engines.records import (
    FOREIGN,
    EngineRequest,
    LeftOut,
    UnusableError,
    base64_bytes,
    described_array,
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
ABORTED, ERRORS, UNASKED = "aborted requests", "error responses", "responses without routed_experts"
MISSING_ROWS, SURPLUS_ROWS = "requests with missing rows", "requests with surplus rows"
STARTS = ("routed_experts_start_len", "routed_experts_prompt_start")
DAMAGED = "damaged responses"
ABORTS = ("abort", "aborted", "cancel", "cancelled", "canceled")  # as finish reasons

Part = dict[str, Any]  # of a response: what it says of one sequence, in one flat dictionary


def read_sglang(files: list[Path], facts: dict[str, Any] | None, left_out: LeftOut) -> Iterator[EngineRequest]:
    """Requests of SGLang responses in both shapes. Without routed_experts_shape, `facts` say
    layers and top-k."""
    return _responses(files, left_out, _sglang_parts, _sglang_reader(facts))


def _sglang_reader(facts: dict[str, Any] | None) -> Callable[[str, Path, dict[str, Any], Part], EngineRequest]:
    """What reads one sequence of SGLang, which may tell the shape of those after it."""
    shape = None if facts is None else (facts["num_model_layers"], facts["top_k"])

    def read(where: str, file: Path, record: dict[str, Any], part: Part) -> EngineRequest:
        nonlocal shape
        if part.get("routed_experts") is None:
            hint = "the server needs --enable-return-routed-experts, the request return_routed_experts"
            raise UnusableError(f"{where}: no routed_experts; {hint}", UNASKED)
        ids_TLK = _raw_ids(where, part, shape)
        request = _request(where, file, record, part, ids_TLK, integer(where, part, "routed_experts_start_len"))
        shape = shape or ids_TLK.shape[1:]
        return request

    return read


def read_answer(kind: str, record: dict[str, Any], facts: dict[str, Any], where: str) -> list[EngineRequest]:
    """The sequences of one response, as a server has just given it.

    Parameters:
        kind: "sglang" or "vllm".
        record: the JSON object.
        facts: of the model, `profiles.config.moe_facts`.
        where: the request, for messages.

    Raises InputError for an error, an abort, or rows that are not whole; one that has a `reason` is
    counted by it.
    """
    parts_of, read = (_sglang_parts, _sglang_reader(facts)) if kind == "sglang" else (_vllm_parts, _vllm_request)
    _refuse_error(where, record)
    found = []
    for place, part in parts_of(where, record):
        _refuse_abort(place, part)
        found.append(read(place, Path(where), record, part))
    return found


def _responses(
    files: list[Path],
    left_out: LeftOut,
    parts_of: Callable[[str, dict[str, Any]], list[tuple[str, Part]]],
    read: Callable[[str, Path, dict[str, Any], Part], EngineRequest],
) -> Iterator[EngineRequest]:
    """What `read` makes of every sequence of every record; what it cannot use is left out."""
    from_first_token = False  # some response has rows from its first token on, though it does not say so
    for file in files:
        for where, record in json_objects(file, left_out):
            try:
                _refuse_error(where, record)
                parts = parts_of(where, record)
            except InputError as error:
                left_out.leave(getattr(error, "reason", DAMAGED), error, record)
                continue
            for place, part in parts:
                try:
                    _refuse_abort(place, part)
                    request = read(place, file, record, part)
                    if not any(holder.get(key) is not None for holder in (record, part) for key in STARTS):
                        _refuse_late_start(request, from_first_token)
                        from_first_token |= request.first_position == 0
                except InputError as error:
                    left_out.leave(getattr(error, "reason", DAMAGED), error, record if len(parts) == 1 else part)
                    continue
                yield request


def _refuse_late_start(request: EngineRequest, from_first_token: bool) -> None:
    """Raise UnusableError where rows seem to start late, and no start was asked for: a start that
    nobody states lies inside the prompt, and is everybody's."""
    start = request.first_position
    if start and (from_first_token or start > (request.num_prompt_tokens or 0)):
        rows = len(request.expert_ids_TLK)
        raise UnusableError(
            f"{request.where}: {rows} rows, expected {rows + start}; where they begin at token {start}, "
            f"{' or '.join(STARTS)} must say so",
            MISSING_ROWS,
        )


def _refuse_error(where: str, record: dict[str, Any]) -> None:
    """Raise UnusableError for a record that a server answers in place of a response."""
    error = record.get("error") or (record if record.get("object") == "error" or "detail" in record else None)
    if error is None or any(record.get(key) is not None for key in ("choices", "outputs", "routed_experts")):
        return
    said = error.get("message") or error.get("detail") or error.get("type") if isinstance(error, dict) else error
    raise UnusableError(f"{where}: the server answered with an error: {str(said)[:80]!r}", ERRORS)


def _refuse_abort(where: str, part: Part) -> None:
    """Raise UnusableError for a sequence that was stopped from outside: its rows are not whole."""
    reason = part.get("finish_reason")
    kind = reason.get("type") if isinstance(reason, dict) else reason
    if part.get("aborted") is True or str(kind).lower() in ABORTS:
        raise UnusableError(f"{where}: the request was aborted (finish_reason {kind!r})", ABORTED)
    if str(kind).lower() == "error" or (part.get("error") and part.get("routed_experts") is None):
        raise UnusableError(f"{where}: the request ended in an error (finish_reason {kind!r})", ERRORS)


def _sglang_parts(where: str, record: dict[str, Any]) -> list[tuple[str, Part]]:
    """The sequences of a response, each with its place: the routing, its lengths, its ids."""
    choices = record.get("choices")
    if choices is None:
        if not isinstance(record.get("meta_info"), dict):
            raise UnusableError(f"{where}: neither meta_info nor choices: not a response of SGLang", FOREIGN)
        return [(where, {**record, **record["meta_info"]})]
    parts = [{**choice, **_extension(choice, record)} for choice in _dictionaries(where, "choices", choices)]
    return [(f"{where}, choice {index}" if index else where, part) for index, part in enumerate(parts)]


def _extension(choice: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    holders = (choice, record) if len(record["choices"]) == 1 else (choice,)
    found = [h[key] for h in holders for key in EXTENSIONS if isinstance(h.get(key), dict)]
    return found[0] if found else {}


def _dictionaries(where: str, name: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(v, dict) for v in value):
        raise InputError(f"{where}: {name} is not a list of objects")
    return value


def _raw_ids(where: str, part: dict[str, Any], shape: tuple[int, ...] | None) -> np.ndarray:
    """Integers [T, L, K] of base64 text over raw bytes (int32), of an object of data and shape, or
    of nested lists."""
    if isinstance(part["routed_experts"], dict | list):
        return _array(where, "routed_experts", part["routed_experts"])
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


def read_vllm(files: list[Path], facts: dict[str, Any] | None, left_out: LeftOut) -> Iterator[EngineRequest]:
    """Requests of vLLM in both shapes: HTTP responses, and RequestOutput or CompletionOutput
    written as JSON."""
    return _responses(files, left_out, _vllm_parts, _vllm_request)


def _vllm_parts(where: str, record: dict[str, Any]) -> list[tuple[str, Part]]:
    """The sequences of a response, each with its place."""
    name = next((key for key in ("choices", "outputs") if record.get(key) is not None), None)
    if name is None:
        return [(where, record)]
    parts = enumerate(_dictionaries(where, name, record[name]))
    return [(f"{where}, {name} {index}" if index else where, part) for index, part in parts]


def _vllm_request(where: str, file: Path, record: dict[str, Any], part: Part) -> EngineRequest:
    prompt = part.get("prompt_routed_experts", record.get("prompt_routed_experts"))
    routed = part.get("routed_experts")
    if routed is None and prompt is None:
        if any(isinstance(part.get(key), dict) for key in ("meta_info", *EXTENSIONS)):
            raise UnusableError(f"{where}: this is a response of SGLang: --from sglang reads that", FOREIGN)
        raise UnusableError(f"{where}: no routed_experts; the server needs --enable-return-routed-experts", UNASKED)
    pieces = [_npy_ids(where, value) for value in (prompt, routed) if value is not None]
    if len(pieces) == 2 and pieces[0].shape[1:] != pieces[1].shape[1:]:
        prompt_shape, shape = (list(piece.shape) for piece in pieces)
        raise InputError(f"{where}: prompt_routed_experts has shape {prompt_shape}, routed_experts {shape}")
    if prompt is not None and part.get("prompt_tokens") is None:
        part = {**part, "prompt_rows": len(pieces[0])}
    start = integer(where, {**record, **part}, "routed_experts_prompt_start")
    return _request(where, file, record, part, np.concatenate(pieces), start)


def _npy_ids(where: str, value: Any) -> np.ndarray:
    """Integers [T, L, K] of base64 text over .npy bytes, of an object of data and shape, or of
    nested lists."""
    if isinstance(value, dict | list):
        return _array(where, "routed_experts", value)
    try:
        array = np.load(io.BytesIO(base64_bytes(where, value)), allow_pickle=False)
    except (ValueError, EOFError, OSError, MemoryError, OverflowError) as error:
        raise InputError(f"{where}: routed_experts is not a .npy array: {error}") from None
    return integer_array(where, "routed_experts", array, 3)


def _array(where: str, name: str, value: dict[str, Any] | list[Any]) -> np.ndarray:
    if isinstance(value, dict) and isinstance(value.get("data"), str) and value.get("shape") is None:
        return _npy_ids(where, value["data"])
    return integer_array(where, name, described_array(where, value) if isinstance(value, dict) else value, 3)


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
    if num_output == 0 and num_rows == num_prompt and not start:
        return 0  # nothing was generated, and the prompt's last token was routed like the others
    if start is None:
        start = last - num_rows
    if start < 0 or start + num_rows != last:
        raise UnusableError(
            f"{where}: {num_rows} rows from position {max(start, 0)}, expected {last - max(start, 0)} for "
            f"{num_prompt} prompt and {num_output} generated tokens (the last one has no row)",
            SURPLUS_ROWS if num_rows > last - max(start, 0) else MISSING_ROWS,
        )
    return start
