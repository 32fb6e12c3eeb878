"""RoutingTrace: the one trace format, its reader and its writer.

A trace is a directory: `trace.json` with the facts, and Parquet parts with one row per request (docs/formats.md). Parts are written
under a temporary name and renamed when complete, so a killed writer leaves whole parts only, and a later writer can go on from them.

Shape letters: T tokens (rows of routing), L MoE layers, K top-k, B requests, E experts, W windows of counts.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from profiles.errors import InputError

FORMAT = "semmoe-trace"
VERSION = 1
COUNTS_FILE = "counts.parquet"

PART_VALUES = 64_000_000  # expert ids in one part: what a kill can lose
ROW_GROUP_VALUES = 8_000_000  # expert ids that a reader holds at a time


@dataclass(frozen=True)
class TraceInfo:
    """What trace.json says of the model: enough to place, check and reshard without the model itself."""

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
    made_by: str = ""
    notes: dict[str, Any] = field(default_factory=dict)

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
        if len(self.model_layers) != self.num_layers:
            raise InputError(f"model_layers names {len(self.model_layers)} layers, num_layers is {self.num_layers}")

    @property
    def id_dtype(self) -> np.dtype:
        """The unsigned type of stored ids: uint8 where every value fits."""
        return np.dtype(np.uint8 if self.num_experts + self.empty_slots <= 256 else np.uint16)

    def mismatch(self, other: "TraceInfo") -> str | None:
        """What makes `other` the trace of another model, in words; None where the two agree."""
        for name in ("num_layers", "num_experts", "top_k", "model_layers", "n_group", "topk_group", "kind"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} {theirs} against {mine}"
        return None


@dataclass(frozen=True, eq=False)
class TraceBatch:
    """Consecutive requests: B of them with T rows in all. Row t of request b is starts_B1[b] <= t < starts_B1[b + 1]."""

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


def _schema(id_dtype: np.dtype, weights: bool) -> pa.Schema:
    columns = [
        pa.field("request_id", pa.string(), nullable=False),
        pa.field("domain", pa.string(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32())),
        pa.field("num_prompt_tokens", pa.int32(), nullable=False),
        pa.field("first_position", pa.int32(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("expert_ids", pa.list_(pa.from_numpy_dtype(id_dtype)), nullable=False),
    ]
    return pa.schema(columns + ([pa.field("expert_weights", pa.list_(pa.float16()))] if weights else []))


def write_json(path: Path, value: Any) -> None:
    """Write one JSON document beside `path`, then rename it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def _list_array(pieces: list[np.ndarray | None], dtype: np.dtype) -> pa.ListArray:
    """One list per piece over one flat buffer; a piece of None is a null."""
    lengths = np.array([0 if p is None else p.size for p in pieces], np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    kept = [p.reshape(-1) for p in pieces if p is not None]
    flat = np.concatenate(kept).astype(dtype, copy=False) if kept else np.empty(0, dtype)
    mask = pa.array([p is None for p in pieces]) if len(kept) < len(pieces) else None
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat), mask=mask)


class TraceWriter:
    """Writes requests to a trace directory, part by part. Use as a context manager.

    With `resume` an existing trace of the same model is continued: `request_ids` then holds the requests that are complete, and `add`
    ignores those ids. Several processes may write one trace when each has its own `prefix`; one of them closes it last.
    Leaving the block by an exception keeps complete parts and leaves the trace unfinished.
    """

    def __init__(self, path: str | Path, info: TraceInfo, *, resume: bool = False, prefix: str = "part") -> None:
        self.path, self.info, self._prefix = Path(path), info, prefix
        self._rows: list[dict[str, Any]] = []
        self._values = 0
        self._weights = False
        self.request_ids: set[str] = set()
        self._hashes: dict[str, str] = {}
        if resume and (self.path / "trace.json").exists():
            self._continue()
        else:
            refuse_existing_trace(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot create the trace {self.path}: {error.strerror}") from None
        for leftover in self.path.glob(f".{prefix}-*.tmp"):
            leftover.unlink()
        self._next_part = 1 + max(
            (int(p.stem.rsplit("-", 1)[1]) for p in self.path.glob(f"{prefix}-*.parquet")), default=-1
        )
        self._write_facts(complete=False)

    def _continue(self) -> None:
        facts, info = _read_facts(self.path.as_posix())
        if wrong := info.mismatch(self.info):
            raise InputError(f"{self.path} is the trace of another model or run: {wrong}")
        # The first writer's facts stay, but a slot of a later run may be empty: the stored type must hold that too.
        if self.info.id_dtype != info.id_dtype:
            raise InputError(f"{self.path} stores ids as {info.id_dtype}, this run needs {self.info.id_dtype}")
        self._hashes = {part["file"]: part["sha256"] for part in facts.get("parts", [])}
        for part in sorted(self.path.glob("*.parquet")) if info.kind == "tokens" else []:
            self.request_ids.update(_open_part(part).read(["request_id"]).column(0).to_pylist())

    def add(
        self,
        request_id: str,
        expert_ids_TLK: np.ndarray,
        *,
        domain: str = "",
        token_ids: np.ndarray | None = None,
        num_prompt_tokens: int = 0,
        first_position: int = 0,
        expert_weights_TLK: np.ndarray | None = None,
    ) -> bool:
        """Append one request; False where its id is in the trace already.

        `expert_ids_TLK`: integers [T, L, K]. `token_ids`: the whole known sequence, with row i of the ids at token first_position + i.
        Raises InputError for a wrong shape, an id out of range, or a sequence shorter than its rows.
        """
        if request_id in self.request_ids:
            return False
        ids = np.asarray(expert_ids_TLK)
        info = self.info
        if ids.ndim != 3 or ids.shape[1:] != (info.num_layers, info.top_k):
            raise InputError(
                f"request {request_id}: expert ids have shape {list(ids.shape)}, expected [T, {info.num_layers}, {info.top_k}]"
            )
        largest = info.num_experts - (not info.empty_slots)
        if ids.size and (ids.min() < 0 or ids.max() > largest):
            bad = int(ids.min()) if ids.min() < 0 else int(ids.max())
            raise InputError(f"request {request_id}: expert id {bad} is outside 0..{largest}")
        if token_ids is not None and len(token_ids) < first_position + len(ids):
            raise InputError(
                f"request {request_id}: {len(token_ids)} token ids for rows up to position {first_position + len(ids)}"
            )
        row = {
            "request_id": request_id,
            "domain": domain,
            "token_ids": None if token_ids is None else np.asarray(token_ids, np.int32),
            "num_prompt_tokens": num_prompt_tokens,
            "first_position": first_position,
            "num_tokens": len(ids),
            "expert_ids": ids.astype(info.id_dtype, copy=False),
        }
        if expert_weights_TLK is not None:
            row["expert_weights"] = np.asarray(expert_weights_TLK, np.float16)
            self._weights = True
        self._rows.append(row)
        self.request_ids.add(request_id)
        self._values += ids.size
        if self._values >= PART_VALUES:
            self.flush()
        return True

    def flush(self) -> None:
        """Complete the current part: everything added so far survives a kill."""
        if not self._rows:
            return
        schema = _schema(self.info.id_dtype, self._weights)
        arrays: dict[str, pa.Array] = {}
        for column in schema:
            values = [row.get(column.name) for row in self._rows]
            is_list = pa.types.is_list(column.type)
            arrays[column.name] = (
                _list_array(values, column.type.value_type.to_pandas_dtype())
                if is_list
                else pa.array(values, column.type)
            )
        rows_per_group = max(1, len(self._rows) * ROW_GROUP_VALUES // max(self._values, 1))
        name = f"{self._prefix}-{self._next_part:05d}.parquet"
        temporary = self.path / f".{name}.tmp"
        try:
            pq.write_table(
                pa.table(arrays, schema=schema),
                temporary,
                row_group_size=rows_per_group,
                compression="zstd",
                compression_level=3,
            )
            self._hashes[name] = hash_file(temporary)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise InputError(f"cannot write {self.path / name}: {error.strerror or error}") from None
        temporary.replace(self.path / name)
        self._next_part += 1
        self._rows, self._values = [], 0

    def add_counts(self, windows: list[str], load_WLE: np.ndarray) -> None:
        """Store activations per expert for each window (a step, a pass, an iteration): integers [W, L, E]. Kind "counts" only."""
        load = np.asarray(load_WLE)
        expected = (len(windows), self.info.num_layers, self.info.num_experts)
        if load.shape != expected:
            raise InputError(f"counts have shape {list(load.shape)}, expected {list(expected)}")
        if load.size and load.min() < 0:
            raise InputError(f"counts hold a negative value, {load.min()}")
        column = _list_array(list(load.astype(np.int64)), np.dtype(np.int64))
        temporary = self.path / f".{COUNTS_FILE}.tmp"
        pq.write_table(
            pa.table({"window": pa.array(windows, pa.string()), "load": column}), temporary, compression="zstd"
        )
        self._hashes[COUNTS_FILE] = hash_file(temporary)
        temporary.replace(self.path / COUNTS_FILE)

    def close(self) -> None:
        """Complete the last part and mark the trace as finished."""
        self.flush()
        self._write_facts(complete=True)

    def _write_facts(self, *, complete: bool) -> None:
        parts = []
        for file in sorted(self.path.glob("*.parquet")) if complete else []:
            metadata = _open_part(file).metadata
            requests = 0 if self.info.kind == "counts" else metadata.num_rows
            tokens = (
                0
                if self.info.kind == "counts"
                else int(np.sum(_open_part(file).read(["num_tokens"]).column(0).to_numpy()))
            )
            digest = self._hashes.get(file.name) or hash_file(file)
            parts.append({"file": file.name, "requests": requests, "tokens": tokens, "sha256": digest})
        counts = {"requests": sum(p["requests"] for p in parts), "tokens": sum(p["tokens"] for p in parts)}
        facts = {
            "format": FORMAT,
            "version": VERSION,
            "complete": complete,
            **asdict(self.info),
            "counts": counts,
            "parts": parts,
        }
        try:
            write_json(self.path / "trace.json", facts)
        except OSError as error:
            raise InputError(f"cannot write {self.path / 'trace.json'}: {error.strerror}") from None

    def __enter__(self) -> "TraceWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if kind is None:
            self.close()


def refuse_existing_trace(path: Path, *, resume: bool = False) -> None:
    """Raise InputError where a trace cannot be written to `path`, for callers that want to know before long work."""
    if resume and (path / "trace.json").exists():
        return
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        state = "an unfinished trace" if _is_unfinished(path) else "there already"
        raise InputError(f"{path} is {state}: add to it with --resume, or choose another name")


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open_part(source: Any, name: str | None = None) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(source, memory_map=isinstance(source, Path))
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{name or source} cannot be read as Parquet: {reason}") from None


def _is_unfinished(path: Path) -> bool:
    try:
        return not json.loads((path / "trace.json").read_text(encoding="utf-8"))["complete"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _read_facts(path: str, filesystem: fsspec.AbstractFileSystem | None = None) -> tuple[dict[str, Any], TraceInfo]:
    """trace.json as it is, and as TraceInfo."""
    where = f"{path.rstrip('/')}/trace.json"
    try:
        with (filesystem or fsspec.filesystem("file")).open(where, "rb") as file:
            facts = json.loads(file.read())
    except FileNotFoundError:
        raise InputError(f"{path} is not a trace: it holds no trace.json") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{where} is not JSON: {error}") from None
    except OSError as error:
        raise InputError(f"{where} cannot be read: {error}") from None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise InputError(f"{where} is not a trace: its format is not {FORMAT!r}")
    if facts.get("version") != VERSION:
        raise InputError(f"{where} has version {facts.get('version')}, this semmoe reads version {VERSION}")
    known = {f.name for f in fields(TraceInfo)}
    try:
        values: dict[str, Any] = {name: value for name, value in facts.items() if name in known}
        info = TraceInfo(**{**values, "model_layers": tuple(values["model_layers"])})
    except (TypeError, KeyError) as error:
        raise InputError(f"{where} lacks a fact: {error}") from None
    return facts, info


class RoutingTrace:
    """A finished trace, opened for reading. Nothing but trace.json is read until asked for."""

    def __init__(
        self, path: str, info: TraceInfo, facts: dict[str, Any], filesystem: fsspec.AbstractFileSystem
    ) -> None:
        self.path, self.info, self.facts, self._filesystem = path, info, facts, filesystem

    @classmethod
    def open(cls, path: str | Path) -> "RoutingTrace":
        """Open a trace directory or any URL that fsspec knows (hf://, s3://). Raises InputError where it is none, or unfinished."""
        try:
            filesystem, root = fsspec.core.url_to_fs(str(path))
        except (ImportError, ValueError) as error:
            raise InputError(f"{path} cannot be opened: {error}") from None
        facts, info = _read_facts(root, filesystem)
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
        facts = {k: v for k, v in asdict(self.info).items() if k not in ("made_by", "notes", "embedding")}
        parts = [part["sha256"] for part in self.facts["parts"]]
        return hashlib.sha256(json.dumps([facts, parts], sort_keys=True).encode()).hexdigest()[:16]

    def require_tokens(self, purpose: str) -> None:
        """Raise InputError where the trace holds only counts."""
        if self.info.kind != "tokens":
            raise InputError(f"{self.path} holds only expert loads; {purpose} needs routing per token")

    def _parts(self) -> Iterator[tuple[str, pq.ParquetFile]]:
        for part in self.facts["parts"]:
            name = f"{self.path.rstrip('/')}/{part['file']}"
            local = "file" in np.atleast_1d(self._filesystem.protocol)
            try:
                source = Path(name) if local else self._filesystem.open(name, "rb")
            except OSError as error:
                raise InputError(f"{name} cannot be read: {error}") from None
            file = _open_part(source, name)
            if self.info.kind == "tokens" and file.metadata.num_rows != part["requests"]:
                raise InputError(f"{name} holds {file.metadata.num_rows} requests, trace.json says {part['requests']}")
            yield name, file

    def requests(self) -> pa.Table:
        """One row per request with its small columns: request_id, domain, num_prompt_tokens, first_position, num_tokens."""
        self.require_tokens("a list of requests")
        columns = ["request_id", "domain", "num_prompt_tokens", "first_position", "num_tokens"]
        tables = [_read(file, name, columns) for name, file in self._parts()]
        return pa.concat_tables(tables) if tables else _schema(self.info.id_dtype, False).empty_table().select(columns)

    def batches(self, keep_B: np.ndarray | None = None) -> Iterator[TraceBatch]:
        """Batches of requests in stored order, a row group at a time. `keep_B`: bool [all requests], which to yield.

        The ids of a batch are one array over the file's own buffer: nothing is copied per request.
        """
        self.require_tokens("this step")
        columns = [c for c in _schema(self.info.id_dtype, False).names]
        row = 0
        for name, file in self._parts():
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                keep = None if keep_B is None else keep_B[row : row + count]
                row += count
                if keep is not None and not keep.any():
                    continue
                table = _read(file, name, columns, group)
                if keep is not None and not keep.all():
                    table = table.filter(pa.array(keep))
                yield _batch_of(table, self.info, name)

    def load(self, keep_B: np.ndarray | None = None) -> TraceBatch:
        """All requests (or those of `keep_B`) as one batch. Holds T * L * K ids in memory."""
        return concat_batches(list(self.batches(keep_B)), self.info)

    def load_counts(self) -> tuple[list[str], np.ndarray]:
        """Windows and their activations per expert, int64 [W, L, E], of a trace that holds counts."""
        if self.info.kind != "counts":
            raise InputError(f"{self.path} holds routing per token, not counts per window")
        name, file = next(self._parts())
        table = _read(file, name, ["window", "load"])
        load = table.column("load").combine_chunks().flatten().to_numpy()
        return table.column("window").to_pylist(), load.reshape(-1, self.info.num_layers, self.info.num_experts)


def _read(file: pq.ParquetFile, name: str, columns: list[str], group: int | None = None) -> pa.Table:
    missing = [c for c in columns if c not in file.schema_arrow.names]
    if missing:
        raise InputError(f"{name} lacks the column {missing[0]!r}")
    try:
        return file.read(columns) if group is None else file.read_row_group(group, columns)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{name} is damaged: {str(error).splitlines()[0]}") from None


def _flat_list(table: pa.Table, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Offsets int64 [B + 1] from 0, and the flat values that they cut, of a list column. A null is an empty list."""
    array = table.column(column).combine_chunks()
    lengths = np.asarray(array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False), np.int64)
    return np.concatenate([[0], np.cumsum(lengths)]), array.flatten().to_numpy(zero_copy_only=True)


def _batch_of(table: pa.Table, info: TraceInfo, name: str) -> TraceBatch:
    id_starts, ids = _flat_list(table, "expert_ids")
    row_size = info.num_layers * info.top_k
    num_tokens = table.column("num_tokens").to_numpy().astype(np.int64)
    first = table.column("first_position").to_numpy().astype(np.int64)
    prompt = table.column("num_prompt_tokens").to_numpy().astype(np.int64)
    request_ids = table.column("request_id").to_pylist()
    wrong = np.flatnonzero(np.diff(id_starts) != num_tokens * row_size)
    if wrong.size:
        raise InputError(
            f"{name}, request {request_ids[wrong[0]]}: {np.diff(id_starts)[wrong[0]]} expert ids, "
            f"expected {num_tokens[wrong[0]]} tokens x {info.num_layers} layers x top-{info.top_k}"
        )
    largest = info.num_experts - (not info.empty_slots)
    if ids.size and ids.max() > largest:
        raise InputError(f"{name} holds expert id {ids.max()}, the trace has ids 0..{largest}")
    starts = np.concatenate([[0], np.cumsum(num_tokens)])
    sequence_starts, sequences = _flat_list(table, "token_ids")
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
    )


def concat_batches(batches: list[TraceBatch], info: TraceInfo) -> TraceBatch:
    """One batch of all requests of several, in order."""
    if not batches:
        return _batch_of(_schema(info.id_dtype, False).empty_table(), info, "an empty trace")
    if len(batches) == 1:
        return batches[0]

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(b, name) for b in batches])

    def joined_starts(name: str) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(np.concatenate([np.diff(getattr(b, name)) for b in batches]))])

    return TraceBatch(
        request_ids=[r for b in batches for r in b.request_ids],
        domains=[d for b in batches for d in b.domains],
        starts_B1=joined_starts("starts_B1"),
        sequence_starts_B1=joined_starts("sequence_starts_B1"),
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
