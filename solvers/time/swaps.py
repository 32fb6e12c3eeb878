"""Swaps of experts that lower the predicted time of a layer: the mean over batches of what the
busiest link and the busiest rank cost together.

Batches are sampled from resampled fitted requests, so that a swap counts for what it saves on
requests as they differ, not on the load of the whole trace. Where a row goes once to a rank or a
node, a swap changes how many tokens reach the two ranks (or nodes) of its experts: counted for all
partners of a rank's experts at once, by tokens that reach a rank with one expert only. Homes are
random: a rank receives 1 - 1/R of the rows that reach it.

Shape letters: T tokens, K top-k, E experts, R ranks, G groups of tokens, M batches, U units that a
row is sent to once (ranks or nodes), S experts of the rank whose swaps are tried, J all experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MOST_STEPS = 400  # swaps of a layer
LEAST_GAIN = 1e-5  # of the time, that a swap has to save
SWAP_CELLS = 2**18  # batches by swaps that are priced at once


@dataclass(frozen=True, eq=False)
class LayerBatches:
    """Tokens of one layer in groups, and batches as weighted sums of groups."""

    ids_TK: np.ndarray  # integers, E for an empty slot
    group_T: np.ndarray  # int64
    weight_MG: np.ndarray  # float64
    n_XE: np.ndarray  # activations of each expert, float32, in more batches
    num_experts: int
    tile: int

    def summed(self, counts_G: np.ndarray) -> np.ndarray:
        """Sums over groups, [G, ...], by batch, [M, ...]."""
        return (self.weight_MG @ counts_G.reshape(len(counts_G), -1)).reshape(-1, *counts_G.shape[1:])


def expert_work(n: np.ndarray, tile: int) -> np.ndarray:
    """Activations rounded up to tiles, active experts and activations, [3, ...], of experts with n
    activations."""
    return np.stack([np.ceil(n / tile) * tile, n > 0, n])


class Prices(NamedTuple):
    """Microseconds from counts; arrays of any shape in and out."""

    links: Callable[[list[np.ndarray]], np.ndarray]  # reaching rows of the busiest unit at each level
    experts: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # padded, active, activations
    total: Callable[[np.ndarray, np.ndarray], np.ndarray]  # links, experts
    by_activation: bool  # rows are activations: nothing is sent once


class _Level:
    """How many tokens reach each unit (a rank, or a node of ranks), kept up to date."""

    def __init__(self, batches: LayerBatches, unit_of_R: np.ndarray, rank_of_E: np.ndarray) -> None:
        self.batches, self.unit_of_R = batches, unit_of_R
        self.num_units = int(unit_of_R.max()) + 1
        self.place(rank_of_E)

    def place(self, rank_of_E: np.ndarray) -> None:
        """Count for a placement."""
        batches = self.batches
        num_tokens, num_units = len(batches.ids_TK), self.num_units
        self.unit_of_E = np.append(self.unit_of_R[rank_of_E], num_units)
        self.unit_TK = self.unit_of_E[batches.ids_TK]
        keys_TK = np.arange(num_tokens)[:, None] * (num_units + 1) + self.unit_TK
        self.count_TU = np.bincount(keys_TK.reshape(-1), minlength=num_tokens * (num_units + 1)).reshape(
            num_tokens, num_units + 1
        )[:, :num_units]
        count_TK = np.take_along_axis(np.pad(self.count_TU, ((0, 0), (0, 1))), self.unit_TK, axis=1)
        self.alone_TK = (count_TK == 1) & (self.unit_TK < num_units)
        keys_T = batches.group_T[:, None] * num_units
        reaches = self.count_TU > 0
        flat = (keys_T + np.arange(num_units))[reaches]
        groups = batches.weight_MG.shape[1]
        self.reach_MU = batches.summed(np.bincount(flat, minlength=groups * num_units).reshape(groups, num_units))
        self.alone_ME = batches.summed(self._by_expert(batches.group_T, batches.ids_TK, self.alone_TK))

    def _by_expert(self, group_T: np.ndarray, ids_TK: np.ndarray, which_TK: np.ndarray) -> np.ndarray:
        """Marked choices by group and expert, [G, E]."""
        width, groups = self.batches.num_experts + 1, self.batches.weight_MG.shape[1]
        keys = (group_T[:, None] * width + ids_TK)[which_TK]
        return np.bincount(keys, minlength=groups * width).reshape(groups, width)[:, :-1]

    def after_swaps(self, experts_S: np.ndarray, unit: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens that reach the unit of `experts_S`, and that of each partner, after a swap of one
        for the other, float64 [M, S, J] both; as now where both are of one unit."""
        batches, width = self.batches, self.batches.num_experts + 1
        groups, size = batches.weight_MG.shape[1], len(experts_S)
        slot_E = np.full(width, -1)
        slot_E[experts_S] = np.arange(size)
        slot_TK = slot_E[batches.ids_TK]
        own_T = self.count_TU[:, unit] > 0
        fresh_MJ = batches.summed(
            self._by_expert(
                batches.group_T[~own_T],
                batches.ids_TK[~own_T],
                np.ones((int((~own_T).sum()), batches.ids_TK.shape[1]), bool),
            )
        )
        token_X, choice_X = np.nonzero(slot_TK >= 0)  # every activation of the rank's own experts
        slot_X = slot_TK[token_X, choice_X]
        base_X = batches.group_T[token_X] * size + slot_X
        ids_XK = batches.ids_TK[token_X]
        keys_XK = base_X[:, None] * width + ids_XK
        cells = groups * size * width

        def pairs(which_XK: np.ndarray) -> np.ndarray:
            return np.bincount(keys_XK[which_XK], minlength=cells).reshape(groups, size, width)[:, :, :-1]

        alone_X = self.alone_TK[token_X, choice_X]
        regained_MSJ = batches.summed(pairs(np.broadcast_to(alone_X[:, None], ids_XK.shape)))
        others_MSJ = batches.summed(pairs(self.alone_TK[token_X]))
        token_units_XU = self.count_TU[token_X] > 0
        keys_XU = base_X[:, None] * self.num_units + np.arange(self.num_units)
        absent = np.bincount(keys_XU[~token_units_XU], minlength=groups * size * self.num_units)
        new_MSU = batches.summed(absent.reshape(groups, size, self.num_units))
        unit_J = self.unit_of_E[:-1]
        here_MSJ = (
            self.reach_MU[:, unit, None, None] - self.alone_ME[:, experts_S, None] + fresh_MJ[:, None] + regained_MSJ
        )
        there_MSJ = self.reach_MU[:, None, unit_J] - self.alone_ME[:, None] + new_MSU[:, :, unit_J] + others_MSJ
        same_J = unit_J == unit
        here_MSJ[:, :, same_J] = self.reach_MU[:, unit, None, None]
        there_MSJ[:, :, same_J] = self.reach_MU[:, unit, None, None]
        return here_MSJ, there_MSJ


def swap_layer(
    batches: LayerBatches,
    rank_of_E: np.ndarray,
    levels_UR: list[np.ndarray],
    prices: Prices,
    *,
    num_ranks: int,
    seed: int,
    kicks: int = 0,
) -> tuple[np.ndarray, float]:
    """A placement with as many experts on every rank as the given one, int64 [E], that no swap
    improves, and its mean time.

    Parameters:
        batches: to take the mean over.
        rank_of_E: where to start.
        levels_UR: unit of each rank at every level where a row is sent once: ranks, nodes.
        prices: of links and experts.
        kicks: times that random swaps are made to leave a local optimum, the best of all is kept.
    """
    rng = np.random.default_rng(seed)
    found, time = _descend(batches, rank_of_E.astype(np.int64), levels_UR, prices, num_ranks)
    for _ in range(kicks):
        moved = found.copy()
        for _ in range(2):
            i, j = rng.choice(len(moved), 2, replace=False)
            moved[[i, j]] = moved[[j, i]]
        other, its_time = _descend(batches, moved, levels_UR, prices, num_ranks)
        if its_time < time:
            found, time = other, its_time
    return found, time


def mean_time(
    batches: LayerBatches, rank_of_E: np.ndarray, levels_UR: list[np.ndarray], prices: Prices, *, num_ranks: int
) -> float:
    """Mean time of a placement over batches; arguments as in `swap_layer`."""
    return _descend(batches, rank_of_E.astype(np.int64), levels_UR, prices, num_ranks, steps=0)[1]


def mean_imbalance(batches: LayerBatches, rank_of_E: np.ndarray, num_ranks: int) -> float:
    """Activations of the busiest rank over the mean, mean over batches."""
    load_XR = batches.n_XE @ np.eye(num_ranks)[rank_of_E]
    return float((load_XR.max(1) / np.maximum(load_XR.mean(1), 1e-300)).mean())


def _descend(
    batches: LayerBatches,
    rank_of_E: np.ndarray,
    levels_UR: list[np.ndarray],
    prices: Prices,
    num_ranks: int,
    steps: int = MOST_STEPS,
) -> tuple[np.ndarray, float]:
    rank_of_E = rank_of_E.copy()
    work_FME = expert_work(batches.n_XE[: _worth_counting(batches, num_ranks) if steps else None], batches.tile)
    levels = [_Level(batches, unit_of_R, rank_of_E) for unit_of_R in levels_UR]
    time = np.inf
    waiting: list[int] = []
    for step in range(steps + 1):
        work_FMR = work_FME @ np.eye(num_ranks)[rank_of_E]
        us_MR = prices.experts(*work_FMR)
        link_M = np.resize(prices.links(_busiest(levels, work_FMR, prices)), len(us_MR))
        now = float(prices.total(link_M, us_MR.max(1)).mean())
        if now < time - LEAST_GAIN * now:  # a swap was made: ask the ranks again, those that cost most first
            waiting = _by_cost(us_MR, levels)
        time = min(time, now)
        if not waiting or step == steps:
            break
        rank = waiting.pop(0)
        chosen = _best_swap(rank, rank_of_E, work_FME, work_FMR, us_MR, levels, prices)
        if chosen is None or chosen[2] >= time * (1 - LEAST_GAIN):
            continue
        i, j, _ = chosen
        rank_of_E[[i, j]] = rank_of_E[[j, i]]
        for level in levels:
            if level.unit_of_R[rank_of_E[i]] != level.unit_of_R[rank_of_E[j]]:
                level.place(rank_of_E)
    return rank_of_E, time


def _worth_counting(batches: LayerBatches, num_ranks: int) -> int:
    """Batches that activations are counted in while swaps are tried: as many as rows are, or more
    where a rank has few experts to swap."""
    per_swap = -(-batches.num_experts // num_ranks) * batches.num_experts
    return max(len(batches.weight_MG), SWAP_CELLS // per_swap)


def _by_cost(us_MR: np.ndarray, levels: list[_Level]) -> list[int]:
    """Ranks by how much of the mean they are over, experts and rows together."""
    cost_R = (us_MR / np.maximum(us_MR.mean(1, keepdims=True), 1e-300)).mean(0)
    for level in levels:
        reach_MU = level.reach_MU / np.maximum(level.reach_MU.mean(1, keepdims=True), 1e-300)
        cost_R = np.maximum(cost_R, reach_MU.mean(0)[level.unit_of_R])
    return np.argsort(-cost_R, kind="stable").tolist()


def _busiest(levels: list[_Level], work_FMR: np.ndarray, prices: Prices) -> list[np.ndarray]:
    return [work_FMR[2].max(1)] if prices.by_activation else [level.reach_MU.max(1) for level in levels]


def _best_swap(
    rank: int,
    rank_of_E: np.ndarray,
    work_FME: np.ndarray,
    work_FMR: np.ndarray,
    us_MR: np.ndarray,
    levels: list[_Level],
    prices: Prices,
) -> tuple[int, int, float] | None:
    """The swap of an expert of the rank with one of another that leaves least time: both experts,
    and the time."""
    own = np.flatnonzero(rank_of_E == rank)
    change_FMSJ = work_FME[:, :, None] - work_FME[:, :, own, None]
    here_FMSJ = work_FMR[:, :, rank, None, None] + change_FMSJ
    there_FMSJ = work_FMR[:, :, None, rank_of_E] - change_FMSJ
    rest_MJ = _rest(us_MR, rank)[:, rank_of_E]
    experts_MSJ = np.maximum(np.maximum(prices.experts(*here_FMSJ), prices.experts(*there_FMSJ)), rest_MJ[:, None])
    if prices.by_activation:
        rest = _rest(work_FMR[2], rank)[:, rank_of_E]
        rows = [np.maximum(np.maximum(here_FMSJ[2], there_FMSJ[2]), rest[:, None])]
    else:
        rows = []
        for level in levels:
            unit = int(level.unit_of_R[rank])
            here_MSJ, there_MSJ = level.after_swaps(own, unit)
            rest = _rest(level.reach_MU, unit)[:, level.unit_of_E[:-1]]
            rows.append(np.maximum(np.maximum(here_MSJ, there_MSJ), rest[:, None]))
    links_MSJ = prices.links(rows)
    if links_MSJ.ndim:
        links_MSJ = np.resize(links_MSJ, experts_MSJ.shape)
    time_SJ = prices.total(links_MSJ, experts_MSJ).mean(0)
    time_SJ[:, rank_of_E == rank] = np.inf
    best = int(np.argmin(time_SJ))
    i, j = divmod(best, time_SJ.shape[1])
    return (int(own[i]), j, float(time_SJ[i, j])) if np.isfinite(time_SJ[i, j]) else None


def _rest(values_MU: np.ndarray, unit: int) -> np.ndarray:
    """The most of all units but the given one and each other one, [M, U]."""
    others_MU = values_MU.copy()
    others_MU[:, unit] = -np.inf
    if others_MU.shape[1] < 3:
        return np.full(others_MU.shape, -np.inf)
    top_M2 = np.sort(others_MU, axis=1)[:, -2:]
    is_top_MU = others_MU.argmax(1)[:, None] == np.arange(others_MU.shape[1])
    return np.where(is_top_MU, top_M2[:, :1], top_M2[:, 1:])
