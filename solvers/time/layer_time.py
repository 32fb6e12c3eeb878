"""Time of an expert layer from what its placement moves: rows on the busiest link, bandwidth,
latency, and the busiest rank's experts.

An all-to-all ends when the busiest rank has sent and received everything, so its time is a latency
plus that rank's bytes over the bandwidth of its link (each direction on its own). A layer has three
exchanges: split sizes (latency only), dispatch, combine. The experts take as long as the rank with
the most activations. What overlaps (local experts run while rows travel) is not subtracted: an
upper bound.

Shape letters: X measurements.
"""

from dataclasses import dataclass

import numpy as np

from semmoe.profiles.errors import InputError

EXCHANGES = 3  # split sizes, dispatch, combine


@dataclass(frozen=True)
class Network:
    """One rank's link, per direction."""

    bytes_per_s: float
    latency_s: float

    def __post_init__(self) -> None:
        if not self.bytes_per_s > 0 or not self.latency_s >= 0:
            raise InputError(
                f"a link of {self.bytes_per_s} bytes/s with {self.latency_s} s latency: bandwidth must be positive, latency not negative"
            )


def fit_network(bytes_X: np.ndarray, seconds_X: np.ndarray) -> Network:
    """Bandwidth and latency from timed exchanges of at least two sizes: least squares of
    relative errors."""
    weights_X = 1 / np.maximum(seconds_X, 1e-9)
    design_X2 = np.stack([np.ones(len(bytes_X)), bytes_X], 1) * weights_X[:, None]
    latency, per_byte = np.linalg.lstsq(design_X2, seconds_X * weights_X, rcond=None)[0]
    return Network(1 / max(float(per_byte), 1e-15), max(float(latency), 0.0))


def exchange_seconds(rows: float, row_bytes: float, network: Network) -> float:
    """One all-to-all whose busiest rank sends or receives `rows` rows."""
    return network.latency_s + rows * row_bytes / network.bytes_per_s


def layer_seconds(
    link: float,
    load_imbalance: float,
    *,
    tokens: float,
    num_ranks: int,
    top_k: int,
    row_bytes: float,
    result_bytes: float,
    network: Network,
    seconds_per_activation: float = 0.0,
) -> float:
    """Seconds of one expert layer on a batch of `tokens` tokens over all ranks.

    `link`: rows on the busiest rank per token that lives on a rank (LINK of
    `semmoe.solvers.evaluate.metrics`). `load_imbalance`: busiest rank over mean. `row_bytes` go out
    with a row on dispatch, `result_bytes` come back. `seconds_per_activation`: one (token, expert)
    pair on one rank.
    """
    rows = link * tokens / num_ranks
    communication = network.latency_s * (EXCHANGES - 2)
    communication += exchange_seconds(rows, row_bytes, network) + exchange_seconds(rows, result_bytes, network)
    return communication + load_imbalance * tokens * top_k / num_ranks * seconds_per_activation
