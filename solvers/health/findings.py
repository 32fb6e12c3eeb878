"""What the numbers of a health check mean, in one sentence each, and whether to act on it.

Levels: "good" (nothing to do), "watch" (works, with a limit to know), "bad" (do something before
placing).
"""

from semmoe.profiles.split import one_sided
from semmoe.solvers.health.record import DomainDrift, Finding, Health, LeftOutFacts, TimeDrift

FEW_ACTIVATIONS = 50  # of the median expert at a layer: below, co-activation counts are mostly noise
FEW_REQUESTS = 4  # of a domain: below, its REM says more of the requests than of the domain
LEAST_SAVING = 0.005  # REM: shares of less than that say nothing
SMALL_SHARE = 0.05  # of the saving that is there already: less is not worth tracing for
DRIFT_SHARE = 0.10  # of the saving: more is worth a plan of its own
DRIFT_IMBALANCE = 0.10  # busiest rank over mean: more makes a layer as much slower
MANY_UNSEEN = 0.10
MANY_LEFT_OUT = 0.20  # of the requests or tokens: what is left may be another traffic than the server's

Answer = tuple[str, str]  # level and sentence


NOT_JUDGED = ("watch", "Not judged: the trace holds routing that cannot be.")


def health_findings(health: Health) -> list[Finding]:
    """One finding per topic, from a health record that has none yet."""
    questions = {
        "size": _size,
        "structure": _structure,
        "load": _skew,
        "domains": _domains,
        "time": _time,
        "token ids": _unseen,
        "phase": _phase,
    }
    answers = {topic: question(health) for topic, question in questions.items()}
    if health.impossible:
        answers = {"routing": _impossible(health.impossible), **answers, "structure": NOT_JUDGED}
    if health.left_out is not None:
        answers["left out"] = _left_out(health.left_out)
    return [Finding(topic, *answer) for topic, answer in answers.items()]


def _impossible(impossible: dict[str, str]) -> Answer:
    texts = list(impossible.values())
    more = f"; and {len(texts) - 5} layers more: {', '.join(list(impossible)[5:25])}" if len(texts) > 5 else ""
    return "bad", f"Impossible routing: {'; '.join(texts[:5])}{more}."


def _phase(health: Health) -> Answer:
    share = health.prompt_share
    if health.phase != "all":
        return "good", f"Only {health.phase} tokens were looked at."
    if said := one_sided({"prompt": share, "generated": 1 - share}):
        return "watch", f"{said[0].upper()}{said[1:]}."
    return (
        "good",
        f"{share:.0%} of the tokens are of prompts, {1 - share:.0%} generated: --phase places for one of them.",
    )


def _left_out(left_out: LeftOutFacts) -> Answer:
    text = f"the import left out {left_out}"
    if max(left_out.requests_share, left_out.tokens_share) > MANY_LEFT_OUT:
        return "watch", f"Much of the traffic is not in the trace: {text}."
    return "good", f"Little is missing: {text}."


def saving(health: Health) -> float:
    """REM that the quick placement saves against contiguous experts on held-out requests; tiny
    where it is not known."""
    learning = health.learning
    return max(learning.contiguous_rem - learning.points[-1].rem, 1e-9) if learning else 1e-9


def _size(health: Health) -> Answer:
    learning, median = health.learning, health.load.median_activations
    if learning is None:
        few = f"{health.requests} requests are too few to hold some out and learn from the rest"
        return "bad", f"{few}: trace at least 10, better 200."
    if median < FEW_ACTIVATIONS:
        more = FEW_ACTIVATIONS / max(median, 1)
        return (
            "bad",
            f"Too few tokens: the median expert was chosen {median:.0f} times. Trace {more:.0f} times as many.",
        )
    now, forecast = learning.points[-1].rem, learning.forecast
    if saving(health) < LEAST_SAVING:
        brings = ", ".join(f"{f.factor} times as many {now - f.rem:.2f}" for f in forecast)
        return "watch", f"Placement saves no REM on held-out requests; more tokens would bring: {brings}."
    gains = {f.factor: (now - f.rem) / saving(health) for f in forecast}
    numbers = (
        f"twice as many would add {gains[2]:.0%} to the saving of {saving(health):.2f} REM, ten times {gains[10]:.0%}"
    )
    if gains[2] < SMALL_SHARE:
        return "good", f"Enough tokens: {numbers}."
    return "watch", f"More tokens would help: {numbers}."


def _structure(health: Health) -> Answer:
    structure = health.structure
    if structure is None:
        return "watch", "Structure cannot be told: too few requests or tokens, or a single expert per token."
    text = f"on held-out requests, experts of one group meet {structure.lift:.2f} times as often as by chance"
    if structure.verdict.startswith("structured"):
        return "good", f"There is structure to use: {text}."
    return "bad", f"Little structure: {text}. Placement will save little; balance load instead."


def _skew(health: Health) -> Answer:
    load, ranks = health.load, health.ranks
    worst, per_rank = max(load.busiest_over_mean_layers), health.experts / ranks
    text = (
        f"the busiest expert carries {load.busiest_over_mean:.1f} times the mean, {worst:.1f} times at the worst layer"
    )
    if worst > per_rank:
        return "bad", f"One expert outweighs a whole rank of {ranks}: {text}. Only replicas can balance that."
    if worst > per_rank / 2:
        return (
            "watch",
            f"Load is uneven: {text}. With {per_rank:.0f} experts on a rank there is little room to balance.",
        )
    return "good", f"Load is uneven, but placement can balance it: {text}."


def _domains(health: Health) -> Answer:
    rows = health.domains
    if not rows:
        return "watch", "One domain, or too few requests: how a plan carries over to other traffic is not known."
    rows = [row for row in rows if row.requests >= FEW_REQUESTS] or rows
    costs = [_drift_costs(health, row, "left_out", "known") for row in rows]
    worst = max(range(len(rows)), key=lambda i: max(costs[i]))
    apart = sum(row.distance > row.noise_95 for row in rows)
    loads = f"expert loads of {apart} of {len(rows)} domains differ by more than chance"
    change = _change(rows[worst], "left_out", "known")
    if max(costs[worst]) > 1:
        name = rows[worst].domain
        return "watch", f"Keep {name!r} in the trace: a plan learned without it has {change} there; {loads}."
    return "good", f"Domains share their structure: leaving one out of learning gives at worst {change}; {loads}."


def _time(health: Health) -> Answer:
    time = health.time
    if time is None:
        return "watch", "Drift over time cannot be told: too few requests."
    text = f"on the later half, a plan of the earlier half has {_change(time, 'later', 'mixed')}"
    if max(_drift_costs(health, time, "later", "mixed")) > 1:
        return "watch", f"Traffic changes in stored order: {text}. Trace close to deployment."
    return "good", f"Stable in stored order: {text}."


def _drift_costs(health: Health, row: DomainDrift | TimeDrift, away: str, home: str) -> tuple[float, float]:
    """Costs of drift in REM and in load imbalance, 1 = enough to say so."""
    rem, imbalance = (getattr(row, f"{name}_{away}") - getattr(row, f"{name}_{home}") for name in ("rem", "imbalance"))
    return rem / (DRIFT_SHARE * saving(health)), imbalance / DRIFT_IMBALANCE


def _change(row: DomainDrift | TimeDrift, away: str, home: str) -> str:
    return (
        f"REM {getattr(row, f'rem_{away}'):.2f} instead of {getattr(row, f'rem_{home}'):.2f} and load imbalance "
        f"{getattr(row, f'imbalance_{away}'):.2f} instead of {getattr(row, f'imbalance_{home}'):.2f}"
    )


def _unseen(health: Health) -> Answer:
    curve = health.unseen
    if not curve:
        return "watch", "No token ids: experts can be placed, but no token table or request scorer can be made."
    rate = curve[-1].rate
    text = f"{rate:.1%} of held-out tokens have an id that the training requests never showed"
    return ("good", f"{text}.") if rate < MANY_UNSEEN else ("watch", f"{text}: token tables fall back for them.")
