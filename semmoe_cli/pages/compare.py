"""Plans side by side as a page: quality on requests that none of them saw, differences, and the
experts to move.

The numbers are those of `semmoe compare`'s tables.
"""

from typing import Any

from semmoe.pages.deployment import named_model
from semmoe.pages.figures.plan import score_rows
from semmoe.pages.page import Grid, Page, Picture, Section, Text
from semmoe.solvers.evaluate.compare import PAIRED
from semmoe.terminal.tables import COLUMNS


def compare_page(comparison: dict[str, Any], shown_rows: list[dict[str, Any]], notes: list[str]) -> Page:
    """The page of a comparison object (docs/formats.md). `shown_rows`: each plan at random homes
    and under its best schedule."""
    model = named_model(comparison["model"])
    return Page(
        title=f"Plans for {model}" if model else "Plans side by side",
        verdict=compare_verdict(comparison),
        level="good",
        badge=f"{len(comparison['plans'])} plans",
        facts=[
            ("Trace", comparison["trace"]),
            ("Scored on", f"{comparison['requests']:,} requests that no plan saw, {comparison['tokens']:,} tokens"),
            ("Dispatch", comparison["dispatch"]),
        ],
        sections=[
            section
            for section in (_quality(comparison, shown_rows, notes), _differences(comparison), _moves(comparison))
            if section is not None
        ],
        footer=_footer(),
    )


def compare_verdict(comparison: dict[str, Any]) -> str:
    """Which plan reaches the fewest remote ranks with tokens at random homes, and whether that
    is more than chance."""
    ranks = sorted({plan["ranks"] for plan in comparison["plans"]})
    if len(ranks) > 1:
        numbers = ", ".join(map(str, ranks))
        return (
            f"Plans for {numbers} ranks side by side: more ranks hold fewer experts each, and more of them are remote."
        )
    rows = [row for row in comparison["rows"] if row["schedule"] == "random"]
    best = min(rows, key=lambda row: row["rem"])
    first = comparison["plans"][0]["plan"]
    sentence = (
        f"{best['placement']} reaches the fewest remote ranks per token, {best['rem']:.3f} with tokens at random ranks"
    )
    found = next((d["rem"] for d in comparison["differences"] if d["plan"] == best["placement"]), None)
    if found is None:
        return f"{sentence}."
    sure = "more than chance" if found[2] < 0 else "no more than chance"
    return f"{sentence}; the difference to {first} is {sure} ({found[0]:+.3f}, interval {found[1]:+.3f} to {found[2]:+.3f})."


def _quality(comparison: dict[str, Any], rows: list[dict[str, Any]], notes: list[str]) -> Section:
    nodes = max(plan["nodes"] for plan in comparison["plans"])
    metrics = [metric for metric in COLUMNS if metric != "node" or nodes > 1]
    plans = {plan["plan"]: plan for plan in comparison["plans"]}
    cells, marked = [], set()
    for y, row in enumerate(rows):
        line = [
            row["placement"],
            plans[row["placement"]]["method"],
            str(plans[row["placement"]]["ranks"]),
            row["schedule"],
        ]
        for metric in metrics:
            values = [round(other[metric], 3) for other in rows]
            if len(set(values)) > 1 and round(row[metric], 3) == (max if COLUMNS[metric][1] else min)(values):
                marked.add((y, len(line)))
            low, high = row["ci"][metric]
            interval = f" [{low:.3f}, {high:.3f}]" if high - low > 5e-4 else ""
            line.append(f"{row[metric]:.3f}{interval}")
        cells.append(line)
    headings = ["plan", "method", "ranks", "schedule", *(COLUMNS[metric][0] for metric in metrics)]
    grid = Grid(headings, cells, frozenset(marked), names_at=frozenset((0, 1, 3)))
    hint = "In brackets: 95 % bootstrap interval over requests. Each plan at random homes and under its best schedule."
    picture = Picture(
        score_rows({"rows": rows, "uniform": {}}, "rem"),
        0.75 + 0.28 * len(rows),
        "Remote ranks per token and load of the busiest rank of each plan, with intervals",
    )
    return Section("Quality", [grid, picture, *(Text(f"{note}.") for note in notes), Text(hint, hint=True)])


def _differences(comparison: dict[str, Any]) -> Section | None:
    if not comparison["differences"]:
        return None
    rows = [
        [row["plan"], *(f"{row[m][0]:+.3f} [{row[m][1]:+.3f}, {row[m][2]:+.3f}]" for m in PAIRED)]
        for row in comparison["differences"]
    ]
    grid = Grid(["plan", *(COLUMNS[metric][0] for metric in PAIRED)], rows)
    hint = "In brackets: 95 % paired bootstrap interval; below 0 is better, and where it holds 0 the plans are alike."
    return Section(
        f"Difference to {comparison['plans'][0]['plan']}, on the same requests", [grid, Text(hint, hint=True)]
    )


def _moves(comparison: dict[str, Any]) -> Section:
    rows, reasons = [], []
    for moves in comparison["moves"]:
        if "why_not" in moves:
            reasons.append(Text(f"{moves['from']} to {moves['to']}: {moves['why_not']}."))
            continue
        rows.append([moves["from"], moves["to"], *move_cells(moves, sized=bool(comparison["bytes_per_expert"]))])
    grid = Grid(["from", "to", "as named", "renamed", "renamed per layer"], rows, names_at=frozenset((0, 1)))
    hint = (
        "Renamed: with the one renaming of ranks, nodes kept together, that moves least and keeps the traffic. "
        "Per layer: a renaming for every layer, where no schedule sends tokens to ranks."
    )
    return Section("Expert copies to move", [*([grid] if rows else []), *reasons, Text(hint, hint=True)])


def move_cells(moves: dict[str, Any], *, sized: bool) -> list[str]:
    """Copies to load as named, renamed and renamed per layer: their number, their share of the
    slots and, where `sized`, their bytes."""
    cells = []
    for kind in ("", "_renamed", "_renamed_per_layer"):
        count = moves[f"experts{kind}"]
        size = f", {size_text(moves[f'bytes{kind}'])}" if sized else ""
        cells.append(f"{count:,} ({count / moves['slots']:.0%}{size})")
    return cells


def size_text(num_bytes: float) -> str:
    """Bytes in the largest unit that leaves a digit before the point: 1.13 MB."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= size:
            return f"{num_bytes / size:,.2f} {unit}"
    return f"{num_bytes:,.0f} bytes"


def _footer() -> str:
    from importlib.metadata import version

    return f"REM: other ranks that a token must reach; LAR: share of activations on the token's own rank. semmoe {version('semmoe')}."
