"""Damaged headers of safetensors files: 8 bytes of length, a JSON object, then the data."""

import json
import random
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fuzzing.damage import BIG, DEEP, DEEPER, DIGITS, FOLDER, MARK, Damage, sampled, short, victims, write

# Wrong values of an entry, as raw JSON.
ENTRIES = {
    "dtype": ("null", "5", "[]", '"F31"', '""', '"f32"', '"I8"', '"F64"', DEEP),
    "shape": (
        "null",
        "5",
        '"x"',
        "{}",
        "[-1]",
        "[1.5]",
        '["1"]',
        "[true]",
        "[null]",
        f"[{BIG}]",
        "[4294967296, 4294967296]",
    )
    + ("[1]", "[]", "[0]", "[NaN]", f"[{DIGITS}]", DEEP),
    "data_offsets": ("null", "5", '"x"', "[]", "[0]", "[0, 1, 2]", "[-8, 8]", "[8, 0]", f"[0, {BIG}]", '["0", "8"]')
    + ("[0, 1]", "[0.0, 8.5]", "[null, null]", "[true, false]", "[1000000000, 2000000000]", DEEP),
}
LENGTHS = (0, 1, 2**31, 2**40, 2**63, 2**64 - 1)


def header_damages(file: Path, draw: random.Random, count: int) -> list[Damage]:
    """`count` of the wrong headers of a file with these tensors."""
    names = [name for name in read(file)[0] if name != "__metadata__"]
    found = [Damage(f"a header of {length} bytes", partial(put_length, length)) for length in LENGTHS]
    found += [
        Damage("a header longer by one", partial(put_more, 1)),
        Damage("a header shorter by one", partial(put_more, -1)),
        *(headed(what, lambda text, raw=raw: raw) for what, raw in WHOLE.items()),
    ]
    values = []
    for key, raws in ENTRIES.items():
        for raw in raws:
            name = draw.choice(names)
            values.append(headed(f"{name}.{key} = {short(raw)}", partial(entry_set, name, key, raw)))
    for raw in ("null", "5", "[]", '"x"', "{}", DEEP):
        name = draw.choice(names)
        values.append(headed(f"{name} = {short(raw)}", partial(entry_set, name, None, raw)))
    first, last = names[0], names[-1]
    values += [
        headed("an entry less", lambda text: without(first, text)),
        headed("an entry twice", lambda text: text.rstrip()[:-1] + f", {json.dumps(last)}: {entry(first, text)}}}"),
        headed(
            "two entries of the same bytes", lambda text: text.rstrip()[:-1] + f', "another": {entry(first, text)}}}'
        ),
        *(headed(f"metadata = {short(raw)}", partial(with_metadata, raw)) for raw in METADATA),
    ]
    return [*found, *sampled(values, max(0, count - len(found)), draw)]


WHOLE = {
    "no JSON": "this is no header ",
    "a list": "[1, 2, 3]",
    "a number": "5       ",
    "deep": DEEPER,
    "not closed": '{"a": {"dtype": "F32"',
    "no tensor": "{}",
}
METADATA = ("5", '"x"', "[]", '{"format": 5}', '{"format": null}', '{"format": {"a": 1}}', DEEP)


def read(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data."""
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def headed(what: str, change: Callable[[str], str]) -> Damage:
    """The file under another header, made of the text of the old one."""

    def apply(file: Path) -> None:
        header, data = read(file)
        text = change(json.dumps(header)).encode()
        text += b" " * (-len(text) % 8)
        write(file, struct.pack("<Q", len(text)) + text + data)

    return Damage(what, apply)


def put_length(length: int, file: Path) -> None:
    write(file, struct.pack("<Q", length) + file.read_bytes()[8:])


def put_more(more: int, file: Path) -> None:
    put_length(struct.unpack("<Q", file.read_bytes()[:8])[0] + more, file)


def entry_set(name: str, key: str | None, raw: str, text: str) -> str:
    header = json.loads(text)
    if key is None:
        header[name] = MARK
    else:
        header[name][key] = MARK
    return json.dumps(header).replace(f'"{MARK}"', raw.replace(FOLDER, str(victims())))


def entry(name: str, text: str) -> str:
    return json.dumps(json.loads(text)[name])


def without(name: str, text: str) -> str:
    return json.dumps({key: value for key, value in json.loads(text).items() if key != name})


def with_metadata(raw: str, text: str) -> str:
    return json.dumps({**json.loads(text), "__metadata__": MARK}).replace(f'"{MARK}"', raw)
