"""How a request names its data-parallel rank to an engine, and what its client had named.

vLLM reads a header, on chat, completions and /inference/v1/generate, and from 0.33 on on responses;
SGLang a field of the body on every route, over which on the OpenAI routes a header wins;
TensorRT-LLM two fields of the body. The body is changed by inserting a field behind its first
brace: what the client wrote, its spaces, numbers and letters, arrives as it was.

Which routers in between lose what: docs/engines.md.
"""

import json
from typing import Any, NamedTuple

from semmoe.runtime.router.prompts import GENERATE
from semmoe.runtime.router.refusals import Refused

VLLM_HEADER, SGLANG_HEADER = b"x-data-parallel-rank", b"x-override-routed-dp-rank"
BODY_PINS = {
    "vllm": (),
    "sglang": ("routed_dp_rank", "data_parallel_rank"),
    "trtllm": ("attention_dp_rank",),
}
ENGINES = tuple(BODY_PINS)

HeaderList = list[tuple[bytes, bytes]]


class Pinned(NamedTuple):
    """A request with its pin: what is sent on."""

    headers: HeaderList
    data: bytes


def header_of(engine: str, path: str) -> bytes:
    """The header in which an engine reads a rank on a route; b"" for none."""
    if engine == "vllm":
        return VLLM_HEADER
    return {"sglang": SGLANG_HEADER if path == GENERATE else VLLM_HEADER}.get(engine, b"")


def client_pin(engine: str, path: str, headers: HeaderList, body: dict[str, Any] | None, ranks: int) -> int | None:
    """The rank that the client chose in a way that the engine reads; None for none.

    Raises Refused (400) for a rank that is not there: on SGLang it would stop the server.
    """
    wanted = header_of(engine, path)
    values: list[Any] = [value.decode("latin-1") for name, value in headers if name == wanted]
    values += [body[key] for key in BODY_PINS[engine] if body and body.get(key) is not None]
    for value in values:
        try:
            rank = int(value)
        except (TypeError, ValueError, OverflowError):
            continue  # vLLM ignores it; SGLang refuses it itself
        if not 0 <= rank < ranks:
            raise Refused(400, "malformed", f"data-parallel rank {rank} is not one of 0..{ranks - 1}")
        return rank
    return None


def without_pin(engine: str, path: str, headers: HeaderList, data: bytes, body: dict[str, Any] | None) -> Pinned:
    """The request without what its client had named: where the rank is the URL, the server behind
    it has no rank of that number."""
    if body and any(key in body for key in BODY_PINS[engine]):
        left_out = {*BODY_PINS[engine], "attention_dp_relax"}
        data = _dumped({key: value for key, value in _exact(data).items() if key not in left_out})
    return Pinned(_without(header_of(engine, path), headers), data)


def with_pin(
    engine: str, path: str, headers: HeaderList, data: bytes, body: dict[str, Any] | None, rank: int
) -> Pinned:
    """The request with the number of its rank at the upstream."""
    if engine == "vllm":
        return Pinned([*_without(VLLM_HEADER, headers), (VLLM_HEADER, b"%d" % rank)], data)
    if body is None:
        return Pinned(headers, data)
    fields: dict[str, Any] = {BODY_PINS[engine][0]: rank}
    if engine == "trtllm":
        fields["attention_dp_relax"] = False
    return Pinned(_without(header_of(engine, path), headers), with_fields(data, body, fields))


def _without(dropped: bytes, headers: HeaderList) -> HeaderList:
    return [header for header in headers if header[0] != dropped]


def with_fields(data: bytes, body: dict[str, Any], fields: dict[str, Any]) -> bytes:
    """A JSON object with fields more, in front; where it has one of them already, in its place."""
    if fields.keys() & body.keys():
        return _dumped({**_exact(data), **fields})
    brace = data.index(b"{") + 1
    inserted = json.dumps(fields)[1:-1].encode() + (b"," if body else b"")
    return data[:brace] + inserted + data[brace:]


def _exact(data: bytes) -> dict[str, Any]:
    """The JSON object of a request with its whole numbers as they are, of any length."""
    return json.loads(data.decode("utf-8", "surrogatepass"))


def _dumped(body: dict[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")
