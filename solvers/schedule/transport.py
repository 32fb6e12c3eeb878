"""Entropic transport: rows that want ranks, brought to the masses that the ranks may have.

The transport problem  max sum_v weight_v sum_r share[v, r] score[v, r]  with given column masses is
solved by scaling (Sinkhorn, 1967; Cuturi, 2013): each rank has a price, row v gives
softmax((score[v] - prices) / temperature) to the ranks, and a rank that gets more than its mass
grows dearer by temperature * log(mass it gets / mass it may have). Rows stay distributions, so one
frequent token may be split over ranks. The temperature is lowered on the way. The callers say how
often and how far: token slices, request windows, the token table, homes of a placement.

Shape letters: V rows to place (token ids, tokens or requests), R ranks, L layers, E experts, J load
vectors.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

# Of a placement's homes: in standard deviations of the score, and scaling rounds at each.
TEMPERATURES = (1.0, 0.5, 0.25, 0.12, 0.06, 0.03)
ROUNDS = 8

MANY_RANKS = 32  # above it rows are scaled by a kernel that is kept from step to step
MOST_MOVED = 20.0  # temperatures that prices may be away from those of the kernel


def softmax(scores_VR: np.ndarray, temperature: float) -> np.ndarray:
    """Rows (along the last axis) of non-negative shares that sum to 1, float [..., V, R]."""
    shares_VR = np.exp((scores_VR - scores_VR.max(axis=-1, keepdims=True)) / temperature)
    return shares_VR / shares_VR.sum(axis=-1, keepdims=True)


def scaled(
    scores_VR: np.ndarray,
    weight_V: np.ndarray,
    temperatures: Iterable[float],
    *,
    least: float,
    single: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the ranks at the last of the temperatures, and the prices after them: one step at
    each.

    Parameters:
        scores_VR: float [V, R], worth of rank r to a unit of row v
        weight_V: float [V], units of each row; all ranks get as many
        temperatures: in units of the scores
        least: part of its mass that an unwanted rank is taken to get, so that prices stay finite
        single: whether to work in float32, for the rows of a whole trace

    Returns:
        shares_RV: [R, V], of the dtype that was worked in
        prices_R: float64 [R]
    """
    target = weight_V.sum() / scores_VR.shape[1]
    if scores_VR.shape[1] > MANY_RANKS:
        kernel, prices_R = _Kernel(scores_VR), np.zeros(scores_VR.shape[1])
        for temperature in temperatures:
            mass_R = kernel.masses_R(prices_R, weight_V, temperature)
            prices_R += temperature * np.log(np.maximum(mass_R / target, least))
        return kernel.shares_RV(), prices_R
    # Ranks first: sums and maxima over the few ranks then run along the rows, several times faster
    # in numpy.
    scores_RV = np.ascontiguousarray(scores_VR.T, np.float32 if single else None)
    weight_V = weight_V.astype(np.float32) if single else weight_V
    shares_RV, prices_R = np.empty_like(scores_RV), np.zeros(len(scores_RV))
    for temperature in temperatures:
        np.subtract(scores_RV, prices_R[:, None].astype(scores_RV.dtype), out=shares_RV)
        shares_RV -= shares_RV.max(axis=0)
        if single:
            shares_RV *= np.float32(1 / temperature)
        else:
            shares_RV /= temperature
        np.exp(shares_RV, out=shares_RV)
        shares_RV /= shares_RV.sum(axis=0)
        mass_R = (shares_RV @ weight_V).astype(np.float64)
        prices_R += temperature * np.log(np.maximum(mass_R / target, least))
    return shares_RV, prices_R


class _Kernel:
    """Scaling over many ranks, in float32: softmax((scores - prices) / temperature) as a kernel of
    an earlier step's prices and factors that bring it to these.

    A step at the same temperature is two products of the kernel with a vector, and one at another
    temperature an exponential more. Prices that moved far are worked into the kernel, so that no
    factor leaves the range of the numbers.
    """

    def __init__(self, scores_VR: np.ndarray) -> None:
        self._scores_RV = np.ascontiguousarray(scores_VR.T, np.float32)
        self._net_RV, self._kernel_RV = np.empty_like(self._scores_RV), np.empty_like(self._scores_RV)
        self._prices_R, self._temperature = np.full(len(self._scores_RV), np.inf), 0.0
        self._factor_R, self._sum_V = np.ones(len(self._scores_RV), np.float32), np.ones(len(scores_VR), np.float32)

    def masses_R(self, prices_R: np.ndarray, weight_V: np.ndarray, temperature: float) -> np.ndarray:
        """What each rank gets of the rows' weights, float64 [R]."""
        moved_R = (prices_R - self._prices_R) / temperature
        is_far = not np.abs(moved_R).max() <= MOST_MOVED
        if is_far:
            np.subtract(self._scores_RV, prices_R[:, None].astype(np.float32), out=self._net_RV)
            self._net_RV -= self._net_RV.max(axis=0)
            self._prices_R, moved_R = prices_R.copy(), np.zeros(len(prices_R))
        if is_far or temperature != self._temperature:
            np.multiply(self._net_RV, np.float32(1 / temperature), out=self._kernel_RV)
            np.exp(self._kernel_RV, out=self._kernel_RV)
            self._temperature = temperature
        self._factor_R = np.exp(-moved_R).astype(np.float32)
        self._sum_V = self._factor_R @ self._kernel_RV
        weight_V = weight_V.astype(np.float32) / self._sum_V
        return (self._kernel_RV @ weight_V).astype(np.float64) * self._factor_R

    def shares_RV(self) -> np.ndarray:
        """The shares that the last masses are made of, float32 [R, V]; the kernel is used up."""
        shares_RV = self._kernel_RV
        shares_RV *= self._factor_R[:, None]
        shares_RV /= self._sum_V
        return shares_RV


def balanced_prices(
    scores_VR: np.ndarray,
    weight_V: np.ndarray | None = None,
    *,
    sweeps: int,
    cooling: float,
    start: float = 1.0,
) -> tuple[np.ndarray, float]:
    """Price per rank at which every rank is wanted equally, float64 [R], and the temperature at
    which that holds.

    Parameters:
        scores_VR: float [V, R]
        weight_V: float [V], how much each row counts; 1 where None
        sweeps: steps of the prices
        start, cooling: first and last temperature, over the spread of the scores (best over mean,
            on average); it falls geometrically

    Returns:
        prices_R: float64 [R], mean 0
        temperature: the last one, in units of the scores; 1 where no score differs
    """
    num_rows, num_ranks = scores_VR.shape
    spread = float((scores_VR.max(axis=1) - scores_VR.mean(axis=1)).mean()) if num_rows else 0.0
    if spread <= 0:
        return np.zeros(num_ranks), 1.0
    steps = [spread * start * (cooling / start) ** (sweep / max(sweeps - 1, 1)) for sweep in range(sweeps)]
    _, prices_R = scaled(scores_VR, np.ones(num_rows) if weight_V is None else weight_V, steps, least=1e-6)
    return prices_R - prices_R.mean(), steps[-1]


def capped_prices(
    scores_VR: np.ndarray, weight_V: np.ndarray, *, cap: float, sweeps: int, cooling: float
) -> tuple[np.ndarray, float]:
    """Prices and temperature at which no rank gets more than `cap` x the mean of the weights:
    those of `balanced_prices`, and steps at its temperature until that holds.

    Parameters:
        scores_VR: float [V, R], worth of rank r to a unit of row v.
        weight_V: float [V], units of each row.
        cap: most weight of a rank over the mean.
        sweeps: steps of the prices.
        cooling: last temperature, over the spread of the scores.

    Returns:
        Prices, float64 [R], and the temperature, in units of the scores.
    """
    prices_R, temperature = balanced_prices(scores_VR, weight_V, sweeps=sweeps, cooling=cooling)
    kernel = _Kernel(scores_VR) if scores_VR.shape[1] > MANY_RANKS else None
    for _ in range(1000):
        if kernel is None:
            mass_R = weight_V @ softmax(scores_VR - prices_R, temperature)
        else:
            mass_R = kernel.masses_R(prices_R, weight_V, temperature)
        if mass_R.max() <= cap * mass_R.mean():
            break
        prices_R = prices_R + temperature * np.log(np.maximum(mass_R / mass_R.mean(), 1e-6))
    return prices_R, temperature


def balanced_shares(score_VR: np.ndarray, weight_V: np.ndarray) -> np.ndarray:
    """Distribution of every row over the ranks, float64 [V, R], with nearly equal column masses
    sum_v weight_v share[v, r].

    `score_VR`: worth of rank r to a unit of row v. `weight_V`: units of each row.
    """
    temperatures = _home_temperatures(score_VR, weight_V)
    if not temperatures:
        return np.full(score_VR.shape, 1 / score_VR.shape[1])
    return scaled(score_VR, weight_V, temperatures, least=1e-9, single=True)[0].T.astype(np.float64)


def _home_temperatures(score_VR: np.ndarray, weight_V: np.ndarray) -> list[float]:
    """Temperatures of a placement's homes in units of the score; none where no score differs."""
    spread = float(np.sqrt(np.average(score_VR.var(axis=1), weights=weight_V))) if weight_V.sum() > 0 else 0.0
    return [temperature * spread for temperature in TEMPERATURES for _ in range(ROUNDS)] if spread > 1e-12 else []


def balanced_homes(score_VR: np.ndarray, weight_V: np.ndarray, *, slack: float = 1.02) -> np.ndarray:
    """One rank per row, int64 [V]: best score under the balancing prices; rows that lose most by
    moving come first.

    No rank is filled beyond `slack` times its share while another has room; a row heavier than the
    room of every rank goes to the emptiest. Ties go to the lower rank.
    """
    num_rows, num_ranks = score_VR.shape
    _, price_R = scaled(score_VR, weight_V, _home_temperatures(score_VR, weight_V), least=1e-9, single=True)
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


class SlotPrices(NamedTuple):
    """What experts pay for a slot of a rank, and for each unit of load that they bring to it."""

    slot_LR: np.ndarray  # float64
    load_LJR: np.ndarray  # float64, none below 0

    @classmethod
    def zero(cls, load_LJE: np.ndarray, num_ranks: int) -> "SlotPrices":
        return cls(np.zeros((len(load_LJE), num_ranks)), np.zeros((*load_LJE.shape[:2], num_ranks)))


def scaled_in_slots(
    worth_LER: np.ndarray, load_LJE: np.ndarray, limit_LJ: np.ndarray, prices: SlotPrices, *, sweeps: int
) -> tuple[np.ndarray, np.ndarray, SlotPrices]:
    """Experts of all layers as rows at temperature 1: each rank gets E / R of them, and of every
    load vector no more than its limit, nearly.

    Parameters:
        worth_LER: float64 [L, E, R], in units of the temperature
        load_LJE, limit_LJ: float [L, J, E], [L, J], loads of the experts and what a rank may carry
        prices: where to go on from

    Returns:
        share_LER: float64 [L, E, R], rows that sum to 1
        net_LER: float64 [L, E, R], the worth net of the prices that the shares follow
        prices: after the last sweep
    """
    slots = worth_LER.shape[1] / worth_LER.shape[2]
    share_LER, net_LER = worth_LER, worth_LER
    for _ in range(sweeps):
        net_LER = worth_LER - prices.slot_LR[:, None] - load_LJE.transpose(0, 2, 1) @ prices.load_LJR
        share_LER = softmax(net_LER, 1.0)
        slot_LR = prices.slot_LR + np.log(np.maximum(share_LER.sum(axis=1), 1e-9) / slots)
        load_LJR = np.maximum(load_LJE @ share_LER, 1e-9)
        prices = SlotPrices(slot_LR, np.maximum(prices.load_LJR + np.log(load_LJR / limit_LJ[:, :, None]), 0))
    return share_LER, net_LER, prices
