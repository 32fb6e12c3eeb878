"""Loads of experts written one by one: CSV files and JSON lists of layer, expert and count.

Files add up, as those of several ranks do. Without a count every line is one activation.

Shape letters: L layers that are named, E experts.
"""

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from semmoe.profiles.engines.columns import MOST_EXPERTS, plausible_num_experts
from semmoe.profiles.engines.records import EngineLoad, input_lines
from semmoe.profiles.errors import InputError

LAYERS = ("layer", "layer_id", "layer_idx", "moe_layer")
EXPERTS = ("expert", "expert_id", "expert_idx", "logical_expert")
COUNTS = ("count", "load", "num_tokens", "tokens", "activations")


def counted_rows(files: list[Path], facts: dict[str, Any] | None) -> EngineLoad:
    """The load in CSV files, summed: a line for each layer and expert with its count, or a line for
    each activation."""
    rows: list[tuple[str, dict[str, Any]]] = []
    for file in files:
        try:
            text = b"".join(line for _, line in input_lines(file)).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise InputError(
                f"{file} is neither CSV in UTF-8 nor a load matrix: damaged, or another kind of file"
            ) from None
        lines = text.splitlines()
        if not lines:
            raise InputError(f"{file} is empty")
        mark = next((mark for mark in (",", "\t", ";") if mark in lines[0]), ",")
        reader = csv.DictReader(lines, delimiter=mark, skipinitialspace=True)
        rows += [(f"{file}, row {number}", row) for number, row in enumerate(_csv_rows(file, reader), start=1)]
    return load_of(files[0], rows, facts)


def _csv_rows(file: Path, reader: "csv.DictReader[str]") -> list[dict[str, Any]]:
    try:
        names = {name: (name or "").strip().lower() for name in reader.fieldnames or ()}
        rows = [{names.get(key, ""): value for key, value in row.items() if value is not None} for row in reader]
    except csv.Error as error:
        raise InputError(f"{file} is not CSV: {error}") from None
    if not (set(names.values()) & set(LAYERS) and set(names.values()) & set(EXPERTS)):
        columns = f"columns {LAYERS[0]}, {EXPERTS[0]} and perhaps {COUNTS[0]}"
        raise InputError(
            f"{file} is read as CSV by its content: expected {columns}, got {', '.join(names.values())[:60]!r}"
        )
    return rows


def load_of(file: Path, rows: list[tuple[str, dict[str, Any]]], facts: dict[str, Any] | None) -> EngineLoad:
    """The load in rows of layer, expert and count (1 where there is none), int64 [L, E], over the
    layers that are named."""
    counts: Counter[tuple[int, int]] = Counter()
    for where, row in rows:
        layer, expert, count = (_number(where, row, keys) for keys in (LAYERS, EXPERTS, COUNTS))
        counts[layer, expert] += count
    if not counts:
        raise InputError(f"{file} holds no row")
    layers = sorted({layer for layer, _ in counts})
    largest = max(expert for _, expert in counts)
    num_experts = max(facts["num_experts"], largest + 1) if facts is not None else plausible_num_experts(largest)
    load_LE = np.zeros((len(layers), num_experts), np.int64)
    for (layer, expert), count in counts.items():
        load_LE[layers.index(layer), expert] = count
    return EngineLoad(str(file), file.stem, load_LE, layer_ids=tuple(layers))


def _number(where: str, row: dict[str, Any], keys: tuple[str, ...]) -> int:
    """The first of `keys` that the row has, a whole number from 0."""
    key = next((key for key in keys if row.get(key) not in (None, "")), None)
    if key is None and keys is COUNTS:
        return 1
    text = str(row[key]).strip() if key is not None else ""
    number = text.removesuffix(".0")
    most = MOST_EXPERTS - 1 if keys is not COUNTS else 1 << 53
    if not (number.isascii() and number.isdecimal()) or len(number) > 16 or int(number) > most:
        raise InputError(f"{where}: {key or keys[0]} is {text[:40]!r}, expected a whole number from 0 to {most}")
    return int(number)
