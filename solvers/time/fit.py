"""Batches to place by, made of the requests that are fitted.

What was balanced on the fitted requests is to stay balanced on others, which draw experts
otherwise: batches are filled from few resampled requests (REQUEST_SHARE of them), so that they
differ from each other as much as the fitted requests and the ones to come do together. Rows that
are sent once are counted in some of the batches, activations, which add up, in many more: the
busiest of several ranks that are nearly even is a matter of few tokens.

Shape letters: T tokens, K top-k, E experts, G groups of tokens (requests), B requests, M batches
that rows are counted in, X those that activations are, J tokens drawn of each.
"""

from typing import NamedTuple

import numpy as np

from semmoe.solvers.demands import Demands
from semmoe.solvers.place.exact_counts import REQUEST_SHARE
from semmoe.solvers.time.batches import Pool
from semmoe.solvers.time.hardware import Costing
from semmoe.solvers.time.moe_layer import batch_tokens
from semmoe.solvers.time.swaps import LayerBatches

MOST_TOKENS = {"fast": 16_000, "default": 40_000, "max": 80_000}  # of a layer that swaps are counted on
LEAST_TOKENS = 16  # of a request: more requests than that leaves are not looked at
BATCHES = {"fast": 48, "default": 128, "max": 512}
MANY_BATCHES = 2_000
MANY_CELLS = 2**15  # batches by ranks, at most where that leaves LEAST_BATCHES
LEAST_BATCHES = 512
DRAWN_TOKENS = 512  # of a batch in decode: what more tokens scatter less is known


class Fit(NamedTuple):
    """Requests to place by.

    Fields:
        rows_T: rows of a trace, int64: of many every second, third ... of a request.
        group_T: the request of each, int64.
        weight_XG: how often a batch has each token of a request, on average, float64; rows are
            counted in the first `num_batches`.
        drawn_XJ: tokens of each batch, indices into `rows_T`, int32; none where requests come
            whole.
        counted_T: rows, each once: loads and pairs are counted on them.
    """

    rows_T: np.ndarray
    group_T: np.ndarray
    weight_XG: np.ndarray
    num_batches: int
    drawn_XJ: np.ndarray
    counted_T: np.ndarray

    def layer(self, ids_TK: np.ndarray, num_experts: int, tile: int) -> LayerBatches:
        """Batches of a layer. `ids_TK`: its expert ids at all rows of the trace."""
        ids_TK = ids_TK[self.rows_T].astype(np.int64)
        width, groups = num_experts + 1, self.weight_XG.shape[1]
        keys_TK = self.group_T[:, None] * width + ids_TK
        counts_GE = np.bincount(keys_TK.reshape(-1), minlength=groups * width).reshape(groups, width)[:, :-1]
        n_XE = self.weight_XG @ counts_GE
        num_drawn = self.drawn_XJ.shape[1]
        if num_drawn:
            tokens_X = self.weight_XG @ np.bincount(self.group_T, minlength=groups)
            keys_XJK = ids_TK[self.drawn_XJ] + np.arange(len(n_XE))[:, None, None] * width
            drawn_XE = np.bincount(keys_XJK.reshape(-1), minlength=n_XE.shape[0] * width).reshape(-1, width)[:, :-1]
            scale_X1 = (tokens_X / num_drawn)[:, None]
            # Of more tokens than are drawn, the sum scatters less about its mean.
            n_XE += (drawn_XE * scale_X1 - n_XE) / np.sqrt(np.maximum(scale_X1, 1.0))
            np.maximum(n_XE, 0, out=n_XE)
        weight_MG = self.weight_XG[: self.num_batches]
        return LayerBatches(ids_TK, self.group_T, weight_MG, n_XE.astype(np.float32), num_experts, tile)


def fit_of(pool: Pool, costing: Costing, num_ranks: int, demands: Demands, *, resampled: bool = True) -> Fit:
    """Batches of the pool's requests: whole ones in prefill, in decode tokens of all. Of more
    tokens than MOST_TOKENS every second, third ... stands for the others.

    `resampled`: each batch is of few resampled requests, to place by; else of all, to judge by.
    """
    rng = np.random.default_rng([demands.seed, 23])
    most, num_batches = MOST_TOKENS[demands.effort], BATCHES[demands.effort]
    kept = np.sort(rng.permutation(pool.num_requests)[: max(1, most // LEAST_TOKENS)])
    tokens_B = np.array([len(pool.rows_B[b]) for b in kept], np.float64)
    step = max(1, int(np.ceil(tokens_B.sum() / most)))
    rows_B = [pool.rows_B[b][::step] for b in kept]
    counted_B = np.array([len(rows) for rows in rows_B])
    few = max(1, round(REQUEST_SHARE * pool.num_requests))
    many = max(num_batches, min(MANY_BATCHES, max(LEAST_BATCHES, MANY_CELLS // num_ranks)))
    size = num_ranks * batch_tokens(costing)
    decodes = costing.phase == "generated"
    weight_XB = np.zeros((many, len(kept)))
    for weight_B in weight_XB:
        drawn = rng.integers(0, len(kept), few) if resampled else np.arange(len(kept))
        if decodes:
            np.add.at(weight_B, drawn, size / tokens_B[drawn].sum())
            continue
        left = float(size)
        while left > 0:  # whole requests; the last one in part
            requests = rng.choice(drawn, len(drawn))
            before = np.cumsum(tokens_B[requests]) - tokens_B[requests]
            np.add.at(weight_B, requests, np.clip((left - before) / tokens_B[requests], 0, 1))
            left -= tokens_B[requests].sum()
    weight_XB *= tokens_B / counted_B
    drawn_XJ = _drawn(weight_XB, counted_B, min(size, DRAWN_TOKENS) if decodes else 0, rng)
    rows_T, group_T = np.concatenate(rows_B), np.repeat(np.arange(len(kept)), counted_B)
    return Fit(rows_T, group_T, weight_XB, num_batches, drawn_XJ, np.concatenate(pool.rows_B))


def _drawn(weight_XB: np.ndarray, counted_B: np.ndarray, num_drawn: int, rng: np.random.Generator) -> np.ndarray:
    """Tokens of each batch, drawn by their weight, int32 [X, J]: numbers in order of requests."""
    first_B = np.cumsum(counted_B) - counted_B
    drawn_XJ = np.empty((len(weight_XB), num_drawn), np.int32)
    for drawn_J, weight_B in zip(drawn_XJ, weight_XB, strict=True):
        upto_B = np.cumsum(weight_B * counted_B)
        at_J = rng.random(num_drawn) * upto_B[-1]
        b_J = np.searchsorted(upto_B, at_J, side="right")
        b_J = np.minimum(b_J, np.flatnonzero(weight_B)[-1])
        into_J = counted_B[b_J] - (upto_B[b_J] - at_J) / weight_B[b_J]
        drawn_J[:] = first_B[b_J] + np.clip(into_J.astype(np.int64), 0, counted_B[b_J] - 1)
    return drawn_XJ
