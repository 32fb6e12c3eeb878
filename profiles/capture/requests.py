"""The requests in a source of text: files, standard input, or a data set of the Hugging Face hub.

A source is a stream of records (profiles/capture/sources.py); what of a record is the prompt is
chosen from its first record, and said aloud.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from semmoe.profiles.capture.sources import ReadProgress, Record, open_dataset, open_source
from semmoe.profiles.errors import InputError

TEXT_FIELDS = ("text", "prompt", "question", "instruction", "content", "input")
MESSAGES_FIELDS = ("messages", "conversations", "conversation")
DOMAIN_FIELDS = ("domain", "subject", "category")
ID_FIELDS = ("request_id", "id")
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
}


@dataclass(frozen=True)
class TextRequest:
    """One request as text, or as the messages of a chat."""

    request_id: str
    domain: str
    text: str = ""
    messages: tuple[dict[str, str], ...] | None = None


@dataclass(frozen=True)
class Fields:
    """Which fields of a record make a request."""

    prompt: str
    kind: str  # "text", "messages" or "choices": a question with its choices
    domain: str | None
    request_id: str | None
    domain_asked: bool = False  # then every record must have it

    def __str__(self) -> str:
        prompt = {"text": "text", "messages": "chat messages", "choices": "question and choices"}[self.kind]
        return f"{prompt} from field {self.prompt!r}" + (f", domain from {self.domain!r}" if self.domain else "")


@dataclass(frozen=True)
class RequestSource:
    """Where requests are read from: exactly one of `data` (files, "-" or "demo") and `dataset`
    (of the hub), and which fields."""

    data: str | None = None
    dataset: str | None = None
    subset: str | None = None
    split: str | None = None
    text_field: str | None = None
    messages_field: str | None = None
    domain_field: str | None = None
    max_requests: int | None = None

    def __str__(self) -> str:
        return self.data if self.data is not None else f"data set {self.dataset}"


def open_requests(
    source: RequestSource, progress: ReadProgress | None = None, *, tell: Callable[[str], None] = lambda line: None
) -> Iterator[TextRequest]:
    """The requests of `source` in order, at most `max_requests`. Raises InputError as
    open_source, open_dataset and read_requests do."""
    records = (
        open_source(source.data, progress)
        if source.data is not None
        else open_dataset(source.dataset or "", subset=source.subset, split=source.split)
    )
    requests = read_requests(
        records,
        text_field=source.text_field,
        messages_field=source.messages_field,
        domain_field=source.domain_field,
        tell=tell,
    )
    return islice(requests, source.max_requests)


def read_all(source: RequestSource, *, tell: Callable[[str], None] = lambda line: None) -> list[TextRequest]:
    """All requests of `source`. Raises InputError where there is none."""
    requests = list(open_requests(source, tell=tell))
    if not requests:
        raise InputError(f"{source} holds no prompt: expected lines of text, or records with a field that holds text")
    return requests


def read_requests(
    records: Iterator[Record],
    *,
    text_field: str | None = None,
    messages_field: str | None = None,
    domain_field: str | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Iterator[TextRequest]:
    """The requests of `records` in order, each with an id of its own.

    The id is the record's `request_id` or `id` where it has one, else its place in the source, so
    that a later run finds the same. `tell` gets one line that says which fields are read. Raises
    InputError for a field that is missing or of the wrong type.
    """
    fields: Fields | None = None
    seen: set[str] = set()
    for record in records:
        if isinstance(record.value, str):
            yield TextRequest(record.place, record.domain, record.value)
            continue
        if fields is None:
            fields = choose_fields(
                record, text_field=text_field, messages_field=messages_field, domain_field=domain_field
            )
            tell(f"reading {fields} of {record.source}")
        request_id = str(record.value.get(fields.request_id, record.place)) if fields.request_id else record.place
        if fields.request_id:
            request_id = f"{request_id}@{record.place}" if request_id in seen else request_id
            seen.add(request_id)
        yield _request(record, fields, request_id)


def choose_fields(
    record: Record, *, text_field: str | None, messages_field: str | None, domain_field: str | None
) -> Fields:
    """What of the records like `record` is read: the fields asked for, else the common ones in a
    fixed order."""
    value = record.value
    if text_field and messages_field:
        raise InputError("--text-field and --messages-field exclude each other")
    domain = domain_field or next((f for f in DOMAIN_FIELDS if isinstance(value.get(f), str)), None)
    request_id = next((f for f in ID_FIELDS if isinstance(value.get(f), str | int)), None)
    for field in (text_field, messages_field, domain_field):
        if field and field not in value:
            raise _missing(record, field)
    if found := _prompt_field(value, text_field, messages_field):
        return Fields(*found, domain, request_id, domain_field is not None)
    raise InputError(
        f"{record.place} has no field known to hold text ({', '.join(TEXT_FIELDS)}) or messages ({', '.join(MESSAGES_FIELDS)}); "
        f"it has {_names(value)}: name one with --text-field or --messages-field"
    )


def _prompt_field(value: dict[str, Any], text_field: str | None, messages_field: str | None) -> tuple[str, str] | None:
    """The field that holds the prompt, and its kind."""
    if text_field:
        return text_field, "text"
    if messages_field:
        return messages_field, "messages"
    for field in MESSAGES_FIELDS:
        if isinstance(value.get(field), list):
            return field, "messages"
    if isinstance(value.get("question"), str) and isinstance(value.get("choices"), list | dict):
        return "question", "choices"
    for field in TEXT_FIELDS:
        if isinstance(value.get(field), str):
            return field, "text"
    return ("prompt", "messages") if isinstance(value.get("prompt"), list) else None


def _names(value: dict[str, Any]) -> str:
    return ", ".join(map(str, value)) or "none"


def _missing(record: Record, field: str) -> InputError:
    return InputError(f"{record.place} has no field {field!r}; it has {_names(record.value)}")


def _request(record: Record, fields: Fields, request_id: str) -> TextRequest:
    value = record.value
    for field in (fields.prompt, fields.domain if fields.domain_asked else None):
        if field and value.get(field) is None:
            raise _missing(record, field)
    domain = str(value.get(fields.domain) or "") if fields.domain else record.domain
    prompt = value[fields.prompt]
    if fields.kind == "messages":
        return TextRequest(request_id, domain, messages=_messages(prompt, f"{record.place}, field {fields.prompt!r}"))
    if not isinstance(prompt, str):
        raise InputError(f"{record.place}, field {fields.prompt!r}: {type(prompt).__name__}, expected text")
    if fields.kind == "choices":
        prompt = _question(prompt, value.get("choices"), record)
    return TextRequest(request_id, domain, prompt)


def _question(question: str, choices: Any, record: Record) -> str:
    """A question with its lettered choices, as MMLU is usually put."""
    texts = choices.get("text") if isinstance(choices, dict) else choices
    if not isinstance(texts, list):
        raise _missing(record, "choices")
    return "\n".join([question, *(f"{chr(ord('A') + i)}. {text}" for i, text in enumerate(texts)), "Answer:"])


def _messages(value: Any, where: str) -> tuple[dict[str, str], ...]:
    """Messages with roles of chat templates, from the usual shapes: role and content, or
    ShareGPT's from and value."""
    if not isinstance(value, list) or not value:
        raise InputError(
            f"{where}: {'an empty list' if value == [] else type(value).__name__}, expected a list of messages"
        )
    messages = []
    for message in value:
        message = message if isinstance(message, dict) else {}
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if isinstance(content, list):
            content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
        if not isinstance(role, str) or not isinstance(content, str):
            raise InputError(f"{where}: a message needs role and content (or from and value), got {_names(message)}")
        messages.append({"role": ROLES.get(role, role), "content": content})
    return tuple(messages)


def encode_requests(requests: list[TextRequest], tokenizer: Any, *, answer: bool = False) -> list[np.ndarray]:
    """Token ids of each request, int32. Messages go through the chat template; with `answer` their
    last reply is left to the model.

    Raises InputError where the tokenizer has no chat template, or the template refuses a request.
    """
    plain = [r.text for r in requests if r.messages is None]
    encoded = iter(tokenizer(plain)["input_ids"] if plain else [])
    return [
        np.asarray(next(encoded) if r.messages is None else _encode_chat(r, tokenizer, answer), np.int32)
        for r in requests
    ]


def has_no_text(request: TextRequest, ids: np.ndarray) -> bool:
    """Whether there is nothing to read in a request."""
    return not len(ids) or (request.messages is None and not request.text.strip())


def _encode_chat(request: TextRequest, tokenizer: Any, answer: bool) -> list[int]:
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError(
            f"request {request.request_id} holds chat messages, but the model's tokenizer has no chat template: "
            f"name a field with plain text (--text-field)"
        )
    messages = list(request.messages or ())
    while answer and len(messages) > 1 and messages[-1]["role"] == "assistant":
        messages.pop()
    reply_follows = messages[-1]["role"] != "assistant"
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply_follows)
    except Exception as error:  # templates raise whatever jinja2 does, with the reason in the text
        raise InputError(
            f"request {request.request_id}: the chat template refuses it: {str(error).splitlines()[0]}"
        ) from None
    return tokenizer(text, add_special_tokens=False)["input_ids"]
