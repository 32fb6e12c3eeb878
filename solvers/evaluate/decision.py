"""A report in one sentence and three rows: what is saved, against what, and what it takes.

Terminal, pages and notebooks take their headline from here, so that no two of them name another
baseline, schedule or rounding. A schedule belongs to one of three tiers; headlines come from the
first two, because no serving engine runs the third.
"""

from dataclasses import dataclass

from semmoe.solvers.evaluate.against import BASELINES, words_of
from semmoe.solvers.evaluate.metrics import DISPATCH_KINDS
from semmoe.solvers.evaluate.report import Interval, Judgement, Report, ScoreRow, random_row
from semmoe.solvers.evaluate.time_report import TimedRow, TimeReport
from semmoe.solvers.evaluate.verdict import (
    BYTES_ONLY,
    INSUFFICIENT,
    MAP,
    NOT_WORTH_IT,
    PLUGIN,
    RECOMMEND,
    RESEARCH,
    best_deployable,
    best_row,
    tier_of,
    traffic_cost,
)
from semmoe.solvers.schedule.simulate import AS_SERVED

TIERS = {
    MAP: "a map that the engine reads, or a rewritten checkpoint",
    PLUGIN: "requests sent to ranks by semmoe's plug-in or router",
    RESEARCH: "it needs shuffled collectives, which no serving engine has (today: semmoe run)",
}
TODAY, EPLB_WAY, PLAN_ROW, SERVED = "today", "EPLB's way", "this plan", "as served"
NEEDS = {MAP: "a map or checkpoint", PLUGIN: "the plug-in or router", RESEARCH: "semmoe run"}
PHASE_WORDS = {"prompt": "prefill", "generated": "decode", "all": "prefill and decode"}
KIND_METRIC = {"per-rank": "rem", "per-expert": "lar", "per-node": "node", "gather": "load_imbalance"}
KIND_UNIT = {
    "per-rank": "remote ranks per token",
    "per-node": "remote nodes per token",
    "per-expert": "remote activations",
}


@dataclass(frozen=True)
class Standing:
    """One placement under the best schedule that can be deployed with it."""

    role: str  # TODAY, EPLB_WAY, PLAN_ROW, SERVED, or the path of the plan that is held against
    placement: str
    schedule: str
    needs: str
    score: ScoreRow
    time: TimedRow | None

    @property
    def name(self) -> str:
        """What a row of a table is called."""
        if self.role == PLAN_ROW:
            return self.role if self.schedule == "random" else f"{self.role}, {self.schedule}"
        if self.role == SERVED:
            return f"{self.role}: what the server did"
        return f"{self.role} ({self.placement})" if self.role != self.placement else self.role


@dataclass(frozen=True)
class Decision:
    """What a report comes to.

    Fields:
        level: "good", "watch" or "bad".
        sentence: what is saved, against which baseline, on which phase, over how many requests.
        why: what decides it; "" where the sentence says all.
        saved, ci: share of the time, or of the bytes where times are not known; None where no
            verdict was computed.
        unit: "time" or "bytes".
        against: name of the baseline among the rows.
        standings: today, EPLB's way, what the plan is held against where it is neither, the plan,
            what was served where the trace tells.
        risk: of the load of the busiest rank.
        research: what the third tier would add, "" for nothing.
        confidence: how sure it is, in a few words.
    """

    level: str
    sentence: str
    why: str
    saved: float | None
    ci: Interval | None
    unit: str
    against: str
    standings: list[Standing]
    risk: str
    research: str
    confidence: str

    @property
    def plan(self) -> Standing:
        """The row of the plan."""
        return _plan(self.standings)


def decide(report: Report) -> Decision:
    """The decision of a report: by predicted time where it has one, else by bytes."""
    standings = _standings(report)
    timed, verdict = report.time is not None and report.time.verdict is not None, report.verdict
    saved, ci, confidence = None, None, "not computed"
    if timed:
        level, sentence, why = _by_time(report, _plan(standings))
        assert report.time is not None
        found = report.time.saved
        if found is not None:
            saved, ci = found.share, found.ci
            confidence = _confidence(report.time.verdict.decision if report.time.verdict else "", report)
    elif verdict is not None:
        judged = deployed_judgement(report)
        level, sentence, why = _by_bytes(report, judged)
        saved, ci, confidence = judged.saved, judged.ci, _confidence(judged.decision, report)
    else:
        level, sentence = _by_intervals(report)
        why = ""
    return Decision(
        level=level,
        sentence=sentence,
        why=why,
        saved=saved,
        ci=ci,
        unit="time" if timed else "bytes",
        against=report.baseline,
        standings=standings,
        risk=_risk(report, standings),
        research=_research(report),
        confidence=confidence,
    )


def deployed_schedule(report: Report) -> str:
    """The schedule under which the plan is judged: of the first two tiers, the one that saves most
    time, or bytes where times are not known."""
    if report.time is not None and report.time.saved is not None:
        return report.time.saved.schedule
    return deployed_judgement(report).schedule if report.verdict else best_deployable(report.plan_rows, report.dispatch)


def deployed_judgement(report: Report) -> Judgement:
    """The judgement by bytes that the headline takes: with the plug-in where that decides more."""
    assert report.verdict is not None
    more = report.verdict.deployable
    return more if more and more.schedule == best_deployable(report.plan_rows, report.dispatch) else report.verdict


def _standings(report: Report) -> list[Standing]:
    names = {"contiguous": TODAY, "load": EPLB_WAY}
    if report.baseline not in BASELINES:
        names[report.baseline] = report.baseline
    found = [(role, name, "random") for name, role in names.items()]
    found += [(PLAN_ROW, "plan", deployed_schedule(report)), (SERVED, "plan", AS_SERVED)]
    scores = {row.key: row for row in report.rows}
    timed = {(row.placement, row.schedule): row for row in report.time.rows} if report.time else {}
    return [
        Standing(role, name, schedule, _needs(role, schedule), scores[name, schedule], timed.get((name, schedule)))
        for role, name, schedule in found
        if (name, schedule) in scores
    ]


def _plan(standings: list[Standing]) -> Standing:
    return next(standing for standing in standings if standing.role == PLAN_ROW)


def _needs(role: str, schedule: str) -> str:
    return {TODAY: "nothing", SERVED: "is recorded"}.get(role) or NEEDS[tier_of(schedule)]


def _where(report: Report, phase: str) -> str:
    return f"{PHASE_WORDS.get(phase, phase)}, {report.requests:,} held-out requests"


def _opening(decision: str, saved: float, schedule: str) -> str:
    """What the numbers come to, before them."""
    if decision == RECOMMEND:
        return "Worth deploying" + ("" if tier_of(schedule) == MAP else " with the plug-in or router")
    if decision == INSUFFICIENT:
        return "Not decided"
    return "Not worth deploying" if saved >= 0 else "Do not deploy"


def _under(schedule: str) -> str:
    return "placement alone" if schedule == "random" else f"placement with {schedule}"


def _by_time(report: Report, plan: Standing) -> tuple[str, str, str]:
    time = report.time
    assert time is not None and time.saved is not None and time.verdict is not None
    saved, verdict = time.saved, time.verdict
    before = time.row(saved.against)
    low, high = saved.ci
    verb = "saves" if saved.us >= 0 else "costs"
    amount = f"{abs(saved.us):.1f} us" + (" more than the" if saved.us < 0 else " of the")
    sentence = (
        f"{_opening(verdict.decision, saved.share, saved.schedule)}: {_under(plan.schedule)} {verb} {amount} "
        f"{before.us['total']:,.1f} us of a MoE layer ({saved.share:.1%}, interval {low:.1%} to {high:.1%}) against "
        f"{words_of(saved.against)}; {_where(report, time.phase)}."
    )
    # Beside the numbers: what must be measured, what the saving is made of, what cannot help.
    parts = [f"to be sure, measure {', '.join(verdict.missing)}: assumed until then"] if verdict.missing else []
    link, experts = _parts(before, time.row("plan", saved.schedule))
    parts.append(f"exchanges {link:+.1f} us, experts {experts:+.1f} us less")
    parts.append(f"{saved.ms_per_step:.2f} ms a step")
    if saved.share_of_step is not None:
        parts.append(f"{saved.share_of_step:.1%} of the step")
    if saved.usd_per_hour is not None:
        parts.append(f"{saved.usd_per_hour:.2f} USD an hour")
    parts += _by_domain(time)
    return verdict.level, sentence, "; ".join([*parts, *verdict.cannot_help])


def _by_domain(time: TimeReport) -> list[str]:
    """What placement alone saves in the domains where that is most and least."""
    if len(time.domains) < 2:
        return []
    least, most = (choose(time.domains, key=lambda domain: domain.saved) for choose in (min, max))
    ends = " to ".join(f"{end.saved:.1%} ({end.domain}, busiest rank {end.imbalance:.2f})" for end in (least, most))
    return [f"placement alone saves, by domain, {ends}"]


def _parts(before: TimedRow, after: TimedRow) -> tuple[float, float]:
    """Microseconds that exchanges and experts take less."""
    exchanges = [row.us["dispatch"] + row.us["combine"] for row in (before, after)]
    return exchanges[0] - exchanges[1], before.us["experts"] - after.us["experts"]


def _by_bytes(report: Report, judged: Judgement) -> tuple[str, str, str]:
    where = _where(report, report.phase)
    before, plan = random_row(report.rows, report.baseline), random_row(report.rows, "plan")
    if report.dispatch == "gather":
        return (
            "bad",
            (
                f"Placement cannot reduce traffic: a gather sends the same bytes whatever the placement; the busiest rank carries "
                f"{plan.load_imbalance:.2f} times the mean load instead of {before.load_imbalance:.2f}; {where}."
            ),
            "",
        )
    low, high = judged.ci
    opening = _opening(judged.decision, judged.saved, judged.schedule)
    opening += " by bytes" if judged.decision == RECOMMEND else ""
    verb = "saves" if judged.saved >= 0 else "sends"
    amount = f"{abs(judged.saved):.1%} " + ("of the bytes" if judged.saved >= 0 else "more bytes")
    bounds = (low, high) if judged.saved >= 0 else (-high, -low)
    sentence = (
        f"{opening}: {_under(judged.schedule)} {verb} {amount} (interval {bounds[0]:.1%} to {bounds[1]:.1%}) against "
        f"{words_of(judged.against)}; {where}"
    )
    if judged.decision == RECOMMEND or report.time is None:
        sentence += f"; {BYTES_ONLY}"
    parts = []
    if judged is not report.verdict and report.verdict is not None and report.verdict.schedule == "random":
        parts.append(f"placement alone, a map or a checkpoint: {report.verdict.saved:.1%}")
    if judged.decision == INSUFFICIENT:
        needed = (
            f"about {judged.tokens_needed:,} held-out tokens" if judged.tokens_needed else "more than any trace has"
        )
        parts.append(f"to decide: {needed}")
    return "watch" if judged.level == "good" else judged.level, f"{sentence}.", "; ".join(parts)


def _by_intervals(report: Report) -> tuple[str, str]:
    """Level and sentence of a report without a verdict, an older one."""
    plan, before = random_row(report.rows, "plan"), random_row(report.rows, report.baseline)
    where = f"on {report.requests:,} held-out requests"
    dispatch = report.dispatch
    assert dispatch in DISPATCH_KINDS
    if dispatch == "gather":
        return "bad", (
            f"Placement cannot reduce traffic with gather dispatch; {where} the busiest rank carries "
            f"{plan.load_imbalance:.2f} times the mean load instead of {before.load_imbalance:.2f}."
        )
    if dispatch == "per-expert":
        return "watch", (
            f"Placement alone saves no traffic when every expert's copy is sent on its own: {where}, {plan.lar:.0%} of activations "
            "stay local at a random home. A schedule of requests decides here."
        )
    metric = KIND_METRIC[dispatch]
    if before.value(metric) <= 0:
        return "bad", "There is nothing to save: no token leaves its rank."
    saved, low, high = _saving_interval(plan, before, metric)
    numbers = f"{KIND_UNIT[dispatch]} {plan.value(metric):.2f} instead of {before.value(metric):.2f} with {words_of(report.baseline)}"
    if low <= 0:
        return "bad", f"No saving is shown {where}: {numbers} ({saved:.0%}, interval {low:.0%} to {high:.0%})."
    busy = (
        f"the busiest rank carries {plan.load_imbalance:.2f} times the mean load ({before.load_imbalance:.2f} before)"
    )
    return "watch", f"{saved:.0%} less traffic {where}: {numbers}; {busy}; {BYTES_ONLY}."


def _saving_interval(plan: ScoreRow, before: ScoreRow, metric: str) -> tuple[float, float, float]:
    """Share saved, and a cautious interval of it: worst end of one against best end of the
    other."""
    (plan_low, plan_high), (before_low, before_high) = plan.interval(metric), before.interval(metric)
    return 1 - plan.value(metric) / before.value(metric), 1 - plan_high / before_low, 1 - plan_low / before_high


def _risk(report: Report, standings: list[Standing]) -> str:
    """How much the busiest rank carries, by whom it was less, and in which domain it is most."""
    plan, others = _plan(standings), [s for s in standings if s.role != PLAN_ROW]
    low, high = plan.score.interval("load_imbalance")
    interval = f" (interval {low:.2f} to {high:.2f})" if high - low > 5e-3 else ""
    beside = ", ".join(f"{s.role} {s.score.load_imbalance:.2f}" for s in others)
    said = f"the busiest rank carries {plan.score.load_imbalance:.2f} times the mean{interval}; {beside}"
    worst = worst_domain(report)
    if worst is not None:
        domain, load = worst
        said += f"; at most {load:.2f} in a domain, {domain}"
    return said


def worst_domain(report: Report) -> tuple[str, float] | None:
    """The domain whose requests load the plan's ranks most unevenly, and how much; None where there
    is one domain."""
    if len(report.domains) < 2:
        return None
    loads = {domain.domain: random_row(domain.rows, "plan").load_imbalance for domain in report.domains}
    name = max(loads, key=loads.__getitem__)
    return name, loads[name]


def _research(report: Report) -> str:
    """What the best schedule of the third tier saves of the baseline's bytes, where that is more
    than the headline's schedule does."""
    found = [row for row in report.plan_rows if tier_of(row.schedule) == RESEARCH and not row.is_oracle]
    if not found or report.dispatch == "gather":
        return ""
    best = best_row(found, report.dispatch)
    before = traffic_cost(random_row(report.rows, report.baseline), report.dispatch)
    own = next(row for row in report.plan_rows if row.schedule == deployed_schedule(report))
    costs = [traffic_cost(row, report.dispatch) for row in (own, best)]
    if costs[1] >= min(costs[0], before):
        return ""
    return f"{best.schedule} would send {1 - costs[1] / before:.1%} fewer bytes; {TIERS[RESEARCH]}"


def _confidence(decision: str, report: Report) -> str:
    if report.dispatch == "gather":
        return "certain: the bytes do not depend on it"
    if decision == INSUFFICIENT:
        return "too low to decide"
    assert decision in (RECOMMEND, NOT_WORTH_IT)
    return f"the 95% interval decides, over {report.requests:,} requests"
