"""Contiguous placement: what every engine does without a plan. Expert e lives on rank e // (E / R).

Shape letters: L MoE layers, E experts, R ranks.
"""

import numpy as np


def place_contiguous(num_layers: int, num_experts: int, num_ranks: int) -> np.ndarray:
    """Rank of each expert, int64 [L, E]; the same at every layer."""
    return np.tile(np.arange(num_experts) // (num_experts // num_ranks), (num_layers, 1))
