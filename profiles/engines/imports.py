"""Routing that serving engines wrote, made into a trace: `semmoe trace --from KIND FILE... -o
TRACE`.

Every kind of file has a reader (KINDS) that yields requests or loads as the engine wrote them.
Without a config.json the files are read twice: a first pass finds the number of experts, the top-k
and the dense layers, and checks every line before anything is written. Both passes stream: memory
does not grow with the number of requests, but for their ids.

Shape letters: T rows, L MoE layers, K top-k, E experts, W windows.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from semmoe.profiles.checkpoint import checkpoint_identity
from semmoe.profiles.config import moe_facts, read_config
from semmoe.profiles.demo.paths import demo_model_path
from semmoe.profiles.engines.columns import (
    Layout,
    Survey,
    find_layout,
    find_rows,
    kept_runs,
    parse_layers,
    survey_requests,
)
from semmoe.profiles.engines.loads import read_eplb, read_trtllm
from semmoe.profiles.engines.megatron import read_megatron
from semmoe.profiles.engines.recorder import read_recorder
from semmoe.profiles.engines.records import EngineLoad, EngineRequest, LeftOut, Reader
from semmoe.profiles.engines.responses import read_sglang, read_vllm
from semmoe.profiles.errors import InputError
from semmoe.profiles.numbering import Relabelling, config_folder, find_relabelling
from semmoe.profiles.trace import RoutingTrace, TraceInfo
from semmoe.profiles.trace_writer import TraceWriter, refuse_existing_trace

KINDS: dict[str, Reader] = {
    "sglang": read_sglang,
    "vllm": read_vllm,
    "sglang-recorder": read_recorder,
    "trtllm": read_trtllm,
    "megatron": read_megatron,
    "eplb": read_eplb,
}
REPETITION = ("drop", "keep")

DUMMY_ROWS = "warm-up rows"
EMPTY_REQUESTS = "requests without rows"
LOOPS = "requests that fell into a loop"
KEEP_LOOPS = " (--repetition keep keeps them)"
MOST_LOAD = 1 << 48  # of an expert in a window: sums of any number of layers stay in 64 bits
ZERO_WINDOWS = "windows without activations"


@dataclass(frozen=True)
class ImportOptions:
    """What of the files is imported, and how.

    Fields:
        model_config: config.json, checkpoint or hub id; it gives experts, top-k, groups and dense
            layers, and saves a pass.
        dense_layers: `0,1` or `0-2`, in place of what the config says or the rows show.
        repetition: "drop" leaves out requests marked as loops, "keep" does not.
        domain: the domain of every request, in place of the file's.
        max_tokens: rows in all; the last request is cut there.
        resume: go on with an unfinished trace, skipping the requests that it holds.
        strict: stop at the first record that cannot be used, in place of leaving it out.
        made_by: the command, for trace.json.

    Raises InputError for a value that cannot be. Source: profiles/engines/imports.py.
    """

    model_config: str | None = None
    dense_layers: str | None = None
    repetition: str = "keep"
    domain: str | None = None
    max_tokens: int | None = None
    resume: bool = False
    strict: bool = False
    made_by: str = ""

    def __post_init__(self) -> None:
        if self.repetition not in REPETITION:
            raise InputError(f"repetition is {self.repetition!r}, expected one of {', '.join(REPETITION)}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InputError(f"max-tokens is {self.max_tokens}, expected at least 1")


class ImportSummary(NamedTuple):
    """What an import did; `notes` are lines for people."""

    requests: int  # in the finished trace; 0 for kind "counts"
    tokens: int
    layers: int
    dropped: dict[str, int]  # what was left out, by reason: for people too
    notes: list[str]


@dataclass(frozen=True, eq=False)
class Import:
    """One import under way: what it was asked for, what is known of the model, and what it will
    tell."""

    out: Path
    options: ImportOptions
    facts: dict[str, Any] | None  # of the model's config.json
    dense: set[int] | None  # model layers that do not route, as the user says
    origin: dict[str, Any]
    dropped: LeftOut
    relabelled: Relabelling | None = None  # the order of the checkpoint that the server ran
    notes: list[str] = field(default_factory=list)

    def trace_info(self, own: dict[str, Any], *, model: str = "", **more: Any) -> TraceInfo:
        """The facts of the trace: those of the model, and over them `own`, as the files show
        them."""
        model = _model_name(self.options.model_config) or model or "unknown"
        notes = {**self.origin, **more.pop("notes", {})}
        if self.relabelled is not None:
            notes["mapped_back"] = self.relabelled.note
            self.notes.append(self.relabelled.note)
        return TraceInfo(
            model=model,
            made_by=self.options.made_by,
            notes=notes,
            checkpoint=_checkpoint(self.options.model_config),
            numbering="model" if self.options.model_config else None,
            **more,
            **{**(self.facts or {}), **own},
        )

    def note_dense(self, num_dense: int, num_kept: int) -> None:
        if num_dense and self.dense is None:
            self.notes.append(f"{num_dense} dense layers left out, {num_kept} route")


def import_trace(kind: str, files: list[Path], out: Path, options: ImportOptions = ImportOptions()) -> ImportSummary:
    """Write the trace `out` of files of one kind of engine.

    Ids that come again get the suffix #2, #3, ... Raises InputError with file, line and value for
    what cannot be.
    """
    if kind not in KINDS:
        raise InputError(f"unknown kind {kind!r}: expected one of {', '.join(KINDS)}")
    if not files:
        raise InputError(f"no files to import as {kind}")
    refuse_existing_trace(out, resume=options.resume)  # the writer does too, but after the first pass over the files
    _refuse_pipes(files)
    facts = relabelled = None
    if options.model_config is not None:
        facts = moe_facts(read_config(config_folder(options.model_config)))
        relabelled = find_relabelling(options.model_config)
    dense = None if options.dense_layers is None else parse_layers(options.dense_layers)
    origin = {"from": kind, "files": [file.name for file in files]}
    job = Import(out, options, facts, dense, origin, LeftOut(strict=options.strict), relabelled)
    reader, looked_at = KINDS[kind], LeftOut(strict=options.strict)
    records = reader(files, facts, looked_at)
    first = next(records, None)
    if first is None and looked_at.first is not None:
        alone = looked_at.total() == 1
        raise InputError(f"{looked_at.first}" + ("" if alone else f"; nothing is left to import: {looked_at}"))
    if first is None:
        raise InputError(f"{files[0]} holds no record of kind {kind}")
    if isinstance(first, EngineLoad):
        if options.domain is not None or options.max_tokens is not None:
            raise InputError(f"{first.where} holds loads, not requests: no domain or max-tokens applies")
        return _import_loads(job, chain([first], records))  # pyright: ignore
    seen: Iterable[Any] = chain([first], records)
    survey = survey_requests(seen if facts is None else islice(seen, 1))
    return _import_requests(job, survey, reader(files, facts, job.dropped))  # pyright: ignore


def _refuse_pipes(files: list[Path]) -> None:
    """A file is read twice, to find what is in it and to write it; a pipe gives its lines once."""
    for file in files:
        if str(file) == "-" or (file.exists() and not file.is_file() and not file.is_dir()):
            raise InputError(f"{file} is no file, and engine files are read twice: save it first (.gz may stay packed)")


def _checkpoint(model_config: str | None) -> dict[str, Any] | None:
    """Which checkpoint the user named, where its files are here."""
    folder = demo_model_path() if model_config == "demo" else Path(config_folder(model_config or ""))
    return checkpoint_identity(folder) if model_config and folder.is_dir() else None


def _model_name(model_config: str | None) -> str:
    if model_config is None:
        return ""
    path = Path(model_config)
    return path.resolve().parent.name if path.is_file() else model_config if not path.is_dir() else path.resolve().name


def _expert_note(layout: Layout, stated: int) -> str:
    source = "as the file says" if stated else "from the largest id; --model CONFIG states it"
    return f"{layout.num_experts} experts, top-{layout.top_k} ({source})"


def _import_requests(job: Import, survey: Survey, requests: Iterator[EngineRequest]) -> ImportSummary:
    """A trace of kind "tokens", of records that were surveyed."""
    layout = find_layout(survey, job.facts, job.dense)
    if job.facts is None:
        job.notes.append(_expert_note(layout, survey.num_experts))
    job.note_dense(len(layout.dense_L), layout.num_kept)
    if shared := int((survey.largest_K[layout.top_k :] >= 0).sum()):
        job.notes.append(f"{shared} columns past the top-{layout.top_k} are taken as fused shared experts and left out")
    own = {
        "num_layers": layout.num_kept,
        "num_experts": layout.num_experts,
        "top_k": layout.top_k,
        "model_layers": layout.model_layers,
        "num_model_layers": layout.num_model_layers,
        "empty_slots": layout.empty_slots,
    }
    info = job.trace_info(own, model=survey.model)
    with TraceWriter(job.out, info, resume=job.options.resume, relabelled=job.relabelled) as writer:
        adder = RequestAdder(job, layout, writer)
        for request in requests:
            if adder.is_full:
                job.notes.append(f"stopped at {job.options.max_tokens} tokens")
                break
            adder.add(request)
        adder.tell()
        _note_left_out(job, writer)
    written = RoutingTrace.open(job.out)
    return ImportSummary(written.num_requests, written.num_tokens, layout.num_kept, dict(job.dropped), job.notes)


class RequestAdder:
    """Adds the requests of an import to its trace, and counts what it meets."""

    def __init__(self, job: Import, layout: Layout, writer: TraceWriter) -> None:
        self._job, self._layout, self._writer = job, layout, writer
        self._before = len(writer.request_ids)
        self._times: Counter[str] = Counter()  # how often each id came
        self._requests = self._tokens = self._loops = self._renamed = 0

    @property
    def is_full(self) -> bool:
        limit = self._job.options.max_tokens
        return limit is not None and self._tokens >= limit

    def add(self, request: EngineRequest) -> None:
        """Add the rows of a request that count, under an id of its own."""
        options, dropped = self._job.options, self._job.dropped
        self._times[request.request_id] += 1
        name = request.request_id
        if (times := self._times[name]) > 1:
            self._renamed += 1
            name = f"{name}#{times}"
        self._loops += request.repetition
        if request.repetition and options.repetition == "drop":
            dropped.leave_request(LOOPS, len(request.expert_ids_TLK))
            return
        runs, num_dummies = kept_runs(request, self._layout, self._writer.info.id_dtype)
        if num_dummies:
            dropped[DUMMY_ROWS] += num_dummies
        if not runs:
            dropped.leave_request(EMPTY_REQUESTS, 0)
        for piece, (start, ids_TLK) in enumerate(runs):
            if options.max_tokens is not None:
                ids_TLK = ids_TLK[: max(0, options.max_tokens - self._tokens)]
            if not len(ids_TLK):
                continue
            first = request.first_position + start
            prompt = request.num_prompt_tokens
            self._writer.add(
                name if piece == 0 else f"{name}@{first}",
                ids_TLK,
                domain=request.domain if options.domain is None else options.domain,
                token_ids=request.token_ids,
                # Where nothing tells how long the prompt is, every row counts as prompt.
                num_prompt_tokens=first + len(ids_TLK) if prompt is None else prompt,
                first_position=first,
                served=request.served,
            )
            self._requests += 1
            self._tokens += len(ids_TLK)

    def tell(self) -> None:
        """Note what was met. Raises InputError where nothing was added."""
        dropped, notes = self._job.dropped, self._job.notes
        if not self._requests:
            raise InputError(f"no request is left to write: {dropped}{KEEP_LOOPS if dropped[LOOPS] else ''}")
        if dropped[LOOPS]:
            notes.append(f"{dropped[LOOPS]} {LOOPS} are left out{KEEP_LOOPS}")
        if self._loops and self._job.options.repetition == "keep":
            notes.append(f"{self._loops} requests are marked as loops: kept, --repetition drop leaves them out")
        if self._renamed:
            notes.append(f"{self._renamed} requests had an id that came before: they are named #2, #3, ...")
        if self._before:
            notes.append(f"{self._before} requests were in the trace already")


def _note_left_out(job: Import, writer: TraceWriter) -> None:
    """Let trace.json tell what was left out, of files that the trace was made of before too."""
    left_out = {"requests": Counter(job.dropped.requests), "tokens": Counter(job.dropped.tokens)}
    before = writer.facts_before.get("notes", {})
    if before.get("files") != job.origin["files"]:
        for name, counts in (before.get("left_out") or {}).items():
            left_out[name].update(counts)
    if left_out["requests"]:
        writer.info.notes["left_out"] = {name: dict(counts) for name, counts in left_out.items()}


def _import_loads(job: Import, loads: Iterable[EngineLoad]) -> ImportSummary:
    """A trace of kind "counts": one window for each load that is not zero all over."""
    first, windows = _windows(job, loads)
    load_WLE = np.stack(list(windows.values()))
    num_rows, num_experts = load_WLE.shape[1:]
    facts = job.facts
    rows = find_rows(num_rows, first.layer_ids, np.asarray(load_WLE.any(axis=(0, 2))), facts, job.dense)
    if facts is not None and facts["num_experts"] != num_experts:
        raise InputError(f"{first.where}: loads of {num_experts} experts, the model has {facts['num_experts']}")
    top_k = facts["top_k"] if facts is not None else first.top_k
    if not top_k:
        job.notes.append("the files do not tell the top-k: 1 is written; --model CONFIG states it")
    job.note_dense(num_rows - len(rows.kept_L), len(rows.kept_L))
    own = {
        "num_layers": len(rows.kept_L),
        "num_experts": num_experts,
        "top_k": top_k or 1,
        "model_layers": rows.model_layers,
        "num_model_layers": rows.num_model_layers,
    }
    info = job.trace_info(own, kind="counts", notes={} if top_k else {"top_k": "unknown"})
    with TraceWriter(job.out, info, resume=job.options.resume, relabelled=job.relabelled) as writer:
        writer.add_counts(list(windows), load_WLE[:, rows.kept_L])
    num_windows = len(RoutingTrace.open(job.out).load_counts()[0])
    job.notes.append(
        f"{num_windows} windows of loads; semmoe place --method load takes them, other methods need routing per token"
    )
    return ImportSummary(0, 0, len(rows.kept_L), dict(job.dropped), job.notes)


def _windows(job: Import, loads: Iterable[EngineLoad]) -> tuple[EngineLoad, dict[str, np.ndarray]]:
    """The first load, and the loads by window, int64 [L, E] each, without those that are zero all
    over."""
    windows: dict[str, np.ndarray] = {}
    first: EngineLoad | None = None
    for load in loads:
        first = first or load
        if load.load_LE.shape != first.load_LE.shape or load.layer_ids != first.layer_ids:
            raise InputError(
                f"{load.where}: loads of {load.load_LE.shape[0]} layers x {load.load_LE.shape[1]} experts, "
                f"{first.where} has {first.load_LE.shape[0]} x {first.load_LE.shape[1]} or other layers"
            )
        if load.load_LE.size and not 0 <= load.load_LE.min() <= load.load_LE.max() < MOST_LOAD:
            layer, expert = np.argwhere((load.load_LE < 0) | (load.load_LE >= MOST_LOAD))[0]
            raise InputError(f"{load.where}: layer {layer}, expert {expert}: a load of {load.load_LE[layer, expert]}")
        if not load.load_LE.any():
            job.dropped[ZERO_WINDOWS] += 1
            continue
        if load.window in windows:
            raise InputError(f"{load.where}: window {load.window} came before: two files of the same name or pass?")
        windows[load.window] = load.load_LE
    if first is None or not windows:
        raise InputError(f"{first.where if first else job.out}: every load is zero: nothing was recorded")
    return first, windows
