"""Damaged reshards: semmoe.json of both layouts, semmoe-source.json, and what they speak of."""

import hashlib
import json
import random
from functools import partial
from pathlib import Path
from typing import Any

from fuzzing.damage import (
    FOLDER,
    Damage,
    cuts,
    flip,
    no_document,
    no_file,
    remove,
    rename,
    sampled,
    set_to,
    signed,
    to_outside,
    victims,
    write,
    wrong_values,
)
from fuzzing.headers import header_damages
from fuzzing.inputs import Input, inputs_of

PERMUTED = ("reshard --undo placed -o out",) * 6 + ("reshard --undo placed -o out --verify none",) * 3
RUN_PERMUTED = "run placed --plan p --prompts few.jsonl --max-new-tokens 2"
RANKS = ("reshard --undo split -o out",) * 6 + ("reshard --undo split -o out --verify none",) * 3
RUN_RANKS = "run split --plan p --prompts few.jsonl --max-new-tokens 2"
UNDO_READERS = (PERMUTED[0], RANKS[0])

KINDS = {
    "format": "word",
    "layout": "word",
    "num_experts": "positive",
    "sha256": "word",
    "header_sha256": "word",
    "source_header_sha256": "word",
    "headers_sha256": "word",
    "ranks": "positive",
    "nodes": "positive",
}
FREE = ("made_by", "sha256", "headers_sha256", "checksums")  # a reshard that was not verified has no checksums
FREE_SOURCE = ("metadata", "header_sha256")
NAMES = ("../x.safetensors", "../../victim/x.safetensors", f"{FOLDER}/x.safetensors", "x", "", ".", "..", "semmoe.json")
NAMES = (
    *NAMES,
    "a/../../x.safetensors",
    "a\\b.safetensors",
    "x\n.safetensors",
    "\x00.safetensors",
    ".safetensors",
    "config.json",
)
ORDERS = (
    "[]",
    "[0]",
    "[0, 1, 2, 3, 4, 5, 6, 6]",
    "[0, 1, 2, 3, 4, 5, 6, 8]",
    "[0, 1, 2, 3, 4, 5, 6, -1]",
    "null",
    "5",
    '"x"',
)
ORDERS = (
    *ORDERS,
    "[0, 1, 2, 3, 4, 5, 6, 7, 8]",
    "[0, 1, 2, 3, 4, 5, 6]",
    "[0.5, 1, 2, 3, 4, 5, 6, 7]",
    "{}",
    "[[0, 1, 2, 3]]",
)
ORDERS = (
    *ORDERS,
    '["0", "1", "2", "3", "4", "5", "6", "7"]',
    "[null, 1, 2, 3, 4, 5, 6, 7]",
    "[4294967296, 1, 2, 3, 4, 5, 6, 7]",
)
SUMS = (
    "null",
    "5",
    '"x"',
    "{}",
    "[[]]",
    "[[0]]",
    "[[0, 1]]",
    "[[0, 1, 2, 3]]",
    "[5]",
    '[["0", "1", "2"]]',
    "[[-8, 8, 1]]",
)
SUMS = (
    *SUMS,
    "[[0, -1, 1]]",
    "[[0, 1000000000000, 1]]",
    "[[1000000000000, 8, 1]]",
    "[[0.5, 8, 1]]",
    "[[0, 8, null]]",
    "[[0, 8, -1]]",
)
LAYERS = (
    "[]",
    "[0, 1]",
    "[0, 0, 1]",
    "[0, 1, 9]",
    "[-1, 1, 2]",
    '["0", "1", "2"]',
    "[0.5, 1, 2]",
    "null",
    "[0, 1, 1000000000]",
)
PLACEMENTS = (
    "[]",
    "[[[0, 1, 2, 3], [4, 5, 6, 7]]]",
    "null",
    '"x"',
    "[[[0]]]",
    "[[[0, 1, 2, 3], [4, 5, 6, 8]]]",
    "[[[0.5]]]",
    "[[[]]]",
)
HEADER_BYTES = ("0", "1", "-1", "1000000000000", "9223372036854775807", "7", "1.5", '"8"', "true")


def reshard_inputs(base: Path, draw: random.Random) -> list[Input]:
    return [*permuted_inputs(base, draw), *ranks_inputs(base, draw), *source_inputs(base, draw)]


def permuted_inputs(base: Path, draw: random.Random) -> list[Input]:
    file = "placed/semmoe.json"
    facts = json.loads((base / file).read_text())
    shard = next(iter(facts["files"]))
    values = sampled(wrong_values(facts, kinds=KINDS, optional=FREE, closed=("plan",)), 90, draw)
    values = [damage for damage in values if not damage.what.endswith("checksums = []")]
    values += [set_to(("new2old", "1"), raw) for raw in ORDERS]
    values += [set_to(("files", shard, "checksums"), raw) for raw in SUMS]
    values += [set_to(("files", shard, "source_header_bytes"), raw) for raw in HEADER_BYTES]
    values += [set_to(("num_experts",), raw) for raw in ("1", "4", "16", "1000000000")]
    values += [
        Damage(f"layer {key!r}", partial(rename, ("new2old", "1"), key)) for key in ("x", "-1", "9", "", "1.5", "0")
    ]
    values += [Damage(f"a file named {name!r}", partial(rename, ("files", shard), name)) for name in NAMES]
    values += [Damage("without layer 1", partial(remove, ("new2old", "1")))]
    text = no_document(draw, duplicates=("num_experts", "new2old"))
    found = inputs_of("semmoe.json permuted", file, [*values, *text], PERMUTED, draw)
    plan = wrong_values(
        {"plan": facts["plan"]}, kinds=KINDS, optional=("model", "method", "seed", "nodes", "made_by", "ranks")
    )
    found += inputs_of("semmoe.json permuted", file, sampled(plan, 12, draw), (RUN_PERMUTED, *PERMUTED[:2]), draw)
    weights = [*no_file(), *cuts(draw, 6), *header_damages(base / "placed" / shard, draw, 16), *flips(draw, 12)]
    weights.append(Damage("the same bytes outside", to_outside))
    return found + inputs_of("reshard weights", f"placed/{shard}", weights, (*PERMUTED[:6], RUN_PERMUTED), draw)


def ranks_inputs(base: Path, draw: random.Random) -> list[Input]:
    file = "split/semmoe.json"
    facts = json.loads((base / file).read_text())
    shard = "rank-001/model-00002-of-00005.safetensors"
    values = sampled(wrong_values(facts, kinds=KINDS, optional=FREE, closed=("plan",)), 80, draw)
    values = [damage for damage in values if not damage.what.endswith("checksums = []")]
    values += [set_to(("model_layers",), raw) for raw in LAYERS]
    values += [set_to(("placement",), raw) for raw in PLACEMENTS]
    values += [set_to(("files", shard, "checksums"), raw) for raw in SUMS]
    values += [set_to(("num_experts",), raw) for raw in ("1", "4", "16", "1000000000")]
    values += [Damage(f"a file named {name!r}", partial(rename, ("files", shard), name)) for name in NAMES]
    values += [Damage("a file less", partial(remove, ("files", shard)))]
    text = no_document(draw, duplicates=("num_experts", "placement"))
    found = inputs_of("semmoe.json ranks", file, [*values, *text], RANKS, draw)
    weights = [*no_file(), *cuts(draw, 6), *header_damages(base / "split" / shard, draw, 16), *flips(draw, 12)]
    weights.append(Damage("the same bytes outside", to_outside))
    found += inputs_of("reshard weights", f"split/{shard}", weights, (*RANKS[:6], RUN_RANKS), draw)
    whole = [Damage("absent", remove_tree), Damage("an empty directory", empty_tree), Damage("a file", tree_to_file)]
    for directory in ("split/shared", "split/rank-000"):
        found += inputs_of("reshard weights", directory, whole, RANKS, draw)
    return found


def flips(draw: random.Random, count: int) -> list[Damage]:
    """Single bits of the data, which no header and no size tells."""
    found = []
    for _ in range(count):
        place, bit = draw.uniform(0.3, 1.0), draw.randrange(8)
        found.append(Damage(f"bit {bit} at {place:.3%}", partial(flip, place, bit)))
    return found


def remove_tree(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


def empty_tree(path: Path) -> None:
    remove_tree(path)
    path.mkdir()


def tree_to_file(path: Path) -> None:
    remove_tree(path)
    path.write_text("x")


# ---- semmoe-source.json, whose hash semmoe.json holds: made anew, as somebody would who means harm


def source_inputs(base: Path, draw: random.Random) -> list[Input]:
    file = "split/semmoe-source.json"
    facts = json.loads((base / file).read_text())
    shard = next(iter(facts["files"]))
    values = sampled(
        wrong_values(facts, kinds=KINDS, nullable=("index",), optional=FREE_SOURCE, closed=("metadata",)), 70, draw
    )
    values += [set_to(("files", shard, "header_bytes"), raw) for raw in HEADER_BYTES]
    values += [
        set_to(("index",), raw)
        for raw in ('"not JSON"', '"{}"', '"[]"', '"{\\"weight_map\\": {\\"a\\": \\"../x.safetensors\\"}}"')
    ]
    values += [set_to(("files", shard, "metadata"), raw) for raw in ("5", "[]", '{"format": 5}', '{"a": {"b": 1}}')]
    values += [Damage(f"a file named {name!r}", partial(rename, ("files", shard), name)) for name in NAMES]
    values += [Damage(f"a tensor {what}", partial(put_tensor, shard, what)) for what in TENSORS]
    values += [Damage("a tensor less", partial(remove, ("files", shard, "tensors", 0)))]
    values += [Damage("a file less", partial(remove, ("files", shard)))]
    crafted = [damage._replace(apply=partial(hash_source, damage)) for damage in [*values, *no_document(draw)]]
    found = inputs_of("semmoe-source.json", file, crafted, RANKS, draw)
    found += inputs_of("semmoe-source.json", file, sampled(values, 8, draw), RANKS, draw)
    names = [Damage(f"all that names {name!r}", partial(name_consistently, name)) for name in PATHS]
    return found + inputs_of("semmoe-source.json", "split", names, RANKS, draw)


# Names that would be written outside of OUT, or over its other files.
PATHS = (
    "../x.safetensors",
    "../../x.safetensors",
    "../../../victim/x.safetensors",
    f"{FOLDER}/x.safetensors",
    "a/../../x.safetensors",
    "a/b.safetensors",
    "./x.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "semmoe.json",
)


def name_consistently(name: str, folder: Path) -> None:
    """One file under another name: where it lies, in semmoe.json and in semmoe-source.json."""
    name = name.replace(FOLDER, str(victims()))
    shared = "model-00005-of-00005.safetensors"  # no rank has a part of it
    (folder / "shared" / "model.safetensors.index.json").unlink()
    (folder / "shared" / "a").mkdir()
    inner = Path(f"{folder}/shared/{name}")  # of an absolute name too
    inner.parent.mkdir(parents=True, exist_ok=True)
    (folder / "shared" / shared).replace(inner)
    source = folder / "semmoe-source.json"
    headers = json.loads(source.read_text())
    headers["files"] = {name if key == shared else key: value for key, value in headers["files"].items()}
    headers["index"] = headers["index"].replace(shared, name)
    write(source, json.dumps(headers).encode())
    sidecar = folder / "semmoe.json"
    facts = json.loads(sidecar.read_text())
    facts["files"] = {key.replace(shared, name): value for key, value in facts["files"].items()}
    facts["headers_sha256"] = hashlib.sha256(source.read_bytes()).hexdigest()
    write(sidecar, signed(json.dumps(facts)).encode())


def hash_source(damage: Damage, file: Path) -> None:
    damage.apply(file)
    if file.is_file():
        sidecar = file.with_name("semmoe.json")
        facts = json.loads(sidecar.read_text())
        facts["headers_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
        write(sidecar, signed(json.dumps(facts)).encode())


# What becomes of [name, dtype, shape, begin, end] of the first tensor.
TENSORS: dict[str, Any] = {
    "without a name": lambda t: [None, *t[1:]],
    "with a number for a name": lambda t: [5, *t[1:]],
    "that is nowhere": lambda t: ["model.nothing.weight", *t[1:]],
    "of no type": lambda t: [t[0], None, *t[2:]],
    "of another type": lambda t: [t[0], "F64", *t[2:]],
    "without a shape": lambda t: [*t[:2], None, *t[3:]],
    "of a negative shape": lambda t: [*t[:2], [-1], *t[3:]],
    "of a huge shape": lambda t: [*t[:2], [2**40, 2**40], *t[3:]],
    "of another shape": lambda t: [*t[:2], [3, 5], *t[3:]],
    "that begins later": lambda t: [*t[:3], t[3] + 8, t[4]],
    "that begins before the file": lambda t: [*t[:3], -8, t[4]],
    "that ends later": lambda t: [*t[:4], t[4] + 8],
    "that ends at 10 ** 12": lambda t: [*t[:4], 10**12],
    "with texts for places": lambda t: [*t[:3], "0", "8"],
    "with fractions for places": lambda t: [*t[:3], 0.5, 8.5],
    "of four values": lambda t: t[:4],
    "of six values": lambda t: [*t, 1],
    "that is a number": lambda t: 5,
    "that is an object": lambda t: {"name": t[0]},
}


def put_tensor(shard: str, what: str, file: Path) -> None:
    facts = json.loads(file.read_text())
    tensors = facts["files"][shard]["tensors"]
    tensors[0] = TENSORS[what](tensors[0])
    write(file, json.dumps(facts).encode())
