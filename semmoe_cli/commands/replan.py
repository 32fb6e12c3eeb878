"""`semmoe place --from-plan`: an old plan and new traces in, a plan a few moves away out."""

import re
from dataclasses import dataclass, fields, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from semmoe.options import refuse_mixed

if TYPE_CHECKING:
    from semmoe.solvers.demands import Demands
    from semmoe.solvers.make_plan import PlanOptions
    from semmoe.solvers.plan import Plan
    from semmoe.solvers.replan.replan import ReplanOptions
    from semmoe.terminal.decision import Shown

OWN = ("seed", "effort", "processes")  # demands that a re-placement may set anew


class From(NamedTuple):
    """Where a re-placement starts, and what it may cost."""

    path: Path
    old: "Plan"
    asked: "ReplanOptions"


@dataclass(frozen=True, kw_only=True)
class Replacing:
    """What may move from the plan that is served."""

    from_plan: Annotated[
        Path | None,
        typer.Option(metavar="OLD", help="Re-place for these traces from this plan on, asked for what it was."),
    ] = None
    moves: Annotated[
        str | None,
        typer.Option(
            metavar="N|N%", help="Experts that may move, in all layers together: a number, or a share. Default: 25%."
        ),
    ] = None
    moves_per_layer: Annotated[
        int | None, typer.Option(metavar="N", help="Experts that may move in each layer.", min=0)
    ] = None
    move_cost: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Remote rows per token (with --hardware: microseconds a step) that a moved expert must save in its layer.",
            min=0,
        ),
    ] = None
    horizon_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="T",
            help="Tokens until the next re-placement, in which a move must pay its bytes, or the time that they take.",
            min=1,
        ),
    ] = None

    def read(self, force: bool) -> "From":
        """The old plan, and the same as solvers read it; `force`: move though no gain is shown."""
        from semmoe.solvers.plan import Plan

        assert self.from_plan is not None
        asked = self.options(force)  # a wrong option is told before a plan is read
        return From(self.from_plan, Plan.load(self.from_plan, mapped=True), asked)

    def options(self, force: bool) -> "ReplanOptions":
        """The budget, as solvers read it."""
        from semmoe.solvers.replan.frontiers import Budget
        from semmoe.solvers.replan.replan import ReplanOptions

        if self.moves is not None and self.moves_per_layer is not None:
            refuse_mixed("--moves-per-layer", ["--moves"])
        if self.move_cost is not None and self.horizon_tokens is not None:
            refuse_mixed("--horizon-tokens", ["--move-cost"])
        price = self.move_cost or 0.0
        if not isfinite(price):
            raise typer.BadParameter("expected a finite number", param_hint="--move-cost")
        if self.moves_per_layer is not None:
            budget, asked_as = Budget(per_layer=self.moves_per_layer, price=price), f"{self.moves_per_layer} per layer"
        else:
            asked_as = self.moves or "25%"
            found = re.fullmatch(r"(\d+)|(\d+(?:\.\d*)?|\.\d+)\s*%", asked_as.strip())
            if found is None or float(found[2] or 0) > 100:
                raise typer.BadParameter("expected a number of experts or a share up to 100%", param_hint="--moves")
            moves = int(found[1]) if found[1] else None
            budget = Budget(share=float(found[2] or 0) / 100, moves=moves, price=price)
        return ReplanOptions(budget, asked_as, self.horizon_tokens, force)


def replace_plan(
    traces: list[str], output: Path, replan: From, demands: "Demands", options: "PlanOptions", shown: "Shown"
) -> None:
    """Read, re-place, write and print.

    Parameters:
        traces, output: as typed.
        replan: the old plan, and what may move.
        shown: how it is printed.
        demands, options: as typed; what the placement is asked for is the old plan's.
    """
    from semmoe.pages.deployment import deploy_lines
    from semmoe.profiles.document import line_per_key
    from semmoe.profiles.trace import RoutingTrace
    from semmoe.solvers.demands import Demands
    from semmoe.solvers.make_plan import READING, usual_stages
    from semmoe.solvers.replan.delta import DELTA_FILE
    from semmoe.solvers.replan.replan import DECIDING, demands_of, make_replan, note_of
    from semmoe.terminal.decision import next_step
    from semmoe.terminal.progress import stages
    from semmoe.terminal.tables import note, note_unchecked, print_json
    from semmoe.terminal.text import quoted

    kept = demands_of(replan.old)
    _refuse_other(demands, kept, options.method)
    if options.minimize and not (options.minimize == "time" and options.time is not None):
        refuse_mixed("--from-plan", [f"--minimize {options.minimize}"])
    if options.auto:
        refuse_mixed("--from-plan", [f"--{options.auto[0].replace('_', '-')} auto"])
    opened = [RoutingTrace.open(path) for path in traces]
    kept = replace(kept, **{name: getattr(demands, name) for name in OWN})
    old, info = replan.old, opened[0].info
    num_ids = sum(trace.num_tokens for trace in opened) * info.num_layers * info.top_k
    kept_slots = usual_stages(options, Demands(spare="empty"), old.model.num_experts, old.topology.num_ranks, num_ids)
    with stages(usual={READING: 1.0, DECIDING: 10.0} | kept_slots) as show:
        found = make_replan(opened, replan.old, replan.asked, options, demands=kept, progress=show)
    found.plan.save(output, beside={DELTA_FILE: line_per_key(found.delta.to_json())})
    note_unchecked(replan.old, *opened)
    for line in found.plan.notes:
        note(line)
    report = replace(found.scores, plan=str(output), trace=", ".join(traces)) if found.scores else None
    if shown.as_json:
        told = {key: value for key, value in found.delta.to_json().items() if key != "layers"}
        print_json((report.to_json() if report else {}) | {"replan": told | {"from": str(replan.path)}})
    note(note_of(found.delta))
    note(f"wrote {output} and its {DELTA_FILE}")
    if report and not shown.as_json:
        shown.print(report)
    next_step(*deploy_lines(found.plan, quoted(str(output)), None), as_json=shown.as_json)


def _refuse_other(asked: "Demands", kept: "Demands", method: str) -> None:
    """Raise BadParameter for an option that asks for another placement than the old plan's."""
    from semmoe.solvers.demands import Demands
    from semmoe.solvers.make_plan import PlanOptions

    default = Demands()
    for name in (f.name for f in fields(Demands) if f.name not in OWN):
        value = getattr(asked, name)
        if value not in (getattr(default, name), getattr(kept, name)):
            refuse_mixed(f"--from-plan, whose plan has {getattr(kept, name)}", [f"--{name.replace('_', '-')} {value}"])
    if method != PlanOptions().method:
        refuse_mixed("--from-plan", [f"--method {method}"])
