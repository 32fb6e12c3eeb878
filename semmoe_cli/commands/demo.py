"""`semmoe demo`: the whole pipeline on the model and the prompts that the package contains.

Each step is the command that a user would type, printed before it runs, so that the demo is also a
first lesson.
"""

import io
import json
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from semmoe.commands.place import place
from semmoe.commands.report import report
from semmoe.commands.reshard import reshard
from semmoe.commands.run import run
from semmoe.commands.trace import Dtype, trace
from semmoe.options import Json, Seed
from semmoe.terminal.tables import new_table, print_fitting, print_json, print_report, wide_console

if TYPE_CHECKING:
    from semmoe.solvers.evaluate.report import Report


def demo(
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
    from semmoe.profiles.errors import InputError
    from semmoe.solvers.placement import Topology

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
    result["trace"] = _step(
        f"semmoe trace demo --data demo --resume -o {_quoted(traced)}",
        lambda: trace(["demo"], output=traced, data="demo", seed=seed, resume=True, json_=True),
    )
    result["place"] = _step(
        f"semmoe place {_quoted(traced)} --ranks {ranks} --seed {seed} -o {_quoted(plan)}",
        lambda: place([str(traced)], ranks=ranks, output=plan, seed=seed, json_=True),
    )
    from semmoe.solvers.evaluate.report import Report

    scores = Report.from_json(result["place"])
    if not json_:
        print_report(scores, as_json=False)
    _step(  # its numbers are those that place printed just now
        f"semmoe report {_quoted(plan)} {_quoted(traced)} --seed {seed} --tokenizer demo -o {_quoted(page)}",
        lambda: report([str(plan), str(traced)], output=page, seed=seed, tokenizer=Path("demo"), json_=True),
    )
    result["reshard"] = _step(
        f"semmoe reshard demo {_quoted(plan)} --force -o {_quoted(placed)}",
        lambda: reshard(Path("demo"), output=placed, plan=plan, force=True, json_=True),
    )
    result["run"] = _step(
        f"semmoe run {_quoted(placed)} --plan {_quoted(plan)} --prompts demo --dtype float32 --max-new-tokens 4 --check "
        f"-o {_quoted(answers)}",
        lambda: run(
            plan,
            checkpoint=str(placed),
            prompts="demo",
            dtype=Dtype.float32,
            max_new_tokens=4,
            check=True,
            output=answers,
            seed=seed,
            json_=True,
        ),
    )
    seconds = time.monotonic() - start
    if json_:
        files = {path.stem: str(path) for path in (traced, plan, page, placed, answers)}
        print_json({"ranks": ranks, "seconds": seconds, "files": files, **result})
        return
    _print_summary(result, scores, ranks)
    print(f"\nDone in {seconds:.0f} s. Files:", file=sys.stderr)
    width = max(len(str(path)) for path in (traced, plan, page, placed, answers))
    for path, meaning in (
        (traced, "routing of the demo model on its prompts (Parquet)"),
        (plan, "placement and schedules with their held-out scores"),
        (page, "the same as a page with pictures: open it in a browser"),
        (placed, "the demo model with its experts placed: an ordinary Hugging Face checkpoint"),
        (answers, f"its answers on {ranks} local ranks"),
    ):
        print(f"  {path!s:<{width}}  {meaning}", file=sys.stderr)


def _quoted(path: Path) -> str:
    """The path as a shell takes it: the commands are there to be pasted."""
    return shlex.quote(str(path))


def _step(command: str, work: Callable[[], None]) -> dict[str, Any]:
    """Say the command, run it, and give back the JSON object that it prints."""
    print(f"\n$ {command}", file=sys.stderr)
    printed = io.StringIO()
    with redirect_stdout(printed):
        work()
    return json.loads(printed.getvalue())


def _print_summary(result: dict[str, Any], scores: "Report", ranks: int) -> None:
    """What every step found, in a table."""
    from semmoe.solvers.evaluate.report import random_row
    from semmoe.solvers.evaluate.verdict import best_row

    before, after = (random_row(scores.rows, name).rem for name in ("contiguous", "plan"))
    best = best_row(scores.plan_rows, "per-rank")
    traced, checkpoint, ran = result["trace"], result["reshard"], result["run"]
    same = "equal to" if ran["check"]["ok"] else "NOT equal to"
    table = new_table()
    for heading in ("step", "result"):
        table.add_column(heading, overflow="fold")
    for name, found in (
        ("trace", f"{traced['requests']:,} requests, {traced['tokens']:,} tokens; {traced['experts']} experts"),
        ("engines' default", f"{before:.3f} remote ranks per token on held-out requests"),
        ("place", f"{after:.3f}, {1 - after / before:.0%} fewer"),
        (f"with {best.schedule}", f"{best.rem:.3f}, {1 - best.rem / before:.0%} fewer"),
        ("reshard", f"{checkpoint['num_layers']} layers relabelled, {checkpoint['verified']} compared"),
        ("run", f"{ran['check']['compared']:,} answers on {ranks} ranks {same} those of plain Transformers"),
    ):
        table.add_row(name, found)
    console = wide_console()
    print_fitting(console, [table], title="\nSummary", caption="remote ranks per token: REM, a mean over layers")
