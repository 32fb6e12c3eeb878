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
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from semmoe.profiles.document import holds_flags, parse_json
from semmoe.profiles.errors import InputError
from semmoe.profiles.files import open_file
from semmoe.profiles.trace_writer import Served

CUT_LINES = "cut or damaged lines"
FOREIGN = "records of another kind"
TOKEN_LISTS = ("prompt_token_ids", "prompt_ids", "input_ids", "output_ids", "output_token_ids", "token_ids")


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
    served: Served | None = None  # where the server ran it


@dataclass(frozen=True, eq=False)
class EngineLoad:
    """Activations per expert in one window: a step, a pass, an iteration, a file."""

    where: str
    window: str
    load_LE: np.ndarray  # int64, not negative
    top_k: int = 0  # 0 = unknown
    layer_ids: tuple[int, ...] | None = None


class LeftOut(Counter[str]):
    """How much an import leaves out, by reason; and of how many requests and tokens that takes.

    Fields:
        strict: the first record that cannot be used is raised, and not counted.
        requests: records of requests, by reason; a reason that counts lines or rows is not in it.
        tokens: tokens of those records, as far as they tell, by reason.
        first: what was wrong with the first of them.
    """

    def __init__(self, *, strict: bool = False) -> None:
        super().__init__()
        self.strict = strict
        self.requests: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.first: InputError | None = None

    def leave(self, reason: str, error: InputError, record: Any = None) -> None:
        """Count a record that cannot be used, or raise `error` where that must not be."""
        if self.strict:
            raise error
        self.first = self.first or error
        self.leave_request(reason, _num_tokens(record))

    def leave_request(self, reason: str, num_tokens: int) -> None:
        """Count a request that is left out on purpose."""
        self[reason] += 1
        self.requests[reason] += 1
        self.tokens[reason] += num_tokens

    def __str__(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in self.items())


class UnusableError(InputError):
    """A record that cannot be used though its file can, and the reason that it is counted by."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def _num_tokens(record: Any) -> int:
    """Tokens of a record that is left out, 0 where it does not tell."""
    if not isinstance(record, dict):
        return 0
    holders = [record, *(record[k] for k in ("usage", "meta_info") if isinstance(record.get(k), dict))]
    lists = [v for k in TOKEN_LISTS for v in (record.get(k),) if isinstance(v, list)]
    stated = [h.get(k) for h in holders for k in ("prompt_tokens", "completion_tokens")]
    found = sum(v for v in stated if isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 31)
    return found or sum(map(len, lists))


# (files, moe_facts of --model or None, what is left out) -> records
Reader = Callable[[list[Path], dict[str, Any] | None, LeftOut], Iterator[EngineRequest | EngineLoad]]


def open_input(path: Path) -> Any:
    """A file for reading bytes; gzip by its first bytes, whatever its name."""
    try:
        file = open_file(path)
        if file.peek(2)[:2] == b"\x1f\x8b":
            return gzip.open(file, "rb")
        return file
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def input_lines(path: Path, left_out: LeftOut | None = None) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of a file that are not blank. Raises InputError where a gzip file is damaged,
    or cut; with `left_out` the whole lines before a cut are kept, and the cut is counted."""
    number = 0
    with open_input(path) as file:
        try:
            for number, line in enumerate(file, start=1):
                if not line.isspace():
                    yield number, line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            if isinstance(error, EOFError) and left_out is not None and number:
                left_out.leave(CUT_LINES, InputError(f"{path} is a gzip file that is cut after line {number}"))
                return
            raise InputError(f"{path} is a damaged gzip file after line {number}: {error}") from None
        except OSError as error:
            raise InputError(f"{path} cannot be read after line {number}: {error}") from None


def json_objects(path: Path, left_out: LeftOut) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a file with one JSON value a line, each with its place: a line may hold one object
    or a list of them. A line that is cut, and a value that is no object, are left out.

    A file that is one JSON document over many lines is read as a whole.
    """
    lines = input_lines(path, left_out)
    empty = True
    for number, line in lines:
        if empty and line.strip() in (b"[", b"{"):
            line += b"".join(rest for _, rest in lines)
        empty = False
        where = f"{path}, line {number}"
        try:
            value = parse_json(line)
        except ValueError as error:  # also bytes that are not UTF-8
            left_out.leave(CUT_LINES, InputError(f"{where}: not JSON: {error}"))
            continue
        several = isinstance(value, list)
        for index, item in enumerate(value if several else [value]):
            place = f"{where}, item {index}" if several else where
            if isinstance(item, dict):
                yield place, item
            else:
                left_out.leave(FOREIGN, InputError(f"{place}: {_short(item)}, expected a JSON object"))
    if empty:
        raise InputError(f"{path} is empty")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True) if not isinstance(value, np.ndarray) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


DTYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")


def described_array(where: str, value: dict[str, Any]) -> np.ndarray:
    """Integers of an object that gives raw bytes or a flat list beside their shape and type:
    {"data", "shape"[, "dtype"]}; without a type, the one whose size fits the bytes.

    Raises InputError where they do not fit each other.
    """
    data, shape = value.get("data"), integer_array(where, "routed_experts.shape", value.get("shape"), 1).tolist()
    if not shape or min(shape) < 0:
        raise InputError(f"{where}: routed_experts.shape is {_short(value.get('shape'))}, expected sizes from 0")
    count = math.prod(shape)
    if isinstance(data, list):
        flat = np.asarray(integer_array(where, "routed_experts.data", data, np.ndim(data) or 1)).reshape(-1)
    else:
        raw = base64_bytes(where, data)
        name = value.get("dtype")
        if name is None:
            name = {count * size: f"int{8 * size}" if size > 1 else "uint8" for size in (8, 4, 2, 1)}.get(
                len(raw), "int32"
            )
        kind = str(name).removeprefix("torch.").removeprefix("numpy.").removeprefix("np.")
        dtype = np.dtype(kind).newbyteorder("<") if kind in DTYPES else _typed(where, name)
        if len(raw) % dtype.itemsize:
            raise InputError(f"{where}: routed_experts has {len(raw)} bytes, expected values of {dtype.itemsize} bytes")
        flat = np.frombuffer(raw, dtype)
    if flat.size != count:
        raise InputError(f"{where}: routed_experts holds {flat.size} values, its shape says {shape}")
    return flat.reshape(shape)


def _typed(where: str, name: Any) -> np.dtype:
    """The dtype of a numpy type string such as "<i4"."""
    if isinstance(name, str) and re.fullmatch(r"[<>|=]?[iu][1248]", name):
        return np.dtype(name)
    raise InputError(f"{where}: routed_experts.dtype is {_short(name)}, expected one of {', '.join(DTYPES)}")


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
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise InputError(f"{where}: {key} is {_short(value)}, expected a whole number from 0 to {2**31 - 1}")
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
    if holds_flags(value):
        raise InputError(f"{where}: {name} holds true or false, expected integers with {ndim} axes")
    try:
        array = np.asarray(value)
    except (ValueError, RecursionError):
        raise InputError(f"{where}: {name} has rows of unequal length, or nests too deep") from None
    if array.size == 0 and array.ndim == ndim:
        return array.astype(np.int64)
    if (
        array.dtype.kind == "f"
        and np.isfinite(array).all()
        and (array == np.floor(array)).all()
        and (abs(array) < 2**63).all()
    ):
        array = array.astype(np.int64)
    if array.ndim != ndim or array.dtype.kind not in "iu":
        raise InputError(
            f"{where}: {name} has type {array.dtype} and shape {list(array.shape)}, expected integers with {ndim} axes"
        )
    return array
