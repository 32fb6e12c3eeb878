"""Links between ranks, and the seconds that an exchange takes on them: by class of link (inside a
node, between nodes) or by pair of ranks.

A rank has one port per class of link, both directions on their own (NVLink and a network card work
side by side); a port sends to its peers one after the other. An exchange ends when the busiest port
has sent and received everything:

    max over ports of latency + max over ranks and directions of sum over peers of bytes / bandwidth

With one class that is latency + LINK x tokens / R x bytes / bandwidth (solvers/time/layer_time.py),
LINK from solvers/evaluate/metrics.py.

Shape letters: L MoE layers, R ranks.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from semmoe.profiles.document import parse_json, read_bounded
from semmoe.profiles.errors import InputError
from semmoe.solvers.placement import Topology
from semmoe.solvers.topology import number_array

INSIDE, BETWEEN = 0, 1  # ports


@dataclass(frozen=True, eq=False)
class Links:
    """Bandwidth and latency from each rank to each other one, and the port that the pair uses;
    diagonals are not looked at."""

    bytes_per_s_RR: np.ndarray  # float64
    latency_s_RR: np.ndarray  # float64
    port_RR: np.ndarray  # integers
    text: str  # for people

    @property
    def is_uniform(self) -> bool:
        """Whether all pairs are alike."""
        away_RR = ~np.eye(len(self.port_RR), dtype=bool)
        return all(
            len(np.unique(values[away_RR])) <= 1 for values in (self.bytes_per_s_RR, self.latency_s_RR, self.port_RR)
        )


def exchange_seconds_L(rows_LRR: np.ndarray, row_bytes: float, links: Links) -> np.ndarray:
    """One all-to-all per layer, float64 [L]: `rows_LRR` rows from the first to the second rank;
    what stays on a rank costs nothing."""
    away_RR = ~np.eye(len(links.port_RR), dtype=bool)
    worst_L = np.zeros(len(rows_LRR))
    for port in np.unique(links.port_RR[away_RR]):
        pairs_RR = away_RR & (links.port_RR == port)
        busy_LRR = np.where(pairs_RR, rows_LRR * row_bytes / links.bytes_per_s_RR, 0.0)
        busiest_L = np.maximum(busy_LRR.sum(2).max(1), busy_LRR.sum(1).max(1))
        worst_L = np.maximum(worst_L, links.latency_s_RR[pairs_RR].max() + busiest_L)
    return worst_L


def communication_seconds_L(rows_LRR: np.ndarray, links: Links, *, row_bytes: float, result_bytes: float) -> np.ndarray:
    """Split sizes, dispatch and combine of a batch at each layer, float64 [L]; results travel
    the other way.

    Parameters:
        rows_LRR: rows from rank to rank, float [L, R, R].
        links: speeds of the links, bytes per second, and what a message costs, seconds.
        row_bytes: of a token that is sent out.
        result_bytes: of a row that comes back.
    """
    return (
        exchange_seconds_L(np.zeros_like(rows_LRR), 0.0, links)
        + exchange_seconds_L(rows_LRR, row_bytes, links)
        + exchange_seconds_L(rows_LRR.swapaxes(1, 2), result_bytes, links)
    )


def through_nodes(rows_LRR: np.ndarray, rows_LRN: np.ndarray, topology: Topology) -> np.ndarray:
    """Rows of `per-node` dispatch from rank to rank, float64 [L, R, R]: once to each node that
    needs the token, then on inside it.

    `rows_LRR`: one row per token and rank; `rows_LRN`: one per token and node. A row enters a node
    at the rank that has the place of its home there, which passes it on.
    """
    node_R, per_node = topology.node_of_R, topology.ranks_per_node
    place_R = np.arange(topology.num_ranks) % per_node
    hops_LRR = np.where(node_R[:, None] == node_R, rows_LRR, 0.0)
    for home in range(topology.num_ranks):
        for node in range(topology.num_nodes):
            if node == node_R[home]:
                continue
            entry = node * per_node + place_R[home]
            hops_LRR[:, home, entry] += rows_LRN[:, home, node]
            inside = slice(node * per_node, (node + 1) * per_node)
            hops_LRR[:, entry, inside] += rows_LRR[:, home, inside]
    return hops_LRR


def parse_links(bandwidth: str, latency: str, topology: Topology) -> Links:
    """Links from "GB/s" or "INTRA:INTER" (GB/s, microseconds), or from a JSON file that names
    both. Raises InputError for anything else."""
    if bandwidth.endswith(".json"):
        if latency:
            raise InputError(f"--latency {latency}: {bandwidth} holds the latencies")
        return _links_of_file(Path(bandwidth), topology)
    rates = _numbers("--topology-bandwidth", bandwidth, "GB/s", topology)
    delays = _numbers("--latency", latency or "0", "microseconds", topology)
    text = " inside a node, ".join(f"{rate:g} GB/s" for rate in rates) + (" between nodes" if rates[1:] else "")
    if any(delays):
        text += ", latency " + " and ".join(f"{delay:g} us" for delay in delays)
    if len(rates) == len(delays) == 1:
        return _uniform(rates[0], delays[0], topology.num_ranks, text)
    return _of_classes((rates * 2)[:2], (delays * 2)[:2], topology, text)


def _uniform(rate: float, delay: float, num_ranks: int, text: str) -> Links:
    shape = (num_ranks, num_ranks)
    return _checked(Links(np.full(shape, rate * 1e9), np.full(shape, delay * 1e-6), np.zeros(shape, np.int64), text))


def _of_classes(rates: list[float], delays: list[float], topology: Topology, text: str) -> Links:
    """Two classes of links, inside a node and between nodes."""
    port_RR = np.where(topology.node_of_R[:, None] == topology.node_of_R, INSIDE, BETWEEN)
    return _checked(Links(np.array(rates)[port_RR] * 1e9, np.array(delays)[port_RR] * 1e-6, port_RR, text))


def _checked(links: Links) -> Links:
    away_RR = ~np.eye(len(links.port_RR), dtype=bool)
    rates, delays = links.bytes_per_s_RR[away_RR], links.latency_s_RR[away_RR]
    if not (np.isfinite(rates).all() and (rates > 0).all() and np.isfinite(delays).all() and (delays >= 0).all()):
        raise InputError(f"links of {links.text}: bandwidths must be positive, latencies not negative")
    return links


def _numbers(option: str, text: str, unit: str, topology: Topology) -> list[float]:
    """One number, or two where the plan has several nodes."""
    try:
        numbers = [float(word) for word in text.split(":")]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 2 or not all(math.isfinite(number) for number in numbers):
        raise InputError(f"{option} {text}: expected {unit}, {unit} as INTRA:INTER, or a .json file with bandwidths")
    if len(numbers) == 2 and topology.num_nodes == 1:
        raise InputError(
            f"{option} {text}: the plan has one node, so there are no links between nodes: give one number"
        )
    return numbers


def _links_of_file(path: Path, topology: Topology) -> Links:
    """{"intra": link, "inter": link} or one link; a link is {"gb_per_s": number or [R][R],
    "latency_us": the same, 0 by default}."""
    try:
        value = parse_json(read_bounded(path))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not JSON: {error}"
        raise InputError(f"--topology-bandwidth {path} cannot be read: {reason}") from None
    if isinstance(value, dict) and value.keys() == {"intra", "inter"}:
        found = [_link(value[name], path, ()) for name in ("intra", "inter")]
        return _of_classes([float(r) for r, _ in found], [float(d) for _, d in found], topology, path.name)
    shape = (topology.num_ranks, topology.num_ranks)
    rate_RR, delay_RR = (np.broadcast_to(values, shape) for values in _link(value, path, shape))
    return _checked(Links(rate_RR * 1e9, delay_RR * 1e-6, np.zeros(shape, np.int64), path.name))


def _link(value: Any, path: Path, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """GB/s and microseconds of a link, numbers or matrices of `shape`."""
    what = 'an object with "gb_per_s" and "latency_us"'
    if not isinstance(value, dict) or not {"gb_per_s"} <= value.keys() <= {"gb_per_s", "latency_us"}:
        raise InputError(f'{path}: expected {what}, or such objects under "intra" and "inter"')
    try:
        found = [number_array(value.get(name, 0)) for name in ("gb_per_s", "latency_us")]
    except ValueError:
        raise InputError(f"{path}: {what} holds numbers or square matrices of numbers") from None
    for values in found:
        if values.shape not in ((), shape):
            expected = f"a number or a {shape[0]} x {shape[1]} matrix" if shape else "a number"
            raise InputError(f"{path}: a value of shape {list(values.shape)}, expected {expected}")
    return found[0], found[1]
