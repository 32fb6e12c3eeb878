"""Equations of ridge regressions against numpy's solver."""

import numpy as np
import pytest

from semmoe.solvers.schedule.ridge import solve_positive


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_weights_solve_the_equations(dtype):
    rng = np.random.default_rng(0)
    features_TF = rng.random((200, 30))
    gram_FF = (features_TF.T @ features_TF + np.eye(30)).astype(dtype)
    right_FR = rng.random((30, 4)).astype(dtype)
    weights_FR = solve_positive(gram_FF.copy(), right_FR)
    assert weights_FR.dtype == dtype and weights_FR.flags.c_contiguous
    np.testing.assert_allclose(gram_FF.astype(float) @ weights_FR, right_FR, atol=1e-3 if dtype == np.float32 else 1e-9)


def test_equations_that_are_not_positive_are_a_fault():
    with pytest.raises(np.linalg.LinAlgError, match="3 features are not positive"):
        solve_positive(np.diag([1.0, -1.0, 1.0]), np.ones((3, 1)))
