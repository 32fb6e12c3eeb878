"""Verdict by time: does a plan save microseconds that somebody pays for, what decides it, and when
nothing can help.

A plan is compared, on the same batches, with the better of what engines do without it. A
recommendation needs the interval to lie above WORTH_TIME, and both ends of every assumed parameter
to agree; else the measurement that would decide is named.

Shape letters: L MoE layers, M batches, X resamples.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from semmoe.profiles.errors import InputError
from semmoe.solvers.evaluate.report import Key
from semmoe.solvers.evaluate.time_report import Ends, Sensitivity, TimedRow, TimeReport, TimeSaved, TimeVerdict
from semmoe.solvers.evaluate.verdict import INSUFFICIENT, LEVELS, NOT_WORTH_IT, RECOMMEND
from semmoe.solvers.time.counted import Counted
from semmoe.solvers.time.hardware import Costing, Parameter
from semmoe.solvers.time.moe_layer import LayerTimes, layer_times

PLAN = "plan"
WORTH_TIME = 0.005  # share of a layer's time; less is no reason to change a deployment
MOSTLY_LATENCY = 0.5  # share of the time


class _Pair(NamedTuple):
    """Counts of the baseline and of the plan, on the same batches."""

    before: Counted
    after: Counted
    before_X: Counted
    after_X: Counted


def compare_times(
    report: TimeReport,
    counted: Mapping[Key, Counted],
    resampled: Mapping[Key, Counted],
    costing: Costing,
    sizes: tuple[int, int],
    against: str | None,
) -> TimeReport:
    """The report with what the plan saves under its best schedule that the engine runs, and the
    verdict.

    `sizes`: ranks and layers. `against`: name of the placement to compare with; None: the faster of
    all others. Raises InputError where that is not in the report.
    """
    others = [row for row in report.rows if row.placement != PLAN and row.schedule == "random"]
    if against is not None and against not in {row.placement for row in others}:
        raise InputError(f"nothing to compare times with is named {against!r}")
    before = min((r for r in others if against in (None, r.placement)), key=lambda row: row.us["total"])
    fair = [r for r in report.rows if r.placement == PLAN and r.deployable and (PLAN, r.schedule) in resampled]
    after = min(fair, key=lambda row: row.us["total"])
    old, new = (before.placement, "random"), (PLAN, after.schedule)
    pair = _Pair(counted[old], counted[new], resampled[old], resampled[new])
    share, ci = _saved(pair, costing, costing.values, sizes[0], report.resamples)
    us = before.us["total"] - after.us["total"]
    asked, ms = costing.asked, us * sizes[1] / 1000
    of_step = None
    if asked.step_ms:
        of_step = ms / asked.step_ms
    elif asked.other_us:
        beside_us = 0.0 if asked.overlap == "two-batch" else asked.other_us
        of_step = us / (before.us["total"] + beside_us)
    # Where nothing says what else a step does, money is that of an hour spent in these layers.
    usd = asked.gpu_hour * sizes[0] * (share if of_step is None else of_step) if asked.gpu_hour else None
    saved = TimeSaved(us, share, ci, before.placement, after.schedule, ms, of_step, usd)
    ends = [_ends(parameter, pair, costing, sizes[0], report.resamples) for parameter in costing.assumed]
    lows = [share, *(end.saved[0] for end in ends), *(end.saved[1] for end in ends)]
    times = [layer_times(counts, costing, costing.values, sizes[0]) for counts in (pair.before, pair.after)]
    judged = replace(
        report,
        saved=saved,
        sensitivity=Sensitivity(min(lows), max(lows), ends),
        break_even_imbalance=_break_even(times),
    )
    return replace(judged, verdict=_verdict(judged, before, after, times, costing))


def _saved(
    pair: _Pair, costing: Costing, values: Mapping[str, float], num_ranks: int, resamples: int
) -> tuple[float, tuple[float, float]]:
    """Share of the time saved, and its interval over resampled requests."""
    mean = [layer_times(c, costing, values, num_ranks).total_ML.mean() for c in pair[:2]]
    totals = [layer_times(c, costing, values, num_ranks).total_ML.mean(1).reshape(resamples, -1) for c in pair[2:]]
    shares_X = 1 - totals[1].mean(1) / totals[0].mean(1)
    low, high = np.quantile(shares_X, [0.025, 0.975])
    return float(1 - mean[1] / mean[0]), (float(low), float(high))


def _decision(share: float, ci: tuple[float, float]) -> str:
    if ci[0] >= WORTH_TIME or (ci[0] > 0 and share >= 2 * WORTH_TIME):
        return RECOMMEND
    return NOT_WORTH_IT if ci[1] < 2 * WORTH_TIME or share < WORTH_TIME else INSUFFICIENT


def _ends(parameter: Parameter, pair: _Pair, costing: Costing, num_ranks: int, resamples: int) -> Ends:
    """Share saved at both ends of a parameter, the others as they are."""
    low, high = float(parameter.low or 0.0), float(parameter.high or 0.0)
    shares, decisions = [], []
    for end in (low, high):
        share, ci = _saved(pair, costing, {**costing.values, parameter.name: end}, num_ranks, resamples)
        shares.append(share)
        decisions.append(_decision(share, ci))
    return Ends(parameter.name, low, high, (shares[0], shares[1]), decisions[0] == decisions[1])


def _break_even(times: list[LayerTimes]) -> float | None:
    """How much more of the mean load the busiest rank may carry until what the exchanges save is
    eaten; None where they save nothing."""
    saved = float(times[0].link_ML.mean() - times[1].link_ML.mean())
    even = float(times[1].even_ML.mean())
    return saved / even if saved > 0 and even > 0 else None


def _verdict(
    report: TimeReport, before: TimedRow, after: TimedRow, times: list[LayerTimes], costing: Costing
) -> TimeVerdict:
    saved, sensitivity = report.saved, report.sensitivity
    assert saved is not None and sensitivity is not None
    by_link = float(times[0].link_ML.mean() - times[1].link_ML.mean())
    by_experts = float(times[0].experts_ML.mean() - times[1].experts_ML.mean())
    decides = "experts" if abs(by_experts) >= abs(by_link) else "link"
    if after.bound_by == "latency" or times[1].latency > MOSTLY_LATENCY * after.us["total"]:
        decides = "latency"
    reasons = _cannot_help(after, times[1], costing)
    decision = _decision(saved.share, saved.ci)
    why = ""
    if costing.kind == "gather":
        decision, why = NOT_WORTH_IT, "under a gather every rank gets every token, whatever the placement"
    elif costing.balances:
        decision, why = NOT_WORTH_IT, "the backend balances its ranks by itself"
    elif decision == INSUFFICIENT and times[1].latency > MOSTLY_LATENCY * after.us["total"]:
        decision, why = NOT_WORTH_IT, "most of the time is latency, which no placement changes"
    missing = [end.name for end in sensitivity.parameters if not end.agrees]
    if decision == RECOMMEND and missing:
        decision, why = INSUFFICIENT, f"it depends on {', '.join(missing)}, which nobody has published: measure it"
        why += " (semmoe run --replay --write-hardware, or --measured)"
    under = "placement alone" if saved.schedule == "random" else f"placement with {saved.schedule}"
    low, high = saved.ci
    what = (
        f"{under} saves {saved.us:.1f} us of {before.us['total']:.1f} us a layer against {saved.against} "
        f"({saved.share:.1%}, interval {low:.1%} to {high:.1%}), {saved.ms_per_step:.2f} ms a step"
    )
    if saved.share_of_step is not None:
        what += f", {saved.share_of_step:.1%} of it"
    if saved.usd_per_hour is not None:
        what += f", {saved.usd_per_hour:.2f} USD an hour" + (" of MoE layers" if saved.share_of_step is None else "")
    parts = f"exchanges {by_link:+.1f} us, experts {by_experts:+.1f} us"
    sentence = f"{decision[0].upper()}{decision[1:]}: {f'{why}; ' if why else ''}{what}; saved by {parts}"
    if report.break_even_imbalance is not None:
        sentence += f"; what exchanges save is eaten by {report.break_even_imbalance:+.3f} of experts' max/mean"
    sentence += "." + "".join(f" {reason[0].upper()}{reason[1:]}." for reason in reasons)
    return TimeVerdict(decision, LEVELS[decision], sentence, decides, missing, reasons)


def _cannot_help(after: TimedRow, times: LayerTimes, costing: Costing) -> list[str]:
    """Why nothing, or placement alone, can save time in this setting."""
    reasons = []
    if costing.kind == "gather":
        reasons.append(f"{costing.backend} sends the same rows whatever the placement: only balance counts")
    if costing.balances:
        reasons.append(f"{costing.backend} evens out the load itself, so only exchanges could be shortened")
    if costing.kind == "per-expert":
        reasons.append(f"{costing.backend} sends a row per expert, so placement alone changes balance and not rows")
    if times.latency > MOSTLY_LATENCY * after.us["total"]:
        of = f"{times.latency:.0f} of {after.us['total']:.0f} us"
        reasons.append(f"{of} are latency: batches of {costing.tokens_per_rank} tokens a rank are too small")
    beside_ML = times.experts_ML + costing.asked.other_us
    if costing.asked.overlap == "two-batch" and (times.link_ML < beside_ML).mean() > 0.5:
        reasons.append("two-batch overlap hides the exchanges behind experts and attention, so only balance counts")
    return reasons
