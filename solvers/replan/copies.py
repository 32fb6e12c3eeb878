"""One layer with copies re-placed: greedy exchanges of what two slots hold, and of a copy for
another expert, best gain per move first.

Which copy serves a token depends on where the token lives and on all other copies, so an exchange
has no closed gain. Gains of all exchanges are estimated from what each slot's tokens touch; the
most promising are then counted exactly under the replica rule, and the best of those is taken.

Shape letters: T tokens, K top-k, E experts, R ranks, P slots in use, J load vectors.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from semmoe.solvers.evaluate.reached import first_of_run, reached_ranks
from semmoe.solvers.place.replicas import served_load_R, serving_LRE
from semmoe.solvers.placement import Topology
from semmoe.solvers.replan.search import Frontier, most_elsewhere
from semmoe.solvers.replan.worth import Worth

TRIALS = 8  # exchanges counted exactly at each step
LEAST_GAIN = 1e-6  # rows per token


@dataclass(frozen=True, eq=False)
class CopyTask:
    """One layer to re-place; sent to a worker process."""

    old_hosts_ER: np.ndarray  # bool
    expert_ids_TK: np.ndarray  # E = empty slot
    home_T: np.ndarray  # int64: rank where each row lives
    load_JE: np.ndarray  # float64
    topology: Topology
    cost_RR: np.ndarray  # float64: of a row from rank to rank
    worth: Worth
    lar_weight: float
    max_moves: int


class Exchange(NamedTuple):
    """Expert e leaves rank a and f comes; where f leaves rank b too, e goes there."""

    e: int
    a: int
    f: int
    b: int  # -1: e is dropped, f copied

    @property
    def moves(self) -> int:
        return 1 if self.b < 0 else 2

    def done(self, hosts_ER: np.ndarray) -> np.ndarray:
        """The placement after it."""
        hosts_ER = hosts_ER.copy()
        hosts_ER[self.e, self.a], hosts_ER[self.f, self.a] = False, True
        if self.b >= 0:
            hosts_ER[self.f, self.b], hosts_ER[self.e, self.b] = False, True
        return hosts_ER


def search_copies(task: CopyTask) -> Frontier:
    """The least cost found for every number of moves up to `task.max_moves`."""
    state = _State.of(task, task.old_hosts_ER)
    first, best = state.cost, {0: (0.0, task.old_hosts_ER)}
    while True:
        moves = int((state.hosts_ER & ~task.old_hosts_ER).sum())
        reached = [_State.of(task, exchange.done(state.hosts_ER)) for exchange in _promising(task, state)]
        reached = [s for s in reached if (s.hosts_ER & ~task.old_hosts_ER).sum() <= task.max_moves]
        paid = [max(int((s.hosts_ER & ~task.old_hosts_ER).sum()) - moves, 0.5) for s in reached]
        worths = [(state.cost - s.cost) / more for s, more in zip(reached, paid, strict=True)]
        if not worths or max(worths) < LEAST_GAIN:
            break
        state = reached[worths.index(max(worths))]
        moves = int((state.hosts_ER & ~task.old_hosts_ER).sum())
        if first - state.cost > best.get(moves, (-np.inf,))[0]:
            best[moves] = first - state.cost, state.hosts_ER
    gain_M, held = np.zeros(task.max_moves + 1), []
    for moves in range(task.max_moves + 1):
        gain_M[moves], hosts_ER = max((best[m] for m in best if m <= moves), key=lambda found: found[0])
        held.append(np.nonzero(hosts_ER.T)[1])
    rank_of_P = np.nonzero(task.old_hosts_ER.T)[0]
    return Frontier(gain_M, np.array(held, np.int32), rank_of_P.astype(np.int16))


@dataclass(frozen=True, eq=False)
class _State:
    """A placement, and what the rows make of it."""

    hosts_ER: np.ndarray
    serving_RE: np.ndarray
    load_JR: np.ndarray  # in means
    cost: float

    @classmethod
    def of(cls, task: CopyTask, hosts_ER: np.ndarray) -> "_State":
        worth, topology = task.worth, task.topology
        serving_RE = serving_LRE(hosts_ER[None], task.load_JE[:1], topology)[0]
        load_JR = np.stack([served_load_R(serving_RE, load_E) for load_E in task.load_JE])
        load_JR /= np.maximum(load_JR.mean(axis=1, keepdims=True), 1e-300)
        ranks_KT, new_KT = reached_ranks(task.expert_ids_TK, serving_RE, task.home_T)
        cost_RR = np.pad(task.cost_RR, ((0, 0), (0, 1)))
        row_KT = cost_RR[task.home_T, ranks_KT]
        cost = worth.rank_row * float((row_KT * new_KT).sum())
        cost += (worth.activation_row + task.lar_weight) * float((row_KT > 0).sum())
        if worth.node_row:
            node_of = np.append(topology.node_of_R, -1)
            node_KT = node_of[ranks_KT]
            away_KT = first_of_run(node_KT) & (node_KT != node_of[task.home_T]) & (node_KT >= 0)
            cost += worth.node_row * float(away_KT.sum())
        excess = float(np.maximum(load_JR.max() - worth.load_cap, 0))
        return cls(hosts_ER, serving_RE, load_JR, cost / max(len(task.home_T), 1) + worth.excess * excess)


def _promising(task: CopyTask, state: _State) -> list[Exchange]:
    """Exchanges that promise most per move, best first."""
    hosts_ER, num_ranks = state.hosts_ER, state.hosts_ER.shape[1]
    rank_P, expert_P = np.nonzero(hosts_ER.T)
    seen = _touched(task, state, rank_P, expert_P)
    each = np.arange(len(rank_P))
    row = max(task.worth.rank_row, task.worth.node_row, task.worth.activation_row) / max(len(task.home_T), 1)
    load_E = task.load_JE[0] / max(task.load_JE[0].sum() / num_ranks, 1e-300)
    over_R = state.load_JR[0] - task.worth.load_cap
    share_P = load_E[expert_P] * (state.serving_RE[:, expert_P] == rank_P).mean(axis=0)
    # 1. What two slots hold, exchanged.
    swap_PP = seen.freed_P[:, None] - seen.opened_PR[:, rank_P]
    swap_PP = row * (swap_PP + swap_PP.T)
    swap_PP += task.worth.excess * _relief(over_R, rank_P, share_P[None, :] - share_P[:, None])
    legal_PP = ~hosts_ER[expert_P][:, rank_P]
    swap_PP[~(legal_PP & legal_PP.T)] = -np.inf
    found = []
    for flat in np.argsort(-np.triu(swap_PP, 1), axis=None)[: 2 * TRIALS]:
        p, q = divmod(int(flat), len(each))
        if p < q and np.isfinite(swap_PP[p, q]):
            exchange = Exchange(int(expert_P[p]), int(rank_P[p]), int(expert_P[q]), int(rank_P[q]))
            found.append((swap_PP[p, q] / 2, exchange))
    # 2. A copy, exchanged for another expert.
    for p in np.flatnonzero(hosts_ER.sum(axis=1)[expert_P] > 1):
        e, a = int(expert_P[p]), int(rank_P[p])
        other = int(min(np.flatnonzero(hosts_ER[e] & (np.arange(num_ranks) != a)), key=lambda r: over_R[r]))
        coming_E = load_E / num_ranks
        then_ER = np.repeat(over_R[None], len(load_E), axis=0)
        then_ER[:, a] += coming_E - share_P[p]
        then_ER[:, other] += share_P[p]
        then_ER[np.arange(len(load_E)), state.serving_RE[a]] -= coming_E
        relief_E = max(over_R.max(), 0) - np.maximum(then_ER.max(axis=1), 0)
        gain_E = (
            row * (seen.freed_P[p] - seen.opened_PR[p, other] + seen.wanted_ER[:, a]) + task.worth.excess * relief_E
        )
        gain_E[hosts_ER[:, a]] = -np.inf
        for f in np.argsort(-gain_E)[:TRIALS]:
            if np.isfinite(gain_E[f]):
                found.append((float(gain_E[f]), Exchange(e, a, int(f), -1)))
    found.sort(key=lambda x: -x[0])
    return [exchange for _, exchange in found[:TRIALS]]


def _relief(over_R: np.ndarray, rank_P: np.ndarray, coming_PP: np.ndarray) -> np.ndarray:
    """Less load above the cap on the two ranks of a pair of slots where p's gets `coming` more and
    q's as much less, or on the busiest of the others, [P, P]."""
    mine_PP = over_R[rank_P][:, None] + coming_PP
    then_PP = np.maximum(mine_PP, mine_PP.T)
    return max(over_R.max(), 0) - np.maximum(np.maximum(then_PP, most_elsewhere(over_R)[rank_P][:, rank_P]), 0)


class _Touched(NamedTuple):
    """Rows counted by what the tokens of a slot touch."""

    freed_P: np.ndarray  # that only this slot makes its tokens send
    opened_PR: np.ndarray  # that its tokens would send to a rank which they do not touch
    wanted_ER: np.ndarray  # that a copy of e on r would save the tokens that live there


def _touched(task: CopyTask, state: _State, rank_P: np.ndarray, expert_P: np.ndarray) -> _Touched:
    from scipy.sparse import csr_array

    num_experts, num_ranks = state.hosts_ER.shape
    ids_TK, home_T = task.expert_ids_TK.astype(np.int64), task.home_T
    num_tokens, top_k = ids_TK.shape
    slot_ER = np.full((num_experts + 1, num_ranks + 1), len(rank_P))
    slot_ER[expert_P, rank_P] = np.arange(len(rank_P))
    serving = np.pad(state.serving_RE, ((0, 0), (0, 1)), constant_values=num_ranks)
    rank_TK = serving[home_T[:, None], ids_TK]
    keys_TK = np.arange(num_tokens)[:, None] * (num_ranks + 1) + rank_TK
    count_TR = np.bincount(keys_TK.reshape(-1), minlength=num_tokens * (num_ranks + 1)).reshape(num_tokens, -1)
    lone_TK = (count_TR.reshape(-1)[keys_TK] == 1) & (rank_TK != home_T[:, None]) & (rank_TK < num_ranks)
    slot_TK = slot_ER[ids_TK, rank_TK]
    freed_P = np.bincount(slot_TK[lone_TK], minlength=len(rank_P) + 1)[: len(rank_P)].astype(np.float64)
    ends = np.arange(0, num_tokens * top_k + 1, top_k)
    chosen_TP = csr_array(
        (np.ones(num_tokens * top_k, np.float32), slot_TK.reshape(-1), ends), (num_tokens, len(rank_P) + 1)
    )
    apart_TR = ((count_TR[:, :num_ranks] == 0) & (np.arange(num_ranks) != home_T[:, None])).astype(np.float32)
    opened_PR = (chosen_TP.T @ apart_TR)[: len(rank_P)].astype(np.float64)
    homes_TK = np.broadcast_to(home_T[:, None], ids_TK.shape)
    wanted_ER = np.bincount((ids_TK * num_ranks + homes_TK)[lone_TK], minlength=(num_experts + 1) * num_ranks)
    return _Touched(freed_P, opened_PR, wanted_ER.reshape(-1, num_ranks)[:num_experts].astype(np.float64))
