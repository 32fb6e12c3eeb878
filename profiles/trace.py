"""RoutingTrace: the one trace format and its reader (`semmoe.profiles.trace_writer` writes it).

A trace is a directory: `trace.json` with the facts, and Parquet parts with one row per request
(docs/formats.md). It may be read through any URL that fsspec knows.

Shape letters: T tokens (rows of routing), L MoE layers, K top-k, B requests, E experts, W windows
of counts.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from semmoe.profiles.checkpoint import IDENTITY
from semmoe.profiles.document import (
    SHA256,
    anything,
    boolean,
    check_size,
    distinct,
    integer,
    list_of,
    map_of,
    name_of_file,
    null_or,
    one_of,
    read_bounded,
    read_document,
    record,
    text,
    validate,
)
from semmoe.profiles.errors import InputError
from semmoe.profiles.files import inside
from semmoe.profiles.hub.urls import is_url, network, open_url, shown

FORMAT = "semmoe-trace"
VERSION = 1
COUNTS_FILE = "counts.parquet"
REMOTE_WHOLE_BYTES = 1 << 30  # a part behind a URL is read whole and checked up to this size
MAX_LAYERS = 100_000
MOST_SERVING = 1_000_000  # data-parallel ranks of a server

PART = record({"file": name_of_file(ending=".parquet"), "requests": integer(), "tokens": integer(), "sha256": SHA256})
EMBEDDING = record(
    {"checkpoint": text(), "file": name_of_file(), "key": text(), "shape": list_of(integer(1), least=2, most=2)},
    {"revision": null_or(text())},
)


def known_numbering(value: Any, at: str) -> None:
    """Check `numbering`: "model", or the plan whose order ids are in, or were mapped back from."""
    check = one_of("model") if isinstance(value, str) else record({"plan": text(200), "mapped_back": boolean})
    check(value, at)


FACTS = record(
    {
        "complete": boolean,
        "model": text(),
        "num_layers": integer(1, MAX_LAYERS),
        "num_experts": integer(1, 65_535),
        "top_k": integer(1, 65_535),
        "model_layers": distinct(list_of(integer(0, 10 * MAX_LAYERS), most=MAX_LAYERS)),
        "counts": record({"requests": integer(), "tokens": integer()}),
        "parts": distinct(list_of(PART, most=1_000_000), key="file"),
    },
    {
        "num_model_layers": integer(0, 10 * MAX_LAYERS),
        "model_type": text(),
        "vocab_size": integer(),
        "n_group": integer(1, 65_535),
        "topk_group": integer(1, 65_535),
        "empty_slots": boolean,
        "kind": one_of("tokens", "counts"),
        "embedding": null_or(EMBEDDING),
        "checkpoint": null_or(IDENTITY),
        "numbering": null_or(known_numbering),
        "made_by": text(),
        "notes": map_of(anything),
    },
)


@dataclass(frozen=True)
class TraceInfo:
    """What trace.json says of the model: enough to place, check and reshard without the model
    itself."""

    model: str
    num_layers: int  # MoE layers
    num_experts: int
    top_k: int
    model_layers: tuple[int, ...]  # number of each MoE layer in the model, dense layers counted
    num_model_layers: int = 0  # all layers of the model; 0 = unknown
    model_type: str = ""
    vocab_size: int = 0  # 0 = unknown
    n_group: int = 1
    topk_group: int = 1
    empty_slots: bool = False  # ids may hold num_experts: no routed expert in this slot
    kind: str = "tokens"  # "tokens", or "counts": loads per window only
    embedding: dict[str, Any] | None = None  # where the checkpoint keeps the input embedding
    checkpoint: dict[str, Any] | None = None  # which it was: profiles/checkpoint.py
    made_by: str = ""
    notes: dict[str, Any] = field(default_factory=dict)
    numbering: str | dict[str, Any] | None = "model"  # whose expert ids; None: nothing tells

    def __post_init__(self) -> None:
        if min(self.num_layers, self.num_experts, self.top_k) < 1:
            raise InputError(
                f"a trace needs layers, experts and top-k of at least 1, got "
                f"{self.num_layers} layers, {self.num_experts} experts, top-{self.top_k}"
            )
        if self.kind not in ("tokens", "counts"):
            raise InputError(f"trace kind is {self.kind!r}, expected 'tokens' or 'counts'")
        if self.num_experts > 65_535:
            raise InputError(f"{self.num_experts} experts: ids are stored in at most 16 bits (65535)")
        if self.n_group < 1 or self.num_experts % self.n_group:
            raise InputError(f"{self.num_experts} experts do not divide into {self.n_group} routing groups")
        if len(self.model_layers) != self.num_layers:
            raise InputError(f"model_layers names {len(self.model_layers)} layers, num_layers is {self.num_layers}")
        if 0 < self.num_model_layers <= max(self.model_layers):
            last = max(self.model_layers)
            raise InputError(f"model_layers names layer {last}, the model has {self.num_model_layers} layers")

    @property
    def id_dtype(self) -> np.dtype:
        """The unsigned type of stored ids: uint8 where every value fits."""
        return np.dtype(np.uint8 if self.num_experts + self.empty_slots <= 256 else np.uint16)

    def check_numbering(self, where: str) -> None:
        """Raise InputError where the ids are known to be in the order of a plan, not the
        model's."""
        if isinstance(self.numbering, dict) and not self.numbering["mapped_back"]:
            raise InputError(
                f"{where}: numbering in trace.json is the order of plan {self.numbering['plan']}, expected the model's: "
                "trace the checkpoint again, or import with --model CHECKPOINT; both map ids back through its semmoe.json"
            )

    def mismatch(self, other: "TraceInfo") -> str | None:
        """What makes `other` the trace of another model, in words; None where the two agree."""
        for name in ("num_layers", "num_experts", "top_k", "model_layers", "n_group", "topk_group", "kind"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} {theirs} against {mine}"
        return None


@dataclass(frozen=True, eq=False)
class TraceBatch:
    """Consecutive requests: B of them with T rows in all. Row t of request b is starts_B1[b] <=
    t < starts_B1[b + 1]."""

    request_ids: list[str]
    domains: list[str]
    starts_B1: np.ndarray  # int64 [B + 1]
    expert_ids_TLK: np.ndarray  # uint8 or uint16
    token_ids_T: np.ndarray  # int32; -1 where unknown
    is_prompt_T: np.ndarray  # bool
    num_prompt_tokens_B: np.ndarray  # int64
    first_position_B: np.ndarray  # int64
    sequence_starts_B1: np.ndarray  # int64 [B + 1], into sequences
    sequences: np.ndarray  # int32, the whole known sequence of every request, one after the other
    rank_of_B: np.ndarray | None = None  # int64, the DP rank that served; -1: unknown; None: of all
    prompts_apart: "TraceBatch | None" = None  # of generated tokens alone: the prompts of the same requests, if wanted

    @property
    def num_requests(self) -> int:
        return len(self.request_ids)

    @property
    def num_tokens(self) -> int:
        return int(self.starts_B1[-1])

    @property
    def request_of_T(self) -> np.ndarray:
        """Index of each row's request in this batch, int64 [T]."""
        return np.repeat(np.arange(self.num_requests), np.diff(self.starts_B1))

    def sequence(self, b: int) -> np.ndarray:
        """All known token ids of request b, prompt and generated, int32; empty where unknown."""
        return self.sequences[self.sequence_starts_B1[b] : self.sequence_starts_B1[b + 1]]

    def prompt(self, b: int) -> np.ndarray:
        """Token ids of request b's prompt, int32; empty where unknown."""
        return self.sequence(b)[: self.num_prompt_tokens_B[b]]


def trace_schema(id_dtype: np.dtype, weights: bool, served: bool = False) -> pa.Schema:
    columns = [
        pa.field("request_id", pa.string(), nullable=False),
        pa.field("domain", pa.string(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32())),
        pa.field("num_prompt_tokens", pa.int32(), nullable=False),
        pa.field("first_position", pa.int32(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("expert_ids", pa.list_(pa.from_numpy_dtype(id_dtype)), nullable=False),
    ]
    columns += [pa.field("expert_weights", pa.list_(pa.float16()))] if weights else []
    columns += [pa.field("rank", pa.int32()), pa.field("decision", pa.string())] if served else []
    return pa.schema(columns)


def integers(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """The values of a column of integers, one after the other over the column's own buffer where it
    is one piece; a null is 0.

    Not by pyarrow's to_numpy: its first call imports pandas where that is installed, and loses a
    Ctrl-C that comes meanwhile.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if array.null_count:
        array = array.fill_null(0)
    dtype = np.dtype(str(array.type))
    if len(array) == 0:
        return np.empty(0, dtype)
    values = np.frombuffer(array.buffers()[1], dtype, len(array), array.offset * dtype.itemsize)
    values.flags.writeable = False
    return values


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_part(source: Any, name: str | None = None) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(source, memory_map=isinstance(source, Path))
    except (pa.ArrowInvalid, OSError, UnicodeEncodeError) as error:  # the last: a path that is not UTF-8
        reason = str(error).splitlines()[0]
        raise InputError(f"{name or source} cannot be read as Parquet: {reason}") from None


def read_facts(
    path: str, filesystem: fsspec.AbstractFileSystem | None = None, *, url: str = ""
) -> tuple[dict[str, Any], TraceInfo]:
    """trace.json as it is, and as TraceInfo. `url`: what messages call the path in the file
    system."""
    name = url or path
    where = f"{name.rstrip('/')}/trace.json"
    source = filesystem or fsspec.filesystem("file")

    def read() -> bytes:
        if is_local(source):
            return read_bounded(Path(path) / "trace.json")
        with network(name):
            file = f"{path.rstrip('/')}/trace.json"
            check_size(source.size(file) or 0)
            return cast(bytes, source.cat_file(file))

    facts = read_document(read, name, "trace.json", kind="trace", format=FORMAT, version=VERSION)
    validate(facts, FACTS, where)
    for name in ("requests", "tokens"):
        found = sum(part[name] for part in facts["parts"])
        if facts["counts"][name] != found:
            raise InputError(
                f"{where}: counts.{name} is {facts['counts'][name]}, expected {found}, the sum of its parts"
            )
    known = {f.name for f in fields(TraceInfo)}
    values: dict[str, Any] = {"numbering": None} | {name: value for name, value in facts.items() if name in known}
    try:
        return facts, TraceInfo(**{**values, "model_layers": tuple(values["model_layers"])})
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def is_local(filesystem: fsspec.AbstractFileSystem) -> bool:
    """Whether its paths are those of this machine."""
    return "file" in np.atleast_1d(filesystem.protocol)


class RoutingTrace:
    """A finished trace, opened for reading. Nothing but trace.json is read until asked for.

    Fields:
        path: where it lies.
        info: the model (`TraceInfo`: num_layers, num_experts, top_k, model_layers, ...).
        facts: the content of trace.json.
        unchecked: parts that were read and not compared with their SHA-256, and why: the others
            were, before a row of them was used.

    `requests()` is a table of requests, without their routing; `batches()` and `load()` give
    `TraceBatch`es: expert_ids_TLK uint8 or uint16 [T, L, K], token_ids_T int32 [T], rows by
    request. Methods raise InputError for a damaged file. Source: docs/formats.md, "trace".
    """

    def __init__(
        self, path: str, info: TraceInfo, facts: dict[str, Any], filesystem: fsspec.AbstractFileSystem
    ) -> None:
        self.path, self.info, self.facts, self._filesystem = path, info, facts, filesystem
        self._checked: set[str] = set()
        self.unchecked: dict[str, str] = {}

    @classmethod
    def open(cls, path: str | Path) -> "RoutingTrace":
        """Open a trace directory or any URL that fsspec knows (hf://, s3://). Raises InputError
        where it is none, or unfinished."""
        filesystem, root = open_url(str(path))
        facts, info = read_facts(root, filesystem, url=shown(path) if is_url(path) else "")
        if not facts.get("complete"):
            raise InputError(f"{path} is an unfinished trace: complete it with the same command and --resume")
        return cls(root, info, facts, filesystem)

    @property
    def num_requests(self) -> int:
        return int(self.facts["counts"]["requests"])

    @property
    def num_tokens(self) -> int:
        return int(self.facts["counts"]["tokens"])

    @property
    def fingerprint(self) -> str:
        """Hash of the model facts and of every part: equal exactly where the routing is."""
        beside = ("made_by", "notes", "embedding", "checkpoint", "numbering")
        facts = {k: v for k, v in asdict(self.info).items() if k not in beside}
        parts = [part["sha256"] for part in self.facts["parts"]]
        return hashlib.sha256(json.dumps([facts, parts], sort_keys=True).encode()).hexdigest()[:16]

    def require_tokens(self, purpose: str) -> None:
        """Raise InputError where the trace holds only counts."""
        if self.info.kind != "tokens":
            raise InputError(f"{self.path} holds only expert loads; {purpose} needs routing per token")

    def _parts(self, *, whole: bool = True) -> Iterator[tuple[str, pq.ParquetFile]]:
        """Every part, opened. `whole`: its rows are wanted, so that one behind a URL is fetched at
        once and checked; else only what is asked for comes over the line."""
        for part in self.facts["parts"]:
            name = f"{self.path.rstrip('/')}/{part['file']}"
            try:
                with network(name):
                    source = self._checked_source(part, name, whole)
            except OSError as error:
                raise InputError(f"{name} cannot be read: {error.strerror or error}") from None
            file = open_part(source, name)
            if self.info.kind == "tokens" and file.metadata.num_rows != part["requests"]:
                raise InputError(f"{name} holds {file.metadata.num_rows} requests, trace.json says {part['requests']}")
            yield name, file

    def _checked_source(self, part: dict[str, Any], name: str, whole: bool) -> Any:
        """What pyarrow reads a part from, compared with its SHA-256 once in the life of this
        object."""
        content: bytes | None = None
        source: Any
        if is_local(self._filesystem):
            source = inside(Path(self.path), part["file"], f"{self.path.rstrip('/')}/trace.json: file of a part")
        elif whole and (self._filesystem.size(name) or 0) <= REMOTE_WHOLE_BYTES:
            content = cast(bytes, self._filesystem.cat_file(name))
            source = pa.BufferReader(content)
        else:
            source = self._filesystem.open(name, "rb")
        if name in self._checked:
            pass
        elif content is None and not isinstance(source, Path):
            self.unchecked[name] = "it lies behind a URL and was not read whole"
        else:
            digest = hash_file(source) if content is None else hashlib.sha256(content).hexdigest()
            if digest != part["sha256"]:
                raise InputError(f"{name} was changed after it was written: its SHA-256 is not the one in trace.json")
            self._checked.add(name)
            self.unchecked.pop(name, None)
        return source

    def check_parts(self) -> None:
        """Compare every part with its SHA-256 and its count of rows. Raises InputError where one
        differs."""
        for _ in self._parts():
            pass

    def requests(self) -> pa.Table:
        """One row per request with its small columns: request_id, domain, num_prompt_tokens,
        first_position, num_tokens."""
        self.require_tokens("a list of requests")
        columns = ["request_id", "domain", "num_prompt_tokens", "first_position", "num_tokens"]
        tables = [_read(file, name, columns) for name, file in self._parts(whole=False)]
        if not tables:
            return trace_schema(self.info.id_dtype, False).empty_table().select(columns)
        for part, table in zip(self.facts["parts"], tables, strict=True):
            tokens_B = integers(table.column("num_tokens")).astype(np.int64)
            if (tokens_B < 0).any() or tokens_B.sum() != part["tokens"]:
                raise InputError(
                    f"{self.path.rstrip('/')}/{part['file']}: num_tokens adds up to {tokens_B.sum()}, trace.json says {part['tokens']}"
                )
        table = pa.concat_tables(tables)
        if repeated := len(table) - len(table.column("request_id").unique()):
            raise InputError(f"{self.path} is damaged: {repeated} of its {len(table)} requests have the id of another")
        return table

    def batches(self, keep_B: np.ndarray | None = None) -> Iterator[TraceBatch]:
        """Batches of requests in stored order, a row group at a time. `keep_B`: bool [all
        requests], which to yield.

        The ids of a batch are one array over the file's own buffer: nothing is copied per request.
        """
        self.require_tokens("this step")
        columns = [c for c in trace_schema(self.info.id_dtype, False).names]
        row = 0
        for name, file in self._parts():
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                keep = None if keep_B is None else keep_B[row : row + count]
                row += count
                if keep is not None and not keep.any():
                    continue
                served = ["rank"] if "rank" in file.schema_arrow.names else []
                table = _read(file, name, columns + served, group)
                if keep is not None and not keep.all():
                    table = table.filter(pa.array(keep))
                yield _batch_of(table, self.info, name)

    def load(self, keep_B: np.ndarray | None = None) -> TraceBatch:
        """All requests (or those of `keep_B`) as one batch. Holds T * L * K ids in memory."""
        return concat_batches(list(self.batches(keep_B)), self.info)

    def load_counts(self) -> tuple[list[str], np.ndarray]:
        """Windows and their activations per expert, int64 [W, L, E], of a trace that holds
        counts."""
        if self.info.kind != "counts":
            raise InputError(f"{self.path} holds routing per token, not counts per window")
        name, file = next(self._parts(), (COUNTS_FILE, None))
        if file is None:
            raise InputError(f"{self.path} holds no {name}")
        table = _read(file, name, ["window", "load"])
        starts, load = _flat_list(table, "load")
        row_size = self.info.num_layers * self.info.num_experts
        wrong = np.flatnonzero(np.diff(starts) != row_size)
        if wrong.size:
            raise InputError(
                f"{name}, row {wrong[0]}: {np.diff(starts)[wrong[0]]} counts, expected {self.info.num_layers} layers x "
                f"{self.info.num_experts} experts"
            )
        if load.size and load.min() < 0:
            raise InputError(f"{name}: load holds {load.min()}, expected counts from 0")
        windows = table.column("window").to_pylist()
        if not windows:
            raise InputError(f"{name} holds no window of counts")
        if len(set(windows)) < len(windows):
            raise InputError(f"{name}: {len(windows) - len(set(windows))} windows have the name of another")
        if load.sum(dtype=np.float64) >= 2**62:
            raise InputError(
                f"{name}: load adds up to {load.sum(dtype=np.float64):.3g}, expected less than {2**62:.3g}"
            )
        return windows, load.reshape(-1, self.info.num_layers, self.info.num_experts)


# Types of the values of each column; where there are several, the first that holds them.
COLUMN_TYPES = {
    "request_id": ("string",),
    "domain": ("string",),
    "token_ids": ("int32",),
    "num_prompt_tokens": ("int32",),
    "first_position": ("int32",),
    "num_tokens": ("int32",),
    "expert_ids": ("uint8", "uint16"),
    "window": ("string",),
    "load": ("int64",),
    "rank": ("int32",),
}
LISTS = ("token_ids", "expert_ids", "load")
MAY_BE_NULL = ("token_ids", "rank")  # the list, not a value of it; a rank that nobody knows


def _read(file: pq.ParquetFile, name: str, columns: list[str], group: int | None = None) -> pa.Table:
    """Some columns of a part, or of one row group of it. Raises InputError where a column is not of
    its type, or holds nulls or text that is none."""
    for column in columns:
        if file.schema_arrow.names.count(column) != 1:
            raise InputError(f"{name} lacks the column {column!r}, or has it twice")
        kind = file.schema_arrow.field(column).type
        is_list = pa.types.is_list(kind)
        if is_list != (column in LISTS) or str(kind.value_type if is_list else kind) not in COLUMN_TYPES[column]:
            wanted = " or ".join(f"list<{t}>" if column in LISTS else t for t in COLUMN_TYPES[column])
            raise InputError(f"{name}: the column {column!r} is {kind}, expected {wanted}")
    try:
        table = file.read(columns) if group is None else file.read_row_group(group, columns)
        table.select([c for c in columns if c not in LISTS]).validate(full=True)  # that text is UTF-8
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{name} is damaged: {str(error).splitlines()[0]}") from None
    for column in columns:
        values = table.column(column)
        nulls = 0 if column in MAY_BE_NULL else values.null_count
        if column in LISTS:
            nulls += sum(chunk.flatten().null_count for chunk in values.chunks)
        if nulls:
            raise InputError(f"{name} is damaged: the column {column!r} holds {nulls} nulls")
    return pa.table({column: table.column(column) for column in columns})  # parts differ in what may be null


def _flat_list(table: pa.Table, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Offsets int64 [B + 1] from 0, and the flat values that they cut, of a list column. A null
    is an empty list."""
    array = table.column(column).combine_chunks()
    lengths = integers(array.value_lengths()).astype(np.int64)
    return np.concatenate([[0], np.cumsum(lengths)]), integers(array.flatten())


def _batch_of(table: pa.Table, info: TraceInfo, name: str) -> TraceBatch:
    id_starts, ids = _flat_list(table, "expert_ids")
    row_size = info.num_layers * info.top_k
    num_tokens = integers(table.column("num_tokens")).astype(np.int64)
    first = integers(table.column("first_position")).astype(np.int64)
    prompt = integers(table.column("num_prompt_tokens")).astype(np.int64)
    request_ids = table.column("request_id").to_pylist()
    for column, values in (("num_tokens", num_tokens), ("first_position", first), ("num_prompt_tokens", prompt)):
        if values.size and values.min() < 0:
            raise InputError(f"{name} holds a negative {column}")
    wrong = np.flatnonzero(np.diff(id_starts) != num_tokens * row_size)
    if wrong.size:
        raise InputError(
            f"{name}, request {request_ids[wrong[0]]}: {np.diff(id_starts)[wrong[0]]} expert ids, "
            f"expected {num_tokens[wrong[0]]} tokens x {info.num_layers} layers x top-{info.top_k}"
        )
    largest = info.num_experts - (not info.empty_slots)
    if ids.size and ids.max() > largest:
        raise InputError(f"{name} holds expert id {ids.max()}, the trace has ids 0..{largest}")
    rank_of_B = None
    if "rank" in table.column_names:
        column = table.column("rank").fill_null(-1)
        rank_of_B = integers(column).astype(np.int64)
        if rank_of_B.size and not -1 <= rank_of_B.min() <= rank_of_B.max() <= MOST_SERVING:
            raise InputError(f"{name} holds a rank outside -1..{MOST_SERVING}")
    starts = np.concatenate([[0], np.cumsum(num_tokens)])
    sequence_starts, sequences = _flat_list(table, "token_ids")
    _check_sequences(table, np.maximum(first + num_tokens, prompt), np.diff(sequence_starts), sequences, name)
    position_T = np.arange(starts[-1]) - np.repeat(starts[:-1] - first, num_tokens)
    known_T = position_T < np.repeat(np.diff(sequence_starts), num_tokens)
    token_ids = np.full(starts[-1], -1, np.int32)
    source_T = np.repeat(sequence_starts[:-1], num_tokens) + position_T
    token_ids[known_T] = sequences[source_T[known_T]]
    return TraceBatch(
        request_ids=request_ids,
        domains=table.column("domain").to_pylist(),
        starts_B1=starts,
        expert_ids_TLK=ids.reshape(-1, info.num_layers, info.top_k),
        token_ids_T=token_ids,
        is_prompt_T=position_T < np.repeat(prompt, num_tokens),
        num_prompt_tokens_B=prompt,
        first_position_B=first,
        sequence_starts_B1=sequence_starts,
        sequences=sequences,
        rank_of_B=rank_of_B,
    )


def _check_sequences(
    table: pa.Table, needed_B: np.ndarray, length_B: np.ndarray, sequences: np.ndarray, name: str
) -> None:
    """Raise InputError where a known sequence ends before the rows or the prompt of its request, or
    holds what is no token id."""
    known_B = integers(table.column("token_ids").is_valid().cast(pa.uint8())).astype(bool)
    short = np.flatnonzero(known_B & (length_B < needed_B))
    if short.size:
        request = table.column("request_id")[int(short[0])]
        raise InputError(
            f"{name}, request {request}: {length_B[short[0]]} token ids, expected at least {needed_B[short[0]]}"
        )
    if sequences.size and sequences.min() < -1:
        raise InputError(f"{name} holds token id {sequences.min()}, expected ids from 0, or -1 where one is not known")


def concat_batches(batches: list[TraceBatch], info: TraceInfo) -> TraceBatch:
    """One batch of all requests of several, in order."""
    if not batches:
        return _batch_of(trace_schema(info.id_dtype, False).empty_table(), info, "an empty trace")
    if len(batches) == 1:
        return batches[0]

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(b, name) for b in batches])

    def joined_starts(name: str) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(np.concatenate([np.diff(getattr(b, name)) for b in batches]))])

    apart = [b.prompts_apart for b in batches if b.prompts_apart is not None]
    served = [b.rank_of_B for b in batches]
    known = any(rank_of_B is not None for rank_of_B in served)
    ranks = [np.full(b.num_requests, -1) if r is None else r for b, r in zip(batches, served, strict=True)]
    return TraceBatch(
        rank_of_B=np.concatenate(ranks) if known else None,
        request_ids=[r for b in batches for r in b.request_ids],
        domains=[d for b in batches for d in b.domains],
        starts_B1=joined_starts("starts_B1"),
        sequence_starts_B1=joined_starts("sequence_starts_B1"),
        prompts_apart=concat_batches(apart, info) if len(apart) == len(batches) else None,
        **{
            name: joined(name)
            for name in (
                "expert_ids_TLK",
                "token_ids_T",
                "is_prompt_T",
                "num_prompt_tokens_B",
                "first_position_B",
                "sequences",
            )
        },
    )
