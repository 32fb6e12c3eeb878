"""Request scorer for Attention-DP: from a prompt, which rank a request should live on.

A request stays on one rank for all layers, so its worth on a rank is the share of its activations
there, averaged over the layers. That share is predicted from the prompt by ridge regression on two
views of its token ids. Topics: which ids occur, rare ones weighted up, projected on the leading
singular vectors of the training sequences (latent semantic analysis, Deerwester 1990), so that
words which keep the same company count as one and a prompt of unseen words still points somewhere.
Manner: how often each id occurs, against the average prompt; the frequent ids tell code from prose
and questions of one kind from another. Both views have unit length: a long prompt is not a stronger
one. The regression is solved in its dual form over requests, which leaves plain weights per id,
topic and rank. Summing the token table over the prompt, as the paper does (arXiv 2503.04398,
inter-request scheduling), finds less: the common ids outvote the telling ones
(docs/experiments.md).

Online: D + R + 1 float32 per distinct id of the prompt are read, for 2 * (D + R) flops each.

Shape letters: B requests, Q documents, V ids, D topics, R ranks, L MoE layers, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from semmoe.profiles.counts import request_expert_BE, request_rows
from semmoe.profiles.trace import TraceBatch
from semmoe.solvers.schedule.ridge import solve_positive

Sparse = Any  # scipy.sparse.csr_array, most of whose methods its type stubs lack
RIDGE = 0.6
TOPICS = 48
POWER = 0.7  # of an id's frequency in a document
MAX_REQUESTS = 2_048  # documents of the dual problem: twice as many
BLOCK_REQUESTS = 1_024  # whose experts are counted at a time


@dataclass(frozen=True, eq=False)
class RequestScorer:
    """Topics and weights per token id.

    Fields:
        ids_V: int32 [V], ascending; other ids say nothing.
        topic_VD: float32 [V, D], what an id that occurs adds to the topics of a prompt.
        topic_DR: float32 [D, R], weight of the topics at unit length.
        mean_V: float32 [V], power of the frequency, in the average prompt.
        weight_VR: float32 [V, R], weight of what differs from it, at unit length.

    Source: solvers/schedule/request_scorer.py; docs/method.md.
    """

    ids_V: np.ndarray
    topic_VD: np.ndarray
    topic_DR: np.ndarray
    mean_V: np.ndarray
    weight_VR: np.ndarray

    def scores_BR(self, prompts: Sequence[np.ndarray]) -> np.ndarray:
        """Predicted share of each request's activations on each rank, less the average request's,
        float64 [B, R]. Zeros where no id is known.

        `prompts`: B arrays of token ids, integers [T] each.
        """
        counts_BV = count_ids(prompts, self.ids_V)
        used = np.unique(counts_BV.indices)  # few of the ids
        topics_BD = unit(occurs(counts_BV)[:, used] @ self.topic_VD[used].astype(np.float64))
        manner_BV = powers(counts_BV)
        mean_V, weight_VR = self.mean_V.astype(np.float64), self.weight_VR.astype(np.float64)
        # |h - mean| without a dense row of V numbers per prompt.
        square_B = manner_BV.power(2).sum(axis=1) - 2 * (manner_BV @ mean_V) + mean_V @ mean_V
        manner_BR = (manner_BV @ weight_VR - mean_V @ weight_VR) / np.sqrt(np.maximum(square_B, 1e-24))[:, None]
        known_B = np.diff(counts_BV.indptr) > 0
        return np.where(known_B[:, None], topics_BD @ self.topic_DR.astype(np.float64) + manner_BR, 0.0)


def request_shares_BR(batch: TraceBatch, hosts_LER: np.ndarray, requests_B: np.ndarray | None = None) -> np.ndarray:
    """Share of each request's activations that rank r could serve, averaged over layers, float64
    [B, R]; zeros for no rows.

    `requests_B`: only of these (ascending numbers).
    """
    num_layers, num_experts, num_ranks = hosts_LER.shape
    requests_B = np.arange(batch.num_requests) if requests_B is None else requests_B
    served_BR = np.zeros((len(requests_B), num_ranks))
    for first in range(0, len(requests_B), BLOCK_REQUESTS):
        # Counts of every expert are kept for a block of requests only.
        block = slice(first, first + BLOCK_REQUESTS)
        rows_T, request_T = request_rows(batch, requests_B[block])
        for layer in range(num_layers):
            ids_TK = batch.expert_ids_TLK[:, layer][rows_T]
            counts_BE = request_expert_BE(request_T, ids_TK, len(requests_B[block]), num_experts)
            served_BR[block] += counts_BE.astype(np.float64) @ hosts_LER[layer] / num_layers
    activations_B = np.diff(batch.starts_B1)[requests_B] * batch.expert_ids_TLK.shape[2]
    return served_BR / np.maximum(activations_B, 1)[:, None]


def fit_request_scorer(batch: TraceBatch, hosts_LER: np.ndarray, *, seed: int, ridge: float = RIDGE) -> RequestScorer:
    """Scorer fitted on the requests of the batch whose token ids are known; an empty one where none
    are.

    Every request gives two documents with the same target: its prompt, and its whole sequence.

    Parameters:
        batch: requests with token ids.
        hosts_LER: bool [L, E, R], whether a rank hosts an expert.
        seed: of the choice of requests, where there are more than MAX_REQUESTS.
        ridge: of the regression.
    """
    known = [
        b for b in range(batch.num_requests) if batch.starts_B1[b + 1] > batch.starts_B1[b] and batch.prompt(b).size
    ]
    if len(known) > MAX_REQUESTS:
        known = sorted(np.random.default_rng(seed).choice(known, MAX_REQUESTS, replace=False))
    num_ranks = hosts_LER.shape[2]
    if not known:
        nothing = [np.zeros(shape, np.float32) for shape in ((0, 1), (1, num_ranks), (0,), (0, num_ranks))]
        return RequestScorer(np.zeros(0, np.int32), *nothing)
    tokens_B = np.diff(batch.starts_B1)[known].astype(np.float64)
    shares_BR = request_shares_BR(batch, hosts_LER, np.array(known))
    target_BR = shares_BR - np.average(shares_BR, axis=0, weights=tokens_B)
    prompts, sequences = [batch.prompt(b) for b in known], [batch.sequence(b) for b in known]
    ids_V = np.unique(np.concatenate(sequences))
    counts_QV = count_ids(prompts + sequences, ids_V)
    # 1. Topics of all documents, from the whole sequences.
    topic_VD = topics_of_ids(occurs(counts_QV[len(known) :]))
    topics_QD = occurs(counts_QV) @ topic_VD
    lengths_Q = np.maximum(np.linalg.norm(topics_QD, axis=1), 1e-12)
    # 2. Their manner, against the average document of their own kind (prompts, sequences).
    manner_QV = powers(counts_QV)
    gram_QQ = (manner_QV @ manner_QV.T).toarray()
    for half in (slice(len(known)), slice(len(known), None)):
        gram_QQ[half] -= gram_QQ[half].mean(axis=0)
    for half in (slice(len(known)), slice(len(known), None)):
        gram_QQ[:, half] -= gram_QQ[:, half].mean(axis=1, keepdims=True)
    norms_Q = np.sqrt(np.maximum(np.diagonal(gram_QQ), 1e-24))
    gram_QQ /= norms_Q
    gram_QQ /= norms_Q[:, None]
    # 3. A request's share is an average over its tokens: long requests are known better.
    noise_Q = np.tile(tokens_B.mean() / tokens_B, 2)
    topics_unit_QD = unit(topics_QD)
    gram_QQ += topics_unit_QD @ topics_unit_QD.T
    gram_QQ[np.diag_indices(len(gram_QQ))] += ridge * noise_Q
    dual_QR = solve_positive(gram_QQ, np.tile(target_BR, (2, 1)))
    return RequestScorer(
        ids_V=ids_V.astype(np.int32),
        topic_VD=topic_VD.astype(np.float32),
        topic_DR=(topics_QD.T @ (dual_QR / lengths_Q[:, None])).astype(np.float32),
        mean_V=manner_QV[: len(known)].mean(axis=0).astype(np.float32),
        weight_VR=(manner_QV.T @ centred(dual_QR / norms_Q[:, None])).astype(np.float32),
    )


def topics_of_ids(occurs_BV: Sparse) -> np.ndarray:
    """Leading right singular vectors of the documents, times each id's inverse document frequency,
    float64 [V, D].

    A document is the inverse frequencies of its ids at unit length.
    """
    from scipy.linalg import eigh
    from scipy.sparse import diags_array

    num_documents = occurs_BV.shape[0]
    idf_V = np.log((1 + num_documents) / (1 + occurs_BV.sum(axis=0)))
    weighted_BV = occurs_BV @ diags_array(idf_V)
    lengths_B = np.sqrt(weighted_BV.power(2).sum(axis=1))
    weighted_BV = diags_array(1 / np.maximum(lengths_B, 1e-12)) @ weighted_BV
    first = max(0, num_documents - TOPICS)
    values_D, vectors_BD = eigh(
        (weighted_BV @ weighted_BV.T).toarray(), subset_by_index=[first, num_documents - 1], driver="evr"
    )
    kept_D = values_D > 1e-9 * max(float(values_D[-1]), 1e-9)
    scale_D = np.where(kept_D, 1 / np.sqrt(np.where(kept_D, values_D, 1.0)), 0.0)
    return (weighted_BV.T @ (vectors_BD * scale_D)) * idf_V[:, None]


def count_ids(documents: Sequence[np.ndarray], ids_V: np.ndarray) -> Sparse:
    """How often each document has each id of `ids_V` (ascending), sparse float64 [Q, V]; other
    ids are left out."""
    from scipy.sparse import csr_array

    starts, columns, values = [0], [np.zeros(0, np.int64)], [np.zeros(0)]
    for document in documents:
        ids, counts = np.unique(document, return_counts=True)
        place = np.searchsorted(ids_V, ids)
        known = place < len(ids_V)
        known[known] = ids_V[place[known]] == ids[known]
        columns.append(place[known])
        values.append(counts[known].astype(np.float64))
        starts.append(starts[-1] + int(known.sum()))
    return csr_array((np.concatenate(values), np.concatenate(columns), starts), shape=(len(documents), len(ids_V)))


def occurs(counts_QV: Sparse) -> Sparse:
    """1 for each id that a document has."""
    return counts_QV.sign()


def powers(counts_QV: Sparse) -> Sparse:
    """Power of each id's share of the document's known ids."""
    lengths_Q = np.repeat(counts_QV.sum(axis=1), np.diff(counts_QV.indptr))
    found = counts_QV.copy()
    found.data = (counts_QV.data / lengths_Q) ** POWER
    return found


def unit(rows_QD: np.ndarray) -> np.ndarray:
    """Rows at length 1; rows of zeros stay."""
    return rows_QD / np.maximum(np.linalg.norm(rows_QD, axis=1, keepdims=True), 1e-12)


def centred(rows_Q: np.ndarray) -> np.ndarray:
    """Rows less the mean of their half: the first half are prompts, the second their sequences."""
    half = len(rows_Q) // 2
    return np.concatenate([part - part.mean(axis=0) for part in (rows_Q[:half], rows_Q[half:])])
