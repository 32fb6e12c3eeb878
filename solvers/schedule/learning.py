"""Weights of the context predictor that go on learning while the model serves.

A predictor fitted on yesterday's requests knows little of a domain it never saw, yet every token
that runs shows which experts it chose. The weights W of its features are the ridge regression of
the residuals: they stay near the plan's weights P where nothing new is known,

    P + D = argmin over W  sum_t a^age(t) |served_t - x_t W|^2 + RIDGE |W - P|^2,  W = P + trust D

and only the sums x'x and x'(served - x P) of what was seen are kept: nothing of the plan's trace is
needed, no token is stored. The score of a token is always made by weights that never saw it, so the
corrections x D can be held against what then happened: `trust` is the regression of the misses on
them, near 1 on an unknown domain and near 0 where the plan's weights were right and D is noise.
Learned are the weights of the nearest earlier layers, the token before and the position; with all
layers instead it is hardly better (docs/experiments.md). runtime/serving/weight_learner.py is the
same on the ranks of a run.

Cost per layer and step: F^3 / 3 + T F^2 multiplications for T new tokens and F features, 617 at 64
experts and 868 at 256; 4 F^2 bytes are kept per layer (1.5 MB, 3 MB).

Shape letters: T tokens, K top-k, E experts, R ranks, X columns of ids, F features, C columns of
positions.
"""

from collections.abc import Sequence

import numpy as np

from semmoe.profiles.trace import TraceBatch
from semmoe.solvers.schedule.ridge import solve_positive

LEARNED_EXPERTS = 384  # earlier layers that learn, times experts: bounds the F * F equations
LEARNED_LAYERS = 6
BLOCK_TOKENS = 2_048  # whose pairs are counted at once
LEARN_EVERY = 512  # new tokens that are worth a step
MOST_STEPS = 16  # of a simulation; larger traces learn in larger groups, which understates a little
RIDGE = 100.0  # in tokens; locality is flat from 30 to 200
MOST_TRUST = 1.5
HALF_LIFE = 32_768  # tokens after which what was seen counts half: traffic drifts


def learned_depth(depth: int, num_experts: int) -> int:
    """How many of a predictor's `depth` earlier layers go on learning."""
    return max(1, min(depth, LEARNED_LAYERS, LEARNED_EXPERTS // num_experts))


def learned_scores_TR(
    scores_TR: np.ndarray, ids_TX: np.ndarray, served_TR: np.ndarray, num_features: int, groups: Sequence[np.ndarray]
) -> np.ndarray:
    """The plan's scores, corrected by what earlier groups of rows taught, float32 [T, R].

    `served_TR`: share of each token's activations that each rank hosts, read once the token's group
    is scored. `groups`: rows, in order of time.

    Parameters:
        scores_TR: the plan's, float [T, R].
        ids_TX: features of each row, integers [T, X] below `num_features`.
        served_TR: share of each token's activations that each rank hosts, float [T, R], read once
            the token's group is scored.
        num_features: of all columns.
        groups: rows, integers, in order of time.
    """
    from scipy.sparse import csr_array

    num_tokens, num_columns = ids_TX.shape
    starts = np.arange(0, num_tokens * num_columns + 1, num_columns)
    features_TF = csr_array((np.ones(ids_TX.size, np.float32), ids_TX.reshape(-1), starts), (num_tokens, num_features))
    learned_TR = scores_TR.astype(np.float32, copy=True)
    # Sums of counts are exact in float32 for millions of tokens, and the ridge keeps the equations
    # regular.
    gram_FF = np.zeros((num_features, num_features), np.float32)
    right_FR = np.zeros((num_features, scores_TR.shape[1]), np.float32)
    ridge_FF = RIDGE * np.eye(num_features, dtype=np.float32)
    agreed, corrected = 0.0, 0.0  # sums of correction * miss and of correction^2
    for number, rows in enumerate(groups):
        kept, new_TF = 0.5 ** (len(rows) / HALF_LIFE), features_TF[rows]
        missed_TR = served_TR[rows] - scores_TR[rows]
        if number:
            correction_TR = new_TF @ solve_positive(gram_FF + ridge_FF, right_FR)
            learned_TR[rows] += trust_in(agreed, corrected) * correction_TR
            # What all ranks share decides nothing.
            correction_TR -= correction_TR.mean(axis=1, keepdims=True)
            agreed = agreed * kept + float((correction_TR * missed_TR).sum())
            corrected = corrected * kept + float((correction_TR**2).sum())
        gram_FF *= np.float32(kept)
        gram_FF += pair_counts_FF(ids_TX[rows], num_features)
        right_FR = right_FR * kept + new_TF.T @ missed_TR
    return learned_TR


def pair_counts_FF(ids_TX: np.ndarray, num_features: int) -> np.ndarray:
    """Tokens that have both features, counted for every pair of columns, int64 [F, F]."""
    counts = np.zeros(num_features**2, np.int64)
    for start in range(0, len(ids_TX), BLOCK_TOKENS):
        block_TX = ids_TX[start : start + BLOCK_TOKENS].astype(np.int64)
        keys_TXX = block_TX[:, :, None] * num_features + block_TX[:, None, :]
        counts += np.bincount(keys_TXX.reshape(-1), minlength=len(counts))
    return counts.reshape(num_features, num_features)


def trust_in(agreed: float, corrected: float) -> float:
    """Weight of a correction, from the sums of correction * miss and of correction^2 so far; 1
    before there are any."""
    return min(max(agreed / corrected, 0.0), MOST_TRUST) if corrected > 0 else 1.0


def request_groups(batch: TraceBatch, rng: np.random.Generator) -> list[np.ndarray]:
    """Rows of a batch in groups of whole requests, in a random order of arrival, of at least
    LEARN_EVERY tokens each."""
    least = max(LEARN_EVERY, -(-batch.num_tokens // MOST_STEPS))
    groups, waiting, num_waiting = [], [], 0
    for request in rng.permutation(batch.num_requests):
        first, last = batch.starts_B1[request : request + 2].tolist()
        rows = np.arange(first, last)
        waiting.append(rows)
        num_waiting += len(rows)
        if num_waiting >= least:
            groups.append(np.concatenate(waiting))
            waiting, num_waiting = [], 0
    return [*groups, np.concatenate(waiting)] if num_waiting else groups
