"""Placement for the predicted time: swaps of experts on batches as they will run (`swaps.py`),
layer by layer, from what packs loads and from what saves rows.

What was balanced on the fitted requests is to stay balanced on others, which draw experts
otherwise: batches are filled from few resampled requests (REQUEST_SHARE of them), so that they
differ from each other as much as the fitted requests and the ones to come do together.

Shape letters: T tokens, L MoE layers, K top-k, E experts, R ranks, G groups of tokens, M batches, B
requests.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from semmoe.profiles.counts import RoutingProfile
from semmoe.profiles.errors import InputError
from semmoe.profiles.progress import Progress, unshown
from semmoe.solvers.demands import Demands, Solved
from semmoe.solvers.place.baselines import place_load_on_nodes
from semmoe.solvers.place.request_homes import align_labels, chosen_requests, request_usage_LBE
from semmoe.solvers.place.solve import solve_placement
from semmoe.solvers.placement import Topology
from semmoe.solvers.time.batches import Pool, pool_of, random_homes
from semmoe.solvers.time.hardware import WAYS, Costing, TimeAsked, costing_of, nodes_of_ranks
from semmoe.solvers.time.moe_layer import batch_tokens, experts_us, way_us
from semmoe.solvers.time.swaps import LayerBatches, Prices, swap_layer
from semmoe.solvers.workers import layer_map

REQUEST_SHARE = 0.5  # of the fitted requests that a batch is resampled from
MOST_TOKENS = 80_000  # of a layer that swaps are counted on
BATCHES = {"fast": 32, "default": 64, "max": 128}
KICKS = {"fast": 0, "default": 2, "max": 8}
LABEL_STARTS = {"fast": 4, "default": 16, "max": 16}


def batches_to_fit(
    pool: Pool, costing: Costing, num_ranks: int, *, num_batches: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of a trace, int64 [T], the group of each, int64 [T], and batches as sums of groups,
    float64 [M, G].

    Small batches of generated tokens are drawn token by token, each a group of its own; in others
    every request is a group, and counts as often as its tokens are in a batch.
    """
    rng = np.random.default_rng([seed, 23])
    size = num_ranks * batch_tokens(costing)
    few = max(1, round(REQUEST_SHARE * pool.num_requests))
    drawn_MB = rng.integers(0, pool.num_requests, (num_batches, few))
    if costing.phase == "generated" and size * num_batches <= MOST_TOKENS:
        shape = (num_ranks, batch_tokens(costing))
        rows = np.concatenate([random_homes(pool, drawn, shape, costing.phase, rng) for drawn in drawn_MB])
        return rows, np.repeat(np.arange(num_batches), size), np.eye(num_batches)
    kept = _bounded(pool, rng)
    tokens_B = np.array([len(pool.rows_B[b]) for b in kept], np.float64)
    weight_MB = np.zeros((num_batches, len(kept)))
    for weight_B, drawn in zip(weight_MB, drawn_MB % len(kept), strict=True):
        if costing.phase == "generated":
            np.add.at(weight_B, drawn, size / tokens_B[drawn].sum())
            continue
        left = float(size)
        while left > 0:  # whole requests; the last one in part
            request = rng.choice(drawn)
            part = min(1.0, left / tokens_B[request])
            weight_B[request] += part
            left -= part * tokens_B[request]
    rows = np.concatenate([pool.rows_B[b] for b in kept])
    return rows, np.repeat(np.arange(len(kept)), tokens_B.astype(np.int64)), weight_MB


def _bounded(pool: Pool, rng: np.random.Generator) -> np.ndarray:
    """Requests of the pool with MOST_TOKENS tokens at most, ascending; one at least."""
    order = rng.permutation(pool.num_requests)
    tokens = np.cumsum([len(pool.rows_B[b]) for b in order])
    return np.sort(order[: max(1, int(np.searchsorted(tokens, MOST_TOKENS, side="right")))])


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
        partial(_total_us, overlap=costing.asked.overlap, other_us=costing.asked.other_us),
        costing.kind == "per-expert",
    )


def _links_us(
    busiest: list[np.ndarray], *, shares: list[tuple[float, float]], costing: Costing, num_ranks: int
) -> np.ndarray | float:
    if not busiest:
        return 0.0
    fast, cards = (
        np.max([reach * share[way] for reach, share in zip(busiest, shares, strict=True)], axis=0) for way in (0, 1)
    )
    rows = np.stack([fast, cards])
    return sum(way_us(rows, way, costing, costing.values, num_ranks) for way in WAYS)


def _experts_us(padded: np.ndarray, active: np.ndarray, rows: np.ndarray, *, costing: Costing) -> np.ndarray:
    if costing.balances:
        return np.zeros(rows.shape)
    return experts_us((padded, active, rows), costing, costing.values)


def _total_us(links: np.ndarray, experts: np.ndarray, *, overlap: str, other_us: float) -> np.ndarray:
    return links + experts if overlap == "none" else 2 * np.maximum(links, experts + other_us / 2)


class _Task(NamedTuple):
    """One layer; sent to a worker process."""

    batches: LayerBatches
    starts: list[np.ndarray]  # rank of each expert
    levels_UR: list[np.ndarray]
    prices: Prices
    num_ranks: int
    seed: int
    kicks: int


def _solve(task: _Task) -> np.ndarray:
    found = [
        swap_layer(
            task.batches,
            start,
            task.levels_UR,
            task.prices,
            num_ranks=task.num_ranks,
            seed=task.seed,
            kicks=task.kicks,
        )
        for start in task.starts
    ]
    return min(found, key=lambda solved: solved[1])[0]


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
    profile: RoutingProfile, topology: Topology, demands: Demands, asked: TimeAsked, *, progress: Progress | None = None
) -> Solved:
    """The placement of least predicted time that is found from packing by load and from the fewest
    rows under the load cap."""
    info = profile.info
    prompts = float(profile.sample.is_prompt_T.mean()) if profile.sample.num_tokens else 0.0
    costing = costing_of(asked, info, topology, prompts=prompts)
    packed = place_load_on_nodes(profile.load_LE, topology, info.n_group)
    starts = [packed]
    if costing.kind in ("per-rank", "per-node"):
        quick = replace(demands, effort="fast", replicas=0)
        starts.append(solve_placement(profile, topology, quick, method="semmoe").placement.rank_of_LE)
    return place_for_time(profile, topology, demands, costing, starts, progress)


def place_for_time(
    profile: RoutingProfile,
    topology: Topology,
    demands: Demands,
    costing: Costing,
    starts: list[np.ndarray],
    progress: Progress | None = None,
) -> Solved:
    """The placement of least predicted time that swaps find, every expert once.

    Parameters:
        profile: counts of the requests to fit, and a sample of them.
        demands: seed, effort and processes; the load cap has no part in it.
        costing: the machine, backend and batches.
        starts: placements to start from, int [L, E] each.
        progress: told of every layer that is done.
    """
    info, num_ranks = profile.info, topology.num_ranks
    pool = pool_of(profile.sample, costing.phase)
    fitted = batches_to_fit(pool, costing, num_ranks, num_batches=BATCHES[demands.effort], seed=demands.seed)
    tile = int(costing.values["experts.tile"])
    show = progress or unshown

    def tasks() -> Iterator[_Task]:
        prices, levels_UR = prices_of(costing, topology), links_of(costing, topology).levels_UR
        for layer in range(info.num_layers):
            ids_TK = profile.sample.expert_ids_TLK[:, layer][fitted[0]].astype(np.int64)
            batches = LayerBatches(ids_TK, fitted[1], fitted[2], info.num_experts, tile)
            own = [np.asarray(rank_of_LE[layer], np.int64) for rank_of_LE in starts]
            yield _Task(batches, own, levels_UR, prices, num_ranks, demands.seed, KICKS[demands.effort])

    found = []
    with layer_map(demands.processes, info.num_experts) as run:
        for rank_of_E in run(_solve, tasks()):
            found.append(rank_of_E)
            show(len(found), info.num_layers)
    rank_of_LE = _labelled(np.stack(found), profile, topology, demands)
    return Solved.from_ranks(rank_of_LE, profile.load_LE, num_ranks)


def _labelled(rank_of_LE: np.ndarray, profile: RoutingProfile, topology: Topology, demands: Demands) -> np.ndarray:
    """Ranks renamed at every layer, nodes kept together, so that a request finds its experts on
    one rank at all layers: what a router needs, at no time of placement alone."""
    requests_B = chosen_requests(profile, demands.seed)
    usage_LBE = request_usage_LBE(profile.sample, requests_B, profile.info.num_experts)
    weight_B = np.diff(profile.sample.starts_B1)[requests_B].astype(np.float64)
    options = {"num_nodes": topology.num_nodes, "seed": demands.seed, "starts": LABEL_STARTS[demands.effort]}
    return align_labels(rank_of_LE, usage_LBE, weight_B, topology.num_ranks, **options)[0]
