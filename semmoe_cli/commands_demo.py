"""`semmoe demo`: the whole pipeline on the model and the prompts that the package contains.

Each step is the command that a user would type, printed before it runs, so that the demo is also a first lesson.
"""

import io
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from semmoe_cli.commands_place import place
from semmoe_cli.commands_report import report
from semmoe_cli.commands_reshard import reshard
from semmoe_cli.commands_run import run
from semmoe_cli.commands_trace import Dtype, trace
from semmoe_cli.options import Seed


def demo(
    ranks: Annotated[int, typer.Option(help="Ranks to place the demo model's 32 experts on.", min=2)] = 4,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Directory for everything that is made.")
    ] = Path("semmoe-demo"),
    seed: Seed = 0,
) -> None:
    """Trace, place, report, reshard and run a small trained model that comes with semmoe; nothing is downloaded.

    Example: semmoe demo --ranks 4
    """
    from profiles.demo.paths import demo_model_path
    from profiles.errors import InputError
    from solvers.placement import Topology

    Topology(ranks).check_experts(32)
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file: choose a directory with -o")
    output.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    traced, plan, page = output / "trace", output / "plan", output / "report.html"
    placed, answers = output / "checkpoint", output / "answers.jsonl"
    _say(f"semmoe trace demo --data demo --resume -o {traced}")
    trace(["demo"], output=traced, data="demo", seed=seed, resume=True)
    _say(f"semmoe place {traced} --ranks {ranks} --seed {seed} -o {plan}")
    place([str(traced)], ranks=ranks, output=plan, seed=seed)
    _say(f"semmoe report {plan} {traced} -o {page}")
    with redirect_stdout(io.StringIO()):  # the table that place printed just now
        report([str(plan), str(traced)], output=page, seed=seed, tokenizer=demo_model_path())
    _say(f"semmoe reshard demo {plan} --force -o {placed}")
    reshard(Path("demo"), output=placed, plan=plan, force=True)
    _say(f"semmoe run {placed} --plan {plan} --prompts demo --dtype float32 --max-new-tokens 4 --check -o {answers}")
    run(
        plan,
        checkpoint=str(placed),
        prompts="demo",
        dtype=Dtype.float32,
        max_new_tokens=4,
        check=True,
        output=answers,
        seed=seed,
    )
    print(f"\nDone in {time.monotonic() - start:.0f} s. Files:", file=sys.stderr)
    for path, meaning in (
        (traced, "routing of the demo model on its prompts (Parquet)"),
        (plan, "placement and schedules with their held-out scores"),
        (page, "the same as a page with pictures: open it in a browser"),
        (placed, "the demo model with its experts placed: an ordinary Hugging Face checkpoint"),
        (answers, f"its answers on {ranks} local ranks, equal to those of plain Transformers"),
    ):
        print(f"  {path}  {meaning}", file=sys.stderr)


def _say(command: str) -> None:
    print(f"\n$ {command}", file=sys.stderr)
