"""One budget of moves shared by all layers: each layer gets the moves that gain most in all.

Shape letters: L MoE layers, M numbers of moves.
"""

import numpy as np


def shared_moves_L(gain_LM: np.ndarray, budget: int, *, price: float = 0.0) -> np.ndarray:
    """Moves of each layer, int64 [L], with the highest summed gain less the price of all moves;
    the fewest among equals.

    Exact: dynamic programming over the layers. `gain_LM`: gain of every layer at m moves, m from 0,
    non-decreasing. `budget`: moves in all.
    """
    num_layers, num_moves = gain_LM.shape
    budget = min(budget, num_layers * (num_moves - 1))
    worth_LM = gain_LM - price * np.arange(num_moves)
    reached_B = np.zeros(budget + 1)
    taken_LB = np.zeros((num_layers, budget + 1), np.int64)
    for layer, worth_M in enumerate(worth_LM):
        best_B = reached_B + worth_M[0]
        for moves in range(1, min(num_moves, budget + 1)):
            with_moves_B = reached_B[: budget + 1 - moves] + worth_M[moves]
            better_B = with_moves_B > best_B[moves:] + 1e-12
            best_B[moves:][better_B] = with_moves_B[better_B]
            taken_LB[layer, moves:][better_B] = moves
        reached_B = best_B
    left = int(np.argmax(reached_B >= reached_B.max() - 1e-12))
    moves_L = np.zeros(num_layers, np.int64)
    for layer in reversed(range(num_layers)):
        moves_L[layer] = taken_LB[layer, left]
        left -= moves_L[layer]
    return moves_L
