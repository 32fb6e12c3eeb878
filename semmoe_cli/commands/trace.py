"""`semmoe trace`: a model and texts in, a trace out. With --from and --hash-layers no model runs:
commands/trace_import.py."""

import os
import sys
from dataclasses import asdict, dataclass
from functools import partial
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from semmoe.commands.trace_import import EngineFiles, copy_hash_layers, import_files
from semmoe.commands.trace_server import RunningServer, trace_running_server
from semmoe.options import Json, Loading, Seed, Texts, command_line, given, grouped, refuse_mixed
from semmoe.profiles.errors import InputError, require_extra
from semmoe.terminal.decision import next_step
from semmoe.terminal.tables import note, print_json
from semmoe.terminal.text import quoted

if TYPE_CHECKING:
    from semmoe.profiles.capture.requests import RequestSource
    from semmoe.profiles.capture.run import Generation, Ranks
    from semmoe.profiles.capture.work import TraceProgress

# Options of a model that an import reads, or that ask for nothing that an import would not do.
FINE_WITH_FROM = ("max_tokens", "seed", "trust_remote_code", "dtype", "device")
FINE_WITH_SERVER = ("max_requests", "max_tokens", "max_length", "seed", "dtype", "device")


@dataclass(frozen=True, kw_only=True)
class TracedTexts:
    """The texts that the model reads."""

    data: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Texts: a .jsonl, .json, .parquet, .txt or .csv file (.gz may follow), a directory of them, - for stdin, or demo.",
        ),
    ] = None
    fields: Texts
    domain_field: Annotated[str | None, typer.Option(metavar="FIELD", help="Field that names a request's domain.")] = (
        None
    )

    def source(self) -> "RequestSource":
        """The same as profiles read it. Raises BadParameter where there is not one source."""
        if (self.data is None) == (self.fields.dataset is None):
            raise typer.BadParameter("texts are needed: exactly one of --data SOURCE and --dataset NAME")
        if self.data is not None:
            refuse_mixed("--data", given(subset=self.fields.subset, split=self.fields.split))
        from semmoe.profiles.capture.requests import RequestSource

        return RequestSource(self.data, **asdict(self.fields), domain_field=self.domain_field)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How requests are continued."""

    generate: Annotated[int, typer.Option(metavar="N", help="Continue every request by up to N tokens.", min=0)] = 0
    temperature: Annotated[
        float, typer.Option(help="Temperature of --generate; 0 takes the likeliest token.", min=0)
    ] = 0.0
    seed: Seed = 0

    def generation(self) -> "Generation":
        """The same as profiles read it. Raises BadParameter for a temperature without a use."""
        if not isfinite(self.temperature):
            raise typer.BadParameter("expected a finite number", param_hint="--temperature")
        if self.temperature and not self.generate:
            raise typer.BadParameter("needs --generate", param_hint="--temperature")
        from semmoe.profiles.capture.run import Generation

        return Generation(self.generate, self.temperature, self.seed)


@dataclass(frozen=True, kw_only=True)
class TextLimits:
    """How much of the texts is traced; the fields of semmoe.profiles.capture.work.Limits."""

    max_requests: Annotated[int | None, typer.Option(metavar="N", help="Trace the first N requests.", min=1)] = None
    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Stop before N prompt tokens are passed.", min=1)
    ] = None
    max_length: Annotated[int | None, typer.Option(metavar="N", help="Cut prompts to N tokens.", min=1)] = None


@dataclass(frozen=True, kw_only=True)
class Capture:
    """How the model runs, and what of it is recorded."""

    sampling: Sampling
    limits: TextLimits
    batch_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="Tokens of a batch, padding counted; chosen for the device otherwise.", min=1),
    ] = None
    record_weights: Annotated[
        bool, typer.Option("--record-weights", help="Keep the router's weights too (16 bits each).")
    ] = False
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False
    loading: Loading
    device_map: Annotated[str | None, typer.Option(help="auto: spread a large model over all devices.")] = None
    hash_layers: Annotated[
        bool,
        typer.Option(
            "--hash-layers",
            help="Write the token-to-experts tables of hash-routed layers (DeepSeek-V4) to the file TRACE instead; nothing is run.",
        ),
    ] = False


@grouped()
def trace(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="TRACE", help="Trace directory to write.")],
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL | FILE...",
            help="Hub id or directory of a model, or demo; with --from, the engine's files; with --server, none.",
        ),
    ] = None,
    *,
    texts: TracedTexts,
    capture: Capture,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a trace that was stopped, or add to a finished one.")
    ] = False,
    engine: EngineFiles,
    running: RunningServer,
    json_: Json = False,
) -> None:
    """Record which experts a model chooses for every token, import what a serving engine
    recorded, or ask an engine that is running.

    Example: semmoe trace Qwen/Qwen3-30B-A3B --data prompts.jsonl --generate 64 -o t
    """
    interrupted = False
    if running.server is not None:
        refuse_mixed("--server", given(engine, capture, but=("model", "repetition", *FINE_WITH_SERVER)))
        if sources:
            raise typer.BadParameter(f"{sources[0]} does not go with --server: the server has its model")
        result, interrupted = _trace_server(running, output, texts, capture, engine.model, resume)
    elif not sources:
        raise typer.BadParameter("a MODEL, files with --from, or --server URL is needed")
    elif given(running):
        raise typer.BadParameter(f"{given(running)[0]} needs --server")
    elif engine.from_ is not None:
        refuse_mixed("--from", given(texts, capture, but=FINE_WITH_FROM))
        result = import_files(engine, sources, output, max_tokens=capture.limits.max_tokens, resume=resume)
    else:
        refuse_mixed("a model", given(engine, but=("repetition",)))
        if len(sources) > 1:
            raise typer.BadParameter(f"one MODEL expected, got {len(sources)}; files of an engine need --from KIND")
        require_extra("running a model", "torch", "transformers")
        if capture.hash_layers:
            refuse_mixed(
                "--hash-layers",
                given(data=texts.data, dataset=texts.fields.dataset, generate=capture.sampling.generate),
            )
            _quiet_libraries()
            result = copy_hash_layers(sources[0], output, capture.revision)
        else:
            result, interrupted = _trace(sources[0], output, texts, capture, resume)
    if json_ and result is not None:
        print_json(result)
    if result is not None:
        where = quoted(str(output))
        lines = [f"semmoe report {where}", f"semmoe place {where} --ranks 8 -o plan"] if "trace" in result else []
        next_step(*lines, as_json=json_, aside=True)
    if interrupted:
        raise typer.Exit(130)


def _trace_server(
    running: RunningServer, output: Path, texts: TracedTexts, capture: Capture, model: str | None, resume: bool
) -> tuple[dict[str, Any], bool]:
    from semmoe.profiles.capture.work import Limits

    limits = Limits(**asdict(capture.limits))
    return trace_running_server(running, texts.source(), output, limits, model=model, resume=resume)


def _trace(
    name: str, output: Path, texts: TracedTexts, capture: Capture, resume: bool
) -> tuple[dict[str, Any] | None, bool]:
    """What was written, None on all ranks but the first; and whether it was interrupted."""
    source, generation = texts.source(), capture.sampling.generation()
    from semmoe.runtime.ranks.launch import as_rank, under_torchrun

    work = partial(_trace_rank, name, output, source, generation, capture, resume)
    return as_rank(work, note) if under_torchrun() else work()


def _trace_rank(
    name: str, output: Path, source: "RequestSource", generation: "Generation", capture: Capture, resume: bool
) -> tuple[dict[str, Any] | None, bool]:
    """The same on this process, alone or one of torchrun's ranks."""
    _quiet_libraries()
    from semmoe.profiles.capture.requests import open_requests
    from semmoe.profiles.capture.run import TraceOptions, trace_model
    from semmoe.profiles.capture.work import Limits, TraceProgress
    from semmoe.terminal.progress import tracing

    ranks = _join_ranks()
    if source.data == "-" and ranks.size > 1:
        raise InputError("--data -: standard input cannot be shared by several ranks; name a file")
    progress, limits = TraceProgress(), Limits(**asdict(capture.limits))
    tell = note if ranks.rank == 0 else lambda line: None
    options = TraceOptions(
        revision=capture.revision,
        trust_remote_code=capture.trust_remote_code,
        dtype=capture.loading.dtype.value,
        device=capture.loading.device,
        device_map=capture.device_map,
        limits=limits,
        generation=generation,
        batch_tokens=capture.batch_tokens,
        weights=capture.record_weights,
        resume=resume,
        ranks=ranks,
        made_by=command_line(output),
    )
    with tracing(progress, limits, generation.num_tokens, ranks=ranks.size, silent=ranks.rank > 0):
        requests = open_requests(source, progress.read, tell=tell)
        info = trace_model(name, requests, output, options, progress=progress, tell=tell)
    if ranks.rank > 0:
        return None, progress.interrupted
    written = _tell_written(
        progress, output, f"{info.num_layers} layers x {info.num_experts} experts, top-{info.top_k}"
    )
    shape = {"layers": info.num_layers, "experts": info.num_experts, "top_k": info.top_k, "numbering": info.numbering}
    return written | shape, progress.interrupted


def _quiet_libraries() -> None:
    """Leave stderr to our own lines: warnings of the libraries, and bars for loading weights,
    say nothing that a user can act on."""
    import warnings

    import transformers

    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()


def _join_ranks() -> "Ranks":
    """This process among those that torchrun started; alone without it."""
    from semmoe.profiles.capture.run import Ranks

    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Ranks()
    from datetime import timedelta

    from torch import distributed

    from semmoe.runtime.ranks.failures import naming

    distributed.init_process_group("gloo", timeout=timedelta(days=7))  # ranks with short shares wait for the others
    rank = distributed.get_rank()

    def wait() -> None:
        with naming(rank, "the wait for the other ranks"):
            distributed.barrier()

    return Ranks(rank, size, int(os.environ.get("LOCAL_RANK", "0")), wait)


def _tell_written(progress: "TraceProgress", output: Path, shape: str) -> dict[str, Any]:
    """Say what was written, and return it."""
    from semmoe.profiles.trace import RoutingTrace

    trace = RoutingTrace.open(output)
    parts = [f"{progress.skipped} were there already"] if progress.skipped else []
    parts += [f"{progress.empty} without text left out"] if progress.empty else []
    parts += [f"{progress.cut} cut to --max-length"] if progress.cut else []
    done = "interrupted: wrote" if progress.interrupted else "wrote"
    note(
        f"{done} {output}: {trace.num_requests} requests, {trace.num_tokens} tokens, {shape}"
        + (f" ({', '.join(parts)})" if parts else "")
    )
    counts = {name: getattr(progress, name) for name in ("skipped", "empty", "cut", "interrupted")}
    return {"trace": str(output), "requests": trace.num_requests, "tokens": trace.num_tokens, **counts}
