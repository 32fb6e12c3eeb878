"""JSON: values whatever text they are in, and documents with a format name and a version: one
reader, one set of refusals, and the two forms that they are written in."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from semmoe.profiles.errors import InputError

HALVES = re.compile(r"\\ud[89a-f]", re.IGNORECASE)  # escapes of characters in two halves
HALVES_OF_BYTES = re.compile(HALVES.pattern.encode(), re.IGNORECASE)


def parse_json(text: str | bytes) -> Any:
    """The value of JSON text. Raises ValueError alone, also where it nests too deep or holds
    text that no file can take."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it nests too deep") from None
    if (HALVES.search(text) if isinstance(text, str) else HALVES_OF_BYTES.search(text)) is not None:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise ValueError(f"\\u{ord(half):x} is half of a character (a surrogate without the other)") from None
    return value


def read_document(
    read: Callable[[], Any], folder: str, name: str, *, kind: str, format: str, version: int
) -> dict[str, Any]:
    """The object that `read` returns as JSON text or bytes: file `name` of `folder`, which makes
    the folder a `kind`.

    Raises InputError where the file is missing, unreadable, not JSON, of another format or of
    another version.
    """
    where = f"{folder.rstrip('/')}/{name}"
    try:
        facts = parse_json(read())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{folder} is not a {kind}: it holds no {name}{_instead(folder)}") from None
    except ValueError as error:  # of the encoding too
        raise InputError(f"{where} is not JSON: {error}") from None
    except OSError as error:
        raise InputError(f"{where} cannot be read: {error.strerror or error}") from None
    if not isinstance(facts, dict) or facts.get("format") != format:
        raise InputError(f"{where} is not a {kind}: its format is not {format!r}")
    if facts.get("version") != version:
        raise InputError(f"{where} has version {facts.get('version')}, this semmoe reads version {version}")
    return facts


def indented(value: Any) -> str:
    """JSON text with every value on a line of its own."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def line_per_key(facts: dict[str, Any]) -> str:
    """JSON text with one line per key: people find their way, and a placement of 58 x 256 experts
    does not become 15,000 lines."""
    lines = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in facts.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _instead(folder: str) -> str:
    """What is there instead, and what to do with it."""
    if "://" in folder:
        return ""
    if not Path(folder).exists():
        return "; nothing of that name is there"
    if (Path(folder) / "plan.json").is_file():
        return "; it is a plan"
    if (Path(folder) / "trace.json").is_file():
        return "; it is a trace, semmoe place makes a plan of it"
    return ""
