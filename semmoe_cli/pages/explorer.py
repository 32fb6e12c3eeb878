"""A map of a plan's layers: how often each expert is chosen by each domain, experts in the order of
their ranks, with a selector of layers and a readout under the pointer.

The page shows one layer without any script, which is what prints; the script below, a part of the
page, fills in the others. Numbers travel as one character each, a step of 36.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from semmoe.pages.figures.style import HEAT, Draw, Palette, heat, name_rows, shade
from semmoe.profiles.errors import visible

if TYPE_CHECKING:
    import numpy as np

STEPS = "0123456789abcdefghijklmnopqrstuvwxyz"
MOST_CELLS = 200_000  # of all layers; of more, layers are shown at even distances

SCRIPT = """
for (const map of document.querySelectorAll(".explorer")) {
  const data = JSON.parse(map.querySelector("script").textContent), pick = map.querySelector(".pick");
  const select = map.querySelector("select"), said = map.querySelector("output"), strips = map.querySelectorAll("svg.strip");
  const step = c => "0123456789abcdefghijklmnopqrstuvwxyz".indexOf(c);
  let now = data.layers[data.shown];
  const show = () => {
    now = data.layers[select.value];
    said.textContent = now.said;
    strips.forEach((strip, row) => strip.querySelectorAll("rect").forEach((rect, i) =>
      rect.setAttribute("fill-opacity", row ? step(now.cells[row - 1][i]) / 35 : now.ranks[i] % 2 ? .55 : .2)));
  };
  select.value = data.shown; select.onchange = show; pick.hidden = false; show();
  strips.forEach((strip, row) => {
    strip.onpointermove = event => {
      const box = strip.getBoundingClientRect(), size = now.experts.length;
      const i = Math.min(size - 1, Math.max(0, Math.floor((event.clientX - box.left) / box.width * size)));
      const at = "expert " + now.experts[i] + " on rank " + now.ranks[i];
      said.textContent = row ? at + ", " + data.domains[row - 1] + ": about " + (step(now.cells[row - 1][i]) / 35 * data.top).toFixed(1)
        + " times the mean expert" : at;
    };
    strip.onpointerleave = () => { said.textContent = now.said; };
  });
}
"""


@dataclass(frozen=True, eq=False)
class LayerMap:
    """Loads of the experts of each layer by domain.

    Fields:
        domains: names.
        load_LDE: load of each expert over the mean expert of its layer and domain, float64.
        rank_LE: the rank that each expert is on, int64.
        numbers: of the layers in the model.
        said: a sentence for each layer.
        shown: index of the layer that is there without a script.
        label, caption: as of a picture.
    """

    domains: list[str]
    load_LDE: "np.ndarray"
    rank_LE: "np.ndarray"
    numbers: list[int]
    said: list[str]
    shown: int
    label: str
    caption: str

    @property
    def height(self) -> float:
        """Inches of the drawing."""
        return 0.7 + 0.26 * len(self.domains)

    @property
    def top(self) -> float:
        """The load from which on a cell is of full colour."""
        import numpy as np

        return max(2.0, float(np.quantile(self.load_LDE, 0.99)))

    @property
    def draw(self) -> Draw:
        """The layer that is shown, for formats without a script."""
        import numpy as np

        order_E = np.argsort(self.rank_LE[self.shown], kind="stable")
        load_DE, rank_E = self.load_LDE[self.shown][:, order_E], self.rank_LE[self.shown][order_E]

        def draw(figure: Any, palette: Palette) -> None:
            axes = figure.subplots()
            heat(axes, shade(HEAT, load_DE, 0, self.top), palette, title=f"layer {self.numbers[self.shown]}")
            axes.set_aspect("auto")
            for edge in np.flatnonzero(np.diff(rank_E)):
                axes.axvline(edge + 0.5, color=palette.load, linewidth=0.9)
            name_rows(axes, self.domains)
            axes.tick_params(length=0)
            axes.set_xlabel("experts in the order of their ranks; the bluer, the more of the domain's tokens choose it")

        return draw


def layer_map_html(shown: LayerMap, text: Callable[[str], str]) -> str:
    """The map as HTML. `text`: makes text of it."""
    import numpy as np

    num_layers, num_domains, num_experts = shown.load_LDE.shape
    most = max(1, MOST_CELLS // (num_domains * num_experts))
    chosen = sorted({shown.shown, *np.linspace(0, num_layers - 1, min(num_layers, most)).round().astype(int).tolist()})
    layers = [_layer(shown, layer) for layer in chosen]
    first = layers[chosen.index(shown.shown)]
    options = "".join(f'<option value="{i}">{shown.numbers[layer]}</option>' for i, layer in enumerate(chosen))
    rows_of, strips = ["rank", *shown.domains], [_alternating(first["ranks"]), *map(_opacities, first["cells"])]
    rows = "\n".join(
        f'<div class="row{" ranks" if i == 0 else ""}"><span>{text(name)}</span>{_strip(strip, text(name))}</div>'
        for i, (name, strip) in enumerate(zip(rows_of, strips, strict=True))
    )
    names = [visible(name) for name in shown.domains]
    facts = {"domains": names, "top": round(shown.top, 3), "shown": chosen.index(shown.shown), "layers": layers}
    data = json.dumps(facts).replace("<", "\\u003c")
    return (
        f'<figure class="explorer"><p class="pick" hidden><label>Layer of the model <select>{options}</select></label></p>\n'
        f"{rows}\n<output>{text(first['said'])}</output><figcaption>{text(shown.caption)}</figcaption>"
        f'<script type="application/json">{data}</script></figure>'
    )


def _layer(shown: LayerMap, layer: int) -> dict[str, Any]:
    """A layer as the script reads it: experts in the order of their ranks."""
    import numpy as np

    order_E = np.argsort(shown.rank_LE[layer], kind="stable")
    steps_DE = np.clip(shown.load_LDE[layer][:, order_E] / shown.top * (len(STEPS) - 1), 0, len(STEPS) - 1).round()
    return {
        "experts": order_E.tolist(),
        "ranks": shown.rank_LE[layer][order_E].tolist(),
        "cells": ["".join(STEPS[int(step)] for step in row) for row in steps_DE],
        "said": shown.said[layer],
    }


def _alternating(ranks: list[int]) -> list[float]:
    return [0.55 if rank % 2 else 0.2 for rank in ranks]


def _opacities(cells: str) -> list[float]:
    return [round(STEPS.index(cell) / (len(STEPS) - 1), 2) for cell in cells]


def _strip(opacities: list[float], label: str) -> str:
    rects = "".join(
        f'<rect x="{i}" width="1.02" height="1" fill-opacity="{value}"/>' for i, value in enumerate(opacities)
    )
    return (
        f'<svg role="img" aria-label="{label}" class="strip" viewBox="0 0 {len(opacities)} 1" '
        f'preserveAspectRatio="none">{rects}</svg>'
    )
