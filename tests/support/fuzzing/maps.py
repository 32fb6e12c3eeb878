"""Damaged expert maps of engines, for `place --import`, and the files that tell their origin."""

import json
import pickle
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fuzzing.damage import (
    Damage,
    cuts,
    no_document,
    no_file,
    noise,
    sampled,
    set_to,
    write,
    wrong_values,
)
from fuzzing.headers import header_damages
from fuzzing.inputs import Input, inputs_of

KINDS = {
    "vllm41.json": "vllm",
    "vllm49.json": "vllm",
    "vllm34.json": "vllm",
    "sglang.json": "sglang",
    "ascend.json": "vllm-ascend",
}


def reader(kind: str, file: str) -> str:
    return f"place t --ranks 2 --import {kind} {file} --force -o out"


# Rows of the first layer that no map of 8 experts on 2 ranks may have.
ROWS = (
    "[]",
    "null",
    "5",
    '"x"',
    "{}",
    "[0, 1, 2, 3, 4, 5, 6]",
    "[0, 1, 2, 3, 4, 5, 6, 8]",
    "[0, 1, 2, 3, 4, 5, 6, -1]",
)
ROWS = (
    *ROWS,
    "[0, 1, 2, 3, 4, 5, 6, 0]",
    "[0.5, 1, 2, 3, 4, 5, 6, 7]",
    '["0", 1, 2, 3, 4, 5, 6, 7]',
    "[null, 1, 2, 3, 4, 5, 6, 7]",
)
ROWS = (
    *ROWS,
    "[NaN, 1, 2, 3, 4, 5, 6, 7]",
    "[true, false, 2, 3, 4, 5, 6, 7]",
    "[[0], 1, 2, 3, 4, 5, 6, 7]",
    "[{}, 1, 2, 3, 4, 5, 6, 7]",
)
ROWS = (*ROWS, "[4294967296, 1, 2, 3, 4, 5, 6, 7]", "[1" + "0" * 30 + ", 1, 2, 3, 4, 5, 6, 7]")
TABLE_PLACES = {
    "sglang.json": ("physical_to_logical_map", 0),
    "vllm41.json": ("initial_global_assignments", "0"),
    "vllm49.json": (0,),
}


def map_inputs(base: Path, draw: random.Random) -> list[Input]:
    found = []
    for file, kind in KINDS.items():
        document = json.loads((base / file).read_text())
        values = wrong_values(document, kinds={"record_type": "word", "num_slots": "positive"})
        damages = [*sampled(values, 40, draw), *no_document(draw)]
        if place := TABLE_PLACES.get(file):
            damages += [set_to(place, raw) for raw in ROWS]
        damages = [d for d in damages if file != "vllm49.json" or d.what not in WHOLE_ONLY]
        found += inputs_of(f"map {kind}", file, damages, [reader(kind, file)], draw)
    for place in (
        ("layer_list", 0, "device_list", 0, "device_expert"),
        ("layer_list", 0, "layer_id"),
        ("layer_list", 1),
    ):
        raws = ROWS[:12] if place[-1] == "device_expert" else ("5", "null", '"0"', "-1", "[]")
        found += inputs_of(
            "map vllm-ascend",
            "ascend.json",
            [set_to(place, r) for r in raws],
            [reader("vllm-ascend", "ascend.json")],
            draw,
        )
    ranks = [set_to(("expert_to_ep_rank",), raw) for raw in RANKS]
    found += inputs_of("map vllm", "vllm34.json", ranks, [reader("vllm", "vllm34.json")], draw)
    found += yaml_inputs(base, draw) + tensor_inputs(base, draw)
    return found + sidecar_inputs(base, draw)


WHOLE_ONLY = ("a list around it",)  # of a list, a list around it is another damage
RANKS = (
    "[]",
    "[0, 0, 0, 0, 1, 1, 1]",
    "[0, 0, 0, 0, 0, 1, 1, 1]",
    "[0, 0, 0, 0, 1, 1, 1, 2]",
    "[-1, 0, 0, 0, 1, 1, 1, 1]",
)
RANKS = (
    *RANKS,
    "[0.5, 0, 0, 0, 1, 1, 1, 1]",
    '["0", 0, 0, 0, 1, 1, 1, 1]',
    "[[0, 0, 0, 0], [1, 1, 1, 1]]",
    "null",
    "5",
)


def sidecar_inputs(base: Path, draw: random.Random) -> list[Input]:
    """FILE.semmoe.json, which says whether a map was made from the trace it is scored on."""
    file = "sglang.json.semmoe.json"
    facts = json.loads((base / file).read_text())
    kinds = {"format": "word", "kind": "word"}  # another hash may stand for a map that is newer
    values = wrong_values(facts, kinds=kinds, optional=("made_by", "vllm_format"), closed=("model",))
    values += [
        set_to(("trace", "fingerprints"), raw) for raw in ("null", "5", "[5]", "[[]]", "[{}]", '"x"', "{}", "[null]")
    ]
    text = no_document(draw)
    text = [d for d in text if d.what != "absent"]
    return inputs_of(
        "engine-map sidecar", file, [*sampled(values, 50, draw), *text], [reader("sglang", "sglang.json")], draw
    )


# ---- TensorRT-LLM's YAML

YAML = {
    "a tag that runs code": "!!python/object/apply:os.system ['touch ../../victim/pwned']\n",
    "a tag that opens a file": "num_slots: !!python/object/apply:builtins.open ['../../victim/pwned', 'w']\n",
    "an alias of nothing": "num_slots: *a\n",
    "aliases of aliases": "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]\n" for i in range(9)),
    "a list that holds itself": "num_slots: 8\ninitial_global_assignments: &a {0: *a, 1: *a, 2: *a}\n",
    "rows that hold themselves": "num_slots: 8\ninitial_global_assignments:\n  0: &a [*a]\n  1: *a\n  2: *a\n",
    "many rows by aliases": "num_slots: 100000000\ninitial_global_assignments:\n"
    + "  0: &r0 [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]\n"
    + "".join(f"  {i + 1}: &r{i + 1} [{', '.join([f'*r{i}'] * 10)}]\n" for i in range(8)),
    "tabs": "num_slots:\t8\n\tinitial_global_assignments: 5\n",
    "two documents": "num_slots: 8\n---\nnum_slots: 8\n",
    "deep brackets": "num_slots: " + "[" * 5000 + "\n",
    "deep objects": "".join("  " * i + "a:\n" for i in range(1500)),
    "not closed": "num_slots: [8\n",
    "a control character": "num_slots: \x01\n",
    "a list": "- 1\n- 2\n",
    "a number": "5\n",
    "nothing": "",
    "a comment": "# nothing\n",
    "a date": "2024-01-01\n",
    "unhashable keys": "{[1, 2]: 3}\n",
    "a text as table": "num_slots: 8\ninitial_global_assignments: x\n",
    "no table": "num_slots: 8\n",
    "an empty table": "num_slots: 8\ninitial_global_assignments: {}\n",
}


def yaml_inputs(base: Path, draw: random.Random) -> list[Input]:
    text = (base / "trtllm.yaml").read_text()
    lines = text.splitlines()
    row = next(i for i, line in enumerate(lines) if line.startswith("  0:"))
    texts = dict(YAML)
    for raw in (
        *ROWS,
        ".nan",
        ".inf",
        "0x08",
        "2024-01-01",
        "!!binary aGk=",
        "[0, 1, 2, 3, 4, 5, 6, .nan]",
        "!!set {0, 1}",
    ):
        texts[f"layer 0: {raw[:40]}"] = "\n".join([*lines[:row], f"  0: {raw}", *lines[row + 1 :]]) + "\n"
    for key in ("-1", "x", "0.5", "true", "null", "1000000000", "[0]", "99999999999999999999999999"):
        texts[f"layer {key} for layer 0"] = (
            "\n".join([*lines[:row], lines[row].replace("0:", f"{key}:", 1), *lines[row + 1 :]]) + "\n"
        )
    for raw in ("7", "16", "-8", "x", "null", "8.5", "[8]", "true", "0", ".nan"):
        texts[f"num_slots: {raw}"] = text.replace("num_slots: 8", f"num_slots: {raw}")
    texts["an unknown key"] = text + "layer_updates: 3\n"
    texts["a layer less"] = "\n".join([*lines[:row], *lines[row + 1 :]]) + "\n"

    def put(text: str, file: Path) -> None:
        write(file, text.encode())

    damages = [Damage(what, partial(put, text)) for what, text in texts.items()]
    damages += [Damage("not UTF-8", lambda file: write(file, b"\xff\xfe" + file.read_bytes()))]
    damages += [*no_file(), *noise(draw, 8)]
    return inputs_of("map trtllm", "trtllm.yaml", damages, [reader("trtllm", "trtllm.yaml")], draw)


# ---- EPLB's tensors, and maps pickled by torch

ARRAYS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "of floats": lambda a: a.astype(np.float64),
    "of NaN": lambda a: np.full(a.shape, np.nan),
    "of flags": lambda a: a.astype(bool),
    "complex": lambda a: a.astype(np.complex64),
    "with expert 8": lambda a: np.where(a == 7, 8, a),
    "with expert -1": lambda a: np.where(a == 7, -1, a),
    "with expert 2 ** 40": lambda a: np.where(a == 7, 2**40, a),
    "with expert 2 ** 32": lambda a: np.where(a == 0, 2**32, a),
    "without expert 7": lambda a: np.where(a == 7, 0, a),
    "a layer short": lambda a: a[1:],
    "a slot short": lambda a: np.ascontiguousarray(a[:, 1:]),
    "flat": lambda a: a.ravel(),
    "a number": lambda a: a[0, 0].reshape(()),
    "empty": lambda a: a[:0],
    "with an axis of 0": lambda a: a[:, :0],
    "with four axes": lambda a: a[None, None],
}
OTHERS = {
    "logcnt turned": lambda a: np.ascontiguousarray(a.T),
    "logcnt zero": np.zeros_like,
    "logcnt of floats": lambda a: a + 0.5,
}


def tensor_inputs(base: Path, draw: random.Random) -> list[Input]:
    found = []
    for file in ("eplb.safetensors", "eplb.npz", "eplb.pt"):
        damages = [arrays(f"phy2log {what}", "phy2log", change) for what, change in ARRAYS.items()]
        damages += [arrays(what, "logcnt", change) for what, change in OTHERS.items()]
        damages += [arrays("without phy2log", "phy2log", None)]
        damages += [*no_file(), *cuts(draw, 5), *noise(draw, 8)]
        if file.endswith(".safetensors"):
            damages += header_damages(base / file, draw, 24)
        if file.endswith(".pt"):
            damages += torch_damages()
        found += inputs_of("map eplb", file, damages, [reader("eplb", file)], draw)
    for file, kind in (("map.pth", "eplb"), ("map.pt", "sglang"), ("map.npy", "eplb")):
        damages = [Damage(f"{d.what}, as {file}", d.apply) for d in pickles()]
        found += inputs_of(f"map {kind}", file, damages, [reader(kind, file)], draw)
    return found


def arrays(what: str, name: str, change: Callable[[np.ndarray], np.ndarray] | None) -> Damage:
    """The file with one of its tables changed, or without it."""

    def apply(file: Path) -> None:
        tables = load_tables(file)
        if change is None:
            del tables[name]
        else:
            tables[name] = change(tables[name])
        save_tables(file, tables)

    return Damage(what, apply)


def load_tables(file: Path) -> dict[str, np.ndarray]:
    if file.suffix == ".safetensors":
        from safetensors.numpy import load_file

        return load_file(file)
    if file.suffix == ".npz":
        return dict(np.load(file))
    import torch

    return {name: tensor.numpy() for name, tensor in torch.load(file).items()}


def save_tables(file: Path, tables: dict[str, np.ndarray]) -> None:
    file.unlink()
    tables = {name: np.ascontiguousarray(a) for name, a in tables.items()}
    if file.suffix == ".safetensors":
        from safetensors.numpy import save_file

        save_file(tables, file)
    elif file.suffix == ".npz":
        np.savez(file, **tables)
    else:
        import torch

        torch.save({name: torch.from_numpy(a) for name, a in tables.items()}, file)


def torch_damages() -> list[Damage]:
    """Tensors that no array can be made of, and containers of another kind."""
    import torch

    rows = torch.arange(8).repeat(3, 1)
    values: dict[str, Any] = {
        "bfloat16": {"phy2log": rows.to(torch.bfloat16)},
        "sparse": {"phy2log": rows.to_sparse()},
        "on no device": {"phy2log": rows.to("meta")},
        "with a gradient": {"phy2log": rows.float().requires_grad_()},
        "a list of texts": {"phy2log": ["x"]},
        "a text": "x",
        "a number": 5,
        "None": None,
        "nested": {"phy2log": {"phy2log": rows}},
        "a pair": (rows, rows),
        "three texts": ("a", "b", "c"),
        "no name": {None: rows},
        "huge by strides": {"phy2log": torch.zeros(1, dtype=torch.int64).expand(2**33, 8)},
    }
    return [Damage(f"torch: {what}", partial(save_torch, value)) for what, value in values.items()]


def save_torch(value: Any, file: Path) -> None:
    import torch

    file.unlink(missing_ok=True)
    torch.save(value, file)


class Evil:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, ("touch ../../victim/pwned",)


def pickles() -> list[Damage]:
    """Files that run code where they are loaded as what they seem to be."""

    def plain(value: Any, protocol: int) -> Callable[[Path], None]:
        return lambda file: write(file, pickle.dumps(value, protocol))

    return [
        Damage("a pickle that runs a command", plain(Evil(), 2)),
        Damage("the same in a dictionary", plain({"physical_to_logical_map": Evil(), "phy2log": Evil()}, 4)),
        Damage("by torch.save", partial(save_torch, {"physical_to_logical_map": Evil(), "phy2log": Evil()})),
        Damage("a pickle of lists", plain({"a": [[0, 1]]}, 2)),
        Damage("an endless pickle", lambda file: write(file, b"\x80\x02" + b"(" * 100_000)),
        Damage("an .npy of objects", partial(save_objects)),
        Damage("text", lambda file: write(file, b"no map")),
        Damage("empty", lambda file: write(file, b"")),
    ]


def save_objects(file: Path) -> None:
    with open(file, "wb") as target:
        np.save(target, np.array([Evil()], dtype=object), allow_pickle=True)
