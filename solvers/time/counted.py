"""What a batch asks of links and experts, counted: the few numbers per layer that the time depends
on, so that a parameter changes without a count.

Shape letters: T tokens of a trace, L MoE layers, K top-k, E experts, R ranks, N nodes, M batches, J
tokens of a batch (ordered by home, J / R each).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from semmoe.solvers.evaluate.reached import first_of_run, reached_of, reached_ranks
from semmoe.solvers.place.replicas import MovingRule

CHUNK_IDS = 2_000_000  # choices that are counted at once


@dataclass(frozen=True, eq=False)
class Counted:
    """Rows on the busiest link of each class, and the work of each rank's experts, by batch and
    layer."""

    nvl_ML: np.ndarray  # float64: rows of the busiest fast link
    nic_ML: np.ndarray  # of the busiest network card
    nvl_mean_ML: np.ndarray  # of the mean one
    nic_mean_ML: np.ndarray
    padded_MLR: np.ndarray  # float64: activations of a rank, each expert's rounded up to tiles
    active_MLR: np.ndarray  # experts of a rank that get a token
    rows_MLR: np.ndarray  # activations of a rank

    def chosen(self, batches: np.ndarray) -> "Counted":
        """Some of the batches."""
        return Counted(*(getattr(self, f.name)[batches] for f in fields(self)))


class Served(NamedTuple):
    """Where experts are, as a count needs it."""

    ids_LTK: np.ndarray  # chosen experts of the trace's rows, E for an empty slot
    serving_LRE: np.ndarray
    node_R: np.ndarray  # fast network of each rank
    kind: str  # per-rank, per-node, per-expert or gather
    tile: int
    moving: MovingRule | None = None  # what chooses copies token by token, in place of serving_LRE


HomesOfLayer = Callable[[int], np.ndarray]  # layer -> integers [M, J]


def count_batches(served: Served, rows_MJ: np.ndarray, homes: HomesOfLayer | None = None) -> Counted:
    """Counts of batches; homes are those of the order of `rows_MJ` unless a layer has others."""
    num_layers, num_ranks, _ = served.serving_LRE.shape
    num_batches, num_tokens = rows_MJ.shape
    top_k = served.ids_LTK.shape[2]
    links = np.zeros((4, num_batches, num_layers))
    work = np.zeros((3, num_batches, num_layers, num_ranks))
    step = max(1, CHUNK_IDS // max(num_tokens * top_k, 1))
    own_J = np.arange(num_tokens) * num_ranks // num_tokens
    for layer in range(num_layers):
        homes_MJ = homes(layer) if homes else np.broadcast_to(own_J, rows_MJ.shape)
        for first in range(0, num_batches, step):
            part = slice(first, min(first + step, num_batches))
            home_X = homes_MJ[part].reshape(-1).astype(np.int64)
            ids_XK = served.ids_LTK[layer, rows_MJ[part].reshape(-1)]
            links[:, part, layer] = _links(served, layer, ids_XK, home_X, part.stop - first)
            work[:, part, layer] = _work(served, layer, ids_XK, home_X, part.stop - first)
    return Counted(*links, *work)


def _work(served: Served, layer: int, ids_XK: np.ndarray, home_X: np.ndarray, num_batches: int) -> np.ndarray:
    """Padded activations, active experts and activations, [3, M, R]."""
    serving_RE = served.serving_LRE[layer]
    num_ranks, num_experts = serving_RE.shape
    batch_X = np.repeat(np.arange(num_batches), len(ids_XK) // num_batches)
    width = num_experts + 1
    if served.moving is None and (serving_RE == serving_RE[0]).all():
        keys_XK = batch_X[:, None] * width + ids_XK
        n_ME = np.bincount(keys_XK.reshape(-1), minlength=num_batches * width).reshape(-1, width)[:, :num_experts]
        rank_ER = np.eye(num_ranks)[serving_RE[0]]
        return np.stack([np.ceil(n_ME / served.tile) * served.tile @ rank_ER, (n_ME > 0) @ rank_ER, n_ME @ rank_ER])
    if served.moving is not None:
        rank_XK = np.minimum(served.moving.ranks_TK(layer, ids_XK, home_X), num_ranks - 1)  # empty slots are cut off
    else:
        padded_RE = np.pad(serving_RE, ((0, 0), (0, 1))).astype(np.int64)
        rank_XK = padded_RE.reshape(-1).take(home_X[:, None] * width + ids_XK)
    keys_XK = (batch_X[:, None] * num_ranks + rank_XK) * width + ids_XK
    n_MRE = np.bincount(keys_XK.reshape(-1), minlength=num_batches * num_ranks * width)
    n_MRE = n_MRE.reshape(num_batches, num_ranks, width)[:, :, :num_experts]
    return np.stack([(np.ceil(n_MRE / served.tile) * served.tile).sum(2), (n_MRE > 0).sum(2), n_MRE.sum(2)])


def _links(served: Served, layer: int, ids_XK: np.ndarray, home_X: np.ndarray, num_batches: int) -> np.ndarray:
    """Rows of the busiest and the mean link, fast ones first and network cards second, [4, M]:
    nvl, nic, their means."""
    num_ranks, node_R = served.serving_LRE.shape[1], served.node_R
    num_nodes = int(node_R[-1]) + 1
    tokens = len(ids_XK) // num_batches / num_ranks
    if served.kind == "gather":
        rows = np.array([(num_ranks - 1) * tokens, (num_nodes - 1) * tokens])
        return np.broadcast_to(np.tile(rows, 2)[:, None], (4, num_batches))
    if served.moving is not None:
        ranks_KX, first_KX = reached_of(served.moving.ranks_TK(layer, ids_XK, home_X), num_ranks)
    else:
        ranks_KX, first_KX = reached_ranks(ids_XK, served.serving_LRE[layer], home_X)
    sender_X = np.repeat(np.arange(num_batches), len(ids_XK) // num_batches) * num_ranks + home_X

    def between(target_KX: np.ndarray, which_KX: np.ndarray, size: int) -> np.ndarray:
        """Marked rows from each home to each target, float64 [M, R, size]."""
        keys_KX = (sender_X * (size + 1) + target_KX)[which_KX]
        rows = np.bincount(keys_KX, minlength=num_batches * num_ranks * (size + 1))
        return rows.reshape(num_batches, num_ranks, size + 1)[:, :, :size].astype(np.float64)

    which_KX = (ranks_KX < num_ranks) if served.kind == "per-expert" else first_KX
    rows_MRR = between(ranks_KX, which_KX, num_ranks)
    near_RR = node_R[:, None] == node_R
    away_RR = ~np.eye(num_ranks, dtype=bool)
    if served.kind != "per-node":
        fast, cards = (_busiest(rows_MRR * pairs_RR) for pairs_RR in (near_RR & away_RR, ~near_RR))
        return np.stack([fast[0], cards[0], fast[1], cards[1]])
    nodes_KX = np.append(node_R, num_nodes).astype(np.int16).take(ranks_KX)
    rows_MRN = between(nodes_KX, first_of_run(nodes_KX) & (nodes_KX < num_nodes), num_nodes)
    rows_MRN *= np.arange(num_nodes) != node_R[:, None]
    return np.stack(_by_node(rows_MRR, rows_MRN, node_R))


def _busiest(rows_MRR: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the busiest sender or receiver, and of the mean one, [M] each."""
    sent_MR, received_MR = rows_MRR.sum(2), rows_MRR.sum(1)
    return np.maximum(sent_MR.max(1), received_MR.max(1)), sent_MR.mean(1)


def _by_node(rows_MRR: np.ndarray, rows_MRN: np.ndarray, node_R: np.ndarray) -> Sequence[np.ndarray]:
    """nvl, nic and their means, [M] each, where a row enters a node once, at the rank that has the
    place of its home there, which passes it on."""
    num_ranks, num_nodes = len(node_R), rows_MRN.shape[2]
    size_N = np.bincount(node_R)
    place_R = np.arange(num_ranks) - (np.cumsum(size_N) - size_N)[node_R]
    first_N = np.cumsum(size_N) - size_N
    entry_RN = first_N + place_R[:, None] % size_N
    received_MR = np.zeros(rows_MRR.shape[:2])
    for node in range(num_nodes):
        for home in range(num_ranks):
            received_MR[:, entry_RN[home, node]] += rows_MRN[:, home, node]
    sent_MR = rows_MRN.sum(2)
    passed_RR = place_R[:, None] != place_R
    fast_MR = (rows_MRR * passed_RR).sum(1)
    return (
        fast_MR.max(1),
        np.maximum(sent_MR.max(1), received_MR.max(1)),
        fast_MR.mean(1),
        sent_MR.mean(1),
    )
