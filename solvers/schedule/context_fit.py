"""Fit of the context predictor: ridge regression from what is known of tokens to the share of their
activations on each rank.

One-hot features make the normal equations counts of expert pairs across layers, which neighbouring
layers share. The share row leaves out the token's own request, or the counts would leak; a
perceptron on the same features was no better on held-out requests (docs/experiments.md).

Shape letters: T tokens, L MoE layers, K top-k, E experts, R ranks, F features, X ids of a column.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from semmoe.profiles.trace import TraceBatch
from semmoe.solvers.schedule.context import ContextPredictor
from semmoe.solvers.schedule.features import NUM_POSITION_IDS, Seen, choices_before
from semmoe.solvers.schedule.ridge import solve_positive
from semmoe.solvers.schedule.token_fit import RARE_TOKENS
from semmoe.solvers.schedule.token_table import PRIOR_TOKENS, ShareRows, TokenTable, previous_token_ids_T
from semmoe.solvers.schedule.transport import MANY_RANKS

if TYPE_CHECKING:
    from scipy.sparse import csr_array

MAX_TOKENS = 65_536  # rows to fit on
RIDGE = 120.0  # in tokens; held-out locality is flat from 20 to 200, and a little more helps on domains never seen
POSITION_RIDGE = 20.0  # few weights on many tokens each
BLOCK = 8_192


def training_rows(batch: TraceBatch, num_ranks: int, seed: int) -> np.ndarray:
    """Rows to fit on, ascending int64: all, or a random sample over all requests; fewer over more
    than MANY_RANKS, as every rank costs as much as every row."""
    most = MAX_TOKENS * MANY_RANKS // max(num_ranks, MANY_RANKS)
    if batch.num_tokens <= most:
        return np.arange(batch.num_tokens)
    return np.sort(np.random.default_rng(seed).choice(batch.num_tokens, most, replace=False))


def fit_context(
    batch: TraceBatch,
    table: TokenTable,
    hosts_LER: np.ndarray,
    *,
    seed: int,
    depth: int,
    skip: int = 0,
    step: Callable[[], None] = lambda: None,
) -> ContextPredictor:
    """Predictor fitted on (a sample of) the batch that `table` was counted on.

    Parameters:
        hosts_LER: bool [L, E, R], whether a rank hosts an expert
        seed: of the sample
        depth: how many earlier layers are read
        skip: leading layers of the batch that only give context; `table`, `hosts_LER` and the
            predictor begin after them
        step: called at every layer that is done
    """
    num_layers, num_experts, num_ranks = hosts_LER.shape
    rows = training_rows(batch, num_ranks, seed)
    seen = Seen.of(batch, num_experts, rows)
    without_own = _LeaveOwnRequestOut.of(batch, table, rows)
    position = _Column("position", seen.position_ids_TC, NUM_POSITION_IDS, POSITION_RIDGE)
    pairs = _PairCounts()
    padded_LER = np.pad(hosts_LER, ((0, 0), (0, 1), (0, 0))).astype(np.float64) / seen.chosen_TLK.shape[2]

    predictor = ContextPredictor(
        bias_LR=np.zeros((num_layers, num_ranks), np.float32),
        share_LRR=np.zeros((num_layers, num_ranks, num_ranks), np.float32),
        own_LDER=np.zeros((num_layers, depth, num_experts + 1, num_ranks), np.float16),
        previous_LPER=np.zeros((num_layers, 2, num_experts + 1, num_ranks), np.float16),
        position_LQR=np.zeros((num_layers, NUM_POSITION_IDS + 1, num_ranks), np.float16),
    )
    for number, layer in enumerate(range(skip, skip + num_layers)):
        # 1. Columns of this layer, and where their weights go.
        columns, weights_of = [position], [predictor.position_LQR[number]]
        for choices in choices_before(layer, depth):
            if choices.kind == "own":
                columns.append(_Column(choices.layer, seen.chosen_TLK[:, choices.layer], num_experts, RIDGE))
                weights_of.append(predictor.own_LDER[number, choices.number])
            elif len(used := choices.rows(seen.is_prompt_T)):
                name = f"previous {choices.number} {layer}"
                columns.append(_Column(name, choices.ids_TK(seen, num_experts), num_experts, RIDGE, used))
                weights_of.append(predictor.previous_LPER[number, choices.number])
        # 2. Dense features and target.
        served_TR = _one_hot(seen.chosen_TLK[:, layer], num_experts) @ padded_LER[number]
        shares_TR = without_own.shares_TR(number, served_TR, table)
        dense_TF = np.hstack([np.ones((len(rows), 1)), shares_TR])
        # 3. Normal equations from pair counts, solved, and the weights put in their places.
        target = _Column(layer, seen.chosen_TLK[:, layer], num_experts, RIDGE)
        weights_FR = _solve_layer(columns, target, dense_TF, served_TR, padded_LER[number], pairs)
        predictor.bias_LR[number] = weights_FR[0]
        predictor.share_LRR[number] = weights_FR[1 : 1 + num_ranks]
        first = 1 + num_ranks
        for column, weight_XR in zip(columns, weights_of, strict=True):
            weight_XR[: column.size] = weights_FR[first : first + column.size]
            first += column.size
        pairs.forget(before=layer + 1 - depth)
        step()
    return predictor


class _Column(NamedTuple):
    """One-hot features of every row: ids below `size`, or `size` for none. Integer names are layers
    of the token's own choices.

    `rows`: those that have any id; all where None. Two columns with rows have the same rows or none
    in common.
    """

    name: int | str
    ids_TK: np.ndarray
    size: int
    ridge: float
    rows: np.ndarray | None = None


def _solve_layer(
    columns: list[_Column],
    target: _Column,
    dense_TF: np.ndarray,
    served_TR: np.ndarray,
    padded_ER: np.ndarray,
    pairs: "_PairCounts",
) -> np.ndarray:
    """Ridge weights, float64 [F, R]: dense features first, then those of each column."""
    num_dense = dense_TF.shape[1]
    ends = np.cumsum([num_dense] + [column.size for column in columns]).tolist()
    places = [slice(first, last) for first, last in zip(ends[:-1], ends[1:], strict=True)]
    gram_FF = np.zeros((ends[-1], ends[-1]))
    right_FR = np.zeros((ends[-1], served_TR.shape[1]))
    # Dense features are few and small next to the counts: a light ridge only keeps the equations
    # regular.
    ridge_F = np.ones(ends[-1])
    gram_FF[:num_dense, :num_dense] = dense_TF.T @ dense_TF
    right_FR[:num_dense] = dense_TF.T @ served_TR
    for i, column in enumerate(columns):
        size = column.size
        ridge_F[places[i]] = column.ridge
        gram_FF[places[i], :num_dense] = (_one_hot(column.ids_TK, size).T @ dense_TF)[:size]
        gram_FF[:num_dense, places[i]] = gram_FF[places[i], :num_dense].T
        right_FR[places[i]] = pairs.counts_XX(column, target)[:size] @ padded_ER
        for j, other in enumerate(columns[: i + 1]):
            counts_XX = pairs.counts_XX(column, other)[:size, : other.size]
            gram_FF[places[i], places[j]] = counts_XX
            gram_FF[places[j], places[i]] = counts_XX.T
    gram_FF[np.diag_indices(ends[-1])] += ridge_F
    return solve_positive(gram_FF, right_FR)


def _one_hot(ids_TK: np.ndarray, size: int) -> "csr_array":
    """Sparse 0/1 matrix float64 [T, size + 1] of the ids."""
    from scipy.sparse import csr_array

    num_tokens, top_k = ids_TK.shape
    starts = np.arange(0, num_tokens * top_k + 1, top_k)
    return csr_array((np.ones(num_tokens * top_k), ids_TK.reshape(-1).astype(np.int32), starts), (num_tokens, size + 1))


class _PairCounts:
    """Counts of pairs of ids in two columns, kept while later layers need them again:
    neighbouring layers share most."""

    def __init__(self) -> None:
        self._kept: dict[tuple, np.ndarray] = {}

    def counts_XX(self, first: _Column, second: _Column) -> np.ndarray:
        """float64 [first.size + 1, second.size + 1]: tokens with one id in the first column and the
        other in the second.

        Tokens without an id in a column may be missing from the counts of "none".
        """
        key = (first.name, second.name)
        if key in self._kept:
            return self._kept[key]
        if key[::-1] in self._kept:
            return self._kept[key[::-1]].T
        shape = (first.size + 1, second.size + 1)
        counts = np.zeros(shape[0] * shape[1], np.int64)
        first_TK, second_TK = first.ids_TK, second.ids_TK
        if first.rows is not None and second.rows is not None and first.rows is not second.rows:
            return counts.reshape(shape).astype(np.float64)
        rows = second.rows if first.rows is None else first.rows
        if rows is not None:
            first_TK, second_TK = first_TK[rows], second_TK[rows]
        for start in range(0, len(first_TK), BLOCK):
            left_TK = first_TK[start : start + BLOCK].astype(np.int64) * shape[1]
            right_TK = second_TK[start : start + BLOCK].astype(np.int64)
            counts += np.bincount((left_TK[:, :, None] + right_TK[:, None, :]).reshape(-1), minlength=len(counts))
        counts_XX = counts.reshape(shape).astype(np.float64)
        if all(isinstance(name, int) or name == "position" for name in key):
            self._kept[key] = counts_XX
        return counts_XX

    def forget(self, *, before: int) -> None:
        """Drop the counts of layers that no later layer reads."""
        self._kept = {
            key: counts for key, counts in self._kept.items() if all(n == "position" or n >= before for n in key)
        }


@dataclass(frozen=True, eq=False)
class _OwnCounts:
    """For rows of a profile: how much of a table row comes from their own request."""

    row_T: np.ndarray  # row of the table, -1 none
    pair_T: np.ndarray  # index of (request, row)
    weight_T: np.ndarray  # what the row adds to its table row
    total_T: np.ndarray  # weight of the table row
    own_T: np.ndarray  # of it from the own request
    scale_T: np.ndarray  # own weight in the whole request over that in the fitted sample

    @classmethod
    def of(
        cls, row_all: np.ndarray, request_all: np.ndarray, weight_all: np.ndarray, table: ShareRows, rows: np.ndarray
    ) -> "_OwnCounts":
        keys_all = request_all * (len(table.ids_U) + 1) + row_all + 1
        keys, pair_all = np.unique(keys_all, return_inverse=True)
        own_all = np.bincount(pair_all, weight_all, len(keys))
        pair_T, row_T = pair_all[rows], row_all[rows]
        sampled = np.bincount(pair_T, weight_all[rows], len(keys))[pair_T]
        total_T = table.weight_U[row_T].astype(np.float64) if len(table.ids_U) else np.zeros(len(rows))
        scale_T = own_all[pair_T] / np.maximum(sampled, 1e-12)
        return cls(row_T, pair_T, weight_all[rows], total_T, own_all[pair_T], scale_T)

    def removed_TR(self, shares_TR: np.ndarray, served_TR: np.ndarray) -> np.ndarray:
        """Smoothed shares float64 [T, R] without the own request. `served_TR`: share of each
        row's activations per rank."""
        # Few rows share their pair with another.
        own_TR = self.weight_T[:, None] * served_TR
        several = np.flatnonzero(np.bincount(self.pair_T)[self.pair_T] > 1)
        _, pair = np.unique(self.pair_T[several], return_inverse=True)
        for rank in range(own_TR.shape[1]):
            own_TR[several, rank] = np.bincount(pair, own_TR[several, rank])[pair]
        own_TR *= self.scale_T[:, None]
        left_TR = shares_TR * (self.total_T + PRIOR_TOKENS)[:, None]
        left_TR -= own_TR
        np.maximum(left_TR, 0, out=left_TR)
        left_TR /= (self.left_T + PRIOR_TOKENS)[:, None]
        unknown = np.flatnonzero(self.row_T < 0)
        left_TR[unknown] = shares_TR[unknown]
        return left_TR

    @property
    def left_T(self) -> np.ndarray:
        return np.where(self.row_T < 0, 0, np.maximum(self.total_T - self.own_T, 0))


@dataclass(frozen=True, eq=False)
class _LeaveOwnRequestOut:
    """Share rows as a new request would see them: the occurrences of the row's own request are
    taken out of the counts."""

    own: _OwnCounts
    after: _OwnCounts

    @classmethod
    def of(cls, batch: TraceBatch, table: TokenTable, rows: np.ndarray) -> "_LeaveOwnRequestOut":
        lookup = table.lookup(batch.token_ids_T, previous_token_ids_T(batch))
        request_all, known_all = batch.request_of_T, lookup.row_T >= 0
        ones = np.ones(batch.num_tokens)
        tokens_all = np.where(known_all, table.own.weight_U[lookup.row_T], 0) if len(table.own.ids_U) else 0 * ones
        counted_all = known_all & (tokens_all <= RARE_TOKENS) & (lookup.after_T >= 0)
        weight_all = np.where(counted_all, np.maximum(tokens_all, 1) ** -0.5, 0)
        return cls(
            _OwnCounts.of(lookup.row_T, request_all, ones, table.own, rows),
            _OwnCounts.of(lookup.after_T, request_all, weight_all, table.after, rows),
        )

    def shares_TR(self, layer: int, served_TR: np.ndarray, table: TokenTable) -> np.ndarray:
        """What TokenTable.shares_TR gives for the rows, float64 [T, R], without their own
        requests."""
        rare_R = table.rare_LR[layer]
        own_TR = self.own.removed_TR(table.own.shares_TR(layer, self.own.row_T, rare_R), served_TR)
        after_TR = self.after.removed_TR(table.after.shares_TR(layer, self.after.row_T, rare_R), served_TR)
        prior_T = PRIOR_TOKENS / (PRIOR_TOKENS + self.own.left_T)
        return own_TR + (after_TR - rare_R) * prior_T[:, None]
