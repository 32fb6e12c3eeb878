"""The one sentence over a report: is the plan worth deploying, in the words of its verdict or from
the intervals.

Heavy modules are imported inside.
"""

from typing import Any

BASELINES = {"contiguous": "contiguous experts", "load": "experts balanced by load"}
KIND_METRIC = {"per-rank": "rem", "per-expert": "lar", "per-node": "node", "gather": "load_imbalance"}
KIND_UNIT = {
    "per-rank": "remote ranks per token",
    "per-node": "remote nodes per token",
    "per-expert": "remote activations",
}


def plan_verdict(report: dict[str, Any]) -> tuple[str, str]:
    """Level and one sentence: the report's own verdict where it holds one, else from the
    intervals against contiguous experts."""
    if (given := report.get("verdict")) is not None:
        return given_verdict(given, report)
    row = {r["placement"]: r for r in report["rows"] if r["schedule"] == "random"}
    plan, before = row["plan"], row["contiguous"]
    where = f"on {report['requests']:,} held-out requests"
    dispatch = report["dispatch"]
    if dispatch == "gather":
        return "bad", (
            f"Placement cannot reduce traffic with gather dispatch; {where} the busiest rank carries "
            f"{plan['load_imbalance']:.2f} times the mean load instead of {before['load_imbalance']:.2f}."
        )
    if dispatch == "per-expert":
        return "watch", (
            f"Placement alone saves no traffic when every expert's copy is sent on its own: {where}, {plan['lar']:.0%} of activations "
            "stay local at a random home. A token schedule decides here."
        )
    metric = KIND_METRIC[dispatch]
    if before[metric] <= 0:
        return "bad", "There is nothing to save: no token leaves its rank."
    saved, low, high = saving_interval(plan, before, metric)
    numbers = f"{KIND_UNIT[dispatch]} {plan[metric]:.2f} instead of {before[metric]:.2f} with contiguous experts"
    if low <= 0:
        return "bad", f"No saving is shown {where}: {numbers} ({saved:.0%}, interval {low:.0%} to {high:.0%})."
    level = "good" if low > 0.05 else "watch"
    from semmoe.solvers.evaluate.pictures import best_schedule

    schedule = best_schedule(report)
    if schedule != "random":
        best = next(r for r in report["rows"] if (r["placement"], r["schedule"]) == ("plan", schedule))
        numbers += f", and {1 - best[metric] / before[metric]:.0%} less where {schedule} chooses homes for tokens"
    busy = f"the busiest rank carries {plan['load_imbalance']:.2f} times the mean load ({before['load_imbalance']:.2f} before)"
    return level, f"{saved:.0%} less traffic {where}: {numbers}; {busy}."


def given_verdict(given: dict[str, Any], report: dict[str, Any]) -> tuple[str, str]:
    """Level and headline from a report's verdict (semmoe.solvers.evaluate.verdict); its own
    sentence where it does not recommend."""
    if given["decision"] != "recommend":
        return given["level"], given["sentence"]
    row = {r["placement"]: r for r in report["rows"] if r["schedule"] == "random"}
    under = "placement" if given["schedule"] == "random" else f"placement with {given['schedule']}"
    low, high = given["ci"]
    sentence = f"Worth deploying: {under} saves {given['saved']:.0%} of the bytes (interval {low:.0%} to {high:.0%})"
    sentence += f" against {BASELINES.get(given['against'], given['against'])}"
    more = given.get("with_schedule")
    if more and more["schedule"] != given["schedule"]:
        sentence += f", {more['saved']:.0%} with {more['schedule']}"
    busy = f"the busiest rank carries {row['plan']['load_imbalance']:.2f} times the mean load"
    return given["level"], f"{sentence}; {busy} ({row['contiguous']['load_imbalance']:.2f} contiguous)."


def saving_interval(plan: dict[str, Any], before: dict[str, Any], metric: str) -> tuple[float, float, float]:
    """Share saved, and a cautious interval of it: worst end of one against best end of the
    other."""
    (plan_low, plan_high), (before_low, before_high) = plan["ci"][metric], before["ci"][metric]
    return 1 - plan[metric] / before[metric], 1 - plan_high / before_low, 1 - plan_low / before_high
