"""Routed experts in answers: asked of the engine, and taken out of what the client gets.

A client that asked for them itself gets them. What an engine can give: docs/engines.md.
"""

import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from semmoe.runtime.router.pins import with_fields
from semmoe.runtime.router.prompts import CHAT, COMPLETIONS, GENERATE, VLLM_GENERATE
from semmoe.runtime.router.scheduler import Asked

EXPERTS = "routed_experts"
MARK = b'"routed_experts"'
EXPERT_KEYS = (EXPERTS, "prompt_routed_experts", "routed_experts_shape", "sglext", "sgl_ext")
ID_KEYS = ("prompt_token_ids", "token_ids")
# What is added to a request so that the answer tells the routing and the ids, by engine and route.
FIELDS: dict[str, dict[str, dict[str, Any]]] = {
    "vllm": {COMPLETIONS: {"return_token_ids": True}, CHAT: {"return_token_ids": True}, VLLM_GENERATE: {}},
    "sglang": {path: {"return_routed_experts": True} for path in (COMPLETIONS, CHAT, GENERATE)},
}
STREAMED = {"vllm": (VLLM_GENERATE,), "sglang": (COMPLETIONS, CHAT, GENERATE)}  # routes whose streams tell it too


@dataclass(frozen=True, eq=False)
class Asking:
    """What is done with an answer.

    Fields:
        engine: whose answer it is.
        dropped: keys that the client did not ask for.
        ids_T: token ids of the prompt as the client sent them; None where it sent none.
        stream: whether it is a stream of events.
    """

    engine: str
    dropped: tuple[str, ...]
    ids_T: np.ndarray | None
    stream: bool


def ask_for_routing(engine: str, asked: Asked) -> Asking | None:
    """Change a request so that its answer tells the routing; None where no answer to it would."""
    body = asked.body
    if not asked.generates or body is None or asked.path not in FIELDS[engine]:
        return None
    stream = body.get("stream") is True
    if stream and asked.path not in STREAMED[engine]:
        return None
    wants_experts = body.get("return_routed_experts") is True or body.get("routed_experts_prompt_start") is not None
    wants_ids = body.get("return_token_ids") is True or asked.path == VLLM_GENERATE
    dropped = (*(() if wants_experts else EXPERT_KEYS), *(() if wants_ids else ID_KEYS))
    fields = {key: value for key, value in FIELDS[engine][asked.path].items() if body.get(key) is not value}
    given = next((body[key] for key in ("prompt", "input_ids", "token_ids") if isinstance(body.get(key), list)), None)
    ids_T = asked.ids_T if given and all(isinstance(number, int) for number in given) else None
    if fields:
        asked.data = with_fields(asked.data, body, fields)
        asked.body = {**body, **fields}
    return Asking(engine, dropped if engine == "vllm" else tuple(k for k in dropped if k in EXPERT_KEYS), ids_T, stream)


class Split(NamedTuple):
    """An answer in two: what the client gets, and what is recorded; None: the client's own bytes,
    and nothing to record."""

    data: bytes | None
    record: dict[str, Any] | None


def split_answer(data: bytes, asking: Asking) -> Split:
    """A JSON answer without what the client did not ask for, and with it."""
    try:
        whole = json.loads(data)
    except (ValueError, RecursionError):
        return Split(None, None)
    if not isinstance(whole, dict):
        return Split(None, None)
    kept = without(whole, asking)
    return Split(None if kept == whole else dumped(kept), whole if MARK in data else None)


def without(whole: Any, asking: Asking) -> Any:
    """The answer as it would be without our asking. vLLM spells what is not asked for as null."""
    if not isinstance(whole, dict):
        return whole
    kept: dict[str, Any] = {}
    for key, value in whole.items():
        if key in asking.dropped:
            if asking.engine == "vllm":
                kept[key] = None
        elif key in ("choices", "meta_info"):
            kept[key] = [without(part, asking) for part in value] if isinstance(value, list) else without(value, asking)
        else:
            kept[key] = value
    return kept


def dumped(value: Any) -> bytes:
    """JSON as the engines write it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


@dataclass(eq=False)
class Events:
    """A stream of server-sent events, passed on but for those that tell the routing.

    Fields:
        asking: what the client did not ask for.
        record: what was told.
    """

    asking: Asking
    record: dict[str, Any] | None = None
    rest: bytes = field(default=b"", init=False)

    def feed(self, piece: bytes) -> bytes:
        """What of the events so far goes to the client: whole ones."""
        *events, self.rest = (self.rest + piece).split(b"\n\n")
        if not events:
            return b""
        return b"".join(self._event(event + b"\n\n") for event in events)

    def end(self) -> bytes:
        """What is left at the end of the stream."""
        rest, self.rest = self.rest, b""
        return rest

    def _event(self, event: bytes) -> bytes:
        if MARK not in event or not event.startswith(b"data:"):
            return event
        try:
            whole = json.loads(event[len(b"data:") :])
        except (ValueError, RecursionError):
            return event
        if not isinstance(whole, dict) or _nothing_told(whole):
            return event
        self.record = (
            {**whole, "choices": whole["choices"] or [{}]} if isinstance(whole.get("choices"), list) else whole
        )
        kept = without(whole, self.asking)
        if kept == whole:
            return event
        # SGLang adds an event for the routing alone: a client that did not ask sees none.
        alone = isinstance(kept.get("choices"), list) and not kept["choices"] and not kept.get("usage")
        return b"" if alone else b"data: " + dumped(kept) + b"\n\n"


def _nothing_told(whole: dict[str, Any]) -> bool:
    """Whether the routing is null everywhere in an event."""
    choices = whole.get("choices")
    holders = [whole, whole.get("meta_info"), *(choices if isinstance(choices, list) else ())]
    holders += [h.get(key) for h in holders if isinstance(h, dict) for key in ("sglext", "sgl_ext")]
    return not any(isinstance(h, dict) and h.get(EXPERTS) is not None for h in holders)
