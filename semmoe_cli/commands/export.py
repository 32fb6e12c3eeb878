"""`semmoe export`: a plan as the file that a serving engine reads."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from semmoe.options import (
    ExportKind,
    Force,
    Json,
    VllmFormat,
    command_line,
    given,
    grouped,
    refuse_mixed,
    refuse_to_replace,
)

if TYPE_CHECKING:
    from semmoe.solvers.plan import Plan


@dataclass(frozen=True, kw_only=True)
class MapFacts:
    """What an engine's map depends on beside the plan."""

    format: Annotated[
        VllmFormat | None,
        typer.Option("--format", help="vllm: pull request that your build contains; no release reads a map yet."),
    ] = None
    model: Annotated[
        str | None,
        typer.Option(
            metavar="CONFIG", help="config.json, checkpoint or hub id: checks the layers, and counts the MTP layers."
        ),
    ] = None
    num_hidden_layers: Annotated[
        int, typer.Option(help="sglang, trtllm: layers of the model, where the plan does not know.", min=0)
    ] = 0
    mtp_layers: Annotated[
        int | None, typer.Option(metavar="N", help="trtllm: MTP layers after the last one; they stay unplaced.", min=0)
    ] = None
    redundant: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Redundant experts that the server starts with; checked against the plan.", min=0
        ),
    ] = None


@grouped()
def export(
    plan: Annotated[str, typer.Argument(metavar="PLAN", help="Plan directory, or its URL.")],
    to: Annotated[
        ExportKind,
        typer.Option(
            help="Engine that will read the file; vllm-plugin and sglang-plugin: the directory that the plug-in of semmoe reads."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="File (of a plug-in: directory) to write; its ending decides the container of eplb tables.",
        ),
    ],
    *,
    facts: MapFacts,
    force: Force = False,
    json_: Json = False,
) -> None:
    """Write a placement as the expert map of SGLang, TensorRT-LLM, vLLM, vLLM-Ascend or EPLB, or
    as what a plug-in inside vLLM or SGLang reads, and say how to start it.

    Example: semmoe export p --to sglang -o map.json
    """
    from semmoe.profiles.errors import InputError
    from semmoe.runtime.engines.write import KINDS, check_plugin_target, write_plugin_directory
    from semmoe.solvers.maps.write import MapOptions, check_export_target, write_map
    from semmoe.solvers.plan import Plan
    from semmoe.terminal.tables import note

    kind, vllm_format = to.value, facts.format.value if facts.format else ""
    if kind in KINDS:
        refuse_mixed(f"--to {kind}", given(facts))
        check_plugin_target(output)
        refuse_to_replace(output, force=force)
        placed = Plan.load(plan)
        lines = write_plugin_directory(placed, kind, output, made_by=command_line(output, plan))
        _tell(placed, kind, output, lines, json_)
        _next(plan, kind, json_)
        return
    check_export_target(output, kind)
    refuse_to_replace(output, force=force)
    if kind == "vllm" and not vllm_format:
        raise InputError(
            f"--to vllm needs --format, the pull request of your build: {', '.join(VllmFormat)}; vLLM 0.33 reads no map"
        )
    if vllm_format and kind != "vllm":
        raise InputError(f"--format is for --to vllm, not for {kind}")
    if facts.num_hidden_layers and kind not in ("sglang", "trtllm"):
        note(f"--num-hidden-layers is for --to sglang and trtllm: a map for {kind} has rows of MoE layers only")
    if facts.mtp_layers and kind != "trtllm":
        note(f"--mtp-layers is for --to trtllm: a map for {kind} has no rows of such layers")
    placed = Plan.load(plan)
    made_by = command_line(output, plan, facts.model or "")
    options = MapOptions(vllm_format, facts.model, facts.num_hidden_layers, facts.mtp_layers, facts.redundant, made_by)
    lines = write_map(placed, kind, output, options)
    _tell(placed, kind, output, lines, json_, _write_delta(Path(plan), placed, output))
    _next(plan, kind, json_)


def _write_delta(plan: Path, placed: "Plan", output: Path) -> str | None:
    """A copy of the plan's delta beside the map, where it has one: slots of a map are the plan's,
    so it says which of them a running server must load anew. Its path, or None."""
    from semmoe.profiles.document import line_per_key
    from semmoe.profiles.errors import InputError
    from semmoe.profiles.files import write_file
    from semmoe.solvers.replan.delta import DELTA_FILE, read_delta
    from semmoe.terminal.tables import note

    if not (plan / DELTA_FILE).is_file():
        return None
    delta = read_delta(plan)
    if delta.new != placed.fingerprint:
        raise InputError(f"{plan / DELTA_FILE} leads to the plan {delta.new}, {plan} is {placed.fingerprint}")
    target = output.with_name(f"{output.name}.{DELTA_FILE}")
    write_file(target, line_per_key(delta.to_json()))
    note(f"wrote {target}: {delta.budget.used} of {delta.budget.slots} slots differ from those of plan {delta.old}")
    return str(target)


def _tell(placed: "Plan", kind: str, output: Path, lines: list[str], as_json: bool, delta: str | None = None) -> None:
    """Say what was written, and how to start the engine."""
    from semmoe.terminal.tables import note, print_json

    placement = placed.placement
    note(
        f"wrote {output}: {placement.num_layers} layers, {placement.slots_per_rank} slots on {placement.num_ranks} ranks"
    )
    for line in lines:
        note(line)
    if as_json:
        print_json({"kind": kind, "file": str(output), "plan": placed.fingerprint, "delta": delta, "notes": lines})


def _next(plan: str, kind: str, as_json: bool) -> None:
    """What shows that a server does with the plan what was promised."""
    from semmoe.terminal.decision import next_step
    from semmoe.terminal.text import quoted

    source = quoted(plan)
    if kind == "trtllm":  # it tells no client which experts it chose
        lines = [f"semmoe route {source} --upstream http://localhost:8000 --engine trtllm"]
    else:
        port = 8000 if kind.startswith("vllm") else 30000
        lines = [f"semmoe trace --server http://localhost:{port} --data prompts.jsonl -o served"]
        lines.append(f"semmoe report {source} served")
    next_step(*lines, as_json=as_json, aside=True)
