"""Time of an expert layer from what its placement moves: rows on the busiest link, bandwidth,
latency, and the busiest rank's experts.

An all-to-all ends when the busiest rank has sent and received everything, so its time is a latency
plus that rank's bytes over the bandwidth of its link (each direction on its own). A layer has three
exchanges: split sizes (latency only), dispatch, combine. The experts take as long as the rank with
the most activations, which begins with those of its own tokens while rows travel.

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


@dataclass(frozen=True)
class LayerWork:
    """What the exchanges and the experts of a layer have to do for one batch."""

    tokens: float  # over all ranks
    num_ranks: int
    row_bytes: float  # go out with a row on dispatch
    result_bytes: float  # come back
    top_k: int = 0
    seconds_per_activation: float = 0.0  # of one (token, expert) pair on one rank


def layer_seconds(link: float, load_imbalance: float, work: LayerWork, network: Network, lar: float = 0.0) -> float:
    """Seconds of one expert layer on a batch.

    Parameters:
        link: rows on the busiest rank per token that lives on a rank (LINK of
            `semmoe.solvers.evaluate.metrics`).
        load_imbalance: activations of the busiest rank over the mean.
        work: of the batch. network: one rank's link.
        lar: share of a rank's activations that are its own tokens'; 0: it waits for all rows.
    """
    rows = link * work.tokens / work.num_ranks
    dispatch, combine = (exchange_seconds(rows, size, network) for size in (work.row_bytes, work.result_bytes))
    experts = load_imbalance * work.tokens * work.top_k / work.num_ranks * work.seconds_per_activation
    sizes = network.latency_s * (EXCHANGES - 2)
    return sizes + max(dispatch, lar * experts) + (1 - lar) * experts + combine
