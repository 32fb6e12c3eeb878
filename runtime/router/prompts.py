"""What a request asks: its prompt in the shapes of the OpenAI routes and of the engines' own, how
many tokens it counts as, and whether its client chose a rank.

Only reading: what cannot be read gives no prompt, and the request goes on as it is.

Shape letters: T ids of a prompt.
"""

import json
from array import array
from typing import Any, NamedTuple

import numpy as np
import orjson

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
GENERATE, VLLM_GENERATE = "/generate", "/inference/v1/generate"
ROUTES = frozenset((CHAT, COMPLETIONS, RESPONSES, GENERATE, VLLM_GENERATE))
LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens", "max_new_tokens")
HEAD_ROLES = ("system", "developer")
TEMPLATE_KEYS = ("tools", "chat_template", "chat_template_kwargs", "documents", "reasoning_effort")

Message = dict[str, Any]


class Prompt(NamedTuple):
    """A prompt in one of three shapes.

    Fields:
        ids_T: token ids, int64 [T]; None where it is text or messages.
        text: text that no template is applied to.
        messages: of a chat: role and text each; images and the like are left out.
        template: what else the chat template takes, by the request's names.
    """

    ids_T: np.ndarray | None = None
    text: str | None = None
    messages: tuple[Message, ...] = ()
    template: dict[str, Any] | None = None

    @property
    def head(self) -> tuple[Message, ...]:
        """The messages before the first of the conversation: the system prompt."""
        first = next((i for i, m in enumerate(self.messages) if m["role"] not in HEAD_ROLES), len(self.messages))
        return self.messages[:first]


def read_body(data: bytes) -> dict[str, Any] | None:
    """The JSON object of a request; None where it is none, or not in UTF-8."""
    try:
        value = orjson.loads(data)
    except ValueError:
        value = _read_as_engines_do(data)
    return value if isinstance(value, dict) else None


def _read_as_engines_do(data: bytes) -> Any:
    """What Python's own reader takes and RFC 8259 does not: NaN, half a surrogate pair."""
    if not data or json.detect_encoding(data) != "utf-8":
        return None
    try:
        return json.loads(data.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError):
        return None


def read_prompt(path: str, body: dict[str, Any]) -> Prompt | None:
    """The prompt of a request to one of ROUTES; None where it has none that is understood."""
    if path == CHAT:
        return _chat(body.get("messages"), body)
    if path == RESPONSES:
        return _responses(body)
    keys = {COMPLETIONS: ("prompt",), GENERATE: ("input_ids", "text", "prompt"), VLLM_GENERATE: ("token_ids",)}[path]
    value = next((body[key] for key in keys if body.get(key) is not None), None)
    if isinstance(value, list) and value and isinstance(value[0], str) and all(isinstance(p, str) for p in value):
        value = "\n".join(value)  # a batch lives on one rank: what it says as a whole decides
    if isinstance(value, str):
        return Prompt(text=value) if value else None
    ids_T = _ids(value)
    return None if ids_T is None else Prompt(ids_T=ids_T)


def _ids(value: Any) -> np.ndarray | None:
    """Token ids of a list, or of a list of lists one after another, int64 [T]."""
    if not isinstance(value, list) or not value:
        return None
    if isinstance(value[0], list) and all(isinstance(part, list) for part in value):
        value = [number for part in value for number in part]
    return whole_numbers(value)


def whole_numbers(values: list[Any]) -> np.ndarray | None:
    """A list of JSON as int64; None where something else is in it, or nothing."""
    try:
        numbers = array("q", values)  # half the time of numpy, which looks for the type of all of them first
    except (TypeError, OverflowError):
        return None
    return np.frombuffer(numbers, np.int64) if numbers else None


def _chat(value: Any, body: dict[str, Any]) -> Prompt | None:
    if not isinstance(value, list) or not value:
        return None
    messages = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return None
        kept = {
            k: v for k, v in message.items() if k in ("role", "tool_calls", "tool_call_id", "name") and v is not None
        }
        messages.append({**kept, "content": _text(message.get("content"))})
    return Prompt(messages=tuple(messages), template={k: body[k] for k in TEMPLATE_KEYS if body.get(k) is not None})


def _text(content: Any) -> str:
    """The text of a message; its images, audio and files say nothing here."""
    if isinstance(content, list):
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _responses(body: dict[str, Any]) -> Prompt | None:
    """The input of the responses route, as a chat: a text, or items of which the messages count."""
    value = body.get("input")
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list):
        return None
    items = [item for item in value if isinstance(item, dict) and isinstance(item.get("role"), str)]
    if isinstance(body.get("instructions"), str):
        items.insert(0, {"role": "system", "content": body["instructions"]})
    return _chat(items, {k: v for k, v in body.items() if k != "tools"})  # its tools have another shape


def answer_limits(body: dict[str, Any]) -> tuple[int, int]:
    """The longest answer that a request allows, in tokens, 0 where it does not say; and how many
    answers it asks for."""
    sampling = body.get("sampling_params")
    holders = (body, sampling) if isinstance(sampling, dict) else (body,)
    longest = max([_positive(holder[key]) for holder in holders for key in LIMITS if key in holder], default=0)
    return longest, max([1, *[_positive(holder["n"]) for holder in holders if "n" in holder]])


def _positive(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31 else 0
