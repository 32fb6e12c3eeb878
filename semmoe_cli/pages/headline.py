"""The one sentence over a report: is the plan worth deploying, in the words of its verdict or from
the intervals.

Heavy modules are imported inside.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from semmoe.solvers.evaluate.report import Report, ScoreRow, Verdict

KIND_METRIC = {"per-rank": "rem", "per-expert": "lar", "per-node": "node", "gather": "load_imbalance"}
KIND_UNIT = {
    "per-rank": "remote ranks per token",
    "per-node": "remote nodes per token",
    "per-expert": "remote activations",
}


def plan_verdict(report: "Report") -> tuple[str, str]:
    """Level and one sentence: the verdict by time where there is one, else the report's own by
    bytes, else from the intervals against its baseline."""
    from semmoe.solvers.evaluate.against import words_of
    from semmoe.solvers.evaluate.report import random_row
    from semmoe.solvers.evaluate.verdict import BYTES_ONLY, best_schedule

    if report.time is not None and report.time.verdict is not None:
        return report.time.verdict.level, report.time.verdict.sentence
    plan, before = random_row(report.rows, "plan"), random_row(report.rows, report.baseline)
    if report.verdict is not None:
        return given_verdict(report.verdict, plan, before)
    where = f"on {report.requests:,} held-out requests"
    dispatch = report.dispatch
    if dispatch == "gather":
        return "bad", (
            f"Placement cannot reduce traffic with gather dispatch; {where} the busiest rank carries "
            f"{plan.load_imbalance:.2f} times the mean load instead of {before.load_imbalance:.2f}."
        )
    if dispatch == "per-expert":
        return "watch", (
            f"Placement alone saves no traffic when every expert's copy is sent on its own: {where}, {plan.lar:.0%} of activations "
            "stay local at a random home. A token schedule decides here."
        )
    metric = KIND_METRIC[dispatch]
    if before.value(metric) <= 0:
        return "bad", "There is nothing to save: no token leaves its rank."
    saved, low, high = saving_interval(plan, before, metric)
    numbers = f"{KIND_UNIT[dispatch]} {plan.value(metric):.2f} instead of {before.value(metric):.2f} with {words_of(report.baseline)}"
    if low <= 0:
        return "bad", f"No saving is shown {where}: {numbers} ({saved:.0%}, interval {low:.0%} to {high:.0%})."
    schedule = best_schedule(report)
    if schedule != "random":
        best = next(row for row in report.plan_rows if row.schedule == schedule)
        less = 1 - best.value(metric) / before.value(metric)
        numbers += f", and {less:.0%} less where {schedule} chooses homes for tokens"
    busy = (
        f"the busiest rank carries {plan.load_imbalance:.2f} times the mean load ({before.load_imbalance:.2f} before)"
    )
    return "watch", f"{saved:.0%} less traffic {where}: {numbers}; {busy}; {BYTES_ONLY}."


def given_verdict(given: "Verdict", plan: "ScoreRow", before: "ScoreRow") -> tuple[str, str]:
    """Level and headline from a report's verdict, and its rows of plan and baseline at random
    homes; the verdict's own sentence where it does not recommend."""
    from semmoe.solvers.evaluate.against import words_of
    from semmoe.solvers.evaluate.verdict import BYTES_ONLY

    if given.decision != "recommend":
        return given.level, given.sentence
    under = "placement" if given.schedule == "random" else f"placement with {given.schedule}"
    low, high = given.ci
    sentence = (
        f"Worth deploying by bytes: {under} saves {given.saved:.0%} of the bytes (interval {low:.0%} to {high:.0%})"
    )
    sentence += f" against {words_of(given.against)}"
    more = given.with_schedule
    if more and more.schedule != given.schedule:
        sentence += f", {more.saved:.0%} with {more.schedule}"
    busy = f"the busiest rank carries {plan.load_imbalance:.2f} times the mean load"
    return "watch", f"{sentence}; {busy} ({before.load_imbalance:.2f} there); {BYTES_ONLY}."


def saving_interval(plan: "ScoreRow", before: "ScoreRow", metric: str) -> tuple[float, float, float]:
    """Share saved, and a cautious interval of it: worst end of one against best end of the
    other."""
    (plan_low, plan_high), (before_low, before_high) = plan.interval(metric), before.interval(metric)
    return 1 - plan.value(metric) / before.value(metric), 1 - plan_high / before_low, 1 - plan_low / before_high
