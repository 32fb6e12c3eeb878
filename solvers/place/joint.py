"""The joint method: experts placed for the tokens and requests that will be sent to them, under
exact constraints.

A placement goes through named stages, each from a placement (and homes of requests) to the next;
which ones depends on the schedules that are asked for, the dispatch kind and the routing groups
(`chosen_stages`). Attention-TP is a matter of each layer by itself (`joint_layer`), as token ids
have a home per layer. Attention-DP: each request has one home for all layers, so layers share their
labels, and requests and experts are chosen in turn.

Shape letters: T tokens, L MoE layers, E experts, R ranks, B requests, J load vectors.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count
from math import comb
from typing import NamedTuple

import numpy as np

from semmoe.profiles.counts import RoutingProfile, request_rows
from semmoe.profiles.errors import InputError
from semmoe.profiles.progress import Progress
from semmoe.solvers.demands import Demands, Solved
from semmoe.solvers.place.exact_counts import in_linear_shares, resampled_loads
from semmoe.solvers.place.joint_layer import (
    Layer,
    Network,
    Search,
    blocks_of_groups,
    from_start,
    nodes_then_ranks,
    rank_counts_TR,
    ranks_then_nodes,
)
from semmoe.solvers.place.nodes import label_ranks
from semmoe.solvers.place.partition import EFFORTS, MANY_RANKS, load_limits
from semmoe.solvers.place.request_homes import (
    align_labels,
    anneal_requests,
    chosen_requests,
    request_usage_LBE,
    usage_shares_BR,
)
from semmoe.solvers.placement import Topology
from semmoe.solvers.schedule.transport import balanced_homes
from semmoe.solvers.workers import LayerMap, layer_map

OBJECTIVES = ("tp", "dp", "both")
# Weight of local activations, at first and later: a strong pull makes layers agree on which
# requests go where.
LOCAL_PULL = {"dp": (4.0, 2.0), "both": (0.0, 0.0)}
LEAST_ROWS = 4_096  # that the exact objective looks at over very many ranks
# Random starts of the request map; of labels, a quarter over MANY_RANKS, where requests gain less
# from them.
STARTS = {"dp": {"fast": 2, "default": 8, "max": 32}, "both": {"fast": 4, "default": 16, "max": 16}}


def place_semmoe(
    profile: RoutingProfile, topology: Topology, demands: Demands, progress: Progress | None = None
) -> Solved:
    """The placement that suits the demanded schedules; independent of `demands.processes`.

    Parameters:
        profile: counts of the requests to fit, and a sample of them.
        topology: ranks, nodes and, where known, costs between ranks.
        demands: replicas are left to `solve_placement`.
        progress: told of every layer that is done, over all passes over the layers.

    Raises InputError for an unknown objective or effort, too few requests to resample, or routing
    groups that no permutation can keep whole.
    """
    if demands.objective not in OBJECTIVES:
        raise InputError(f"objective {demands.objective!r} is none of {', '.join(OBJECTIVES)}")
    if demands.effort not in EFFORTS:
        raise InputError(f"effort {demands.effort!r} is none of {', '.join(EFFORTS)}")
    info, num_ranks = profile.info, topology.num_ranks
    placed = Placed(np.zeros((info.num_layers, info.num_experts), np.int64), np.zeros(0, np.int64))
    if num_ranks == 1:
        return Solved.from_ranks(placed.rank_of_LE, profile.load_LE, num_ranks, rounds=0)
    # Step 1: the stages, and what all of them look at.
    load_LJE = resampled_loads(profile, demands.robust, demands.seed)
    if demands.slots_of(info.num_experts, num_ranks).has_spare(info.num_experts, num_ranks):
        # An expert that outweighs a rank gets a copy: it is no reason for other ranks to carry as
        # much.
        most_LJ1 = demands.load_cap * load_LJE.sum(axis=2, keepdims=True) / num_ranks
        load_LJE = np.minimum(load_LJE, most_LJ1)
    names = chosen_stages(demands, topology, info.n_group)
    passes = sum(name in LAYER_STAGES for name in names)
    layer_done = _counter(progress, info.num_layers * passes)
    # Step 2: one after the other.
    with layer_map(demands.processes, info.num_experts) as run:
        work = Work(profile, topology, demands, load_LJE, run, layer_done)
        for name in names:
            placed = STAGES[name](work, placed)
            if demands.spare == "empty":
                shares = in_linear_shares(placed.rank_of_LE, profile, load_LJE[:, 0], num_ranks, demands.load_cap)
                placed = placed._replace(rank_of_LE=shares)
    return Solved.from_ranks(placed.rank_of_LE, profile.load_LE, num_ranks, rounds=passes)


def chosen_stages(demands: Demands, topology: Topology, num_groups: int) -> list[str]:
    """Names of the stages in order, by objective, dispatch kind and routing groups:

    groups kept whole                       blocks
    tp, rows per node                       nodes
    tp                                      ranks
    dp or both, rows per node               nodes, labels in nodes, turns
    both, several nodes                     ranks, labels in nodes, turns
    dp, rows per expert                     anneal, near, turns
    dp or both                              ranks, labels, near, turns

    "near" only where pairs of ranks differ in cost; half of the turns for both over MANY_RANKS.
    """
    objective, several_nodes = demands.objective, topology.num_nodes > 1
    if demands.expressible == "permutation" and num_groups > 1:
        check_whole_groups(num_groups, topology.num_ranks)
        return ["blocks"]  # they leave no labels to choose
    per_node = demands.dispatch == "per-node" and several_nodes
    first = "nodes" if per_node else "ranks"
    if objective == "tp":
        return [first]
    rounds = EFFORTS[demands.effort].rounds
    turns = ["strong turn"] + ["turn"] * (2 * rounds - 1) if rounds else ["turn"]
    if rounds and objective == "both" and topology.num_ranks > MANY_RANKS:
        turns = turns[:rounds]  # homes have little to say there
    # Tokens are sent near by each layer's grouping of ranks into nodes: for their sake it stays.
    if several_nodes and (per_node or objective == "both"):
        return [first, "labels in nodes", *turns]
    near = ["near"] if several_nodes or topology.cost_RR is not None else []
    # Where only locality counts, requests come first; where ranks touched count, experts that are
    # chosen together do.
    homed = ["anneal"] if objective == "dp" and demands.dispatch == "per-expert" else [first, "labels"]
    return [*homed, *near, *turns]


class Placed(NamedTuple):
    """What a stage starts from and what it leaves."""

    rank_of_LE: np.ndarray  # int64 [L, E]
    home_B: np.ndarray  # rank of each chosen request, int64 [B]; empty before they have homes


class Requests(NamedTuple):
    """The requests that get homes, and their rows that the exact objective looks at."""

    usage_LBE: np.ndarray  # float32: activations
    weight_B: np.ndarray  # float64: tokens
    rows_T: np.ndarray  # rows of the sample, int64
    request_T: np.ndarray  # request of each of those rows, int64


@dataclass(frozen=True, eq=False)
class Work:
    """What all stages look at."""

    profile: RoutingProfile
    topology: Topology
    demands: Demands
    load_LJE: np.ndarray  # load vectors that keep the cap, float64
    run: LayerMap
    layer_done: Callable[[], None]

    @cached_property
    def network(self) -> Network:
        return Network.of(self.topology, self.demands.dispatch)

    @cached_property
    def search(self) -> Search:
        demands = self.demands
        return Search(EFFORTS[demands.effort], demands.load_cap, demands.lar_weight)

    @cached_property
    def token_index_T(self) -> np.ndarray:
        return self.profile.token_index()[1]

    @cached_property
    def requests(self) -> Requests:
        sample, seed = self.profile.sample, self.demands.seed
        requests_B = chosen_requests(self.profile, seed)
        rows_T, request_T = request_rows(sample, requests_B)
        chosen = self.bounded_rows(len(rows_T))
        usage_LBE = request_usage_LBE(sample, requests_B, self.profile.info.num_experts)
        weight_B = np.diff(sample.starts_B1)[requests_B].astype(np.float64)
        return Requests(usage_LBE, weight_B, rows_T[chosen], request_T[chosen])

    def bounded_rows(self, num_tokens: int) -> np.ndarray:
        """As many of these rows as the effort looks at, ascending int64."""
        info, most = self.profile.info, self.search.effort.token_rows
        # Every rank costs as much as every row, and fewer rows decide as well over many ranks.
        most = max(most * MANY_RANKS // max(self.topology.num_ranks, MANY_RANKS), min(most, LEAST_ROWS))
        return sample_rows(num_tokens, comb(info.num_experts, info.top_k), most, self.demands.seed)

    def layer(self, number: int, rows_T: np.ndarray) -> Layer:
        """One layer with the given rows of the sample, int64 [T]."""
        return Layer(
            affinity_EE=self.profile.co_activation_LEE[number],
            load_JE=self.load_LJE[number],
            expert_ids_TK=self.profile.sample.expert_ids_TLK[rows_T, number],
            token_index_T=self.token_index_T[rows_T],
            seed=self.demands.seed + 1000 * number,
            num_groups=self.profile.info.n_group,
        )

    def solve_layers(self, place: Callable[..., np.ndarray], layers: Iterable[Layer], search: Search) -> np.ndarray:
        """Rank of each expert, int64 [L, E], layer by layer in the worker processes; `place` takes
        (layer, network, search)."""
        placed = []
        for rank_of_E in self.run(partial(place, network=self.network, search=search), layers):
            placed.append(rank_of_E)
            self.layer_done()
        return np.stack(placed)


Stage = Callable[[Work, Placed], Placed]


def place_layers(work: Work, placed: Placed, *, place: Callable[[Layer, Network, Search], np.ndarray]) -> Placed:
    """Every layer by itself."""
    rows_T = work.bounded_rows(work.profile.sample.num_tokens)
    layers = (work.layer(number, rows_T) for number in range(work.profile.info.num_layers))
    return Placed(work.solve_layers(place, layers, work.search), placed.home_B)


def anneal_homes(work: Work, placed: Placed) -> Placed:
    """Experts of all layers and homes of requests together, by local activations alone."""
    demands, num_ranks, requests = work.demands, work.topology.num_ranks, work.requests
    limit_LJ = np.stack([load_limits(load_JE, num_ranks, demands.load_cap) for load_JE in work.load_LJE])
    options = {"seed": demands.seed, "starts": STARTS["dp"][demands.effort]}
    return Placed(
        *anneal_requests(requests.usage_LBE, requests.weight_B, work.load_LJE, limit_LJ, num_ranks, **options)
    )


def share_labels(work: Work, placed: Placed, *, keep_nodes: bool) -> Placed:
    """Ranks renamed at every layer so that a request finds its experts on one rank at all of
    them; that rank is its home."""
    requests, demands = work.requests, work.demands
    found = align_labels(
        placed.rank_of_LE,
        requests.usage_LBE,
        requests.weight_B,
        work.topology.num_ranks,
        num_nodes=work.topology.num_nodes if keep_nodes else 1,
        seed=demands.seed,
        starts=max(STARTS["both"][demands.effort] // (4 if work.topology.num_ranks > MANY_RANKS else 1), 1),
    )
    return Placed(*found)


def bring_near(work: Work, placed: Placed) -> Placed:
    """Ranks renamed, at all layers alike, so that what tokens touch is near where they live."""
    requests, node_of_R, cost_RR = work.requests, work.topology.node_of_R, work.network.cost_RR
    far_RR = node_of_R[:, None] != node_of_R if cost_RR is None else cost_RR
    ids_TLK = work.profile.sample.expert_ids_TLK[requests.rows_T]
    pairs_RR = home_pairs_RR(ids_TLK, placed.rank_of_LE, placed.home_B[requests.request_T], work.topology.num_ranks)
    label_R = label_ranks(pairs_RR, far_RR.astype(np.float64), seed=work.demands.seed)
    return Placed(label_R[placed.rank_of_LE], label_R[placed.home_B])


def take_turn(work: Work, placed: Placed, *, pull: int) -> Placed:
    """Experts for where requests live, then homes for where the experts are. `pull`: place in
    LOCAL_PULL."""
    requests, demands = work.requests, work.demands
    search = work.search._replace(lar_weight=max(demands.lar_weight, LOCAL_PULL[demands.objective][pull]))
    home_T = placed.home_B[requests.request_T]
    layers = (
        work.layer(number, requests.rows_T)._replace(home_T=home_T, start_E=start_E)
        for number, start_E in enumerate(placed.rank_of_LE)
    )
    rank_of_LE = work.solve_layers(from_start, layers, search)
    share_BR = usage_shares_BR(rank_of_LE, requests.usage_LBE, work.topology.num_ranks)
    return Placed(rank_of_LE, balanced_homes(share_BR, requests.weight_B))


LAYER_STAGES: dict[str, Stage] = {  # that pass over the layers
    "blocks": partial(place_layers, place=blocks_of_groups),
    "nodes": partial(place_layers, place=nodes_then_ranks),
    "ranks": partial(place_layers, place=ranks_then_nodes),
    "strong turn": partial(take_turn, pull=0),
    "turn": partial(take_turn, pull=1),
}
STAGES: dict[str, Stage] = {
    **LAYER_STAGES,
    "anneal": anneal_homes,
    "labels": partial(share_labels, keep_nodes=False),
    "labels in nodes": partial(share_labels, keep_nodes=True),
    "near": bring_near,
}


def home_pairs_RR(expert_ids_TLK: np.ndarray, rank_of_LE: np.ndarray, home_T: np.ndarray, num_ranks: int) -> np.ndarray:
    """Tokens that live on rank h and touch rank r, summed over layers, float64 [R, R].

    Parameters:
        expert_ids_TLK: integers [T, L, K].
        rank_of_LE: int [L, E].
        home_T: home rank of each token, int [T].
        num_ranks: R.
    """
    home_TR = np.eye(num_ranks)[home_T]
    layers = [rank_counts_TR(expert_ids_TLK[:, i], rank_of_E, num_ranks) > 0 for i, rank_of_E in enumerate(rank_of_LE)]
    return sum((home_TR.T @ touched_TR for touched_TR in layers), np.zeros((num_ranks, num_ranks)))


def sample_rows(num_tokens: int, num_sets: int, max_rows: int, seed: int) -> np.ndarray:
    """Rows that the exact objective looks at, ascending int64: all, or a random choice.

    `num_sets`: expert sets there are at all. Few of them merge into few token kinds, so many more
    rows cost no more.
    """
    allowed = 16 * max_rows if num_sets <= 2 * max_rows else max_rows
    if num_tokens <= allowed:
        return np.arange(num_tokens)
    return np.sort(np.random.default_rng([seed, 7]).choice(num_tokens, allowed, replace=False))


def check_whole_groups(num_groups: int, num_ranks: int) -> None:
    """Raise InputError where a permutation of the router cannot express any placement but the
    contiguous one."""
    if num_groups % num_ranks and num_ranks % num_groups:
        raise InputError(f"{num_groups} routing groups over {num_ranks} ranks: neither number divides the other")


def _counter(progress: Progress | None, total: int) -> Callable[[], None]:
    """A function to call at every layer that is done, over all passes over the layers."""
    done = count(1)
    return (lambda: None) if progress is None else (lambda: progress(next(done), total))
