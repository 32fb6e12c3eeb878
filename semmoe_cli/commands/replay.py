"""`semmoe run --replay`: a recorded routing on many ranks, without model weights."""

import sys
from typing import TYPE_CHECKING, Any

from semmoe.terminal.decision import next_step
from semmoe.terminal.progress import steps
from semmoe.terminal.tables import note, print_json
from semmoe.terminal.text import quoted

if TYPE_CHECKING:
    from semmoe.runtime.replay.cases import ReplayOptions

UNMEASURED_BYTES_PER_S = 1e13  # no link is so fast: larger batches took no longer than smaller ones
DIGITS = {
    "ms_per_layer": 3,
    "predicted_ms_per_layer": 3,
    "rows_per_token": 3,
    "bytes_per_token": 0,
    "load_imbalance": 3,
}


def replay(options: "ReplayOptions", nproc: int | None, *, as_json: bool) -> None:
    """Start or join the ranks, replay, print the rows."""
    from semmoe.profiles.errors import InputError, require_extra

    require_extra("--replay", "torch", "transformers")
    from semmoe.runtime.ranks.group import check_group
    from semmoe.runtime.ranks.launch import as_rank, launch, under_torchrun
    from semmoe.runtime.replay.cases import prepare
    from semmoe.runtime.replay.replay import replay_rank
    from semmoe.solvers.plan import Plan

    if under_torchrun():
        result = as_rank(lambda: replay_rank(options, None, note, steps), note)
    else:
        ranks = Plan.load(options.plan).topology.num_ranks
        if nproc not in (None, ranks):
            raise InputError(f"{nproc} ranks run, the plan {options.plan} is for {ranks}")
        check_group(options.device, options.backend, ranks)
        result = launch(replay_rank, (options, prepare(options, ranks, note), note, steps), ranks)
    if result is not None:
        if options.write_hardware is not None:
            from semmoe.profiles.document import indented
            from semmoe.profiles.files import write_file

            write_file(options.write_hardware, indented(result["hardware"]))
            note(f"wrote {options.write_hardware}")
        print_rows(result, as_json=as_json)
        where = options.write_hardware
        if where is None:
            next_line = f"semmoe run --replay {quoted(str(options.trace))} --plan {quoted(str(options.plan))}"
            next_line += f" --hidden-size {options.hidden_size} --write-hardware machine.json"
        else:
            next_line = f"semmoe report {quoted(str(options.plan))} {quoted(str(options.trace))} --hardware {quoted(str(where))}"
        next_step(next_line, as_json=as_json)


def print_rows(result: dict[str, Any], *, as_json: bool) -> None:
    """Rows of a replay as JSON or as a table."""
    if as_json:
        print_json(result)
        return
    from rich.console import Console
    from rich.table import Table

    from semmoe.profiles.errors import visible
    from semmoe.terminal.text import add_row

    rate = result["network"]["bytes_per_s"]
    link = f"{rate / 1e6:,.0f} MB/s" if rate < UNMEASURED_BYTES_PER_S else "too fast to measure in such batches"
    title = (
        f"{result['ranks']} ranks on {result['device']} ({result['backend']}), {result['tokens']:,} tokens in batches of "
        f"{result['batch_tokens']:,}; link {link}, "
        f"latency {result['network']['latency_s'] * 1e3:.2f} ms"
    )
    table = Table(title=visible(title), title_justify="left")
    for heading in ("placement", "schedule"):
        table.add_column(heading)
    for heading in DIGITS:
        table.add_column(heading.replace("_", " "), justify="right")
    for row in result["rows"]:
        numbers = (f"{row[name]:,.{digits}f}" for name, digits in DIGITS.items())
        add_row(table, row["placement"], row["schedule"], *numbers)
    Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False, emoji=False).print(table)
