"""Token table (solvers/schedule/token_table.py) counted on the rows of a profile.

The prior of rows matters more than the counts:
- a rare id is smoothed towards what rare ids activate (an average that counts ids more than
  occurrences), which differs from the average token, dominated by frequent ids;
- successor rows are counted in the same way;
- where the checkpoint's input embedding is at hand, a ridge regression from the embedding to the
  shares gives every id of the vocabulary a row (the paper takes the nearest neighbour's).

Prices keep the traffic of every rank within TRAFFIC_CAP of the mean on the profile. With more than
MAX_CANDIDATES ranks only the best of each row are stored; the others count as a rare id's share at
most.

Shape letters: T tokens, L MoE layers, K top-k, E experts, R ranks, U ids, C candidate ranks, D
embedding size, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from semmoe.profiles.trace import TraceBatch
from semmoe.solvers.schedule.token_table import PRIOR_TOKENS, ShareRows, TokenTable, previous_token_ids_T
from semmoe.solvers.schedule.transport import MANY_RANKS, capped_prices

MAX_CANDIDATES = 8
TRAFFIC_CAP = 1.05
PRICE_SWEEPS = 24
PRICE_COOLING = 0.1  # last temperature over the spread of the shares
RARE_TOKENS = 64  # successor rows are counted from ids with at most this many occurrences: others need no prior
PRICED_IDS = 4_096  # ids that prices are computed from, and as many for all others
BLOCK_IDS = 4_096  # ids counted, or whose shares are made, at a time: what is kept of them stays in the cache
BLOCK_ROWS = 32_768  # rows whose keys do


def build_token_table(
    batch: TraceBatch,
    hosts_LER: np.ndarray,
    *,
    embedding_VD: np.ndarray | None = None,
    max_candidates: int = MAX_CANDIDATES,
    into: "Shares | None" = None,
    step: Callable[[], None] = lambda: None,
) -> TokenTable:
    """Table counted on the rows of the batch whose token id is known.

    Parameters:
        hosts_LER: bool [L, E, R], whether a rank hosts an expert
        embedding_VD: float [V, D], the model's input embedding; all V ids then get a row
        max_candidates: ranks that are stored for each row, at most
        into: arrays of `Shares.of` that the shares are put in; None: new ones
        step: called at every layer that is done
    """
    num_layers, _, num_ranks = hosts_LER.shape
    counted, after = _Known.of(batch).groups(batch)
    ids_U = _table_ids(counted.ids_U, embedding_VD)
    tokens_U, place_U = counted.weight_U, np.searchsorted(ids_U, counted.ids_U)
    weight_U = np.zeros(len(ids_U))
    weight_U[place_U] = tokens_U
    ridge = None if embedding_VD is None else EmbeddingRidge.fit(embedding_VD, counted.ids_U, tokens_U)

    if into is None:
        into = Shares.of((num_layers, num_ranks), (len(ids_U), len(after.ids_U)), np.zeros, max_candidates)
    own = ShareRows(ids_U.astype(np.int32), weight_U.astype(np.float32), into.own_LUC, into.own_ranks_LUC)
    successors = ShareRows(
        after.ids_U.astype(np.int32), after.weight_U.astype(np.float32), into.after_LUC, into.after_ranks_LUC
    )
    rare_LR = np.full((num_layers, num_ranks), 1 / num_ranks, np.float32)
    prices_LR = np.zeros((num_layers, num_ranks), np.float32)
    temperature_L = np.ones(num_layers, np.float32)
    priced_U, traffic_U = _priced_ids(weight_U)
    # Over many ranks sums take long to move: counts are whole numbers in single precision too.
    dtype = np.float32 if num_ranks > MANY_RANKS else np.float64
    sums_UR, after_UR = (np.empty((len(groups.ids_U), num_ranks), dtype) for groups in (counted, after))
    for layer in range(num_layers):
        ids_TK, hosts_ER = batch.expert_ids_TLK[:, layer], hosts_LER[layer]
        counted.share_sums_UR(ids_TK, hosts_ER, out=sums_UR)
        if len(tokens_U):
            rare_LR[layer] = (tokens_U**-0.5).astype(dtype) @ sums_UR / (tokens_U**0.5).sum()
        rare_R = rare_LR[layer]
        prior = rare_R if ridge is None else ridge.prior_UR(sums_UR / tokens_U[:, None], rare_R, ids_U)
        rows = _Smoothed(sums_UR, place_U, weight_U, prior)
        _store(own, layer, rows)
        after.share_sums_UR(ids_TK, hosts_ER, out=after_UR)
        _store(successors, layer, _Smoothed(after_UR, np.arange(len(after_UR)), after.weight_U, rare_R))
        if len(tokens_U):
            prices_LR[layer], temperature_L[layer] = capped_prices(
                rows.of(priced_U), traffic_U, cap=TRAFFIC_CAP, sweeps=PRICE_SWEEPS, cooling=PRICE_COOLING
            )
        step()
    return TokenTable(own, successors, rare_LR, prices_LR, temperature_L)


class Shares(NamedTuple):
    """The arrays of a table's rows, to be filled: float16 and uint16 [L, U, C]. Where all ranks are
    stored, in order, arrays of ranks are empty."""

    own_LUC: np.ndarray
    own_ranks_LUC: np.ndarray
    after_LUC: np.ndarray
    after_ranks_LUC: np.ndarray

    @classmethod
    def of(
        cls,
        shape_LR: tuple[int, int],
        sizes_U: tuple[int, int],
        new: Callable[..., np.ndarray],
        max_candidates: int = MAX_CANDIDATES,
    ) -> "Shares":
        """Of L layers and R ranks, and as many rows by id and after ids; `new` makes an array of a
        shape and type."""
        (num_layers, num_ranks), arrays = shape_LR, []
        for size in sizes_U:
            shape = (num_layers, size, min(num_ranks, max_candidates))
            arrays += [new(shape, np.float16), new(shape if shape[2] < num_ranks else (0,), np.uint16)]
        return cls(*arrays)


def row_sizes(batch: TraceBatch, embedding_VD: np.ndarray | None) -> tuple[int, int]:
    """Rows that `build_token_table` will have, by id and after ids."""
    known = _Known.of(batch)
    num_after = len(np.unique(known.previous_T[known.is_rare_T]))
    return len(_table_ids(known.ids_U, embedding_VD)), num_after


def _table_ids(ids_U: np.ndarray, embedding_VD: np.ndarray | None) -> np.ndarray:
    """Ids of a table, ascending: those that were counted, and all that have an embedding."""
    return ids_U if embedding_VD is None else np.union1d(ids_U, np.arange(len(embedding_VD)))


class _Known(NamedTuple):
    """Rows of a batch whose token id is known."""

    rows_T: np.ndarray  # int64
    previous_T: np.ndarray  # id before each of them, -1 unknown
    tokens_T: np.ndarray  # float64: how often its own id occurs
    is_rare_T: np.ndarray  # bool: its id is rare enough to count in a successor row, and follows a known one
    ids_U: np.ndarray  # int64, ascending

    @classmethod
    def of(cls, batch: TraceBatch) -> "_Known":
        rows_T = np.flatnonzero(batch.token_ids_T >= 0)
        token_ids_T, previous_T = batch.token_ids_T[rows_T], previous_token_ids_T(batch)[rows_T]
        ids_U, tokens_U = np.unique(token_ids_T, return_counts=True)
        tokens_T = tokens_U.astype(np.float64)[np.searchsorted(ids_U, token_ids_T)]
        is_rare_T = (previous_T >= 0) & (tokens_T <= RARE_TOKENS)
        return cls(rows_T, previous_T, tokens_T, is_rare_T, ids_U.astype(np.int64))

    def groups(self, batch: TraceBatch) -> "tuple[_Groups, _Groups]":
        """The rows by id and, rare ones, by the id before them."""
        rare_T = self.rows_T[self.is_rare_T]
        after = _Groups.of(self.previous_T[self.is_rare_T], rare_T, self.tokens_T[self.is_rare_T] ** -0.5)
        return _Groups.of(batch.token_ids_T[self.rows_T], self.rows_T, None), after


class _Smoothed(NamedTuple):
    """Rows of a table, made block by block: a table of all ids by all ranks is large."""

    sums_VR: np.ndarray  # of ids that were counted
    place_V: np.ndarray  # of each of them among the ids of the table, ascending
    weight_U: np.ndarray
    prior: np.ndarray  # [R] or [U, R]

    def of(self, chosen_U: np.ndarray) -> np.ndarray:
        """Averages of some ids (int, any order) with the weight of PRIOR_TOKENS tokens on the
        prior, of the sums' dtype."""
        if len(self.place_V) == len(self.weight_U):
            shares_UR = self.sums_VR.take(chosen_U, axis=0)
        else:
            at_U = np.searchsorted(self.place_V, chosen_U)
            counted_U = at_U < len(self.place_V)
            counted_U[counted_U] = self.place_V[at_U[counted_U]] == chosen_U[counted_U]
            shares_UR = np.zeros((len(chosen_U), self.sums_VR.shape[1]), self.sums_VR.dtype)
            shares_UR[counted_U] = self.sums_VR[at_U[counted_U]]
        shares_UR += PRIOR_TOKENS * (self.prior if self.prior.ndim == 1 else self.prior[chosen_U])
        shares_UR /= (self.weight_U[chosen_U] + PRIOR_TOKENS)[:, None].astype(shares_UR.dtype)
        return shares_UR


class _Groups(NamedTuple):
    """Rows of a batch in order of a group id, with a weight each."""

    ids_U: np.ndarray  # int64 [U], ascending
    weight_U: np.ndarray  # float64 [U]: sum of the weights of its rows
    rows_T: np.ndarray  # rows of the batch, by group
    group_T: np.ndarray  # index of the group, ascending
    weight_T: np.ndarray | None  # None: 1 each

    @classmethod
    def of(cls, key_T: np.ndarray, rows_T: np.ndarray, weight_T: np.ndarray | None) -> "_Groups":
        ids_U, group_T = np.unique(key_T, return_inverse=True)
        order_T = np.argsort(group_T, kind="stable")
        sums_U = np.bincount(group_T, weight_T, len(ids_U)).astype(np.float64)
        weight_T = None if weight_T is None else weight_T[order_T]
        return cls(ids_U.astype(np.int64), sums_U, rows_T[order_T], group_T[order_T], weight_T)

    def share_sums_UR(self, ids_TK: np.ndarray, hosts_ER: np.ndarray, out: np.ndarray) -> None:
        """Weighted sum over each group's rows of the share of their activations on each rank, into
        `out`, float [U, R]."""
        ids_TK, top_k, columns = np.ascontiguousarray(ids_TK), ids_TK.shape[1], _Columns.of(hosts_ER)
        for first, last in self._blocks():
            begin, end = np.searchsorted(self.group_T, [first, last]).tolist()
            counts = np.zeros((last - first) * columns.width)
            for start in range(begin, end, BLOCK_ROWS):
                rows = slice(start, min(start + BLOCK_ROWS, end))
                place_T = (self.group_T[rows] - first) * columns.width
                weight_T = None if self.weight_T is None else self.weight_T[rows]
                counts += columns.counts(ids_TK.take(self.rows_T[rows], axis=0), place_T, weight_T, len(counts))
            counts_UX = counts.reshape(last - first, columns.width)[:, : columns.width - 1]
            if columns.by_rank:
                np.multiply(counts_UX, 1 / top_k, out=out[first:last], casting="same_kind")
            else:
                np.matmul(counts_UX, hosts_ER.astype(np.float64) / top_k, out=out[first:last])

    def _blocks(self) -> Iterator[tuple[int, int]]:
        """Groups that are counted at once, first and one after the last: of few rows, or one."""
        ends_U, first = np.searchsorted(self.group_T, np.arange(len(self.ids_U)), side="right"), 0
        while first < len(self.ids_U):
            begin = int(ends_U[first - 1]) if first else 0
            last = int(np.searchsorted(ends_U, begin + BLOCK_ROWS, side="right"))
            yield first, (last := min(max(last, first + 1), first + BLOCK_IDS))
            first = last


class _Columns(NamedTuple):
    """What a group's choices are counted by: ranks, where each has a copy of few experts or ranks
    are many; else experts. The last column is for what is none."""

    by_rank: bool
    width: int
    column_E: np.ndarray  # int64 [E + 1]: of each expert, and of an empty slot
    copies_E: np.ndarray  # int64 [E + 1]
    copy_CE: np.ndarray  # int64 [C, E + 1]: further columns

    @classmethod
    def of(cls, hosts_ER: np.ndarray) -> "_Columns":
        (num_experts, num_ranks), copies_E = hosts_ER.shape, np.append(hosts_ER.sum(axis=1), 0)
        if not ((copies_E[:-1] == 1).all() or num_ranks > MANY_RANKS):
            return cls(False, num_experts + 1, np.arange(num_experts + 1), copies_E, np.zeros((0, 0), np.int64))
        order_EC = np.argsort(~hosts_ER, axis=1, kind="stable")[:, : max(int(copies_E.max()), 1)]
        order_CE = np.append(order_EC, np.full((1, order_EC.shape[1]), num_ranks), axis=0).T
        return cls(True, num_ranks + 1, order_CE[0].copy(), copies_E, np.ascontiguousarray(order_CE[1:]))

    def counts(self, ids_TK: np.ndarray, place_T: np.ndarray, weight_T: np.ndarray | None, size: int) -> np.ndarray:
        """Counts by place and column, [size] in all; `place_T`: of each row."""
        top_k, ids = ids_TK.shape[1], ids_TK.reshape(-1).astype(np.intp)
        keys = self.column_E.take(ids)
        keys.reshape(ids_TK.shape)[...] += place_T[:, None]
        parts, choices, copied = [keys], [np.arange(len(ids))], np.flatnonzero(self.copies_E.take(ids) > 1)
        for copy, column_E in enumerate(self.copy_CE):
            copied = copied[self.copies_E.take(ids.take(copied)) > copy + 1]
            parts.append(column_E.take(ids.take(copied)) + place_T.take(copied // top_k))
            choices.append(copied)
        keys = np.concatenate(parts) if len(parts) > 1 else keys
        weights = None if weight_T is None else weight_T.take(np.concatenate(choices) // top_k)
        return np.bincount(keys, weights, size)


def _store(rows: ShareRows, layer: int, made: _Smoothed) -> None:
    """Put one layer's shares into the rows, the best candidates where not all ranks are stored."""
    count = rows.shares_LUC.shape[2]
    for first in range(0, len(rows.ids_U), BLOCK_IDS):
        block = slice(first, first + BLOCK_IDS)
        shares_UR = made.of(np.arange(len(rows.ids_U))[block])
        if rows.ranks_LUC.size == 0:
            rows.shares_LUC[layer, block] = shares_UR
            continue
        best_UC = best_ranks(shares_UR, count)
        rows.ranks_LUC[layer, block] = best_UC
        rows.shares_LUC[layer, block] = np.take_along_axis(shares_UR, best_UC, axis=1)


def best_ranks(shares_UR: np.ndarray, count: int) -> np.ndarray:
    """The ranks of the `count` largest shares of each row, int64 [U, count], ascending.

    Shares, none below 0, are compared without their last bits, which hold the rank: to a part in
    2^23 / R, finer than they are stored. Whole numbers are divided ten times as fast as places.
    """
    num_ranks = shares_UR.shape[1]
    bits = np.uint32((num_ranks - 1).bit_length())
    keys_UR = shares_UR.astype(np.float32).view(np.uint32)
    keys_UR >>= bits
    keys_UR <<= bits
    keys_UR |= np.arange(num_ranks, dtype=np.uint32)
    keys_UR.partition(num_ranks - count, axis=1)
    best_UC = keys_UR[:, num_ranks - count :] & np.uint32((1 << int(bits)) - 1)
    best_UC.sort(axis=1)
    return best_UC.astype(np.int64)


def _priced_ids(weight_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids that prices and temperature are computed from, at which no rank gets more than
    TRAFFIC_CAP x the mean traffic of the counted tokens, and the traffic of each.

    Of very many ids the heaviest and a regular sample of the others stand for all.
    """
    order_U = np.argsort(-weight_U, kind="stable")[: np.count_nonzero(weight_U)]
    head_U, tail_U = order_U[:PRICED_IDS], order_U[PRICED_IDS:]
    step = -(-len(tail_U) // PRICED_IDS) if len(tail_U) else 1
    chosen_U = np.concatenate([head_U, tail_U[::step]])
    traffic_U = weight_U[chosen_U].copy()
    traffic_U[len(head_U) :] *= step
    return chosen_U, traffic_U


@dataclass(frozen=True, eq=False)
class EmbeddingRidge:
    """Ridge regression from the token embedding to shares per rank, over the ids seen."""

    features_VD: np.ndarray  # float32, centred, with a constant column
    seen_U: np.ndarray  # bool: ids seen that have an embedding
    solve_DU: np.ndarray  # targets of those ids to weights

    @classmethod
    def fit(cls, embedding_VD: np.ndarray, ids_U: np.ndarray, tokens_U: np.ndarray) -> "EmbeddingRidge":
        """Prepare for the ids seen (int [U]) with their numbers of tokens."""
        seen_U = (ids_U >= 0) & (ids_U < len(embedding_VD))
        features_VD = embedding_VD.astype(np.float32)
        if seen_U.any():
            features_VD = features_VD - features_VD[ids_U[seen_U]].mean(axis=0)
        features_VD /= np.sqrt((features_VD**2).mean()) + 1e-9
        features_VD = np.hstack([features_VD, np.ones((len(features_VD), 1), np.float32)])
        # An id seen often is known better, but the variance between its contexts stays: the weight
        # saturates.
        weight_U = tokens_U[seen_U] / (tokens_U[seen_U] + PRIOR_TOKENS)
        seen_UD = features_VD[ids_U[seen_U]].astype(np.float64)
        size = seen_UD.shape[1]
        gram_DD = (seen_UD * weight_U[:, None]).T @ seen_UD + size * np.eye(size)
        return cls(features_VD, seen_U, np.linalg.solve(gram_DD, (seen_UD * weight_U[:, None]).T))

    def prior_UR(self, shares_UR: np.ndarray, rare_R: np.ndarray, ids_U: np.ndarray) -> np.ndarray:
        """Prior of each id of the table from the shares of the ids seen, float64 [U, R];
        `rare_R` where an id has no embedding."""
        weights_DR = self.solve_DU @ (shares_UR[self.seen_U] - rare_R)
        prior_UR = np.tile(rare_R.astype(np.float64), (len(ids_U), 1))
        has_U = (ids_U >= 0) & (ids_U < len(self.features_VD))
        prior_UR[has_U] += self.features_VD[ids_U[has_U]] @ weights_DR.astype(np.float32)
        return np.maximum(prior_UR, 0)
