"""What a batch asks of links and experts, counted: the few numbers per layer that the time depends
on, so that a parameter changes without a count.

Shape letters: T tokens of a trace, L MoE layers, K top-k, E experts, R ranks, N nodes, M batches, J
tokens of a batch (ordered by home, J / R each).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from semmoe.solvers.evaluate.reached import first_of_run, reached_of, reached_ranks, reached_TR
from semmoe.solvers.place.replicas import MovingRule

if TYPE_CHECKING:
    from scipy.sparse import csr_array

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
    own_MLR: np.ndarray  # of those, of tokens that live there; 0 where `Served.own_first` is not set

    def chosen(self, batches: np.ndarray) -> "Counted":
        """Some of the batches."""
        return Counted(*(getattr(self, f.name)[batches] for f in fields(self)))

    def of_larger(self, factor: float) -> "Counted":
        """Of batches so many times as large, of the same tokens."""
        grown = {f.name: getattr(self, f.name) * factor for f in fields(self) if f.name != "active_MLR"}
        return Counted(**grown, active_MLR=self.active_MLR)


class Served(NamedTuple):
    """Where experts are, as a count needs it."""

    ids_LTK: np.ndarray  # chosen experts of the trace's rows, E for an empty slot
    serving_LRE: np.ndarray
    node_R: np.ndarray  # fast network of each rank
    kind: str  # per-rank, per-node, per-expert or gather
    tile: int
    moving: MovingRule | None = None  # what chooses copies token by token, in place of serving_LRE
    own_first: bool = False  # whether experts begin with the rank's own tokens


@dataclass(frozen=True, eq=False)
class Drawn:
    """Batches whose tokens live in the order they stand in, and what counts under any placement
    share."""

    rows_MJ: np.ndarray  # int64: rows of the trace
    token_XT: "csr_array"  # float32: how often each row is in the share of each batch and rank, X = M R
    n_MLE: np.ndarray  # int32: activations of each expert

    @classmethod
    def of(cls, rows_MJ: np.ndarray, ids_LTK: np.ndarray, num_ranks: int, num_experts: int) -> "Drawn":
        """The same counted once. `num_ranks` divides the tokens of a batch."""
        from scipy.sparse import csr_array

        (num_batches, num_tokens), (num_layers, num_rows, _) = rows_MJ.shape, ids_LTK.shape
        starts = np.arange(0, rows_MJ.size + 1, num_tokens // num_ranks)
        ones = np.ones(rows_MJ.size, np.float32)
        token_XT = csr_array((ones, rows_MJ.reshape(-1), starts), shape=(num_batches * num_ranks, num_rows))
        n_MLE = np.zeros((num_batches, num_layers, num_experts), np.int32)
        for layer, ids_TK in enumerate(ids_LTK):
            for n_LE, rows_J in zip(n_MLE, rows_MJ, strict=True):
                n_LE[layer] = np.bincount(ids_TK[rows_J].reshape(-1), minlength=num_experts + 1)[:num_experts]
        return cls(rows_MJ, token_XT, n_MLE)


HomesOfLayer = Callable[[int], np.ndarray]  # layer -> integers [M, J]


def count_batches(served: Served, rows_MJ: np.ndarray, homes: HomesOfLayer | None = None) -> Counted:
    """Counts of batches; homes are those of the order of `rows_MJ` unless a layer has others."""
    num_layers, num_ranks, _ = served.serving_LRE.shape
    num_batches, num_tokens = rows_MJ.shape
    top_k = served.ids_LTK.shape[2]
    links = np.zeros((4, num_batches, num_layers))
    work = np.zeros((4, num_batches, num_layers, num_ranks))
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


def count_drawn(served: Served, drawn: Drawn) -> Counted:
    """`count_batches` of batches at the homes of their order: without copies by what every row of
    the trace reaches, each looked at once."""
    serving_LRE = served.serving_LRE
    if served.moving is not None or (serving_LRE != serving_LRE[:, :1]).any():
        return count_batches(served, drawn.rows_MJ)
    (num_batches, num_tokens), (num_layers, num_ranks, _) = drawn.rows_MJ.shape, serving_LRE.shape
    node_RN = served.node_R[:, None] == np.arange(served.node_R[-1] + 1)
    links = np.zeros((4, num_batches, num_layers))
    work = np.zeros((4, num_batches, num_layers, num_ranks))
    for layer, (ids_TK, serving_RE) in enumerate(zip(served.ids_LTK, serving_LRE, strict=True)):
        work[:3, :, layer] = _work_of_experts(drawn.n_MLE[:, layer], serving_RE[0], served)
        if served.own_first:
            chosen_TR = _choices_TR(ids_TK, serving_RE[0], num_ranks)
            work[3, :, layer] = np.diagonal(_summed(drawn, chosen_TR), axis1=1, axis2=2)
        if served.kind == "gather":
            links[:, :, layer] = _gathered(served, num_tokens / num_ranks)[:, None]
            continue
        if served.kind == "per-expert":
            sent_TR = _choices_TR(ids_TK, serving_RE[0], num_ranks)
        else:
            sent_TR = reached_TR(ids_TK, serving_RE[0], num_ranks)
        rows_MRR = _summed(drawn, sent_TR)
        rows_MRN = _summed(drawn, sent_TR @ node_RN) if served.kind == "per-node" else None
        links[:, :, layer] = _busiest_links(served, rows_MRR, rows_MRN)
    return Counted(*links, *work)


def _choices_TR(ids_TK: np.ndarray, rank_of_E: np.ndarray, num_ranks: int) -> np.ndarray:
    """How many of its choices each token has on each rank, int64."""
    ranks_TK = np.append(rank_of_E, num_ranks).astype(np.int64)[ids_TK]
    keys_TK = np.arange(len(ids_TK))[:, None] * (num_ranks + 1) + ranks_TK
    count = np.bincount(keys_TK.reshape(-1), minlength=len(ids_TK) * (num_ranks + 1))
    return count.reshape(-1, num_ranks + 1)[:, :num_ranks]


def _summed(drawn: Drawn, sent_TX: np.ndarray) -> np.ndarray:
    """Rows of every token to targets, summed by batch and home, float64 [M, R, X]."""
    return (
        (drawn.token_XT @ sent_TX.astype(np.float32))
        .astype(np.float64)
        .reshape(len(drawn.rows_MJ), -1, sent_TX.shape[1])
    )


def _work_of_experts(n_ME: np.ndarray, rank_of_E: np.ndarray, served: Served) -> np.ndarray:
    """Padded activations, active experts and activations where no expert has copies, [3, M, R]."""
    rank_ER = np.eye(served.serving_LRE.shape[1])[rank_of_E]
    padded_ME = np.ceil(n_ME / served.tile) * served.tile
    return np.stack([padded_ME @ rank_ER, (n_ME > 0) @ rank_ER, n_ME @ rank_ER])


def _work(served: Served, layer: int, ids_XK: np.ndarray, home_X: np.ndarray, num_batches: int) -> np.ndarray:
    """Padded activations, active experts, activations and those of own tokens, [4, M, R]."""
    serving_RE = served.serving_LRE[layer]
    num_ranks, num_experts = serving_RE.shape
    batch_X = np.repeat(np.arange(num_batches), len(ids_XK) // num_batches)
    width = num_experts + 1
    own_MR = np.zeros((num_batches, num_ranks))
    if served.moving is None and not served.own_first and (serving_RE == serving_RE[0]).all():
        keys_XK = batch_X[:, None] * width + ids_XK
        n_ME = np.bincount(keys_XK.reshape(-1), minlength=num_batches * width).reshape(-1, width)[:, :num_experts]
        return np.stack([*_work_of_experts(n_ME, serving_RE[0], served), own_MR])
    if served.moving is not None:
        rank_XK = np.minimum(served.moving.ranks_TK(layer, ids_XK, home_X), num_ranks - 1)  # empty slots are cut off
    else:
        padded_RE = np.pad(serving_RE, ((0, 0), (0, 1))).astype(np.int64)
        rank_XK = padded_RE.reshape(-1).take(home_X[:, None] * width + ids_XK)
    if served.own_first:
        own_X = ((rank_XK == home_X[:, None]) & (ids_XK < num_experts)).sum(1)
        own = np.bincount(batch_X * num_ranks + home_X, own_X, num_batches * num_ranks)
        own_MR = own.reshape(num_batches, num_ranks)
    keys_XK = (batch_X[:, None] * num_ranks + rank_XK) * width + ids_XK
    n_MRE = np.bincount(keys_XK.reshape(-1), minlength=num_batches * num_ranks * width)
    n_MRE = n_MRE.reshape(num_batches, num_ranks, width)[:, :, :num_experts]
    padded_MR = (np.ceil(n_MRE / served.tile) * served.tile).sum(2)
    return np.stack([padded_MR, (n_MRE > 0).sum(2), n_MRE.sum(2), own_MR])


def _links(served: Served, layer: int, ids_XK: np.ndarray, home_X: np.ndarray, num_batches: int) -> np.ndarray:
    """Rows of the busiest and the mean link, fast ones first and network cards second, [4, M]:
    nvl, nic, their means."""
    num_ranks, node_R = served.serving_LRE.shape[1], served.node_R
    num_nodes = int(node_R[-1]) + 1
    tokens = len(ids_XK) // num_batches / num_ranks
    if served.kind == "gather":
        return np.broadcast_to(_gathered(served, tokens)[:, None], (4, num_batches))
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
    if served.kind != "per-node":
        return _busiest_links(served, rows_MRR, None)
    nodes_KX = np.append(node_R, num_nodes).astype(np.int16).take(ranks_KX)
    rows_MRN = between(nodes_KX, first_of_run(nodes_KX) & (nodes_KX < num_nodes), num_nodes)
    return _busiest_links(served, rows_MRR, rows_MRN)


def _gathered(served: Served, tokens: float) -> np.ndarray:
    """Rows where every rank gets every token, [4]: nvl, nic, their means. `tokens`: of a rank."""
    rows = [(len(served.node_R) - 1) * tokens, int(served.node_R[-1]) * tokens]
    return np.array(rows * 2)


def _busiest_links(served: Served, rows_MRR: np.ndarray, rows_MRN: np.ndarray | None) -> np.ndarray:
    """The same for rows between ranks and, where a row enters a node once, from ranks to nodes, [4,
    M]."""
    node_R = served.node_R
    if rows_MRN is not None:
        away_RN = np.arange(rows_MRN.shape[2]) != node_R[:, None]
        return np.stack(_by_node(rows_MRR, rows_MRN * away_RN, node_R))
    near_RR, away_RR = node_R[:, None] == node_R, ~np.eye(len(node_R), dtype=bool)
    fast, cards = (_busiest(rows_MRR * pairs_RR) for pairs_RR in (near_RR & away_RR, ~near_RR))
    return np.stack([fast[0], cards[0], fast[1], cards[1]])


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
