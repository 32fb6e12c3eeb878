"""`semmoe compare`: plans side by side on a trace, and what it takes to get from one to another."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from semmoe.options import (
    AgainstOption,
    FailUnder,
    Force,
    Json,
    ReplicaChoiceOption,
    Simulation,
    Timing,
    check_saved,
    grouped,
    refuse_to_replace,
    replica_rule,
)
from semmoe.profiles.errors import model_name

if TYPE_CHECKING:
    from rich.table import Table

    from semmoe.solvers.evaluate.compare import Comparison, GainCurve
    from semmoe.solvers.evaluate.report import ScoreRow


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large an expert is."""

    expert_bytes: Annotated[
        int, typer.Option(metavar="N", help="Bytes of one expert's weights; or give its sizes.", min=0)
    ] = 0
    hidden_size: Annotated[int, typer.Option(metavar="D", help="Hidden size of the model.", min=0)] = 0
    expert_size: Annotated[int, typer.Option(metavar="I", help="Intermediate size of an expert.", min=0)] = 0
    dtype_bytes: Annotated[float, typer.Option(help="With the sizes: bytes of a weight (0.5 = 4 bits).", min=0)] = 2.0

    def bytes(self) -> int:
        """Bytes of one expert's weights; 0 where nothing says it."""
        from semmoe.profiles.errors import InputError
        from semmoe.solvers.place.moves import expert_bytes

        if bool(self.hidden_size) != bool(self.expert_size):
            raise InputError("--hidden-size and --expert-size go together: an expert holds three matrices of that size")
        if not isfinite(self.dtype_bytes):
            raise typer.BadParameter("expected a number of bytes", param_hint="--dtype-bytes")
        if self.hidden_size and not self.expert_bytes:
            return expert_bytes(self.hidden_size, self.expert_size, self.dtype_bytes)
        return self.expert_bytes


@grouped()
def compare(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="PLAN PLAN... TRACE", help="Plans of one model, and a trace of it to score them on."),
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Also write a page: .html (one file), .md or .png."),
    ] = None,
    *,
    sizes: Sizes,
    replica_choice: ReplicaChoiceOption = None,
    against: AgainstOption = None,
    simulation: Simulation,
    timing: Timing,
    force: Force = False,
    fail_under: FailUnder = None,
    json_: Json = False,
) -> None:
    """Score plans side by side on requests that none of them saw, and count the experts to move
    from one to another.

    Example: semmoe compare p1 p2 t --expert-bytes 50000000 -o compare.html
    """
    from semmoe.profiles.errors import InputError
    from semmoe.profiles.split import counted_phase, only_phase
    from semmoe.profiles.trace import RoutingTrace
    from semmoe.solvers.evaluate.against import read_against
    from semmoe.solvers.evaluate.compare import compare_phases
    from semmoe.solvers.plan import Plan
    from semmoe.terminal.progress import steps
    from semmoe.terminal.tables import note, note_unchecked, print_json, print_time

    *plan_paths, trace = paths
    if len(plan_paths) < 2:
        raise typer.BadParameter("two plans or more, and a trace", param_hint="PLAN PLAN... TRACE")
    if len(set(plan_paths)) < len(plan_paths):
        raise InputError(f"a plan is named twice: {', '.join(plan_paths)}")
    bytes_per_expert, asked = sizes.bytes(), timing.asked(sizes.hidden_size, sizes.expert_size)
    if output is not None:
        from semmoe.pages.page import check_page_target

        check_page_target(output)
        refuse_to_replace(output, force=force)
    rule = replica_rule(replica_choice, timing.engine)
    plans, traced = {path: Plan.load(path).with_rule(rule) for path in plan_paths}, RoutingTrace.open(trace)
    held = [read_against(against, plan.model, plan.topology) for plan in plans.values()][0]
    whose = timing.whose and counted_phase([traced], timing.whose, timed=asked is not None)
    with steps("compare") as progress:
        comparison, notes = compare_phases(
            plans,
            traced,
            whose,
            bytes_per_expert=bytes_per_expert,
            against=held,
            setting=simulation.setting(),
            progress=progress,
        )
        if asked is not None:
            from semmoe.solvers.time.trace_times import plan_times

            view = only_phase(traced, whose or "all")
            comparison = replace(comparison, time=plan_times(plans, view, asked, simulation.setting(), held))
    if len(plans) == 2:
        from semmoe.solvers.replan.curve import gain_curve

        with steps("gain against moves") as progress:
            comparison = replace(comparison, curve=gain_curve(plans, traced, seed=simulation.seed, progress=progress))
    note_unchecked(*plans.values(), traced)
    for line in dict.fromkeys([*notes, *(line for time in (comparison.time or {}).values() for line in time.notes)]):
        note(line)
    comparison = replace(comparison, trace=trace)
    if json_:
        print_json(comparison.to_json())
    else:
        _print(comparison)
        for name, time in (comparison.time or {}).items():
            print_time(time, name)
    if output is not None:
        from semmoe.pages.compare import compare_page
        from semmoe.pages.page import write_page

        write_page(compare_page(comparison, notes), output)
        note(f"wrote {output} ({output.stat().st_size / 1e3:,.0f} kB)")
    _next(comparison, as_json=json_)
    check_saved(fail_under, _saved(comparison))


def _next(comparison: "Comparison", *, as_json: bool) -> None:
    """Deploy the plan that is recommended; stay with the first where no other is."""
    from semmoe.pages.compare import recommended
    from semmoe.terminal.decision import next_step
    from semmoe.terminal.text import quoted

    name = recommended(comparison)
    stays = name == comparison.plans[0].plan
    lines = [f"semmoe report {quoted(name)} {quoted(comparison.trace)} -o report.html"]
    lines += [] if stays else [f"semmoe export {quoted(name)} --to sglang -o map.json"]
    next_step(*lines, as_json=as_json)


def _saved(comparison: "Comparison") -> dict[str, float]:
    """Share of remote ranks that each plan saves against what it is compared with, tokens at
    random homes; by plan."""
    from semmoe.solvers.evaluate.report import random_row

    rem = {name: random_row(comparison.rows, name).rem for name in {row.placement for row in comparison.rows}}
    # A baseline has a row for the slots of each plan.
    name_of = {
        d.plan: d.against if d.against in rem else f"{d.against} beside {d.plan}" for d in comparison.differences
    }
    held = {plan: rem[name] for plan, name in name_of.items()}
    return {d.plan: -d.rem[0] / held[d.plan] if held[d.plan] else 0.0 for d in comparison.differences}


def _print(comparison: "Comparison") -> None:
    from semmoe.pages.compare import compare_verdict, shown_rows
    from semmoe.profiles.errors import visible
    from semmoe.solvers.evaluate.compare import NoMoves
    from semmoe.terminal.tables import caption_of, layouts, phase_words, print_fitting, wide_console

    console = wide_console()
    console.print(visible(compare_verdict(comparison)), style="bold")
    console.print("")
    nodes = max(plan.nodes for plan in comparison.plans)
    model = model_name(comparison.model, comparison.trace) or "model"
    title = (
        f"{model}: {comparison.requests} requests that no plan saw, {comparison.tokens:,} tokens"
        f"{phase_words(comparison)}; {comparison.dispatch} dispatch"
    )
    shapes = [(facts, *layout) for layout in layouts(nodes) for facts in (("method", "ranks"), ())]
    alone = {f"\n{p.phase} tokens alone: {p.tokens:,}": p.rows for p in comparison.phases or []}
    for heading, scored in {title: comparison.rows, **alone}.items():
        rows = shown_rows(comparison, scored)
        tables = {_score_table(comparison, rows, *shape): shape[-1] for shape in shapes}
        print_fitting(console, list(tables), title=heading, caption=caption_of(tables, "; --json holds every schedule"))
    if comparison.differences:
        print_fitting(
            console,
            [_difference_table(comparison)],
            title=f"\nDifference to {comparison.against}, on the same requests, tokens at random homes",
            caption="in brackets: 95% paired bootstrap interval; better or worse where it excludes 0",
        )
    print_fitting(
        console,
        [_move_table(comparison)],
        title="\nExpert copies that ranks must load to get from one plan to another",
        caption="renamed: with the one renaming of ranks, nodes kept together, that moves least and keeps the traffic; "
        "per layer: a renaming for every layer, where no schedule sends tokens to ranks",
    )
    for moves in comparison.moves:
        if isinstance(moves, NoMoves):
            console.print(visible(f"{moves.from_} to {moves.to}: {moves.why_not}"))
    if comparison.curve is not None:
        print_fitting(
            console,
            [_curve_table(comparison.curve)],
            title=f"\nGain kept against moves from {comparison.plans[0].plan}, in {comparison.curve.unit}",
            caption=f"fitted on {comparison.curve.fitted_requests} of the new requests, scored on the other "
            f"{comparison.curve.scored_requests}; in brackets: 95% bootstrap interval; load: busiest rank over mean",
        )


def _score_table(
    comparison: "Comparison", rows: "list[ScoreRow]", facts: Sequence[str], metrics: list[str], intervals: bool
) -> "Table":
    """`facts`: what the table tells of a plan beside its name."""
    from semmoe.terminal.tables import COLUMNS, new_table, score_cell
    from semmoe.terminal.text import add_row

    table = new_table()
    for heading in ("plan", *facts, "schedule"):
        table.add_column(heading, justify="right" if heading == "ranks" else "left", overflow="fold")
    for metric in metrics:
        table.add_column(COLUMNS[metric][0].replace(" ", "\n"), no_wrap=True)
    plans = {plan.plan: plan for plan in comparison.plans}
    for row in rows:
        about = (str(getattr(plans[row.placement], fact)) if row.placement in plans else "" for fact in facts)
        cells = (score_cell(row, metric, rows, intervals=intervals) for metric in metrics)
        add_row(table, row.placement, *about, row.schedule, *cells)
    return table


def _difference_table(comparison: "Comparison") -> "Table":
    from semmoe.solvers.evaluate.compare import PAIRED
    from semmoe.terminal.tables import COLUMNS, new_table
    from semmoe.terminal.text import add_row

    table = new_table()
    table.add_column("plan", overflow="fold")
    table.add_column("")
    table.add_column("difference", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in comparison.differences:
        for metric in PAIRED:
            value, low, high = getattr(row, metric)
            sure = "better" if high < 0 else "worse" if low > 0 else "same"
            name = row.plan if metric == PAIRED[0] else ""
            add_row(table, name, COLUMNS[metric][0], f"{value:+.3f} [{low:+.3f}, {high:+.3f}]", sure)
    return table


def _curve_table(curve: "GainCurve") -> "Table":
    from semmoe.pages.compare import curve_cells
    from semmoe.terminal.tables import new_table
    from semmoe.terminal.text import add_row

    table = new_table()
    for heading in ("placement", "moves", "gain", "kept", "REM", "load", ""):
        table.add_column(heading, justify="left" if heading in ("placement", "") else "right", overflow="fold")
    for point in curve.points:
        bar = "#" * round(20 * min(max(point.kept or 0, 0), 1.5))
        add_row(table, *curve_cells(point), bar)
    return table


def _move_table(comparison: "Comparison") -> "Table":
    from semmoe.pages.compare import move_cells
    from semmoe.solvers.evaluate.compare import PlanMoves
    from semmoe.terminal.tables import new_table
    from semmoe.terminal.text import add_row

    sized = bool(comparison.bytes_per_expert)
    table = new_table()
    for heading in ("from", "to"):
        table.add_column(heading, overflow="fold")
    for heading in ("as named", "renamed", "renamed per layer"):
        table.add_column(heading, justify="right")
    for moves in comparison.moves:
        if isinstance(moves, PlanMoves):
            add_row(table, moves.from_, moves.to, *move_cells(moves, sized=sized))
    return table
