"""A decision in the terminal: the sentence, three rows, the load risk; and the next command, which
every command ends with.
"""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from semmoe.profiles.errors import visible
from semmoe.terminal.loudness import is_quiet
from semmoe.terminal.tables import (
    COLUMNS,
    new_table,
    note,
    phase_words,
    print_fitting,
    print_json,
    print_scores,
    wide_console,
)
from semmoe.terminal.text import add_row

if TYPE_CHECKING:
    from rich.table import Table

    from semmoe.solvers.evaluate.decision import Decision, Standing
    from semmoe.solvers.evaluate.report import Report

COLOURS = {"good": "green", "watch": "yellow", "bad": "red"}
INTERVALS = "in brackets: 95% bootstrap interval over requests"


@dataclass(frozen=True)
class Shown:
    """How a report is printed: as one JSON object, or as its decision, with every schedule below it
    where `everything` is asked for."""

    everything: bool
    as_json: bool

    def print(self, report: "Report") -> None:
        """Print it on stdout."""
        if self.as_json:
            print_json(report.to_json())
            return
        print_decision(report)
        if self.everything:
            print("")
            print_scores(report)


def print_decision(report: "Report") -> None:
    """What a report comes to, on stdout: fits the terminal, and explains intervals where it shows
    some."""
    from semmoe.solvers.evaluate.decision import decide

    decision, console = decide(report), wide_console()
    console.print(visible(decision.sentence), style=f"bold {COLOURS[decision.level]}")
    if decision.why:
        console.print(visible(f"{decision.why[0].upper()}{decision.why[1:]}."))
    for intervals, needs in ((True, True), (False, True), (False, False)):
        table = _table(report, decision, intervals=intervals, needs=needs)
        if _fits(table) or not needs:
            break
    caption = f"mean over {len(report.layers)} layers" + (f"; {INTERVALS}" if intervals else "")
    print_fitting(console, [table], title=f"\n{_title(report)}", caption=caption)
    said = [f"Load risk: {decision.risk}."]
    said += [f"Research: {decision.research}."] if decision.research else []
    said += [report.drift.sentence] if report.drift is not None else []
    console.print("")
    for line in said:
        console.print(visible(line))


def next_step(*commands: str, as_json: bool, aside: bool = False) -> None:
    """The commands that come next: on stdout below what people read there, `aside` on stderr, where
    stdout is empty or other text. Who asked for JSON or quiet is told none."""
    if as_json or is_quiet():
        return
    if aside:
        for command in commands:
            note(f"next: {command}")
    elif commands:
        print("\nNext: " + "\n      ".join(map(visible, commands)))
    sys.stdout.flush()


def _fits(table: "Table") -> bool:
    console = wide_console()
    return console.measure(table, options=console.options.update(width=1000)).maximum <= console.width


def _table(report: "Report", decision: "Decision", *, intervals: bool, needs: bool) -> "Table":
    """The standings as rows. `needs`: with what it takes to run each."""
    from semmoe.solvers.evaluate.decision import KIND_METRIC, SERVED

    metric = KIND_METRIC[report.dispatch]
    metrics = [metric, "load_imbalance"] if metric != "load_imbalance" else [metric]
    if "lar" not in metrics and any(standing.role == SERVED for standing in decision.standings):
        metrics.insert(0, "lar")  # which is what a server's own counters tell
    timed = any(standing.time for standing in decision.standings)
    table = new_table()
    table.add_column("", overflow="fold")
    for heading in (["us a\nlayer"] if timed else []) + [COLUMNS[m][0].replace(" ", "\n") for m in metrics]:
        table.add_column(heading, no_wrap=True)
    if needs:
        table.add_column("needs", no_wrap=True)
    columns = [_microseconds(decision.standings, intervals=intervals)] if timed else []
    columns += [_values(decision.standings, m, intervals=intervals) for m in metrics]
    for row, standing in enumerate(decision.standings):
        cells = [column[row] for column in columns]
        style = "bold" if standing is decision.plan else None
        add_row(table, standing.name, *cells, *([standing.needs] if needs else []), style=style)
    return table


def _microseconds(standings: "list[Standing]", *, intervals: bool) -> list[str]:
    values = [f"{s.time.us['total']:,.1f}" if s.time else "" for s in standings]
    bounds = [s.time.ci if s.time else None for s in standings]
    shown = [f" [{b[0]:,.1f}, {b[1]:,.1f}]" if b and intervals else "" for b in bounds]
    width = max(map(len, values))
    return [f"{value:>{width}}{interval}" for value, interval in zip(values, shown, strict=True)]


def _values(standings: "list[Standing]", metric: str, *, intervals: bool) -> list[str]:
    cells = []
    for standing in standings:
        low, high = standing.score.interval(metric)
        wide = intervals and high - low > 5e-4
        cells.append(f"{standing.score.value(metric):.3f}" + (f" [{low:.3f}, {high:.3f}]" if wide else ""))
    return cells


def _title(report: "Report") -> str:
    nodes = "one node" if report.nodes == 1 else f"{report.nodes} nodes"
    from semmoe.profiles.errors import model_name

    said = f"{model_name(report.model, report.trace) or 'model'}: {report.ranks} ranks on {nodes}, {report.dispatch} dispatch; "
    said += f"{report.requests:,} held-out requests, {report.tokens:,} tokens{phase_words(report)}"
    if report.time is not None:
        time = report.time
        said += f"; {time.hardware}, {time.backend}, {time.tokens_per_rank:,} tokens a rank"
    return said
