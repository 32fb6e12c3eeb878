"""The cost model by hand."""

import numpy as np
import pytest

from profiles.errors import InputError
from solvers.cost import Network, exchange_seconds, fit_network, layer_seconds


def test_an_exchange_is_latency_and_bytes() -> None:
    assert exchange_seconds(100, 1000, Network(1e6, 0.01)) == pytest.approx(0.11)


def test_a_layer_is_three_exchanges_and_the_busiest_experts() -> None:
    # 2 rows per token on the busiest of 4 ranks: 200 rows out (100 bytes each) and back (50).
    # 400 * 2 / 4 activations per rank, 1.5 times that on the busiest.
    seconds = layer_seconds(
        2.0,
        1.5,
        tokens=400,
        num_ranks=4,
        top_k=2,
        row_bytes=100,
        result_bytes=50,
        network=Network(1e6, 0.001),
        seconds_per_activation=1e-5,
    )
    assert seconds == pytest.approx(3 * 0.001 + 0.02 + 0.01 + 300 * 1e-5)


def test_a_network_is_found_again() -> None:
    sizes = np.array([1e3, 1e5, 1e6])
    network = fit_network(sizes, 0.002 + sizes / 2e7)
    assert network.bytes_per_s == pytest.approx(2e7) and network.latency_s == pytest.approx(0.002)


@pytest.mark.parametrize(("bandwidth", "latency"), [(0.0, 0.0), (-1.0, 0.0), (1e6, -1e-3), (float("nan"), 0.0)])
def test_impossible_links_are_refused(bandwidth: float, latency: float) -> None:
    with pytest.raises(InputError, match="bandwidth must be positive"):
        Network(bandwidth, latency)
