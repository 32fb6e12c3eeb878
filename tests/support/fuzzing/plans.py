"""Damaged plans: plan.json, the tables beside it, and tables of another plan."""

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save

from fuzzing.damage import Damage, cuts, no_document, no_file, noise, sampled, set_to, write, wrong_values
from fuzzing.headers import header_damages
from fuzzing.inputs import Input, inputs_of

SHOW, REPORT, COMPARE = "show p", "report p t", "compare p q t"
PAGE = "report p t -o out.html"
EXPORT = "export p --to sglang -o out.json"
EXPORT_EPLB = "export p --to eplb -o out.npz"
RESHARD = "reshard m p -o out"
RANKS = "reshard m p --layout ranks -o out"
RUN = "run m --plan p --prompts few.jsonl --max-new-tokens 2"
REPLAY = "run --replay t --plan p --hidden-size 8 --max-tokens 64"
READERS = (*(SHOW, REPORT, COMPARE, EXPORT, RESHARD) * 5, *(EXPORT_EPLB, RANKS) * 2, PAGE, RUN, REPLAY)
SHOW_COSTS = "show n"
REPORT_COSTS = "report n t"

FACTS, TABLES = "p/plan.json", "p/tables.safetensors"
KINDS = {
    "format": "word",
    "method": "word",
    "dispatch": "word",
    "load_cap": "real",
    "num_layers": "positive",
    "num_experts": "positive",
    "top_k": "positive",
    "n_group": "positive",
    "topk_group": "positive",
    "ranks": "positive",
    "nodes": "positive",
    "sha256": "word",
}
BELIED = {
    ("version",): ("0", "2", "1000000"),
    ("replicas",): ("1", "4"),
    ("load_cap",): ("0", "0.5"),
    ("model", "num_layers"): ("1", "4", "1000000000"),
    ("model", "num_experts"): ("4", "7", "9", "16", "1000000000"),
    ("model", "top_k"): ("9", "1000000000"),
    ("model", "model_layers"): ("[]", "[0, 1]", "[0, 0, 1]", "[0, 1, 2, 3]", "[0, 1, 1000000000]"),
    ("model", "num_model_layers"): ("1", "2"),
    ("model", "n_group"): ("3", "16"),
    ("topology", "ranks"): ("1", "3", "4", "1000000000"),
    ("topology", "nodes"): ("3", "1000000000"),
    ("trace", "requests"): ("1000000000",),
    ("split", "held_out_requests"): ("0", "1000000000"),
    ("outputs", "permuted_checkpoint"): ("false",),
    ("scores", "verdict", "decision"): ('"recommend"', '"not worth it"'),
    ("scores", "verdict", "saved"): ("0.99",),
    ("scores", "tokens"): ("1000000",),
    ("scores", "rows", 0, "rem"): ("0.001", "1000.0"),
    ("scores", "rows", 0, "lar"): ("0.999",),
    ("placement",): ("[[[0, 1, 2, 3], [4, 5, 6, 7]]]",),
}
WHOLE_LAYER = [[0, 1, 2, 3], [4, 5, 6, 7]]
# A first layer that no placement of 8 experts on 2 ranks may have.
LAYERS = {
    "an expert twice on a rank": [[0, 0, 2, 3], [4, 5, 6, 7]],
    "an expert on no rank": [[0, 1, 2, 3], [0, 5, 6, 7]],
    "expert 8": [[0, 1, 2, 8], [4, 5, 6, 7]],
    "expert -1": [[0, 1, 2, -1], [4, 5, 6, 7]],
    "expert 2 ** 31": [[0, 1, 2, 2**31], [4, 5, 6, 7]],
    "expert 2 ** 32": [[0, 1, 2, 2**32], [4, 5, 6, 7]],
    "expert 10 ** 30": [[0, 1, 2, 10**30], [4, 5, 6, 7]],
    "expert 0.5": [[0.5, 1, 2, 3], [4, 5, 6, 7]],
    "a text": [["0", 1, 2, 3], [4, 5, 6, 7]],
    "a null": [[None, 1, 2, 3], [4, 5, 6, 7]],
    "a flag": [[False, True, 2, 3], [4, 5, 6, 7]],
    "a slot less": [[0, 1, 2], [4, 5, 6, 7]],
    "a rank less": [[0, 1, 2, 3]],
    "a rank more": [*WHOLE_LAYER, [0, 1, 2, 3]],
    "no rank": [],
    "no slot": [[], []],
    "numbers for ranks": [0, 1],
    "lists for experts": [[[0], [1], [2], [3]], [[4], [5], [6], [7]]],
}
COSTS = (
    "[]",
    "[[0]]",
    "[[0, 1]]",
    "[0, 1]",
    '[["a", 0], [0, 0]]',
    "[[0, -1], [1, 0]]",
    "[[0, NaN], [1, 0]]",
    "5",
    '"x"',
)
COSTS = (
    *COSTS,
    "[[0, Infinity], [1, 0]]",
    "[[1, 1], [1, 1]]",
    "[[0, 1], [1]]",
    "[[[0]]]",
    "[[0, null], [1, 0]]",
    "{}",
    "true",
)


def plan_inputs(base: Path, draw: random.Random) -> list[Input]:
    facts = json.loads((base / FACTS).read_text())
    scores = {key: facts["scores"][key] for key in ("format", "verdict", "rows", "setting")}
    del facts["scores"]
    values = sampled(values_of(facts), 220, draw) + sampled(values_of({"scores": scores}), 40, draw)
    belied = [set_to(place, raw) for place, raws in BELIED.items() for raw in raws]
    layers = [Damage(f"placement with {what}", partial(put_layer, layer)) for what, layer in LAYERS.items()]
    layers += [Damage("two experts swapped", swap_experts), Damage("two ranks swapped", swap_ranks)]
    text = no_document(draw, duplicates=("placement", "seed", "replicas"))
    found = inputs_of("plan.json", FACTS, [*values, *belied, *layers, *text], READERS, draw)
    costs = [set_to(("topology", "cost"), raw) for raw in COSTS]
    found += inputs_of("plan.json", "n/plan.json", costs, (SHOW_COSTS, REPORT_COSTS), draw)
    return found + inputs_of("plan tables", TABLES, table_damages(base, draw), READERS, draw)


def values_of(facts: dict[str, Any]) -> list[Damage]:
    return wrong_values(facts, kinds=KINDS, optional=("made_by",), nullable=("domains",), closed=("notes", "options"))


def put_layer(layer: list, file: Path) -> None:
    facts = json.loads(file.read_text())
    facts["placement"][0] = layer
    write(file, json.dumps(facts).encode())


def swap_experts(file: Path) -> None:
    """What a person would do who tries another placement by hand."""
    facts = json.loads(file.read_text())
    first, second = facts["placement"][1]
    first[0], second[0] = second[0], first[0]
    write(file, json.dumps(facts).encode())


def swap_ranks(file: Path) -> None:
    facts = json.loads(file.read_text())
    facts["placement"][1].reverse()
    write(file, json.dumps(facts).encode())


# ---- tables.safetensors


def table_damages(base: Path, draw: random.Random) -> list[Damage]:
    arrays = load_file(base / TABLES)
    found = [
        Damage("the tables of another plan", partial(copy_from, base / "q")),
        Damage("the tables of a plan for other ranks", partial(copy_from, base / "one")),
        changed("all arrays missing", lambda tables: {"x": np.zeros(1)}),
        *of_array("expert_load", LOADS),
        *of_array("fitted_requests", KEYS),
    ]
    schedule = []
    for name in sorted(arrays):
        found.append(
            changed(f"without {name}", lambda tables, name=name: {k: v for k, v in tables.items() if k != name})
        )
        if name.startswith("schedule."):
            schedule += of_array(name, ANY if arrays[name].size else EMPTY)
    found += sampled(schedule, 70, draw)
    found += [*no_file(), *cuts(draw, 12), *noise(draw, 20, end=0.3), *header_damages(base / TABLES, draw, 40)]
    return found


Change = Callable[[np.ndarray], np.ndarray]
LOADS: dict[str, Change] = {
    "negative": lambda a: -a - 1,
    "zero": np.zeros_like,
    "of floats": lambda a: a.astype(np.float32) + 0.5,
    "NaN": lambda a: np.full(a.shape, np.nan),
    "of 2 ** 62": lambda a: np.full_like(a, 2**62),
    "of flags": lambda a: a.astype(bool),
    "turned": lambda a: np.ascontiguousarray(a.T),
    "flat": lambda a: a.ravel(),
    "a layer short": lambda a: a[1:],
    "an expert short": lambda a: np.ascontiguousarray(a[:, 1:]),
    "empty": lambda a: a[:0],
    "a number": lambda a: a.ravel()[0].reshape(()),
    "of 8 bits": lambda a: (a % 100).astype(np.int8),
}
KEYS: dict[str, Change] = {
    "of floats": lambda a: a.astype(np.float64),
    "signed": lambda a: a.astype(np.int64),
    "with two axes": lambda a: a.reshape(1, -1),
    "a number": lambda a: np.zeros((), np.uint64),
    "of other requests": lambda a: a + np.uint64(1),
}
ANY: dict[str, Change] = {
    "NaN": lambda a: np.full(a.shape, np.nan, np.float32 if a.dtype.kind in "iu" else a.dtype),
    "infinite": lambda a: np.full(a.shape, np.inf, np.float32 if a.dtype.kind in "iu" else a.dtype),
    "of another type": lambda a: a.astype(np.int64 if a.dtype.kind == "f" else np.float64),
    "of flags": lambda a: a.astype(bool),
    "flat": lambda a: a.reshape(-1) if a.ndim > 1 else a.reshape(1, -1),
    "with an axis more": lambda a: a[None],
    "short": lambda a: np.ascontiguousarray(a[..., :-1]) if a.size else np.ones((3, *a.shape[1:]), a.dtype),
    "long": lambda a: np.ones((*a.shape[:-1], a.shape[-1] + 3), a.dtype),
    "negative": lambda a: np.full(a.shape, -1).astype(np.int64 if a.dtype.kind in "iu" else a.dtype),
    "huge": lambda a: np.full(
        a.shape, np.finfo(a.dtype).max if a.dtype.kind == "f" else np.iinfo(a.dtype).max, a.dtype
    ),
}

EMPTY = {what: ANY[what] for what in ("of another type", "flat", "short", "long")}  # of a table without values


def changed(what: str, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Damage:
    def apply(file: Path) -> None:
        write(file, save({name: np.ascontiguousarray(a) for name, a in change(load_file(file)).items()}))

    return Damage(what, apply)


def of_array(name: str, changes: dict[str, Change]) -> list[Damage]:
    """The array under each change."""
    return [
        changed(f"{name} {what}", lambda tables, change=change: {**tables, name: change(tables[name])})
        for what, change in changes.items()
    ]


def copy_from(plan: Path, file: Path) -> None:
    write(file, (plan / file.name).read_bytes())
