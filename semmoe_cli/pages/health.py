"""The health of a trace as a page: is it good enough to place experts by?

Heavy modules are imported inside.
"""

from typing import TYPE_CHECKING

from semmoe.pages.figures import health as figures_health
from semmoe.pages.figures.health import short_count
from semmoe.pages.page import Grid, Page, Picture, Section, Text
from semmoe.profiles.errors import model_name

if TYPE_CHECKING:
    from semmoe.solvers.health.record import Health

BADGES = {"good": "healthy", "watch": "usable", "bad": "not ready"}
LEVEL_WORDS = {"good": "good", "watch": "watch", "bad": "act"}


def health_page(health: "Health") -> Page:
    """The page of a health record. Sections whose numbers are not there are
    left out."""
    level, sentence = health_verdict(health)
    makers = (_findings, _learning, _structure, _load, _unseen, _domains, _time)
    model = model_name(health.model, health.trace)
    return Page(
        title=f"Routing trace of {model}" if model else "Routing trace",
        verdict=sentence,
        level=level,
        badge=BADGES[level],
        facts=[
            (
                "Model",
                f"{model or 'not named'}: {health.layers} MoE layers, {health.experts} experts, top-{health.top_k}",
            ),
            ("Trace", f"{health.requests:,} requests, {health.tokens:,} tokens"),
            *([("Left out", str(health.left_out))] if health.left_out else []),
            ("Phase", f"{health.prompt_share:.0%} prompt, {1 - health.prompt_share:.0%} generated"),
            ("Curves", f"{len(health.curve_layers)} layers, {health.ranks} ranks, METIS"),
        ],
        sections=[section for make in makers if (section := make(health)) is not None],
        footer=_footer(health),
    )


def _footer(health: "Health") -> str:
    from importlib.metadata import version

    looked = "" if health.sampled_tokens == health.tokens else f"Looked at {health.sampled_tokens:,} tokens of them. "
    return f"{looked}REM: other ranks that a token must reach, at a random home. semmoe {version('semmoe')}."


def health_verdict(health: "Health") -> tuple[str, str]:
    """Level and one sentence over all findings."""
    levels = {f.topic: f.level for f in health.findings}
    bad = [topic for topic, level in levels.items() if level == "bad"]
    watch = [topic for topic, level in levels.items() if level == "watch"]
    learning = health.learning
    saved = ""
    if learning:
        share = 1 - learning.points[-1].rem / max(learning.contiguous_rem, 1e-12)
        saved = (
            f": on {health.ranks} ranks a quick placement saves {share:.0%} of the remote ranks on held-out requests"
        )
    if bad:
        return "bad", f"Not ready to place experts by ({', '.join(bad)}){saved}."
    if watch:
        return "watch", f"Good enough to place experts by{saved}; mind {', '.join(watch)}."
    return "good", f"Good to place experts by{saved}."


def _findings(health: "Health") -> Section:
    rows = [[f.topic, LEVEL_WORDS[f.level], f.text] for f in health.findings]
    return Section("What was found", [Grid(["question", "", "answer"], rows, words=True)])


def _learning(health: "Health") -> Section | None:
    learning = health.learning
    if learning is None:
        return None
    now, forecast = learning.points[-1], learning.forecast
    picture = Picture(
        figures_health.learning_curve(learning),
        2.9,
        "Held-out REM by training size, and the law through it",
        f"Scored on {learning.held_out_requests:,} held-out requests. Band: least and most of several random orders of the training "
        "requests. Dashed: the power law through the points, drawn on to ten times the tokens.",
    )
    rows = [["today", short_count(now.tokens), f"{now.rem:.3f}", ""]]
    rows += [[f"{f.factor} times", short_count(f.tokens), f"{f.rem:.3f}", f"{f.rem - now.rem:+.3f}"] for f in forecast]
    title = f"Ten times the tokens would bring REM from {now.rem:.2f} to about {forecast[-1].rem:.2f}"
    return Section(title, [picture, Grid(["", "training tokens", "REM", "change"], rows)])


def _structure(health: "Health") -> Section | None:
    structure = health.structure
    if structure is None or health.impossible:
        return None
    picture = Picture(
        figures_health.structure_bars(structure, health.curve_layers),
        2.2,
        "Lift of held-out co-activation over chance, by layer",
        f"Experts were put into {structure.groups} groups on one half of the requests; pairs inside groups were counted on the other. "
        "Chance: the same with all choices dealt anew, loads kept.",
    )
    return Section(f"Experts of one group meet {structure.lift:.1f} times as often as by chance", [picture])


def _load(health: "Health") -> Section:
    load = health.load
    picture = Picture(
        figures_health.load_skew(load), 2.4, "Share of activations by popularity, and the busiest expert of each layer"
    )
    unused = f"{load.unused_share:.1%} of the experts were never chosen. " if load.unused_share else ""
    note = f"{unused}The least chosen expert has {load.least_activations:,} activations, the median {load.median_activations:,.0f}."
    return Section(
        f"The busiest expert of a layer carries {load.busiest_over_mean:.1f} times the mean",
        [picture, Text(note, hint=True)],
    )


def _unseen(health: "Health") -> Section | None:
    curve = health.unseen
    if not curve:
        return None
    picture = Picture(
        figures_health.unseen_curve(curve), 2.4, "Share of held-out tokens with an unseen id by training size"
    )
    return Section(f"{curve[-1].rate:.0%} of held-out tokens have an id that training never showed", [picture])


def _domains(health: "Health") -> Section | None:
    rows = health.domains
    if not rows:
        return None
    apart = sum(row.distance > row.noise_95 for row in rows)
    names = [f"{row.domain}  ({row.requests})" for row in rows]
    picture = Picture(
        figures_health.drift_points(rows, names),
        0.7 + 0.3 * len(rows),
        "Distance of each domain's loads from the rest, against chance",
        "Grey bar: what as many random requests show, 95% of the time. In brackets: requests.",
    )
    grid = Grid(
        ["domain", "requests", "REM", "left out", "load max/mean", "left out"],
        [
            [
                row.domain,
                f"{row.requests:,}",
                *(
                    f"{value:.3f}"
                    for value in (row.rem_known, row.rem_left_out, row.imbalance_known, row.imbalance_left_out)
                ),
            ]
            for row in rows
        ],
    )
    note = Text("Left out: under a placement learned from the other domains alone, from as many requests.", hint=True)
    return Section(f"{apart} of {len(rows)} domains load experts differently from the rest", [picture, grid, note])


def _time(health: "Health") -> Section | None:
    time = health.time
    if time is None:
        return None
    windows = time.windows
    apart = sum(row.distance > row.noise_95 for row in windows)
    names = [f"{10 * row.window} to {10 * row.window + 10}%" for row in windows]
    picture = Picture(
        figures_health.drift_points(windows, names),
        0.7 + 0.26 * len(windows),
        "Distance of each tenth of the trace from the rest, against chance",
        "Tenths of the tokens in stored order. Grey bar: what as many random requests show, 95% of the time.",
    )
    said = (
        f"On the later half: REM {time.rem_later:.3f} and load max/mean {time.imbalance_later:.3f} under a placement of the earlier "
        f"half; {time.rem_mixed:.3f} and {time.imbalance_mixed:.3f} under one of as many requests from the whole trace."
    )
    return Section(
        f"{apart} of {len(windows)} tenths of the trace load experts differently from the rest", [picture, Text(said)]
    )
