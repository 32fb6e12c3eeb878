"""Equations of a ridge regression solved: symmetric and positive, of some thousand unknowns.

Shape letters: F features (or requests), R ranks.
"""

import numpy as np


def solve_positive(gram_FF: np.ndarray, right_FR: np.ndarray) -> np.ndarray:
    """The weights, float [F, R], of the dtype of the equations, which are used up.

    By LAPACK's Cholesky solver itself: scipy's function around it copies the equations and bounds
    their condition, which takes as long again and tells nothing of equations with a ridge.

    Parameters:
        gram_FF: symmetric, float32 or float64, in C order.
        right_FR: of the same dtype.

    Raises LinAlgError where they are not positive: a fault, as a ridge makes them so.
    """
    from scipy.linalg.lapack import get_lapack_funcs

    (solve,) = get_lapack_funcs(("posv",), (gram_FF,))
    # The transposed view is the same matrix in the order that LAPACK wants.
    _, weights_FR, info = solve(gram_FF.T, right_FR, lower=1, overwrite_a=1)
    if info:
        raise np.linalg.LinAlgError(f"the equations of {len(gram_FF)} features are not positive: LAPACK says {info}")
    return np.ascontiguousarray(weights_FR)
