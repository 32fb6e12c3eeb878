"""Settings of a checkpoint that name single experts (those left unquantised, say) follow them to
their new numbers: plain names, regular expressions, wildcards, alternatives.

What a pattern means is asked of the pattern: it is tried on the module names of all experts. One
that treats the experts of a layer alike stays; another is rewritten where it spells a layer and the
numbers of experts, and the result must match an expert's new name where it matched the old one.
Where no such rewriting is found the reshard is refused, with the key.

Shape letters: N names of modules.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import translate
from functools import cached_property
from typing import Any

import numpy as np

from semmoe.profiles.document import parse_json
from semmoe.profiles.errors import InputError
from semmoe.profiles.files import shortened
from semmoe.runtime.reshard.keys import Key, Role, is_side

Orders = Mapping[int, np.ndarray]

SETTINGS = re.compile(r"^(?!tokenizer|special_tokens|.*processor|generation)[^/]*(?:config|quant|recipe|modelopt)[^/]*")
ENDINGS = (".json", ".yaml", ".yml")
NAMED_EXPERT = re.compile(
    r"(?P<before>[\w.]*(?:layers|blocks|h)\.(?P<layer>\d+)\.(?!self_attention\.)(?:\w+\.)?experts\.)(?P<expert>\d+)(?![\w*])"
)
PREFIX = re.compile(r"^(?:re:|[+-]:)")  # compressed-tensors; GPTQ's dynamic
PLAIN = re.compile(r"[\w./ ,:@-]*")
BARE_EXPERT = re.compile(r"(?:^|\.)experts?\.\d")
LISTED = re.compile(r"quant|ignore|exclude|not_convert|targets|dynamic|skip|extra_config|modules|layers", re.IGNORECASE)
# A stack of layers or of experts in a pattern, and what stands for the number after it.
NUMBERS = re.compile(r"(?P<what>layers|blocks|\bh|experts)(?:\\?\.|\[\.\])(?P<atom>\((?:\?:)?[\d|]+\)|\[[\d-]+\]|\d+)")
JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
YAML_STRING = re.compile(
    r"""(?:^|(?<=[\s\[,:]))(?:"(?:[^"\\\n]|\\.)*"|'(?:[^'\n]|'')*'|(?:re:|[+-]:)\S+?(?=[\],]*\s))"""
)
STACKS = ("model.layers", "model.language_model.layers", "language_model.model.layers")
BLOCKS = ("mlp", "block_sparse_moe", "feed_forward", "mixer", "moe")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

Matcher = Callable[[str], object]


@dataclass(frozen=True, eq=False)
class ExpertNames:
    """The modules of the experts that a permutation renames."""

    orders: Orders
    modules: tuple[tuple[str, str, str], ...]  # stack, what stands before the number, what after: "" or ".up_proj"

    @classmethod
    def of(cls, keys: Mapping[str, Key], orders: Orders) -> "ExpertNames":
        """As the tensors of a checkpoint are named; as is usual where its experts are stacked."""
        found: dict[tuple[str, str, str], None] = {}
        for name, key in keys.items():
            if key.role is Role.EXPERT:
                before = name[len(f"{key.stack}.{key.layer}.") : key.start]
                for end in ("", "." + name[key.end + 1 :].partition(".")[0], name[key.end :]):
                    found[key.stack, before, end] = None
        return cls(orders, tuple(found) or _usual())

    @cached_property
    def known(self) -> tuple[list[str], np.ndarray]:
        """Names, and for each the place of the name that it gets."""
        return self._names(self.modules)

    @cached_property
    def usual(self) -> tuple[list[str], np.ndarray]:
        """The same in the spellings of engines and of Transformers, which settings may use."""
        return self._names(_usual())

    def _names(self, modules: Iterable[tuple[str, str, str]]) -> tuple[list[str], np.ndarray]:
        names, places = [], []
        for stack, before, after in modules:
            for layer, order_E in self.orders.items():
                places.append(len(names) + np.argsort(order_E))
                names += [f"{stack}.{layer}.{before}{expert}{after}" for expert in range(len(order_E))]
        return names, np.concatenate(places) if places else np.zeros(0, np.int64)

    def renamed(self, text: str) -> str:
        """A text with plain names of experts, renamed."""

        def rename(found: re.Match[str]) -> str:
            layer, expert = int(found["layer"]), int(found["expert"])
            if is_side(found["before"]) or layer not in self.orders or expert >= len(self.orders[layer]):
                return found[0]
            return f"{found['before']}{new_number(self.orders[layer], expert)}"

        return NAMED_EXPERT.sub(rename, text)


def _usual() -> tuple[tuple[str, str, str], ...]:
    ends = ("", *(f".{projection}" for projection in PROJECTIONS))
    return tuple((stack, f"{block}.experts.", end) for stack in STACKS for block in BLOCKS for end in ends)


def new_number(order_E: np.ndarray, expert: int) -> int:
    """The number that an expert gets."""
    return int(np.flatnonzero(order_E == expert)[0])


def names_settings(name: str) -> bool:
    """Whether a file of a checkpoint may hold settings that name experts."""
    return bool(SETTINGS.match(name)) and name.endswith(ENDINGS)


def relabelled_settings(text: str, name: str, experts: ExpertNames) -> str:
    """A file of settings whose names of experts are those after the permutation.

    Raises InputError with file and key where a pattern cannot be rewritten.
    """
    if name.endswith(".json"):
        keys = paths_of_strings(text)

        def rewrite(found: re.Match[str]) -> str:
            try:
                old = json.loads(found[0], strict=False)
            except ValueError:
                return experts.renamed(found[0])
            new = rewritten(old, keys.get(old, ""), name, experts)
            return found[0] if new == old else json.dumps(new, ensure_ascii=found[0].isascii())

        return JSON_STRING.sub(rewrite, text)

    def rewrite_yaml(found: re.Match[str]) -> str:
        quote = found[0][0] if found[0][0] in "\"'" else ""
        old = found[0].strip(quote) if quote else found[0]
        if quote == '"':
            old = old.replace("\\\\", "\\")
        new = rewritten(old, "a list", name, experts)
        if new == old:
            return found[0]
        return f"{quote}{new.replace(chr(92), chr(92) * 2) if quote == chr(34) else new}{quote}"

    parts, place = [], 0
    for found in YAML_STRING.finditer(text):
        parts += [experts.renamed(text[place : found.start()]), rewrite_yaml(found)]
        place = found.end()
    return "".join([*parts, experts.renamed(text[place:])])


def paths_of_strings(text: str) -> dict[str, str]:
    """The key under which a string of a JSON text stands, the first of each."""
    paths: dict[str, str] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                paths.setdefault(key, path)
                walk(inner, f"{path}.{key}" if path else key)
        elif isinstance(value, list):
            for inner in value:
                walk(inner, path)
        elif isinstance(value, str):
            paths.setdefault(value, path)

    try:
        walk(parse_json(text), "")
    except (ValueError, RecursionError):
        return {}
    return paths


def rewritten(setting: str, key: str, name: str, experts: ExpertNames) -> str:
    """One string of the settings after the permutation."""
    prefix = found[0] if (found := PREFIX.match(setting)) else ""
    pattern = setting[len(prefix) :]
    if not prefix and PLAIN.fullmatch(pattern):
        if not BARE_EXPERT.search(pattern):
            return setting
        new = experts.renamed(pattern)
        if new != pattern or NAMED_EXPERT.search(pattern):
            return new
        readings: list[Callable[[str], Matcher]] = [_part_of_name]
    elif prefix:
        readings = [_regex_match, _regex_search]
    elif "expert" in pattern:
        readings = [_wildcard, _regex_match, _regex_search]
    elif LISTED.search(key):
        readings = [_wildcard, _regex_match]
    else:
        return setting
    for names, place_N in (experts.known, experts.usual):
        before = [matches(reading(pattern), names) for reading in readings]
        if not any(match_N.any() for match_N in before):
            continue
        for new in (pattern, *candidates(pattern, experts.orders)):
            after = [matches(reading(new), names) for reading in readings]
            if all((a[place_N] == b).all() for a, b in zip(after, before, strict=True)):
                return prefix + new
        raise InputError(
            f"{name}: {key or 'a setting'} names experts by {shortened(setting)}, which cannot be rewritten for their "
            "new numbers: name these modules one by one, or use --layout ranks"
        )
    return setting


def matches(matcher: Matcher, names: list[str]) -> np.ndarray:
    """bool [N]: which names a pattern matches."""
    return np.fromiter((bool(matcher(name)) for name in names), bool, len(names))


def _nothing(_: str) -> bool:
    return False


def _compiled(pattern: str) -> re.Pattern[str] | None:
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return None


def _regex_match(pattern: str) -> Matcher:
    compiled = _compiled(pattern)
    return compiled.match if compiled else _nothing


def _regex_search(pattern: str) -> Matcher:
    compiled = _compiled(pattern)
    return compiled.search if compiled else _nothing


def _wildcard(pattern: str) -> Matcher:
    compiled = _compiled(translate(pattern))
    return compiled.match if compiled else _nothing


def _part_of_name(pattern: str) -> Matcher:
    part = f".{pattern.strip('.')}."
    return lambda name: part in f".{name}."


def candidates(pattern: str, orders: Orders) -> Iterator[str]:
    """The pattern with the numbers of its experts replaced, where a single layer stands before
    them."""
    parts, place, layers = [], 0, []
    for found in NUMBERS.finditer(pattern):
        if found["what"] != "experts":
            layers = [layer for layer in orders if re.fullmatch(found["atom"], str(layer))]
        elif len(layers) == 1:
            parts += [pattern[place : found.start("atom")], new_atom(found["atom"], orders[layers[0]])]
            place = found.end("atom")
    if parts:
        yield "".join([*parts, pattern[place:]])


def new_atom(atom: str, order_E: np.ndarray) -> str:
    """What stands for the new numbers of the experts that `atom` stands for: "3", "(3|5)",
    "[35]", "[3-5]"."""
    number_E = np.argsort(order_E)
    if atom[0] != "[":
        return re.sub(r"\d+", lambda n: str(number_E[int(n[0])]) if int(n[0]) < len(number_E) else n[0], atom)
    new = sorted(int(number_E[expert]) for expert in range(len(number_E)) if re.fullmatch(atom, str(expert)))
    if all(number < 10 for number in new):
        return f"[{''.join(map(str, new))}]"
    return f"(?:{'|'.join(map(str, new))})"
