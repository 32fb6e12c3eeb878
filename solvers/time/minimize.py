"""Placement for the predicted time: swaps of experts on batches as they will run (`swaps.py`),
layer by layer. Ways to place are told apart on requests that they were not fitted on.

Shape letters: T tokens, L MoE layers, K top-k, E experts, R ranks, G groups of tokens, M batches, B
requests.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np

from semmoe.profiles.counts import RoutingProfile, co_activation_EE
from semmoe.profiles.errors import InputError
from semmoe.profiles.progress import Progress, Stages, unshown, unshown_stages
from semmoe.solvers.demands import Demands, Solved
from semmoe.solvers.place.baselines import baselines, place_load_on_nodes
from semmoe.solvers.place.exact_counts import LEAST_REQUESTS, in_linear_shares
from semmoe.solvers.place.graph import place_quickly
from semmoe.solvers.place.replicas import served_load_R, serving_LRE
from semmoe.solvers.place.request_homes import align_labels, chosen_requests, request_usage_LBE
from semmoe.solvers.place.solve import FILLING, PLACING, Filling, with_copies
from semmoe.solvers.placement import Placement, Topology
from semmoe.solvers.time.balance import balance_layer
from semmoe.solvers.time.batches import Pool, pool_of
from semmoe.solvers.time.copies import CopyTask, place_copies
from semmoe.solvers.time.fit import Fit, fit_of
from semmoe.solvers.time.hardware import WAYS, Costing, TimeAsked, costing_of, nodes_of_ranks
from semmoe.solvers.time.moe_layer import experts_us, way_us
from semmoe.solvers.time.swaps import LayerBatches, Prices, mean_imbalance, mean_time, swap_layer
from semmoe.solvers.workers import layer_map

KICKS = {"fast": 0, "default": 1, "max": 8}
COPY_TRIALS = {"fast": 150, "default": 400, "max": 1600}  # of COPIED_EXPERTS; up to MORE_TRIALS times as many of fewer
COPIED_EXPERTS, MORE_TRIALS = 128, 4
TRIED_LAYERS = {"fast": 4, "default": 8, "max": 8}  # that recipes are compared on
SAME_TIME = 0.002  # of the time: what a few layers of half of the requests do not tell apart
LABEL_STARTS = {"fast": 4, "default": 16, "max": 16}


class Links(NamedTuple):
    """Where rows are sent once, and what part of the rows that reach a unit its busiest rank gets
    over the fast network and over network cards."""

    levels_UR: list[np.ndarray]  # unit of each rank: ranks, nodes
    shares: list[tuple[float, float]]


def links_of(costing: Costing, topology: Topology) -> Links:
    """Levels of a backend on a topology; homes are random."""
    num_ranks = topology.num_ranks
    node_R = nodes_of_ranks(num_ranks, topology.ranks_per_node, topology.num_nodes, costing.domain)
    num_nodes = int(node_R[-1]) + 1
    per_node = num_ranks / num_nodes
    if costing.kind == "gather":
        return Links([], [])
    if costing.kind == "per-expert":
        return Links([], [((per_node - 1) / num_ranks, (num_ranks - per_node) / num_ranks)])
    if costing.kind == "per-rank":
        return Links([np.arange(num_ranks)], [(1 - 1 / num_ranks, 0.0)])
    inside, between = (1 - 1 / per_node, 0.0), (0.0, (1 - 1 / num_nodes) / per_node)
    if per_node == 1:
        return Links([node_R], [between])
    return Links([np.arange(num_ranks), node_R], [inside, between])


def prices_of(costing: Costing, topology: Topology) -> Prices:
    """The time model as swaps ask it."""
    shares = links_of(costing, topology).shares
    return Prices(
        partial(_links_us, shares=shares, costing=costing, num_ranks=topology.num_ranks),
        partial(_experts_us, costing=costing),
        partial(_total_us, costing=costing, away=1 - 1 / topology.num_ranks),
        costing.kind == "per-expert",
    )


def _links_us(
    busiest: list[np.ndarray], *, shares: list[tuple[float, float]], costing: Costing, num_ranks: int
) -> np.ndarray:
    if not busiest:
        return np.zeros(())
    fast, cards = (
        np.max([reach * share[way] for reach, share in zip(busiest, shares, strict=True)], axis=0) for way in (0, 1)
    )
    rows = np.stack([fast, cards])
    return np.sum([way_us(rows, way, costing, costing.values, num_ranks) for way in WAYS], axis=0)


def _experts_us(padded: np.ndarray, active: np.ndarray, rows: np.ndarray, *, costing: Costing) -> np.ndarray:
    if costing.balances:
        return np.zeros(rows.shape)
    return experts_us((padded, active, rows), costing, costing.values)


def _total_us(links: np.ndarray, experts: np.ndarray, *, costing: Costing, away: float) -> np.ndarray:
    """`away`: of a rank's activations at random homes, the share that other ranks send."""
    if costing.asked.overlap == "two-batch":
        return 2 * np.maximum(links, experts + costing.asked.other_us / 2)
    if costing.own_first:
        return links / 2 + np.maximum(links / 2 + away * experts, experts)
    return links + experts


@dataclass(frozen=True, eq=False)
class _Layer:
    """One layer and some requests; sent to a worker process."""

    batches: LayerBatches
    ids_TK: np.ndarray  # each row once
    topology: Topology
    num_groups: int
    levels_UR: list[np.ndarray]
    prices: Prices
    seed: int
    effort: str
    kicks: int

    @property
    def num_ranks(self) -> int:
        return self.topology.num_ranks

    def packed(self) -> np.ndarray:
        """Rank of each expert by load packing."""
        load_E = np.bincount(self.ids_TK.reshape(-1), minlength=self.batches.num_experts + 1)[:-1]
        return place_load_on_nodes(load_E[None], self.topology, self.num_groups)[0].astype(np.int64)

    @cached_property
    def balanced(self) -> np.ndarray:
        """From there, with the busiest rank's activations alone in mind."""
        return balance_layer(self.batches.n_XE, self.packed(), self.num_ranks, effort=self.effort, seed=self.seed)

    def near(self) -> np.ndarray:
        """By co-activation within ranks."""
        pairs_EE = co_activation_EE(self.ids_TK, self.batches.num_experts)
        return place_quickly(pairs_EE[None], self.num_ranks, self.seed)[0].astype(np.int64)

    def swapped(self, start_E: np.ndarray) -> np.ndarray:
        """With links and experts in mind, from a start."""
        options = {"num_ranks": self.num_ranks, "seed": self.seed, "kicks": self.kicks}
        return swap_layer(self.batches, start_E, self.levels_UR, self.prices, **options)[0]


# Ways to place a layer; which one is best for a trace and a setting is asked of requests that were
# not placed by.
RECIPES: dict[str, Callable[[_Layer], np.ndarray]] = {
    "load packing": _Layer.packed,
    "experts balanced over batches": lambda layer: layer.balanced,
    "links and experts, from balanced experts": lambda layer: layer.swapped(layer.balanced),
    "links and experts, from co-activation": lambda layer: layer.swapped(layer.near()),
}
BALANCE_ONLY = list(RECIPES)[:3]  # where no row is sent once, co-activation says nothing


class _Placed(NamedTuple):
    """A layer as a recipe places it, and the mean time on the batches that it was placed by."""

    rank_of_E: np.ndarray
    time: float


def _place(work: tuple[list[str], _Layer]) -> list[_Placed]:
    """The layer by each recipe."""
    recipes, layer = work
    options = {"num_ranks": layer.num_ranks}
    found = [RECIPES[name](layer) for name in recipes]
    return [_Placed(r_E, mean_time(layer.batches, r_E, layer.levels_UR, layer.prices, **options)) for r_E in found]


class _Tried(NamedTuple):
    """A recipe on half of the requests: mean time on the others, and the activations of their
    busiest rank over the mean."""

    time: float
    imbalance: float


def _try(work: tuple[list[str], _Layer, LayerBatches]) -> list[_Tried]:
    """What each recipe that places the layer gives on batches of other requests."""
    recipes, layer, others = work
    options = {"num_ranks": layer.num_ranks}
    return [
        _Tried(
            mean_time(others, placed.rank_of_E, layer.levels_UR, layer.prices, **options),
            mean_imbalance(others, placed.rank_of_E, **options),
        )
        for placed in _place((recipes, layer))
    ]


def check_for_time(asked: TimeAsked | None, method: str, demands: Demands) -> None:
    """Raise InputError where no time can be minimised, or the method or a demand is about something
    else."""
    if asked is None:
        raise InputError("--minimize time needs --hardware: time is predicted for a machine")
    if method != "semmoe":
        raise InputError(f"--minimize time needs --method semmoe: {method} minimises what it says")
    if demands.expressible:
        raise InputError(f"--expressible {demands.expressible} goes with --minimize bytes")


def solve_for_time(
    profile: RoutingProfile,
    topology: Topology,
    demands: Demands,
    asked: TimeAsked,
    *,
    progress: Stages = unshown_stages,
) -> Solved:
    """The placement of least predicted time that is found from packing by load and from the fewest
    rows under the load cap."""
    info = profile.info
    prompts = float(profile.sample.is_prompt_T.mean()) if profile.sample.num_tokens else 0.0
    costing = costing_of(asked, info, topology, prompts=prompts)
    solved = place_for_time(profile, topology, demands, costing, partial(progress, PLACING))
    slots = demands.slots_of(info.num_experts, topology.num_ranks)
    if not slots.copies or slots.per_rank * topology.num_ranks == info.num_experts:
        return solved
    filling = partial(progress, FILLING)
    copied = copies_for_time(profile, topology, demands, costing, solved.placement, progress=filling)
    return replace(copied, notes=solved.notes)


def place_for_time(
    profile: RoutingProfile, topology: Topology, demands: Demands, costing: Costing, progress: Progress | None = None
) -> Solved:
    """The placement of least predicted time that is found, every expert once.

    Each of RECIPES places all layers by all requests, and some layers by one half of the requests,
    where it is timed on the other. Over load packing, a recipe promises too much on the requests
    that it placed by, and too little from half of them: the best is chosen by the mean of both,
    and of several that are as good the one that balances best.

    Parameters:
        profile: counts of the requests to fit, and a sample of them.
        demands: seed, effort and processes; the load cap has no part in it.
        costing: the machine, backend and batches.
        progress: told of every layer that is done.
    """
    info, show, num_ranks = profile.info, progress or unshown, topology.num_ranks
    pool = pool_of(profile.sample, costing.phase)
    parts = _halves(pool, demands.seed)
    whole, *halves = (fit_of(part, costing, num_ranks, demands) for part in (pool, *parts))
    judges = [fit_of(part, costing, num_ranks, demands, resampled=False) for part in parts[::-1]]
    shape = links_of(costing, topology)
    prices, tile = prices_of(costing, topology), int(costing.values["experts.tile"])
    recipes = list(RECIPES) if shape.levels_UR else BALANCE_ONLY
    tried = np.unique(
        np.linspace(0, info.num_layers - 1, min(info.num_layers, TRIED_LAYERS[demands.effort])).astype(int)
    )

    def batches(fit: Fit, number: int) -> LayerBatches:
        return fit.layer(profile.sample.expert_ids_TLK[:, number], info.num_experts, tile)

    def layer(fit: Fit, number: int, kicks: int) -> _Layer:
        ids_TK = profile.sample.expert_ids_TLK[:, number][fit.counted_T]
        options = (shape.levels_UR, prices, demands.seed, demands.effort, kicks)
        return _Layer(batches(fit, number), ids_TK, topology, info.n_group, *options)

    with layer_map(demands.processes, info.num_experts) as run:
        pairs = zip(halves, judges, strict=True)
        trials = ((recipes, layer(fit, n, 0), batches(others, n)) for fit, others in pairs for n in tried)
        tried_XF = list(run(_try, trials))
        work = ((recipes, layer(whole, number, KICKS[demands.effort])) for number in range(info.num_layers))
        placed_LF: list[list[_Placed]] = []
        for found in run(_place, work):
            placed_LF.append(found)
            show(len(placed_LF), info.num_layers)
    cost_F = np.array([[placed.time for placed in placed_F] for placed_F in placed_LF]).mean(0)
    note = ""
    if halves:
        others_F, imbalance_F = np.array(tried_XF).mean(0).T
        time_F = cost_F / cost_F[0] + others_F / others_F[0]
        cost_F = np.where(time_F <= time_F.min() * (1 + SAME_TIME), imbalance_F, np.inf)
        promised, packed = imbalance_F[[int(np.argmin(cost_F)), 0]]
        note = f"; placed by half of the requests, the busiest rank of the others has {promised:.3f} of the mean load"
        note += f" ({packed:.3f} by load packing)"
    best = int(np.argmin(cost_F))
    rank_of_LE = _labelled(np.stack([found[best].rank_of_E for found in placed_LF]), profile, topology, demands)
    if demands.spare == "empty":
        rank_of_LE = in_linear_shares(rank_of_LE, profile, profile.load_LE, topology.num_ranks, demands.load_cap)
    solved = Solved.from_ranks(rank_of_LE, profile.load_LE, topology.num_ranks)
    return replace(solved, notes=[f"placed for time: {recipes[best]}{note}"])


def _halves(pool: Pool, seed: int) -> list[Pool]:
    """The requests in two parts; nothing where there are too few to tell."""
    if pool.num_requests < LEAST_REQUESTS:
        return []
    order = np.random.default_rng([seed, 29]).permutation(pool.num_requests)
    parts = np.array_split(order, 2)
    return [Pool([pool.rows_B[b] for b in part], pool.request_of_pool[part], pool.note) for part in parts]


def copies_for_time(
    profile: RoutingProfile,
    topology: Topology,
    demands: Demands,
    costing: Costing,
    placement: Placement,
    *,
    progress: Progress = unshown,
) -> Solved:
    """The placement with its spare slots filled for the predicted time: from what load packing
    copies and from what affinity does, whichever becomes faster at a layer.

    `placement`: every expert once.
    """
    info, num_ranks = profile.info, topology.num_ranks
    slots = demands.slots_of(info.num_experts, num_ranks)
    by_affinity = with_copies(placement, profile, topology, slots, Filling(demands.load_cap, demands.processes))
    by_load = baselines(profile.load_LE, topology, info.n_group, slots=slots)["load"]
    pool = pool_of(profile.sample, costing.phase)
    fit = fit_of(pool, costing, num_ranks, demands)
    tile = int(costing.values["experts.tile"])
    prices, levels_UR = prices_of(costing, topology), links_of(costing, topology).levels_UR

    def tasks() -> Iterator[tuple[CopyTask, list[np.ndarray]]]:
        for layer in range(info.num_layers):
            batches = fit.layer(profile.sample.expert_ids_TLK[:, layer], info.num_experts, tile)
            trials = COPY_TRIALS[demands.effort] * min(MORE_TRIALS, max(1, COPIED_EXPERTS // info.num_experts))
            task = CopyTask(batches, profile.load_LE[layer], topology, levels_UR, prices, trials, demands.seed)
            yield task, [by_load.hosts_LER[layer], by_affinity.hosts_LER[layer]]

    with layer_map(demands.processes, info.num_experts) as run:
        hosts = []
        for hosts_ER in run(_solve_copies, tasks()):
            hosts.append(hosts_ER)
            progress(len(hosts), info.num_layers)
    experts_LRS = np.array([[np.flatnonzero(hosts_ER[:, r]) for r in range(num_ranks)] for hosts_ER in hosts])
    copied = Placement(experts_LRS.astype(np.int32), info.num_experts)
    serving = serving_LRE(copied.hosts_LER, profile.load_LE, topology)
    loads = np.stack([served_load_R(s, load_E) for s, load_E in zip(serving, profile.load_LE, strict=True)])
    return Solved(copied, loads)


def _solve_copies(work: tuple[CopyTask, list[np.ndarray]]) -> np.ndarray:
    task, starts = work
    return min((place_copies(task, hosts_ER) for hosts_ER in starts), key=lambda found: found[1])[0]


def _labelled(rank_of_LE: np.ndarray, profile: RoutingProfile, topology: Topology, demands: Demands) -> np.ndarray:
    """Ranks renamed at every layer, nodes kept together, so that a request finds its experts on
    one rank at all layers: what a router needs, at no time of placement alone."""
    requests_B = chosen_requests(profile, demands.seed)
    usage_LBE = request_usage_LBE(profile.sample, requests_B, profile.info.num_experts)
    weight_B = np.diff(profile.sample.starts_B1)[requests_B].astype(np.float64)
    options = {"num_nodes": topology.num_nodes, "seed": demands.seed, "starts": LABEL_STARTS[demands.effort]}
    return align_labels(rank_of_LE, usage_LBE, weight_B, topology.num_ranks, **options)[0]
