"""The pictures of a plan's report: scores with intervals, layers, co-activation, traffic, load,
domains, what-if.

Matplotlib is imported inside `figures`; here are only drawings on what it is given.
"""

from typing import TYPE_CHECKING, Any

from semmoe.pages.figures.style import (
    HEAT,
    Draw,
    Palette,
    heat,
    is_narrow,
    name_rows,
    panels,
    panels_with_key,
    plain_axes,
    shade,
)

if TYPE_CHECKING:
    import numpy as np

    from semmoe.solvers.evaluate.compare import GainCurve
    from semmoe.solvers.evaluate.decision import Standing
    from semmoe.solvers.evaluate.pictures import Details
    from semmoe.solvers.evaluate.report import Report, ScoreRow, TradeOff, WhatIfRow


def standings(rows: "list[Standing]", metric: str) -> Draw:
    """Today, EPLB's way and the plan as bars: microseconds by what they are made of where they are
    known, else `metric` with its interval; and the load of the busiest rank."""
    timed = all(standing.time for standing in rows)
    titles = {"rem": "remote ranks per token", "lar": "local activations", "node": "remote nodes per token"}

    def draw(figure: Any, palette: Palette) -> None:
        left, right = panels(figure, [1.7, 1], share="y")
        colours = {"today": palette.contiguous, "EPLB's way": palette.load, "this plan": palette.plan}
        for y, standing in enumerate(rows):
            colour = colours.get(standing.role, palette.third)
            if standing.time:
                _time_bar(left, y, standing.time.us, colour)
            else:
                _value_bar(left, y, standing.score, metric, colour)
            _value_bar(right, y, standing.score, "load_imbalance", colour)
        short = "us of a layer: experts, exchanges (lighter)"
        full = "microseconds of a MoE layer: experts, then exchanges (lighter)"
        left.set_title((short if is_narrow(figure) else full) if timed else titles.get(metric, "load"))
        right.set_title("busiest rank / mean load")
        for axes in (left, right):
            axes.set_ylim(len(rows) - 0.5, -0.5)
            axes.set_xlim(left=0)
            axes.margins(x=0.16)
            plain_axes(axes, palette, grid="x")
            if axes is left or is_narrow(figure):
                name_rows(axes, [standing.name for standing in rows])

    return draw


def _time_bar(axes: Any, y: int, us: dict[str, float], colour: str) -> None:
    exchanges = us["dispatch"] + us["combine"]
    axes.barh(y, us["experts"], color=colour, height=0.55)
    axes.barh(y, exchanges, left=us["experts"], color=colour, height=0.55, alpha=0.45)
    note = {"textcoords": "offset points", "va": "center", "fontsize": 8.5}
    axes.annotate(f"{us['total']:,.1f}", (us["experts"] + exchanges, y), (5, 0), **note)


def _value_bar(axes: Any, y: int, row: "ScoreRow", metric: str, colour: str) -> None:
    value, (low, high) = row.value(metric), row.interval(metric)
    axes.barh(y, value, color=colour, height=0.55)
    axes.plot([low, high], [y, y], color=colour, linewidth=1.6, alpha=0.7)
    note = {"textcoords": "offset points", "va": "center", "fontsize": 8.5}
    axes.annotate(f"{value:.2f}", (max(value, high), y), (5, 0), **note)


def requests_histogram(rem_G: "dict[str, np.ndarray]", against: str) -> Draw:
    """How many requests reach how many remote ranks per token, before and after."""
    import numpy as np

    values = np.concatenate(list(rem_G.values()))
    bins = np.linspace(float(values.min()), float(values.max()) + 1e-9, 25)

    def draw(figure: Any, palette: Palette) -> None:
        axes = figure.subplots()
        for name, colour in (("before", palette.contiguous), ("after", palette.plan)):
            label = f"before: {against}" if name == "before" else "after: plan"
            axes.hist(rem_G[name], bins=bins, color=colour, alpha=0.6, label=label)
        axes.set_xlabel("remote ranks per token of a request, at random homes")
        axes.set_ylabel("requests")
        axes.yaxis.get_major_locator().set_params(integer=True)
        plain_axes(axes, palette)
        figure.legend(loc="outside upper right", ncols=2)

    return draw


def trade_off(points: "list[TradeOff]", metric: str, label: str) -> Draw:
    """Time (or the metric) over the experts that a rank holds: a line for each number of ranks, a
    point for each number of slots."""
    ranks = sorted({point.ranks for point in points})

    def draw(figure: Any, palette: Palette) -> None:
        axes = figure.subplots()
        colours = [palette.plan, palette.load, palette.third, palette.fourth, palette.contiguous]
        for number, count in enumerate(ranks):
            line = sorted((p for p in points if p.ranks == count), key=lambda p: p.slots)
            values = [point.value(metric) for point in line]
            colour = colours[number % len(colours)]
            axes.plot([p.slots for p in line], values, "o-", color=colour, markersize=5, linewidth=1.8)
            place = {"textcoords": "offset points", "fontsize": 8.5, "color": colour}
            axes.annotate(f"{count} ranks", (line[-1].slots, values[-1]), (7, -3), **place)
        axes.set_xlabel("expert slots of a rank and layer: what a rank's memory holds")
        axes.set_ylabel(label)
        axes.margins(x=0.12, y=0.15)
        plain_axes(axes, palette)

    return draw


def score_rows(rows: "list[ScoreRow]", metric: str, uniform: float | None = None) -> Draw:
    """Every row with its interval: the metric the dispatch kind pays for, and load imbalance beside
    it. `uniform`: the metric of experts without structure."""
    names = {
        "rem": "remote ranks per token",
        "lar": "share of activations that stay local",
        "node": "remote nodes per token",
    }
    metric = metric if metric in names else "rem"

    def draw(figure: Any, palette: Palette) -> None:
        left, right = panels(figure, [1.5, 1], share="y")
        labels = [_row_label(*row.key) for row in rows]
        for axes, name, title in ((left, metric, names[metric]), (right, "load_imbalance", "busiest rank / mean load")):
            for y, row in enumerate(rows):
                if name == "load_imbalance" and _same_load(row, rows):
                    continue
                colour, value = palette.of(row.placement), row.value(name)
                low, high = row.interval(name)
                axes.plot([low, high], [y, y], color=colour, linewidth=3, alpha=0.45, solid_capstyle="round")
                axes.plot(value, y, "o", color=colour, markersize=6.5)
                axes.annotate(f"{value:.2f}", (value, y), (0, 7), textcoords="offset points", ha="center", fontsize=8)
            axes.set_title(f"{title}, {'higher' if name == 'lar' else 'lower'} is better" if axes is left else title)
            axes.set_ylim(len(rows) - 0.5, -0.6)
            axes.margins(x=0.12)
            plain_axes(axes, palette, grid="x")
        if uniform is not None:
            left.axvline(uniform, color=palette.muted, linewidth=0.8, linestyle=(0, (2, 3)))
            left.annotate(
                "no structure",
                (uniform, len(rows) - 0.55),
                (3, 1),
                textcoords="offset points",
                color=palette.muted,
                fontsize=7.5,
            )
        for axes in (left, right) if is_narrow(figure) else (left,):
            name_rows(axes, labels)

    return draw


def gain_against_moves(curve: "GainCurve") -> Draw:
    """Gain over the old plan by the share of experts that move, with intervals; budgets are one
    line, other placements stand beside it."""

    def draw(figure: Any, palette: Palette) -> None:
        axes = figure.subplots()
        line = [point for point in curve.points if point.kind in ("keep", "budget")]
        axes.plot([100 * p.share for p in line], [p.gain for p in line], color=palette.of("plan"), linewidth=1.5)
        for point in curve.points:
            colour = palette.of({"eplb": "load", "free": "contiguous"}.get(point.kind, "plan"))
            axes.plot([100 * point.share] * 2, [point.lo, point.hi], color=colour, linewidth=3, alpha=0.45)
            axes.plot(100 * point.share, point.gain, "o", color=colour, markersize=6.5)
            if point.kind != "budget":
                place = {"textcoords": "offset points", "ha": "left", "fontsize": 8}
                axes.annotate(point.name, (100 * point.share, point.gain), (6, 5), **place)
        axes.set_xlabel("experts that move, %")
        axes.set_title(f"gain over the old plan, {curve.unit}, higher is better")
        axes.margins(x=0.12)
        plain_axes(axes, palette, grid="y")

    return draw


def _same_load(row: "ScoreRow", rows: "list[ScoreRow]") -> bool:
    """Whether a scheduled row has the load of its placement at random homes: said once is
    enough."""
    plain = [other for other in rows if other.key == (row.placement, "random")]
    return row.schedule != "random" and bool(plain) and abs(plain[0].load_imbalance - row.load_imbalance) < 5e-4


def _row_label(placement: str, schedule: str) -> str:
    return placement if schedule == "random" else f"{placement}, {schedule}"


def layer_lines(report: "Report", best: str) -> Draw:
    """REM, load imbalance and, where a schedule moves it, LAR at every layer. `best`: schedule
    to draw beside random homes."""
    moved = {row.schedule for row in report.rows} - {"random"}
    metrics = [("rem", "remote ranks per token (REM)")]
    metrics += [("lar", "local activation rate (LAR)")] if moved else []
    metrics += [("load_imbalance", "busiest rank / mean load")]

    def draw(figure: Any, palette: Palette) -> None:
        shown = panels(figure, [1] * len(metrics))
        for axes, (metric, title) in zip(shown, metrics, strict=True):
            for index, (placement, schedule) in enumerate(row.key for row in report.rows):
                if schedule not in ("random", best) or (schedule != "random" and placement != "plan"):
                    continue
                values = [layer.rows[index].value(metric) for layer in report.layers]
                numbers = [layer.model_layer for layer in report.layers]
                scheduled = schedule != "random"
                axes.plot(
                    numbers,
                    values,
                    color=palette.third if scheduled else palette.of(placement),
                    linewidth=2 if placement == "plan" else 1.4,
                    marker="o" if len(numbers) < 40 else None,
                    markersize=3,
                    label=_row_label(placement, schedule),
                )
            axes.set_title(title)
            axes.set_xlabel("layer of the model")
            axes.xaxis.get_major_locator().set_params(integer=True)
            plain_axes(axes, palette)
        handles, labels = shown[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=2 if is_narrow(figure) else 5)

    return draw


def co_activation(details: "Details", num_ranks: int) -> Draw:
    """How often two experts of a layer serve the same token, against chance: in checkpoint order
    and grouped by rank."""
    import numpy as np

    pairs_EE = details.pairs_EE.astype(float)
    load_E = np.maximum(np.diagonal(pairs_EE), 1)
    np.fill_diagonal(pairs_EE, 0)
    # Pairs over what independent choices of the same loads would give, scaled so that the mean pair
    # is 1.
    lift_EE = pairs_EE / np.outer(load_E, load_E)
    lift_EE /= max(pairs_EE.sum() / (np.outer(load_E, load_E).sum() - (load_E**2).sum()), 1e-300)
    order_E = np.argsort(details.home_of_E, kind="stable")
    size = len(order_E)
    before_E = np.arange(size) * num_ranks // size
    after_E = details.home_of_E[order_E]
    top = max(2.0, float(np.quantile(lift_EE, 0.99)))

    def draw(figure: Any, palette: Palette) -> None:
        left, right, key = panels_with_key(figure, 2)
        shown = (
            (left, lift_EE, pairs_EE, before_E, "before: checkpoint order"),
            (right, lift_EE[order_E][:, order_E], pairs_EE[order_E][:, order_E], after_E, "after: grouped by rank"),
        )
        for axes, matrix, counts_EE, rank_E, title in shown:
            heat(axes, shade(HEAT, matrix, 0.6, top), palette, title=title)
            edges = [0, *(np.flatnonzero(np.diff(rank_E)) + 1), size]
            for first, last in zip(edges, edges[1:], strict=False):
                box = [first - 0.5, last - 0.5, last - 0.5, first - 0.5, first - 0.5]
                tall = [first - 0.5, first - 0.5, last - 0.5, last - 0.5, first - 0.5]
                axes.plot(box, tall, color=palette.load, linewidth=1.1)
            if len(edges) <= 17:
                middles = [(a + b - 1) / 2 for a, b in zip(edges, edges[1:], strict=False)]
                axes.set_xticks(
                    middles,
                    [
                        f"rank {rank_E[int(a)]}" if num_ranks <= 8 and not is_narrow(figure) else f"{rank_E[int(a)]}"
                        for a in edges[:-1]
                    ],
                )
            axes.tick_params(length=0)
            inside = float(counts_EE[rank_E[:, None] == rank_E[None, :]].sum() / max(counts_EE.sum(), 1e-12))
            axes.set_xlabel(f"{inside:.0%} of the pairs that meet are inside a rank")
        _colour_key(key, palette, 0.6, top, "times as often as by chance")

    return draw


def _colour_key(axes: Any, palette: Palette, low: float, high: float, label: str) -> None:
    import numpy as np

    ramp = np.linspace(low, high, 64)[::-1, None]
    axes.imshow(shade(HEAT, ramp, low, high), aspect="auto", extent=(0, 1, low, high))
    axes.set_xticks([])
    axes.yaxis.tick_right()
    axes.tick_params(length=0)
    axes.yaxis.set_label_position("right")
    axes.set_ylabel(label)
    for spine in axes.spines.values():
        spine.set_visible(False)


def rank_traffic(details: "Details") -> Draw:
    """Rows from each rank to each other rank, per thousand tokens, on one scale."""
    import numpy as np

    matrices = {name: rows_RR * 1000 for name, rows_RR in details.rows_RR.items()}
    num_ranks = len(matrices["before"])
    off = ~np.eye(num_ranks, dtype=bool)
    top = max(float(m[off].max()) for m in matrices.values()) if num_ranks > 1 else 1.0

    def draw(figure: Any, palette: Palette) -> None:
        shown = panels_with_key(figure, 2)
        titles = _titles(details)
        for axes, (name, matrix) in zip(shown, matrices.items(), strict=False):
            away = np.where(off, matrix, np.nan)
            heat(axes, shade(HEAT, np.nan_to_num(away), 0, top), palette, title=titles[name])
            axes.set_xticks(range(num_ranks), [f"{r}" for r in range(num_ranks)])
            axes.set_yticks(range(num_ranks), [f"{r}" for r in range(num_ranks)])
            axes.tick_params(length=0)
            axes.set_xlabel("to rank")
            axes.set_ylabel("from rank")
            for i, j in np.argwhere(off) if num_ranks <= 8 else ():
                dark = away[i, j] > 0.6 * top
                axes.text(
                    j,
                    i,
                    f"{matrix[i, j]:.0f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="#ffffff" if dark else palette.ink,
                )
            for i in range(num_ranks) if num_ranks <= 8 else ():
                axes.text(i, i, "stays", ha="center", va="center", fontsize=7, color=palette.muted)
        _colour_key(shown[2], palette, 0, top, "rows per 1000 tokens")

    return draw


def _titles(details: "Details") -> dict[str, str]:
    return {"before": f"before: {details.against}", "after": "after: plan"}


def rank_loads(details: "Details") -> Draw:
    """Load of every rank over the mean: one dot per layer, a bar for the mean over layers."""
    import numpy as np

    titles = _titles(details)
    low = min(float(load.min()) for load in details.load_LR.values())
    high = max(float(load.max()) for load in details.load_LR.values())

    def draw(figure: Any, palette: Palette) -> None:
        shown = panels(figure, [1, 1], share="y")
        for axes, (name, load_LR) in zip(shown, details.load_LR.items(), strict=True):
            colour = palette.plan if name == "after" else palette.contiguous
            num_layers, num_ranks = load_LR.shape
            spread_L = (np.arange(num_layers) / max(num_layers - 1, 1) - 0.5) * 0.6
            for rank in range(num_ranks):
                axes.plot(
                    rank + spread_L, load_LR[:, rank], "o", color=colour, markersize=2.6, alpha=0.6, markeredgewidth=0
                )
                axes.hlines(load_LR[:, rank].mean(), rank - 0.36, rank + 0.36, color=colour, linewidth=2.4)
            axes.axhline(1, color=palette.muted, linewidth=0.8)
            axes.set_title(titles[name])
            axes.set_xticks(range(num_ranks), [str(r) for r in range(num_ranks)])
            axes.set_xlabel("rank; a dot is a layer, the bar their mean")
            axes.set_ylim(min(low, 0.9) - 0.03, high + 0.03)
            plain_axes(axes, palette)
        shown[0].set_ylabel("load over mean")

    return draw


def domain_dumbbells(
    names: list[str], pairs: "list[tuple[ScoreRow, ScoreRow]]", metric: str, *, label: str, before: str
) -> Draw:
    """Each domain before and after, with the interval of after. `before`: name of the baseline."""
    baseline = before

    def draw(figure: Any, palette: Palette) -> None:
        axes = figure.subplots()
        for y, rows in enumerate(pairs):
            before, after = (row.value(metric) for row in rows)
            axes.plot([before, after], [y, y], color=palette.grid, linewidth=3, zorder=1)
            axes.plot(rows[1].interval(metric), [y, y], color=palette.plan, linewidth=3, alpha=0.45, zorder=2)
            axes.plot(
                before, y, "o", color=palette.contiguous, markersize=6, zorder=3, label=baseline if y == 0 else None
            )
            axes.plot(after, y, "o", color=palette.plan, markersize=6, zorder=3, label="plan" if y == 0 else None)
            # A metric of one is the same at every home: no change is worth a number there.
            if before:
                axes.annotate(
                    f"{after / before - 1:+.0%}",
                    (max(before, after), y),
                    (9, -3),
                    textcoords="offset points",
                    fontsize=8,
                )
        name_rows(axes, names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.margins(x=0.1)
        axes.set_xlabel(f"{label}; in brackets: requests")
        plain_axes(axes, palette, grid="x")
        figure.legend(loc="outside upper right", ncols=2)

    return draw


def saved_share(before: float, after: float) -> float:
    """Share saved; 0 where there is nothing to save (remote nodes on a single node)."""
    return 1 - after / before if before > 0 else 0.0


def what_if_lines(rows: "list[WhatIfRow]", metric: str, *, label: str) -> Draw:
    """The metric over numbers of ranks, and what is saved at each."""
    ranks = sorted({row.ranks for row in rows})
    found = {(row.ranks, row.placement): row for row in rows}
    names = {"contiguous": "contiguous", "load": "load", "metis": "placed"}

    def draw(figure: Any, palette: Palette) -> None:
        left, right = panels(figure, [1.25, 1])
        where = range(len(ranks))
        for placement, name in names.items():
            rows_here = [found[r, placement] for r in ranks]
            left.plot(
                where,
                [row.value(metric) for row in rows_here],
                "o-",
                color=palette.of(placement),
                label=name,
                linewidth=2,
                markersize=5,
            )
            low, high = zip(*(row.ci[metric] for row in rows_here), strict=True)
            left.fill_between(where, low, high, color=palette.of(placement), alpha=0.18, linewidth=0)
        saved = [saved_share(*(found[r, name].value(metric) for name in ("contiguous", "metis"))) for r in ranks]
        right.bar(where, [100 * s for s in saved], color=palette.plan, width=0.55)
        for x, share in zip(where, saved, strict=True):
            right.annotate(f"{share:.0%}", (x, max(100 * share, 0)), (0, 3), textcoords="offset points", ha="center")
        left.set_title(label)
        right.set_title("saved against contiguous, %")
        for axes in (left, right):
            axes.set_xticks(where, [str(r) for r in ranks])
            axes.set_xlabel("ranks")
            plain_axes(axes, palette)
        left.set_ylim(bottom=0)
        right.margins(y=0.15)
        left.legend(loc="upper left")

    return draw
