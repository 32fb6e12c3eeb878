"""Which tokens tell by their id alone where their experts are, and which do not.

A table learned on some requests gives each token id its best rank per layer; on other requests, the
share of the id's activations that this rank hosts says how predictable the id is. 1 / R is what no
knowledge gives.

Shape letters: T tokens, L MoE layers, K top-k, E experts, R ranks, U ids.
"""

from typing import NamedTuple

import numpy as np

from semmoe.profiles.trace import TraceBatch


class Predictability(NamedTuple):
    ids_U: np.ndarray  # int32 [U], ids that are frequent enough on both sides
    tokens_U: np.ndarray  # int64 [U], rows that were scored
    share_U: np.ndarray  # float64 [U], share of their activations on the rank that the table named, mean over layers


def token_predictability(
    learn: TraceBatch, scored: TraceBatch, hosts_LER: np.ndarray, *, least_tokens: int = 10
) -> Predictability:
    """Predictability of every id with `least_tokens` rows in both batches, most predictable
    first. `hosts_LER`: bool [L, E, R].

    Parameters:
        learn, scored: batches to learn from and to score on, of the same layers.
        hosts_LER: bool [L, E, R], whether a rank hosts an expert.
        least_tokens: rows that an id needs in each of the two.
    """
    ids_U = _frequent(learn.token_ids_T, least_tokens)
    ids_U = np.intersect1d(ids_U, _frequent(scored.token_ids_T, least_tokens))
    if not len(ids_U):
        return Predictability(ids_U.astype(np.int32), np.zeros(0, np.int64), np.zeros(0))
    hits_U, total_U = np.zeros(len(ids_U)), np.zeros(len(ids_U))
    learn_U, scored_U = _index(learn.token_ids_T, ids_U), _index(scored.token_ids_T, ids_U)
    for layer, hosts_ER in enumerate(hosts_LER):
        table_UR, _ = _served_UR(learn, layer, learn_U, hosts_ER, len(ids_U))
        served_UR, activations_U = _served_UR(scored, layer, scored_U, hosts_ER, len(ids_U))
        hits_U += served_UR[np.arange(len(ids_U)), table_UR.argmax(1)]
        total_U += activations_U
    tokens_U = np.bincount(scored_U[scored_U >= 0], minlength=len(ids_U))
    share_U = hits_U / np.maximum(total_U, 1)
    order = np.lexsort((ids_U, -share_U))
    return Predictability(ids_U[order].astype(np.int32), tokens_U[order], share_U[order])


def _frequent(token_ids_T: np.ndarray, least: int) -> np.ndarray:
    """Ids with at least `least` rows, ascending."""
    ids_U, count_U = np.unique(token_ids_T[token_ids_T >= 0], return_counts=True)
    return ids_U[count_U >= least]


def _index(token_ids_T: np.ndarray, ids_U: np.ndarray) -> np.ndarray:
    """Index of each row's id in the ascending ids, int64 [T]; -1 where it is none of them."""
    index_T = np.minimum(np.searchsorted(ids_U, token_ids_T), len(ids_U) - 1)
    return np.where(ids_U[index_T] == token_ids_T, index_T, -1)


def _served_UR(
    batch: TraceBatch, layer: int, index_T: np.ndarray, hosts_ER: np.ndarray, num_ids: int
) -> tuple[np.ndarray, np.ndarray]:
    """Activations of each id that each rank hosts, float64 [U, R], and all its activations,
    int64 [U]."""
    num_experts = len(hosts_ER)
    known_T = index_T >= 0
    keys_TK = index_T[known_T, None] * (num_experts + 1) + batch.expert_ids_TLK[known_T, layer]
    counts = np.bincount(keys_TK.reshape(-1), minlength=num_ids * (num_experts + 1))
    counts_UE = counts.reshape(num_ids, -1)[:, :num_experts]
    return counts_UE @ hosts_ER.astype(np.float64), counts_UE.sum(1)
