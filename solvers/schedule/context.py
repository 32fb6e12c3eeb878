"""Context predictor for Attention-TP: from what is known before layer l's router runs, a score per
rank for every token.

The experts a token chose at earlier layers say more about layer l than its id does. Features, all
known when the tokens are scattered: the share row of the token's id (token table), and what
solvers/schedule/features.py reads of its choices at the `depth` layers before, of the token before
it, and of its position in the request. Scores are linear in the one-hot features: one gather-sum.
Weights are fitted in solvers/schedule/context_fit.py.

Cost online, per token and layer: ((depth + 1) * K + 3) * R additions and as many float16 weights
read (depth 6, K 8, R 8: 472 additions, 0.9 kB), plus 2 * R * R flops for the share row. Weights:
((depth + 2) * E + 96) * R * 2 bytes per layer (34 kB at E 256, R 8, depth 6); in float32, twice
that, where runtime/serving/home_tables.py adds them up on the model's device.

Shape letters: T tokens, L MoE layers, E experts, R ranks, D depth (earlier layers), P phases
(prompt, generated), F features, Q ids of positions.
"""

from dataclasses import dataclass

import numpy as np

from semmoe.solvers.schedule.features import Places, Seen, choices_before

MAX_FEATURES = 1536  # depth * experts: bounds the F * F normal equations
MAX_DEPTH = 24


@dataclass(frozen=True, eq=False)
class ContextPredictor:
    """Weights of the linear score. Row E of an expert axis is zero: an empty slot, or a
    predecessor that is not known."""

    bias_LR: np.ndarray  # float32 [L, R]
    share_LRR: np.ndarray  # float32 [L, R, R]: share row (first R) to score
    own_LDER: np.ndarray  # float16 [L, D, E + 1, R]: D = 0 is the layer just before
    previous_LPER: np.ndarray  # float16 [L, 2, E + 1, R]: prompt tokens (layer l - 1), generated tokens (layer l)
    position_LQR: np.ndarray  # float16 [L, Q + 1, R]: row Q, an id that says nothing, is zero

    @property
    def depth(self) -> int:
        return self.own_LDER.shape[1]

    @property
    def places(self) -> Places:
        """Where `weight_LFR` has its features."""
        return Places(self.depth, self.own_LDER.shape[2] - 1)

    @property
    def weight_LFR(self) -> np.ndarray:
        """Weights of all one-hot features in one table, float32 [L, F, R]."""
        num_layers, num_ranks = self.bias_LR.shape
        parts = (self.own_LDER[:, ::-1], self.previous_LPER, self.position_LQR)
        return np.concatenate([part.reshape(num_layers, -1, num_ranks) for part in parts], axis=1).astype(np.float32)


def context_scores_TR(predictor: ContextPredictor, layer: int, shares_TR: np.ndarray, seen: Seen) -> np.ndarray:
    """Score of each rank as a home at a layer: the predicted share of activations.

    Parameters:
        shares_TR: float32 [T, R], rows of the token table
        seen: read at layers before `layer`, and at `layer` the token before a generated one

    Returns:
        scores_TR: float32 [T, R]
    """
    scores_TR = predictor.bias_LR[layer] + shares_TR @ predictor.share_LRR[layer]
    scores_TR += predictor.position_LQR[layer][seen.position_ids_TC].sum(axis=1, dtype=np.float32)
    for choices in choices_before(layer, predictor.depth):
        if choices.kind == "own":
            weight_ER = predictor.own_LDER[layer, choices.number].astype(np.float32)
            scores_TR += _summed_TR(weight_ER, seen.chosen_TLK[:, choices.layer])
        else:
            weight_ER = predictor.previous_LPER[layer, choices.number].astype(np.float32)
            rows = choices.rows(seen.is_prompt_T)
            scores_TR[rows] += _summed_TR(weight_ER, seen.previous_TLK[rows, choices.layer])
    return scores_TR


def _summed_TR(weight_ER: np.ndarray, ids_TK: np.ndarray) -> np.ndarray:
    """Weights of each token's choices, added in order, float32 [T, R]."""
    summed_TR = weight_ER[ids_TK[:, 0]]
    for ids_T in ids_TK.T[1:]:
        summed_TR += weight_ER[ids_T]
    return summed_TR


def default_depth(num_layers: int, num_experts: int) -> int:
    """How many earlier layers are read: all where experts are few, 6 of 256 experts."""
    return max(1, min(num_layers - 1, MAX_DEPTH, MAX_FEATURES // num_experts))
