"""The figures of docs/concepts.md: `python docs/figures.py [DEMO]` writes docs/images/*.svg; DEMO
is what `semmoe demo` wrote.

Every figure has a white ground, so that it can be read on a dark page too. The diagrams are drawn
from the few numbers below, and what they say (LAR, REM, NODE) is computed from them;
co-activation.svg shows the demo model and is drawn only when DEMO is given.

Shape letters: E experts, R ranks.
"""

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from semmoe.pages.figures.style import LIGHT, STYLE

IMAGES = Path(__file__).parent / "images"
RANK_COLOURS = (LIGHT.plan, LIGHT.load, LIGHT.third, LIGHT.fourth)
RANKS, EXPERTS, RANKS_PER_NODE = 4, 16, 2
CHOSEN = (1, 9, 10, 14)  # the experts that the router chose for the token of metrics.svg
CONTIGUOUS = tuple(e // (EXPERTS // RANKS) for e in range(EXPERTS))
PLACED = (1, 0, 2, 3, 2, 1, 3, 2, 1, 0, 0, 3, 2, 3, 1, 0)  # rank of each expert

# Attention-TP: (token, predicted rank, rank where most of its experts are); the last but one is
# predicted wrongly.
TOKENS = ((0, 2, 2), (1, 0, 0), (2, 3, 3), (3, 1, 1), (4, 0, 0), (5, 2, 2), (6, 1, 3), (7, 3, 3))
# Attention-DP: (name, tokens of the prompt, rank with the best score, rank that has room).
REQUESTS = (
    ("sql", 5, 1, 1), ("ode", 3, 0, 0), ("sum", 6, 2, 2), ("c++", 4, 1, 1),
    ("chat", 4, 3, 3), ("poem", 5, 0, 0), ("faq", 3, 1, 2), ("mail", 4, 3, 3),
)  # fmt: skip
CAP = 9


def token_scores(rank_of_E: tuple[int, ...], home: int) -> tuple[float, int, int]:
    """LAR, REM and NODE of one token that lives on `home` and chose CHOSEN."""
    ranks = [rank_of_E[e] for e in CHOSEN]
    nodes = {r // RANKS_PER_NODE for r in ranks} - {home // RANKS_PER_NODE}
    return ranks.count(home) / len(ranks), len(set(ranks) - {home}), len(nodes)


def draw_metrics(axes: Any) -> None:
    """One token, the same four experts: contiguous at a random home, and placed with the token
    scheduled to its rank."""
    axes.set(xlim=(0, 86), ylim=(0, 46))
    sides = (
        (0, "before: experts in order, token at a random home", CONTIGUOUS, 1),
        (44.5, "after: experts placed, token scheduled", PLACED, 0),
    )
    for left, title, rank_of_E, home in sides:
        axes.text(left, 44, title, fontweight="bold", fontsize=9)
        lar, rem, node = token_scores(rank_of_E, home)
        for n in range(RANKS // RANKS_PER_NODE):
            _box(axes, left, 27.2 - 14.5 * n, 41, 14, edge=LIGHT.grid, face="#f6f7f9")
            axes.text(left + 40.3, 40.1 - 14.5 * n, f"node {n}", color=LIGHT.muted, ha="right", va="top", fontsize=7)
        for r in range(RANKS):
            x, y = left + 1.5 + 19.7 * (r % 2), 28.4 - 14.5 * (r // 2)
            _box(axes, x, y, 18, 9.2, edge=LIGHT.muted)
            axes.text(x, y + 9.9, f"rank {r}" + (", the token's home" if r == home else ""), fontsize=7.5)
            for slot, e in enumerate(e for e in range(EXPERTS) if rank_of_E[e] == r):
                chosen = e in CHOSEN
                face = (LIGHT.third if r == home else LIGHT.load) if chosen else "white"
                at = (x + 1 + 4.15 * slot, y + 4.6)
                axes.add_patch(Rectangle(at, 3.6, 3.6, facecolor=face, edgecolor=LIGHT.muted, linewidth=0.6))
                axes.text(
                    at[0] + 1.8,
                    at[1] + 1.7,
                    f"{e}",
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color="white" if chosen else LIGHT.muted,
                )
            if r == home:
                _token(axes, x + 9, y + 2.2, LIGHT.ink, "t")
        start = (left + 1.5 + 19.7 * (home % 2) + 9, 28.4 - 14.5 * (home // 2) + 1)
        for r in sorted({rank_of_E[e] for e in CHOSEN} - {home}):
            end = (left + 1.5 + 19.7 * (r % 2) + 9, 28.4 - 14.5 * (r // 2) + (2.2 if r // 2 == home // 2 else 9.2))
            side = 9.6 if r > home else -9.6
            level = r // 2 == home // 2
            _arrow(
                axes,
                (start[0] + (1.6 if end[0] > start[0] else -1.6) * level, start[1] + 1.2 * level),
                (end[0] - side * level * 0.9, end[1]),
                LIGHT.load,
            )
        sent = sum(rank_of_E[e] != home for e in CHOSEN)
        axes.text(left, 9, f"LAR = {len(CHOSEN) - sent} of {len(CHOSEN)} activations at home = {lar:.2f}", fontsize=8.5)
        axes.text(left, 5.4, f"REM = {rem} other rank{'s' * (rem != 1)},", fontsize=8.5)
        axes.text(left + 18, 5.4, f"NODE = {node} other node{'s' * (node != 1)}", fontsize=8.5)
        rows = f"rows sent: {sent} per-expert, {rem} per-rank, {node} per-node"
        axes.text(left, 1.8, rows, fontsize=8.5, color=LIGHT.muted)


def draw_dp(axes: Any) -> None:
    """Requests from a queue, scored from their prompts, onto ranks with room for their tokens."""
    axes.set(xlim=(0, 86), ylim=(-1, 40))
    for x, title in (
        (0, "1. a window of requests"),
        (27, "2. scores from the prompt"),
        (54, "3. the best rank with room"),
    ):
        axes.text(x, 38.3, title, fontweight="bold", fontsize=9)
    for i, (name, tokens, best, _) in enumerate(REQUESTS):
        y = 32.2 - 4.4 * i
        _strip(axes, 0, y, tokens, RANK_COLOURS[best], name)
        for r in range(RANKS):
            at = (28 + 4.6 * r, y)
            shade = 0.95 if r == best else 0.4 if (best, r) == (1, 2) and name == "faq" else 0.16
            axes.add_patch(Rectangle(at, 4.1, 2.8, facecolor=RANK_COLOURS[r], alpha=shade, linewidth=0))
        _arrow(axes, (2 * tokens + 1, y + 1.4), (27, y + 1.4), LIGHT.muted)
    for r in range(RANKS):
        axes.text(30 + 4.6 * r, 35.7, f"rank {r}", fontsize=6.5, ha="center", color=LIGHT.muted)
        y = 29.2 - 9.3 * r
        _box(axes, 54, y - 1.3, 31.5, 8.2, edge=LIGHT.muted)
        axes.text(54.8, y + 4.5, f"rank {r}: its experts, all of attention", fontsize=7.5, color=LIGHT.muted)
        x = 55.0
        for name, tokens, best, rank in REQUESTS:
            if rank == r:
                _strip(axes, x, y, tokens, RANK_COLOURS[best], name)
                x += 2 * tokens + 0.5
        axes.plot([55 + 2 * CAP + 1] * 2, [y - 0.7, y + 3.5], color=LIGHT.ink, linewidth=1.2, linestyle=(0, (2, 1.5)))
    axes.text(75, 30.6, "most tokens\nof a rank", fontsize=7, va="center")
    axes.text(75, 12.0, "faq: its best rank\nwas full", fontsize=7, va="center")
    _arrow(axes, (47.5, 18.3), (53, 18.3), LIGHT.muted)


def draw_tp(axes: Any) -> None:
    """A layer under Attention-TP: heads shared over ranks, tokens scattered to predicted homes,
    gathered in order again."""
    axes.set(xlim=(0, 86), ylim=(-3, 43))
    heads = (
        (6, "attention", "a share of the heads,\nall tokens: partial sums"),
        (29, "shuffled reduce-scatter", "sums, each token to\nits predicted rank"),
        (49, "router, experts", "only what was predicted\nwrongly is sent"),
        (69, "shuffled all-gather", "all tokens on all ranks,\nin order"),
    )
    for x, title, text in heads:
        axes.text(x, 41.5, title, fontweight="bold", fontsize=9)
        axes.text(x, 40.2, text, fontsize=7.5, color=LIGHT.muted, va="top")
    lane = {r: 28.6 - 8.6 * r for r in range(RANKS)}
    for r, y in lane.items():
        _box(axes, 0, y - 1.6, 86, 6.6, edge=LIGHT.grid, face="#f6f7f9")
        axes.text(0.8, y + 1.7, f"rank\n{r}", fontsize=7.5, va="center", color=LIGHT.muted)
        for token, _, needed in TOKENS:
            _token(axes, 7.2 + 2.3 * token, y + 1.7, RANK_COLOURS[needed], f"{token}", light=True)
            _token(axes, 68.2 + 2.3 * token, y + 1.7, RANK_COLOURS[needed], f"{token}")
        for place, (token, needed) in enumerate((t, needed) for t, home, needed in TOKENS if home == r):
            _token(axes, 34 + 3 * place, y + 1.7, RANK_COLOURS[needed], f"{token}")
        _box(axes, 48.5, y - 0.3, 12.5, 4, edge=RANK_COLOURS[r])
        axes.text(54.75, y + 1.7, f"experts of {r}", ha="center", va="center", fontsize=7.5, color=RANK_COLOURS[r])
        _arrow(axes, (25.6, y + 1.7), (31.8, y + 1.7), LIGHT.muted)
        _arrow(axes, (39.2, y + 1.7), (48.2, y + 1.7), LIGHT.muted)
        _arrow(axes, (61.3, y + 1.7), (66.4, y + 1.7), LIGHT.muted)
    wrong = next((token, home, needed) for token, home, needed in TOKENS if home != needed)
    axes.annotate(
        "", (48.3, lane[wrong[2]] + 3.1), (37.8, lane[wrong[1]] + 0.3),
        arrowprops={"arrowstyle": "<|-|>", "color": LIGHT.ink, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0},
    )  # fmt: skip
    at = (42.6, (lane[wrong[1]] + lane[wrong[2]]) / 2 - 3.6)
    axes.text(*at, f"token {wrong[0]}: a row\nthere, a row back", fontsize=7, ha="right", va="center")
    axes.text(
        0,
        -2.2,
        "colour of a token: the rank that hosts most of its experts in this layer",
        fontsize=7.5,
        color=LIGHT.muted,
    )


DIAGRAMS: dict[str, tuple[Callable[[Any], None], float]] = {
    "metrics": (draw_metrics, 4.6),
    "dp": (draw_dp, 4.0),
    "tp": (draw_tp, 4.3),
}


def diagram_svg(name: str) -> str:
    """The text of docs/images/NAME.svg."""
    draw, height = DIAGRAMS[name]

    def fill(figure: Figure) -> None:
        axes = figure.add_axes((0.015, 0.02, 0.97, 0.96))
        draw(axes)
        axes.set_axis_off()

    return _svg(fill, height, name, constrained=False)


def co_activation_svg(demo: Path) -> str:
    """The text of docs/images/co-activation.svg, from the trace and plan that `semmoe demo`
    wrote."""
    from semmoe.pages.figures.plan import co_activation
    from semmoe.pages.plan_report import PlanReportOptions, make_plan_report
    from semmoe.profiles.trace import RoutingTrace
    from semmoe.solvers.plan import Plan
    from semmoe.solvers.schedule.simulate import Setting

    plan = Plan.load(demo / "plan")
    options = PlanReportOptions(
        what_if=[], hidden_size=0, dispatch_bytes=2.0, bandwidth="", latency="", tokenizer=None, pictures=True
    )
    about = make_plan_report(plan, RoutingTrace.open(str(demo / "trace")), options, Setting(), plan_path="plan")
    assert about.details is not None, "pictures were asked for"
    draw = co_activation(about.details, plan.topology.num_ranks)
    return _svg(lambda figure: draw(figure, LIGHT), 4.2, "co-activation")


def _svg(fill: Callable[[Figure], None], height: float, key: str, *, constrained: bool = True) -> str:
    settings: dict[Any, Any] = STYLE | {
        "svg.hashsalt": key, "text.color": LIGHT.ink, "axes.edgecolor": LIGHT.muted, "axes.labelcolor": LIGHT.ink,
        "figure.constrained_layout.use": constrained, "xtick.color": LIGHT.muted, "ytick.color": LIGHT.muted,
    }  # fmt: skip
    with mpl.rc_context(settings):
        figure = Figure(figsize=(8.6, height), facecolor="white")
        fill(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, pad_inches=0.1)
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", buffer.getvalue(), flags=re.DOTALL)
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def _box(axes: Any, x: float, y: float, width: float, height: float, *, edge: str, face: str = "white") -> None:
    style = "round,pad=0,rounding_size=0.6"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=face, edgecolor=edge, linewidth=0.8))


def _token(axes: Any, x: float, y: float, colour: str, name: str, *, light: bool = False) -> None:
    axes.plot([x], [y], "o", markersize=10.5, markeredgecolor=colour, markerfacecolor="white" if light else colour)
    axes.text(x, y - 0.1, name, ha="center", va="center", fontsize=7, color=colour if light else "white")


def _strip(axes: Any, x: float, y: float, tokens: int, colour: str, name: str) -> None:
    axes.add_patch(Rectangle((x, y), 2 * tokens, 2.8, facecolor=colour, linewidth=0))
    for i in range(1, tokens):
        axes.plot([x + 2 * i] * 2, [y, y + 0.7], color="white", linewidth=0.8)
    axes.text(x + tokens, y + 1.6, name, ha="center", va="center", fontsize=7, color="white", fontweight="bold")


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style)


def main(demo: Path | None) -> None:
    """Write all figures that can be drawn."""
    IMAGES.mkdir(exist_ok=True)
    for name in DIAGRAMS:
        (IMAGES / f"{name}.svg").write_text(diagram_svg(name), encoding="utf-8")
    if demo is not None:
        (IMAGES / "co-activation.svg").write_text(co_activation_svg(demo), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
