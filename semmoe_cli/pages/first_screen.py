"""The first screen of a page about a plan: a headline of two lines, four tiles and one picture, all
from the decision (solvers/evaluate/decision.py)."""

from semmoe.pages.figures import plan as figures_plan
from semmoe.pages.page import Picture, Tile
from semmoe.solvers.evaluate.against import words_of
from semmoe.solvers.evaluate.decision import KIND_METRIC, KIND_UNIT, Decision
from semmoe.solvers.evaluate.report import Report

BADGES = {"good": "worth it", "watch": "look closer", "bad": "not worth it"}


def headline(report: Report, decision: Decision) -> str:
    """The decision's sentence without its numbers but one."""
    opening = decision.sentence.partition(":")[0].removesuffix(" by bytes")
    if decision.saved is None or report.dispatch == "gather":
        return decision.sentence
    amount, less = f"{abs(decision.saved):.1%}", decision.saved >= 0
    if decision.unit == "time":
        return f"{opening}: {amount} {'less' if less else 'more'} time in MoE layers"
    return f"{opening}: {amount} {'fewer' if less else 'more'} bytes between ranks"


def tiles(report: Report, decision: Decision) -> list[Tile]:
    """What is saved, the busiest rank, how sure it is, and what it needs."""
    plan = decision.plan
    others = ", ".join(f"{s.role} {s.score.load_imbalance:.2f}" for s in decision.standings if s is not decision.plan)
    sure, bounds = decision.confidence, ""
    if decision.ci is not None and report.dispatch != "gather":
        bounds = f"{decision.ci[0]:.1%} to {decision.ci[1]:.1%}"
    named = {"a map or checkpoint": "A map or checkpoint", "the plug-in or router": "The plug-in or router"}
    needs = {
        "a map or checkpoint": "semmoe export for engines that read a map, semmoe reshard for the others",
        "the plug-in or router": "semmoe export --to vllm-plugin or sglang-plugin, or semmoe route in front",
    }
    return [
        _saved(report, decision),
        Tile("busiest rank", f"{plan.score.load_imbalance:.2f}", f"times the mean load; {others}"),
        Tile("confidence", bounds or sure, f"95% interval; {sure}" if bounds else ""),
        Tile("what it needs", named.get(plan.needs, plan.needs), needs.get(plan.needs, "")),
    ]


def _saved(report: Report, decision: Decision) -> Tile:
    against = words_of(decision.against)
    if decision.unit == "time" and report.time is not None and report.time.saved is not None:
        saved, before = report.time.saved, report.time.row(decision.against)
        note = f"{saved.us:,.1f} us of {before.us['total']:,.1f} us a layer, against {against}"
        return Tile("time saved", f"{saved.share:.1%}", note)
    if decision.saved is None:
        return Tile("saved", "-", f"not computed; against {against}")
    return Tile("bytes saved", f"{decision.saved:.1%}", f"against {against}; time is unknown without a machine")


def hero(report: Report, decision: Decision, phase: str = "") -> Picture:
    """The standings as bars: microseconds where they are known, else what the bytes follow; and the
    busiest rank."""
    metric = KIND_METRIC[report.dispatch]
    timed = decision.plan.time is not None
    rows = [standing for standing in decision.standings if standing.time or not timed]
    what = "Microseconds of a MoE layer" if timed else KIND_UNIT.get(report.dispatch, "load of the busiest rank")
    return Picture(
        figures_plan.standings(rows, metric),
        0.75 + 0.33 * len(rows),
        f"{phase}{': ' if phase else ''}{what[0].upper()}{what[1:]}, and load of the busiest rank: {_told(decision)}",
        stacked=2,
    )


def _told(decision: Decision) -> str:
    """The numbers of the picture, for those who cannot see it."""
    return "; ".join(
        f"{s.name} " + (f"{s.time.us['total']:,.1f} us, " if s.time else "") + f"load {s.score.load_imbalance:.2f}"
        for s in decision.standings
    )
