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

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from semmoe.profiles.trace import TraceBatch
from semmoe.solvers.schedule.token_table import PRIOR_TOKENS, ShareRows, TokenTable, previous_token_ids_T
from semmoe.solvers.schedule.transport import capped_prices

MAX_CANDIDATES = 8
TRAFFIC_CAP = 1.05
PRICE_SWEEPS = 24
PRICE_COOLING = 0.1  # last temperature over the spread of the shares
RARE_TOKENS = 64  # successor rows are counted from ids with at most this many occurrences: others need no prior
PRICED_IDS = 4_096  # ids that prices are computed from, and as many for all others
BLOCK_IDS = 16_384  # ids counted at a time: bounds the memory of [ids, E] counts
BLOCK_ROWS = 32_768  # rows whose keys stay in the cache of one core


def build_token_table(
    batch: TraceBatch,
    hosts_LER: np.ndarray,
    *,
    embedding_VD: np.ndarray | None = None,
    max_candidates: int = MAX_CANDIDATES,
    step: Callable[[], None] = lambda: None,
) -> TokenTable:
    """Table counted on the rows of the batch whose token id is known.

    Parameters:
        hosts_LER: bool [L, E, R], whether a rank hosts an expert
        embedding_VD: float [V, D], the model's input embedding; all V ids then get a row
        max_candidates: ranks that are stored for each row, at most
        step: called at every layer that is done
    """
    num_layers, _, num_ranks = hosts_LER.shape
    token_ids_T, previous_T = batch.token_ids_T, previous_token_ids_T(batch)
    known_T = np.flatnonzero(token_ids_T >= 0)
    counted = _Groups.of(token_ids_T, known_T, None)
    tokens_U = counted.weight_U.astype(np.float64)
    tokens_T = tokens_U[np.searchsorted(counted.ids_U, token_ids_T[known_T])]
    rare_T = (previous_T[known_T] >= 0) & (tokens_T <= RARE_TOKENS)
    after = _Groups.of(previous_T, known_T[rare_T], tokens_T[rare_T] ** -0.5)
    ids_U = counted.ids_U
    if embedding_VD is not None:
        ids_U = np.union1d(ids_U, np.arange(len(embedding_VD)))
    place_U = np.searchsorted(ids_U, counted.ids_U)
    weight_U = np.zeros(len(ids_U))
    weight_U[place_U] = tokens_U
    ridge = None if embedding_VD is None else EmbeddingRidge.fit(embedding_VD, counted.ids_U, tokens_U)

    candidates = min(num_ranks, max_candidates)
    own = _empty_rows(ids_U, weight_U, num_layers, candidates, num_ranks)
    successors = _empty_rows(after.ids_U, after.weight_U, num_layers, candidates, num_ranks)
    rare_LR = np.full((num_layers, num_ranks), 1 / num_ranks, np.float32)
    prices_LR = np.zeros((num_layers, num_ranks), np.float32)
    temperature_L = np.ones(num_layers, np.float32)
    for layer in range(num_layers):
        ids_TK, hosts_ER = batch.expert_ids_TLK[:, layer], hosts_LER[layer]
        sums_UR = counted.share_sums_UR(ids_TK, hosts_ER)
        if len(tokens_U):
            rare_LR[layer] = tokens_U**-0.5 @ sums_UR / (tokens_U**0.5).sum()
        rare_R = rare_LR[layer]
        prior_UR = rare_R if ridge is None else ridge.prior_UR(sums_UR / tokens_U[:, None], rare_R, ids_U)
        all_sums_UR = np.zeros((len(ids_U), num_ranks))
        all_sums_UR[place_U] = sums_UR
        shares_UR = smoothed(all_sums_UR, weight_U, prior_UR)
        _store(own, layer, shares_UR)
        _store(successors, layer, smoothed(after.share_sums_UR(ids_TK, hosts_ER), after.weight_U, rare_R))
        if len(tokens_U):
            prices_LR[layer], temperature_L[layer] = _traffic_prices(shares_UR, weight_U)
        step()
    return TokenTable(own, successors, rare_LR, prices_LR, temperature_L)


def smoothed(sums_UR: np.ndarray, weight_U: np.ndarray, prior_UR: np.ndarray) -> np.ndarray:
    """Averages with the weight of PRIOR_TOKENS tokens on the prior ([R] or [U, R]), float64 [U,
    R]."""
    return (sums_UR + PRIOR_TOKENS * prior_UR) / (weight_U + PRIOR_TOKENS)[:, None]


class _Groups(NamedTuple):
    """Rows of a batch in order of a group id, with a weight each."""

    ids_U: np.ndarray  # int64 [U], ascending
    weight_U: np.ndarray  # float64 [U]: sum of the weights of its rows
    rows_T: np.ndarray  # rows of the batch, by group
    group_T: np.ndarray  # index of the group, ascending
    weight_T: np.ndarray | None  # None: 1 each

    @classmethod
    def of(cls, key_of_row: np.ndarray, rows_T: np.ndarray, weight_T: np.ndarray | None) -> "_Groups":
        ids_U, group_T = np.unique(key_of_row[rows_T], return_inverse=True)
        order_T = np.argsort(group_T, kind="stable")
        sums_U = np.bincount(group_T, weight_T, len(ids_U)).astype(np.float64)
        weight_T = None if weight_T is None else weight_T[order_T]
        return cls(ids_U.astype(np.int64), sums_U, rows_T[order_T], group_T[order_T], weight_T)

    def share_sums_UR(self, ids_TK: np.ndarray, hosts_ER: np.ndarray) -> np.ndarray:
        """Weighted sum over each group's rows of the share of their activations on each rank,
        float64 [U, R]."""
        (num_experts, num_ranks), top_k = hosts_ER.shape, ids_TK.shape[1]
        sums_UR = np.empty((len(self.ids_U), num_ranks))
        ids_TK = np.ascontiguousarray(ids_TK)
        if (hosts_ER.sum(axis=1) == 1).all():
            # Every expert on one rank: ranks are counted at once, a column more for empty slots.
            column_of_E, width = np.append(hosts_ER.argmax(axis=1), num_ranks).astype(np.int16), num_ranks + 1
            hosts = np.eye(num_ranks) / top_k
        else:
            column_of_E, width = np.arange(num_experts + 1, dtype=np.int32), num_experts + 1
            hosts = hosts_ER.astype(np.float64) / top_k
        for first in range(0, len(self.ids_U), BLOCK_IDS):
            last = min(first + BLOCK_IDS, len(self.ids_U))
            begin, end = np.searchsorted(self.group_T, [first, last]).tolist()
            counts = np.zeros((last - first) * width)
            for start in range(begin, end, BLOCK_ROWS):
                # The counts of a run of rows, which are in order of their groups, reach over few
                # groups.
                rows = slice(start, min(start + BLOCK_ROWS, end))
                group_T = self.group_T[rows]
                keys_TK = (
                    column_of_E.take(ids_TK.take(self.rows_T[rows], axis=0)) + ((group_T - group_T[0]) * width)[:, None]
                )
                weights = None if self.weight_T is None else np.repeat(self.weight_T[rows], top_k)
                found = np.bincount(keys_TK.reshape(-1), weights)
                at = int(group_T[0] - first) * width
                counts[at : at + len(found)] += found
            sums_UR[first:last] = counts.reshape(last - first, width)[:, : len(hosts)] @ hosts
        return sums_UR


def _empty_rows(ids_U: np.ndarray, weight_U: np.ndarray, num_layers: int, candidates: int, num_ranks: int) -> ShareRows:
    shape = (num_layers, len(ids_U), candidates)
    ranks_LUC = np.zeros(shape if candidates < num_ranks else (0,), np.uint16)
    return ShareRows(ids_U.astype(np.int32), weight_U.astype(np.float32), np.zeros(shape, np.float16), ranks_LUC)


def _store(rows: ShareRows, layer: int, shares_UR: np.ndarray) -> None:
    """Put one layer's shares into the rows, the best candidates where not all ranks are stored."""
    if len(rows.ids_U) == 0:
        return
    if rows.ranks_LUC.size == 0:
        rows.shares_LUC[layer] = shares_UR
        return
    count = rows.shares_LUC.shape[2]
    best_UC = np.sort(np.argpartition(-shares_UR, count - 1, axis=1)[:, :count], axis=1)
    rows.ranks_LUC[layer] = best_UC
    rows.shares_LUC[layer] = np.take_along_axis(shares_UR, best_UC, axis=1)


def _traffic_prices(shares_UR: np.ndarray, weight_U: np.ndarray) -> tuple[np.ndarray, float]:
    """Prices and temperature at which no rank gets more than TRAFFIC_CAP x the mean traffic of the
    counted tokens.

    Of very many ids the heaviest and a regular sample of the others stand for all.
    """
    order_U = np.argsort(-weight_U, kind="stable")[: np.count_nonzero(weight_U)]
    head_U, tail_U = order_U[:PRICED_IDS], order_U[PRICED_IDS:]
    step = -(-len(tail_U) // PRICED_IDS) if len(tail_U) else 1
    chosen_U = np.concatenate([head_U, tail_U[::step]])
    sample_UR, traffic_U = shares_UR[chosen_U], weight_U[chosen_U].copy()
    traffic_U[len(head_U) :] *= step
    return capped_prices(sample_UR, traffic_U, cap=TRAFFIC_CAP, sweeps=PRICE_SWEEPS, cooling=PRICE_COOLING)


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
