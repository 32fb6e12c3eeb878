"""What each layer is re-placed for: rows of the new traffic, where they live, and what touching a
rank costs them.

Half of the traffic is taken to live on random ranks and half where the old placement's schedule
would send it (requests or token ids, as the plan's objective says): a re-placement must serve
requests that no table foresaw, and must not break what makes layers agree on homes.

Shape letters: T tokens, L MoE layers, E experts, K top-k, R ranks, N nodes, B requests, X token
kinds, J load vectors.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import comb

import numpy as np

from semmoe.profiles.counts import RoutingProfile, request_rows
from semmoe.profiles.trace import TraceBatch
from semmoe.solvers.demands import Demands
from semmoe.solvers.place.exact_counts import resampled_loads
from semmoe.solvers.place.joint import sample_rows
from semmoe.solvers.place.joint_layer import HOMELESS_SHARE, TIE_SHARE, Layer, home_shares, scaled_costs
from semmoe.solvers.place.partition import EFFORTS
from semmoe.solvers.place.remote_gains import token_kinds
from semmoe.solvers.place.request_homes import chosen_requests, request_usage_LBE
from semmoe.solvers.placement import Placement, Topology
from semmoe.solvers.replan.copies import CopyTask, search_copies
from semmoe.solvers.replan.search import Frontier, Task, search_layer
from semmoe.solvers.replan.worth import Worth
from semmoe.solvers.schedule.transport import balanced_homes

# Models of more experts are re-placed for fewer rows: moves within a budget fit less noise than a
# placement of all, and a swap costs time by the row.
FULL_ROWS_EXPERTS = 64


def request_homes_B(batch: TraceBatch, requests_B: np.ndarray, placement: Placement) -> np.ndarray:
    """Rank of each request, int64 [B]: most of its experts are there over all layers, and ranks get
    equal numbers of tokens."""
    usage_LBE = request_usage_LBE(batch, requests_B, placement.num_experts)
    local_BR = np.einsum("lbe,ler->br", usage_LBE, placement.hosts_LER.astype(np.float32), optimize=True)
    share_BR = local_BR / np.maximum(usage_LBE.sum(axis=(0, 2))[:, None], 1)
    return balanced_homes(share_BR.astype(np.float64), np.diff(batch.starts_B1)[requests_B].astype(np.float64))


@dataclass(frozen=True, eq=False)
class NewTraffic:
    """New requests seen from an old placement.

    Fields:
        profile: counts and a sample of the new requests.
        old: where experts are.
        topology, demands: those of the old plan.
        worth: what a row and load above the cap cost.
        max_moves: moves of one layer at most.
    """

    profile: RoutingProfile
    old: Placement
    topology: Topology
    demands: Demands
    worth: Worth
    max_moves: int

    @cached_property
    def rows_T(self) -> np.ndarray:
        """Rows of the sample that layers look at, int64 [T]."""
        info, effort = self.profile.info, EFFORTS[self.demands.effort]
        rows = self.homed_rows[0]
        most = effort.token_rows // max(1, info.num_experts // FULL_ROWS_EXPERTS)
        return rows[sample_rows(len(rows), comb(info.num_experts, info.top_k), most, self.demands.seed)]

    @cached_property
    def homed_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows of requests, int64 [T], and the rank where each lives, int64 [T]; where token ids
        have homes instead, layer by layer, all rows and no ranks."""
        if self.demands.objective == "tp":
            return np.arange(self.profile.sample.num_tokens), np.zeros(0, np.int64)
        requests_B = chosen_requests(self.profile, self.demands.seed)
        rows_T, request_T = request_rows(self.profile.sample, requests_B)
        return rows_T, request_homes_B(self.profile.sample, requests_B, self.old)[request_T]

    def layers(self) -> "Iterator[LayerTraffic]":
        """What each layer's worker gets."""
        load_LJE = resampled_loads(self.profile, self.demands.robust, self.demands.seed)
        _, token_index_T = self.profile.token_index()
        rows_T, (homed_T, home_of_row) = self.rows_T, self.homed_rows
        home_T = home_of_row[np.searchsorted(homed_T, rows_T)] if len(home_of_row) else None
        for number, hosts_ER in enumerate(self.old.hosts_LER):
            layer = Layer(
                affinity_EE=self.profile.co_activation_LEE[number],
                load_JE=load_LJE[number],
                expert_ids_TK=self.profile.sample.expert_ids_TLK[rows_T, number],
                token_index_T=token_index_T[rows_T],
                seed=self.demands.seed + 1000 * number,
                num_groups=self.profile.info.n_group,
                home_T=home_T,
            )
            yield LayerTraffic(layer, hosts_ER, self.topology, self.worth, self.demands.lar_weight, self.max_moves)


@dataclass(frozen=True, eq=False)
class LayerTraffic:
    """One layer's rows, and what they cost; sent to a worker process."""

    layer: Layer
    hosts_ER: np.ndarray
    topology: Topology
    worth: Worth
    lar_weight: float
    max_moves: int

    def search(self) -> Frontier:
        """The least cost for every number of moves."""
        has_copies = bool((self.hosts_ER.sum(axis=1) > 1).any())
        return search_copies(self.copy_task()) if has_copies else search_layer(self.task())

    @property
    def cost_RR(self) -> np.ndarray:
        """Cost of a row from rank to rank, float64 [R, R]."""
        cost_RR = self.topology.cost_RR
        return 1.0 - np.eye(self.topology.num_ranks) if cost_RR is None else scaled_costs(cost_RR)

    def task(self) -> Task:
        """The layer as the search of placements without copies reads it."""
        layer, worth, num_ranks, cost_RR = self.layer, self.worth, self.topology.num_ranks, self.cost_RR
        old_of_E, num_experts = self.hosts_ER.argmax(axis=1), len(self.hosts_ER)
        kinds_XK, kind_T = token_kinds(layer.expert_ids_TK, num_experts)
        num_tokens = max(len(kind_T), 1)
        share_TR = home_shares(layer, old_of_E, num_ranks)
        share_XR = np.stack([np.bincount(kind_T, c, len(kinds_XK)) for c in share_TR.T], axis=1) / num_tokens
        weight_X1 = np.bincount(kind_T, minlength=len(kinds_XK))[:, None] / num_tokens
        lives_XR = HOMELESS_SHARE * weight_X1 / num_ranks + (1 - HOMELESS_SHARE) * share_XR
        cost_XN = None
        if worth.node_row:
            lives_XN = lives_XR.reshape(len(kinds_XK), self.topology.num_nodes, -1).sum(axis=2)
            cost_XN = worth.node_row * (weight_X1 - lives_XN)
        near_XR = share_XR if self.topology.cost_RR is None else -share_XR @ cost_RR
        flat, top_k = kinds_XK.reshape(-1), kinds_XK.shape[1]
        near_ER = np.stack([np.bincount(flat, np.repeat(c, top_k), num_experts + 1)[:-1] for c in near_XR.T], axis=1)
        # Where rows follow activations, ranks touched decide between equals.
        row = worth.rank_row + TIE_SHARE * worth.activation_row
        # Co-activation is counted over all tokens, costs over the rows at hand.
        rows_share = layer.expert_ids_TK.size / max(float(np.trace(layer.affinity_EE)), 1.0) / num_tokens
        return Task(
            old_of_E=old_of_E,
            affinity_EE=row * rows_share * layer.affinity_EE,
            expert_ids_XK=kinds_XK,
            cost_XR=row * lives_XR @ cost_RR,
            cost_XN=cost_XN,
            home_ER=(worth.activation_row + self.lar_weight) * near_ER,
            load_JE=layer.load_JE,
            worth=worth,
            max_moves=self.max_moves,
            seed=layer.seed,
        )

    def copy_task(self) -> CopyTask:
        """The layer as the search of placements with copies reads it: every other row lives on a
        random rank."""
        layer, num_ranks = self.layer, self.topology.num_ranks
        home_T = layer.home_T
        if home_T is None:
            hosts_ER = np.vstack([self.hosts_ER, np.zeros((1, num_ranks), bool)])
            count_TR = sum((hosts_ER[ids_T].astype(np.float64) for ids_T in layer.expert_ids_TK.T), np.zeros(()))
            home_T = balanced_homes(np.asarray(count_TR), np.ones(len(layer.expert_ids_TK)))
        rng = np.random.default_rng(layer.seed)
        random_T = rng.integers(0, num_ranks, len(home_T))
        return CopyTask(
            old_hosts_ER=self.hosts_ER,
            expert_ids_TK=layer.expert_ids_TK,
            home_T=np.where(rng.random(len(home_T)) < HOMELESS_SHARE, random_T, home_T),
            load_JE=layer.load_JE,
            topology=self.topology,
            cost_RR=self.cost_RR,
            worth=self.worth,
            lar_weight=self.lar_weight,
            max_moves=self.max_moves,
        )
