"""`semmoe demo`: the whole pipeline on the model and the prompts that the package contains.

Each step is the command that a user would type, printed before it runs, so that the demo is also a
first lesson.
"""

import io
import json
import os
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from semmoe.options import Json, Seed
from semmoe.profiles.errors import visible
from semmoe.terminal.decision import print_decision
from semmoe.terminal.loudness import loudness_words, say
from semmoe.terminal.tables import new_table, print_fitting, print_json, wide_console
from semmoe.terminal.text import add_row, quoted

if TYPE_CHECKING:
    from semmoe.solvers.evaluate.report import Report

ALONE = ("--config", os.devnull)  # the demo is the same in every directory


def demo(
    context: typer.Context,
    ranks: Annotated[int, typer.Option(help="Ranks to place the demo model's 32 experts on.", min=2)] = 4,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Directory for everything that is made.")
    ] = Path("semmoe-demo"),
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Trace, place, report, reshard and run a small trained model that comes with semmoe; nothing
    is downloaded.

    Example: semmoe demo --ranks 4
    """
    from semmoe.profiles.errors import InputError, require_extra
    from semmoe.solvers.placement import Topology

    require_extra("the demo, which runs a model,", "torch", "transformers")
    Topology(ranks).check_experts(32)
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file: choose a directory with -o")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the directory {output}: {error.strerror or error}") from None
    start = time.monotonic()
    traced, plan, page = output / "trace", output / "plan", output / "report.html"
    placed, answers = output / "checkpoint", output / "answers.jsonl"
    result: dict[str, Any] = {}
    result["trace"] = _step(context, "trace", "demo", "--data", "demo", "--resume", "-o", traced)
    result["place"] = _step(context, "place", traced, "--ranks", ranks, "--seed", seed, "--force", "-o", plan)
    from semmoe.solvers.evaluate.report import Report

    scores = Report.from_json(result["place"])
    if not json_:
        print_decision(scores)
    # Its numbers are those that place printed just now:
    _step(context, "report", plan, traced, "--seed", seed, "--tokenizer", "demo", "--force", "-o", page)
    result["reshard"] = _step(context, "reshard", "demo", plan, "--force", "-o", placed)
    ran = ("--prompts", "demo", "--dtype", "float32", "--max-new-tokens", 4, "--check", "--force", "-o", answers)
    result["run"] = _step(context, "run", placed, "--plan", plan, *ran)
    seconds = time.monotonic() - start
    if json_:
        files = {path.stem: str(path) for path in (traced, plan, page, placed, answers)}
        print_json({"ranks": ranks, "seconds": seconds, "files": files, **result})
        return
    _print_summary(result, scores, ranks)
    say(f"\nDone in {seconds:.0f} s. Files:")
    width = max(len(visible(str(path))) for path in (traced, plan, page, placed, answers))
    for path, meaning in (
        (traced, "routing of the demo model on its prompts (Parquet)"),
        (plan, "placement and schedules with their held-out scores"),
        (page, "the same as a page with pictures: open it in a browser"),
        (placed, "the demo model with its experts placed: an ordinary Hugging Face checkpoint"),
        (answers, f"its answers on {ranks} local ranks"),
    ):
        say(f"  {visible(str(path)):<{width}}  {meaning}")


def _step(context: typer.Context, *words: object) -> dict[str, Any]:
    """Say the command, run it, and give back the JSON object that it prints."""
    command = [str(word) for word in words]
    say(f"\n$ {' '.join(map(quoted, ['semmoe', *command]))}")
    printed, program = io.StringIO(), context.find_root().command
    with (
        redirect_stdout(printed),
        program.make_context("semmoe", [*ALONE, *loudness_words(), *command, "--json"]) as step,
    ):
        program.invoke(step)
    return json.loads(printed.getvalue())


def _print_summary(result: dict[str, Any], scores: "Report", ranks: int) -> None:
    """What every step found, in a table."""
    from semmoe.solvers.evaluate.decision import deployed_schedule
    from semmoe.solvers.evaluate.report import random_row

    before, after = (random_row(scores.rows, name).rem for name in ("contiguous", "plan"))
    schedule = deployed_schedule(scores)
    best = next(row for row in scores.plan_rows if row.schedule == schedule)
    traced, checkpoint, ran = result["trace"], result["reshard"], result["run"]
    same = "equal to" if ran["check"]["ok"] else "NOT equal to"
    table = new_table()
    for heading in ("step", "result"):
        table.add_column(heading, overflow="fold")
    for name, found in (
        ("trace", f"{traced['requests']:,} requests, {traced['tokens']:,} tokens; {traced['experts']} experts"),
        ("engines' default", f"{before:.3f} remote ranks per token on held-out requests"),
        ("place", f"{after:.3f}, {1 - after / before:.0%} fewer"),
        *(
            [(f"with {schedule}", f"{best.rem:.3f}, {1 - best.rem / before:.0%} fewer, by plug-in or router")]
            if schedule != "random"
            else []
        ),
        ("reshard", f"{checkpoint['num_layers']} layers relabelled, {checkpoint['verified']} compared"),
        ("run", f"{ran['check']['compared']:,} answers on {ranks} ranks {same} those of plain Transformers"),
    ):
        add_row(table, name, found)
    console = wide_console()
    print_fitting(console, [table], title="\nSummary", caption="remote ranks per token: REM, a mean over layers")
