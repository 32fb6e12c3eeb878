"""Gain of a re-placement as predicted time (`semmoe place --from-plan --hardware`): microseconds
per layer saved, and what a moved expert takes on the link in the same unit.

Moves are searched by the time model's slopes at the old placement: microseconds for a remote row,
and for load on the busiest rank. What they come to is predicted by the whole model, on batches as
they will run.

Shape letters: L MoE layers, R ranks, M batches, X resamples.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from semmoe.profiles.trace import TraceBatch, TraceInfo
from semmoe.solvers.deployment import Deployment
from semmoe.solvers.place.moves import expert_bytes
from semmoe.solvers.placement import Topology
from semmoe.solvers.replan.worth import EXCESS_ROWS, Worth
from semmoe.solvers.time.counted import Counted, count_batches
from semmoe.solvers.time.hardware import Costing, TimeAsked, costing_of, nodes_of_ranks
from semmoe.solvers.time.moe_layer import US_PER_GIGA, batch_tokens, layer_times, way_us
from semmoe.solvers.time.predict import Sampled, sample, served

UNIT = "us per layer"
MOST_BATCHES, PER_RESAMPLE = 64, 2  # a decision counts four times: two halves, under two placements
SLOPE_BATCHES = 8  # that slopes are taken of
STEP = 0.05  # of rows and loads, up and down, between which a slope is taken


@dataclass(frozen=True, eq=False)
class TimeGain:
    """What time a step of one layer takes under a placement, tokens at random homes.

    Fields:
        costing: machine, backend and batches.
        topology: ranks of the placements.
        seed: of the batches.
    """

    costing: Costing
    topology: Topology
    seed: int

    @classmethod
    def of(cls, asked: TimeAsked, info: TraceInfo, old: Deployment, batch: TraceBatch, seed: int) -> "TimeGain":
        """For the model of a trace. Raises InputError where the time cannot be known."""
        prompts = float(batch.is_prompt_T.mean()) if batch.num_tokens else 0.0
        return cls(costing_of(asked, info, old.topology, prompts=prompts), old.topology, seed)

    def gains_XL(self, batch: TraceBatch, old: Deployment, new: Deployment) -> np.ndarray:
        """Microseconds that the new placement saves at some layers, spread over all, mean over
        batches: of all requests, and of resamples of them, float64 [1 + X, some layers]."""
        drawn = self._sample(batch, old)
        times = []
        per = min(drawn.per_resample, PER_RESAMPLE)
        resampled_MJ = drawn.resampled.rows_MJ.reshape(len(drawn.drawn_XB), drawn.per_resample, -1)[:, :per]
        batches = (drawn.drawn.rows_MJ[:MOST_BATCHES], resampled_MJ.reshape(-1, drawn.drawn.rows_MJ.shape[1]))
        for deployed in (old, new):
            all_ML, some_ML = (self._counted(deployed, drawn, rows_MJ) for rows_MJ in batches)
            some_XL = some_ML.reshape(len(drawn.drawn_XB), per, -1).mean(axis=1)
            times.append(np.concatenate([all_ML.mean(axis=0)[None], some_XL]))
        return times[0] - times[1]

    def times_L(self, batch: TraceBatch, deployed: Deployment) -> np.ndarray:
        """Microseconds of every layer under a placement, mean over batches of all requests,
        float64 [L]."""
        drawn = self._sample(batch, deployed)
        layers = np.arange(batch.expert_ids_TLK.shape[1])
        part = max(2, min(len(drawn.drawn.rows_MJ) * len(drawn.layers) // len(layers), MOST_BATCHES))
        ids_LTK = np.ascontiguousarray(batch.expert_ids_TLK.transpose(1, 0, 2))
        return self._counted(deployed, replace(drawn, ids_LTK=ids_LTK, layers=layers), drawn.drawn.rows_MJ[:part]).mean(
            axis=0
        )

    def slopes(self, batch: TraceBatch, old: Deployment) -> tuple[Worth, float]:
        """What rows and load cost to the search, in remote rows per token, and the microseconds per
        layer of one such row."""
        drawn = self._sample(batch, old)
        counted = count_batches(
            served(replace(old, schedule=None), drawn, self.costing), drawn.drawn.rows_MJ[:SLOPE_BATCHES]
        )
        tokens = batch_tokens(self.costing)
        rows = [float(part.mean()) / tokens for part in (counted.nvl_mean_ML, counted.nic_mean_ML)]
        costs = [self._slope(partial(_with_rows, counted, name)) for name in ("nvl_ML", "nic_ML")]
        load = counted.rows_MLR.max(axis=2) / np.maximum(counted.rows_MLR.mean(axis=2), 1e-300)
        excess = self._slope(partial(_with_load, counted)) / float(load.mean())
        per_row = [cost / row if row else 0.0 for cost, row in zip(costs, rows, strict=True)]
        kind, reached = self.costing.kind, sum(rows)
        if kind == "gather" or not reached:
            us = (0.0, 0.0, 0.0)
        elif kind == "per-node":
            us = (per_row[0], per_row[1], 0.0)
        else:
            row = sum(costs) / reached
            us = (0.0, 0.0, row) if kind == "per-expert" else (row, 0.0, 0.0)
        # The search's prices and its least gain are in rows: the dearest row is one.
        unit = max(us) or excess / EXCESS_ROWS or 1.0
        return Worth(*(each / unit for each in us), excess=excess / unit, load_cap=1.0, unit=UNIT), unit

    def move_us(self) -> float:
        """Microseconds that one expert's weights take on the slowest link between ranks."""
        costing, place = self.costing, self.topology
        shape, values = costing.shape, costing.values
        size = expert_bytes(shape.hidden, shape.expert, values.get("experts.w", 2.0))
        node_R = nodes_of_ranks(place.num_ranks, place.ranks_per_node, place.num_nodes, costing.domain)
        rate = values.get("nic" if node_R[-1] else "nvl")
        if rate is not None:
            return size / (rate * US_PER_GIGA)
        rows = np.array([[size / costing.row_bytes("dispatch")], [0.0]])  # of a machine that was measured
        return float(way_us(rows, "dispatch", costing, values, place.num_ranks)[0])

    def steps(self, tokens: int) -> float:
        """Steps in which so many tokens go through a layer."""
        return tokens / (self.costing.tokens_per_rank * self.topology.num_ranks)

    def _sample(self, batch: TraceBatch, deployed: Deployment) -> Sampled:
        """Batches of the requests."""
        return sample(batch, self.costing, (self.topology.num_ranks, deployed.placement.num_experts), self.seed)

    def _counted(self, deployed: Deployment, drawn: Sampled, rows_MJ: np.ndarray) -> np.ndarray:
        """Microseconds by batch and layer, float64 [M, L]."""
        return self._times(count_batches(served(replace(deployed, schedule=None), drawn, self.costing), rows_MJ))

    def _times(self, counted: Counted) -> np.ndarray:
        return layer_times(counted, self.costing, self.costing.values, self.topology.num_ranks).total_ML

    def _slope(self, scaled: Callable[[float], Counted]) -> float:
        """Microseconds per layer of a hundred percent more."""
        more, less = (self._times(scaled(1 + sign * STEP)).mean() for sign in (1, -1))
        return max(float(more - less) / (2 * STEP), 0.0)


def _with_rows(counted: Counted, name: str, factor: float) -> Counted:
    return replace(counted, **{name: getattr(counted, name) * factor})


def _with_load(counted: Counted, factor: float) -> Counted:
    """Every rank's work scaled: the busiest one decides."""
    return replace(
        counted,
        padded_MLR=counted.padded_MLR * factor,
        active_MLR=counted.active_MLR * factor,
        rows_MLR=counted.rows_MLR * factor,
        own_MLR=counted.own_MLR * factor,
    )
