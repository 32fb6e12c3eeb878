"""Copies of experts for the predicted time: slots exchanged and refilled while that lowers the mean
over batches of what the busiest link and the busiest rank cost together.

A copy takes the tokens that the replica rule gives it (solvers/place/replicas.py), which is asked
for every trial. Rows that are sent once are counted on a sample of tokens at random homes.

Shape letters: E experts, R ranks, M batches, T tokens, K top-k, F kinds of work (padded
activations, active experts, activations).
"""

from typing import NamedTuple

import numpy as np

from semmoe.solvers.evaluate.reached import reached_ranks
from semmoe.solvers.place.replicas import serving_LRE
from semmoe.solvers.placement import Topology
from semmoe.solvers.time.swaps import LayerBatches, Prices, expert_work

MOST_BATCHES = 512  # that activations are counted in
LINK_TOKENS = 4096  # that rows are counted on


class CopyTask(NamedTuple):
    """What a layer's copies are chosen by."""

    batches: LayerBatches
    load_E: np.ndarray  # of the fitted requests, for the replica rule
    topology: Topology
    levels_UR: list[np.ndarray]
    prices: Prices
    trials: int
    seed: int


class _State(NamedTuple):
    hosts_ER: np.ndarray
    time: float
    busy_R: np.ndarray  # how often each rank is the busiest, summing to 1


def place_copies(task: CopyTask, hosts_ER: np.ndarray) -> tuple[np.ndarray, float]:
    """Which rank hosts which expert, bool [E, R], with as many slots on every rank as `hosts_ER`
    has, and the mean time."""
    rng = np.random.default_rng([task.seed, 31])
    measured = _Measured.of(task)
    state = _measure(task, measured, hosts_ER)
    for _ in range(task.trials):
        changed_ER = _proposal(state, measured.load_E, rng)
        if changed_ER is None:
            continue
        then = _measure(task, measured, changed_ER)
        if then.time < state.time:
            state = then
    return state.hosts_ER, state.time


class _Measured(NamedTuple):
    """Activations of batches, and tokens for rows."""

    n_ME: np.ndarray
    load_E: np.ndarray
    ids_TK: np.ndarray
    home_T: np.ndarray
    tokens_M: np.ndarray  # of each batch

    @classmethod
    def of(cls, task: CopyTask) -> "_Measured":
        batches = task.batches
        tokens_M = batches.weight_MG @ np.bincount(batches.group_T, minlength=batches.weight_MG.shape[1])
        rng = np.random.default_rng([task.seed, 37])
        rows = rng.permutation(len(batches.ids_TK))[:LINK_TOKENS]
        home_T = np.arange(len(rows)) % task.topology.num_ranks
        n_ME = batches.n_XE[:MOST_BATCHES].astype(np.float64)
        return cls(n_ME, n_ME.mean(0), batches.ids_TK[rows], home_T, np.resize(tokens_M, len(n_ME)))


def _measure(task: CopyTask, measured: _Measured, hosts_ER: np.ndarray) -> _State:
    serving_RE = serving_LRE(hosts_ER[None], task.load_E[None], task.topology)[0]
    num_ranks = len(serving_RE)
    work_FMR = np.zeros((3, len(measured.n_ME), num_ranks))
    copied_E = hosts_ER.sum(1) > 1
    tile = task.batches.tile
    rank_ER = np.eye(num_ranks)[serving_RE[0, ~copied_E]]
    work_FMR += expert_work(measured.n_ME[:, ~copied_E], tile) @ rank_ER
    for expert in np.flatnonzero(copied_E):
        share_R = np.bincount(serving_RE[:, expert], minlength=num_ranks) / num_ranks
        work_FMR += expert_work(measured.n_ME[:, expert, None] * share_R, tile)
    us_MR = task.prices.experts(*work_FMR)
    links_M = task.prices.links(_busiest(task, measured, work_FMR, serving_RE))
    time = float(task.prices.total(links_M, us_MR.max(1)).mean())
    return _State(hosts_ER, time, np.bincount(us_MR.argmax(1), minlength=num_ranks) / len(us_MR))


def _busiest(task: CopyTask, measured: _Measured, work_FMR: np.ndarray, serving_RE: np.ndarray) -> list[np.ndarray]:
    if task.prices.by_activation:
        return [work_FMR[2].max(1)]
    found = []
    for unit_of_R in task.levels_UR:
        units = int(unit_of_R.max()) + 1
        serving = unit_of_R[serving_RE]
        padded_RE = np.vstack([serving, np.zeros((max(0, units - len(serving)), serving.shape[1]), serving.dtype)])
        reached = reached_ranks(measured.ids_TK, padded_RE, measured.home_T)
        rows_U = np.bincount(reached.ranks_KT[reached.first_KT], minlength=units)
        found.append(rows_U.max() / max(len(measured.home_T), 1) * measured.tokens_M)
    return found


def _proposal(state: _State, load_E: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """The hosts after a random move that takes load off a busy rank: an expert of it exchanged for
    one of another rank, or copied to another rank in place of a copy there; None where it is not
    possible."""
    hosts_ER = state.hosts_ER
    num_experts, num_ranks = hosts_ER.shape
    busy = int(rng.choice(num_ranks, p=state.busy_R))
    own = np.flatnonzero(hosts_ER[:, busy])
    weight = load_E[own] + 1e-9
    expert = int(rng.choice(own, p=weight / weight.sum()))
    free = np.flatnonzero(~hosts_ER[expert])
    if not len(free):
        return None
    other = int(rng.choice(free))
    copied = hosts_ER.sum(1) > 1
    changed_ER = hosts_ER.copy()
    spare = np.flatnonzero(hosts_ER[:, other] & copied)
    if len(spare) and rng.random() < 0.5:
        changed_ER[int(rng.choice(spare)), other] = False
        changed_ER[expert, other] = True
        return changed_ER
    partners = np.flatnonzero(hosts_ER[:, other] & ~hosts_ER[:, busy])
    if not len(partners):
        return None
    partner = int(rng.choice(partners))
    changed_ER[expert, [busy, other]] = [False, True]
    changed_ER[partner, [busy, other]] = [True, False]
    return changed_ER
