"""`semmoe trace`: a model and texts in, or files of a serving engine in; a trace out."""

import enum
import os
import sys
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from semmoe.options import (
    Dataset,
    Json,
    MessagesField,
    Seed,
    Split,
    Subset,
    TextField,
    command_line,
    given,
    refuse_mixed,
)
from semmoe.profiles.errors import InputError
from semmoe.terminal.tables import note, print_json

if TYPE_CHECKING:
    from semmoe.profiles.capture.run import Ranks


class Kind(enum.StrEnum):
    """Choices of --from; a test keeps them equal to semmoe.profiles.engines.imports.KINDS."""

    sglang = "sglang"
    vllm = "vllm"
    sglang_recorder = "sglang-recorder"
    trtllm = "trtllm"
    megatron = "megatron"
    eplb = "eplb"


class Dtype(enum.StrEnum):
    """Choices of --dtype; a test keeps them equal to semmoe.profiles.capture.loading.DTYPES."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class Repetition(enum.StrEnum):
    """Choices of --repetition; a test keeps them equal to
    semmoe.profiles.engines.imports.REPETITION."""

    drop = "drop"
    keep = "keep"


def trace(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL | FILE...", help="Hub id or directory of a model, or demo; with --from, the engine's files."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="TRACE", help="Trace directory to write.")],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Texts: a .jsonl, .json, .parquet, .txt or .csv file (.gz may follow), a directory of them, - for stdin, or demo.",
        ),
    ] = None,
    dataset: Dataset = None,
    subset: Subset = None,
    split: Split = None,
    text_field: TextField = None,
    messages_field: MessagesField = None,
    domain_field: Annotated[
        str | None, typer.Option(metavar="FIELD", help="Field that names a request's domain.")
    ] = None,
    generate: Annotated[int, typer.Option(metavar="N", help="Continue every request by up to N tokens.", min=0)] = 0,
    temperature: Annotated[
        float, typer.Option(help="Temperature of --generate; 0 takes the likeliest token.", min=0)
    ] = 0.0,
    seed: Seed = 0,
    max_requests: Annotated[int | None, typer.Option(metavar="N", help="Trace the first N requests.", min=1)] = None,
    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Stop before N prompt tokens are passed.", min=1)
    ] = None,
    max_length: Annotated[int | None, typer.Option(metavar="N", help="Cut prompts to N tokens.", min=1)] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="Tokens of a batch, padding counted; chosen for the device otherwise.", min=1),
    ] = None,
    record_weights: Annotated[
        bool, typer.Option("--record-weights", help="Keep the router's weights too (16 bits each).")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    dtype: Annotated[Dtype, typer.Option(help="Number type of the weights; auto: as stored.")] = Dtype.auto,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    device_map: Annotated[str | None, typer.Option(help="auto: spread a large model over all devices.")] = None,
    hash_layers: Annotated[
        bool,
        typer.Option(
            "--hash-layers",
            help="Write the token-to-experts tables of hash-routed layers (DeepSeek-V4) to the file TRACE instead; nothing is run.",
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a trace that was stopped, or add to a finished one.")
    ] = False,
    from_: Annotated[
        Kind | None, typer.Option("--from", help="Import files of this kind instead of running a model.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="CONFIG", help="With --from: config.json, checkpoint or hub id of the model.")
    ] = None,
    dense_layers: Annotated[
        str | None, typer.Option(metavar="0-2", help="With --from: layers that do not route.")
    ] = None,
    repetition: Annotated[
        Repetition, typer.Option(help="With --from: what to do with requests that fell into a loop.")
    ] = Repetition.drop,
    domain: Annotated[str | None, typer.Option(help="With --from: the domain of every request.")] = None,
    json_: Json = False,
) -> None:
    """Record which experts a model chooses for every token, or import what a serving engine
    recorded.

    Example: semmoe trace Qwen/Qwen3-30B-A3B --data prompts.jsonl --generate 64 -o t
    """
    if from_ is not None:
        refuse_mixed(
            "--from",
            given(
                data=data,
                dataset=dataset,
                subset=subset,
                split=split,
                text_field=text_field,
                messages_field=messages_field,
                domain_field=domain_field,
                generate=generate,
                temperature=temperature,
                max_requests=max_requests,
                max_length=max_length,
                batch_tokens=batch_tokens,
                record_weights=record_weights,
                device_map=device_map,
                revision=revision,
                hash_layers=hash_layers,
            ),
        )
        result = _import(from_, sources, output, model, dense_layers, repetition, domain, max_tokens, resume)
        if json_:
            print_json(result)
        return
    refuse_mixed(
        "a model",
        given(model=model, dense_layers=dense_layers, domain=domain),
    )
    if len(sources) > 1:
        raise typer.BadParameter(f"one MODEL expected, got {len(sources)}; files of an engine need --from KIND")
    _quiet_libraries()
    if hash_layers:
        refuse_mixed("--hash-layers", given(data=data, dataset=dataset, generate=generate))
        result = _write_hash_layers(sources[0], output, revision)
        if json_:
            print_json(result)
        return
    if not isfinite(temperature):
        raise typer.BadParameter("expected a finite number", param_hint="--temperature")
    if temperature and not generate:
        raise typer.BadParameter("needs --generate", param_hint="--temperature")
    if (data is None) == (dataset is None):
        raise typer.BadParameter("texts are needed: exactly one of --data SOURCE and --dataset NAME")
    refuse_mixed("--data", given(subset=subset, split=split) if data is not None else [])

    from semmoe.profiles.capture.requests import RequestSource, open_requests
    from semmoe.profiles.capture.run import Generation, Limits, TraceOptions, TraceProgress, trace_model
    from semmoe.terminal.trace_progress import shown

    ranks = _join_ranks()
    if data == "-" and ranks.size > 1:
        raise InputError("--data -: standard input cannot be shared by several ranks; name a file")
    progress = TraceProgress()
    tell = note if ranks.rank == 0 else lambda line: None
    requests = open_requests(
        RequestSource(data, dataset, subset, split, text_field, messages_field, domain_field), progress.read, tell=tell
    )
    limits = Limits(max_requests, max_tokens, max_length)
    with shown(progress, limits, generate, ranks=ranks.size, silent=ranks.rank > 0):
        options = TraceOptions(
            revision=revision,
            trust_remote_code=trust_remote_code,
            dtype=dtype.value,
            device=device,
            device_map=device_map,
            limits=limits,
            generation=Generation(generate, temperature, seed),
            batch_tokens=batch_tokens,
            weights=record_weights,
            resume=resume,
            ranks=ranks,
            made_by=command_line(output),
        )
        info = trace_model(sources[0], requests, output, options, progress=progress, tell=tell)
    if ranks.rank == 0:
        result = _tell_result(
            progress, output, f"{info.num_layers} layers x {info.num_experts} experts, top-{info.top_k}"
        )
        if json_:
            print_json({**result, "layers": info.num_layers, "experts": info.num_experts, "top_k": info.top_k})
    if progress.interrupted:
        raise typer.Exit(130)


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

    distributed.init_process_group("gloo", timeout=timedelta(days=7))  # ranks with short shares wait for the others
    return Ranks(
        distributed.get_rank(), size, int(os.environ.get("LOCAL_RANK", "0")), lambda: distributed.barrier() and None
    )


def _tell_result(progress: Any, output: Path, shape: str) -> dict[str, Any]:
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


def _write_hash_layers(name: str, output: Path, revision: str | None) -> dict[str, Any]:
    from semmoe.profiles.capture.hash_layers import read_hash_layers, write_hash_layers
    from semmoe.profiles.capture.loading import find_model
    from semmoe.profiles.config import moe_facts

    source = find_model(name, revision=revision)
    tables = read_hash_layers(source.folder)
    if not tables:
        raise InputError(f"{name}: no layer of the checkpoint is routed by a hash table (no tensor ends in .tid2eid)")
    facts = moe_facts(source.config.to_dict())
    write_hash_layers(output, tables, list(facts["model_layers"]), facts["num_experts"], name)
    vocabulary, top_k = next(iter(tables.values())).shape
    note(f"wrote {output}: {len(tables)} hash layers, {vocabulary} tokens x top-{top_k}")
    return {"file": str(output), "layers": len(tables), "vocabulary": vocabulary, "top_k": top_k}


def _import(
    kind: Kind,
    files: list[str],
    output: Path,
    model: str | None,
    dense_layers: str | None,
    repetition: Repetition,
    domain: str | None,
    max_tokens: int | None,
    resume: bool,
) -> dict[str, Any]:
    from semmoe.profiles.engines.imports import ImportOptions, import_trace

    options = ImportOptions(
        model, dense_layers, repetition.value, domain, max_tokens, resume, command_line(output, *files)
    )
    summary = import_trace(kind.value, [Path(file) for file in files], output, options)
    for line in summary.notes:
        note(line)
    for reason, count in summary.dropped.items():
        note(f"left out {count} {reason}")
    note(f"wrote {output}: {summary.requests} requests, {summary.tokens} tokens, {summary.layers} layers")
    return {
        "trace": str(output),
        "requests": summary.requests,
        "tokens": summary.tokens,
        "layers": summary.layers,
        "dropped": dict(summary.dropped),
        "notes": list(summary.notes),
    }
