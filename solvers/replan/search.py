"""One layer re-placed: the least cost for every number of moves, from one search.

A price for every moved expert falls from dear to nothing while a tabu search swaps experts from the
old placement on. The best placement seen at every number of moves is kept, so one search answers
every budget, and a budget can be shared by all layers afterwards.

Swaps are judged by the exact count of remote ranks (`RemoteGains`, `NodeGains`) and by the busiest
rank's load above the cap.

Shape letters: E experts, R ranks, J load vectors, M numbers of moves from 0 to E.
"""

from typing import NamedTuple

import numpy as np

from semmoe.solvers.place.remote_gains import RemoteGains
from semmoe.solvers.place.swap import NEVER, TIE, rank_loads
from semmoe.solvers.replan.worth import Worth

# Worth of a pair on one rank beyond the ranks it saves: less than a free placement gives it. A few
# moves fit less noise than all do; of 0 to .3, small budgets kept most at 0 and large ones at .15.
PAIR_WORTH = 0.1
STEPS, PATIENCE = 60, 16  # swaps at one price, and those without a better placement that end it; for 32 experts
LARGE = 128  # experts: of more, a walk is shorter: its swaps cost ten times as much
PRICES = (0.08, 0.04, 0.02, 0.01, 0.005, 0.0)  # of a moved expert, in rows per token: from dear to nothing
# Worth of load above the cap summed over ranks, as part of the worth on the busiest: where several
# ranks are loaded alike, relieving one of them shows only so.
SMOOTHING = 0.5


class Frontier(NamedTuple):
    """The best that was found at every number of moves."""

    gain_M: np.ndarray  # float64: cost of the old placement less this one's, non-decreasing; 0 at no move
    held_MP: np.ndarray  # int32: experts in all slots in use, rank after rank; of equal gains the fewest moves
    rank_of_P: np.ndarray  # int16: rank of each of these slots

    def hosts_ER(self, moves: int, num_experts: int, num_ranks: int) -> np.ndarray:
        """Whether rank r hosts expert e within so many moves, bool [E, R]."""
        hosts_ER = np.zeros((num_experts, num_ranks), bool)
        hosts_ER[self.held_MP[moves], self.rank_of_P] = True
        return hosts_ER


class LoadExcess:
    """The busiest rank's load above the cap, and what each swap changes of it.

    `load_JE`: load vectors; the worst of them counts. Values are in means of a vector's load.
    """

    def __init__(self, rank_of_E: np.ndarray, load_JE: np.ndarray, load_cap: float, num_ranks: int) -> None:
        mean_J = np.maximum(load_JE.sum(axis=1) / num_ranks, 1e-300)
        self.unit_JE = load_JE / mean_J[:, None]
        self.load_JR = rank_loads(rank_of_E, self.unit_JE, num_ranks)
        self.load_cap = load_cap

    def value(self) -> float:
        return float(np.maximum(self.load_JR.max() - self.load_cap, 0))

    def smooth(self) -> float:
        """Load above the cap summed over ranks, of the worst vector."""
        return float(np.maximum(self.load_JR - self.load_cap, 0).sum(axis=1).max())

    def swap(self, e: int, f: int, rank_of_E: np.ndarray) -> None:
        """Loads after e and f changed ranks; `rank_of_E` is that of before."""
        delta_J = self.unit_JE[:, e] - self.unit_JE[:, f]
        self.load_JR[:, rank_of_E[e]] -= delta_J
        self.load_JR[:, rank_of_E[f]] += delta_J

    def relief(self, e: int, f: int, rank_of_E: np.ndarray) -> float:
        """How much less one swap leaves above the cap on the busiest rank, exactly."""
        load_JR, delta_J = self.load_JR.copy(), self.unit_JE[:, e] - self.unit_JE[:, f]
        load_JR[:, rank_of_E[e]] -= delta_J
        load_JR[:, rank_of_E[f]] += delta_J
        return self.value() - float(np.maximum(load_JR.max() - self.load_cap, 0))

    def relief_EE(self, rank_of_E: np.ndarray) -> np.ndarray:
        """How much less each swap leaves above the cap, float32 [E, E], on the busiest rank and,
        times SMOOTHING, on all."""
        worst_EE = summed_EE = None
        for unit_E, load_R in zip(self.unit_JE.astype(np.float32), self.load_JR, strict=True):
            over_R = (load_R - self.load_cap).astype(np.float32)
            over_E = over_R[rank_of_E]
            left_E = over_E - unit_E
            worst = left_E[:, None] + unit_E  # e's rank, with f in the place of e
            back = unit_E[:, None] + left_E  # and f's; by itself, as a transposed sum takes ten times as long
            np.maximum(worst, 0, out=worst)
            np.maximum(back, 0, out=back)
            summed = worst + back
            np.maximum(worst, back, out=worst)
            kept_E = np.maximum(over_E, 0)
            if kept_E.any():
                summed += np.float32(np.maximum(over_R, 0).sum()) - kept_E[:, None] - kept_E
                other_ER = most_elsewhere(over_R).take(rank_of_E, axis=1)
                np.maximum(worst, other_ER.take(rank_of_E, axis=0), out=worst)
            worst_EE = worst if worst_EE is None else np.maximum(worst_EE, worst, out=worst_EE)
            summed_EE = summed if summed_EE is None else np.maximum(summed_EE, summed, out=summed_EE)
        assert worst_EE is not None and summed_EE is not None
        # What may be left on the busiest rank, and on all of them.
        relief_EE = np.subtract(np.float32(self.value()), worst_EE, out=worst_EE)
        np.subtract(np.float32(self.smooth()), summed_EE, out=summed_EE)
        summed_EE *= np.float32(SMOOTHING)
        relief_EE += summed_EE
        return relief_EE


def most_elsewhere(over_R: np.ndarray) -> np.ndarray:
    """Most of all ranks but two, for every pair of ranks, [R, R]; 0 where there are no others."""
    top = np.argsort(-over_R)[:3]
    most_RR = np.zeros((len(over_R), len(over_R)), over_R.dtype)
    ranks = np.arange(len(over_R))
    for place in reversed(top):
        free_RR = (ranks[:, None] != place) & (ranks != place)
        most_RR[free_RR] = max(over_R[place], 0)
    return most_RR


class TrafficGains:
    """What each swap saves in remote rows per token: ranks and nodes that tokens touch, activations
    at home, each exactly counted and weighed as the task says."""

    def __init__(self, rank_of_E: np.ndarray, task: "Task") -> None:
        self.task = task
        pair_EE = PAIR_WORTH * task.affinity_EE
        self.ranks = RemoteGains(rank_of_E, task.expert_ids_XK, task.cost_XR, task.home_ER, pair_EE)
        self.rank_of_E = self.ranks.rank_of_E
        self.nodes = None
        if task.cost_XN is not None:
            self.per_node = task.cost_XR.shape[1] // task.cost_XN.shape[1]
            no_home_EN = np.zeros((len(rank_of_E), task.cost_XN.shape[1]))
            pair_EE = np.zeros_like(pair_EE)
            self.nodes = RemoteGains(rank_of_E // self.per_node, task.expert_ids_XK, task.cost_XN, no_home_EN, pair_EE)
        self._refresh()

    def swap(self, e: int, f: int) -> None:
        self.ranks.swap(e, f)
        if self.nodes is not None and self.nodes.rank_of_E[e] != self.nodes.rank_of_E[f]:
            self.nodes.swap(e, f)
        self._refresh()

    def _refresh(self) -> None:
        # Where nothing pays for rows the scale is nothing: a swap within a rank must stay none.
        self.gain_EE = self.ranks.gain_EE * np.float32(max(self.ranks.scale, 1e-30))
        if self.nodes is not None:
            node_of_E = self.nodes.rank_of_E
            between_EE = np.where(node_of_E[:, None] == node_of_E, np.float32(0), self.nodes.gain_EE)
            self.gain_EE += np.float32(self.nodes.scale) * between_EE


class Task(NamedTuple):
    """One layer to re-place; sent to a worker process. Costs are in rows per token, summed over a
    kind's tokens and divided by all."""

    old_of_E: np.ndarray  # int64: where each expert is
    affinity_EE: np.ndarray  # float64
    expert_ids_XK: np.ndarray  # kinds of tokens; E = empty slot
    cost_XR: np.ndarray  # float64: of touching each rank
    cost_XN: np.ndarray | None  # of touching each node, where nodes count
    home_ER: np.ndarray  # float64: worth of expert e on rank r
    load_JE: np.ndarray  # float64
    worth: Worth
    max_moves: int
    seed: int


class _Best:
    """The frontier while it is searched."""

    def __init__(self, task: Task) -> None:
        self.value_M = np.full(task.max_moves + 1, -np.inf)
        self.rank_of_ME = np.tile(task.old_of_E.astype(np.int16), (task.max_moves + 1, 1))

    def add(self, moves: int, value: float, rank_of_E: np.ndarray) -> None:
        if moves < len(self.value_M) and value > self.value_M[moves] + TIE:
            self.value_M[moves], self.rank_of_ME[moves] = value, rank_of_E

    def frontier(self) -> Frontier:
        gain_M = np.maximum.accumulate(self.value_M)
        better_M = np.diff(gain_M, prepend=-np.inf) > 0
        moved_M = np.maximum.accumulate(np.where(better_M, np.arange(len(gain_M)), 0))
        held_ME = np.argsort(self.rank_of_ME[moved_M], axis=1, kind="stable").astype(np.int32)
        return Frontier(gain_M, held_ME, np.sort(self.rank_of_ME[0]))


def search_layer(task: Task) -> Frontier:
    """The least cost for every number of moves up to `task.max_moves`."""
    best = _Best(task)
    walk = _Walk(task, best)
    for price in PRICES:
        walk.go(price)
    return best.frontier()


class _Walk:
    """A tabu search that goes on from price to price."""

    def __init__(self, task: Task, best: _Best) -> None:
        self.task, self.best, self.rng = task, best, np.random.default_rng(task.seed)
        size, num_ranks = len(task.old_of_E), task.cost_XR.shape[1]
        self.gains = TrafficGains(task.old_of_E, task)
        self.loads = LoadExcess(task.old_of_E, task.load_JE, task.worth.load_cap, num_ranks)
        self.free_at_E, self.step = np.zeros(size, np.int64), 0
        self.tenure = max(1, min(size // 10, 12))
        self.moves, self.value = 0, 0.0  # of its placement, against the old one
        best.add(0, 0.0, task.old_of_E)

    def go(self, price: float) -> None:
        """Swaps at one price until none is better for a while."""
        size = len(self.gains.rank_of_E)
        steps, patience = STEPS * max(size, 32) // 32, PATIENCE * max(size, 32) // 32
        if size > LARGE:
            steps, patience = max(self.task.max_moves // 2, STEPS // 2), PATIENCE // 2
        reached, since = self.value - price * self.moves, 0
        for _ in range(steps):
            if not self._step(price):
                return
            since += 1
            if self.value - price * self.moves > reached + TIE:
                reached, since = self.value - price * self.moves, 0
            elif since >= patience:
                return

    def _step(self, price: float) -> bool:
        """The best swap is made, of experts that did not move lately unless it is the best so far
        at its number of moves. Whether there was one."""
        rank_of_E, excess = self.gains.rank_of_E, self.task.worth.excess
        more_EE = self._more_moves_EE()
        total_EE = self.loads.relief_EE(rank_of_E)
        total_EE *= np.float32(excess)
        total_EE += self.gains.gain_EE
        if price:
            total_EE -= np.float32(price) * more_EE
        if self.moves + 2 > self.task.max_moves:
            np.copyto(total_EE, NEVER, where=(more_EE > 0) & (self.moves + more_EE > self.task.max_moves))
        e, f = divmod(int(total_EE.argmax()), len(rank_of_E))
        if max(self.free_at_E[e], self.free_at_E[f]) > self.step:
            gain = self.gains.gain_EE[e, f] + excess * self.loads.relief(e, f, rank_of_E)
            moves = self.moves + int(more_EE[e, f])
            if moves >= len(self.best.value_M) or self.value + gain <= self.best.value_M[moves] + TIE:
                tabu = np.flatnonzero(self.free_at_E > self.step)
                total_EE[tabu] = NEVER
                total_EE[:, tabu] = NEVER
                e, f = divmod(int(total_EE.argmax()), len(rank_of_E))
        if not np.isfinite(total_EE[e, f]):
            return False
        self.value += float(self.gains.gain_EE[e, f]) + excess * self.loads.relief(e, f, rank_of_E)
        self.moves += int(more_EE[e, f])
        self.loads.swap(e, f, rank_of_E)
        self.gains.swap(e, f)
        self.free_at_E[[e, f]] = self.step + 1 + self.tenure + self.rng.integers(0, self.tenure + 1, 2)
        self.step += 1
        self.best.add(self.moves, self.value, self.gains.rank_of_E)
        return True

    def _more_moves_EE(self) -> np.ndarray:
        """Moves that each swap adds, int8 [E, E], from -2 to 2."""
        rank_of_E = self.gains.rank_of_E
        old_of_E = self.task.old_of_E
        # Where it is at home: one move more for leaving, one less for coming back.
        home_E = (old_of_E == rank_of_E).view(np.int8)
        more_EE = home_E[:, None] + home_E
        more_EE -= (old_of_E[:, None] == rank_of_E).view(np.int8)
        more_EE -= (rank_of_E[:, None] == old_of_E).view(np.int8)
        return more_EE
