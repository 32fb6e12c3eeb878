"""Microseconds of a MoE layer from what is counted of its batches: dispatch, the busiest rank's
experts, combine.

An exchange takes `(a^p + X^p)^(1/p)`, X the slower of the busiest fast link and the busiest network
card. Experts are two grouped GEMMs, each `a + sqrt(c^2 + d^2)`: c by arithmetic, d by memory. Two
batches that overlap take twice the longer of exchanges and everything else, at half the tokens.
Where ranks begin with their own tokens while others' travel, each waits for the longer of the two.
Sources and errors: hardware.json, docs/method.md.

Shape letters: M batches, L MoE layers, R ranks.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from semmoe.solvers.time.counted import Counted
from semmoe.solvers.time.hardware import WAYS, Costing

US_PER_TERA = 1e6  # flop per us and TFLOPS
US_PER_GIGA = 1e3  # bytes per us and GB/s


@dataclass(frozen=True, eq=False)
class LayerTimes:
    """Microseconds by batch and layer."""

    dispatch_ML: np.ndarray
    combine_ML: np.ndarray
    experts_ML: np.ndarray
    total_ML: np.ndarray
    latency: float  # of all of them, which no placement changes
    even_ML: np.ndarray  # experts where every rank had the mean load

    @property
    def link_ML(self) -> np.ndarray:
        return self.dispatch_ML + self.combine_ML


def layer_times(counted: Counted, costing: Costing, values: Mapping[str, float], num_ranks: int) -> LayerTimes:
    """Times of counted batches. `values`: parameters by name, `Costing.values` or their ends."""
    rows_2ML = np.stack([counted.nvl_ML, counted.nic_ML])
    dispatch_ML, combine_ML = (way_us(rows_2ML, way, costing, values, num_ranks) for way in WAYS)
    setup = values.get("setup", 0.0)
    dispatch_ML = dispatch_ML + setup
    work = (counted.padded_MLR, counted.active_MLR, counted.rows_MLR)
    experts_MLR = experts_us(work, costing, values)
    shared = _shared_us(costing, values)
    # Experts of equal ranks: the busiest one's time is that of the mean work.
    even_ML = experts_us(tuple(part.mean(2) for part in work), costing, values) + shared
    experts_ML = even_ML if costing.balances else experts_MLR.max(2) + shared
    latency = setup + _start(values, "dispatch") + _start(values, "combine") + 2 * values.get("experts.a", 0.0)
    total_ML = dispatch_ML + experts_ML + combine_ML
    if costing.own_first:
        own_MLR = experts_MLR * counted.own_MLR / np.maximum(counted.rows_MLR, 1)
        ready_MLR = np.maximum(dispatch_ML[..., None], own_MLR)
        total_ML = (ready_MLR + experts_MLR - own_MLR).max(2) + shared + combine_ML
    if costing.asked.overlap == "two-batch":
        beside_ML = experts_ML + costing.asked.other_us / 2
        total_ML = 2 * np.maximum(dispatch_ML + combine_ML, beside_ML)
        dispatch_ML, combine_ML, experts_ML = 2 * dispatch_ML, 2 * combine_ML, 2 * experts_ML
        even_ML, latency = 2 * even_ML, 2 * latency
    return LayerTimes(dispatch_ML, combine_ML, experts_ML, total_ML, latency, even_ML)


def _of(values: Mapping[str, float], way: str, name: str, default: float) -> float:
    return values.get(f"{way}.{name}", values.get(f"exchange.{name}", default))


def _start(values: Mapping[str, float], way: str) -> float:
    return _of(values, way, "a", 0.0)


def exchange_us(
    rows: np.ndarray, row_bytes: float, values: Mapping[str, float], way: str, num_ranks: int
) -> np.ndarray:
    """Microseconds of one exchange from the rows of its busiest fast link and network card, float64
    [2, ...]."""
    spread = 1 - _of(values, way, "g", 0.0) * np.log2(num_ranks / 8)
    x = rows[0] * row_bytes / (_of(values, way, "e", 1.0) * spread * values["nvl"] * US_PER_GIGA)
    if rows[1].any():
        x = np.maximum(x, rows[1] * row_bytes / (_of(values, way, "n", 1.0) * values["nic"] * US_PER_GIGA))
    a, p = _start(values, way), _of(values, way, "p", 1.0)
    return a + x if p == 1 else (a**p + x**p) ** (1 / p)


def way_us(rows: np.ndarray, way: str, costing: Costing, values: Mapping[str, float], num_ranks: int) -> np.ndarray:
    """Dispatch or combine of a backend, as measured where it was; `rows` as in `exchange_us`."""
    if way in costing.curves:
        busiest = rows[1] if rows[1].any() else rows[0]
        return _read_off(busiest * costing.row_bytes(way), costing.curves[way])
    return exchange_us(rows, costing.row_bytes(way), values, way, num_ranks)


def _read_off(size: np.ndarray, curve: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Measured microseconds between the sizes that were measured; beyond the largest at the rate of
    the last two."""
    sizes, us = curve
    slope = max((us[-1] - us[-2]) / (sizes[-1] - sizes[-2]), 0.0) if sizes[-1] > sizes[-2] else 0.0
    return np.interp(size, sizes, us) + np.maximum(size - sizes[-1], 0.0) * slope


def experts_us(work: tuple[np.ndarray, ...], costing: Costing, values: Mapping[str, float]) -> np.ndarray:
    """Microseconds of ranks' experts from activations rounded up to tiles, experts with any, and
    activations, arrays of one shape; 0 where no token comes."""
    padded, active, rows = work
    if "experts" in costing.curves:
        return _read_off(rows, costing.curves["experts"]) * (rows > 0)
    hidden, expert = costing.shape.hidden, costing.shape.expert
    sizes = ((2 * expert, hidden), (hidden, expert))
    first, second = (gemm_us(padded, active, rows, s, values, values[costing.peak]) for s in sizes)
    return first + second


def gemm_us(
    padded: np.ndarray,
    active: np.ndarray,
    rows: np.ndarray,
    sizes: tuple[int, int],
    values: Mapping[str, float],
    peak: float,
) -> np.ndarray:
    """Microseconds of a grouped GEMM on every rank, as the shapes are; 0 where no token comes.

    Parameters:
        padded, active, rows: activations rounded up to tiles, experts with any, activations.
        sizes: outputs and inputs of an expert. peak: TFLOPS.
    """
    n, k = sizes
    compute = 2 * padded * n * (k + values["experts.k0"]) / (peak * values["experts.eff"] * US_PER_TERA)
    moved = active * n * k * values["experts.w"] + rows * (k * values["experts.act"] + 2 * n)
    memory = moved / (values["hbm"] * values["experts.mem"] * US_PER_GIGA)
    return (values["experts.a"] + np.sqrt(compute * compute + memory * memory)) * (rows > 0)


def _shared_us(costing: Costing, values: Mapping[str, float]) -> float:
    """Of experts that every token uses, which every rank holds: the same wherever others are."""
    width = costing.shape.shared
    if not width or "experts" in costing.curves:
        return 0.0
    hidden, tokens = costing.shape.hidden, batch_tokens(costing)
    padded = np.ceil(tokens / values["experts.tile"]) * values["experts.tile"]
    sizes = ((2 * width, hidden), (hidden, width))
    one, rows = np.ones(1), np.full(1, float(tokens))
    return float(sum(gemm_us(padded * one, one, rows, s, values, values[costing.peak])[0] for s in sizes))


def batch_tokens(costing: Costing) -> int:
    """Tokens on each rank of a batch that goes through the layer at once: half of them where two
    overlap."""
    tokens = costing.tokens_per_rank
    return max(1, tokens // 2) if costing.asked.overlap == "two-batch" else tokens
