"""`semmoe export`: a plan as the file that a serving engine reads."""

from pathlib import Path
from typing import Annotated

import typer

from semmoe.options import Json, MapKind, VllmFormat, command_line


def export(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="Plan directory.")],
    to: Annotated[MapKind, typer.Option(help="Engine that will read the file.")],
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="FILE", help="File to write; its ending decides the container of eplb tables."
        ),
    ],
    format: Annotated[
        VllmFormat | None,
        typer.Option("--format", help="vllm: pull request that your build contains; no release reads a map yet."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="CONFIG", help="config.json, checkpoint or hub id: checks the layers, and counts the MTP layers."
        ),
    ] = None,
    num_hidden_layers: Annotated[
        int, typer.Option(help="sglang, trtllm: layers of the model, where the plan does not know.", min=0)
    ] = 0,
    mtp_layers: Annotated[
        int | None, typer.Option(metavar="N", help="trtllm: MTP layers after the last one; they stay unplaced.", min=0)
    ] = None,
    redundant: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Redundant experts that the server starts with; checked against the plan.", min=0
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """Write a placement as the expert map of SGLang, TensorRT-LLM, vLLM, vLLM-Ascend or EPLB, and
    say how to start it.

    Example: semmoe export p --to sglang -o map.json
    """
    from semmoe.profiles.config import read_config
    from semmoe.profiles.errors import InputError
    from semmoe.solvers.maps.launch import launch_lines
    from semmoe.solvers.maps.write import check_config, check_export_target, export_map, render, write_export
    from semmoe.solvers.plan import Plan
    from semmoe.terminal.tables import note, print_json

    kind, vllm_format = to.value, format.value if format else ""
    check_export_target(output, kind)
    if kind == "vllm" and not vllm_format:
        raise InputError(
            f"--to vllm needs --format, the pull request of your build: {', '.join(VllmFormat)}; vLLM 0.33 reads no map"
        )
    if vllm_format and kind != "vllm":
        raise InputError(f"--format is for --to vllm, not for {kind}")
    if num_hidden_layers and kind not in ("sglang", "trtllm"):
        note(f"--num-hidden-layers is for --to sglang and trtllm: a map for {kind} has rows of MoE layers only")
    if mtp_layers and kind != "trtllm":
        note(f"--mtp-layers is for --to trtllm: a map for {kind} has no rows of such layers")
    placed = Plan.load(plan)
    if model is not None:
        num_hidden_layers, from_config = check_config(placed, read_config(model))
        mtp_layers = from_config if mtp_layers is None else mtp_layers
    value = export_map(
        placed,
        kind,
        format=vllm_format,
        num_hidden_layers=num_hidden_layers,
        num_mtp_layers=mtp_layers or 0,
        redundant=redundant,
    )
    content = _torch_bytes(value) if output.suffix == ".pt" else render(kind, value, output.suffix)
    write_export(output, kind, content, placed, format=vllm_format, made_by=command_line(output, plan, model or ""))
    lines = launch_lines(placed, kind, output, format=vllm_format)
    if kind == "trtllm" and mtp_layers is None:
        lines.append("no rows for MTP layers: a model that has them needs --model CONFIG or --mtp-layers N here")
    placement = placed.placement
    note(
        f"wrote {output}: {placement.num_layers} layers, {placement.slots_per_rank} slots on {placement.num_ranks} ranks"
    )
    for line in lines:
        note(line)
    if json_:
        print_json({"kind": kind, "file": str(output), "plan": placed.fingerprint, "notes": lines})


def _torch_bytes(arrays: dict) -> bytes:
    """A .pt file of the tables; written to memory first, so that its bytes do not hold the name
    of a temporary file."""
    import io

    import torch

    buffer = io.BytesIO()
    torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, buffer)
    return buffer.getvalue()
