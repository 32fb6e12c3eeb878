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
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from semmoe.profiles.config import moe_facts, read_config
from semmoe.profiles.engines.columns import Layout, find_layout, find_rows, kept_runs, parse_layers, survey_requests
from semmoe.profiles.engines.loads import read_eplb, read_trtllm
from semmoe.profiles.engines.megatron import read_megatron
from semmoe.profiles.engines.recorder import read_recorder
from semmoe.profiles.engines.records import EngineLoad, EngineRequest, Reader
from semmoe.profiles.engines.responses import read_sglang, read_vllm
from semmoe.profiles.errors import InputError
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
ZERO_WINDOWS = "windows without activations"


class ImportSummary(NamedTuple):
    """What an import did; `notes` are lines for people."""

    requests: int  # in the finished trace; 0 for kind "counts"
    tokens: int
    layers: int
    dropped: dict[str, int]  # what was left out, by reason: for people too
    notes: list[str]


def import_trace(
    kind: str,
    files: list[Path],
    out: Path,
    *,
    model_config: str | None = None,
    dense_layers: str | None = None,
    repetition: str = "keep",
    domain: str | None = None,
    max_tokens: int | None = None,
    resume: bool = False,
    made_by: str = "",
) -> ImportSummary:
    """Write the trace `out` of files of one kind of engine.

    `model_config`: config.json, checkpoint or hub id; it gives experts, top-k, groups and dense
    layers, and saves a pass. `dense_layers`: `0,1` or `0-2`, in place of what the config says or
    the rows show. `repetition`: "drop" leaves out requests marked as loops. `domain`: the domain of
    every request, in place of the file's. `max_tokens`: rows in all; the last request is cut there.
    `resume`: go on with an unfinished trace, skipping the requests that it holds. Ids that come
    again get the suffix #2, #3, ... Raises InputError with file, line and value for what cannot be.
    """
    if kind not in KINDS:
        raise InputError(f"unknown kind {kind!r}: expected one of {', '.join(KINDS)}")
    if repetition not in REPETITION:
        raise InputError(f"repetition is {repetition!r}, expected one of {', '.join(REPETITION)}")
    if not files:
        raise InputError(f"no files to import as {kind}")
    if max_tokens is not None and max_tokens < 1:
        raise InputError(f"max-tokens is {max_tokens}, expected at least 1")
    refuse_existing_trace(out, resume=resume)  # the writer does too, but after the first pass over the files
    _refuse_pipes(files)
    facts = None if model_config is None else moe_facts(read_config(model_config))
    dense = None if dense_layers is None else parse_layers(dense_layers)
    reader, dropped, notes = KINDS[kind], Counter[str](), []
    records = reader(files, facts, Counter())
    first = next(records, None)
    if first is None:
        raise InputError(f"{files[0]} holds no record of kind {kind}")
    origin = {"from": kind, "files": [file.name for file in files]}
    model = _model_name(model_config)
    if isinstance(first, EngineLoad):
        if domain is not None or max_tokens is not None:
            raise InputError(f"{first.where} holds loads, not requests: no domain or max-tokens applies")
        loads = chain([first], records)
        return _import_loads(loads, out, facts, dense, dropped, notes, model, origin, resume, made_by)  # pyright: ignore
    seen: Iterable[Any] = chain([first], records)
    survey = survey_requests(seen if facts is None else islice(seen, 1))
    layout = find_layout(survey, facts, dense)
    if facts is None:
        notes.append(_expert_note(layout, survey.num_experts))
    if layout.dense_L.size and dense is None:
        notes.append(f"{len(layout.dense_L)} dense layers left out, {layout.num_kept} route")
    info = _trace_info(layout, facts, model or survey.model, origin, made_by)
    requests = reader(files, facts, dropped)
    try:
        with TraceWriter(out, info, resume=resume) as writer:
            _write(requests, writer, layout, dropped, notes, repetition, domain, max_tokens)  # pyright: ignore
    except InputError:
        _remove_if_empty(out)
        raise
    written = RoutingTrace.open(out)
    return ImportSummary(written.num_requests, written.num_tokens, layout.num_kept, dict(dropped), notes)


def _refuse_pipes(files: list[Path]) -> None:
    """A file is read twice, to find what is in it and to write it; a pipe gives its lines once."""
    for file in files:
        if str(file) == "-" or (file.exists() and not file.is_file() and not file.is_dir()):
            raise InputError(f"{file} is no file, and engine files are read twice: save it first (.gz may stay packed)")


def _remove_if_empty(out: Path) -> None:
    """Take away a trace of no part that a failed import began."""
    if out.is_dir() and not any(out.glob("*.parquet")):
        (out / "trace.json").unlink(missing_ok=True)
        if not any(out.iterdir()):
            out.rmdir()


def _model_name(model_config: str | None) -> str:
    if model_config is None:
        return ""
    path = Path(model_config)
    return path.resolve().parent.name if path.is_file() else model_config if not path.is_dir() else path.resolve().name


def _expert_note(layout: Layout, stated: int) -> str:
    source = "as the file says" if stated else "from the largest id; --model CONFIG states it"
    return f"{layout.num_experts} experts, top-{layout.top_k} ({source})"


def _trace_info(
    layout: Layout, facts: dict[str, Any] | None, model: str, origin: dict[str, Any], made_by: str
) -> TraceInfo:
    own = {
        "num_layers": layout.num_kept,
        "num_experts": layout.num_experts,
        "top_k": layout.top_k,
        "model_layers": layout.model_layers,
        "num_model_layers": layout.num_model_layers,
        "empty_slots": layout.empty_slots,
    }
    return TraceInfo(model=model or "unknown", made_by=made_by, notes=origin, **{**(facts or {}), **own})


def _write(
    requests: Iterator[EngineRequest],
    writer: TraceWriter,
    layout: Layout,
    dropped: Counter[str],
    notes: list[str],
    repetition: str,
    domain: str | None,
    max_tokens: int | None,
) -> None:
    """Every request through the layout into the writer."""
    num_requests = num_tokens = num_loops = num_renamed = 0
    times: Counter[str] = Counter()
    num_done = len(writer.request_ids)
    for request in requests:
        if max_tokens is not None and num_tokens >= max_tokens:
            notes.append(f"stopped at {max_tokens} tokens")
            break
        times[request.request_id] += 1
        name = request.request_id
        if times[name] > 1:
            num_renamed += 1
            name = f"{name}#{times[name]}"
        num_loops += request.repetition
        if request.repetition and repetition == "drop":
            dropped[LOOPS] += 1
            continue
        runs, num_dummies = kept_runs(request, layout, writer.info.id_dtype)
        if num_dummies:
            dropped[DUMMY_ROWS] += num_dummies
        if not runs:
            dropped[EMPTY_REQUESTS] += 1
        for piece, (start, ids_TLK) in enumerate(runs):
            if max_tokens is not None:
                ids_TLK = ids_TLK[: max(0, max_tokens - num_tokens)]
            if not len(ids_TLK):
                continue
            first = request.first_position + start
            prompt = request.num_prompt_tokens
            writer.add(
                name if piece == 0 else f"{name}@{first}",
                ids_TLK,
                domain=request.domain if domain is None else domain,
                token_ids=request.token_ids,
                # Where nothing tells how long the prompt is, every row counts as prompt.
                num_prompt_tokens=first + len(ids_TLK) if prompt is None else prompt,
                first_position=first,
            )
            num_requests += 1
            num_tokens += len(ids_TLK)
    if not num_requests:
        raise InputError("no request is left to write: " + ", ".join(f"{n} {reason}" for reason, n in dropped.items()))
    if num_loops and repetition == "keep":
        notes.append(f"{num_loops} requests are marked as loops: kept, --repetition drop leaves them out")
    if num_renamed:
        notes.append(f"{num_renamed} requests had an id that came before: they are named #2, #3, ...")
    if num_done:
        notes.append(f"{num_done} requests were in the trace already")


def _import_loads(
    loads: Iterable[EngineLoad],
    out: Path,
    facts: dict[str, Any] | None,
    dense: set[int] | None,
    dropped: Counter[str],
    notes: list[str],
    model: str,
    origin: dict[str, Any],
    resume: bool,
    made_by: str,
) -> ImportSummary:
    """A trace of kind "counts": one window for each load that is not zero all over."""
    windows: dict[str, np.ndarray] = {}
    first: EngineLoad | None = None
    for load in loads:
        first = first or load
        if load.load_LE.shape != first.load_LE.shape or load.layer_ids != first.layer_ids:
            raise InputError(
                f"{load.where}: loads of {load.load_LE.shape[0]} layers x {load.load_LE.shape[1]} experts, "
                f"{first.where} has {first.load_LE.shape[0]} x {first.load_LE.shape[1]} or other layers"
            )
        if load.load_LE.size and load.load_LE.min() < 0:
            layer, expert = np.argwhere(load.load_LE < 0)[0]
            raise InputError(f"{load.where}: layer {layer}, expert {expert}: a load of {load.load_LE[layer, expert]}")
        if not load.load_LE.any():
            dropped[ZERO_WINDOWS] += 1
            continue
        if load.window in windows:
            raise InputError(f"{load.where}: window {load.window} came before: two files of the same name or pass?")
        windows[load.window] = load.load_LE
    if first is None or not windows:
        raise InputError(f"{first.where if first else out}: every load is zero: nothing was recorded")
    load_WLE = np.stack(list(windows.values()))
    num_rows, num_experts = load_WLE.shape[1:]
    rows = find_rows(num_rows, first.layer_ids, np.asarray(load_WLE.any(axis=(0, 2))), facts, dense)
    if facts is not None and facts["num_experts"] != num_experts:
        raise InputError(f"{first.where}: loads of {num_experts} experts, the model has {facts['num_experts']}")
    top_k = facts["top_k"] if facts is not None else first.top_k
    if not top_k:
        notes.append("the files do not tell the top-k: 1 is written; --model CONFIG states it")
    if len(rows.kept_L) < num_rows and dense is None:
        notes.append(f"{num_rows - len(rows.kept_L)} dense layers left out, {len(rows.kept_L)} route")
    own = {
        "num_layers": len(rows.kept_L),
        "num_experts": num_experts,
        "top_k": top_k or 1,
        "model_layers": rows.model_layers,
        "num_model_layers": rows.num_model_layers,
    }
    origin = origin if top_k else {**origin, "top_k": "unknown"}
    info = TraceInfo(
        model=model or "unknown", kind="counts", made_by=made_by, notes=origin, **{**(facts or {}), **own}
    )  # fmt: skip
    with TraceWriter(out, info, resume=resume) as writer:
        writer.add_counts(list(windows), load_WLE[:, rows.kept_L])
    num_windows = len(RoutingTrace.open(out).load_counts()[0])
    notes.append(f"{num_windows} windows of loads; semmoe show describes them, semmoe place needs routing per token")
    return ImportSummary(0, 0, len(rows.kept_L), dict(dropped), notes)
