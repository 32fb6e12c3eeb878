"""The pictures of a trace's health: learning curve, unseen tokens, load skew, structure, drift."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from semmoe.pages.figures.style import Draw, Palette, name_rows, panels, plain_axes

if TYPE_CHECKING:
    from semmoe.solvers.health.record import (
        DomainDrift,
        Learning,
        LoadFacts,
        StructureFacts,
        UnseenPoint,
        WindowDrift,
    )


def learning_curve(learning: "Learning") -> Draw:
    """Held-out REM over training tokens with the law through it, drawn on to ten times as many."""
    import numpy as np

    points, law = learning.points, learning.law
    tokens = np.array([p.tokens for p in points])
    ahead = np.geomspace(tokens[-1], 10 * tokens[-1], 40)
    fitted = np.geomspace(tokens[0], tokens[-1], 40)

    def draw(figure: Any, palette: Palette) -> None:
        axes = figure.subplots()
        low, high = ([p.low for p in points], [p.high for p in points])
        axes.axhline(learning.contiguous_rem, color=palette.contiguous, linewidth=1.4)
        axes.annotate(
            "contiguous experts",
            (tokens[0], learning.contiguous_rem),
            (0, 4),
            textcoords="offset points",
            color=palette.muted,
        )
        axes.fill_between(tokens, low, high, color=palette.plan, alpha=0.18, linewidth=0)
        axes.plot(fitted, law.floor + law.scale * fitted**-law.power, color=palette.plan, linewidth=1)
        axes.plot(
            ahead,
            law.floor + law.scale * ahead**-law.power,
            color=palette.plan,
            linewidth=1.4,
            linestyle=(0, (3, 2)),
        )
        axes.plot(tokens, [p.rem for p in points], "o", color=palette.plan, markersize=5.5)
        last = learning.forecast[-1]
        axes.annotate(
            f"ten times: {last.rem:.2f}",
            (last.tokens, last.rem),
            (0, -13),
            textcoords="offset points",
            ha="right",
        )
        axes.annotate(
            f"today: {points[-1].rem:.2f}",
            (tokens[-1], points[-1].rem),
            (0, 8),
            textcoords="offset points",
            ha="center",
        )
        axes.set_xscale("log")
        axes.set_xlabel("training tokens")
        axes.set_ylabel("held-out REM")
        axes.margins(y=0.12)
        _token_ticks(axes)
        plain_axes(axes, palette)

    return draw


def _token_ticks(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    axes.xaxis.set_minor_locator(NullLocator())


def short_count(value: float) -> str:
    """A count in three figures: 950, 12k, 3.4M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def unseen_curve(points: "list[UnseenPoint]") -> Draw:
    """Share of held-out tokens with an id that training never showed, over training tokens."""

    def draw(figure: Any, palette: Palette) -> None:
        axes = figure.subplots()
        axes.plot(
            [p.tokens for p in points],
            [100 * p.rate for p in points],
            "o-",
            color=palette.fourth,
            linewidth=2,
            markersize=5,
        )
        for p in points:
            axes.annotate(f"{p.rate:.0%}", (p.tokens, 100 * p.rate), (0, 7), textcoords="offset points", ha="center")
        axes.set_xscale("log")
        axes.set_ylim(0, max(100 * p.rate for p in points) * 1.2 + 1)
        axes.set_xlabel("training tokens")
        axes.set_ylabel("unseen, % of held-out tokens")
        _token_ticks(axes)
        plain_axes(axes, palette)

    return draw


def load_skew(load: "LoadFacts") -> Draw:
    """Share of activations by popularity, and the busiest expert of each layer over the mean."""
    share = load.share_by_popularity

    def draw(figure: Any, palette: Palette) -> None:
        left, right = panels(figure, [1, 1])
        left.bar(range(1, len(share) + 1), [100 * s for s in share], color=palette.load, width=0.8)
        left.axhline(100 / len(share), color=palette.muted, linewidth=0.9)
        left.annotate(
            "even", (len(share), 100 / len(share)), (0, 3), textcoords="offset points", ha="right", color=palette.muted
        )
        left.set_title("share of activations, %")
        left.set_xlabel("experts of a layer by popularity, mean over layers")
        skew = load.busiest_over_mean_layers
        right.bar(range(len(skew)), skew, color=palette.load, width=0.8)
        right.axhline(1, color=palette.muted, linewidth=0.9)
        right.set_title("busiest expert / mean")
        right.set_xlabel("MoE layer")
        right.xaxis.get_major_locator().set_params(integer=True)
        for axes in (left, right):
            plain_axes(axes, palette)

    return draw


def structure_bars(structure: "StructureFacts", layers: list[int]) -> Draw:
    """Lift over chance of held-out co-activation inside groups, by layer."""

    def draw(figure: Any, palette: Palette) -> None:
        axes = figure.subplots()
        axes.bar([str(n) for n in layers], structure.lift_layers, color=palette.plan, width=0.6)
        axes.axhline(1, color=palette.ink, linewidth=1)
        axes.annotate(
            "chance", (1, 1), (4, -3), xycoords=("axes fraction", "data"), textcoords="offset points", color=palette.ink
        )
        axes.set_xlabel("layer of the model")
        axes.set_ylabel("times as often as chance")
        plain_axes(axes, palette)

    return draw


def drift_points(rows: "Sequence[DomainDrift | WindowDrift]", names: list[str]) -> Draw:
    """Distance of each group's expert loads from the rest, over what random groups of that size
    show."""

    def draw(figure: Any, palette: Palette) -> None:
        axes = figure.subplots()
        for y, row in enumerate(rows):
            axes.plot([0, 100 * row.noise_95], [y, y], color=palette.grid, linewidth=7, solid_capstyle="butt", zorder=1)
            beyond = row.distance > row.noise_95
            axes.plot(
                100 * row.distance,
                y,
                "o",
                color=palette.load if beyond else palette.contiguous,
                markersize=6.5,
                zorder=2,
            )
        name_rows(axes, names)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.set_xlabel("activations that would have to change expert, %")
        plain_axes(axes, palette, grid="x")

    return draw
