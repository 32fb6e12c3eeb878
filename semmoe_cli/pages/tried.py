"""One page for `semmoe try`: the verdicts for prefill and decode, and the times behind them."""

from dataclasses import replace

from semmoe.pages.first_screen import BADGES, headline, hero, tiles
from semmoe.pages.on_request import timed
from semmoe.pages.page import Block, Commands, Grid, Page, Section, Text
from semmoe.pages.risks import EVIDENCE, NEXT, RISKS
from semmoe.profiles.errors import model_name
from semmoe.solvers.evaluate.decision import Decision, decide
from semmoe.solvers.evaluate.report import Report
from semmoe.terminal.tables import COLUMNS

ORDER = ("good", "watch", "bad")


def tried_page(reports: dict[str, Report], commands: list[str]) -> Page:
    """The page. `reports`: by name of the phase; `commands`: what makes the plans."""
    decided = {name: decide(report) for name, report in reports.items()}
    best = min(decided, key=lambda name: ORDER.index(decided[name].level))
    first, several = reports[best], len(reports) > 1
    sections = [
        Section("Make the plans, and bring them into the engine", [Commands("step by step", commands, [])], part=NEXT),
        Section("The busiest rank, and other traffic", list(_risks(decided)), part=RISKS),
    ]
    evidence = []
    for name, report in reports.items():
        if report.time is not None:
            section = timed(report.time)
            evidence.append(Section(f"{name.capitalize()}. {section.title}", section.blocks))
    evidence.append(_bytes(first))
    evidence[0] = replace(evidence[0], part=EVIDENCE)
    model = model_name(first.model, first.trace)
    return Page(
        title=f"Is placement worth it{f' for {model}' if model else ''} on {first.ranks} ranks?",
        verdict=(f"{best.capitalize()}: " if several else "") + headline(first, decided[best]),
        level=decided[best].level,
        badge=BADGES[decided[best].level],
        facts=[
            ("Read", first.trace),
            ("Scored on", f"{first.requests:,} held-out requests, {first.tokens:,} tokens"),
            ("Group", f"{first.ranks} ranks" + (f" on {first.nodes} nodes" if first.nodes > 1 else " on one node")),
        ],
        sections=[*sections, *evidence],
        footer="Placed at a fast effort on half of the requests, timed and scored on the other half.",
        lead=" ".join((f"{n.capitalize()}: " if several else "") + d.sentence for n, d in decided.items()),
        tiles=tuple((n.capitalize() if several else "", tiles(r, decided[n])) for n, r in reports.items()),
        hero=hero(first, decided[best], best.capitalize()),
    )


def _risks(decided: dict[str, Decision]) -> list[Block]:
    loads = [[name, f"{decision.risk[0].upper()}{decision.risk[1:]}."] for name, decision in decided.items()]
    words = (
        "The quick placement keeps every expert once: no memory, and nothing to roll back until you deploy. Whether it holds on other "
        "traffic: trace another day and report the plan on it."
    )
    return [Grid(["phase", "load"], loads, words=True), Text(words)]


def _bytes(report: Report) -> Section:
    """What the plan moves, beside the baselines."""
    metrics = [metric for metric in COLUMNS if metric != "node" or report.nodes > 1]
    rows = [
        [row.placement, row.schedule, *(f"{row.value(metric):.3f}" for metric in metrics)]
        for row in report.rows
        if not row.is_oracle
    ]
    headings = [COLUMNS[metric][0] for metric in metrics]
    grid = Grid(["placement", "schedule", *headings], rows, names_at=frozenset((0, 1)))
    return Section("What the plan moves, under every schedule", [grid])
