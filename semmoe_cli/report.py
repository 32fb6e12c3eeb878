"""A result as a table for people, or one JSON object for programs; notes go to stderr.

rich is imported inside: `semmoe --help` does not need it.
"""

import json
import sys
from typing import Any

COLUMNS = {
    "lar": ("LAR", True),
    "rem": ("REM", False),
    "node": ("NODE", False),
    "link": ("LINK", False),
    "load_imbalance": ("load max/mean", False),
    "load_imbalance_median": ("load max/median", False),
    "token_imbalance": ("tokens max/mean", False),
}


def note(line: str) -> None:
    """A line for people on stderr."""
    print(f"semmoe: {line}", file=sys.stderr)


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, ensure_ascii=False))


def print_report(report: dict[str, Any], *, as_json: bool) -> None:
    """A report (docs/formats.md) as JSON, or as a table with the better value of each column marked."""
    if as_json:
        print_json(report)
        return
    from rich.console import Console
    from rich.table import Table

    metrics = [m for m in COLUMNS if m != "node" or report["nodes"] > 1]
    table = Table(title=_title(report), title_justify="left", caption_justify="left", caption=_caption(report))
    for heading in ("placement", "schedule"):
        table.add_column(heading)
    for metric in metrics:
        table.add_column(COLUMNS[metric][0], justify="right")
    rows = report["rows"]
    for row in rows:
        table.add_row(row["placement"], row["schedule"], *(_cell(row, metric, rows) for metric in metrics))
    uniform = report["uniform"]
    table.add_row("uniform", "random", *(f"{uniform[m]:.3f}" if m in uniform else "" for m in metrics), style="dim")
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(table)
    if report["dispatch"] == "gather":
        console.print(
            "--dispatch gather moves the same bytes whatever the placement: it cannot reduce traffic here, only balance load."
        )


def _title(report: dict[str, Any]) -> str:
    return (
        f"{report['model'] or 'model'}: {report['ranks']} ranks on {report['nodes']} node(s), {report['dispatch']} dispatch; "
        f"{report['requests']} held-out requests, {report['tokens']:,} tokens; mean over {len(report['layers'])} layers"
    )


def _caption(report: dict[str, Any]) -> str:
    return "plan = this placement; * best of the column; in brackets: 95 % bootstrap interval over requests"


def _cell(row: dict[str, Any], metric: str, rows: list[dict[str, Any]]) -> str:
    low, high = row["ci"][metric]
    better = max if COLUMNS[metric][1] else min
    values = [round(r[metric], 3) for r in rows]
    value = round(row[metric], 3)
    mark = "*" if value == better(values) and len(set(values)) > 1 else " "
    # An interval without width (a value that does not depend on the data) is left out.
    interval = f" [{low:.3f}, {high:.3f}]" if high - low > 5e-4 else ""
    return f"{value:.3f}{mark}{interval}"


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
        print(f"{name.replace('_', ' '):<{width}}  {value}")


def _shortened(values: list[Any]) -> str:
    texts = [str(v) for v in values]
    if len(texts) > 12:
        texts = [*texts[:8], "...", *texts[-2:]]
    return " ".join(texts)
