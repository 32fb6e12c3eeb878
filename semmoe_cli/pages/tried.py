"""One page for `semmoe try`: the verdicts for prefill and decode, and the times behind them."""

from semmoe.pages.deployment import named_model
from semmoe.pages.on_request import timed
from semmoe.pages.page import Commands, Grid, Page, Section
from semmoe.solvers.evaluate.decision import decide
from semmoe.solvers.evaluate.report import Report
from semmoe.terminal.tables import COLUMNS

BADGES = {"good": "worth it", "watch": "look closer", "bad": "not worth it"}
ORDER = ("good", "watch", "bad")


def tried_page(reports: dict[str, Report], commands: list[str]) -> Page:
    """The page. `reports`: by name of the phase; `commands`: what makes the plans."""
    decided = {name: decide(report) for name, report in reports.items()}
    said = {name: decision.sentence for name, decision in decided.items()}
    level = min((decision.level for decision in decided.values()), key=ORDER.index)
    first = next(iter(reports.values()))
    several = len(said) > 1
    verdict = " ".join(f"{name.capitalize()}: {words}" if several else words for name, words in said.items())
    sections = []
    for name, report in reports.items():
        if report.time is not None:
            section = timed(report.time)
            sections.append(Section(f"{name.capitalize()}. {section.title}", section.blocks))
    sections.append(_bytes(first))
    sections.append(Section("How to get the plans", [Commands("the same, step by step", commands, [])]))
    model = named_model(first.model)
    return Page(
        title=f"Is placement worth it{f' for {model}' if model else ''} on {first.ranks} ranks?",
        verdict=verdict,
        level=level,
        badge=BADGES[level],
        facts=[
            ("Read", first.trace),
            ("Scored on", f"{first.requests:,} held-out requests, {first.tokens:,} tokens"),
            ("Group", f"{first.ranks} ranks" + (f" on {first.nodes} nodes" if first.nodes > 1 else " on one node")),
        ],
        sections=sections,
        footer="Placed at a fast effort on half of the requests, timed and scored on the other half.",
    )


def _bytes(report: Report) -> Section:
    """What the plan moves, beside the baselines."""
    metrics = [metric for metric in COLUMNS if metric != "node" or report.nodes > 1]
    rows = [
        [row.placement, row.schedule, *(f"{row.value(metric):.3f}" for metric in metrics)]
        for row in report.rows
        if not row.is_oracle
    ]
    words = report.verdict.sentence if report.verdict else "What it moves"
    headings = [COLUMNS[metric][0] for metric in metrics]
    return Section(words, [Grid(["placement", "schedule", *headings], rows, names_at=frozenset((0, 1)))])
