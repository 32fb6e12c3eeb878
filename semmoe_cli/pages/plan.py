"""The report of a plan as a page: every section's title says what was found.

Heavy modules are imported inside.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from semmoe.pages.explorer import LayerMap
from semmoe.pages.figures import plan as figures_plan
from semmoe.pages.first_screen import BADGES, headline, hero, tiles
from semmoe.pages.on_request import (
    certificate_section,
    costs_section,
    time_section,
    times_section,
    tokens_section,
    what_if_section,
)
from semmoe.pages.page import Block, Grid, Page, Picture, Section, Text
from semmoe.pages.risks import EVIDENCE, next_section, other_engines, risk_section
from semmoe.profiles.errors import model_name
from semmoe.terminal.tables import COLUMNS

if TYPE_CHECKING:
    from semmoe.pages.plan_report import PlanReport
    from semmoe.solvers.evaluate.pictures import Details
    from semmoe.solvers.evaluate.report import Report
    from semmoe.solvers.plan import Plan

FITTED = "On the requests that the placement was fitted on: an illustration, not evidence."


def plan_page(about: "PlanReport") -> Page:
    """The page. Sections whose numbers are not there are left out."""
    from semmoe.solvers.evaluate.decision import decide

    report, plan = about.report, about.plan
    decision = decide(report)
    level, sentence = decision.level, decision.sentence
    makers = (
        time_section,
        _scores,
        _layers,
        _layer_map,
        _requests,
        _co_activation,
        _traffic,
        _loads,
        _domains,
        _drift,
        what_if_section,
        tokens_section,
        costs_section,
        times_section,
        certificate_section,
    )
    evidence = [section for make in makers if (section := make(about)) is not None]
    evidence[0] = replace(evidence[0], part=EVIDENCE)
    sections = [next_section(about, decision), risk_section(about, decision), *evidence, other_engines(about)]
    model = model_name(report.model, report.trace)
    facts = [
        (
            "Model",
            f"{model or 'not named'}: {plan.model.num_layers} MoE layers, {plan.model.num_experts} experts, top-{plan.model.top_k}",
        ),
        ("Expert-parallel group", _group(report.ranks, report.nodes)),
        ("Scored on", _scored_on(report, plan)),
        ("Learned from", _learned(plan)),
        ("Method", f"{plan.method}, seed {plan.seed}, load cap {plan.load_cap:g}"),
        ("Dispatch", report.dispatch),
    ]
    return Page(
        title=f"Expert placement{f' for {model}' if model else ''} on {report.ranks} ranks",
        verdict=headline(report, decision),
        level=level,
        badge=BADGES[level],
        lead=f"{sentence} {_sentence(decision.why)}".strip(),
        tiles=(("", tiles(report, decision)),),
        hero=hero(report, decision),
        facts=facts,
        sections=sections,
        footer=_footer(about),
    )


def _details(about: "PlanReport") -> "Details":
    assert about.details is not None, "a page needs the pictures' arrays"
    return about.details


def _group(ranks: int, nodes: int) -> str:
    return f"{ranks} ranks" + (f" on {nodes} nodes" if nodes > 1 else " on one node")


def _scored_on(report: "Report", plan: "Plan") -> str:
    """How many requests, and which: the plan's own held-out ones, or all that another trace
    holds."""
    said, split = f"{report.requests:,} held-out requests, {report.tokens:,} tokens", plan.split
    if split.get("held_out_requests") != report.requests:
        return said
    if split.get("holdout_domains"):
        return f"{said}: all of {', '.join(split['holdout_domains'])}"
    return f"{said}: {split['holdout']:.0%} of the trace, drawn with seed {split.get('seed', plan.seed)}"


def _learned(plan: "Plan") -> str:
    split = plan.split
    count = split.get("training_requests")
    if count is None:
        return "not recorded"
    kind = (
        f"all but {', '.join(split['holdout_domains'])}"
        if split.get("holdout_domains")
        else "other requests of the trace"
    )
    return f"{count:,} requests ({kind})"


def _footer(about: "PlanReport") -> str:
    from importlib.metadata import version

    said = [*about.notes, _details(about).scored.note, *about.left_out]
    lines = " ".join(line[0].upper() + line[1:].rstrip(".") + "." for line in said if line)
    made = f"semmoe {version('semmoe')}, plan {about.plan.fingerprint}"
    return f"{lines} Intervals are 95% bootstrap intervals over requests. {made}.".strip()


def _not_evidence(about: "PlanReport") -> list[Block]:
    """What pictures must say where they cannot show the held-out requests."""
    return [] if _details(about).scored.held_out else [Text(FITTED, hint=True)]


def score_grid(report: "Report") -> Grid:
    """The rows of a report with intervals; the best of each column, oracles left out, is marked."""
    rows = report.rows
    # A median that follows the mean, and a balance that is perfect everywhere, are not worth a
    # column on paper.
    same = {m for m in ("token_imbalance",) if len({round(row.value(m), 3) for row in rows}) == 1}
    metrics = [m for m in COLUMNS if m not in same | {"load_imbalance_median"} and (m != "node" or report.nodes > 1)]
    cells, marked = [], set()
    for row in rows:
        line = list(row.key)
        for metric in metrics:
            low, high = row.interval(metric)
            # Balance of tokens is made within a batch or window: resampled requests do not speak of
            # it.
            wide = high - low > 5e-4 and metric != "token_imbalance"
            value = f"{row.value(metric):.3f}"
            line.append(f"{value} [{low:.2f}, {high:.2f}]" if wide else value)
        cells.append(line)
    for j, metric in enumerate(metrics):
        fair = {i: round(row.value(metric), 3) for i, row in enumerate(rows) if not row.is_oracle}
        best = (max if COLUMNS[metric][1] else min)(fair.values())
        if len(set(fair.values())) > 1 and metric != "token_imbalance":
            marked |= {(i, j + 2) for i, value in fair.items() if value == best}
    return Grid(
        ["placement", "tokens live", *(COLUMNS[m][0] for m in metrics)],
        cells,
        frozenset(marked),
        names_at=frozenset((0, 1)),
    )


def _drift(about: "PlanReport") -> Section | None:
    drift = about.report.drift
    if drift is None:
        return None
    hint = (
        f"Each half of {drift.requests} requests that the plan was not made from is re-placed for and scored on the other. "
        "In brackets: 95 % bootstrap interval."
    )
    return Section("Drift of the traffic", [Text(drift.sentence), Text(hint, hint=True)])


def _scores(about: "PlanReport") -> Section:
    report = about.report
    metric = {"per-expert": "lar", "per-node": "node"}.get(report.dispatch, "rem")
    # What there is without us first, then the plan.
    report = replace(report, rows=sorted(report.rows, key=lambda row: row.placement == "plan"))
    picture = Picture(
        figures_plan.score_rows(report.rows, metric, report.uniform.get(metric)),
        0.75 + 0.36 * len(report.rows),
        "Scores of every placement and schedule with their intervals",
        "Dots: mean over layers. Bars: 95% interval over requests. "
        "Dotted line: what experts without any structure would give at a random home.",
        stacked=2,
    )
    node = "NODE: other nodes that it must reach. " if about.report.nodes > 1 else ""
    words = Text(
        "LAR: share of activations whose expert is on the token's own rank. REM: other ranks that a token must reach. "
        f"{node}LINK: rows through the busiest rank, per token that lives there. Load and tokens: busiest rank over mean. "
        "Each is a mean over layers, in brackets its 95% interval; a dot marks the best of a column. Oracles schedule "
        "knowing the routing that is still to come.",
        hint=True,
    )
    blocks: list[Block] = [score_grid(report), words, picture]
    return Section(f"Before and after, on {report.requests:,} requests that the placement never saw", blocks)


def _layers(about: "PlanReport") -> Section:
    from semmoe.solvers.evaluate.report import random_row

    names = about.report.baseline, "plan"
    pairs = [[random_row(layer.rows, name).rem for name in names] for layer in about.report.layers]
    saved = [1 - after / max(before, 1e-12) for before, after in pairs]
    gaining = sum(s > 0 for s in saved)
    which = "Every layer gains" if gaining == len(saved) else f"{gaining} of {len(saved)} layers gain"
    low, high = min(saved), max(saved)
    amount = f"{low:.0%} to {high:.0%} fewer" if low >= 0 else f"{_fewer(low)} to {_fewer(high)}"
    title = f"{which}: {amount} remote ranks"
    picture = Picture(
        figures_plan.layer_lines(about.report, _details(about).schedule),
        2.7,
        "REM and load imbalance of every layer, before and after",
        stacked=2,
    )
    return Section(title, [picture])


def _fewer(saved: float) -> str:
    return f"{saved:.0%} fewer" if saved >= 0 else f"{-saved:.0%} more"


def _layer_map(about: "PlanReport") -> Section:
    from semmoe.solvers.evaluate.report import random_row

    details, report = _details(about), about.report
    said = []
    for layer in report.layers:
        before, after = (random_row(layer.rows, name) for name in (report.baseline, "plan"))
        said.append(
            f"Layer {layer.model_layer}: REM {before.rem:.2f} before, {after.rem:.2f} after; busiest rank "
            f"{before.load_imbalance:.2f} before, {after.load_imbalance:.2f} after."
        )
    shown = LayerMap(
        domains=details.domains,
        load_LDE=details.load_LDE,
        rank_LE=details.home_of_LE,
        numbers=[layer.model_layer for layer in report.layers],
        said=said,
        shown=details.layer,
        label=f"Which experts each domain chooses at layer {report.layers[details.layer].model_layer}",
        caption="Experts in the order of their ranks under the plan; the bluer, the more of the domain's tokens choose the expert.",
    )
    busiest = float(details.load_LDE[details.layer].max())
    title = f"Domains choose different experts: up to {busiest:.1f} times the mean at the layer of median saving"
    return Section(title, [*_not_evidence(about), shown])


def _requests(about: "PlanReport") -> Section:
    import numpy as np

    rem_G = _details(about).rem_G
    saved_G = 1 - rem_G["after"] / np.maximum(rem_G["before"], 1e-12)
    gaining = float((saved_G > 0).mean())
    low, high = np.quantile(saved_G, [0.1, 0.9])
    picture = Picture(
        figures_plan.requests_histogram(rem_G, _details(about).against),
        2.5,
        "Histogram of requests by remote ranks per token, before and after",
        "Of very many requests, groups of some are counted.",
    )
    title = f"{gaining:.0%} of requests touch fewer ranks; the middle eight of ten reach {_fewer(low)} to {_fewer(high)} remote ranks"
    return Section(title, [*_not_evidence(about), picture])


def _sentence(why: str) -> str:
    return f"{why[0].upper()}{why[1:]}." if why else ""


def _co_activation(about: "PlanReport") -> Section:
    import numpy as np

    details = _details(about)
    pairs_EE = details.pairs_EE - np.diag(details.pairs_EE.diagonal())
    total = max(pairs_EE.sum(), 1)
    before, after = (
        float(pairs_EE[rank_E[:, None] == rank_E].sum() / total) for rank_E in (details.before_of_E, details.home_of_E)
    )
    number = about.report.layers[details.layer].model_layer
    picture = Picture(
        figures_plan.co_activation(details, about.report.ranks),
        4.1,
        f"Co-activation of the experts of layer {number}, in checkpoint order and grouped by rank",
        f"Layer {number}, the layer of median saving. A cell is a pair of experts: the bluer, the more often they serve one token, "
        "against what their loads alone would give. Boxes are ranks.",
        stacked=2,
    )
    title = f"Experts that work together now share a rank: {after:.0%} of their pairs, {before:.0%} before"
    return Section(title, [*_not_evidence(about), picture])


def _traffic(about: "PlanReport") -> Section | None:
    import numpy as np

    rows_RR = _details(about).rows_RR
    ranks = len(rows_RR["before"])
    if ranks < 2:
        return None
    off = ~np.eye(ranks, dtype=bool)
    before, after = (float(rows_RR[name][off].sum()) for name in ("before", "after"))
    change = after / max(before, 1e-12) - 1
    verb = "fewer" if change <= 0 else "more"
    live = (
        "at a random rank"
        if _details(about).schedule == "random"
        else f"where schedule {_details(about).schedule} sends it"
    )
    unit = "tokens and experts" if about.report.dispatch == "per-expert" else "tokens and ranks"
    picture = Picture(
        figures_plan.rank_traffic(_details(about)),
        4.0 if ranks <= 16 else 4.4,
        "Rows from every rank to every other rank, before and after",
        f"Rows (pairs of {unit}) per thousand tokens and layer. Before: every token lives at a random rank; after: {live}.",
        stacked=2,
    )
    return Section(f"{abs(change):.0%} {verb} rows between ranks", [*_not_evidence(about), picture])


def _loads(about: "PlanReport") -> Section:
    load = _details(about).load_LR
    worst = {name: float(load_LR.max()) for name, load_LR in load.items()}
    title = (
        f"Load: the busiest rank of any layer carries {worst['after']:.2f} times the mean, {worst['before']:.2f} before"
    )
    label = "Load of every rank and layer over the mean, before and after"
    picture = Picture(figures_plan.rank_loads(_details(about)), 2.7, label, stacked=2)
    return Section(title, [*_not_evidence(about), picture])


def _domains(about: "PlanReport") -> Section | None:
    from semmoe.solvers.evaluate.report import random_row

    domains, dispatch = about.report.domains, about.report.dispatch
    metric = {"per-node": "node", "gather": "load_imbalance"}.get(dispatch, "rem")
    pairs = [(random_row(domain.rows, about.report.baseline), random_row(domain.rows, "plan")) for domain in domains]
    if len(domains) < 2 or not any(before.value(metric) for before, _ in pairs):
        return None
    better = sum(after.value(metric) < before.value(metric) for before, after in pairs)
    label = COLUMNS[metric][0]
    title = f"{label} falls in {'all' if better == len(domains) else f'{better} of'} {len(domains)} domains"
    names = [f"{domain.domain}  ({domain.requests})" for domain in domains]
    picture = Picture(
        figures_plan.domain_dumbbells(names, pairs, metric, label=label, before=about.report.baseline),
        0.8 + 0.3 * len(domains),
        f"{label} of every domain, before and after",
        "Blue bar: 95% interval over the requests of the domain; few requests, wide bar.",
    )
    return Section(title, [picture])
