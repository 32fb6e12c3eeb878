"""Damaged prompts, tokenizers, topologies and bandwidths."""

import gzip
import io
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fuzzing.damage import DEEP, DEEPER, Damage, cuts, no_document, no_file, noise, put, sampled, set_to, write
from fuzzing.inputs import Input, inputs_of

TRACE = "trace m --data {} -o out"
RUN = "run m --plan p --prompts {} --max-new-tokens 2"
TOKENIZED = ("trace m --data few.jsonl -o out",)
NAMED = "report p t --tokenizer m/tokenizer.json"
TOPOLOGY = "place t --ranks 2 --topology {} --method load --effort fast --no-refit --force -o out"
BANDWIDTH = "report {} t --topology-bandwidth {}"


def text_inputs(base: Path, draw: random.Random) -> list[Input]:
    return [*prompt_inputs(draw), *tokenizer_inputs(base, draw), *topology_inputs(draw), *bandwidth_inputs(base, draw)]


# ---- prompts

# Files none of whose records can be read.
LINES = {
    "empty": b"",
    "blank": b"\n\n",
    "no JSON": b"hello\n",
    "a list": b"[1, 2]\n",
    "a number": b"5\n",
    "a text": b'"x"\n',
    "null": b"null\n",
    "an empty object": b"{}\n",
    "no field of text": b'{"a": "x"}\n',
    "cut": b'{"text": "w3 w4\n',
    "a half of a character": b'{"text": "w3 \\ud83d"}\n',
    "not UTF-8": b'{"text": "w3 \xff"}\n',
    "UTF-16": '{"text": "w3"}\n'.encode("utf-16"),
    "deep": f'{{"text": {DEEP}}}\n'.encode(),
    "deeper": f'{{"text": {DEEPER}}}\n'.encode(),
    "a NUL byte": b'{"text": "w3"\x00}\n',
    "two objects on a line": b'{"text": "w3"}{"text": "w4"}\n',
    **{f"text = {raw}": f'{{"text": {raw}}}\n'.encode() for raw in ("5", "[]", "{}", "true", '["w3"]', "1.5", "NaN")},
    **{
        f"messages = {raw}": f'{{"messages": {raw}}}\n'.encode()
        for raw in ("5", '"x"', "{}", "[5]", '["x"]', "[null]", "[[]]")
    },
    **{
        f"messages = [{raw}]": f'{{"messages": [{raw}]}}\n'.encode()
        for raw in ('{"role": 5}', '{"role": "user", "content": 5}', "{}")
    },
}


FINE_AS_DOCUMENT = ("a text", "UTF-16")  # JSON documents may be both


def prompt_inputs(draw: random.Random) -> list[Input]:
    found = []

    def both(file: str, damages: list[Damage]) -> None:
        found.extend(inputs_of("prompts", file, damages, (TRACE.format(file), RUN.format(file)), draw))

    both("few.jsonl", [content(what, data) for what, data in LINES.items()])
    both("few.jsonl", no_file()[1:6])
    both("x.json", [content(what, data) for what, data in LINES.items() if what not in FINE_AS_DOCUMENT])
    both("x.jsonl.gz", packed(draw))
    both("x.csv", [content(what, data) for what, data in CSV.items()])
    both("x.txt", [content(what, data) for what, data in TEXTS.items()])
    both("x.parquet", parquets(draw))
    both("x.bin", [content("another ending", b"w3 w4\n")])
    both(
        "folder",
        [Damage("a directory without files", lambda path: path.mkdir()), Damage("a broken file in it", folder_of)],
    )
    return found


CSV = {
    "empty": b"",
    "a header alone": b"text\n",
    "no field of text": b"a,b\n1,2\n",
    "more values than columns": b"text\nw3,w4\n",
    "not UTF-8": b"text\nw3 \xff\n",
    "an open quote": b'text\n"w3\n',
    "a header not UTF-8": b"\xff\xfetext\nw3\n",
}
TEXTS = {
    "empty": b"",
    "blank": b" \n\t\n",
    "not UTF-8": b"w3 \xff\n",
    "packed": gzip.compress(b"w3 w4\n"),
    "UTF-16": "w3".encode("utf-16"),
}


def content(what: str, data: bytes) -> Damage:
    return Damage(what, lambda file: write(file, data))


def folder_of(path: Path) -> None:
    path.mkdir()
    (path / "a.jsonl").write_bytes(b'{"text": 5\n')


def packed(draw: random.Random) -> list[Damage]:
    whole = gzip.compress(b'{"text": "w3 w4 w5"}\n' * 40, mtime=0)
    found = [content(f"cut after {size} bytes", whole[:size]) for size in (3, 12, 20, len(whole) - 4)]
    found.append(content("a wrong checksum", whole[:-8] + b"\0\0\0\0" + whole[-4:]))
    found.append(content("not packed", b"no gzip at all\n"))
    found.append(content("packed twice", gzip.compress(whole)))
    return found


def parquets(draw: random.Random) -> list[Damage]:
    def table(values: Any, type: pa.DataType | None = None, name: str = "text") -> bytes:
        buffer = io.BytesIO()
        pq.write_table(pa.table({name: pa.array(values, type)}), buffer)
        return buffer.getvalue()

    whole = table(["w3 w4 w5", "w6 w7"] * 30)
    half = pa.array([b"\xff"], pa.binary()).view(pa.string())
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": half}), buffer)
    found = [
        content("numbers", table([1, 2])),
        content("lists", table([["w3"]])),
        content("no row", table([], pa.string())),
        content("another column", table(["w3"], name="a")),
        content("not UTF-8", buffer.getvalue()),
        content("text", b"no parquet"),
        content("empty", b""),
        *(content(f"cut after {size} bytes", whole[:size]) for size in (4, 40, len(whole) // 2, len(whole) - 3)),
    ]
    for _ in range(6):
        place, value = draw.randrange(4, len(whole)), draw.randrange(256)
        damaged = whole[:place] + bytes([value]) + whole[place + 1 :]
        found.append(content(f"byte {place} = {value}", damaged)._replace(may_pass=True))
    return found


# ---- tokenizers


def tokenizer_inputs(base: Path, draw: random.Random) -> list[Input]:
    file = "m/tokenizer.json"
    readers = (NAMED, NAMED, *TOKENIZED)
    damages = [*no_document(draw), *cuts(draw, 6)]
    damages = [damage for damage in damages if damage.what not in ("absent", "a link to nothing")]
    damages += [set_to(place, raw) for place, raws in TOKENIZER.items() for raw in raws]
    found = inputs_of("tokenizer", file, damages, readers, draw)
    found += inputs_of("tokenizer", file, [Damage("absent", Path.unlink)], [NAMED], draw)
    settings = [damage for damage in no_document(draw) if damage.what not in ("absent", "a link to nothing")]
    return found + inputs_of("tokenizer", "m/tokenizer_config.json", sampled(settings, 12, draw), TOKENIZED, draw)


TOKENIZER: dict[tuple[str, ...], tuple[str, ...]] = {
    ("model",): ("5", "[]", '"x"', "{}"),
    ("model", "type"): ("5", '"Nothing"', "[]"),
    ("model", "vocab"): (
        "null",
        "5",
        "[]",
        '"x"',
        '{"a": -1}',
        '{"a": "x"}',
        '{"a": 1.5}',
        '{"a": 99999999999999999999}',
    ),
    ("model", "unk_token"): ("5", "[]", "{}"),
    ("pre_tokenizer",): (
        "5",
        '"x"',
        '{"type": "Nothing"}',
        '{"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": false}',
    ),
    ("added_tokens",): ("5", '"x"', "{}", '[{"id": -1}]'),
    ("version",): ("5", '"9.0"'),
}


# ---- topologies and bandwidths

MATRICES = (
    "null",
    "5",
    '"x"',
    "{}",
    "[]",
    "[[]]",
    "[[0]]",
    "[0, 1]",
    "[[0, 1]]",
    "[[0, 1], [1]]",
    '[["a", 0], [0, 0]]',
    "[[0, -1], [1, 0]]",
)
MATRICES = (
    *MATRICES,
    "[[0, NaN], [1, 0]]",
    "[[0, Infinity], [1, 0]]",
    "[[1, 1], [1, 1]]",
    "[[[0]]]",
    "[[0, null], [1, 0]]",
    "[[0, true], [1, 0]]",
)
MATRICES = (
    *MATRICES,
    "[[0, 1, 2], [1, 0, 2], [1, 2, 0]]",
    "[[0, 1e999], [1, 0]]",
    "[[0, {}], [1, 0]]",
    '[[0, "3"], [3, 0]]',
    DEEP,
    DEEPER,
)
SMI = {
    "a lane of nothing": ("NV18", "NV0"),
    "lanes of a word": ("NV18", "NVx"),
    "an unknown link": ("NV18", "WHAT"),
    "a link to itself": (" X ", "NV18"),
    "X for another": ("NV18", " X "),
    "no second GPU": ("GPU1", "GPU7"),
}


def topology_inputs(draw: random.Random) -> list[Input]:
    matrices = [Damage(f"cost {raw[:40]}", partial(put, ("cost",), raw)) for raw in MATRICES]
    text = no_document(draw)
    found = inputs_of("topology", "costs.json", [*matrices, *text], [TOPOLOGY.format("costs.json")], draw)
    damages = [Damage(what, partial(replaced, *words)) for what, words in SMI.items()]
    damages += [
        changed_lines("a row less", lambda lines: lines[:-1]),
        changed_lines("a row cut", lambda lines: [*lines[:-1], lines[-1][:9]]),
        changed_lines("a header alone", lambda lines: lines[:1]),
        changed_lines("no header", lambda lines: lines[1:]),
        changed_lines("a header of one GPU", lambda lines: ["\tGPU0", *lines[1:]]),
        *no_file(),
        *noise(draw, 10),
        Damage("not UTF-8", lambda file: write(file, b"\xff" + file.read_bytes())),
    ]
    return found + inputs_of("topology", "smi.txt", damages, [TOPOLOGY.format("smi.txt")], draw)


def replaced(old: str, new: str, file: Path) -> None:
    write(file, file.read_text().replace(old, new).encode())


def changed_lines(what: str, change: Callable[[list[str]], list[str]]) -> Damage:
    return Damage(what, lambda file: write(file, "\n".join(change(file.read_text().splitlines())).encode()))


RATES = (
    "null",
    '"100"',
    "true",
    "0",
    "-1",
    "NaN",
    "Infinity",
    "[]",
    "{}",
    "[1, 2]",
    "1e999",
    "[[1]]",
    "1" + "0" * 400,
    '"x"',
    DEEP,
)
DELAYS = ('"5"', "true", "-1", "NaN", "Infinity", "[]", "{}", "[[1]]", DEEP)
NO_RATE = "[[1, 0], [50, 1]]"  # between two ranks; no delay there is fine
PAIRS = (
    "[]",
    "[[1]]",
    "[[1, 50]]",
    "[[1, 50], [50]]",
    '[[1, "x"], [50, 1]]',
    "[[1, -50], [50, 1]]",
    NO_RATE,
    "[[1, NaN], [50, 1]]",
)


def bandwidth_inputs(base: Path, draw: random.Random) -> list[Input]:
    found = []
    for file, plan, inner in (("link.json", "p", ()), ("classes.json", "n", ("inter",))):
        damages = [set_to((*inner, "gb_per_s"), raw) for raw in RATES] + [
            set_to((*inner, "latency_us"), raw) for raw in DELAYS
        ]
        damages += [
            Damage("a key more", partial(put_key, inner)),
            Damage("without a rate", partial(without_rate, inner)),
        ]
        found += inputs_of("bandwidths", file, damages, [BANDWIDTH.format(plan, file)], draw)
    damages = [
        set_to((key,), raw)
        for key in ("gb_per_s", "latency_us")
        for raw in PAIRS
        if (key, raw) != ("latency_us", NO_RATE)
    ]
    damages += [set_to(("gb_per_s",), "[[1, null], [50, 1]]"), set_to(("gb_per_s",), "[[1, true], [50, 1]]")]
    found += inputs_of("bandwidths", "pairs.json", damages, [BANDWIDTH.format("p", "pairs.json")], draw)
    found += inputs_of(
        "bandwidths",
        "classes.json",
        [set_to(("inter",), raw) for raw in ("null", "5", "[]", "{}")],
        [BANDWIDTH.format("n", "classes.json")],
        draw,
    )
    return found + inputs_of("bandwidths", "link.json", no_document(draw), [BANDWIDTH.format("p", "link.json")], draw)


def put_key(inner: tuple[str, ...], file: Path) -> None:
    document = json.loads(file.read_text())
    (document[inner[0]] if inner else document)["other"] = 1
    write(file, json.dumps(document).encode())


def without_rate(inner: tuple[str, ...], file: Path) -> None:
    document = json.loads(file.read_text())
    del (document[inner[0]] if inner else document)["gb_per_s"]
    write(file, json.dumps(document).encode())
