"""The plan's request scorer where requests arrive: in an engine's process, or in a router.

The same scores as `solvers.schedule.request_scorer.RequestScorer`, from one gather over one table
[V, D + 1 + R] and one product: numpy only, no PyTorch, no scipy. A prompt of 8,192 ids takes less
than a millisecond (docs/experiments.md).

Shape letters: T ids of a prompt, N distinct ones that are known, V ids of the plan, D topics,
R ranks of the plan, G groups of them: data-parallel ranks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from semmoe.profiles.errors import InputError
from semmoe.runtime.engines.plan_files import POWER, PlanFacts, read_plan_facts

BLOCK_IDS = 512  # rows that are gathered at a time stay in the cache until they are summed
MAX_TOKEN_ID = 1 << 24  # ids of prompts are looked up in a table that long


@dataclass(frozen=True, eq=False)
class PlanScorer:
    """Scores prompts against a plan.

    Fields:
        plan: what it scores against.
        ranks: G, data-parallel ranks that requests go to; each has R / G consecutive ranks of the
            plan, whose scores add up.

    Source: runtime/engines/scorer.py; docs/formats.md, "Plug-in directory", has the formula.
    """

    plan: PlanFacts
    ranks: int

    @classmethod
    def open(cls, path: str | Path, *, ranks: int = 0) -> "PlanScorer":
        """The scorer of a plan directory, or of one that `semmoe export --to vllm-plugin` wrote,
        for `ranks` data-parallel ranks; 0: as many as the plan has.

        Raises InputError where it cannot be read, has no request scorer, or was made for a number
        of ranks that does not divide over these.
        """
        return cls.of(read_plan_facts(path), ranks=ranks)

    @classmethod
    def of(cls, plan: PlanFacts, *, ranks: int = 0) -> "PlanScorer":
        """The same of facts that were read. Raises InputError as `open` does."""
        if not len(plan.tables.get("ids_V", ())):
            raise InputError(f"{plan.path} has no request scorer: its traces had no prompts, or it has no schedule")
        if plan.tables["ids_V"][-1] >= MAX_TOKEN_ID:
            raise InputError(f"{plan.path}: token id {plan.tables['ids_V'][-1]} is over {MAX_TOKEN_ID - 1}")
        ranks = ranks or plan.num_ranks
        if plan.num_ranks % ranks:
            raise InputError(f"{plan.path} is for {plan.num_ranks} ranks, which do not divide over {ranks} DP ranks")
        scorer = cls(plan, ranks)
        scorer.scores(plan.tables["ids_V"][:1])  # its tables are laid out now, not in the first request
        return scorer

    def scores(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Predicted share of a request's activations on each DP rank, less the average request's,
        float64 [G]; zeros where no id is known.

        `ids`: token ids of the prompt, integers [T].
        """
        rows_N, counts_N, known = self._known(ids)
        if not known:
            return np.zeros(self.ranks)
        weight_2N = np.empty((2, len(rows_N)), np.float32)  # of a row in the topics, and in the weights
        weight_2N[0], power_N = 1, np.power(counts_N, np.float32(POWER), out=weight_2N[1])
        sums_2X, topic_DG = self._summed(weight_2N, rows_N), self._topic_DG
        topics_D, (mean, *manner_G) = sums_2X[0, : len(topic_DG)], sums_2X[1, len(topic_DG) :].tolist()
        scale = known**-POWER
        length = max(math.sqrt(topics_D @ topics_D), 1e-12)
        square = scale * scale * float(power_N @ power_N) - 2 * scale * mean + self._mean_square
        spread = math.sqrt(max(square, 1e-24))
        # Numbers of Python: for a few ranks half of the time that numpy takes.
        pairs = zip((topics_D @ topic_DG).tolist(), manner_G, self._mean_G, strict=True)
        return np.array([topic / length + (scale * manner - usual) / spread for topic, manner, usual in pairs])

    def _summed(self, weight_2N: np.ndarray, rows_N: np.ndarray) -> np.ndarray:
        """Rows of the table times both weights, added up: [2, D + 1 + G]."""
        table_VX = self._table_VX
        if len(rows_N) <= BLOCK_IDS:
            return weight_2N @ table_VX.take(rows_N, axis=0)
        sums_2X = np.zeros((2, table_VX.shape[1]))
        buffer = np.empty((BLOCK_IDS, table_VX.shape[1]), np.float32)
        for first in range(0, len(rows_N), BLOCK_IDS):
            rows = rows_N[first : first + BLOCK_IDS]
            block = table_VX.take(rows, axis=0, out=buffer[: len(rows)], mode="clip")
            sums_2X += weight_2N[:, first : first + BLOCK_IDS] @ block
        return sums_2X

    def expected_lar(self, scores_G: Sequence[float] | np.ndarray, rank: int) -> float:
        """Share of the request's activations that `rank` is expected to serve itself; with scores
        of zeros, the average request's."""
        return min(max(float(self.average_G[rank] + scores_G[rank]), 0.0), 1.0)

    @cached_property
    def average_G(self) -> np.ndarray:
        """Share of the average request's activations that each rank could serve, float64 [G]."""
        load_LE, hosts_LEG = self.plan.load_LE, self.plan.hosts_LEG(self.ranks)
        total_L = np.maximum(load_LE.sum(axis=1), 1)
        return (np.einsum("le,leg->lg", load_LE, hosts_LEG) / total_L[:, None]).mean(axis=0)

    def _known(self, ids: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """Rows of the distinct known ids, int32 [N] ascending, how often each occurs, float32 [N],
        and how many that are in all."""
        ids_T = np.asarray(ids)
        if not ids_T.size or ids_T.dtype.kind not in "iu":
            return np.zeros(0, np.int32), np.zeros(0, np.float32), 0
        # One -1 stands in front of them: before every known row there is another one.
        rows_T1 = np.empty(len(ids_T) + 1, np.int32)
        rows_T1[0] = -1
        self._row_of_next.take(ids_T.astype(np.int64, copy=False) + 1, out=rows_T1[1:], mode="clip")
        rows_T1.sort()
        is_first_T = rows_T1[1:] != rows_T1[:-1]
        counts_N1 = np.bincount(is_first_T.cumsum())  # the unknown ones are the first
        return rows_T1[1:][is_first_T], counts_N1[1:].astype(np.float32), len(ids_T) - int(counts_N1[0])

    @cached_property
    def _row_of_next(self) -> np.ndarray:
        """Row of each id at the place behind it, int32; -1 where it has none, which both ends say
        of all ids beyond them."""
        ids_V = self.plan.tables["ids_V"]
        rows = np.full(int(ids_V[-1]) + 3, -1, np.int32)
        rows[ids_V + 1] = np.arange(len(ids_V))
        return rows

    @cached_property
    def _table_VX(self) -> np.ndarray:
        """Topics, mean and weights side by side, float32 [V, D + 1 + G]: a row per id is one
        read."""
        tables = self.plan.tables
        num_topics = tables["topic_VD"].shape[1]
        table_VX = np.empty((len(tables["ids_V"]), num_topics + 1 + self.ranks), np.float32)
        table_VX[:, :num_topics] = tables["topic_VD"]
        table_VX[:, num_topics] = tables["mean_V"]
        table_VX[:, num_topics + 1 :] = self._by_group(tables["weight_VR"])
        return table_VX

    @cached_property
    def _topic_DG(self) -> np.ndarray:
        return self._by_group(self.plan.tables["topic_DR"])

    @cached_property
    def _mean_square(self) -> float:
        mean_V = self.plan.tables["mean_V"].astype(np.float64)
        return float(mean_V @ mean_V)

    @cached_property
    def _mean_G(self) -> list[float]:
        return (self.plan.tables["mean_V"].astype(np.float64) @ self._by_group(self.plan.tables["weight_VR"])).tolist()

    def _by_group(self, values_XR: np.ndarray) -> np.ndarray:
        """Scores of the ranks of a group, added up: float64 [X, G]."""
        return values_XR.astype(np.float64).reshape(len(values_XR), self.ranks, -1).sum(axis=2)
