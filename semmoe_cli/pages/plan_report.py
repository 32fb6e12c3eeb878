"""PlanReport: everything that a report of a plan says, computed once for the screen, for JSON and
for a page.

Heavy modules are imported inside.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from semmoe.profiles.errors import InputError, require_extra

if TYPE_CHECKING:
    import numpy as np

    from semmoe.profiles.trace import RoutingTrace
    from semmoe.solvers.deployment import Deployment
    from semmoe.solvers.evaluate.pictures import Details, Scored
    from semmoe.solvers.evaluate.report import PredictableToken, Report, WhatIf
    from semmoe.solvers.plan import Plan
    from semmoe.solvers.schedule.simulate import Setting
    from semmoe.solvers.time.hardware import TimeAsked

ASSUMED_HIDDEN_SIZE = 4096
COMBINE_BYTES = 2.0  # of a value on its way back
WHAT_IF_HOLDOUT = 0.2


@dataclass(frozen=True)
class PlanReportOptions:
    """What was asked for beyond the scores."""

    what_if: list[int]
    hidden_size: int
    dispatch_bytes: float
    bandwidth: str  # of the links (solvers/time/links.py), "" = no times
    latency: str
    tokenizer: Path | None
    pictures: bool
    against: str | None = None
    phase: str | None = None
    replica_choice: str | None = None  # None: the plan's
    time: "TimeAsked | None" = None


@dataclass(frozen=True, eq=False)
class PlanReport:
    """A report of a plan on a trace with what was asked for, and what a page says beside it.
    `details` is there where pictures are."""

    plan: "Plan"
    report: "Report"
    notes: list[str]
    plan_path: str
    details: "Details | None" = None
    left_out: list[str] = field(default_factory=list)  # what was asked for and cannot be had, with the reason


def make_plan_report(
    plan: "Plan", trace: "RoutingTrace", options: PlanReportOptions, setting: "Setting", *, plan_path: str
) -> PlanReport:
    """The report of the plan on the trace. Raises InputError where there is nothing to score
    honestly."""
    from semmoe.solvers.evaluate.against import deployments_beside, read_against
    from semmoe.solvers.evaluate.decision import deployed_schedule
    from semmoe.solvers.evaluate.pictures import report_details, scored_requests
    from semmoe.solvers.evaluate.verdict import dispatch_costs
    from semmoe.solvers.make_plan import score_plan
    from semmoe.solvers.replan.drift import drift_of
    from semmoe.solvers.time.links import parse_links
    from semmoe.solvers.time.row_times import RowSize, report_times, rows_between_ranks
    from semmoe.terminal.progress import steps

    links = parse_links(options.bandwidth, options.latency, plan.topology) if options.bandwidth else None
    apart = bool(links and not links.is_uniform)
    details, rows = None, None
    left_out: list[str] = []
    against = read_against(options.against, plan.model, plan.topology)
    with steps("report") as progress:
        progress(0, 4)
        report, notes = score_plan(plan, trace, against=against, setting=setting)
        report = replace(report, drift=drift_of(plan, trace, plan_path=plan_path, seed=setting.seed))
        progress(1, 4)
        if options.pictures or options.what_if or options.tokenizer or apart or options.time:
            needs_all = bool(apart or options.time)  # pictures show the schedule that the headline is about
            scheduled = needs_all or (options.pictures and deployed_schedule(report) != "random")
            scored = scored_requests(
                plan, trace, scheduled=scheduled, requests_only=not needs_all, processes=os.cpu_count() or 1
            )
            beside = deployments_beside(scored.deployment, plan.model.n_group, against)
            progress(2, 4)
            if options.pictures:
                name = report.baseline if report.baseline in beside else "contiguous"
                details = report_details(trace, report, scored, (name, beside[name]))
                progress(3, 4)
            if options.time:
                report = _timed(report, trace, scored, beside, options)
            if options.what_if:
                report = replace(report, what_if=_what_if(plan, trace, scored, options, setting))
            if options.tokenizer:
                tokens = _predictable_tokens(trace, scored, options.tokenizer, setting.seed)
                report = replace(report, predictable_tokens=tokens)
                if not tokens:
                    left_out.append(
                        "predictable tokens are left out: no token id is frequent enough on both sides of the split"
                    )
            if apart:
                rows = rows_between_ranks(trace, scored, report, beside)
    if options.hidden_size or options.bandwidth or options.pictures:
        hidden_size, assumption = _hidden_size(plan, options)
        out, back = hidden_size * options.dispatch_bytes, hidden_size * COMBINE_BYTES
        costs = dispatch_costs(
            report,
            top_k=plan.model.top_k,
            hidden_size=hidden_size,
            dispatch_bytes=options.dispatch_bytes,
            assumption=assumption,
        )
        report = replace(report, costs=costs)
        if links:
            size = RowSize(hidden_size, out, back, assumption)
            report = replace(report, times=report_times(report, links, size, rows))
    return PlanReport(plan, report, notes, plan_path, details, left_out)


def _hidden_size(plan: "Plan", options: PlanReportOptions) -> tuple[int, str]:
    """Hidden size: as given, else of the model's config.json where that is a local path, else
    assumed; and a sentence that says so."""
    values = f"{options.dispatch_bytes:g} bytes a value out, 2 back"
    if options.hidden_size:
        return options.hidden_size, f"Hidden size {options.hidden_size}; {values}."
    from semmoe.profiles.config import read_config
    from semmoe.profiles.demo.paths import demo_model_path

    where = (demo_model_path() if plan.model.model == "demo" else Path(plan.model.model)) / "config.json"
    if plan.model.model and where.is_file():
        config = read_config(where)
        size = (config.get("text_config") or config).get("hidden_size")
        if isinstance(size, int):
            return size, f"Hidden size {size} of {plan.model.model}; {values}."
    size = ASSUMED_HIDDEN_SIZE
    return size, f"Hidden size {size} is assumed (give --hidden-size): shares do not depend on it; {values}."


def _sides(plan: "Plan", trace: "RoutingTrace", scored: "Scored") -> "tuple[np.ndarray, np.ndarray]":
    """Requests to learn from and others to score on, bool [B] each: the plan's own where the
    trace has both, else a new split."""
    from semmoe.profiles.split import holdout_requests

    if scored.held_out and scored.fit_B.any():
        return scored.fit_B, scored.score_B
    held_out_B = holdout_requests(trace.requests(), holdout=WHAT_IF_HOLDOUT, holdout_domains=[], seed=plan.seed)
    return ~held_out_B, held_out_B


def _timed(
    report: "Report",
    trace: "RoutingTrace",
    scored: "Scored",
    beside: "dict[str, Deployment]",
    options: PlanReportOptions,
) -> "Report":
    """The report with its times, on the requests that it was scored on."""
    from semmoe.solvers.evaluate.score_plan import scored_batch
    from semmoe.solvers.time.predict import timed_report

    if not scored.held_out:
        raise InputError(f"--hardware: {trace.path} holds no request that the plan was not fitted on")
    batch = scored_batch([trace], [scored.score_B], seed=report.setting.seed)
    assert options.time is not None
    against = report.baseline if options.against else ""
    return timed_report(report, scored.deployment, beside, batch, options.time, against)


def _what_if(
    plan: "Plan", trace: "RoutingTrace", scored: "Scored", options: PlanReportOptions, setting: "Setting"
) -> "WhatIf":
    from semmoe.solvers.evaluate.what_if import what_if
    from semmoe.solvers.time.predict import total_us

    fit_B, score_B = _sides(plan, trace, scored)
    numbers, asked = options.what_if, options.time
    per_node = plan.topology.ranks_per_node if plan.topology.num_nodes > 1 else max(numbers)
    timed = {"times": partial(total_us, model=plan.model.model, asked=asked, setting=setting)} if asked else {}
    return what_if(
        trace, fit_B, score_B, numbers, ranks_per_node=per_node, dispatch=plan.dispatch, seed=setting.seed, **timed
    )


def _predictable_tokens(
    trace: "RoutingTrace", scored: "Scored", tokenizer: Path, seed: int
) -> "list[PredictableToken]":
    """Tokens with text, most predictable first; [] where no id is frequent enough."""
    from semmoe.solvers.evaluate.predictable import token_predictability
    from semmoe.solvers.evaluate.report import PredictableToken
    from semmoe.solvers.evaluate.score_plan import scored_batch

    text_of = _token_texts(tokenizer)
    if not scored.held_out or not scored.fit_B.any():
        raise InputError(
            f"--tokenizer: {trace.path} must hold requests that the plan was fitted on and others that it was not"
        )
    learn, score = (scored_batch([trace], [keep_B], seed=seed) for keep_B in (scored.fit_B, scored.score_B))
    if (learn.token_ids_T < 0).all():
        raise InputError(f"--tokenizer: {trace.path} holds no token ids")
    found = token_predictability(learn, score, scored.deployment.placement.hosts_LER)
    return [
        PredictableToken(int(i), text_of(int(i)), int(n), float(s))
        for i, n, s in zip(found.ids_U, found.tokens_U, found.share_U, strict=True)
    ]


def _token_texts(path: Path) -> Callable[[int], str]:
    """A function from a token id to its text, spaces and line ends made visible. Raises
    InputError where there is no tokenizer."""
    require_extra("--tokenizer", "tokenizers")
    from tokenizers import Tokenizer

    from semmoe.profiles.demo.paths import demo_model_path

    path = demo_model_path() if str(path) == "demo" else path
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"--tokenizer {path}: there is no {file.name}")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for a damaged file
        raise InputError(f"--tokenizer {file} cannot be read: {str(error).splitlines()[0]}") from None

    def text_of(token_id: int) -> str:
        text = tokenizer.decode([token_id], skip_special_tokens=False)
        if not text or "\ufffd" in text:  # part of a character: show the vocabulary's own name
            text = tokenizer.id_to_token(token_id) or f"id {token_id}"
        return text.replace(" ", "\u2423").replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")

    return text_of
