"""Damaged traces: trace.json, parts of tokens and of counts, and parts with one bit flipped."""

import hashlib
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fuzzing.damage import (
    Damage,
    cuts,
    flip,
    no_document,
    no_file,
    noise,
    sampled,
    set_to,
    to_outside,
    write,
    wrong_values,
)
from fuzzing.inputs import FLIPPED, Input, inputs_of

SHOW = "show t"
PLACE = "place t --ranks 2 --method contiguous --effort fast --no-refit --force -o out"
PLACE_WITH_TABLES = "place t --ranks 2 --method metis --effort fast --force -o out"
REPORT, PAGE, HEALTH = "report p t", "report p t -o out.html", "report t"
COMPARE = "compare p q t"
REPLAY = "run --replay t --plan one --hidden-size 8 --max-tokens 64"
IMPORT = "place t --ranks 2 --import sglang sglang.json --force -o out"
RESUME = "trace m --data few.jsonl -o t --resume"
PART_READERS = (SHOW, PLACE, REPORT, HEALTH, COMPARE, REPLAY)
OFTEN = (SHOW, PLACE, REPORT, COMPARE) * 4
READERS = (*OFTEN, *(PLACE_WITH_TABLES, HEALTH, IMPORT) * 2, PAGE, REPLAY)
SHOW_COUNTS = "show tc"

FACTS = "t/trace.json"
KINDS = {
    "format": "word",
    "kind": "word",
    "file": "name",
    "num_layers": "positive",
    "num_experts": "positive",
    "top_k": "positive",
    "n_group": "positive",
    "topk_group": "positive",
    "sha256": "word",
}
# What a reader may take from its defaults.
OPTIONAL = ("model_type", "num_model_layers", "vocab_size", "n_group", "topk_group", "empty_slots", "kind", "embedding")
OPTIONAL = (*OPTIONAL, "made_by", "notes", "revision", "checkpoint", "numbering", "router_sha256", "index_sha256")
OPTIONAL = (*OPTIONAL, "num_hidden_layers", "hidden_size", "moe_intermediate_size")  # of checkpoint.config
NULLABLE = ("embedding", "revision", "checkpoint", "numbering", "router_sha256", "index_sha256")
# Values of the right type that the rest of the file or the parts belie.
BELIED = {
    ("version",): ("0", "2", "1000000"),
    ("complete",): ("false",),
    ("kind",): ('"counts"',),
    ("num_layers",): ("1", "2", "4", "1000000", "4294967296"),
    ("num_experts",): ("1", "2", "65536", "1000000000"),
    ("top_k",): ("1", "3", "9", "1000000000"),
    ("model_layers",): ("[]", "[0, 1]", "[0, 1, 2, 3]", "[0, 0, 1]", "[0, 1, 3]", "[0, 1, 1000000000]"),
    ("num_model_layers",): ("1", "2"),
    ("n_group",): ("3", "16"),
    ("embedding", "shape"): ("[]", "[112]", "[0, 32]", "[112, 32, 1]"),
    ("counts", "requests"): ("0", "39", "41", "4000000000"),
    ("counts", "tokens"): ("0", "1", "4000000000"),
    ("parts",): ("[]", "[{}]"),
    ("parts", 0, "file"): ('"part-00001.parquet"', '"part-00007.parquet"', '"trace.json"', '"x\\ny"'),
    ("parts", 0, "requests"): ("0", "23", "4000000000"),
    ("parts", 0, "tokens"): ("0", "1", "4000000000"),
    ("parts", 0, "sha256"): (f'"{"0" * 64}"', f'"{"0" * 63}"', '"sha256"'),
}

# What only a command that opens the embedding can see.
EMBEDDING = {
    ("embedding", "shape"): ("[32, 112]", "[112, 33]", "[1000000000, 1000000000]"),
    ("embedding", "key"): ('"lm_head.weight.x"', '""', '"model.norm.weight"'),
}


def trace_inputs(base: Path, draw: random.Random) -> list[Input]:
    facts = json.loads((base / FACTS).read_text())
    values = wrong_values(facts, kinds=KINDS, optional=OPTIONAL, nullable=NULLABLE, closed=("notes",))
    belied = [set_to(place, raw) for place, raws in BELIED.items() for raw in raws]
    belied.append(Damage("one part twice", twice_the_part))
    text = no_document(draw, duplicates=("num_experts", "counts", "model_layers", "complete"))
    found = inputs_of("trace.json", FACTS, [*sampled(values, 300, draw), *belied], (*READERS, RESUME), draw)
    found += inputs_of("trace.json", FACTS, text, READERS, draw)
    opened = [set_to(place, raw) for place, raws in EMBEDDING.items() for raw in raws]
    found += inputs_of("trace.json", FACTS, opened, [PLACE_WITH_TABLES], draw)
    found += inputs_of("trace part", "t/part-00001.parquet", part_damages(draw), READERS, draw)
    found += inputs_of("counts part", "tc/counts.parquet", counts_damages(draw), [SHOW_COUNTS], draw)
    return found


def flipped_inputs(base: Path, draw: random.Random, count: int) -> list[Input]:
    """One bit of a part flipped, `count` times, each for every command that reads parts."""
    found = []
    for number in range(count):
        file = f"t/part-0000{number % 2}.parquet"
        place, bit = draw.random(), draw.randrange(8)
        damage = Damage(f"bit {bit} at {place:.4%}", partial(flip, place, bit))
        found += [Input(FLIPPED, file, damage, words) for words in PART_READERS]
    return found


def twice_the_part(file: Path) -> None:
    facts = json.loads(file.read_text())
    facts["parts"].append(facts["parts"][0])
    for name in ("requests", "tokens"):
        facts["counts"][name] += facts["parts"][0][name]
    write(file, json.dumps(facts).encode())


# ---- parts, whose hash in trace.json is made anew: a writer that errs hashes what it wrote


def hash_again(file: Path) -> None:
    facts = json.loads((file.parent / "trace.json").read_text())
    for part in facts["parts"]:
        if part["file"] == file.name and file.is_file():
            part["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    write(file.parent / "trace.json", json.dumps(facts).encode())


def hashed(damage: Damage) -> Damage:
    def apply(file: Path) -> None:
        damage.apply(file)
        hash_again(file)

    return damage._replace(apply=apply)


def rewritten(what: str, change: Callable[[pa.Table], pa.Table]) -> Damage:
    def apply(file: Path) -> None:
        table = change(pq.read_table(file))
        file.unlink()
        pq.write_table(table, file, compression="zstd")

    return hashed(Damage(what, apply))


def with_column(name: str, what: str, values: Callable[[list[Any]], list[Any]], type: pa.DataType | None) -> Damage:
    """The part with another column of that name; `values` makes it from the old one's."""

    def change(table: pa.Table) -> pa.Table:
        return with_array(table, name, pa.array(values(table.column(name).to_pylist()), type))

    return rewritten(f"{name} {what}", change)


def with_array(table: pa.Table, name: str, array: pa.Array) -> pa.Table:
    """The table with another column, which may hold nulls only where it does."""
    index = table.schema.get_field_index(name)
    nullable = table.schema.field(index).nullable or array.null_count > 0
    return table.set_column(index, pa.field(name, array.type, nullable=nullable), array)


def instead(value: Any) -> Callable[[list[Any]], list[Any]]:
    """The first value replaced, the others kept."""
    return lambda column: [value, *column[1:]]


def part_damages(draw: random.Random) -> list[Damage]:
    found = [*text_columns(), *number_columns(), *id_columns(), *token_columns()]
    for name in (
        "request_id",
        "domain",
        "token_ids",
        "num_prompt_tokens",
        "first_position",
        "num_tokens",
        "expert_ids",
    ):
        found.append(rewritten(f"without {name}", lambda table, name=name: table.drop_columns([name])))
        found.append(with_column(name, "all null", lambda column: [None] * len(column), pa.null()))
        found.append(with_column(name, "as records", lambda column: [{"a": 1}] * len(column), None))
        found.append(rewritten(f"{name} twice", lambda table, name=name: table.append_column(name, table.column(name))))
    found += [
        rewritten("no row", lambda table: table.slice(0, 0)),
        rewritten("a row less", lambda table: table.slice(1)),
        rewritten("a row twice", lambda table: pa.concat_tables([table, table.slice(0, 1)])),
        rewritten("another table", lambda table: pa.table({"a": [1, 2, 3]})),
        Damage("the other part's bytes", lambda file: write(file, (file.parent / "part-00000.parquet").read_bytes())),
        Damage("the same bytes outside", to_outside),
        hashed(Damage("the other part's rows", lambda file: write(file, other_part(file)))),
    ]
    found += [hashed(damage) for damage in [*no_file(), *cuts(draw, 14), *noise(draw, 20)]]
    return found + [hashed(noise_at_end) for noise_at_end in footer_noise(draw, 20)]


def other_part(file: Path) -> bytes:
    return (file.parent / "part-00000.parquet").read_bytes()


def footer_noise(draw: random.Random, count: int) -> list[Damage]:
    """A byte of the last kilobyte changed: schema, row groups, offsets."""

    def change(place: int, value: int, file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[-place] = value
        write(file, bytes(data))

    found = []
    for _ in range(count):
        place, value = draw.randrange(1, 1000), draw.randrange(256)
        found.append(Damage(f"byte {place} from the end = {value}", partial(change, place, value), may_pass=True))
    return found


def text_columns() -> list[Damage]:
    found = []
    for name in ("request_id", "domain"):
        found += [
            with_column(name, "as numbers", lambda column: list(range(len(column))), pa.int64()),
            with_column(name, "as lists", lambda column: [[v] for v in column], None),
            with_column(name, "with a null", instead(None), pa.string()),
            rewritten(f"{name} not UTF-8", partial(not_utf8, name)),
        ]
    found.append(with_column("request_id", "twice", lambda column: [column[1], *column[1:]], pa.string()))
    return found


def not_utf8(name: str, table: pa.Table) -> pa.Table:
    return with_array(table, name, pa.array([b"\xff\xfe"] * len(table), pa.binary()).view(pa.string()))


def number_columns() -> list[Damage]:
    found = []
    for name in ("num_prompt_tokens", "first_position", "num_tokens"):
        found += [
            with_column(name, "as text", lambda column: [str(v) for v in column], pa.string()),
            with_column(name, "as floats", lambda column: [v + 0.5 for v in column], pa.float64()),
            with_column(name, "as flags", lambda column: [True for _ in column], pa.bool_()),
            with_column(name, "as lists", lambda column: [[v] for v in column], None),
            with_column(name, "with a null", instead(None), pa.int32()),
            with_column(name, "negative", instead(-1), pa.int32()),
            with_column(name, "far below zero", instead(-(2**31)), pa.int32()),
            with_column(name, "of 2 ** 31 - 1", instead(2**31 - 1), pa.int32()),
            with_column(name, "of 2 ** 62", instead(2**62), pa.int64()),
        ]
    return found + [with_column("num_tokens", "one more", lambda column: [column[0] + 1, *column[1:]], pa.int32())]


def id_columns() -> list[Damage]:
    name = "expert_ids"

    def first(change: Callable[[list[int]], Any]) -> Callable[[list[Any]], list[Any]]:
        return lambda column: [change(column[0]), *column[1:]]

    return [
        with_column(name, "as text", lambda column: ["x"] * len(column), pa.string()),
        with_column(name, "as numbers", lambda column: [1] * len(column), pa.uint8()),
        with_column(name, "of floats", lambda column: column, pa.list_(pa.float32())),
        with_column(name, "of texts", lambda column: [["x"] * len(v) for v in column], pa.list_(pa.string())),
        with_column(name, "of flags", lambda column: [[True] * len(v) for v in column], pa.list_(pa.bool_())),
        with_column(name, "of lists", lambda column: [[[e] for e in v] for v in column], None),
        with_column(name, "negative", first(lambda ids: [-1, *ids[1:]]), pa.list_(pa.int16())),
        with_column(name, "one too large", first(lambda ids: [8, *ids[1:]]), pa.list_(pa.uint8())),
        with_column(name, "of 255", first(lambda ids: [255, *ids[1:]]), pa.list_(pa.uint8())),
        with_column(name, "of 60000", first(lambda ids: [60_000, *ids[1:]]), pa.list_(pa.uint16())),
        with_column(name, "of 2 ** 62", first(lambda ids: [2**62, *ids[1:]]), pa.list_(pa.int64())),
        with_column(name, "with a null list", instead(None), pa.list_(pa.uint8())),
        with_column(name, "with a null id", first(lambda ids: [None, *ids[1:]]), pa.list_(pa.uint8())),
        with_column(name, "an id short", first(lambda ids: ids[1:]), pa.list_(pa.uint8())),
        with_column(name, "an id over", first(lambda ids: [*ids, 0]), pa.list_(pa.uint8())),
        with_column(name, "a row short", first(lambda ids: ids[6:]), pa.list_(pa.uint8())),
        with_column(name, "empty", first(lambda ids: []), pa.list_(pa.uint8())),
    ]


def token_columns() -> list[Damage]:
    name = "token_ids"
    return [
        with_column(name, "as text", lambda column: ["x"] * len(column), pa.string()),
        with_column(name, "as numbers", lambda column: [1] * len(column), pa.int32()),
        with_column(name, "of floats", lambda column: [[e + 0.5 for e in v] for v in column], pa.list_(pa.float64())),
        with_column(name, "of texts", lambda column: [["x"] * len(v) for v in column], pa.list_(pa.string())),
        with_column(name, "of 2 ** 40", lambda column: [[2**40, *v[1:]] for v in column], pa.list_(pa.int64())),
        with_column(name, "negative", lambda column: [[-7, *v[1:]] for v in column], pa.list_(pa.int32())),
        with_column(name, "with a null id", lambda column: [[None, *v[1:]] for v in column], pa.list_(pa.int32())),
        with_column(name, "shorter than their rows", lambda column: [v[:1] for v in column], pa.list_(pa.int32())),
        with_column(name, "empty", lambda column: [[] for v in column], pa.list_(pa.int32())),
    ]


def counts_damages(draw: random.Random) -> list[Damage]:
    """Parts of loads, [layers] x [experts] numbers in a window."""

    def first(change: Callable[[list[int]], Any], type: pa.DataType | None) -> Callable[[pa.Table], pa.Table]:
        def table(table: pa.Table) -> pa.Table:
            rows = table.column("load").to_pylist()
            return table.set_column(1, "load", pa.array([change(rows[0]), *rows[1:]], type))

        return table

    whole = pa.list_(pa.int64())
    found = [
        rewritten("without load", lambda table: table.drop_columns(["load"])),
        rewritten("without window", lambda table: table.drop_columns(["window"])),
        rewritten("no row", lambda table: table.slice(0, 0)),
        rewritten("load one short", first(lambda load: load[1:], whole)),
        rewritten("load one over", first(lambda load: [*load, 1], whole)),
        rewritten("load empty", first(lambda load: [], whole)),
        rewritten("load null", first(lambda load: None, whole)),
        rewritten("a null count", first(lambda load: [None, *load[1:]], whole)),
        rewritten("a negative count", first(lambda load: [-1, *load[1:]], whole)),
        rewritten("counts of 2 ** 62", first(lambda load: [2**62] * len(load), whole)),
        rewritten("counts of floats", first(lambda load: [v + 0.5 for v in load], pa.list_(pa.float64()))),
        rewritten("counts as text", text_loads),
        with_column("window", "as numbers", lambda column: list(range(len(column))), pa.int64()),
        with_column("window", "null", lambda column: [None] * len(column), pa.string()),
        with_column("window", "twice", lambda column: [column[0]] * len(column), pa.string()),
        rewritten("window not UTF-8", partial(not_utf8, "window")),
    ]
    return found + [hashed(damage) for damage in [*no_file(), *cuts(draw, 6), *noise(draw, 10)]]


def text_loads(table: pa.Table) -> pa.Table:
    return table.set_column(1, "load", pa.array(["x"] * len(table), pa.string()))
