"""How figures look and how they get into a page: one palette, SVG whose colours follow the page's
theme, PNG for files.

A figure is a function that draws on a matplotlib figure with a palette. For a page it is drawn in
marker colours, which become CSS variables, so that one picture serves light and dark; text stays
text and takes the page's font. The palette is Okabe and Ito's, told apart by the colour-blind.
Matplotlib is imported inside.
"""

import html
import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from semmoe.profiles.errors import visible
from semmoe.terminal.text import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

NAME_LETTERS = 44  # of a name beside an axis: longer ones leave no room to the drawing
SUBTITLE_LETTERS, MOST_TITLE = 110, 400
HEAT = "#1581c8"  # a tone of blue that reads on both papers
WIDTH = 8.6  # inches; 72 points each, drawn about 1.35 times as large in a page
NARROW = 4.4  # inches, on a phone: panels stand below each other
TITLE_LETTERS, HEADING_LETTERS = 74, 88  # of a line across a PNG, bold in 12.5 and 10.5 points


@dataclass(frozen=True)
class Palette:
    """Colours by what they mean."""

    ink: str
    muted: str
    grid: str
    paper: str
    plan: str
    contiguous: str
    load: str
    third: str
    fourth: str

    def of(self, placement: str) -> str:
        """The colour of a placement's marks."""
        names = {"plan": self.plan, "metis": self.plan, "contiguous": self.contiguous, "load": self.load}
        return names.get(placement, self.third)


LIGHT = Palette("#1a1d21", "#5b626b", "#dfe3e8", "#ffffff", "#0072b2", "#8a9099", "#d55e00", "#009e73", "#aa4499")
DARK = Palette("#e8eaed", "#a3abb5", "#343a42", "#15181c", "#56b4e9", "#8f979f", "#e69f00", "#3cc79a", "#d98cc4")
MARKERS = Palette(*(f"#0{i}0{i}0{i}" for i in range(1, 10)))
NAMES = tuple(Palette.__dataclass_fields__)

Draw = Callable[["Figure | SubFigure", Palette], None]

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "svg.fonttype": "none",
    "figure.constrained_layout.use": True,
    "text.parse_math": False,  # names may hold dollars
    "text.usetex": False,
}


def name_rows(axes: "Axes", names: list[str]) -> None:
    """Names of the rows of a drawing, from the top, as they are."""
    axes.set_yticks(range(len(names)), [shortened(name, NAME_LETTERS) for name in names])


def is_narrow(figure: "Figure | SubFigure") -> bool:
    """Whether panels have to stand below each other."""
    return figure.bbox.width / figure.dpi < (NARROW + WIDTH) / 2


def panels(figure: "Figure | SubFigure", ratios: Sequence[float], *, share: Literal["x", "y", ""] = "") -> list[Any]:
    """Axes side by side in widths of these ratios, or below each other where the figure is narrow.
    `share`: the axis that they have in common, where they stand side by side."""
    if is_narrow(figure):
        return list(figure.subplots(len(ratios), 1, squeeze=False)[:, 0])
    shared: Any = {f"share{share}": True} if share else {}
    return list(figure.subplots(1, len(ratios), squeeze=False, width_ratios=ratios, **shared)[0])


def panels_with_key(figure: "Figure | SubFigure", number: int) -> "list[Axes]":
    """Square panels and, behind them, a thin one for the key of their colours."""
    if not is_narrow(figure):
        return list(figure.subplots(1, number + 1, width_ratios=[1] * number + [0.045]))
    grid = figure.add_gridspec(number, 2, width_ratios=[1, 0.06])
    return [*(figure.add_subplot(grid[row, 0]) for row in range(number)), figure.add_subplot(grid[:, 1])]


@contextmanager
def _glyphs_may_lack() -> Iterator[None]:
    """A name in a script that the font lacks is drawn as boxes, and not told on stderr."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def css_variables(palette: Palette) -> str:
    """The palette as CSS declarations."""
    return " ".join(f"--{name}: {getattr(palette, name)};" for name in NAMES)


def _context(palette: Palette) -> dict[Any, Any]:
    return STYLE | {
        "text.color": palette.ink,
        "axes.labelcolor": palette.muted,
        "axes.titlecolor": palette.ink,
        "axes.edgecolor": palette.muted,
        "xtick.color": palette.muted,
        "ytick.color": palette.muted,
        "xtick.labelcolor": palette.muted,
        "ytick.labelcolor": palette.ink,
        "grid.color": palette.grid,
        "legend.labelcolor": palette.ink,
    }


def svg(draw: Draw, height: float, *, key: str, label: str, width: float = WIDTH) -> str:
    """The drawing as inline SVG in CSS variables. `key`: makes ids unique in a page. `label`:
    what it says, for those who cannot see it."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    clear = {"figure.facecolor": "none", "axes.facecolor": "none"}
    settings: dict[Any, Any] = {**_context(MARKERS), **clear, "svg.hashsalt": key}
    with mpl.rc_context(settings), _glyphs_may_lack():
        figure = Figure(figsize=(width, height))
        draw(figure, MARKERS)
        buffer = io.StringIO()
        # Not savefig, which draws everything once more to lay it out.
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", lambda tag: _of_the_page(tag[0]), text)  # names between tags stay as they are
    text = re.sub(r"\n\s*", "\n", text)
    kind = "narrow" if width < WIDTH else "broad"
    head = f'<svg role="img" aria-label="{html.escape(visible(label))}" '
    return re.sub(
        r'<svg (?:xmlns:xlink="[^"]*" )?width="[^"]*" height="[^"]*" ', head + f'class="plot {kind}" ', text, count=1
    )


def _of_the_page(tag: str) -> str:
    """A tag in the page's colours and font: sizes and weights stay, families go."""
    tag = re.sub(r"#0([1-9])0\1(?:0\1)", lambda m: f"var(--{NAMES[int(m[1]) - 1]})", tag)
    tag = re.sub(r"font: (?:(bold|\d+) )?([\d.]+px)[^;\"]*", lambda m: f"font-size: {m[2]}" + _weight(m[1]), tag)
    return re.sub(r"font-family:[^;\"]*;?", "", tag)


def _weight(weight: str | None) -> str:
    return f"; font-weight: {weight}" if weight else ""


def png(draws: list[tuple[str, Draw, float]], *, title: str, subtitle: str) -> bytes:
    """One light picture of titled drawings, one below the other: (title, drawing, height in
    inches) each."""
    import textwrap

    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with mpl.rc_context(_context(LIGHT)), _glyphs_may_lack():
        heights = [height + (0.45 if heading else 0) for heading, _, height in draws]
        lines = textwrap.wrap(shortened(title, MOST_TITLE), TITLE_LETTERS)
        head = 0.55 + 0.22 * len(lines) if lines else 0.05
        apart = ConstrainedLayoutEngine(h_pad=0.09)  # inches: titles of panels stay off the heading
        figure = Figure(figsize=(WIDTH, sum(heights) + head), facecolor=LIGHT.paper, layout=apart)
        parts: Any = figure.subfigures(len(draws) + 1, 1, height_ratios=[head, *heights])
        if lines:
            parts[0].text(0.02, 1 - 0.1 / head, "\n".join(lines), va="top", fontsize=12.5, fontweight="bold")
            parts[0].text(0.02, 0.12 / head, shortened(subtitle, SUBTITLE_LETTERS), va="bottom", color=LIGHT.muted)
        for part, (heading, draw, _) in zip(parts[1:], draws, strict=True):
            lines = textwrap.wrap(shortened(heading, MOST_TITLE), HEADING_LETTERS)
            if lines:
                part.suptitle("\n".join(lines), x=0.02, ha="left", fontsize=10.5, fontweight="bold")
            draw(part, LIGHT)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def shade(colour: str, values: Any, low: float, high: float) -> Any:
    """Values as RGBA of one colour, more opaque the larger: reads on light and on dark paper.
    Array [..., 4]."""
    import numpy as np

    scaled = np.clip((np.asarray(values, float) - low) / max(high - low, 1e-12), 0, 1)
    rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return np.concatenate([np.broadcast_to(rgb, (*scaled.shape, 3)), scaled[..., None]], axis=-1)


def plain_axes(axes: "Axes", palette: Palette, *, grid: Literal["x", "y", "both"] = "y") -> None:
    """Light grid lines along one axis, nothing else."""
    axes.grid(True, axis=grid, linewidth=0.6, color=palette.grid)
    axes.tick_params(length=0)
    for side in ("left", "bottom") if grid == "both" else ({"y": "left", "x": "bottom"}[grid],):
        axes.spines[side].set_visible(False)


def heat(axes: "Axes", rgba: Any, palette: Palette, *, title: str) -> None:
    """A matrix of colours with a thin frame and no ticks."""
    axes.imshow(rgba, interpolation="nearest", aspect="equal")
    axes.set_title(title)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color(palette.grid)
