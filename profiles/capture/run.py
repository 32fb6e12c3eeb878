"""`semmoe trace`: a model reads the requests of a source, and its routing is written as a trace
while it runs.

The order of work is set by what can go wrong: the target, the first request and the model's type
are checked before any weight is read. Requests are taken in the order of the source; which of them
a trace holds depends on the source and the limits only, not on batches, ranks, or where an earlier
run of the same command stopped.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from semmoe.profiles.capture.batches import TokenRequest, length_batches
from semmoe.profiles.capture.hooks import Recorded, Recording, record_generation, record_prefill, start_recording
from semmoe.profiles.capture.layers import trace_info
from semmoe.profiles.capture.loading import (
    ModelSource,
    choose_device,
    find_embedding,
    find_model,
    load_model,
    load_tokenizer,
    refusals,
    refuse_untraceable,
)
from semmoe.profiles.capture.requests import TextRequest, encode_requests, has_no_text
from semmoe.profiles.capture.work import FLUSH_SECONDS, Limits, TraceProgress, interruptible
from semmoe.profiles.checkpoint import checkpoint_identity
from semmoe.profiles.errors import InputError
from semmoe.profiles.numbering import Relabelling, find_relabelling
from semmoe.profiles.trace import TraceInfo
from semmoe.profiles.trace_writer import TraceWriter, refuse_existing_trace

ENCODE_REQUESTS = 64  # texts tokenised together


@dataclass(frozen=True)
class Generation:
    """How requests are continued. 0 tokens: they are only read."""

    num_tokens: int = 0
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the requests. `barrier` waits for all of them."""

    rank: int = 0
    size: int = 1
    local_rank: int | None = None
    barrier: Callable[[], None] = lambda: None


@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """How a model is loaded, and what of the requests is recorded."""

    revision: str | None = None  # of a hub model
    trust_remote_code: bool = False
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | None = None  # "auto": spread over all devices
    limits: Limits = Limits()
    generation: Generation = Generation()
    batch_tokens: int | None = None  # of a batch, padding counted; None: what fills the device
    weights: bool = False  # keep the router's weights too
    resume: bool = False  # go on with a trace that was stopped
    ranks: Ranks = Ranks()
    made_by: str = ""


def trace_model(
    name: str,
    requests: Iterator[TextRequest],
    out: Path,
    options: TraceOptions = TraceOptions(),
    *,
    progress: TraceProgress,
    tell: Callable[[str], None] = lambda line: None,
) -> TraceInfo:
    """Trace `requests` through the model `name` into the trace `out`, and return its facts.

    Parameters:
        name: hub id or directory of a model, or "demo".
        requests: texts in order; which of them a trace holds depends on them and the limits only.
        out: the trace directory.
        options: how the model is loaded, and what of the requests is recorded.
        progress: updated batch by batch.
        tell: gets a line for people before long work.

    Ctrl-C (or SIGTERM) ends the run early with a finished trace of what is complete. Any other end
    keeps complete parts, and the same call with `resume` goes on. Raises InputError for all that
    the user can mend.
    """
    limits, generation, ranks = options.limits, options.generation, options.ranks
    if ranks.rank == 0:
        refuse_existing_trace(out, resume=options.resume)
    source = find_model(name, revision=options.revision, trust_remote_code=options.trust_remote_code)
    tokenizer = load_tokenizer(source)
    first = list(itertools.islice(requests, 1))
    if not first:
        raise InputError("the data holds no request: there is nothing to trace")
    encode_requests(first, tokenizer, answer=generation.num_tokens > 0)
    chosen = choose_device(options.device, ranks.local_rank)
    refuse_untraceable(source)
    relabelled = find_relabelling(source.name, revision=source.revision)
    tell(f"loading {name} ({source.config.model_type}) on {'all devices' if options.device_map else chosen}")
    model = load_model(source, dtype=options.dtype, device=chosen, device_map=options.device_map)
    with refusals(f"{name} cannot be traced"):
        recording = start_recording(model, name, weights=options.weights)
    if generation.num_tokens and not model.can_generate():
        raise InputError(f"{name}: model type {source.config.model_type!r} cannot generate; leave out --generate")
    info = trace_info(
        model,
        list(recording.layers),
        recording.top_k,
        name=name,
        embedding=find_embedding(source, model),
        made_by=options.made_by,
    )
    info = replace(info, checkpoint=checkpoint_identity(source.folder))
    if relabelled is not None:
        info = replace(info, notes={**info.notes, "mapped_back": relabelled.note})
        tell(relabelled.note)
    longest = _longest_input(source, model, generation.num_tokens, limits.max_length)
    budget = options.batch_tokens or default_batch_tokens(recording, model.device)
    encoded = encoded_requests(
        itertools.chain(first, requests), tokenizer, limits, longest, progress, answer=generation.num_tokens > 0
    )
    with (
        interruptible(progress) as (hold, check),
        writing(out, info, ranks, resume=options.resume, relabelled=relabelled) as writer,
    ):
        mine = _new_requests(itertools.islice(encoded, ranks.rank, None, ranks.size), writer.request_ids, progress)
        progress.started = last_flush = time.monotonic()
        for batch in length_batches(mine, budget, extra_tokens=generation.num_tokens):
            with hold():
                with refusals(f"a batch of {len(batch)} requests failed"):
                    recorded = _record(model, recording, batch, generation, check)
                add_recorded(writer, recorded, progress)
                if time.monotonic() - last_flush > FLUSH_SECONDS:
                    writer.flush()
                    last_flush = time.monotonic()
        if not progress.requests and not progress.skipped and ranks.size == 1:
            raise InputError("the data holds no request with text: there is nothing to trace")
    return writer.info


def default_batch_tokens(recording: Recording, device: Any) -> int:
    """Tokens of a batch that fill the device: on a CPU about 64 rows per expert, beyond which
    activations leave its caches."""
    if device.type != "cpu":
        return 16384
    return max(1024, 64 * recording.num_experts // recording.top_k)


def _record(
    model: Any, recording: Recording, batch: list[TokenRequest], generation: Generation, check: Callable[[], None]
) -> list[Recorded]:
    if not generation.num_tokens:
        return record_prefill(model, recording, batch, check=check)
    return record_generation(
        model,
        recording,
        batch,
        generation.num_tokens,
        temperature=generation.temperature,
        seed=generation.seed,
        check=check,
    )


def add_recorded(writer: TraceWriter, recorded: list[Recorded], progress: TraceProgress) -> None:
    """Add the requests of a batch to the trace."""
    for r in recorded:
        writer.add(
            r.request_id,
            r.expert_ids_TLK,
            domain=r.domain,
            token_ids=r.token_ids,
            num_prompt_tokens=r.num_prompt_tokens,
            expert_weights_TLK=r.expert_weights_TLK,
        )
        progress.requests += 1
        progress.tokens += len(r.expert_ids_TLK)


def encoded_requests(
    requests: Iterator[TextRequest],
    tokenizer: Any,
    limits: Limits,
    longest: int | None,
    progress: TraceProgress,
    *,
    answer: bool,
) -> Iterator[TokenRequest]:
    """Requests as token ids, within the limits. A text over `longest` is cut where max_length
    asks for that, else an InputError."""
    tokens = count = 0
    while chunk := list(itertools.islice(requests, ENCODE_REQUESTS)):
        for request, ids in zip(chunk, encode_requests(chunk, tokenizer, answer=answer), strict=True):
            if has_no_text(request, ids):
                progress.empty += 1
                continue
            too_long = longest is not None and len(ids) > longest
            if too_long:
                if limits.max_length is None:
                    raise InputError(
                        f"request {request.request_id} has {len(ids)} tokens, the model reads {longest}: cut texts with --max-length N"
                    )
                ids = ids[:longest]
            if limits.max_tokens is not None and tokens + len(ids) > limits.max_tokens:
                if tokens:
                    return
                ids = ids[: limits.max_tokens]
            if limits.max_requests is not None and count >= limits.max_requests:
                return
            count, tokens = count + 1, tokens + len(ids)
            progress.cut += too_long
            progress.read_requests, progress.read_tokens = count, tokens
            yield TokenRequest(request.request_id, request.domain, ids)


def _new_requests(requests: Iterator[TokenRequest], known: set[str], progress: TraceProgress) -> Iterator[TokenRequest]:
    for request in requests:
        if request.request_id in known:
            progress.skipped += 1
            progress.skipped_tokens += len(request.token_ids)
        else:
            yield request


def _longest_input(source: ModelSource, model: Any, generated: int, max_length: int | None) -> int | None:
    """Prompt tokens of a request at most: max_length, else what the model's positions leave;
    None where there is no end."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not limit:
        return max_length
    if generated + (max_length or 1) > limit:
        asked = f"--max-length {max_length} and --generate {generated}" if max_length else f"--generate {generated}"
        raise InputError(f"{asked}: {source.name} has {limit} positions in all")
    return max_length or int(limit) - generated


@contextmanager
def writing(
    out: Path, info: TraceInfo, ranks: Ranks, *, resume: bool, relabelled: Relabelling | None = None
) -> Iterator[TraceWriter]:
    """The trace's writer of this rank. Rank 0 opens the trace first and finishes it last.

    A KeyboardInterrupt in the block ends it like its end. After an InputError everything recorded
    is written first, and the trace stays unfinished.
    """
    if ranks.size == 1:
        writer = TraceWriter(out, info, resume=resume, relabelled=relabelled)
    else:
        if ranks.rank > 0:
            ranks.barrier()
        mine = {"resume": resume or ranks.rank > 0, "prefix": f"rank{ranks.rank}", "lock": ranks.rank == 0}
        writer = TraceWriter(out, info, **mine, relabelled=relabelled)
        if ranks.rank == 0:
            ranks.barrier()
    try:
        try:
            yield writer
        except KeyboardInterrupt:
            writer.info = replace(writer.info, notes={**info.notes, "interrupted": True})
        except InputError:
            writer.flush()
            raise
        writer.flush()
        ranks.barrier()
        if ranks.rank == 0:
            writer.close()
    finally:
        writer.release()
