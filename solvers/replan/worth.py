"""What a placement costs to serve with, in remote rows per token: the number that a re-placement
weighs.

Remote rows alone are the wrong measure. After a shift the old placement may reach fewer ranks than
a new one and yet serve most tokens on one rank, and its step waits for that rank. So load above the
cap counts as well, at a fixed exchange rate (docs/method.md).

Shape letters: L MoE layers, X resamples.
"""

from dataclasses import dataclass

import numpy as np

from semmoe.solvers.place.nodes import NODE_WORTH

EXCESS_ROWS = 2.0  # remote rows per token that one mean load above the cap, on the busiest rank, is worth


@dataclass(frozen=True)
class Worth:
    """Cost of a layer per token as a sum: remote ranks, remote nodes, activations away from home,
    and the busiest rank's load above the cap.

    Fields:
        rank_row, node_row, activation_row: cost of one remote rank, node and activation of a token.
        excess: cost of one mean load above the cap, on the busiest rank.
        load_cap: load over the mean that costs nothing.
        unit: what the sum is counted in.

    A predictor of times gives another `Worth`: its microseconds per row and per load.
    """

    rank_row: float = 1.0
    node_row: float = 0.0
    activation_row: float = 0.0
    excess: float = EXCESS_ROWS
    load_cap: float = 1.05
    unit: str = "remote rows per token"

    @classmethod
    def of_dispatch(cls, dispatch: str, num_nodes: int, load_cap: float) -> "Worth":
        """Cost in rows as the engine's all-to-all counts them (DISPATCH_KINDS)."""
        if dispatch == "per-expert":
            return cls(rank_row=0.0, activation_row=1.0, load_cap=load_cap)
        if dispatch == "per-node" and num_nodes > 1:
            return cls(rank_row=1 / NODE_WORTH, node_row=1.0, load_cap=load_cap)
        return cls(rank_row=0.0 if dispatch == "gather" else 1.0, load_cap=load_cap)

    def cost_XL(self, metrics: dict[str, np.ndarray], top_k: int) -> np.ndarray:
        """Cost per resample and layer, float64 [X, L], of the metrics of `metrics_XL`."""
        excess_XL = np.maximum(metrics["load_imbalance"] - self.load_cap, 0)
        rows_XL = self.rank_row * metrics["rem"] + self.node_row * metrics["node"]
        return rows_XL + self.activation_row * top_k * (1 - metrics["lar"]) + self.excess * excess_XL
