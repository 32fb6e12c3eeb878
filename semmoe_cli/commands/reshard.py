"""`semmoe reshard`: a checkpoint and a plan in, a checkpoint out that realises the plan; and
back."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from semmoe.options import Json, Layout, Verify, command_line, given, grouped, refuse_mixed


@dataclass(frozen=True, kw_only=True)
class Rewriting:
    """What is written, and what is done about it afterwards."""

    layout: Annotated[
        Layout,
        typer.Option(
            help="permuted: a normal checkpoint with relabelled experts, for any engine; ranks: a directory per rank."
        ),
    ] = Layout.permuted
    link: Annotated[bool, typer.Option("--link/--copy", help="Hard-link the files that do not change.")] = False
    verify: Annotated[
        Verify, typer.Option(help="bytes: read everything again and compare; logits: also run both models (in memory).")
    ] = Verify.bytes
    undo: Annotated[bool, typer.Option("--undo", help="Give back the checkpoint that CHECKPOINT was made from.")] = (
        False
    )
    from_plan: Annotated[
        str | None,
        typer.Option(
            metavar="OLD",
            help="CHECKPOINT is a reshard for this plan: write what changes for PLAN and link the rest, or copy it where links cannot be.",
        ),
    ] = None
    force: Annotated[bool, typer.Option("--force", help="Replace OUT where it is a reshard already.")] = False


@grouped()
def reshard(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="Checkpoint directory with safetensors files.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Checkpoint directory to write.")],
    plan: Annotated[
        str | None, typer.Argument(metavar="PLAN", help="Plan of `semmoe place`, or its URL; none with --undo.")
    ] = None,
    *,
    rewriting: Rewriting,
    json_: Json = False,
) -> None:
    """Write a checkpoint whose experts lie as a plan places them, bit for bit the same model.

    Example: semmoe reshard Qwen3-30B-A3B p -o Qwen3-30B-A3B-placed; semmoe reshard --undo
    Qwen3-30B-A3B-placed -o back
    """
    undo, verify, force = rewriting.undo, rewriting.verify, rewriting.force
    if undo == (plan is not None):
        raise typer.BadParameter("--undo takes CHECKPOINT alone" if undo else "PLAN is missing", param_hint="PLAN")
    if undo and (verify is Verify.logits or given(rewriting, but=("undo", "verify", "force"))):
        raise typer.BadParameter(
            "--undo goes with -o, --verify none|bytes, --force and --json only", param_hint="--undo"
        )
    if rewriting.from_plan is not None:
        refuse_mixed("--from-plan, which takes the reshard's", given(rewriting, but=("from_plan", "verify", "force")))
    from semmoe.pages.deployment import serve_line
    from semmoe.profiles.demo.paths import demo_model_path
    from semmoe.runtime.reshard.records import ReshardOptions
    from semmoe.runtime.reshard.replan.replan import replan_reshard
    from semmoe.runtime.reshard.reshard import reshard_checkpoint
    from semmoe.runtime.reshard.undo import undo_reshard
    from semmoe.solvers.plan import Plan
    from semmoe.terminal.decision import next_step
    from semmoe.terminal.progress import gigabytes, stages
    from semmoe.terminal.tables import note, print_json
    from semmoe.terminal.text import quoted

    if checkpoint == Path("demo") and not (checkpoint / "config.json").exists():
        checkpoint = demo_model_path()
    placed = None if plan is None else Plan.load(plan)
    with stages(gigabytes) as progress:
        if plan is None or placed is None:
            result = undo_reshard(checkpoint, output, verify=verify.value, force=force, progress=progress)
        else:
            made_by = command_line(checkpoint, plan, output)
            options = ReshardOptions(rewriting.layout.value, rewriting.link, verify.value, force, made_by)
            if rewriting.from_plan is None:
                result = reshard_checkpoint(checkpoint, placed, output, options, progress=progress)
            else:
                old = Plan.load(rewriting.from_plan)
                result = replan_reshard(checkpoint, old, placed, output, options, progress=progress)
    for name in result.left_out:
        note(
            f"left out {name}: weights in another format or place, links to directories or out of the checkpoint, "
            "pipes and devices are not carried over"
        )
    for line in result.notes:
        note(line)
    if json_:
        print_json({**asdict(result), "checkpoint": str(checkpoint), "plan": plan, "undo": undo})
    linked = f", {result.bytes_linked / 1e9:.2f} GB linked" if result.bytes_linked else ""
    checked = {"none": "not verified", "bytes": "bytes compared", "logits": "bytes and logits compared"}[
        result.verified
    ]
    note(
        f"wrote {output} ({result.num_layers} layers, {result.files} files, {result.bytes_written / 1e9:.2f} GB{linked}; {checked})"
    )
    line = serve_line(str(output), 1 if placed is None else placed.topology.num_ranks)
    if placed is not None and result.layout == "ranks":  # which no serving engine reads
        line = f"semmoe run {quoted(str(output))} --plan {quoted(str(plan))} --prompts prompts.jsonl"
    next_step(line, as_json=json_, aside=True)
