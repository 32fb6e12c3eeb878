"""JsonRecord: a frozen dataclass whose fields are the keys of a JSON object, written and read back.

The annotations are the format: reading checks every key and type by them and says where a value
does not fit, so that a damaged file is one line and no later surprise.
"""

from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Self, get_args, get_origin, get_type_hints

NUMBERS = {float: (int, float), int: (int,), str: (str,), bool: (bool,)}


class JsonRecord:
    """Base of dataclasses that are JSON objects. A field whose default is None is left out where it
    is None."""

    def to_json(self) -> dict[str, Any]:
        """The object: lists, dictionaries, numbers and text."""
        return _plain(self)

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """The record of an object. Keys that the record does not know are left out. Raises
        ValueError, with the place, where a key lacks or a value is of another type."""
        return _read(cls, value, "")


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        named = ((f, getattr(value, f.name)) for f in fields(value))
        return {_key(f.name): _plain(found) for f, found in named if found is not None or f.default is not None}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return {key: _plain(v) for key, v in value.items()} if isinstance(value, dict) else value


def _key(name: str) -> str:
    """Key of a field: a word that Python keeps for itself is written with a line behind it."""
    return name.removesuffix("_")


@cache
def _types(kind: type) -> dict[str, tuple[Any, bool]]:
    """Type of each field, and whether it may lack."""
    hints = get_type_hints(kind)
    return {f.name: (hints[f.name], f.default is not MISSING or f.default_factory is not MISSING) for f in fields(kind)}


def _read(kind: Any, value: Any, where: str) -> Any:
    """The value as one of that type; `where`: its place in the document."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is UnionType:
        if value is None and NoneType in parts:
            return None
        return _read_first([part for part in parts if part is not NoneType], value, where)
    if origin in (list, tuple):
        if not isinstance(value, list) or (origin is tuple and len(value) != len(parts)):
            raise ValueError(f"{where or 'the value'} is no list{f' of {len(parts)}' if origin is tuple else ''}")
        kinds = parts if origin is tuple else parts * len(value)
        return origin(_read(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict or is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where or 'the value'} is no object")
        if origin is dict:
            return {key: _read(parts[1], v, f"{where}.{key}") for key, v in value.items()}
        known = _types(kind)
        if lacking := [_key(name) for name, (_, optional) in known.items() if not optional and _key(name) not in value]:
            raise ValueError(f"{where or 'the object'} lacks {', '.join(map(repr, lacking))}")
        dot = f"{where}." if where else ""
        present = {name: (k, _key(name)) for name, (k, _) in known.items() if _key(name) in value}
        make: Any = kind
        return make(**{name: _read(k, value[key], dot + key) for name, (k, key) in present.items()})
    if not isinstance(value, NUMBERS[kind]) or (kind is not bool and isinstance(value, bool)):
        raise ValueError(f"{where or 'the value'} is {str(value)[:40]!r}, expected {kind.__name__}")
    return value


def _read_first(kinds: list[Any], value: Any, where: str) -> Any:
    """The value as the first of several types that it fits; the last says why it fits none."""
    for kind in kinds[:-1]:
        try:
            return _read(kind, value, where)
        except ValueError:
            continue
    return _read(kinds[-1], value, where)
