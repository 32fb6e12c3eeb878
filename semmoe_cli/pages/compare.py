"""Plans side by side as a page: quality on requests that none of them saw, differences, and the
experts to move.

The numbers are those of `semmoe compare`'s tables.
"""

from semmoe.pages.figures.plan import gain_against_moves, score_rows
from semmoe.pages.on_request import timed
from semmoe.pages.page import Grid, Page, Picture, Section, Text
from semmoe.profiles.errors import model_name
from semmoe.solvers.evaluate.against import BASELINES
from semmoe.solvers.evaluate.compare import PAIRED, Comparison, CurvePoint, NoMoves, PlanMoves
from semmoe.solvers.evaluate.report import ScoreRow, random_row
from semmoe.solvers.evaluate.verdict import best_deployable, traffic_cost
from semmoe.terminal.tables import COLUMNS, phase_words

SELDOM = ("load_imbalance_median", "token_imbalance")  # not worth a column on paper


def compare_page(comparison: Comparison, notes: list[str]) -> Page:
    """The page of a comparison."""
    model = model_name(comparison.model, comparison.trace)
    return Page(
        title=f"Plans for {model}" if model else "Plans side by side",
        verdict=compare_verdict(comparison).partition(";")[0].removesuffix("."),
        lead=compare_verdict(comparison),
        level="good" if recommended(comparison) != comparison.plans[0].plan else "watch",
        badge=f"{len(comparison.plans)} plans",
        facts=[
            ("Trace", comparison.trace),
            (
                "Scored on",
                f"{comparison.requests:,} requests that no plan saw, {comparison.tokens:,} tokens{phase_words(comparison)}",
            ),
            ("Dispatch", comparison.dispatch),
        ],
        sections=[
            section
            for section in (
                *_times(comparison),
                _quality(comparison, comparison.rows, "Quality", notes),
                *(
                    _quality(comparison, p.rows, f"On {p.tokens:,} {p.phase} tokens alone", [])
                    for p in comparison.phases or []
                ),
                _differences(comparison),
                _memory(comparison),
                _moves(comparison),
                _curve(comparison),
            )
            if section is not None
        ],
        footer=_footer(),
    )


def shown_rows(comparison: Comparison, scored: list[ScoreRow]) -> list[ScoreRow]:
    """Baselines, then each plan at random homes and under its best schedule that can be
    deployed."""
    held = comparison.against in BASELINES  # then each plan has its own row of it
    shown = list(comparison.baselines) if scored is comparison.rows and not held else []
    for plan in comparison.plans:
        rows = [row for row in scored if row.placement == plan.plan]
        shown.append(random_row(rows, plan.plan))
        best = best_deployable(rows, comparison.dispatch)
        if best != "random":
            shown.append(next(row for row in rows if row.schedule == best))
    names = {plan.plan for plan in comparison.plans}
    return shown + [row for row in scored if row.placement not in names]


def _times(comparison: Comparison) -> list[Section]:
    """Predicted times of each plan, where hardware is given."""
    found = {name: timed(time) for name, time in (comparison.time or {}).items()}
    return [Section(f"{name}. {section.title}", section.blocks) for name, section in found.items()]


def recommended(comparison: Comparison) -> str:
    """The plan to deploy: the fastest where times are known, else the one that sends least (with
    gather, whose busiest rank carries least); the first unless another is better by more than
    chance."""
    names = [plan.plan for plan in comparison.plans]
    if comparison.time:
        least = {name: _microseconds(comparison, name) for name in names}
    else:
        gather = comparison.dispatch == "gather"
        rows = {name: random_row(comparison.rows, name) for name in names}
        least = {n: row.load_imbalance if gather else traffic_cost(row, comparison.dispatch) for n, row in rows.items()}
    best, first = min(names, key=lambda name: least[name]), names[0]
    if comparison.time or len({plan.ranks for plan in comparison.plans}) > 1:
        return best
    change = _change(comparison, best)
    return best if change is None or change[2] < 0 else first


def _microseconds(comparison: Comparison, name: str) -> float:
    rows = (comparison.time or {})[name].rows
    return min(row.us["total"] for row in rows if row.deployable and row.placement in ("plan", name))


def _change(comparison: Comparison, plan: str) -> tuple[float, float, float] | None:
    """Difference of a plan to what it is held against, with its interval; None where there is
    none."""
    metric = "load_imbalance" if comparison.dispatch == "gather" else "rem"
    return next((getattr(d, metric) for d in comparison.differences if d.plan == plan), None)


def compare_verdict(comparison: Comparison) -> str:
    """Which plan to deploy, and by how much it is better than what it is held against."""
    ranks = sorted({plan.ranks for plan in comparison.plans})
    if len(ranks) > 1:
        numbers = ", ".join(map(str, ranks))
        return (
            f"Plans for {numbers} ranks side by side: more ranks hold fewer experts each, and more of them are remote."
        )
    first, best = comparison.plans[0].plan, recommended(comparison)
    held = comparison.against or first
    opening = f"Deploy {best}" if best != first else f"Stay with {first}"
    if comparison.time:
        return f"{opening}: a layer takes {_microseconds(comparison, best):,.1f} us, the least of the plans."
    row = random_row(comparison.rows, best)
    said = f"{opening}: {row.rem:.3f} remote ranks per token, the busiest rank carries {row.load_imbalance:.2f} of the mean"
    others = [(d.plan, _change(comparison, d.plan)) for d in comparison.differences]
    shown = [(name, change) for name, change in others if change and (best in (first, name))]
    if not shown:
        return f"{said}."
    name, change = min(shown, key=lambda pair: pair[1])
    sure = "better" if change[2] < 0 else "worse" if change[1] > 0 else "no better by more than chance"
    return f"{said}; {name} is {sure} than {held} ({change[0]:+.3f}, interval {change[1]:+.3f} to {change[2]:+.3f})."


def _quality(comparison: Comparison, scored: list[ScoreRow], title: str, notes: list[str]) -> Section:
    rows = shown_rows(comparison, scored)
    nodes = max(plan.nodes for plan in comparison.plans)
    metrics = [metric for metric in COLUMNS if metric not in SELDOM and (metric != "node" or nodes > 1)]
    plans = {plan.plan: plan for plan in comparison.plans}
    cells, marked = [], set()
    for y, row in enumerate(rows):
        plan = plans.get(row.placement)
        line = [row.placement, *((plan.method, str(plan.ranks)) if plan else ("", "")), row.schedule]
        for metric in metrics:
            values = [round(other.value(metric), 3) for other in rows]
            if len(set(values)) > 1 and values[y] == (max if COLUMNS[metric][1] else min)(values):
                marked.add((y, len(line)))
            low, high = row.interval(metric)
            interval = f" [{low:.3f}, {high:.3f}]" if high - low > 5e-4 else ""
            line.append(f"{row.value(metric):.3f}{interval}")
        cells.append(line)
    headings = ["plan", "method", "ranks", "schedule", *(COLUMNS[metric][0] for metric in metrics)]
    grid = Grid(headings, cells, frozenset(marked), names_at=frozenset((0, 1, 3)))
    hint = "In brackets: 95 % bootstrap interval over requests. Each plan at random homes and under its best schedule."
    picture = Picture(
        score_rows(rows, "rem"),
        0.75 + 0.28 * len(rows),
        "Remote ranks per token and load of the busiest rank of each plan, with intervals",
        stacked=2,
    )
    return Section(title, [grid, picture, *(Text(f"{note}.") for note in notes), Text(hint, hint=True)])


def _differences(comparison: Comparison) -> Section | None:
    if not comparison.differences:
        return None
    rows = []
    for row in comparison.differences:
        changes = (getattr(row, metric) for metric in PAIRED)
        rows.append([row.plan, *(f"{value:+.3f} [{low:+.3f}, {high:+.3f}]" for value, low, high in changes)])
    grid = Grid(["plan", *(COLUMNS[metric][0] for metric in PAIRED)], rows)
    hint = "In brackets: 95 % paired bootstrap interval; below 0 is better, and where it holds 0 the plans are alike."
    held = comparison.against or comparison.plans[0].plan
    return Section(f"Difference to {held}, on the same requests", [grid, Text(hint, hint=True)])


def _memory(comparison: Comparison) -> Section:
    """Slots of a rank beyond one for each expert, and their bytes where an expert's are known."""
    layers = next((len(moves.layers) for moves in comparison.moves if isinstance(moves, PlanMoves)), 0)
    rows = []
    for plan in comparison.plans:
        cells = [plan.plan, f"{plan.ranks}", f"{plan.replicas}"]
        if comparison.bytes_per_expert and layers:
            cells.append(size_text(plan.replicas * layers * comparison.bytes_per_expert))
        rows.append(cells)
    sized = ["more memory of a rank"] if len(rows[0]) > 3 else []
    words = Text(
        "Spare slots hold copies of experts; without any, a plan takes the memory that contiguous experts take.",
        hint=True,
    )
    return Section("Memory", [Grid(["plan", "ranks", "spare slots of a rank and layer", *sized], rows), words])


def _moves(comparison: Comparison) -> Section:
    rows, reasons = [], []
    for moves in comparison.moves:
        if isinstance(moves, NoMoves):
            reasons.append(Text(f"{moves.from_} to {moves.to}: {moves.why_not}."))
        else:
            rows.append([moves.from_, moves.to, *move_cells(moves, sized=bool(comparison.bytes_per_expert))])
    grid = Grid(["from", "to", "as named", "renamed", "renamed per layer"], rows, names_at=frozenset((0, 1)))
    hint = (
        "Renamed: with the one renaming of ranks, nodes kept together, that moves least and keeps the traffic. "
        "Per layer: a renaming for every layer, where no schedule sends tokens to ranks."
    )
    return Section("Expert copies to move", [*([grid] if rows else []), *reasons, Text(hint, hint=True)])


def _curve(comparison: Comparison) -> Section | None:
    curve = comparison.curve
    if curve is None:
        return None
    headings = ["placement", "moves", f"gain, {curve.unit}", "kept", "REM", "load max/mean"]
    grid = Grid(headings, [curve_cells(point) for point in curve.points], names_at=frozenset((0,)))
    picture = Picture(gain_against_moves(curve), 3.2, "Gain of re-placements against the experts that they move")
    hint = (
        f"Fitted on {curve.fitted_requests} of the requests that neither plan saw, scored on the other "
        f"{curve.scored_requests}. In brackets: 95 % bootstrap interval."
    )
    return Section(f"Gain against moves from {comparison.plans[0].plan}", [grid, picture, Text(hint, hint=True)])


def curve_cells(point: CurvePoint) -> list[str]:
    """A point of the curve in words: what it is, its moves, gain, part of the free gain, REM and
    load."""
    name = {"keep": f"{point.name}, as it is", "budget": f"within {point.name}"}.get(point.kind, point.name)
    kept = "" if point.kept is None else f"{point.kept:.2f}"
    gain = f"{point.gain:+.3f} [{point.lo:+.3f}, {point.hi:+.3f}]"
    return [name, f"{point.moves:,} ({point.share:.1%})", gain, kept, f"{point.rem:.3f}", f"{point.load:.2f}"]


def move_cells(moves: PlanMoves, *, sized: bool) -> list[str]:
    """Copies to load as named, renamed and renamed per layer: their number, their share of the
    slots and, where `sized`, their bytes."""
    cells = []
    for kind in ("", "_renamed", "_renamed_per_layer"):
        count, num_bytes = getattr(moves, f"experts{kind}"), getattr(moves, f"bytes{kind}")
        size = f", {size_text(num_bytes)}" if sized else ""
        cells.append(f"{count:,} ({count / moves.slots:.0%}{size})")
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
