"""Topology from a file: a JSON matrix of rank-to-rank costs, or the text that `nvidia-smi topo -m`
prints.

The text's link names become costs in the order of their speed (NVLink, one PCIe switch, several,
host bridge, socket, another socket). GPUs are taken as ranks in their order.

Shape letter: R ranks.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from semmoe.profiles.document import parse_json, read_bounded
from semmoe.profiles.errors import InputError
from semmoe.solvers.placement import Topology

# Cost of a row over each link of the legend, relative to NVLink of one lane; more lanes are
# proportionally cheaper.
LINK_COST = {"PIX": 4.0, "PXB": 5.0, "PHB": 6.0, "NODE": 8.0, "SYS": 10.0}
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def read_topology(path: str | Path, *, num_ranks: int, num_nodes: int = 1) -> Topology:
    """Topology with a file's costs between ranks.

    Parameters:
        path: a JSON matrix of R x R costs of one row, or the text of `nvidia-smi topo -m`.
        num_ranks: R, which the file must describe.
        num_nodes: nodes that the ranks are spread over, R / N each.

    Returns the `Topology`, with `cost_RR` float64 [R, R]. Raises InputError where the file is
    neither form or of another size. Source: solvers/topology.py.
    """
    try:
        text = read_bounded(Path(path)).decode()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise InputError(f"{path} cannot be read: {reason}") from None
    cost_RR = _json_costs(text, path) if text.lstrip()[:1] in ("[", "{") else _smi_costs(ANSI.sub("", text), path)
    if len(cost_RR) != num_ranks:
        raise InputError(f"{path} describes {len(cost_RR)} ranks, the placement has {num_ranks}")
    return Topology(num_ranks, num_nodes, cost_RR)


def _json_costs(text: str, path: str | Path) -> np.ndarray:
    """A list of R lists of R numbers, or an object with such a list under "cost"."""
    try:
        value = parse_json(text)
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    rows = value.get("cost") if isinstance(value, dict) else value
    try:
        cost_RR = number_array(rows)
    except ValueError:
        cost_RR = np.empty(0)
    if cost_RR.ndim != 2 or len(set(cost_RR.shape)) != 1 or not cost_RR.size:
        raise InputError(f"{path}: expected a square matrix of costs, a list of equally long lists of numbers")
    if not np.isfinite(cost_RR).all() or cost_RR.min() < 0:
        raise InputError(f"{path}: a cost is negative or not finite, expected numbers of at least 0")
    if np.diagonal(cost_RR).any():
        raise InputError(f"{path}: the cost of a rank to itself is not 0")
    return cost_RR


def number_array(value: Any) -> np.ndarray:
    """A number of JSON, or nested lists of them, as float64. Raises ValueError for anything else,
    also text that looks like a number."""

    def is_number(item: Any) -> bool:
        return all(map(is_number, item)) if isinstance(item, list) else type(item) in (int, float)

    try:
        if not is_number(value):
            raise ValueError("expected numbers")
        return np.array(value, np.float64)
    except OverflowError:
        raise ValueError("a number is too large") from None
    except RecursionError:
        raise ValueError("lists nest too deep") from None


def _smi_costs(text: str, path: str | Path) -> np.ndarray:
    """Costs of the rows and columns named GPU0, GPU1, ... of the matrix."""
    lines = [line.split() for line in text.splitlines() if line.strip()]
    header = next((i for i, words in enumerate(lines) if words[0] == "GPU0" and not _is_link(words[1:2])), None)
    if header is None:
        raise InputError(f"{path} is neither a JSON matrix nor the text of `nvidia-smi topo -m`")
    num_gpus = sum(bool(re.fullmatch(r"GPU\d+", word)) for word in lines[header])
    rows = {words[0]: words[1 : 1 + num_gpus] for words in lines[header + 1 :] if re.fullmatch(r"GPU\d+", words[0])}
    cost_RR = np.zeros((num_gpus, num_gpus))
    for i in range(num_gpus):
        links = rows.get(f"GPU{i}", [])
        if len(links) != num_gpus:
            raise InputError(f"{path}: the row of GPU{i} has {len(links)} links, expected {num_gpus}")
        for j, link in enumerate(links):
            cost_RR[i, j] = _link_cost(link, i == j, f"{path}, GPU{i} to GPU{j}")
    return cost_RR


def _is_link(words: list[str]) -> bool:
    return bool(words) and (words[0] == "X" or words[0] in LINK_COST or words[0].startswith("NV"))


def _link_cost(link: str, own: bool, where: str) -> float:
    if own != (link == "X"):
        raise InputError(f"{where}: {link!r} is not expected there")
    if own:
        return 0.0
    lanes = re.fullmatch(r"NV(\d+)", link)
    if lanes and int(lanes[1]) > 0:
        return 1.0 / int(lanes[1])
    if link not in LINK_COST:
        raise InputError(f"{where}: unknown link {link!r}, expected NV<lanes>, {', '.join(LINK_COST)}")
    return LINK_COST[link]
