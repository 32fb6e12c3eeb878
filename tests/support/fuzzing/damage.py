"""Ways to damage a file: wrong values in JSON documents, text that is no JSON, changed bytes.

A Damage is applied to one file, in the directory where the command will run. Wrong values are raw
JSON text, so that NaN, numbers of 5,000 digits and lists 100,000 deep can be written too. Documents
that hold their own hash (`sha256` over the other keys) get a new one: what is asked is whether the
values are checked, not whether a hash is.
"""

import gzip
import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

Place = tuple[str | int, ...]  # keys and indices into a JSON document


class Damage(NamedTuple):
    """What is wrong, in words, and how a file comes to be so."""

    what: str
    apply: Callable[[Path], object]
    may_pass: bool = False  # changed bytes that may leave a valid file: refused or read, but nothing else


MARK = "@DAMAGE@"
FOLDER = "@FOLDER@"  # in a wrong value: a directory beside those that the command may write to
BIG = "1" + "0" * 30
DIGITS = "9" * 5000
DEEP, DEEPER = ("[" * depth + "]" * depth for depth in (600, 100_000))
NO_NUMBER = ("null", "true", '"3"', "[1]", "{}", "NaN", DEEP)
NO_TEXT = ("null", "true", "5", "NaN", "[]", "{}", '["x"]', '"\\ud83d"', DEEP)
WHOLE = (*NO_NUMBER, "false", "-1", "1.5", "Infinity", "-Infinity", "1e999", "9223372036854775808", BIG, DIGITS, DEEPER)
NO_NAME = ('""', '"."', '".."', '"../x"', '"../../victim/x"', f'"{FOLDER}/x"', '"/dev/null"', '"a\\u0000b"', '"a/b"')
WRONG: dict[str, tuple[str, ...]] = {
    "whole": WHOLE,
    "positive": (*WHOLE, "0"),
    "real": (*NO_NUMBER, "-1", "Infinity", "-Infinity", "1e999", DIGITS),
    "text": NO_TEXT,
    "word": (*NO_TEXT, '""', '"nonsense"', '"\\u001b[2J"'),
    "name": (*NO_TEXT, *NO_NAME, '"' + "n" * 5000 + '"'),
    "flag": ("null", '"true"', "2", "1.5", "[]", "{}", "NaN", DEEP),
    "numbers": (
        "null",
        "5",
        "true",
        '"1,2"',
        "{}",
        "[[0]]",
        '["0"]',
        "[null]",
        "[true]",
        "[NaN]",
        "[1.5]",
        "[-1]",
        DEEP,
    )
    + (f"[{BIG}]", f"[{DIGITS}]", '[{"a": 1}]'),
    "list": ("null", "5", "true", '"x"', "{}", "[null]", "[5]", "[[]]", DEEP, DEEPER),
    "nested": ("null", "5", '"x"', "{}", "[]", "[[]]", "[[[]]]", "[null]", '[["x"]]', "[[[1.5]]]", "[[[null]]]", DEEP)
    + (f"[[[{BIG}]]]", "[[[NaN]]]", "[[[true]]]", "[[[-1]]]", "[[[0, 1], [2]]]"),
    "object": ("5", "true", '"x"', "[]", "[1]", "NaN", DEEP),
}


# ---- JSON documents


def kind_of(place: Place, value: Any, kinds: Mapping[str, str]) -> str:
    """What a value is, by its key or else by its type."""
    if isinstance(place[-1], str) and place[-1] in kinds:
        return kinds[place[-1]]
    if isinstance(value, dict):
        return "object"
    if isinstance(value, list):
        nested = any(isinstance(item, list) for item in value)
        return "nested" if nested else "numbers" if value and all(isinstance(v, int) for v in value) else "list"
    return {bool: "flag", int: "whole", float: "real"}.get(type(value), "text")


def places(value: Any, *, closed: Sequence[str] = (), place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every value inside a document; of a list, and of an object whose keys are names or numbers,
    the first entries. What lies within the keys `closed` is left alone."""
    if place:
        yield place, value
    if place and place[-1] in closed:
        return
    if isinstance(value, dict):
        keys = list(value)
        if len(keys) > 1 and all("." in key or key.isdigit() for key in keys):
            keys = keys[:1] + keys[-1:]
        for key in keys:
            yield from places(value[key], closed=closed, place=(*place, key))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        yield from places(value[0], closed=closed, place=(*place, 0))


def named(place: Place) -> str:
    return ".".join(map(str, place))


def short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:20]}... ({len(text)} characters)"


def wrong_values(
    document: Any,
    *,
    kinds: Mapping[str, str],
    optional: Sequence[str] = (),
    nullable: Sequence[str] = (),
    closed: Sequence[str] = (),
) -> list[Damage]:
    """Each value of the document replaced by each wrong one of its kind, and each key left out.

    `optional`: keys that may be missing, `nullable`: keys that may be null, `closed`: keys whose
    values are free.
    """
    found = []
    for place, value in places(document, closed=closed):
        key = place[-1]
        for raw in WRONG[kind_of(place, value, kinds)]:
            if not (raw == "null" and (value is None or key in nullable)):
                found.append(set_to(place, raw))
        if isinstance(key, str) and key not in optional:
            found.append(Damage(f"without {named(place)}", partial(remove, place)))
    return found


def set_to(place: Place, raw: str) -> Damage:
    """The value at a place replaced by raw JSON text."""
    return Damage(f"{named(place)} = {short(raw)}", partial(put, place, raw))


def put(place: Place, raw: str, file: Path) -> None:
    document = json.loads(file.read_bytes())
    is_signed = place != ("sha256",) and signs_itself(document)
    inside(document, place[:-1])[place[-1]] = MARK
    text = json.dumps(document).replace(f'"{MARK}"', raw.replace(FOLDER, str(victims())))
    write(file, (signed(text) if is_signed else text).encode())


def edit(change: Callable[[Any], None], file: Path) -> None:
    """Change the document in place."""
    document = json.loads(file.read_bytes())
    is_signed = signs_itself(document)
    change(document)
    text = json.dumps(document)
    write(file, (signed(text) if is_signed else text).encode())


def remove(place: Place, file: Path) -> None:
    edit(lambda document: inside(document, place[:-1]).pop(place[-1]), file)


def rename(place: Place, name: str, file: Path) -> None:
    """Give a key of an object another name, at its place among the others."""

    def change(document: Any) -> None:
        parent = inside(document, place[:-1])
        new = name.replace(FOLDER, str(victims()))
        entries = [(new if key == place[-1] else key, value) for key, value in parent.items()]
        parent.clear()
        parent.update(entries)

    edit(change, file)


def inside(document: Any, place: Place) -> Any:
    for key in place:
        document = document[key]
    return document


def signs_itself(document: Any) -> bool:
    return isinstance(document, dict) and "sha256" in document and document["sha256"] == own_hash(document)


def own_hash(facts: dict[str, Any]) -> str:
    rest = {key: facts[key] for key in facts if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def signed(text: str) -> str:
    """The document with its own hash made new, where it still can be read."""
    try:
        facts = json.loads(text)
        return text.replace(json.dumps(facts["sha256"]), json.dumps(own_hash(facts)))
    except (ValueError, KeyError, RecursionError):
        return text


def no_document(draw: random.Random, *, duplicates: Sequence[str] = ()) -> list[Damage]:
    """Text that is no JSON object, or is one twice over. `duplicates`: keys to give two values."""

    def text(what: str, change: Callable[[bytes], bytes]) -> Damage:
        return Damage(what, lambda file: write(file, change(file.read_bytes())))

    found = [
        text("empty", lambda b: b""),
        text("blank", lambda b: b" \n\n"),
        text("no JSON", lambda b: b"not json at all"),
        text("a list around it", lambda b: b"[" + b.strip() + b"]"),
        text("a number", lambda b: b"5"),
        text("a text", lambda b: b'"x"'),
        text("null", lambda b: b"null"),
        text("nested deeper than any stack", lambda b: DEEPER.encode()),
        text("open brackets", lambda b: b"[" * 200_000),
        text("nested objects", lambda b: b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
        text("something after it", lambda b: b.strip() + b"}"),
        text("not UTF-8", lambda b: b[: len(b) // 2] + b"\xff" + b[len(b) // 2 :]),
        text("a NUL byte", lambda b: b[:1] + b"\0" + b[1:]),
        text("packed", gzip.compress),
        Damage("a directory", to_directory),
        Damage("absent", lambda file: file.unlink()),
        Damage("a link to nothing", partial(to_link, "nowhere")),
    ]
    cuts = [draw.uniform(0.02, 0.98) for _ in range(6)]
    found += [text(f"cut at {cut:.0%}", partial(cut_at, cut)) for cut in cuts]
    for key in duplicates:
        found += [Damage(f"{key} twice, {where}", partial(twice, key, where)) for where in ("first", "last")]
    return found


def cut_at(share: float, data: bytes) -> bytes:
    return data[: int(len(data.rstrip()) * share)]


def twice(key: str, where: str, file: Path) -> None:
    """A second value for a key, of the right type and another than the one that is there."""
    text = file.read_text(encoding="utf-8").strip()
    value = json.loads(text)[key]
    other = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else type(value)()
    entry = f"{json.dumps(key)}: {json.dumps(other)}"
    text = f"{{{entry}, {text[1:]}" if where == "first" else f"{text[:-1]}, {entry}}}"
    write(file, text.encode())


# ---- bytes


def victims() -> Path:
    """A directory that no command may touch."""
    return Path.cwd().parents[1] / "victim"


def write(file: Path, data: bytes) -> None:
    file.unlink(missing_ok=True)  # which may be a link to the whole one
    file.write_bytes(data)


def to_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def to_link(target: str, file: Path) -> None:
    file.unlink()
    file.symlink_to(target)


def to_outside(file: Path) -> None:
    """The same bytes, behind a link that leaves the directory."""
    outside = victims() / file.name
    file.replace(outside)
    file.symlink_to(outside)


def to_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def no_file() -> list[Damage]:
    """Something else under the name of a file."""
    return [
        Damage("empty", lambda file: write(file, b"")),
        Damage("absent", lambda file: file.unlink()),
        Damage("a directory", to_directory),
        Damage("a link to nothing", partial(to_link, "nowhere")),
        Damage("a link to itself", lambda file: to_link(file.name, file)),
        Damage("a link to /dev/null", partial(to_link, "/dev/null")),
        Damage("a pipe", to_pipe),
        Damage("text", lambda file: write(file, b"this is a line of text\n" * 20)),
    ]


def cuts(draw: random.Random, count: int) -> list[Damage]:
    """The file ends early."""

    def cut(share: float, file: Path) -> None:
        data = file.read_bytes()
        write(file, data[: max(1, int(len(data) * share))])

    shares = [draw.uniform(0.001, 0.995) for _ in range(count)]
    return [Damage(f"cut at {share:.1%}", partial(cut, share)) for share in shares]


def flip(place: float, bit: int, file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[int(len(data) * place)] ^= 1 << bit
    write(file, bytes(data))


def noise(draw: random.Random, count: int, *, end: float = 1.0) -> list[Damage]:
    """One byte changed, before the share `end` of the file; what comes of it may be a valid
    file."""

    def change(place: float, value: int, file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[int(len(data) * place)] = value
        write(file, bytes(data))

    found = []
    for _ in range(count):
        place, value = draw.random() * end, draw.randrange(256)
        found.append(Damage(f"byte at {place:.3%} = {value}", partial(change, place, value), may_pass=True))
    return found


def sampled(damages: list[Damage], count: int, draw: random.Random) -> list[Damage]:
    """`count` of them, in their order."""
    if count >= len(damages):
        return damages
    return [damages[i] for i in sorted(draw.sample(range(len(damages)), count))]
