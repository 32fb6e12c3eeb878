"""TraceWriter: writes a trace part by part, so that whatever stops it, whole parts remain and a
later writer can go on from them.

Parts are written under a temporary name and renamed when complete; trace.json says whether the
trace is finished.

Shape letters: T tokens (rows of routing), L MoE layers, K top-k, E experts, W windows of counts.
"""

import os
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from semmoe.profiles.checkpoint import same_routers
from semmoe.profiles.document import indented, parse_json, read_bounded
from semmoe.profiles.errors import InputError
from semmoe.profiles.files import Lock, new_file, refuse_held, write_file
from semmoe.profiles.numbering import Relabelling
from semmoe.profiles.trace import (
    COUNTS_FILE,
    FORMAT,
    VERSION,
    TraceInfo,
    hash_file,
    integers,
    open_part,
    read_facts,
    trace_schema,
)

PART_VALUES = 64_000_000  # expert ids in one part: what a kill can lose
TRACE_TEMPORARY = ".trace.json.tmp"  # as new_file calls it
LOCK = ".lock"  # in the trace: whoever holds it writes there
ROW_GROUP_VALUES = 8_000_000  # expert ids that a reader holds at a time


def _list_array(pieces: list[np.ndarray | None], dtype: np.dtype) -> pa.ListArray:
    """One list per piece over one flat buffer; a piece of None is a null."""
    lengths = np.array([0 if p is None else p.size for p in pieces], np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    kept = [p.reshape(-1) for p in pieces if p is not None]
    flat = np.concatenate(kept).astype(dtype, copy=False) if kept else np.empty(0, dtype)
    mask = pa.array([p is None for p in pieces]) if len(kept) < len(pieces) else None
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat), mask=mask)


class Served(NamedTuple):
    """Where a server ran a request: its data-parallel rank, -1 for unknown; and why there, ""
    for unknown (semmoe.runtime.engines.band.DECISIONS)."""

    rank: int
    decision: str = ""


class TraceWriter:
    """Writes requests to a trace directory, part by part. Use as a context manager.

    With `resume` an existing trace of the same model is continued: `request_ids` then holds the
    requests that are complete, and `add` ignores those ids. Several processes may write one trace
    when each has its own `prefix`; one of them begins first, closes it last, and holds its lock:
    the others are given `lock=False`. Leaving the block by an exception keeps complete parts and
    leaves the trace unfinished; after an InputError a trace without parts is taken away.
    Ids of a model that is `relabelled` are mapped back to the numbering of its source.
    """

    def __init__(
        self,
        path: str | Path,
        info: TraceInfo,
        *,
        resume: bool = False,
        prefix: str = "part",
        lock: bool = True,
        relabelled: Relabelling | None = None,
    ) -> None:
        self._old_LE1 = None
        if relabelled is not None:
            self._old_LE1 = relabelled.orders(info.model_layers, info.num_experts)
            info = replace(info, numbering=relabelled.numbering, checkpoint=relabelled.original(info.checkpoint))
        self.path, self.info, self._prefix = Path(path), info, prefix
        self._rows: list[dict[str, Any]] = []
        self._values = 0
        self._weights = self._served = False
        self.request_ids: set[str] = set()
        self._hashes: dict[str, str] = {}
        self.facts_before: dict[str, Any] = {}  # trace.json of a trace that is continued
        refuse_existing_trace(self.path, resume=resume, locked=not lock)
        self._made = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot create the trace {self.path}: {error.strerror}") from None
        self._lock = Lock(self.path, self.path / LOCK) if lock else None
        try:
            if resume and (self.path / "trace.json").exists():
                self._continue()
            else:  # another run may have written one before this one held the lock
                refuse_existing_trace(self.path, locked=lock)
            for leftover in (self.path / TRACE_TEMPORARY, *self.path.glob(f".{prefix}-*.tmp")):
                if leftover.is_file() and not leftover.is_symlink():
                    leftover.unlink()
            self._next_part = 1 + max(
                (int(p.stem.rsplit("-", 1)[1]) for p in self.path.glob(f"{prefix}-*.parquet")), default=-1
            )
            if lock:
                self._write_facts(complete=False)
        except BaseException:
            self.release()
            raise

    def _continue(self) -> None:
        facts, info = read_facts(self.path.as_posix())
        self.facts_before = facts
        if wrong := info.mismatch(self.info):
            raise InputError(f"{self.path} is the trace of another model or run: {wrong}")
        if same_routers(info.checkpoint, self.info.checkpoint) is False:
            raise InputError(f"{self.path} is the trace of another checkpoint: its router weights are others")
        # The first writer's facts stay, but a slot of a later run may be empty: the stored type
        # must hold that too.
        if self.info.id_dtype != info.id_dtype:
            raise InputError(f"{self.path} stores ids as {info.id_dtype}, this run needs {self.info.id_dtype}")
        self.info = replace(self.info, numbering=self._joint_numbering(info))
        self._hashes = {part["file"]: part["sha256"] for part in facts["parts"]}
        for name, digest in self._hashes.items():
            if (self.path / name).is_file() and hash_file(self.path / name) != digest:
                raise InputError(
                    f"{self.path / name} was changed after it was written: its SHA-256 is not the one in trace.json"
                )
        for part in sorted(self.path.glob("*.parquet")) if info.kind == "tokens" else []:
            self.request_ids.update(open_part(part).read(["request_id"]).column(0).to_pylist())

    def _joint_numbering(self, before: TraceInfo) -> str | dict[str, Any] | None:
        """The numbering of a trace that is continued. Raises InputError where its rows may be in
        another one than those to come."""
        before.check_numbering(str(self.path))
        mine, theirs = self.info.numbering, before.numbering
        mapped = [side for side in (mine, theirs) if isinstance(side, dict)]
        if mapped and None in (mine, theirs):
            raise InputError(
                f"{self.path} cannot be added to: ids of one side are mapped back from plan {mapped[0]['plan']}, "
                "of the other nothing tells the numbering (name the checkpoint, or choose another name)"
            )
        return theirs if isinstance(theirs, dict) or mine == "model" else mine

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
        served: Served | None = None,
    ) -> bool:
        """Append one request; False where its id is in the trace already.

        Parameters:
            request_id: unique in the trace.
            expert_ids_TLK: integers, num_experts where a slot is empty.
            domain: what the request is about, "" where unknown.
            token_ids: the whole known sequence, integers, with row i of the ids at token
                first_position + i; None where unknown.
            num_prompt_tokens: how many tokens of the sequence are its prompt.
            first_position: place of the first row in the sequence.
            expert_weights_TLK: weights of the chosen experts, kept as float16.
            served: where a server ran it, if known.

        Raises InputError for a wrong shape, an id out of range, or a sequence shorter than its rows
        or its prompt.
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
        if self._old_LE1 is not None:
            ids = self._old_LE1[np.arange(info.num_layers)[:, None], ids]
        end = first_position + len(ids)
        if token_ids is not None and len(token_ids) < max(end, num_prompt_tokens):
            raise InputError(
                f"request {request_id}: {len(token_ids)} token ids for rows up to position {end}, prompt of {num_prompt_tokens}"
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
        if served is not None:
            row |= {"rank": served.rank if served.rank >= 0 else None, "decision": served.decision or None}
            self._served = True
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
        schema = trace_schema(self.info.id_dtype, self._weights, self._served)
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
        table = pa.table(arrays, schema=schema)
        self._write_part(name, table, row_group_size=rows_per_group, compression_level=3)
        self._next_part += 1
        self._rows, self._values = [], 0

    def add_counts(self, windows: list[str], load_WLE: np.ndarray) -> None:
        """Store activations per expert for each window (a step, a pass, an iteration): integers [W,
        L, E]. Kind "counts" only.

        A trace that is continued keeps its windows; of the new ones those are added whose names it
        does not have.
        """
        load = np.asarray(load_WLE)
        expected = (len(windows), self.info.num_layers, self.info.num_experts)
        if load.shape != expected:
            raise InputError(f"counts have shape {list(load.shape)}, expected {list(expected)}")
        if load.size and load.min() < 0:
            raise InputError(f"counts hold a negative value, {load.min()}")
        if self._old_LE1 is not None:
            new_of_old_LE = np.argsort(self._old_LE1[:, :-1], axis=1)
            load = np.take_along_axis(load, new_of_old_LE[None], axis=2)
        column = _list_array(list(load.astype(np.int64)), np.dtype(np.int64))
        table = pa.table({"window": pa.array(windows, pa.string()), "load": column})
        if (self.path / COUNTS_FILE).exists():
            before = open_part(self.path / COUNTS_FILE).read()
            known = set(before.column("window").to_pylist())
            table = pa.concat_tables([before.cast(table.schema), table.filter([w not in known for w in windows])])
        self._write_part(COUNTS_FILE, table)

    def _write_part(self, name: str, table: pa.Table, **options: Any) -> None:
        with new_file(self.path / name, lock=self._lock) as file:
            pq.write_table(table, file, compression="zstd", **options)
        self._hashes[name] = hash_file(self.path / name)

    def complete(self) -> None:
        """Complete the last part and mark the trace as finished; more may be added."""
        self.flush()
        self._write_facts(complete=True)

    def close(self) -> None:
        """`complete`, and let others write the trace."""
        self.complete()
        self.release()

    def release(self) -> None:
        """Let others write the trace."""
        if self._lock is not None:
            self._lock.release()

    def _remove_if_empty(self) -> None:
        """Take away a trace of no part that this writer began; still under its lock."""
        if not self.facts_before and not any(self.path.glob("*.parquet")):
            with suppress(OSError):
                (self.path / "trace.json").unlink()

    def _write_facts(self, *, complete: bool) -> None:
        parts = []
        for file in sorted(self.path.glob("*.parquet")) if complete else []:
            metadata = open_part(file).metadata
            requests = 0 if self.info.kind == "counts" else metadata.num_rows
            tokens = (
                0
                if self.info.kind == "counts"
                else int(np.sum(integers(open_part(file).read(["num_tokens"]).column(0))))
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
        write_file(self.path / "trace.json", indented(facts), lock=self._lock)

    def __enter__(self) -> "TraceWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        try:
            if kind is None:
                self.close()
            elif issubclass(kind, InputError):
                self._remove_if_empty()
        finally:
            self.release()
        if kind is not None and self._made:
            with suppress(OSError):  # not empty: something was written
                self.path.rmdir()


def refuse_existing_trace(path: Path, *, resume: bool = False, locked: bool = False) -> None:
    """Raise InputError where a trace cannot be written to `path`, for callers that want to know
    before long work. `locked`: this run holds its lock."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"{path} is not UTF-8, the names of Parquet files must be: choose another name") from None
    if not locked:
        refuse_held(path, path / LOCK)
    if resume and (path / "trace.json").exists():
        return
    if path.is_symlink() and not path.exists():
        raise InputError(f"cannot create the trace {path}: it is a link to nothing ({os.readlink(path)})")
    if path.exists() and not (path.is_dir() and _holds_nothing(path)):
        state = "an unfinished trace" if _is_unfinished(path) else "there already"
        raise InputError(f"{path} is {state}: add to it with --resume, or choose another name")
    above = next(p for p in (path.absolute(), *path.absolute().parents) if os.path.lexists(p))
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = "cannot be written to" if above.is_dir() else "is no directory"
        raise InputError(f"cannot create the trace {path}: {above} {why}")


def _holds_nothing(path: Path) -> bool:
    """Whether a directory holds at most what a run leaves that was killed before its first part."""
    temporary = {p.name for p in path.glob(".*.tmp")} if _is_unfinished(path) else {TRACE_TEMPORARY}
    facts = {"trace.json"} if _is_unfinished(path) else set()
    return {p.name for p in path.iterdir()} <= {LOCK, *temporary, *facts}


def _is_unfinished(path: Path) -> bool:
    try:
        return not parse_json(read_bounded(path / "trace.json"))["complete"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
