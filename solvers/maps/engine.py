"""What a serving engine's map is to semmoe: one Engine record per kind, each in a file of its own.

Every engine wants the same array, experts by slot with the ranks one after the other, [layers, P].
They differ in which layers have rows, and in the container (docs/engines.md).

Shape letters: M rows of a file, P slots of all ranks.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from semmoe.profiles.document import holds_flags, parse_json, read_bounded
from semmoe.profiles.errors import InputError
from semmoe.solvers.placement import Placement, Topology
from semmoe.solvers.plan import ModelFacts, Plan


@dataclass(frozen=True)
class Wanted:
    """What a map is made of and for."""

    placement: Placement
    model: ModelFacts
    depth: int  # layers of the model, dense ones included; 0 = unknown
    num_mtp_layers: int = 0  # after the last of them
    format: str = ""  # where an engine has several


MOST_DRAFT_LAYERS = 4  # behind the last layer of a model: more rows are another model's


class Rows(NamedTuple):
    """What a file says: one row for each of its layers."""

    experts_MP: np.ndarray  # integers
    layer_of_M: list[int]  # number of each row's layer, as the file counts
    wanted_L: list[int]  # numbers of the MoE layers there
    num_draft: int = 0  # rows behind those of the model, which are its draft layers' and left out


def json_line(value: Any) -> bytes:
    """A map as one line of JSON."""
    return (json.dumps(value) + "\n").encode()


@dataclass(frozen=True)
class Engine:
    """How the map of one kind is made, written, read and used."""

    endings: tuple[str, ...]  # of its files' names: some engines decide by the ending how to read a file
    make: Callable[[Wanted], Any]  # the engine's object, a JSON value or a dict of arrays
    read: Callable[[Path, ModelFacts, Topology], Rows]  # raises InputError where the engine would refuse the file
    launch: Callable[[Plan, str, str], list[str]]  # plan, file and format -> how to start the engine: lines for people
    render: Callable[[Any, str], bytes] = lambda value, ending: json_line(value)  # object and ending -> the file


def num_extra_slots(placement: Placement) -> int:
    """Slots of all ranks beyond one for each expert: redundant experts, to engines."""
    return placement.physical_to_logical_LP.shape[1] - placement.num_experts


def identity_row(placement: Placement) -> list[int]:
    """Experts by slot where nothing is placed: 0, 1, ..., E - 1, and again from 0 in redundant
    slots."""
    return (np.arange(placement.physical_to_logical_LP.shape[1]) % placement.num_experts).tolist()


# ---- reading: each raises InputError, one line with the place


def read_text(file: Path) -> str:
    try:
        return read_bounded(file).decode()
    except FileNotFoundError:
        raise InputError(f"{file} does not exist") from None
    except UnicodeDecodeError:
        raise InputError(f"{file} is not text in UTF-8") from None
    except ValueError as error:
        raise InputError(f"{file} cannot be read: {error}") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None


def read_json(file: Path) -> Any:
    try:
        return parse_json(read_text(file), strict=True)
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {first_line(error)}") from None


def object_of(where: str, value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: a {type(value).__name__}, expected an object with named keys")
    return value


def ids_of(where: str, name: str, value: Any, ndim: int) -> np.ndarray:
    """Nested lists or a tensor as integers with `ndim` axes; nothing else passes, not even whole
    floats."""
    if holds_flags(value):
        raise InputError(f"{where}: {name} holds true or false, expected integers with {ndim} axes")
    try:
        array = np.asarray(value.numpy() if hasattr(value, "numpy") else value)
    except ValueError:
        raise InputError(f"{where}: {name} has rows of unequal length") from None
    except (TypeError, RuntimeError) as error:  # a tensor that numpy has no type for
        raise InputError(f"{where}: {name} is no plain tensor of integers: {first_line(error)}") from None
    if array.ndim != ndim or array.dtype.kind not in "iu" or not array.size:
        shape = list(array.shape)
        raise InputError(f"{where}: {name} is {array.dtype} of shape {shape}, expected integers with {ndim} axes")
    return array


def moe_rows(where: str, experts_LP: np.ndarray, model: ModelFacts) -> Rows:
    """Rows of a file that has one for every MoE layer, counted from 0, and perhaps some for draft
    layers behind them."""
    num_draft = len(experts_LP) - model.num_layers
    if not 0 <= num_draft <= MOST_DRAFT_LAYERS:
        raise InputError(f"{where} has {len(experts_LP)} rows, expected {model.num_layers}: one for every MoE layer")
    layers = list(range(model.num_layers))
    return Rows(experts_LP[: model.num_layers], layers, layers, num_draft)


def some_of(names: Any) -> str:
    """The first names of many, for a message."""
    text = ", ".join(map(str, list(names)[:5]))
    return text if len(text) <= 60 else f"{text[:57]}..."


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (" ".join(lines) if lines else type(error).__name__)[:160]
