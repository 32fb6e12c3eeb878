"""What requests move and load under a placement, summed: activations, rows, homes and loads, kept
per group of requests and layer.

Every metric is a ratio of these sums (`semmoe.solvers.evaluate.metrics`), so groups can be
resampled without looking at a token again. A token's home is the rank where it lives at a layer;
without a schedule it is uniformly random, and expectations are exact, not sampled.

Shape letters: T tokens, L MoE layers, K top-k, E experts, R ranks, N nodes, B requests, G groups of
requests, P targets of rows (ranks or nodes), X resamples.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from semmoe.profiles.trace import TraceBatch
from semmoe.solvers.deployment import Deployment
from semmoe.solvers.evaluate.every_home import rows_of_homes
from semmoe.solvers.evaluate.reached import Reached, first_of_run, reached_of, reached_ranks
from semmoe.solvers.place.replicas import MovingRule
from semmoe.solvers.placement import Topology

MAX_GROUPS = 512  # requests beyond this number are resampled in groups of several


@dataclass(frozen=True, eq=False)
class TrafficSums:
    """Sums over the tokens of each group of requests. Expectations where homes are random, hence
    floats."""

    tokens_G: np.ndarray  # float64 [G]
    activations_GL: np.ndarray  # float64 [G, L]
    local_GL: np.ndarray  # activations whose expert is served by the token's own rank
    remote_ranks_GL: np.ndarray
    remote_nodes_GL: np.ndarray
    load_GLR: np.ndarray  # activations served by each rank
    home_GLR: np.ndarray  # tokens that live on each rank
    ingress_GLP: np.ndarray  # rows received by each rank (by each node where dispatch is per node)
    egress_GLP: np.ndarray

    @classmethod
    def zeros(cls, num_groups: int, num_layers: int, num_ranks: int, num_targets: int) -> "TrafficSums":
        per_layer, ranks, targets = (num_groups, num_layers), (num_ranks,), (num_targets,)
        shapes = [(num_groups,)] + [per_layer] * 4 + [per_layer + ranks] * 2 + [per_layer + targets] * 2
        return cls(*(np.zeros(shape) for shape in shapes))

    def without_ranks(self) -> "TrafficSums":
        """The same with one rank of what is kept by rank: little, for what looks at totals."""
        arrays = [getattr(self, f.name) for f in fields(self)]
        return TrafficSums(*(a if a.ndim < 3 else a[:, :, :1].copy() for a in arrays))

    def of_groups(self, chosen_G: np.ndarray) -> "TrafficSums":
        """The sums of some groups (bool [G])."""
        return TrafficSums(*(getattr(self, f.name)[chosen_G] for f in fields(self)))

    def widened(self, num_groups: int) -> "TrafficSums":
        """With groups of nothing behind the last."""
        arrays = [getattr(self, f.name) for f in fields(self)]
        return TrafficSums(*(np.pad(a, [(0, num_groups - len(a)), *[(0, 0)] * (a.ndim - 1)]) for a in arrays))

    def resampled(self, weights_XG: np.ndarray) -> "TrafficSums":
        """Weighted sums over the groups: leading axis X instead of G."""
        arrays = [getattr(self, f.name) for f in fields(self)]
        return TrafficSums(*((weights_XG @ a.reshape(len(a), -1)).reshape(-1, *a.shape[1:]) for a in arrays))


def resampling_groups(domain_of_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Group of every request (int64 [B]), and the domain of every group (int64 [G]): each group is
    of one domain.

    `domain_of_B`: number of each request's domain, from 0. A request is a group of its own up to
    MAX_GROUPS requests; of more, each domain gets its share of the groups.
    """
    num_requests = len(domain_of_B)
    if num_requests <= MAX_GROUPS:
        return np.arange(num_requests), domain_of_B
    group_of_B, domain_of_G = np.zeros(num_requests, np.int64), np.zeros(0, np.int64)
    for domain in np.unique(domain_of_B):
        members = np.flatnonzero(domain_of_B == domain)
        num_groups = max(1, len(members) * MAX_GROUPS // num_requests)
        group_of_B[members] = len(domain_of_G) + np.arange(len(members)) % num_groups
        domain_of_G = np.append(domain_of_G, np.full(num_groups, domain))
    return group_of_B, domain_of_G


def deployment_sums(
    deployment: Deployment,
    batch: TraceBatch,
    *,
    homes_TL: np.ndarray | None = None,
    group_of_B: np.ndarray | None = None,
) -> TrafficSums:
    """`traffic_sums` of a batch under a deployment; its schedule is not looked at, homes are as
    given or random."""
    return traffic_sums(
        batch,
        deployment.serving_LRE,
        deployment.topology,
        dispatch=deployment.dispatch,
        homes_TL=homes_TL,
        group_of_B=group_of_B,
        moving=deployment.moving,
    )


def traffic_sums(
    batch: TraceBatch,
    serving_LRE: np.ndarray,
    topology: Topology,
    *,
    dispatch: str,
    homes_TL: np.ndarray | None = None,
    group_of_B: np.ndarray | None = None,
    moving: MovingRule | None = None,
) -> TrafficSums:
    """Traffic of a batch's requests.

    Parameters:
        batch: requests with the choices of their tokens.
        serving_LRE: rank that serves expert e for a token that lives on rank r, integers [L, R, E]
            (`semmoe.solvers.place.replicas`); equal along R without replicas.
        topology: nodes of the ranks.
        dispatch: one of DISPATCH_KINDS; says what a row is.
        homes_TL: rank where each token lives, integers [T, L]; None: on a uniformly random rank.
        group_of_B: group of each request, integers [B] from 0; None: its number, up to MAX_GROUPS.
        moving: what chooses copies token by token, in place of `serving_LRE`.

    Returns:
        Sums per group; expectations where homes are random.
    """
    num_targets = topology.num_nodes if dispatch == "per-node" else topology.num_ranks
    if group_of_B is None:
        group_of_B = np.arange(batch.num_requests) % max(1, min(batch.num_requests, MAX_GROUPS))
    num_groups, num_layers = int(group_of_B.max(initial=-1)) + 1, len(serving_LRE)
    sums = TrafficSums.zeros(num_groups, num_layers, topology.num_ranks, num_targets)
    counter = _Counter(sums, group_of_B[batch.request_of_T], topology, dispatch)
    sums.tokens_G[:] += np.bincount(counter.group_T, minlength=num_groups)
    replicated = bool((serving_LRE != serving_LRE[:, :1]).any())

    def reached(layer: int, home_T: np.ndarray) -> Reached:
        ids_TK = batch.expert_ids_TLK[:, layer]
        if moving is not None:
            return reached_of(moving.ranks_TK(layer, ids_TK, home_T), topology.num_ranks)
        return reached_ranks(ids_TK, serving_LRE[layer], home_T)

    for layer, serving_RE in enumerate(serving_LRE):
        ids_TK = batch.expert_ids_TLK[:, layer]
        if homes_TL is not None:
            home_T = homes_TL[:, layer]
            _add_layer(counter, layer, reached(layer, home_T), home_T)
        elif moving is not None:
            # Who serves depends on where the token lives, and on the token: the mean over homes.
            for rank in range(topology.num_ranks):
                home_T = np.full(len(ids_TK), rank)
                _add_layer(counter, layer, reached(layer, home_T), home_T, 1 / topology.num_ranks)
        elif replicated:
            _add_every_home(counter, layer, ids_TK, serving_RE)
        else:
            _add_layer(counter, layer, reached_ranks(ids_TK, serving_RE), None)
    return sums


class _Counter(NamedTuple):
    """Sums to add to, and what they are counted by."""

    sums: TrafficSums
    group_T: np.ndarray  # group of every token
    topology: Topology
    dispatch: str

    def per_group(self, mask_KT: np.ndarray) -> np.ndarray:
        """Marked choices of each group, float64 [G]."""
        return np.bincount(self.group_T, weights=mask_KT.sum(axis=0, dtype=np.int16), minlength=len(self.sums.tokens_G))

    def per_target(self, mask_KT: np.ndarray, target_KT: np.ndarray, size: int) -> np.ndarray:
        """Marked choices of each group by target, int64 [G, size]."""
        cells = len(self.sums.tokens_G) * size
        keys_KT = np.where(mask_KT, target_KT + self.group_T * size, cells)  # the last one is for what is masked out
        return np.bincount(keys_KT.reshape(-1), minlength=cells + 1)[:-1].reshape(-1, size)

    def per_home(self, home_T: np.ndarray, size: int, weights: np.ndarray | None = None) -> np.ndarray:
        """Tokens of each group by home, or their weights, [G, size]."""
        cells = len(self.sums.tokens_G) * size
        return np.bincount(self.group_T * size + home_T, weights=weights, minlength=cells).reshape(-1, size)


def _add_layer(counter: _Counter, layer: int, reached: Reached, home_T: np.ndarray | None, weight: float = 1.0) -> None:
    """Add one layer of the batch. `home_T` None: random homes in closed form, for a placement
    without replicas."""
    sums, topology = counter.sums, counter.topology
    num_ranks, num_nodes = topology.num_ranks, topology.num_nodes
    ranks_KT, new_rank_KT = reached
    nodes_KT = np.append(topology.node_of_R, num_nodes).astype(np.int16).take(ranks_KT)  # ascending as ranks are
    routed_KT = ranks_KT < num_ranks
    new_node_KT = first_of_run(nodes_KT) & routed_KT
    sums.activations_GL[:, layer] += counter.per_group(routed_KT) * weight
    sums.load_GLR[:, layer] += counter.per_target(routed_KT, ranks_KT, num_ranks) * weight
    per_node = counter.dispatch == "per-node"
    target_KT, num_targets = (nodes_KT, num_nodes) if per_node else (ranks_KT, num_ranks)
    row_KT = {"per-node": new_node_KT, "per-expert": routed_KT}.get(counter.dispatch, new_rank_KT)
    if home_T is None:
        sums.local_GL[:, layer] += counter.per_group(routed_KT) / num_ranks
        sums.remote_ranks_GL[:, layer] += counter.per_group(new_rank_KT) * (1 - 1 / num_ranks)
        sums.remote_nodes_GL[:, layer] += counter.per_group(new_node_KT) * (1 - 1 / num_nodes)
        sums.home_GLR[:, layer] += sums.tokens_G[:, None] / num_ranks
        rows_GP = counter.per_target(row_KT, target_KT, num_targets)
        sums.ingress_GLP[:, layer] += rows_GP * (1 - 1 / num_targets)
        sums.egress_GLP[:, layer] += (rows_GP.sum(1, keepdims=True) - rows_GP) / num_targets
        return
    home_T = home_T.astype(np.int64)
    home_node_T = topology.node_of_R[home_T]
    sums.local_GL[:, layer] += counter.per_group(routed_KT & (ranks_KT == home_T)) * weight
    sums.remote_ranks_GL[:, layer] += counter.per_group(new_rank_KT & (ranks_KT != home_T)) * weight
    sums.remote_nodes_GL[:, layer] += counter.per_group(new_node_KT & (nodes_KT != home_node_T)) * weight
    sums.home_GLR[:, layer] += counter.per_home(home_T, num_ranks) * weight
    home_target_T = home_node_T if per_node else home_T
    row_KT = row_KT & (target_KT != home_target_T)
    sums.ingress_GLP[:, layer] += counter.per_target(row_KT, target_KT, num_targets) * weight
    sums.egress_GLP[:, layer] += counter.per_home(home_target_T, num_targets, row_KT.sum(axis=0)) * weight


def _add_every_home(counter: _Counter, layer: int, ids_TK: np.ndarray, serving_RE: np.ndarray) -> None:
    """Add one layer of the batch: the mean over homes of a placement with copies, each of which
    serves the same homes whatever the token."""
    sums, topology, group_T = counter.sums, counter.topology, counter.group_T
    (num_ranks, num_experts), num_groups = serving_RE.shape, len(sums.tokens_G)
    share = 1 / num_ranks
    # Step 1: what each choice pays by itself follows from how often experts are chosen.
    keys_TK = group_T[:, None] * (num_experts + 1) + ids_TK
    count_GE = np.bincount(keys_TK.reshape(-1), minlength=num_groups * (num_experts + 1))
    count_GE = count_GE.reshape(num_groups, -1)[:, :num_experts]
    each_R, each_E = np.arange(num_ranks), np.arange(num_experts)
    homes_ER = np.bincount((each_E * num_ranks + serving_RE).reshape(-1), minlength=num_experts * num_ranks)
    homes_ER = homes_ER.reshape(num_experts, num_ranks)
    own_RE = serving_RE == each_R[:, None]
    sums.activations_GL[:, layer] += count_GE.sum(axis=1)
    sums.local_GL[:, layer] += count_GE @ own_RE.sum(axis=0) * share
    sums.load_GLR[:, layer] += count_GE @ homes_ER * share
    sums.home_GLR[:, layer] += sums.tokens_G[:, None] * share
    # Step 2: what choices pay together, by rank and by node.
    by_rank = rows_of_homes(ids_TK, group_T, num_groups, serving_RE, each_R)
    received_GP, sent_GP = by_rank
    sums.remote_ranks_GL[:, layer] += received_GP.sum(axis=1) * share
    if topology.num_nodes > 1:
        by_node = rows_of_homes(ids_TK, group_T, num_groups, serving_RE, topology.node_of_R)
        sums.remote_nodes_GL[:, layer] += by_node.received_GP.sum(axis=1) * share
        if counter.dispatch == "per-node":
            received_GP = by_node.received_GP
            sent_GP = by_node.sent_GR.reshape(num_groups, topology.num_nodes, -1).sum(axis=2)
    elif counter.dispatch == "per-node":
        received_GP = sent_GP = np.zeros((num_groups, 1))
    if counter.dispatch == "per-expert":
        received_GP, sent_GP = count_GE @ (homes_ER - own_RE.T), count_GE @ ~own_RE.T
    sums.ingress_GLP[:, layer] += received_GP * share
    sums.egress_GLP[:, layer] += sent_GP * share
