"""`semmoe report` and `semmoe show`: a plan on a trace, and any trace or plan in a screen."""

from pathlib import Path
from typing import Annotated

import typer

from semmoe_cli.options import Json, Seed


def report(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="Plan directory.")],
    trace: Annotated[
        str, typer.Argument(metavar="TRACE", help="Trace of the same model (a directory or an fsspec URL).")
    ],
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Score a plan on a trace, beside contiguous and load-balanced placement.

    Example: semmoe report p t
    """
    from profiles.trace import RoutingTrace
    from semmoe_cli.report import note, print_report
    from solvers.plan import Plan
    from solvers.planning import score_plan

    scores, notes = score_plan(Plan.load(plan), RoutingTrace.open(trace), seed=seed)
    for line in notes:
        note(line)
    print_report({**scores, "plan": str(plan), "trace": trace}, as_json=json_)


def show(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A trace or a plan.")],
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Describe a trace or a plan in a screen: sizes, layers, load skew, and whether there is structure to use.

    Example: semmoe show t
    """
    from semmoe_cli.description import describe_path
    from semmoe_cli.report import print_facts

    print_facts(describe_path(path, seed=seed), as_json=json_)
