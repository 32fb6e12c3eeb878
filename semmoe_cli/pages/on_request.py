"""Sections of a plan's page that are there only when asked for: other numbers of ranks, tokens,
bytes, times and the certificate.

Each is None where its numbers are not there.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from semmoe.pages.figures import plan as figures_plan
from semmoe.pages.page import Block, Grid, Picture, Section, Text
from semmoe.terminal.tables import COLUMNS, TIME_CAPTION, TIME_HEADINGS, time_cells, times_cells

if TYPE_CHECKING:
    from semmoe.pages.plan_report import PlanReport
    from semmoe.solvers.evaluate.time_report import TimeReport
    from semmoe.solvers.place.bounds import Certificate

LISTED_TOKENS = 10  # at either end


def what_if_section(about: "PlanReport") -> Section | None:
    what_if = about.report.what_if
    if what_if is None or not what_if.rows:
        return None
    metric = {"per-node": "node", "gather": "load_imbalance"}.get(about.report.dispatch, "rem")
    if not all(row.value(metric) for row in what_if.rows):
        metric = "rem"  # remote nodes say nothing where some numbers of ranks fit on one node
    found = {(row.ranks, row.placement): row for row in what_if.rows}
    ranks = sorted({row.ranks for row in what_if.rows})
    values = {key: row.value(metric) for key, row in found.items()}
    saved = {r: figures_plan.saved_share(values[r, "contiguous"], values[r, "metis"]) for r in ranks}
    best = max(saved, key=lambda r: saved[r])
    rows = [
        [
            f"{r}" + (f" on {found[r, 'metis'].nodes} nodes" if found[r, "metis"].nodes > 1 else ""),
            *(f"{values[r, placement]:.3f}" for placement in ("contiguous", "load", "metis")),
            f"{saved[r]:.1%}",
            f"{found[r, 'metis'].load_imbalance:.3f}",
        ]
        for r in ranks
    ]
    label = COLUMNS[metric][0]
    picture = Picture(
        figures_plan.what_if_lines(what_if.rows, metric, label=label),
        2.8,
        f"{label} over numbers of ranks",
        f"A quick METIS placement for each number of ranks, fitted on {what_if.fitted_requests:,} requests, scored on "
        f"{what_if.scored_requests:,} others; bands are 95% intervals.",
        stacked=2,
    )
    blocks: list[Block] = [
        picture,
        Grid(["ranks", f"{label} contiguous", "load", "placed", "saved", "load max/mean, placed"], rows),
    ]
    blocks += _trade_off(about)
    if what_if.skipped:
        blocks.append(Text("Left out: " + "; ".join(skipped.why for skipped in what_if.skipped) + ".", hint=True))
    if saved[best] < 0.005:
        return Section("On other numbers of ranks, placement saves nothing", blocks)
    return Section(f"On other numbers of ranks, most is saved at {best}: {saved[best]:.0%}", blocks)


def _trade_off(about: "PlanReport") -> list[Block]:
    """Time, or remote ranks, over the slots of a rank, with the memory that they take."""
    from semmoe.pages.risks import bytes_of_expert

    points = about.report.what_if.trade_off if about.report.what_if else []
    if len(points) < 2:
        return []
    timed = all(point.us_per_layer is not None for point in points)
    metric, label = ("us_per_layer", "microseconds of a layer") if timed else ("rem", "REM")
    size = bytes_of_expert(about)
    cells = []
    for point in points:
        memory = f"{point.experts_per_rank * size / 1e9:.2f} GB" if size else f"{point.experts_per_rank:,} experts"
        us = [f"{point.us_per_layer:,.1f}"] if timed else []
        cells.append(
            [f"{point.ranks}", f"{point.slots}", memory, *us, f"{point.rem:.3f}", f"{point.load_imbalance:.3f}"]
        )
    headings = [
        "ranks",
        "slots of a rank",
        "memory of a rank",
        *(["us a layer"] if timed else []),
        "REM",
        "load max/mean",
    ]
    caption = "The same quick placement with one and two more slots on each rank, filled with copies."
    picture = Picture(figures_plan.trade_off(points, metric, label), 2.8, f"{label} over slots of a rank", caption)
    return [picture, Grid(headings, cells)]


def tokens_section(about: "PlanReport") -> Section | None:
    tokens = about.report.predictable_tokens
    if not tokens:
        return None
    half = min(LISTED_TOKENS, max(len(tokens) // 2, 1))
    most, least = tokens[:half], tokens[-half:][::-1]
    rows = [
        [cell for token in pair for cell in (token.text, f"{token.share:.0%}", f"{token.tokens:,}")]
        for pair in zip(most, least, strict=True)
    ]
    blocks: list[Block] = [
        Text(
            "Share of a token's activations on the rank that its id alone predicts, learned on the training requests and scored on the "
            f"others; {1 / about.report.ranks:.0%} is chance."
        ),
        Grid(
            ["most predictable", "share", "seen", "least predictable", "share", "seen"],
            rows,
            names_at=frozenset((0, 3)),
        ),
    ]
    return Section(
        f"Some tokens tell where they go: {most[0].share:.0%} at best, {least[0].share:.0%} at worst", blocks
    )


def costs_section(about: "PlanReport") -> Section | None:
    costs, own_kind = about.report.costs, about.report.dispatch
    if costs is None:
        return None
    names = list(costs.rows[0].bytes)
    rows = []
    for row in costs.rows:
        before, after = row.bytes[names[0]], row.bytes[names[-1]]
        saved = f"{1 - after / before:.0%}" if before else "-"
        whose = ", this plan's" if row.dispatch == own_kind else ""
        rows.append([row.dispatch + whose, *(f"{row.bytes[name] / 1e3:,.0f}" for name in names), saved])
    blocks: list[Block] = [
        Text(
            f"kB that one token sends and gets back over all {len(about.report.layers)} MoE layers. {costs.assumption}"
        ),
        Grid(["dispatch", *names, "saved"], rows),
    ]
    own = next(row for row in costs.rows if row.dispatch == own_kind)
    first, last = (own.bytes[name] / 1e3 for name in (names[0], names[-1]))
    return Section(f"With {own_kind} dispatch, a token moves {last:,.0f} kB instead of {first:,.0f} kB", blocks)


def times_section(about: "PlanReport") -> Section | None:
    from semmoe.solvers.evaluate.decision import deployed_schedule

    times = about.report.times
    if times is None:
        return None
    cells = sorted(times_cells(times, about.report.baseline), key=lambda cell: cell[0] == "plan")
    schedule = deployed_schedule(about.report)
    after = next(row.ms_per_layer for row in times.rows if (row.placement, row.schedule) == ("plan", schedule))
    before = next(row.ms_per_layer for row in times.rows if row.placement == about.report.baseline)
    text = Text(
        f"Dispatch and combine of a batch of {times.batch_tokens:,} tokens over all ranks, set by the busiest link: {times.network}. "
        f"{times.assumption} Experts, packing and what overlaps are left out."
    )
    grid = Grid(
        ["placement", "schedule", "ms per layer", "ms, all layers", f"of {about.report.baseline}"],
        cells,
        names_at=frozenset((0, 1)),
    )
    return Section(f"On your network a layer's exchanges take {after:.3g} ms instead of {before:.3g} ms", [text, grid])


def time_section(about: "PlanReport") -> Section | None:
    return timed(about.report.time) if about.report.time else None


def timed(time: "TimeReport") -> Section:
    """Times on given hardware, what assumed parameters change, and where the numbers are from."""
    headings = [heading.replace("\n", " ") for heading in TIME_HEADINGS]
    blocks: list[Block] = [
        Grid(["placement", "schedule", *headings], time_cells(time), names_at=frozenset((0, 1))),
        Text(f"{TIME_CAPTION[0].upper()}{TIME_CAPTION[1:]}.", hint=True),
    ]
    if time.sensitivity and time.sensitivity.parameters:
        ends = [
            [
                end.name,
                f"{end.low:g} to {end.high:g}",
                f"{end.saved[0]:.1%}",
                f"{end.saved[1]:.1%}",
                "yes" if end.agrees else "no: measure it",
            ]
            for end in time.sensitivity.parameters
        ]
        blocks.append(Grid(["assumed", "between", "saved at the first", "at the last", "same decision"], ends))
    pinned = "; ".join(f"{p['name']} {p['value']} ({p['source']})" for p in time.parameters if p.get("source"))
    blocks.append(Text(f"From sources: {pinned}.", hint=True))
    where = f"On {time.hardware} with {time.backend}, {time.tokens_per_rank:,} {time.phase} tokens a rank"
    if time.saved is None:
        return Section(f"{where}: a layer takes {min(row.us['total'] for row in time.rows):,.0f} us", blocks)
    title = f"{where}: {time.saved.us:,.1f} us a layer ({time.saved.share:.1%}) saved against {time.saved.against}"
    return Section(title, blocks)


def certificate_section(about: "PlanReport") -> Section | None:
    stored = about.plan.scores and about.plan.scores.certificate
    certificate = about.report.certificate or stored
    return certified(certificate) if certificate else None


def certified(certificate: "Certificate") -> Section:
    """What --certify found (docs/formats.md)."""
    layers = certificate.layers
    worst = max(layer.gap for layer in layers)
    rem_bounds = [layer.rem_bound for layer in layers]
    lar_bounds = [layer.lar_bound for layer in layers if layer.lar_bound is not None]
    rows = [
        ["co-activation within ranks, below its bound", f"{certificate.gap:.1%}", f"{worst:.1%}"],
        ["no placement has fewer remote ranks per token than", *_mean_and(max, rem_bounds)],
    ]
    if len(lar_bounds) == len(layers):
        rows.append(["no token table keeps more activations local than", *_mean_and(min, lar_bounds)])
    words = Text(
        "Bounds that hold for every placement with as many experts per rank under the same load cap, on the requests that the placement "
        "was fitted on: nothing can be better than they say, and the best may be worse."
    )
    title = (
        f"The placement reaches {1 - certificate.gap:.0%} of the most co-activation that any could keep inside ranks"
    )
    return Section(title, [words, Grid(["", "mean of the layers", "extreme layer"], rows)])


def _mean_and(extreme: Callable[[Iterable[float]], float], values: list[float]) -> list[str]:
    return [f"{sum(values) / len(values):.3f}", f"{extreme(values):.3f}"]
