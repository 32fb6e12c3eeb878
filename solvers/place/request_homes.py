"""Requests and experts placed together for Attention-DP, over all layers at once.

A request lives on one rank for all layers. Local activations are linear in the experts' ranks once
the requests' are given, and the other way round, so each side is relaxed to shares that prices
balance (`semmoe.solvers.schedule.transport`), and both are cooled in turn: deterministic annealing
(Rose, 1998) of a two-sided clustering. A start costs a few matrix products, some hundred times less
than searching every layer by swaps, and ends in better optima than alternating hard choices does.

Shape letters: B requests, L MoE layers, E experts, R ranks, J load vectors.
"""

import numpy as np

from semmoe.solvers.place.clusters import usage_shares_BR
from semmoe.solvers.schedule.transport import SlotPrices, balanced_homes, balanced_prices, scaled_in_slots, softmax

COOLING = (1.5, 1.2, 1.0, 0.8, 0.6, 0.4, 0.3)  # temperatures of requests, in spreads of their scores
EXPERT_TEMPERATURE = 0.1  # in standard deviations of an expert's worth over the ranks
SWEEPS = 20  # of prices at each temperature
MAX_REQUESTS = 1_024  # that the annealing looks at


def anneal_requests(
    usage_LBE: np.ndarray,
    weight_B: np.ndarray,
    load_LJE: np.ndarray,
    limit_LJ: np.ndarray,
    num_ranks: int,
    *,
    seed: int,
    starts: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Rank of each expert, int64 [L, E], and of each request, int64 [B]: those with most local
    activations of several random starts.

    `usage_LBE`: activations of each request. `weight_B`: tokens of each request, which the ranks
    share equally. `load_LJE`, `limit_LJ`: load vectors and what a rank may carry of each. Every
    rank gets E / R experts; the limits hold for the shares before they are rounded, so a little
    overload may be left to a swap search.
    """
    num_layers, num_requests, num_experts = usage_LBE.shape
    sample = np.arange(num_requests)
    if num_requests > MAX_REQUESTS:
        sample = np.sort(np.random.default_rng([seed, 13]).choice(num_requests, MAX_REQUESTS, replace=False))
    usage_BX = usage_LBE[:, sample].transpose(1, 0, 2).reshape(len(sample), -1)  # X: layer and expert
    tokens_B = np.maximum(weight_B[sample].astype(np.float64), 1)
    mean_LJ = np.maximum(load_LJE.mean(axis=2), 1e-300)
    unit_LJE, unit_limit_LJ = load_LJE / mean_LJ[:, :, None], limit_LJ / mean_LJ
    best: tuple[float, np.ndarray] | None = None
    for start in range(starts):
        share_BR = softmax(np.random.default_rng([seed, start]).normal(size=(len(sample), num_ranks)), 3.0)
        experts = _Experts(unit_LJE, unit_limit_LJ, num_ranks)
        for temperature in COOLING:
            worth_XR = usage_BX.T @ share_BR.astype(usage_BX.dtype)
            member_LER = experts.shares(worth_XR.reshape(num_layers, num_experts, num_ranks))
            score_BR = usage_BX @ member_LER.reshape(-1, num_ranks).astype(usage_BX.dtype) / tokens_B[:, None]
            prices_R, scale = balanced_prices(score_BR, tokens_B, sweeps=SWEEPS, start=temperature, cooling=temperature)
            share_BR = softmax(score_BR - prices_R, scale)
        value = float((tokens_B[:, None] * share_BR * score_BR).sum())
        if best is None or value > best[0]:
            best = value, experts.rounded()
    assert best is not None
    share_BR = usage_shares_BR(best[1], usage_LBE, num_ranks)
    return best[1], balanced_homes(share_BR, weight_B.astype(np.float64))


class _Experts:
    """Shares of experts on ranks at a low temperature, and the prices of slots and of load that
    go on from one call to the next."""

    def __init__(self, load_LJE: np.ndarray, limit_LJ: np.ndarray, num_ranks: int) -> None:
        self.load_LJE, self.limit_LJ = load_LJE, limit_LJ
        self.prices = SlotPrices.zero(load_LJE, num_ranks)

    def shares(self, worth_LER: np.ndarray) -> np.ndarray:
        """Rows that sum to 1, float64 [L, E, R]: E / R experts on each rank, and loads within
        the limits, nearly."""
        worth_LER = worth_LER - worth_LER.mean(axis=2, keepdims=True, dtype=np.float64)
        scale_L = EXPERT_TEMPERATURE * np.sqrt((worth_LER**2).mean(axis=(1, 2)))
        worth_LER /= np.maximum(scale_L, 1e-300)[:, None, None]
        share_LER, self.net_LER, self.prices = scaled_in_slots(
            worth_LER, self.load_LJE, self.limit_LJ, self.prices, sweeps=SWEEPS
        )
        return share_LER

    def rounded(self) -> np.ndarray:
        """Rank of each expert at the last prices, int64 [L, E], exactly E / R experts on each."""
        from scipy.optimize import linear_sum_assignment

        _, num_experts, num_ranks = self.net_LER.shape
        rank_of_S = np.repeat(np.arange(num_ranks), num_experts // num_ranks)
        return np.stack([rank_of_S[linear_sum_assignment(-net_ER[:, rank_of_S])[1]] for net_ER in self.net_LER])
