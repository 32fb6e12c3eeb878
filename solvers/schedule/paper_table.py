"""The paper's device-sequence table (arXiv 2503.04398, intra-request scheduling), kept as a
reference for comparison.

A[l][d1, d2]: the rank that most tokens need at layer l if they needed rank d1 at layer l - 1 and d2
at l - 2, and A_p its confidence, the share of those tokens. The paper sends a token to T[l][v]
where T_p > A_p and to A otherwise. "Needed" is the rank that serves most of the token's experts,
the lowest of equals. The paper leaves open what T_p and A_p measure; here both are shares between 0
and 1.

Shape letters: T tokens, L MoE layers, K top-k, E experts, R ranks.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class SequenceTable:
    """rank_LRR[l, d1, d2] int16 and its confidence float16. Confidence 0: never seen, and at the
    first two layers."""

    rank_LRR: np.ndarray
    confidence_LRR: np.ndarray


def needed_rank_T(expert_ids_TK: np.ndarray, hosts_ER: np.ndarray) -> np.ndarray:
    """Rank that hosts most of each token's experts, int64 [T]."""
    return served_TR(expert_ids_TK, hosts_ER).argmax(axis=1)


def served_TR(expert_ids_TK: np.ndarray, hosts_ER: np.ndarray) -> np.ndarray:
    """Share of each token's K choices that rank r hosts, float32 [T, R]. Id E (empty slot) is
    hosted nowhere."""
    share_ER = np.pad(hosts_ER, ((0, 1), (0, 0))).astype(np.float32) / expert_ids_TK.shape[1]
    served = share_ER[expert_ids_TK[:, 0]]
    for column in range(1, expert_ids_TK.shape[1]):
        served += share_ER[expert_ids_TK[:, column]]
    return served


def build_sequence_table(expert_ids_TLK: np.ndarray, hosts_LER: np.ndarray) -> SequenceTable:
    """Table counted on the tokens of a profile."""
    num_layers, _, num_ranks = hosts_LER.shape
    rank_LRR = np.zeros((num_layers, num_ranks, num_ranks), np.int16)
    confidence_LRR = np.zeros((num_layers, num_ranks, num_ranks), np.float16)
    before_T, last_T = None, None
    for layer in range(num_layers):
        now_T = needed_rank_T(expert_ids_TLK[:, layer], hosts_LER[layer])
        if last_T is not None and before_T is not None:
            keys_T = (last_T * num_ranks + before_T) * num_ranks + now_T
            counts_RRR = np.bincount(keys_T, minlength=num_ranks**3).reshape(num_ranks, num_ranks, num_ranks)
            rank_LRR[layer] = counts_RRR.argmax(axis=2)
            confidence_LRR[layer] = counts_RRR.max(axis=2) / np.maximum(counts_RRR.sum(axis=2), 1)
        before_T, last_T = last_T, now_T
    return SequenceTable(rank_LRR, confidence_LRR)


def paper_scores_TR(
    table_TR: np.ndarray, known_T: np.ndarray, rank_T: np.ndarray, confidence_T: np.ndarray
) -> np.ndarray:
    """Scores whose best rank is the paper's choice, float32 [T, R]; the token table ranks the
    others, for the overflow.

    `table_TR`: shares of the token table, whose largest is T_p; `known_T`: ids with a row;
    `rank_T`, `confidence_T`: entries of A.

    Parameters:
        table_TR: shares of the token table, float [T, R], whose largest is T_p.
        known_T: bool [T], ids with a row.
        rank_T, confidence_T: int and float [T], entries of A.
    """
    scores_TR = table_TR.astype(np.float32)
    confident_T = np.where(known_T, scores_TR.max(axis=1), 0)
    follow = np.flatnonzero(confident_T <= confidence_T)
    scores_TR[follow, rank_T[follow]] = 1 + confidence_T[follow]
    return scores_TR
