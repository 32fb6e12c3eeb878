"""Homes under a traffic cap: which rank tokens or requests should live on when every rank may take
only its share.

The transport problem  max sum_v weight_v sum_r share[v, r] score[v, r]  with equal column masses is
solved by annealed entropic scaling (Sinkhorn, 1967; Cuturi, 2013): rows stay distributions, so one
frequent token may be split over ranks.

Shape letters: V rows to place (token ids or requests), R ranks.
"""

import numpy as np

TEMPERATURES = (1.0, 0.5, 0.25, 0.12, 0.06, 0.03)  # in standard deviations of the score
ROUNDS = 8  # scaling rounds per temperature


def balanced_shares(score_VR: np.ndarray, weight_V: np.ndarray) -> np.ndarray:
    """Distribution of every row over the ranks, float64 [V, R], with nearly equal column masses
    sum_v weight_v share[v, r].

    `score_VR`: worth of rank r to a unit of row v. `weight_V`: units of each row.
    """
    shares_VR, _ = _scaled(score_VR, weight_V)
    return shares_VR


def _scaled(score_VR: np.ndarray, weight_V: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares and the prices of the ranks that balance them."""
    num_ranks = score_VR.shape[1]
    target = weight_V.sum() / num_ranks
    spread = float(np.sqrt(np.average(score_VR.var(axis=1), weights=weight_V))) if target > 0 else 0.0
    price_R = np.zeros(num_ranks)
    if spread <= 1e-12:
        return np.full(score_VR.shape, 1 / num_ranks), price_R
    # Ranks first and single precision: sums and maxima over the few ranks then run along the rows,
    # several times faster.
    score_RV = np.ascontiguousarray(score_VR.T, np.float32)
    weight_V = weight_V.astype(np.float32)
    shares_RV = np.empty(score_RV.shape, np.float32)
    for temperature in TEMPERATURES:
        scale = temperature * spread
        for _ in range(ROUNDS):
            np.subtract(score_RV, price_R[:, None].astype(np.float32), out=shares_RV)
            shares_RV -= shares_RV.max(axis=0)
            shares_RV *= np.float32(1 / scale)
            np.exp(shares_RV, out=shares_RV)
            shares_RV /= shares_RV.sum(axis=0)
            price_R += scale * np.log(np.maximum((shares_RV @ weight_V).astype(np.float64), 1e-9 * target) / target)
    return shares_RV.T.astype(np.float64), price_R


def balanced_homes(score_VR: np.ndarray, weight_V: np.ndarray, *, slack: float = 1.02) -> np.ndarray:
    """One rank per row, int64 [V]: best score under the balancing prices; rows that lose most by
    moving come first.

    No rank is filled beyond `slack` times its share while another has room; a row heavier than the
    room of every rank goes to the emptiest. Ties go to the lower rank.
    """
    num_rows, num_ranks = score_VR.shape
    _, price_R = _scaled(score_VR, weight_V)
    worth_VR = score_VR - price_R
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
