"""Token table: for every layer and token id, the share of its activations that each rank can serve,
and prices that balance homes. It is counted in solvers/schedule/token_fit.py.

A token id activates nearly the same experts whatever its context (arXiv 2503.04398), so counts of a
profile say where it should live. Most ids are rare, and a fifth of the occurrences in new requests
can be ids never seen, so a row leans on a prior with the weight of PRIOR_TOKENS occurrences; to
that comes what followed the id before it in its sequence, the successor rows.

The balanced table is softmax((shares - prices) / temperature): entropic transport of all
occurrences onto equal rank totals. One frequent id can exceed a rank's whole share, so its row is a
distribution, and the prices split it. Only prices and temperature are stored. An id without a row
after an unknown id is spread evenly.

Shape letters: T tokens, L MoE layers, R ranks, U ids, C candidate ranks.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from semmoe.profiles.trace import TraceBatch
from semmoe.solvers.schedule.transport import softmax

PRIOR_TOKENS = 2.0  # weight of the prior in a row, in occurrences


class Lookup(NamedTuple):
    """Where tokens are in a table: row of the id, row of the id before it as a predecessor;
    int64 [T] each, -1 for none."""

    row_T: np.ndarray
    after_T: np.ndarray


@dataclass(frozen=True, eq=False)
class ShareRows:
    """Rows of shares by id (ascending): smoothed averages over `weight_U` tokens, the best C
    ranks of each."""

    ids_U: np.ndarray  # int32 [U]
    weight_U: np.ndarray  # float32 [U]
    shares_LUC: np.ndarray  # float16 [L, U, C]
    ranks_LUC: np.ndarray  # uint16 [L, U, C]; no values where all ranks are stored, in order

    def of_no_layer(self) -> "ShareRows":
        """The same ids without their shares."""
        return replace(self, shares_LUC=self.shares_LUC[:0].copy(), ranks_LUC=self.ranks_LUC[:0].copy())

    def index(self, ids_T: np.ndarray) -> np.ndarray:
        """Row of each id, int64 [T]; -1 where there is none."""
        if len(self.ids_U) == 0:
            return np.full(len(ids_T), -1, np.int64)
        row_T = np.minimum(np.searchsorted(self.ids_U, ids_T), len(self.ids_U) - 1)
        return np.where(self.ids_U[row_T] == ids_T, row_T, -1)

    def shares_TR(self, layer: int, row_T: np.ndarray, rare_R: np.ndarray) -> np.ndarray:
        """Shares float32 [T, R]; `rare_R` where the row is -1, and at most that for ranks that
        are not stored."""
        if len(self.ids_U) == 0:
            return np.tile(rare_R, (len(row_T), 1))
        stored_TC = self.shares_LUC[layer, row_T].astype(np.float32)
        if self.ranks_LUC.size == 0:
            shares_TR = stored_TC
        else:
            shares_TR = np.minimum(stored_TC.min(axis=1, keepdims=True), rare_R[None, :])
            np.put_along_axis(shares_TR, self.ranks_LUC[layer, row_T].astype(np.int64), stored_TC, axis=1)
        shares_TR[row_T < 0] = rare_R
        return shares_TR


@dataclass(frozen=True, eq=False)
class TokenTable:
    """Rows by id, successor rows by the id before, and the prices that balance the homes."""

    own: ShareRows
    after: ShareRows
    rare_LR: np.ndarray  # float32 [L, R]: share of a rare id
    prices_LR: np.ndarray  # float32 [L, R]
    temperature_L: np.ndarray  # float32 [L]

    @property
    def num_ranks(self) -> int:
        return self.rare_LR.shape[1]

    def without_rows(self) -> "TokenTable":
        """The same of no id: little."""
        own, after = (
            ShareRows(
                rows.ids_U[:0], rows.weight_U[:0], rows.shares_LUC[:, :0].copy(), rows.ranks_LUC.reshape(-1)[:0].copy()
            )
            for rows in (self.own, self.after)
        )
        return replace(self, own=own, after=after)

    def lookup(self, token_ids_T: np.ndarray, previous_ids_T: np.ndarray) -> Lookup:
        """Rows of tokens and of the ids before them in their sequences (-1 unknown)."""
        return Lookup(self.own.index(token_ids_T), self.after.index(previous_ids_T))

    def shares_TR(self, layer: int, lookup: Lookup) -> np.ndarray:
        """Expected share of each token's activations on each rank, float32 [T, R]."""
        rare_R = self.rare_LR[layer]
        own_TR = self.own.shares_TR(layer, lookup.row_T, rare_R)
        after_TR = self.after.shares_TR(layer, lookup.after_T, rare_R)
        return own_TR + (after_TR - rare_R) * self.prior_share(lookup.row_T)[:, None]

    def prior_share(self, row_T: np.ndarray) -> np.ndarray:
        """Weight of the prior in each row, float32 [T] between 0 and 1."""
        if len(self.own.ids_U) == 0:
            return np.ones(len(row_T), np.float32)
        weight_T = np.where(row_T < 0, 0, self.own.weight_U[row_T])
        return (PRIOR_TOKENS / (PRIOR_TOKENS + weight_T)).astype(np.float32)

    def scores_TR(self, layer: int, lookup: Lookup) -> np.ndarray:
        """Shares net of the prices, float32 [T, R]: the score of each rank as a home."""
        return self.shares_TR(layer, lookup) - self.prices_LR[layer]

    def homes_TR(self, layer: int, lookup: Lookup) -> np.ndarray:
        """The balanced table: distribution of each token over the ranks, float [T, R]; even
        where nothing is known."""
        homes_TR = softmax(self.scores_TR(layer, lookup), float(self.temperature_L[layer]))
        homes_TR[(lookup.row_T < 0) & (lookup.after_T < 0)] = 1 / self.num_ranks
        return homes_TR


def previous_token_ids_T(batch: TraceBatch) -> np.ndarray:
    """Id of the token before each row in its request's sequence, int32 [T]; -1 where unknown."""
    previous_T = np.full(batch.num_tokens, -1, np.int32)
    previous_T[1:] = batch.token_ids_T[:-1]
    for b in np.flatnonzero(np.diff(batch.starts_B1)).tolist():
        position, sequence = batch.first_position_B[b] - 1, batch.sequence(b)
        previous_T[batch.starts_B1[b]] = sequence[position] if 0 <= position < len(sequence) else -1
    return previous_T
