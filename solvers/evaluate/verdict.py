"""Verdict: is a plan worth deploying? Decided from the interval of the share of bytes that it saves
under the declared dispatch kind.

Bytes follow REM, K (1 - LAR) or NODE (`semmoe.solvers.evaluate.metrics.DISPATCH_KINDS`). Both
placements are resampled with the same requests, because what counts is their difference on the same
traffic: the paired interval is several times narrower than the difference of two intervals. With
few requests the bootstrap itself cannot be trusted, and the answer is that more is needed.

Shape letters: G groups of requests, X resamples.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from semmoe.solvers.evaluate.against import words_of
from semmoe.solvers.evaluate.metrics import DISPATCH_KINDS, metrics_XL, resamples_XG
from semmoe.solvers.evaluate.report import Costs, DispatchCost, Judgement, Report, ScoreRow, Verdict, random_row
from semmoe.solvers.evaluate.sums import TrafficSums
from semmoe.solvers.placement import Topology

PLUGIN_PAYS = 0.01  # share of the cost; less is no reason to add a part to a deployment
LEARNING_PAYS = 0.01  # share of the cost; less is noise between orders of arrival
WORTH = 0.05  # share of bytes that a change of placement has to save
MIN_REQUESTS = 20  # groups of requests that a bootstrap needs
MAX_FACTOR = 1_000  # of the tokens at hand: beyond that no trace will decide

RECOMMEND, NOT_WORTH_IT, INSUFFICIENT = "recommend", "not worth it", "insufficient evidence"
LEVELS = {RECOMMEND: "good", NOT_WORTH_IT: "bad", INSUFFICIENT: "watch"}
BYTES_ONLY = "bytes only; time unknown: add --hardware"

# What it takes to run a schedule: headlines come from the first two.
MAP, PLUGIN, RESEARCH = "today", "with the plug-in or router", "research"
NO_GAIN = ("dp-roundrobin", "dp-paper")  # what engines do, and what is kept for comparison


def tier_of(schedule: str) -> str:
    """What it takes to run a plan under a schedule: MAP, PLUGIN or RESEARCH."""
    if schedule in ("random", "dp-roundrobin"):
        return MAP
    return PLUGIN if schedule.startswith(("dp-", "as-")) and "oracle" not in schedule else RESEARCH


def bytes_only(found: Judgement) -> Judgement:
    """A judgement by bytes as it stands alone: it says so, and is no reason to deploy by itself."""
    level = "watch" if found.level == "good" else found.level
    return replace(found, level=level, sentence=f"{found.sentence.removesuffix('.')}; {BYTES_ONLY}.")


def beside_time(found: Verdict) -> Verdict:
    """The same beside a verdict by time, which takes the warning's place."""
    more = found.with_schedule
    return replace(
        found,
        sentence=_beside(found).sentence,
        with_schedule=more and _beside(more),
        deployable=found.deployable and _beside(found.deployable),
    )


def _beside(found: Judgement) -> Judgement:
    return replace(found, sentence=found.sentence.replace(f"; {BYTES_ONLY}", "; bytes only"))


def traffic_cost(row: ScoreRow, dispatch: str) -> float:
    """What the bytes of a row follow under the dispatch kind; REM where they follow nothing."""
    return {"per-expert": 1 - row.lar, "per-node": row.node}.get(dispatch, row.rem)


def best_row(rows: Iterable[ScoreRow], dispatch: str) -> ScoreRow:
    """The row that sends least, oracles left out. Learning is no run's default: it has to save
    LEARNING_PAYS more than the others."""
    fair = [row for row in rows if not row.is_oracle]
    plain = min((row for row in fair if row.schedule != "tp-learning"), key=lambda row: traffic_cost(row, dispatch))
    learning = [row for row in fair if row.schedule == "tp-learning"]
    limit = traffic_cost(plain, dispatch) * (1 - LEARNING_PAYS)
    return next((row for row in learning if traffic_cost(row, dispatch) <= limit), plain)


def best_deployable(rows: Iterable[ScoreRow], dispatch: str) -> str:
    """The schedule of the first two tiers under which a plan sends least. A plug-in has to save
    PLUGIN_PAYS more than placement alone."""
    costs = {
        row.schedule: traffic_cost(row, dispatch)
        for row in rows
        if tier_of(row.schedule) != RESEARCH and row.schedule not in (*NO_GAIN, "as-served")
    }
    best = min(costs, key=costs.__getitem__)
    return best if costs[best] <= costs["random"] * (1 - PLUGIN_PAYS) else "random"


def rows_per_token(row: ScoreRow, *, top_k: int, num_ranks: int) -> dict[str, float]:
    """Remote rows per token and layer of a report's row, by dispatch kind (docs/concepts.md): a row
    is one hidden state, sent at dispatch and returned at combine. "gather": every other rank gets
    every token."""
    rows = {
        "per-rank": row.rem,
        "per-expert": top_k * (1 - row.lar),
        "per-node": row.node,
        "gather": num_ranks - 1.0,
    }
    assert rows.keys() == DISPATCH_KINDS.keys()
    return rows


def row_bytes(hidden_size: int, *, dispatch_bytes: float = 2.0, combine_bytes: float = 2.0) -> float:
    """Bytes of one row there and back; 2 and 2 = bfloat16 both ways, 1 and 2 = float8 dispatch
    (scales left out)."""
    return hidden_size * (dispatch_bytes + combine_bytes)


def dispatch_costs(
    report: Report, *, top_k: int, hidden_size: int, dispatch_bytes: float, assumption: str = ""
) -> Costs:
    """Bytes that a token sends and gets back over all layers, by dispatch kind: before, after, and
    after under the best schedule that can be deployed.

    `assumption`: a sentence on where the hidden size is from.
    """
    schedule = best_deployable(report.plan_rows, report.dispatch)
    shown = {name: random_row(report.rows, name) for name in (report.baseline, "plan")}
    if schedule != "random":
        shown[f"plan, {schedule}"] = next(row for row in report.plan_rows if row.schedule == schedule)
    per_row = row_bytes(hidden_size, dispatch_bytes=dispatch_bytes) * len(report.layers)
    kinds = [kind for kind in DISPATCH_KINDS if kind != "per-node" or report.nodes > 1]
    sent = {name: rows_per_token(row, top_k=top_k, num_ranks=report.ranks) for name, row in shown.items()}
    rows = [DispatchCost(kind, {name: rows[kind] * per_row for name, rows in sent.items()}) for kind in kinds]
    return Costs(hidden_size, dispatch_bytes, rows, assumption)


@dataclass(frozen=True)
class Saving:
    """Share of bytes saved, and its 95 % interval; negative where the plan sends more."""

    share: float
    low: float
    high: float
    requests: int  # groups of requests with tokens
    tokens: int


def bytes_XL(sums: TrafficSums, topology: Topology, dispatch: str) -> np.ndarray:
    """What the dispatch sends per token and layer, in rows, float64 [X, L]; up to a factor that
    does not depend on the placement."""
    metrics = metrics_XL(sums, topology, dispatch)
    if dispatch == "per-rank":
        return metrics["rem"]
    if dispatch == "per-node":
        return metrics["node"]
    return 1 - metrics["lar"] if dispatch == "per-expert" else np.ones_like(metrics["rem"])


def saving(
    before: TrafficSums, after: TrafficSums, topology: Topology, *, dispatch: str, seed: int, num_resamples: int = 1000
) -> Saving:
    """Share of bytes that `after` saves on the same groups of requests; the interval is a paired
    percentile bootstrap."""
    num_groups = len(before.tokens_G)
    assert num_groups == len(after.tokens_G), "both are summed over the same requests"
    weights_XG = np.concatenate([np.ones((1, num_groups)), resamples_XG(before.tokens_G, num_resamples, seed)])
    sent = [bytes_XL(sums.resampled(weights_XG), topology, dispatch).mean(axis=1) for sums in (before, after)]
    shares_X = 1 - sent[1] / np.maximum(sent[0], 1e-300) if sent[0][0] > 0 else np.zeros(len(weights_XG))
    low, high = np.quantile(shares_X[1:], [0.025, 0.975])
    return Saving(
        float(shares_X[0]), float(low), float(high), int((before.tokens_G > 0).sum()), int(before.tokens_G.sum())
    )


def judge(
    saved: Saving, *, dispatch: str, schedule: str = "random", against: str = "contiguous", worth: float = WORTH
) -> Judgement:
    """Decision, level and sentence for a report, with the tokens needed to decide where the
    evidence does not.

    `schedule`: under which the plan was scored; `against`: what it was held against. The interval
    narrows with the square root of the tokens.
    """
    needed: int | None = None
    if dispatch == "gather":
        decision, reason = NOT_WORTH_IT, "gather dispatch sends the same bytes whatever the placement"
    elif saved.requests < MIN_REQUESTS:
        decision = INSUFFICIENT
        needed = round(saved.tokens * MIN_REQUESTS / max(saved.requests, 1))
        reason = f"{saved.requests} held-out requests are too few for an interval"
    elif saved.low >= worth:
        decision, reason = RECOMMEND, f"at least {worth:.0%} is saved"
    elif saved.high < worth:
        decision, reason = NOT_WORTH_IT, f"less than {worth:.0%} is saved"
    else:
        decision, reason = INSUFFICIENT, f"the interval holds {worth:.0%}, from which on it is worth it"
        half_width = (saved.high - saved.low) / 2
        factor = (half_width / max(abs(saved.share - worth), 1e-12)) ** 2
        needed = round(saved.tokens * max(factor, 1.1)) if factor <= MAX_FACTOR else None
    under = "placement alone" if schedule == "random" else f"placement with {schedule}"
    opening = {MAP: decision, PLUGIN: f"{PLUGIN}, {decision}", RESEARCH: "research only"}[tier_of(schedule)]
    sentence = f"{opening[0].upper()}{opening[1:]}: {reason}"
    if dispatch != "gather":
        sentence += f" ({under} saves {saved.share:.1%} of the bytes against {words_of(against)}, "
        sentence += f"interval {saved.low:.1%} to {saved.high:.1%})"
    if decision == INSUFFICIENT:
        more = f"about {needed:,} held-out tokens" if needed else "more tokens than any trace will have"
        sentence += f"; to decide, {more} would be needed"
    return Judgement(
        decision=decision,
        level=LEVELS[decision],
        sentence=f"{sentence}.",
        saved=saved.share,
        ci=(saved.low, saved.high),
        schedule=schedule,
        tokens=saved.tokens,
        tokens_needed=needed,
        against=against,
    )
