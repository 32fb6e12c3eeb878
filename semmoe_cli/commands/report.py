"""`semmoe report`: a plan on a trace, or the health of a trace."""

from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from semmoe.options import BatchTokens, Json, Seed, Window

if TYPE_CHECKING:
    from semmoe.profiles.trace import RoutingTrace


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
    what_if: Annotated[
        str, typer.Option(metavar="R,R,...", help="Also place and score on these numbers of ranks, e.g. 2,4,8,16,32.")
    ] = "",
    hidden_size: Annotated[
        int, typer.Option(metavar="D", help="Also give bytes per dispatch kind, for this hidden size.", min=0)
    ] = 0,
    dispatch_bytes: Annotated[
        float, typer.Option(help="Bytes of a value at dispatch, 1 for float8; combine sends 2.", min=0)
    ] = 2.0,
    topology_bandwidth: Annotated[
        str,
        typer.Option(
            metavar="GB/S",
            help="Also predict the time of dispatch and combine per layer: GB/s of a rank's link, one way; INTRA:INTER for links inside "
            "a node and between nodes; or a .json file with bandwidth and latency per class of link or pair of ranks.",
        ),
    ] = "",
    latency: Annotated[
        str,
        typer.Option(metavar="US", help="With --topology-bandwidth: microseconds of one exchange, or INTRA:INTER."),
    ] = "",
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Also name the most and least predictable tokens: tokenizer.json, its directory, or demo.",
        ),
    ] = None,
    ranks: Annotated[
        int, typer.Option(help="Trace alone: ranks of its curves; 0: 8, or what the experts divide over.", min=0)
    ] = 0,
    batch_tokens: BatchTokens = 512,
    window: Window = 256,
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Score a plan on a trace beside what engines do without one, or check the health of a trace;
    in a screen or as a page.

    Example: semmoe report p t -o report.html --what-if 2,4,8,16; semmoe report t
    """
    from semmoe.profiles.errors import InputError
    from semmoe.profiles.trace import RoutingTrace

    if latency and not topology_bandwidth:
        raise typer.BadParameter("needs --topology-bandwidth", param_hint="--latency")
    if len(paths) > 2:
        raise typer.BadParameter("a plan and a trace, or a trace alone", param_hint="[PLAN] TRACE")
    if ranks and len(paths) == 2:
        raise typer.BadParameter("a plan has its own ranks; others are asked for with --what-if", param_hint="--ranks")
    if not isfinite(dispatch_bytes):
        raise typer.BadParameter("expected a number of bytes", param_hint="--dispatch-bytes")
    if output is not None:
        from semmoe.pages.page import check_page_target

        check_page_target(output)
    numbers = _numbers(what_if)
    if len(paths) == 1:
        if numbers or tokenizer or hidden_size or topology_bandwidth:
            raise InputError(
                "--what-if, --tokenizer, --hidden-size and --topology-bandwidth need a plan: semmoe report PLAN TRACE"
            )
        _report_trace(RoutingTrace.open(paths[0]), paths[0], ranks, seed, output, json_)
        return
    from semmoe.pages.on_request import certificate_section, costs_section, tokens_section, what_if_section
    from semmoe.pages.page import write_page
    from semmoe.pages.plan import plan_page
    from semmoe.pages.plan_report import PlanReportOptions, make_plan_report
    from semmoe.solvers.plan import Plan
    from semmoe.solvers.schedule.simulate import Setting
    from semmoe.terminal.tables import note, print_report, print_section, print_times

    options = PlanReportOptions(
        numbers, hidden_size, dispatch_bytes, topology_bandwidth, latency, tokenizer, output is not None
    )
    made = make_plan_report(
        Plan.load(paths[0]),
        RoutingTrace.open(paths[1]),
        options,
        Setting(batch_tokens, window, seed),
        plan_path=paths[0],
    )
    for line in [*made.notes, *made.left_out]:
        note(line)
    print_report(replace(made.report, plan=paths[0], trace=paths[1]), as_json=json_)
    if made.report.times and not json_:
        print_times(made.report.times)
    if not json_:
        asked = (what_if_section, tokens_section, *([costs_section] if hidden_size else []), certificate_section)
        for section in filter(None, (make(made) for make in asked)):
            print_section(section)
    if output is not None:
        write_page(plan_page(made), output)
        note(f"wrote {output} ({output.stat().st_size / 1e3:,.0f} kB)")


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


def _report_trace(trace: "RoutingTrace", path: str, ranks: int, seed: int, output: Path | None, as_json: bool) -> None:
    from semmoe.solvers.health.health import trace_health
    from semmoe.terminal.progress import steps
    from semmoe.terminal.tables import note, print_health

    with steps("health") as progress:
        health = replace(trace_health(trace, seed=seed, ranks=ranks, progress=progress), trace=path)
    print_health(health, as_json=as_json)
    if output is not None:
        from semmoe.pages.health import health_page
        from semmoe.pages.page import write_page

        write_page(health_page(health), output)
        note(f"wrote {output} ({output.stat().st_size / 1e3:,.0f} kB)")
