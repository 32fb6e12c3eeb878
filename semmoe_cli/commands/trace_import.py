"""`semmoe trace` where no model runs: --from, files that a serving engine wrote; --hash-layers,
tables of a checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from semmoe.options import Repetition, TraceKind, command_line
from semmoe.profiles.errors import InputError
from semmoe.terminal.tables import note


@dataclass(frozen=True, kw_only=True)
class EngineFiles:
    """What the files of a serving engine are, and what they do not say themselves."""

    from_: Annotated[
        TraceKind | None, typer.Option("--from", help="Import files of this kind instead of running a model.")
    ] = None
    model: Annotated[
        str | None,
        typer.Option(
            metavar="CONFIG", help="With --from and --server: config.json, checkpoint or hub id of the model."
        ),
    ] = None
    dense_layers: Annotated[str | None, typer.Option(metavar="0-2", help="With --from: layers that do not route.")] = (
        None
    )
    repetition: Annotated[
        Repetition, typer.Option(help="With --from: what to do with requests that fell into a loop.")
    ] = Repetition.drop
    domain: Annotated[str | None, typer.Option(help="With --from: the domain of every request.")] = None
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="With --from: stop at the first record that cannot be used; default: leave it out."
        ),
    ] = False


def import_files(
    engine: EngineFiles, files: list[str], output: Path, *, max_tokens: int | None, resume: bool
) -> dict[str, Any]:
    """Write a trace of an engine's files, say so, and return what it was."""
    from semmoe.profiles.engines.imports import ImportOptions, import_trace
    from semmoe.profiles.trace import RoutingTrace

    assert engine.from_ is not None
    options = ImportOptions(
        engine.model,
        engine.dense_layers,
        engine.repetition.value,
        engine.domain,
        max_tokens,
        resume,
        engine.strict,
        command_line(output, *files),
    )
    summary = import_trace(engine.from_.value, [Path(file) for file in files], output, options)
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
        "numbering": RoutingTrace.open(output).info.numbering,
    }


def copy_hash_layers(name: str, output: Path, revision: str | None) -> dict[str, Any]:
    """Write the tables of a checkpoint's hash-routed layers, say so, and return what it was."""
    from semmoe.profiles.capture.hash_layers import read_hash_layers, write_hash_layers
    from semmoe.profiles.capture.loading import find_model
    from semmoe.profiles.config import moe_facts, read_config
    from semmoe.profiles.numbering import find_relabelling

    if Path(name).is_dir():  # nothing is run: Transformers need not know the model yet
        folder, config = Path(name), read_config(name)
        relabelled = find_relabelling(name)
    else:
        source = find_model(name, revision=revision)
        folder, config = source.folder, source.config.to_dict()
        relabelled = find_relabelling(source.name, revision=source.revision)
    tables = read_hash_layers(folder)
    if not tables:
        raise InputError(f"{name}: no layer of the checkpoint is routed by a hash table (no tensor ends in .tid2eid)")
    facts = moe_facts(config)
    if relabelled is not None:
        orders_LE1 = relabelled.orders(list(tables), facts["num_experts"])
        tables = {layer: order_E1[table] for order_E1, (layer, table) in zip(orders_LE1, tables.items(), strict=True)}
        note(relabelled.note)
    write_hash_layers(output, tables, list(facts["model_layers"]), facts["num_experts"], name)
    vocabulary, top_k = next(iter(tables.values())).shape
    note(f"wrote {output}: {len(tables)} hash layers, {vocabulary} tokens x top-{top_k}")
    return {"file": str(output), "layers": len(tables), "vocabulary": vocabulary, "top_k": top_k}
