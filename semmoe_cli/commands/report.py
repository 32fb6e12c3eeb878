"""`semmoe report`: a plan on a trace, or the health of a trace."""

from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from semmoe.options import (
    AgainstOption,
    All,
    FailUnder,
    Force,
    Json,
    ReplicaChoiceOption,
    Simulation,
    Timing,
    check_saved,
    given,
    grouped,
    refuse_to_replace,
    replica_rule,
)

if TYPE_CHECKING:
    from semmoe.pages.page import Page
    from semmoe.pages.plan_report import PlanReport, PlanReportOptions
    from semmoe.profiles.trace import RoutingTrace
    from semmoe.solvers.plan import Plan
    from semmoe.solvers.time.hardware import TimeAsked
    from semmoe.terminal.decision import Shown


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What a report of a plan says beyond its scores."""

    what_if: Annotated[
        str, typer.Option(metavar="R,R,...", help="Also place and score on these numbers of ranks, e.g. 2,4,8,16,32.")
    ] = ""
    hidden_size: Annotated[
        int, typer.Option(metavar="D", help="Also give bytes per dispatch kind, for this hidden size.", min=0)
    ] = 0
    dispatch_bytes: Annotated[
        float, typer.Option(help="Bytes of a value at dispatch, 1 for float8; combine sends 2.", min=0)
    ] = 2.0
    topology_bandwidth: Annotated[
        str,
        typer.Option(
            metavar="GB/S",
            help="Also predict the time of dispatch and combine per layer: GB/s of a rank's link, one way; INTRA:INTER for links inside "
            "a node and between nodes; or a .json file with bandwidth and latency per class of link or pair of ranks.",
        ),
    ] = ""
    latency: Annotated[
        str,
        typer.Option(metavar="US", help="With --topology-bandwidth: microseconds of one exchange, or INTRA:INTER."),
    ] = ""
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Also name the most and least predictable tokens: tokenizer.json, its directory, or demo.",
        ),
    ] = None

    expert_size: Annotated[
        int, typer.Option(metavar="I", help="With --hardware: intermediate size of an expert.", min=0)
    ] = 0
    against: AgainstOption = None

    def options(self, timing: Timing, *, pictures: bool) -> "PlanReportOptions":
        """The same as pages read it."""
        from semmoe.pages.plan_report import PlanReportOptions

        if self.latency and not self.topology_bandwidth:
            raise typer.BadParameter("needs --topology-bandwidth", param_hint="--latency")
        if not isfinite(self.dispatch_bytes):
            raise typer.BadParameter("expected a number of bytes", param_hint="--dispatch-bytes")
        return PlanReportOptions(
            _numbers(self.what_if),
            self.hidden_size,
            self.dispatch_bytes,
            self.topology_bandwidth,
            self.latency,
            self.tokenizer,
            pictures,
            against=self.against,
            time=timing.asked(self.hidden_size, self.expert_size),
        )


@grouped()
def report(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="[PLAN] TRACE",
            help="Plan and a trace of the same model; a trace alone is checked for what it is good for. "
            "A trace is a directory or an fsspec URL.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help="Also write a report with pictures: .html (one file), .md or .png."
        ),
    ] = None,
    *,
    extras: Extras,
    timing: Timing,
    replica_choice: ReplicaChoiceOption = None,
    ranks: Annotated[
        int, typer.Option(help="Trace alone: ranks of its curves; 0: 8, or what the experts divide over.", min=0)
    ] = 0,
    simulation: Simulation,
    force: Force = False,
    all_: All = False,
    fail_under: FailUnder = None,
    json_: Json = False,
) -> None:
    """Score a plan on a trace beside what engines do without one, or check the health of a trace;
    in a screen or as a page.

    Example: semmoe report p t -o report.html --what-if 2,4,8,16; semmoe report t
    """
    from semmoe.profiles.errors import InputError
    from semmoe.terminal.decision import Shown

    if len(paths) > 2:
        raise typer.BadParameter("a plan and a trace, or a trace alone", param_hint="[PLAN] TRACE")
    if ranks and len(paths) == 2:
        raise typer.BadParameter("a plan has its own ranks; others are asked for with --what-if", param_hint="--ranks")
    options = extras.options(timing, pictures=output is not None)
    if output is not None:
        from semmoe.pages.page import check_page_target

        check_page_target(output)
        refuse_to_replace(output, force=force)
    if len(paths) == 2:
        options = replace(options, phase=timing.whose, replica_choice=replica_rule(replica_choice, timing.engine))
        shown = Shown(everything=all_, as_json=json_)
        check_saved(fail_under, _report_plan(paths[0], paths[1], options, simulation, output, shown))
    elif given(
        extras,
        but=("dispatch_bytes", *(("hidden_size", "expert_size") if options.time else ())),
        replica_choice=replica_choice,
        fail_under=fail_under is not None,
    ):
        raise InputError(
            "--what-if, --tokenizer, --hidden-size, --topology-bandwidth, --against, --replica-choice and --fail-under "
            "need a plan: semmoe report PLAN TRACE"
        )
    else:
        _report_trace(paths[0], timing.whose or "all", ranks, simulation, options.time, output, json_)


def _numbers(text: str) -> list[int]:
    """Ascending numbers of ranks from "2,4,8"."""
    from semmoe.profiles.errors import InputError

    try:
        numbers = sorted({int(word) for word in text.split(",") if word.strip()})
    except ValueError:
        numbers = [0]
    if any(number < 1 for number in numbers):
        raise InputError(f"--what-if {text}: expected numbers of ranks such as 2,4,8,16")
    return numbers


def _report_plan(
    plan: str,
    trace: str,
    options: "PlanReportOptions",
    simulation: Simulation,
    output: Path | None,
    shown: "Shown",
) -> dict[str, float]:
    """Print the report, and give back the share that the plan saves by its verdict, for
    --fail-under; none where the trace holds loads only."""
    from semmoe.pages.on_request import certificate_section, costs_section, tokens_section, what_if_section
    from semmoe.pages.page import print_section
    from semmoe.pages.plan import plan_page
    from semmoe.pages.plan_report import make_plan_report
    from semmoe.profiles.split import counted_phase, only_phase
    from semmoe.profiles.trace import RoutingTrace
    from semmoe.solvers.plan import Plan
    from semmoe.terminal.tables import note, note_unchecked, print_times

    placed, traced, phase = Plan.load(plan).with_rule(options.replica_choice), RoutingTrace.open(trace), options.phase
    if traced.info.kind == "counts":
        only_phase(traced, phase or "all")
        _report_balance(placed, traced, {"plan": plan, "trace": trace}, output, shown.as_json)
        return {}
    whose, with_prompts = phase or placed.options.get("phase", "all"), simulation.score_from == "prompt"
    whose = counted_phase([traced], whose, timed=options.time is not None)
    traced = only_phase(traced, whose, with_prompts=with_prompts)
    made = make_plan_report(placed, traced, options, simulation.setting(), plan_path=plan)
    note_unchecked(placed, traced)
    for line in [*made.notes, *made.left_out, *(made.report.time.notes if made.report.time else [])]:
        note(line)
    made = replace(made, report=replace(made.report, plan=plan, trace=trace))
    shown.print(made.report)
    if made.report.times and not shown.as_json:
        print_times(made.report.times, made.report.baseline)
    if not shown.as_json:
        asked = (
            what_if_section,
            tokens_section,
            *([costs_section] if options.hidden_size else []),
            certificate_section,
        )
        for section in filter(None, (make(made) for make in asked)):
            print_section(section)
    if output is not None:
        _write(plan_page(made), output)
    _next(made, trace, output, shown)
    return {plan: made.report.verdict.saved} if made.report.verdict else {}


def _next(made: "PlanReport", trace: str, output: Path | None, shown: "Shown") -> None:
    """What to do with the plan: deploy it unless it saves nothing, and look at a page where none
    was written."""
    from semmoe.pages.deployment import deploy_lines
    from semmoe.solvers.evaluate.decision import decide
    from semmoe.terminal.decision import next_step
    from semmoe.terminal.text import quoted

    engine = made.report.time.engine if made.report.time else None
    useless, where = decide(made.report).level == "bad", quoted(made.plan_path)
    page = [f"semmoe report {where} {quoted(trace)} -o report.html"] if output is None else []
    next_step(*page, *([] if useless else deploy_lines(made.plan, where, engine)), as_json=shown.as_json)


def _report_balance(
    plan: "Plan", trace: "RoutingTrace", names: dict[str, str], output: Path | None, as_json: bool
) -> None:
    """What can be said of a plan on loads alone."""
    from semmoe.solvers.evaluate.foreign_order import refuse_foreign_loads
    from semmoe.solvers.plan_of_counts import ONLY_BALANCE, balance_of, counted_load_LE
    from semmoe.terminal.tables import note, print_balance

    if output is not None:
        trace.require_tokens("a page")
    plan.model.check(trace.info, trace.path)
    load_LE = counted_load_LE([trace])
    refuse_foreign_loads(plan, load_LE, trace.info, trace.path)
    note(f"{trace.path}: {ONLY_BALANCE}")
    if trace.fingerprint in plan.trace.get("fingerprints", []):
        note("the plan was made from these very loads: its balance is not held out")
    print_balance(balance_of(plan, load_LE), names, as_json=as_json)


def _report_trace(
    path: str,
    phase: str,
    ranks: int,
    simulation: Simulation,
    asked: "TimeAsked | None",
    output: Path | None,
    as_json: bool,
) -> None:
    from semmoe.profiles.split import counted_phase, only_phase
    from semmoe.profiles.trace import RoutingTrace
    from semmoe.solvers.health.health import trace_health
    from semmoe.terminal.decision import next_step
    from semmoe.terminal.progress import steps
    from semmoe.terminal.tables import note, note_unchecked, print_health, print_time
    from semmoe.terminal.text import quoted

    trace = RoutingTrace.open(path)
    trace = only_phase(trace, counted_phase([trace], phase, timed=asked is not None))
    with steps("health") as progress:
        health = replace(trace_health(trace, seed=simulation.seed, ranks=ranks, progress=progress), trace=path)
        if asked is not None:
            from semmoe.solvers.time.trace_times import trace_times

            health = replace(health, layer_time=trace_times(trace, health.ranks, asked, simulation.setting()))
    note_unchecked(trace)
    print_health(health, as_json=as_json)
    if health.layer_time is not None:
        for line in health.layer_time.notes:
            note(line)
        if not as_json:
            print_time(health.layer_time)
    if output is not None:
        from semmoe.pages.health import health_page

        _write(health_page(health), output)
    next_step(f"semmoe place {quoted(path)} --ranks {health.ranks} -o plan", as_json=as_json)


def _write(page: "Page", output: Path) -> None:
    from semmoe.pages.page import write_page
    from semmoe.terminal.tables import note

    write_page(page, output)
    note(f"wrote {output} ({output.stat().st_size / 1e3:,.0f} kB)")
