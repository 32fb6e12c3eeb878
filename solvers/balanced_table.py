"""Homes under a traffic cap: which rank tokens or requests should live on when every rank may take only its share.

The transport problem  max sum_v weight_v sum_r share[v, r] score[v, r]  with equal column masses is solved by the prices of
`solvers.assign`: rows stay distributions, so one frequent token may be split over ranks.

Shape letters: V rows to place (token ids or requests), R ranks.
"""

import numpy as np

from solvers.assign import balanced_prices, softmax

# Placement is offline, and judged by these shares: prices take longer and end colder than where batches are cut into slices.
PRICING = {"sweeps": 48, "cooling": 0.03}


def balanced_shares(score_VR: np.ndarray, weight_V: np.ndarray) -> np.ndarray:
    """Distribution of every row over the ranks, float64 [V, R], with nearly equal column masses sum_v weight_v
    share[v, r].

    `score_VR`: worth of rank r to a unit of row v. `weight_V`: units of each row.
    """
    prices_R, temperature = balanced_prices(score_VR, weight_V, **PRICING)
    return softmax(score_VR - prices_R, temperature)


def balanced_homes(score_VR: np.ndarray, weight_V: np.ndarray, *, slack: float = 1.02) -> np.ndarray:
    """One rank per row, int64 [V]: best score under the balancing prices; rows that lose most by moving come first.

    No rank is filled beyond `slack` times its share while another has room; a row heavier than the room of every
    rank goes to the emptiest. Ties go to the lower rank.
    """
    num_rows, num_ranks = score_VR.shape
    worth_VR = score_VR - balanced_prices(score_VR, weight_V, **PRICING)[0]
    room_R = np.full(num_ranks, slack * weight_V.sum() / num_ranks)
    home_V = np.full(num_rows, -1)
    is_open_R = np.ones(num_ranks, bool)
    while is_open_R.any() and (home_V < 0).any():
        rows = np.flatnonzero(home_V < 0)
        open_VR = np.where(is_open_R, worth_VR[rows], -np.inf)
        choice_V = open_VR.argmax(axis=1)
        best_V = open_VR[np.arange(len(rows)), choice_V]
        open_VR[np.arange(len(rows)), choice_V] = -np.inf
        second_V = np.where(np.isfinite(open_VR.max(axis=1)), open_VR.max(axis=1), best_V)
        regret_V = (best_V - second_V) * weight_V[rows]
        for rank in np.flatnonzero(is_open_R):
            mine = np.flatnonzero(choice_V == rank)
            mine = mine[np.argsort(-regret_V[mine], kind="stable")]
            fits = np.cumsum(weight_V[rows[mine]]) <= room_R[rank] + 1e-9
            home_V[rows[mine[fits]]] = rank
            room_R[rank] -= weight_V[rows[mine[fits]]].sum()
            is_open_R[rank] = fits.all()
    for row in np.flatnonzero(home_V < 0):
        home_V[row] = np.argmax(room_R)
        room_R[home_V[row]] -= weight_V[row]
    return home_V
