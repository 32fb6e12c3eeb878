"""What the readers of engine files share: the two records that they yield, and lines of JSON that
know where they stand.

A reader turns the files of one kind of engine into EngineRequests (routing per token) or
EngineLoads (activations per expert and window), as the engine wrote them: all layers, dense ones
too, padding and all. profiles/engines/columns.py makes of them what a trace holds.

Shape letters: T tokens (rows), L layers of the record (dense ones included), K columns of the
record, E experts.
"""

import base64
import binascii
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from semmoe.profiles.document import parse_json
from semmoe.profiles.errors import InputError


@dataclass(frozen=True, eq=False)
class EngineRequest:
    """One request, or one fragment where the engine does not tell requests apart."""

    where: str  # file and line, for messages
    expert_ids_TLK: np.ndarray  # integers; -1 = padding, 0 or -1 all over = a dense layer
    request_id: str
    domain: str = ""
    token_ids: np.ndarray | None = None  # the whole sequence, row i at first_position + i; None = unknown
    num_prompt_tokens: int | None = None  # None = unknown
    first_position: int = 0
    repetition: bool = False  # a generation that fell into a loop
    model: str = ""
    num_experts: int = 0  # where the file states it; 0 = it does not
    layer_ids: tuple[int, ...] | None = None  # numbers of the layers where the file states them; None = 0, 1, 2, ...


@dataclass(frozen=True, eq=False)
class EngineLoad:
    """Activations per expert in one window: a step, a pass, an iteration, a file."""

    where: str
    window: str
    load_LE: np.ndarray  # int64, not negative
    top_k: int = 0  # 0 = unknown
    layer_ids: tuple[int, ...] | None = None


# (files, moe_facts of --model or None, counts of what is left out by reason) -> records
Reader = Callable[[list[Path], dict[str, Any] | None, Counter[str]], Iterator[EngineRequest | EngineLoad]]


def open_input(path: Path) -> Any:
    """A file for reading bytes; gzip by its first bytes, whatever its name."""
    try:
        file = open(path, "rb")
        if file.peek(2)[:2] == b"\x1f\x8b":
            return gzip.open(file, "rb")
        return file
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def input_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of a file that are not blank. Raises InputError where a gzip file is cut or
    damaged."""
    number = 0
    with open_input(path) as file:
        try:
            for number, line in enumerate(file, start=1):
                if not line.isspace():
                    yield number, line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{path} is a damaged gzip file after line {number}: {error}") from None
        except OSError as error:
            raise InputError(f"{path} cannot be read after line {number}: {error}") from None


def json_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a file with one JSON value a line, each with its place: a line may hold one object
    or a list of them.

    A file that is one JSON document over many lines is read as a whole.
    """
    lines = input_lines(path)
    empty = True
    for number, line in lines:
        if empty and line.strip() in (b"[", b"{"):
            line += b"".join(rest for _, rest in lines)
        empty = False
        where = f"{path}, line {number}"
        try:
            value = parse_json(line)
        except ValueError as error:  # also bytes that are not UTF-8
            raise InputError(f"{where}: not JSON: {error}") from None
        if isinstance(value, list):
            for index, item in enumerate(value):
                yield _object(f"{where}, item {index}", item)
        else:
            yield _object(where, value)
    if empty:
        raise InputError(f"{path} is empty")


def _object(where: str, value: Any) -> tuple[str, dict[str, Any]]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: {_short(value)}, expected a JSON object")
    return where, value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True) if not isinstance(value, np.ndarray) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def base64_bytes(where: str, value: Any) -> bytes:
    """The bytes of a base64 text. Raises InputError for anything else."""
    if not isinstance(value, str):
        raise InputError(f"{where}: routed_experts is {_short(value)}, expected base64 text")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{where}: routed_experts is not base64: {error}") from None


def integer(where: str, record: dict[str, Any], *keys: str) -> int | None:
    """The first of `keys` that the record has: a whole number from 0, or None."""
    key = next((k for k in keys if record.get(k) is not None), None)
    if key is None:
        return None
    value = record[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InputError(f"{where}: {key} is {_short(value)}, expected a whole number from 0")
    return value


def token_list(where: str, record: dict[str, Any], *keys: str) -> np.ndarray | None:
    """The first of `keys` that the record has: token ids, int32 [T]; None where it has none."""
    key = next((k for k in keys if record.get(k) is not None), None)
    if key is None:
        return None
    ids_T = integer_array(where, key, record[key], 1)
    limits = np.iinfo(np.int32)
    if ids_T.size and (ids_T.min() < limits.min or ids_T.max() > limits.max):
        bad = ids_T.max() if ids_T.max() > limits.max else ids_T.min()
        raise InputError(f"{where}: {key} holds {bad}, expected token ids of 32 bits")
    return ids_T.astype(np.int32)


def integer_array(where: str, name: str, value: Any, ndim: int) -> np.ndarray:
    """An array of integers with `ndim` axes, of nested lists or an array; a whole float counts
    as an integer."""
    try:
        array = np.asarray(value)
    except ValueError:
        raise InputError(f"{where}: {name} has rows of unequal length") from None
    if array.size == 0 and array.ndim == ndim:
        return array.astype(np.int64)
    if array.dtype.kind == "f" and np.isfinite(array).all() and (array == np.floor(array)).all():
        array = array.astype(np.int64)
    if array.ndim != ndim or array.dtype.kind not in "iu":
        raise InputError(
            f"{where}: {name} has type {array.dtype} and shape {list(array.shape)}, expected integers with {ndim} axes"
        )
    return array
