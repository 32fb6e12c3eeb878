"""A result as a table for people, or one JSON object for programs; notes go to stderr.

Tables fit the terminal: intervals go first, then the columns that matter less. rich is imported
inside: `semmoe --help` does not need it.
"""

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from semmoe.profiles.errors import model_name, visible
from semmoe.terminal.loudness import say
from semmoe.terminal.text import add_row, json_line, visible_lines

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from semmoe.profiles.trace import RoutingTrace
    from semmoe.solvers.evaluate.compare import Comparison
    from semmoe.solvers.evaluate.report import Report, ScoreRow, Times
    from semmoe.solvers.evaluate.time_report import TimeReport
    from semmoe.solvers.health.record import Health
    from semmoe.solvers.plan import Plan

COLUMNS = {
    "lar": ("LAR", True),
    "rem": ("REM", False),
    "node": ("NODE", False),
    "link": ("LINK", False),
    "load_imbalance": ("load max/mean", False),
    "load_imbalance_median": ("load max/median", False),
    "token_imbalance": ("tokens max/mean", False),
}
NARROW_COLUMNS = ("lar", "rem", "node", "link", "load_imbalance")
LEAST_COLUMNS = ("rem", "load_imbalance")
PIPE_WIDTH = 220  # columns where stdout is no terminal: a table is then read by a program or a pager
SCORE_CAPTION = "* best of its column, oracles left out"
INTERVAL_CAPTION = "; in brackets: 95% bootstrap interval over requests"


def note(line: str) -> None:
    """A line of ours for people on stderr, unless they asked for quiet."""
    say(f"semmoe: {visible(line)}")


def note_unchecked(*inputs: "RoutingTrace | Plan") -> None:
    """Say which files of traces and plans were used without being compared with a hash of them."""
    for opened in inputs:
        for file, why in opened.unchecked.items():
            note(f"{file} was not checked: {why}")


def print_json(value: Any) -> None:
    """One JSON object on stdout; with escapes where stdout cannot write its text (another
    encoding, a path that is not UTF-8)."""
    text = json_line(value)
    try:
        text.encode(sys.stdout.encoding or "utf-8")  # a text buffer has none
    except UnicodeEncodeError:
        text = json_line(value, ascii_only=True)
    print(text)


def print_scores(report: "Report") -> None:
    """Every placement and schedule of a report with the better value of each column marked, and
    its times."""
    if report.time is not None:
        print_time(report.time)
    tables = [(_score_table(report, shown, intervals), intervals) for shown, intervals in layouts(report.nodes)]
    print_fitting(
        wide_console(), [table for table, _ in tables], title=_title(report), caption=caption_of(dict(tables))
    )
    if report.dispatch == "gather":
        print("Placement cannot reduce traffic here, only balance load.")


def caption_of(tables: "dict[Table, bool]", more: str = "") -> Callable[["Table"], str]:
    """The caption of whichever of the tables fits: intervals are explained where there are some.
    `tables`: whether each has them."""
    return lambda table: SCORE_CAPTION + (INTERVAL_CAPTION if tables[table] else "") + more


def layouts(num_nodes: int) -> list[tuple[list[str], bool]]:
    """Columns of a table of scores and whether they have intervals: all there is, then less and
    less for narrow terminals."""
    metrics = [m for m in COLUMNS if m != "node" or num_nodes > 1]
    narrow = [m for m in metrics if m in NARROW_COLUMNS]
    return [(metrics, True), (narrow, True), (metrics, False), (narrow, False), (list(LEAST_COLUMNS), False)]


def wide_console() -> "Console":
    """A console on stdout: the terminal's width, a fixed one elsewhere; colours only on a
    terminal, and not with NO_COLOR. No text is read as markup or as names of emoji."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False, markup=False, emoji=False)


def print_fitting(
    console: "Console", tables: list["Table"], *, title: str, caption: "str | Callable[[Table], str]"
) -> None:
    """The first table that fits the console, the last where none does, between a title and a
    caption, which may be another for each table."""
    unbounded = console.options.update(width=1000)
    fitting = [t for t in tables if console.measure(t, options=unbounded).maximum <= console.width]
    console.print(visible_lines(title), style="bold")
    shown = (fitting or tables[-1:])[0]
    console.print(shown)
    console.print(visible_lines(caption if isinstance(caption, str) else caption(shown)), style="dim")


def new_table() -> "Table":
    """An empty table in the house style."""
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)


def _score_table(report: "Report", metrics: list[str], intervals: bool) -> "Table":
    table = new_table()
    for heading in ("placement", "schedule"):
        table.add_column(heading, overflow="fold")
    for metric in metrics:
        table.add_column(COLUMNS[metric][0].replace(" ", "\n"), no_wrap=True)
    rows, uniform = report.rows, report.uniform
    for row in rows:
        cells = (score_cell(row, metric, rows, intervals=intervals) for metric in metrics)
        add_row(table, *row.key, *cells, style="dim" if row.is_oracle else None)
    cells = (f"{uniform[m]:{_width(m, rows)}.3f}" if m in uniform else "" for m in metrics)
    add_row(table, "uniform", "random", *cells, style="dim")
    return table


def _title(report: "Report") -> str:
    nodes = "one node" if report.nodes == 1 else f"{report.nodes} nodes"
    return (
        f"{model_name(report.model, report.trace) or 'model'}: {report.ranks} ranks on {nodes}, {report.dispatch} dispatch; "
        f"{report.requests} held-out requests, {report.tokens:,} tokens{phase_words(report)}; "
        f"mean over {len(report.layers)} layers"
    )


def phase_words(scored: "Report | Comparison") -> str:
    """Whose tokens were scored, and the share of each phase in the trace, for a title."""
    if not scored.phase_shares:
        return ""
    shares = ", ".join(f"{share:.0%} {name}" for name, share in scored.phase_shares.items())
    return f" ({shares})" if scored.phase == "all" else f", {scored.phase} tokens alone (trace: {shares})"


def _width(metric: str, rows: "Sequence[ScoreRow]") -> int:
    """Letters of the widest value of a column."""
    return max(len(f"{row.value(metric):.3f}") for row in rows)


def score_cell(row: "ScoreRow", metric: str, rows: "Sequence[ScoreRow]", *, intervals: bool) -> "Text":
    """A value, marked where it is the best of `rows`, and its interval; digits are aligned in a
    left-justified column."""
    low, high = row.interval(metric)
    better = max if COLUMNS[metric][1] else min
    values = [round(other.value(metric), 3) for other in rows if not other.is_oracle]
    value = round(row.value(metric), 3)
    best = not row.is_oracle and len(set(values)) > 1 and value == better(values)
    text = f"{value:{_width(metric, rows)}.3f}{'*' if best else ' '}"
    # An interval without width (a value that does not depend on the data) is left out.
    interval = f" [{low:.3f}, {high:.3f}]" if intervals and high - low > 5e-4 else ""
    from rich.text import Text

    return Text.assemble((text, "bold" if best else ""), interval)


TIME_CAPTION = (
    "microseconds of one MoE layer, mean over batches and layers; p95 over batches; imbalances: the busiest rank or link "
    "over the mean; (schedule): the engine does not run it"
)


def print_time(time: "TimeReport", plan: str = "") -> None:
    """Predicted time of every row, and the verdict by time. `plan`: its name, where there are
    several."""
    console = wide_console()
    engine = f", {time.engine}" if time.engine else ""
    whose = f"{plan}: predicted" if plan else "Predicted"
    title = (
        f"{whose} on {time.hardware}, {time.backend}{engine}: {time.tokens_per_rank:,} {time.phase} tokens a rank, "
        f"overlap {time.overlap}"
    )
    print_fitting(
        console, [_time_table(time, shown) for shown in (range(9), (3, 4, 5, 7))], title=title, caption=TIME_CAPTION
    )
    if plan and (verdict := time.verdict):  # a report by itself has said it already
        colour = {"good": "green", "bad": "red"}.get(verdict.level, "yellow")
        console.print(f"\n{visible(verdict.sentence)}", style=colour)
    console.print("")


TIME_HEADINGS = (
    "dispatch",
    "experts",
    "combine",
    "total",
    "p95",
    "experts\nmax/mean",
    "link\nmax/mean",
    "bound by",
    "of step",
)


def time_cells(time: "TimeReport") -> list[list[str]]:
    """Placement, schedule and TIME_HEADINGS of every row."""
    cells = []
    for row in time.rows:
        us = [f"{row.us[name]:,.1f}" for name in ("dispatch", "experts", "combine", "total", "p95")]
        imbalance = [f"{row.imbalance[name]:.3f}" for name in ("experts", "link")]
        share = "" if row.share_of_step is None else f"{row.share_of_step:.1%}"
        schedule = row.schedule if row.deployable else f"({row.schedule})"
        cells.append([row.placement, schedule, *us, *imbalance, row.bound_by, share])
    return cells


def _time_table(time: "TimeReport", shown: Sequence[int]) -> "Table":
    table = new_table()
    for heading in ("placement", "schedule"):
        table.add_column(heading, overflow="fold")
    for number in shown:
        table.add_column(TIME_HEADINGS[number], justify="right", no_wrap=True)
    for placement, schedule, *values in time_cells(time):
        add_row(table, placement, schedule, *(values[n] for n in shown))
    return table


def print_times(times: "Times", against: str) -> None:
    """Predicted communication time of every row, under the table of a report."""
    title = (
        f"\nPredicted dispatch and combine of a batch of {times.batch_tokens:,} tokens over all ranks: {times.network}"
    )
    tables = [_times_table(times, against, shown) for shown in (range(3), (0, 2))]
    print_fitting(wide_console(), tables, title=title, caption=times.assumption)


def _times_table(times: "Times", against: str, shown: Sequence[int]) -> "Table":
    """`against`: the baseline. `shown`: which of milliseconds per layer, of all layers, and their
    share."""
    table = new_table()
    for heading in ("placement", "schedule"):
        table.add_column(heading, overflow="fold")
    headings = ("ms per\nlayer", "ms, all\nlayers", f"of\n{against}")
    for number in shown:
        table.add_column(headings[number], justify="right", no_wrap=True)
    for placement, schedule, *values in times_cells(times, against):
        cells = (values[n] for n in shown)
        add_row(table, placement, schedule, *cells, style="dim" if "oracle" in schedule else None)
    return table


def times_cells(times: "Times", against: str) -> list[list[str]]:
    """Placement, schedule, milliseconds per layer and of all layers, and their share of the
    baseline's with random homes."""
    before = next(r.ms_per_layer for r in times.rows if (r.placement, r.schedule) == (against, "random"))
    totals = [sum(row.ms_layers) for row in times.rows]
    digits, total_digits = _decimals([row.ms_per_layer for row in times.rows]), _decimals(totals)
    cells = []
    for row, total in zip(times.rows, totals, strict=True):
        share = f"{row.ms_per_layer / before:.2f}" if before else "-"
        numbers = (f"{row.ms_per_layer:,.{digits}f}", f"{total:,.{total_digits}f}", share)
        cells.append([row.placement, row.schedule, *numbers])
    return cells


def _decimals(values: Sequence[float]) -> int:
    """Decimals that show three figures of the least of the values, so that a column's points are
    aligned."""
    from math import floor, log10

    least = min((value for value in values if value > 0), default=1.0)
    return min(max(2 - floor(log10(least)), 0), 9)


def print_facts(facts: dict[str, Any], *, as_json: bool) -> None:
    """Named facts as JSON, or one a line."""
    if as_json:
        print_json(facts)
        return
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        if isinstance(value, list):
            value = _shortened(value)
        elif isinstance(value, float):
            value = f"{value:.3f}"
        elif isinstance(value, int):
            value = f"{value:,}"
        print(f"{visible(name).replace('_', ' '):<{width}}  {visible(str(value))}")


def print_balance(rows: list[dict[str, Any]], names: dict[str, str], *, as_json: bool) -> None:
    """How evenly placements load their ranks, where nothing else can be scored. `names`: of plan
    and trace."""
    if as_json:
        print_json({**names, "scored": "balance", "rows": rows})
        return
    print(f"{'placement':<12}{'load max/mean':>15}{'load max/median':>17}")
    for row in rows:
        print(f"{row['placement']:<12}{row['load_imbalance']:>15.3f}{row['load_imbalance_median']:>17.3f}")


def _shortened(values: list[Any]) -> str:
    texts = [str(v) for v in values]
    if len(texts) > 12:
        texts = [*texts[:8], "...", *texts[-2:]]
    return " ".join(texts)


def print_health(health: "Health", *, as_json: bool) -> None:
    """The health of a trace as JSON, or its findings and its learning curve as tables."""
    if as_json:
        print_json(health.to_json())
        return
    from rich.text import Text

    console = wide_console()
    colours = {"good": "green", "watch": "yellow", "bad": "red"}
    table = new_table()
    for heading in ("question", "", "answer"):
        table.add_column(heading, overflow="fold")
    for found in health.findings:
        add_row(table, found.topic, Text(found.level, colours[found.level]), found.text)
    title = (
        f"{model_name(health.model, health.trace) or 'model'}: {health.requests:,} requests, {health.tokens:,} tokens"
    )
    print_fitting(
        console, [table], title=title, caption="good: nothing to do; watch: a limit to know; bad: act before placing"
    )
    if learning := health.learning:
        curve = new_table()
        for heading in ("training tokens", "REM", ""):
            curve.add_column(heading, justify="left" if not heading else "right")
        for point in learning.points:
            add_row(curve, f"{point.tokens:,.0f}", f"{point.rem:.3f}", "")
        for point in learning.forecast:
            add_row(curve, f"{point.tokens:,.0f}", f"{point.rem:.3f}", "expected", style="dim")
        title = f"\nHeld-out REM on {health.ranks} ranks by training tokens; contiguous experts: {learning.contiguous_rem:.3f}"
        caption = "quick METIS on some layers; expected: read off a power law through the points"
        print_fitting(console, [curve], title=title, caption=caption)
