"""Sections of a plan's page that are there only when asked for: other numbers of ranks, tokens,
bytes, times and the certificate.

Each is None where its numbers are not there.
"""

from typing import TYPE_CHECKING, Any

from semmoe.pages.figures import plan as figures_plan
from semmoe.pages.page import Block, Grid, Picture, Section, Text
from semmoe.terminal.tables import COLUMNS, times_cells

if TYPE_CHECKING:
    from semmoe.pages.plan_report import PlanReport

LISTED_TOKENS = 10  # at either end


def what_if_section(about: "PlanReport") -> Section | None:
    found = about.what_if
    if found is None or not found["rows"]:
        return None
    metric = {"per-node": "node", "gather": "load_imbalance"}.get(about.report["dispatch"], "rem")
    if not all(row[metric] for row in found["rows"]):
        metric = "rem"  # remote nodes say nothing where some numbers of ranks fit on one node
    value = {(row["ranks"], row["placement"]): row for row in found["rows"]}
    ranks = sorted({row["ranks"] for row in found["rows"]})
    saved = {r: figures_plan.saved_share(value[r, "contiguous"][metric], value[r, "metis"][metric]) for r in ranks}
    best = max(saved, key=lambda r: saved[r])
    rows = [
        [
            f"{r}" + (f" on {value[r, 'metis']['nodes']} nodes" if value[r, "metis"]["nodes"] > 1 else ""),
            *(f"{value[r, p][metric]:.3f}" for p in ("contiguous", "load", "metis")),
            f"{saved[r]:.1%}",
            f"{value[r, 'metis']['load_imbalance']:.3f}",
        ]
        for r in ranks
    ]
    label = COLUMNS[metric][0]
    picture = Picture(
        figures_plan.what_if_lines(found["rows"], metric, label=label),
        2.8,
        f"{label} over numbers of ranks",
        f"A quick METIS placement for each number of ranks, fitted on {found['fitted_requests']:,} requests, scored on "
        f"{found['scored_requests']:,} others; bands are 95% intervals.",
    )
    blocks: list[Block] = [
        picture,
        Grid(["ranks", f"{label} contiguous", "load", "placed", "saved", "load max/mean, placed"], rows),
    ]
    if found["skipped"]:
        blocks.append(Text("Left out: " + "; ".join(s["why"] for s in found["skipped"]) + ".", hint=True))
    if saved[best] < 0.005:
        return Section("On other numbers of ranks, placement saves nothing", blocks)
    return Section(f"On other numbers of ranks, most is saved at {best}: {saved[best]:.0%}", blocks)


def tokens_section(about: "PlanReport") -> Section | None:
    tokens = about.tokens
    if not tokens:
        return None
    half = min(LISTED_TOKENS, max(len(tokens) // 2, 1))
    most, least = tokens[:half], tokens[-half:][::-1]
    rows = [
        [a["text"], f"{a['share']:.0%}", f"{a['tokens']:,}", b["text"], f"{b['share']:.0%}", f"{b['tokens']:,}"]
        for a, b in zip(most, least, strict=True)
    ]
    blocks: list[Block] = [
        Text(
            "Share of a token's activations on the rank that its id alone predicts, learned on the training requests and scored on the "
            f"others; {1 / about.report['ranks']:.0%} is chance."
        ),
        Grid(
            ["most predictable", "share", "seen", "least predictable", "share", "seen"],
            rows,
            names_at=frozenset((0, 3)),
        ),
    ]
    return Section(
        f"Some tokens tell where they go: {most[0]['share']:.0%} at best, {least[0]['share']:.0%} at worst", blocks
    )


def costs_section(about: "PlanReport") -> Section | None:
    costs = about.costs
    if costs is None:
        return None
    names = list(costs["rows"][0]["bytes"])
    rows = []
    for row in costs["rows"]:
        before, after = row["bytes"]["contiguous"], row["bytes"][names[-1]]
        saved = f"{1 - after / before:.0%}" if before else "-"
        whose = ", this plan's" if row["dispatch"] == about.report["dispatch"] else ""
        rows.append([row["dispatch"] + whose, *(f"{row['bytes'][name] / 1e3:,.0f}" for name in names), saved])
    own = next(i for i, row in enumerate(costs["rows"]) if row["dispatch"] == about.report["dispatch"])
    blocks: list[Block] = [
        Text(
            f"kB that one token sends and gets back over all {len(about.report['layers'])} MoE layers. "
            + costs["assumption"]
        ),
        Grid(["dispatch", *names, "saved"], rows),
    ]
    first, last = (costs["rows"][own]["bytes"][name] / 1e3 for name in (names[0], names[-1]))
    return Section(
        f"With {about.report['dispatch']} dispatch, a token moves {last:,.0f} kB instead of {first:,.0f} kB", blocks
    )


def times_section(about: "PlanReport") -> Section | None:
    times = about.times
    if times is None:
        return None
    cells = sorted(times_cells(times), key=lambda cell: cell[0] == "plan")
    rows = [row for row in times["rows"] if "oracle" not in row["schedule"]]
    after = min(row["ms_per_layer"] for row in rows if row["placement"] == "plan")
    before = next(row["ms_per_layer"] for row in rows if row["placement"] == "contiguous")
    text = Text(
        f"Dispatch and combine of a batch of {times['batch_tokens']:,} tokens over all ranks, set by the busiest link: {times['network']}. "
        f"{times['assumption']} Experts, packing and what overlaps are left out."
    )
    grid = Grid(
        ["placement", "schedule", "ms per layer", "ms, all layers", "of contiguous"], cells, names_at=frozenset((0, 1))
    )
    return Section(f"On your network a layer's exchanges take {after:.3g} ms instead of {before:.3g} ms", [text, grid])


def certificate_section(about: "PlanReport") -> Section | None:
    certificate = about.report.get("certificate") or about.plan.scores.get("certificate")
    return certified(certificate) if certificate else None


def certified(certificate: dict[str, Any]) -> Section:
    """What --certify found (docs/formats.md)."""
    layers = certificate["layers"]
    worst = max(layers, key=lambda layer: layer["gap"])
    rows = [
        ["co-activation within ranks, below its bound", f"{certificate['gap']:.1%}", f"{worst['gap']:.1%}"],
        ["no placement has fewer remote ranks per token than", *_mean_and(layers, "rem_bound", max)],
    ]
    if all("lar_bound" in layer for layer in layers):
        rows.append(["no token table keeps more activations local than", *_mean_and(layers, "lar_bound", min)])
    words = Text(
        "Bounds that hold for every placement with as many experts per rank under the same load cap, on the requests that the placement "
        "was fitted on: nothing can be better than they say, and the best may be worse."
    )
    title = (
        f"The placement reaches {1 - certificate['gap']:.0%} of the most co-activation that any could keep inside ranks"
    )
    return Section(title, [words, Grid(["", "mean of the layers", "extreme layer"], rows)])


def _mean_and(layers: list[dict[str, Any]], name: str, extreme: Any) -> list[str]:
    values = [layer[name] for layer in layers]
    return [f"{sum(values) / len(values):.3f}", f"{extreme(values):.3f}"]
