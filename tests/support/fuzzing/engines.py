"""Damaged files of serving engines, for `trace --from`: every record of a file is damaged, so that
none is left that could be imported."""

import base64
import gzip
import io
import json
import random
import struct
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from engine_samples import (
    count_pass,
    npy64,
    raw64,
    routing,
    save_recording,
    slot_map,
    token_pass,
)

from fuzzing.damage import (
    BIG,
    DEEP,
    Damage,
    Place,
    cuts,
    no_document,
    no_file,
    noise,
    remove,
    sampled,
    set_to,
    write,
    wrong_values,
)
from fuzzing.headers import header_damages
from fuzzing.inputs import Input, inputs_of
from fuzzing.maps import Evil, pickles, save_torch

SGLANG = "trace --from sglang sglang.jsonl -o out"
SGLANG_BARE = "trace --from sglang bare.jsonl --model config.json -o out"
VLLM = "trace --from vllm vllm.jsonl -o out"
OFFLINE = "trace --from vllm offline.jsonl --model config.json -o out"
TOKENS, PASSES, STATS = (
    f"trace --from sglang-recorder {name}.pt --model config.json -o out" for name in ("token", "pass", "stat")
)
TRTLLM = "trace --from trtllm stats -o out"
MEGATRON = "trace --from megatron router.jsonl -o out"
EPLB_JSON, EPLB_NPY, EPLB_PT = (f"trace --from eplb {name} -o out" for name in ("matrix.json", "load.npy", "load.pt"))

TEXT_VALUES = ("5", "true", "[]", "{}", '""', '"!!!!"', '"abc"', '"AAAA="', '"QUJD"', DEEP, '"\\u00e9\\u00e9"')
SHAPES = ("5", '"x"', "{}", "[]", "[40]", "[40, 5]", "[40, 5, 3, 1]", "[-40, -5, 3]", "[40, 5, 4]", '["40", "5", "3"]')
SHAPES = (
    *SHAPES,
    "[40.5, 5, 3]",
    "[4294967296, 4294967296, 1]",
    f"[{BIG}, 1, 1]",
    "[0, 5, 3]",
    "[null, 5, 3]",
    "[true, 600, 1]",
    DEEP,
)
COUNTS = ('"x"', "-1", "1.5", "true", "[]", "{}", BIG, "NaN", "9223372036854775807", "1000")
PROMPTS = (
    "[1099511627776, 101, 102]",
    "[100, 101, null]",
    "[100.5, 101, 102]",
    '[100, 101, "102"]',
    "[100, [101], 102]",
)
TOKEN_LISTS = (
    '"abc"',
    "5",
    "{}",
    "true",
    "[1.5]",
    "[null]",
    "[[1]]",
    f"[{BIG}]",
    "[1099511627776]",
    '["1"]',
    "[-5]",
    "[NaN]",
    "[]",
)
ROUTED = ("routed_experts",)


def engine_inputs(base: Path, draw: random.Random) -> list[Input]:
    found = [*sglang_inputs(draw), *vllm_inputs(draw), *recorder_inputs(base, draw), *statistics_inputs(base, draw)]
    return [*found, *megatron_inputs(base, draw), *matrix_inputs(draw)]


def text_at(place: Place, what: str, text: str) -> Damage:
    """A long text at a place of the document, named in words."""
    return set_to(place, json.dumps(text))._replace(what=what)


def lines(draw: random.Random) -> list[Damage]:
    """A file of lines, packed or not, that is damaged as a whole."""
    text = [damage for damage in no_document(draw) if damage.what not in ("a list around it", "packed", "a number")]
    text.append(Damage("a number", lambda file: write(file, b"5\n")))
    return [*text, *packed(draw), *noise(draw, 12)]


def packed(draw: random.Random) -> list[Damage]:
    """Damaged gzip."""

    def change(edit: Callable[[bytearray], bytes], file: Path) -> None:
        write(file, bytes(edit(bytearray(gzip.compress(file.read_bytes(), mtime=0)))))

    def with_byte(place: float, data: bytearray) -> bytes:
        data[int(len(data) * place)] ^= 0x55
        return bytes(data)

    places = [draw.uniform(0.3, 0.9) for _ in range(4)]
    shares = [draw.uniform(0.05, 0.95) for _ in range(4)]
    found = [Damage(f"packed, cut at {s:.1%}", partial(change, lambda b, s=s: b[: int(len(b) * s)])) for s in shares]
    found += [Damage(f"packed, a byte at {p:.1%}", partial(change, partial(with_byte, p))) for p in places]
    found += [
        Damage("packed, a wrong checksum", partial(change, lambda b: b[:-8] + b"\0\0\0\0" + b[-4:])),
        Damage("packed, its first bytes alone", partial(change, lambda b: b[:12])),
        Damage("packed twice", lambda file: write(file, gzip.compress(gzip.compress(file.read_bytes())))),
    ]
    return found


def ids_with(value: int, place: tuple[int, int, int] = (3, 2, 1), dtype: str = "<i4") -> np.ndarray:
    ids = routing(40).astype(dtype)
    ids[place] = value
    return ids


def repeated() -> np.ndarray:
    ids = routing(40)
    ids[5, 2, 1] = ids[5, 2, 0]
    return ids


# Ids of 40 tokens, 5 layers and top-3 that no model routed.
IDS: dict[str, Callable[[], np.ndarray]] = {
    "-2": lambda: ids_with(-2),
    "-2 ** 31": lambda: ids_with(-(2**31)),
    "2 ** 31 - 1": lambda: ids_with(2**31 - 1),
    "1000000": lambda: ids_with(1_000_000),
    "twice in a row": repeated,
    "zero all over": lambda: np.zeros((40, 5, 3), np.int32),
    "-1 all over": lambda: np.full((40, 5, 3), -1, np.int32),
}


def sglang_inputs(draw: random.Random) -> list[Input]:
    meta = ("meta_info",)
    damages = [set_to((*meta, *ROUTED), raw) for raw in TEXT_VALUES]
    damages += [text_at((*meta, *ROUTED), f"ids with {what}", raw64(make())) for what, make in IDS.items()]
    damages += [text_at((*meta, *ROUTED), f"{rows} rows", raw64(routing(rows))) for rows in (0, 1, 39, 41)]
    damages += [text_at((*meta, *ROUTED), "ids as .npy", npy64(routing(40)))]
    damages += [set_to((*meta, "routed_experts_shape"), raw) for raw in SHAPES]
    damages += [set_to((*meta, "routed_experts_start_len"), raw) for raw in COUNTS]
    damages += [set_to(("prompt_token_ids",), raw) for raw in (*TOKEN_LISTS, *PROMPTS)]
    damages += [set_to(("output_ids",), raw) for raw in TOKEN_LISTS[:-1]]
    damages += [set_to(meta, raw) for raw in ("null", "5", '"x"', "[]", "true")]
    damages += [
        Damage("without meta_info", partial(remove, meta)),
        Damage("without routing", partial(remove, (*meta, *ROUTED))),
    ]
    found = inputs_of("responses of SGLang", "sglang.jsonl", [*damages, *lines(draw)], [SGLANG], draw)
    bare = [set_to((*meta, *ROUTED), raw) for raw in TEXT_VALUES]
    bare += [
        set_to((*meta, *ROUTED), json.dumps(base64.b64encode(bytes(size)).decode())) for size in (4, 56, 2398, 2404)
    ]
    return found + inputs_of("responses of SGLang", "bare.jsonl", bare, [SGLANG_BARE], draw)


def vllm_inputs(draw: random.Random) -> list[Input]:
    choice = ("choices", 0)
    damages = [set_to((*choice, *ROUTED), raw) for raw in TEXT_VALUES]
    for what, array in NPY.items():
        damages.append(text_at((*choice, *ROUTED), f".npy {what}", text64(array)))
    nested = (
        "[[[0]], [[1, 2]]]",
        "[[[0.5]]]",
        '[[["a"]]]',
        "[[[null]]]",
        "[[0, 1]]",
        "[[[true]]]",
        f"[[[{BIG}]]]",
        "[[[{}]]]",
    )
    damages += [set_to((*choice, *ROUTED), raw) for raw in nested]
    damages += [set_to(("choices",), raw) for raw in ("5", '"x"', "{}", "[]", "[5]", "[null]", "true", "[[]]", DEEP)]
    damages += [set_to(("usage", name), raw) for name in ("prompt_tokens", "completion_tokens") for raw in COUNTS[:-1]]
    damages += [Damage("without routing", partial(remove, (*choice, *ROUTED)))]
    found = inputs_of("responses of vLLM", "vllm.jsonl", [*damages, *lines(draw)], [VLLM], draw)
    output = ("outputs", 0)
    damages = [set_to(("prompt_token_ids",), raw) for raw in TOKEN_LISTS]
    damages += [set_to((*output, "token_ids"), raw) for raw in TOKEN_LISTS[:-1]]
    damages += [set_to(("outputs",), raw) for raw in ("5", '"x"', "{}", "[]", "[5]", "true")]
    # Fewer rows may be those that follow a cached prefix.
    damages += [text_at((*output, *ROUTED), f"{rows} rows", npy64(routing(rows))) for rows in (41, 60)]
    return found + inputs_of("responses of vLLM", "offline.jsonl", damages, [OFFLINE], draw)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def npy_header(text: str, data: bytes = b"\0" * 600) -> bytes:
    """An .npy file with this header."""
    header = text.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def text64(data: bytes) -> str:
    return base64.b64encode(data).decode()


NPY = {
    "of floats": npy(np.full((40, 5, 3), 0.5)),
    "of NaN": npy(np.full((40, 5, 3), np.nan)),
    "of flags": npy(np.ones((40, 5, 3), bool)),
    "of texts": npy(np.full((40, 5, 3), "x")),
    "of dates": npy(np.zeros((40, 5, 3), "datetime64[s]")),
    "complex": npy(np.ones((40, 5, 3), np.complex64)),
    "of objects": npy(np.array([Evil()], dtype=object)),
    "of records": npy(np.zeros((40, 5, 3), [("a", "<i4")])),
    "with two axes": npy(np.ones((40, 5), np.uint8)),
    "a number": npy(np.array(5)),
    "cut": npy(routing(40))[:-100],
    "its header cut": npy(routing(40))[:30],
    "its magic alone": b"\x93NUMPY",
    "of version 9": b"\x93NUMPY\x09\x00" + npy(routing(40))[8:],
    "a header that is no dictionary": npy_header("[1, 2, 3]"),
    "a header that is code": npy_header("__import__('os').system('touch ../../victim/pwned')"),
    "a header that lacks its shape": npy_header("{'descr': '<i4', 'fortran_order': False}"),
    "a huge shape": npy_header("{'descr': '<i4', 'fortran_order': False, 'shape': (1099511627776, 5, 3)}"),
    "a negative shape": npy_header("{'descr': '<i4', 'fortran_order': False, 'shape': (-1, 5, 3)}"),
    "a shape of texts": npy_header("{'descr': '<i4', 'fortran_order': False, 'shape': ('a',)}"),
    "a type that is none": npy_header("{'descr': '<q9', 'fortran_order': False, 'shape': (40, 5, 3)}"),
    "-2": npy(ids_with(-2)),
    "70000": npy(ids_with(70_000)),
    "-1 all over": npy(np.full((40, 5, 3), -1)),
    "twice in a row": npy(repeated()),
}


# ---- SGLang's recorder


def odd_tensors() -> dict[str, Any]:
    """Values that are no plain array of integers."""
    import torch

    ones = torch.ones(5, 40, 8)
    return {
        "None": None,
        "a number": 5,
        "a text": "x",
        "no element": torch.zeros(0, dtype=torch.int64),
        "an empty list": [],
        "a dictionary": {},
        "floats": ones + 0.5,
        "NaN": ones * float("nan"),
        "bfloat16": ones.to(torch.bfloat16),
        "flags": ones > 0,
        "complex": ones.to(torch.complex64),
        "one axis": torch.ones(5, dtype=torch.int64),
        "four axes": torch.ones(1, 1, 1, 1, dtype=torch.int64),
        "on no device": torch.ones(5, 40, 8, device="meta"),
        "sparse": torch.eye(5, dtype=torch.int64).to_sparse(),
        "far too large": torch.full((5, 40, 8), 2**62),
        "negative": torch.full((5, 40, 8), -7),
        "ragged": [[1, 2], [3]],
        "lists of texts": [["x"]],
    }


def recorder_inputs(base: Path, draw: random.Random) -> list[Input]:
    import torch

    ids, map_LS = routing(40), slot_map()
    record = token_pass(ids, map_LS, extend=[30, 10])
    count = count_pass(np.where(np.arange(5)[:, None] == 0, 0, np.ones((5, 20), np.int64)), number=1, rank=0)
    odd = odd_tensors()
    tokens, passes, stats = [], [], []
    for key in ("input_ids", "topk_ids_of_layer", "extend_seq_lens"):
        for what, value in odd.items():
            if not (key == "extend_seq_lens" and what == "None"):
                tokens.append(recorded(f"{key}: {what}", {**record, key: value}, map_LS))
    for what in ("number", "text", "pair", "none"):
        value = {"number": 1.5, "text": "x", "pair": [1, 2], "none": -1}[what]
        tokens += [recorded(f"{key}: {value!r}", {**record, key: value}, map_LS) for key in ("rank", "forward_pass_id")]
    tokens += [
        recorded(f"without {key}", {k: v for k, v in record.items() if k != key}, map_LS) for key in ("input_ids",)
    ]
    for what, value in odd.items():
        tokens.append(dumped(f"map: {what}", {"records": [record], "last_physical_to_logical_map": value}))
        passes.append(recorded(f"global_physical_count: {what}", {**count, "global_physical_count": value}, map_LS))
        stats.append(dumped(f"logical_count: {what}", {"rank": 0, "logical_count": value}))
    passes += [
        dumped(f"map: {what}", {"records": [count], "last_physical_to_logical_map": value})
        for what, value in odd.items()
    ]
    for what, value in {"none": [], "a text": "x", "numbers": [5], "a dictionary": {}, "None": None}.items():
        tokens.append(
            dumped(f"records: {what}", {"records": value, "last_physical_to_logical_map": torch.from_numpy(map_LS)})
        )
    whole = [dumped(f"the file: {what}", value) for what, value in {"a list": [1], "a text": "x", "empty": {}}.items()]
    files = [*no_file(), *cuts(draw, 6), *noise(draw, 8), *pickles()]
    found = inputs_of("recorder dump", "token.pt", [*sampled(tokens, 70, draw), *whole, *files], [TOKENS], draw)
    found += inputs_of("recorder dump", "pass.pt", sampled(passes, 30, draw), [PASSES], draw)
    return found + inputs_of("recorder dump", "stat.pt", stats, [STATS], draw)


def recorded(what: str, record: dict[str, Any], map_LS: np.ndarray) -> Damage:
    def apply(file: Path) -> None:
        file.unlink()
        save_recording(file, [record], map_LS)

    return Damage(what, apply)


def dumped(what: str, value: Any) -> Damage:
    return Damage(what, partial(save_torch, value))


# ---- loads: TensorRT-LLM's statistics and EPLB's matrices


def statistics_inputs(base: Path, draw: random.Random) -> list[Input]:
    meta, rank = "stats/meta_info.json", "stats/rank1.safetensors"
    values = wrong_values(
        json.loads((base / meta).read_text()), kinds={"num_experts": "positive", "num_experts_per_token": "positive"}
    )
    values += [set_to(("num_experts",), raw) for raw in ("15", "17", "1000000000")]
    values += [set_to(("num_experts_per_token",), raw) for raw in ("17", "1000000000")]
    text = [damage for damage in no_document(draw) if damage.what != "packed"]
    found = inputs_of("statistics of TensorRT-LLM", meta, [*values, *text], [TRTLLM], draw)
    damages = [counts(what, change) for what, change in STATISTICS.items()]
    # Nothing tells how many ranks there were: the last one may be absent.
    damages += [damage for damage in no_file() if damage.what != "absent"]
    damages += [*cuts(draw, 5), *noise(draw, 6, end=0.3), *header_damages(base / rank, draw, 24)]
    found += inputs_of("statistics of TensorRT-LLM", rank, damages, [TRTLLM], draw)
    first = [
        Damage("absent", lambda file: file.unlink()),
        Damage("named rank7", lambda file: file.rename(file.with_name("rank7.safetensors"))),
    ]
    return found + inputs_of("statistics of TensorRT-LLM", "stats/rank0.safetensors", first, [TRTLLM], draw)


Tables = dict[str, np.ndarray]


def with_first(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tables], Tables]:
    def apply(tables: Tables) -> Tables:
        name = next(iter(tables))
        return {**tables, name: change(tables[name])}

    return apply


def named_first(name: str) -> Callable[[Tables], Tables]:
    return lambda tables: {name: next(iter(tables.values())), **dict(list(tables.items())[1:])}


STATISTICS: dict[str, Callable[[Tables], Tables]] = {
    "floats": with_first(lambda a: a + 0.5),
    "negative": with_first(lambda a: -a - 1),
    "flags": with_first(lambda a: a > 0),
    "an expert less": with_first(lambda a: a[1:]),
    "two axes": with_first(lambda a: a[None]),
    "a number": with_first(lambda a: a[0].reshape(())),
    "empty": with_first(lambda a: a[:0]),
    "no key": lambda tables: {},
    "a key without a layer": named_first("100"),
    "a key of words": named_first("a_b"),
    "a negative layer": named_first("100_-1"),
    "a key of 5,000 digits": named_first("9" * 5000 + "_1"),
    "a layer of 10 ** 30": named_first("100_" + BIG),
    "another iteration": named_first("999_1"),
}


def counts(what: str, change: Callable[[Tables], Tables]) -> Damage:
    def apply(file: Path) -> None:
        from safetensors.numpy import load_file, save

        write(file, save({name: np.ascontiguousarray(a) for name, a in change(load_file(file)).items()}))

    return Damage(what, apply)


MATRICES = (
    "null",
    "5",
    '"x"',
    "{}",
    "[]",
    "[[]]",
    "[[[]]]",
    "[1, 2]",
    "[[1], [1, 2]]",
    '[["x"]]',
    "[[null]]",
    "[[true]]",
    "[[-1, 2]]",
)
MATRICES = (
    *MATRICES,
    "[[NaN, 1]]",
    "[[Infinity, 1]]",
    "[[1.5, 2]]",
    "[[[[1]]]]",
    "[[0, 0], [0, 0]]",
    f"[[{BIG}, 1]]",
    "[[1, {}]]",
)
MATRICES = (
    *MATRICES,
    "[[1], 5]",
    '{"logical_count": null}',
    '{"logical_count": "x"}',
    '{"logical_count": [[1], [2, 3]]}',
    '{"other": [[1]]}',
)
MATRICES = (*MATRICES, "[[9223372036854775807, 1]]", "[[1e300, 1]]", DEEP)


def matrix_inputs(draw: random.Random) -> list[Input]:
    texts = [Damage(f"matrix {raw[:40]}", partial(write_text, raw)) for raw in MATRICES]
    text = [damage for damage in no_document(draw) if damage.what not in ("a list around it", "packed")]
    found = inputs_of(
        "EPLB matrix", "matrix.json", [*texts, *text, *packed(draw)], [f"{EPLB_JSON} --model config.json"], draw
    )
    files = [Damage(what, partial(write_bytes, data)) for what, data in NPY.items() if what not in VALID_LOADS]
    files += [*no_file(), *cuts(draw, 4), *noise(draw, 6), *pickles()]
    found += inputs_of("EPLB matrix", "load.npy", files, [f"{EPLB_NPY} --model config.json"], draw)
    damages = [dumped(what, value) for what, value in odd_tensors().items()]
    return found + inputs_of("EPLB matrix", "load.pt", damages, [f"{EPLB_PT} --model config.json"], draw)


VALID_LOADS = ("70000", "twice in a row")


def write_text(text: str, file: Path) -> None:
    write(file, text.encode())


def write_bytes(data: bytes, file: Path) -> None:
    write(file, data)


# ---- Megatron's router traces


def megatron_inputs(base: Path, draw: random.Random) -> list[Input]:
    line = json.loads((base / "router.jsonl").read_text())
    damages = [set_to((key,), raw) for key in ("layer", "num_tokens", "topk") for raw in COUNTS[:-1]]
    damages += [set_to((key,), raw) for key in ("rank", "step") for raw in COUNTS[:6]]
    damages += [set_to(("topk",), "7"), set_to(("num_tokens",), "3")]
    damages += [set_to(("block",), raw) for raw in ("5", '"encoder"', "[]", "true", '"mtp"')]
    damages += [set_to(("top_indices",), raw) for raw in INDICES]
    for value in (-2, 1_000_000, 2**40, 0.5, None, "1", True):
        rows = [list(row) for row in line["top_indices"]]
        rows[3][1] = value
        damages.append(set_to(("top_indices",), json.dumps(rows))._replace(what=f"an index of {value!r}"))
    damages += [Damage(f"without {key}", partial(remove, (key,))) for key in ("layer", "top_indices")]
    return inputs_of("router trace of Megatron", "router.jsonl", [*damages, *lines(draw)], [MEGATRON], draw)


INDICES: Sequence[str] = (
    "null",
    "5",
    '"x"',
    "{}",
    "true",
    "[]",
    "[[]]",
    "[1]",
    "[[1], [1, 2]]",
    "[[[1]]]",
    '[["x"]]',
    "[[NaN, 1, 2]]",
    DEEP,
)
