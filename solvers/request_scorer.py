"""Request scorer for Attention-DP: one table [V, R] that says from a prompt which rank a request should live on.

A request stays on one rank for all layers, so its worth on a rank is the share of its activations there, averaged over the layers. That
share is predicted from the prompt by ridge regression on bags of token ids (logarithmic counts, rare ids weighted up, unit length), solved
in its dual form over requests, which leaves a plain weight per id and rank. Summing the token table over the prompt, as the paper does
(arXiv 2503.04398, inter-request scheduling), finds less: the common ids outvote the telling ones (docs/experiments.md).

Online: one gather of R float32 and one idf per distinct prompt id, 2 * R + 4 flops each.

Shape letters: B requests, Q documents, V ids, R ranks, L MoE layers, E experts.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from profiles.counts import request_expert_BE
from profiles.trace import TraceBatch

if TYPE_CHECKING:
    from scipy.sparse import csr_array

RIDGE = 1.0
MAX_REQUESTS = 2_048  # documents of the dual problem: twice as many


@dataclass(frozen=True, eq=False)
class RequestScorer:
    """Weights per id and rank. Ids that are not in `ids_V` (ascending) say nothing."""

    ids_V: np.ndarray  # int32 [V]
    idf_V: np.ndarray  # float32 [V]
    weight_VR: np.ndarray  # float32 [V, R]: idf times the ridge weight

    def scores_R(self, prompt: np.ndarray) -> np.ndarray:
        """Predicted share of the request's activations on each rank, less the average request's, float64 [R]. Zeros for no known id."""
        ids, counts = np.unique(prompt, return_counts=True)
        place = np.searchsorted(self.ids_V, ids)
        known = place < len(self.ids_V)
        known[known] = self.ids_V[place[known]] == ids[known]
        weights, place = 1 + np.log(counts[known]), place[known]
        length = np.sqrt(((weights * self.idf_V[place]) ** 2).sum())
        if length == 0:
            return np.zeros(self.weight_VR.shape[1])
        return weights @ self.weight_VR[place] / length


def request_shares_BR(batch: TraceBatch, hosts_LER: np.ndarray) -> np.ndarray:
    """Share of each request's activations that rank r could serve, averaged over layers, float64 [B, R]; zeros for no rows."""
    num_layers, num_experts, num_ranks = hosts_LER.shape
    request_of_T = batch.request_of_T
    served_BR = np.zeros((batch.num_requests, num_ranks))
    for layer in range(num_layers):
        counts_BE = request_expert_BE(request_of_T, batch.expert_ids_TLK[:, layer], batch.num_requests, num_experts)
        served_BR += counts_BE @ hosts_LER[layer] / num_layers
    activations_B = np.diff(batch.starts_B1) * batch.expert_ids_TLK.shape[2]
    return served_BR / np.maximum(activations_B, 1)[:, None]


def fit_request_scorer(batch: TraceBatch, hosts_LER: np.ndarray, *, seed: int, ridge: float = RIDGE) -> RequestScorer:
    """Scorer fitted on the requests of the batch whose token ids are known; an empty one where none are.

    Every request gives two documents with the same target: its prompt, and its whole sequence.
    """
    known = [
        b for b in range(batch.num_requests) if batch.starts_B1[b + 1] > batch.starts_B1[b] and batch.prompt(b).size
    ]
    if len(known) > MAX_REQUESTS:
        known = sorted(np.random.default_rng(seed).choice(known, MAX_REQUESTS, replace=False))
    num_ranks = hosts_LER.shape[2]
    if not known:
        return RequestScorer(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros((0, num_ranks), np.float32))
    tokens_B = np.diff(batch.starts_B1)[known].astype(np.float64)
    shares_BR = request_shares_BR(batch, hosts_LER)[known]
    target_BR = shares_BR - np.average(shares_BR, axis=0, weights=tokens_B)
    prompts, sequences = [batch.prompt(b) for b in known], [batch.sequence(b) for b in known]
    ids_V = np.unique(np.concatenate(sequences))
    in_requests_V = np.bincount(
        np.concatenate([np.searchsorted(ids_V, np.unique(s)) for s in sequences]), minlength=len(ids_V)
    )
    idf_V = np.log((1 + len(known)) / (1 + in_requests_V))
    documents_QV = _bags(prompts + sequences, ids_V, idf_V)
    # A request's share is an average over its tokens: long requests are known better.
    noise_Q = np.tile(tokens_B.mean() / tokens_B, 2)
    gram_QQ = (documents_QV @ documents_QV.T).toarray() + ridge * np.diag(noise_Q)
    dual_QR = np.linalg.solve(gram_QQ, np.tile(target_BR, (2, 1)))
    weight_VR = (documents_QV.T @ dual_QR) * idf_V[:, None]
    return RequestScorer(ids_V.astype(np.int32), idf_V.astype(np.float32), weight_VR.astype(np.float32))


def _bags(documents: list[np.ndarray], ids_V: np.ndarray, idf_V: np.ndarray) -> "csr_array":
    """Documents as rows of unit length (or zero), sparse float64 [Q, V]. All their ids are in `ids_V`."""
    from scipy.sparse import csr_array

    starts, columns, values = [0], [], []
    for document in documents:
        ids, counts = np.unique(document, return_counts=True)
        place = np.searchsorted(ids_V, ids)
        row = (1 + np.log(counts)) * idf_V[place]
        columns.append(place)
        values.append(row / max(float(np.linalg.norm(row)), 1e-12))
        starts.append(starts[-1] + len(ids))
    return csr_array((np.concatenate(values), np.concatenate(columns), starts), shape=(len(documents), len(ids_V)))
