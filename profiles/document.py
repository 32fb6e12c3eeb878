"""JSON: values whatever text they are in, and documents with a format name and a version: one
reader, one set of refusals, and the two forms that they are written in.

What a document must hold is declared: a `Check` takes a value and its place in the document, and
`record`, `list_of`, `grid` and their like make checks of checks. `validate` says in one line what
the first wrong value is, where it stands and what was expected.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any

from semmoe.profiles.errors import InputError
from semmoe.profiles.files import open_file, shortened, wrong_name

Check = Callable[[Any, str], None]  # value and key -> nothing, or raises Wrong

MAX_JSON_BYTES = 512_000_000  # the placement of 100 layers x 100,000 slots is a tenth of it
MAX_DEPTH = 32  # of what a format leaves open, such as notes

HALVES = re.compile(r"\\ud[89a-f]", re.IGNORECASE)  # escapes of characters in two halves
HALVES_OF_BYTES = re.compile(HALVES.pattern.encode(), re.IGNORECASE)


class Wrong(ValueError):
    """A value of a document that is not as declared: where it stands, and what is wrong."""


def parse_json(text: str | bytes, *, strict: bool = False, unique: bool = False) -> Any:
    """The value of JSON text. Raises ValueError alone, also where it nests too deep or holds
    text that no file can take. `unique`: also where a key stands twice in an object with two
    values. `strict`: for files that say what others mean, also where it stands there twice at all,
    or a number is none (NaN, Infinity)."""
    rules: dict[str, Any] = {"object_pairs_hook": _one_value} if unique else {}
    if strict:
        rules = {"object_pairs_hook": _unique, "parse_constant": _no_number}
    try:
        value = json.loads(text, **rules)
    except RecursionError:
        raise ValueError("it nests too deep") from None
    if (HALVES.search(text) if isinstance(text, str) else HALVES_OF_BYTES.search(text)) is not None:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise ValueError(f"\\u{ord(half):x} is half of a character (a surrogate without the other)") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {shortened(twice)} stands twice in an object")
    return found


def _one_value(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    for key, value in pairs if len(found) < len(pairs) else ():
        if found[key] != value:
            raise ValueError(f"the key {shortened(key)} stands twice in an object, with two values")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def holds_flags(value: Any, depth: int = 0) -> bool:
    """Whether there is true or false among the values of nested lists, which numpy takes for 1
    and 0 between numbers."""
    if not isinstance(value, list):
        return False
    kinds = set(map(type, value))
    return bool in kinds or (list in kinds and depth < 8 and any(holds_flags(item, depth + 1) for item in value))


def read_bounded(path: Path) -> bytes:
    """The bytes of a file that is to be a JSON document. Raises ValueError where it is larger than
    any document, OSError as `open_file` does."""
    with open_file(path) as file:
        check_size(os.fstat(file.fileno()).st_size)
        return file.read()


def check_size(num_bytes: int) -> None:
    """Raise ValueError where a document is larger than any is."""
    if num_bytes > MAX_JSON_BYTES:
        raise ValueError(f"it has {num_bytes:,} bytes, expected at most {MAX_JSON_BYTES:,}")


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
        facts = parse_json(read(), strict=True)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{folder} is not a {kind}: it holds no {name}{_instead(folder)}") from None
    except ValueError as error:  # of the encoding too
        raise InputError(f"{where} is not JSON: {error}") from None
    except OSError as error:
        raise InputError(f"{where} cannot be read: {error.strerror or error}") from None
    if not isinstance(facts, dict) or facts.get("format") != format:
        raise InputError(f"{where} is not a {kind}: its format is not {format!r}")
    if facts.get("version") != version or isinstance(facts["version"], bool):
        raise InputError(f"{where} has version {facts.get('version')}, this semmoe reads version {version}")
    return facts


def digest_of(facts: dict[str, Any]) -> str:
    """SHA-256 of the content of a document but for its digest, as JSON with sorted keys: it does
    not depend on how the file is laid out."""
    content = json.dumps({key: facts[key] for key in facts if key != "digest"}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


# ---- what a document must hold


def validate(value: Any, check: Check, where: str) -> None:
    """Raise InputError, one line with the file `where`, the key and the value, unless the value
    passes."""
    try:
        check(value, "")
    except Wrong as error:
        raise InputError(f"{where}: {error}") from None
    except RecursionError:
        raise InputError(f"{where}: it nests too deep") from None


def _wrong(value: Any, at: str, expected: str) -> Wrong:
    return Wrong(f"{at or 'the document'} is {shortened(value)}, expected {expected}")


def integer(low: int = 0, high: int = 2**63 - 1) -> Check:
    """A whole number of low..high; true is none."""

    def check(value: Any, at: str) -> None:
        if type(value) is not int or not low <= value <= high:
            raise _wrong(
                value, at, f"a whole number from {low} to {high}" if high < 2**53 else f"a whole number from {low}"
            )

    return check


def number(low: float = -1e300, high: float = 1e300) -> Check:
    """A finite number of low..high."""

    def check(value: Any, at: str) -> None:
        if type(value) not in (int, float) or not low <= value <= high:  # NaN is in no range
            raise _wrong(value, at, "a finite number" if low == -1e300 else f"a finite number from {low:g}")

    return check


def text(longest: int = 100_000, pattern: str = "", like: str = "") -> Check:
    """Text of at most so many characters; of a pattern, which messages call `like`."""

    def check(value: Any, at: str) -> None:
        if not isinstance(value, str) or len(value) > longest:
            raise _wrong(value, at, like or f"text of at most {longest} characters")
        if pattern and re.fullmatch(pattern, value) is None:
            raise _wrong(value, at, like)

    return check


SHA256 = text(pattern="[0-9a-f]{64}", like="a SHA-256: 64 hexadecimal digits")


def boolean(value: Any, at: str) -> None:
    """true or false."""
    if not isinstance(value, bool):
        raise _wrong(value, at, "true or false")


def one_of(*values: Any) -> Check:
    """One of some values."""

    def check(value: Any, at: str) -> None:
        if not any(value == known and type(value) is type(known) for known in values):
            raise _wrong(value, at, f"one of {', '.join(map(repr, values))}")

    return check


def name_of_file(*, folders: int = 0, ending: str = "") -> Check:
    """A name that stays in its directory (`wrong_name`)."""

    def check(value: Any, at: str) -> None:
        if wrong := wrong_name(value, folders=folders, ending=ending):
            raise Wrong(f"{at} is {shortened(value)}: {wrong}")

    return check


def null_or(check: Check) -> Check:
    """null, or what passes."""
    return lambda value, at: None if value is None else check(value, at)


def list_of(check: Check, *, most: int = 10_000_000, least: int = 0) -> Check:
    """A list of what passes."""

    def check_list(value: Any, at: str) -> None:
        if not isinstance(value, list) or not least <= len(value) <= most:
            found = f"a list of {len(value)}" if isinstance(value, list) else shortened(value)
            raise Wrong(f"{at} is {found}, expected a list of {least} to {most:,}")
        for index, item in enumerate(value):
            check(item, f"{at}[{index}]")

    return check_list


def distinct(check: Check, key: str = "") -> Check:
    """A list that passes and holds nothing twice; no two objects of the same `key`."""

    def check_distinct(value: Any, at: str) -> None:
        check(value, at)
        seen: set[Any] = set()
        for index, item in enumerate(value):
            found = item[key] if key else item
            if found in seen:
                raise Wrong(f"{at}[{index}] is {shortened(found)}, which stands there twice")
            seen.add(found)

    return check_distinct


def map_of(check: Check, keys: Check | None = None) -> Check:
    """An object whose values pass, and its keys."""

    def check_map(value: Any, at: str) -> None:
        if not isinstance(value, dict):
            raise _wrong(value, at, "an object with named keys")
        for key, item in value.items():
            if keys is not None:
                keys(key, f"a key of {at or 'the document'}")
            check(item, f"{at}.{shortened(key)[1:-1]}" if at else shortened(key)[1:-1])

    return check_map


def record(needed: dict[str, Check], optional: dict[str, Check] | None = None) -> Check:
    """An object with some keys, perhaps with others; keys that are not named may stand there."""

    def check_record(value: Any, at: str) -> None:
        if not isinstance(value, dict):
            raise _wrong(value, at, "an object with named keys")
        if lacking := [key for key in needed if key not in value]:
            raise Wrong(f"{at or 'it'} lacks the key {lacking[0]!r}")
        for key, check in {**needed, **(optional or {})}.items():
            if key in value:
                check(value[key], f"{at}.{key}" if at else key)

    return check_record


def grid(shape: tuple[int | None, ...], low: int, high: int) -> Check:
    """Nested lists of whole numbers low..high with these lengths; None: any length, but one."""

    def check_grid(value: Any, at: str) -> None:
        lengths = list(shape)

        def walk(rows: Any, axis: int, at: str) -> None:
            if not isinstance(rows, list) or not rows or (lengths[axis] or len(rows)) != len(rows):
                found = f"a list of {len(rows)}" if isinstance(rows, list) else shortened(rows)
                raise Wrong(f"{at} is {found}, expected a list of {lengths[axis] or 'at least 1'}")
            lengths[axis] = len(rows)
            if axis + 1 < len(lengths):
                for index, row in enumerate(rows):
                    walk(row, axis + 1, f"{at}[{index}]")
                return
            for index, item in enumerate(rows):
                if type(item) is not int or not low <= item <= high:
                    raise _wrong(item, f"{at}[{index}]", f"a whole number from {low} to {high}")

        walk(value, 0, at)

    return check_grid


def anything(value: Any, at: str) -> None:
    """What a format leaves open: finite, and not nested deep."""
    _open_value(value, at, MAX_DEPTH)


def _open_value(value: Any, at: str, depth: int) -> None:
    if not depth:
        raise Wrong(f"{at} nests deeper than {MAX_DEPTH} levels")
    if isinstance(value, float) and not isfinite(value):
        raise _wrong(value, at, "a finite number")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if isinstance(item, list | dict | float):
            _open_value(item, f"{at}[{shortened(key)}]" if len(at) < 200 else at, depth - 1)


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
