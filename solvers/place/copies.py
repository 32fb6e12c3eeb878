"""Which experts get copies in spare slots: what they save first, then the load.

Tokens live where most of their experts are, in equal numbers per rank. A copy on a rank saves each
token that lives there a remote rank where the expert is the only one that the token needs from its
rank (and is worth a part of one where there are two). Copies are taken one at a time at each rank,
the best first; tokens then choose their homes again, and every copy is reconsidered. Where a search
is asked for, experts take turns with copies: swaps of two experts for what tokens still need from
other ranks, then copies anew. Copies are exchanged where a rank would serve more than the load cap:
the exchange that loses fewest saved ranks for the load that it relieves comes first.

Over many ranks few tokens live beside a copy, and what it does to the others decides: they are
served where the experts that they use too may not be. So a search starts from copies of the hottest
experts too, and swaps experts and copies alike. What keeps the cap best, then needs fewest remote
ranks, stays.

Shape letters: T tokens, L MoE layers, E experts, K top-k, R ranks, S slots per rank, I slots of all
ranks.
"""

from typing import NamedTuple

import numpy as np

from semmoe.profiles.counts import co_activation_EE
from semmoe.solvers.place.baselines import replicate
from semmoe.solvers.place.partition import PAIR_WORTH, Problem, load_limits, polish, search_pairs
from semmoe.solvers.place.remote_gains import RemoteGains, token_kinds
from semmoe.solvers.place.replicas import serve_RE, served_load_R
from semmoe.solvers.place.swap import rank_loads, swap_search
from semmoe.solvers.placement import Topology
from semmoe.solvers.schedule.transport import balanced_homes

SAMPLE_ROWS = 32_768  # tokens per layer that decide on copies
MAX_CELLS = 2**19  # of tokens by ranks, where that is fewer tokens
LEAST_ROWS = 4_096
PAIR_SHARE = 0.5  # of a remote rank: what a copy is worth where its token needs one more expert of that rank
ROUNDS = 3  # of homes and copies in turn, after the first copies
TURN_STEPS = 120  # swaps of experts in a turn, at most
TURN_SLACK = 1.10  # load over the mean that swaps may leave, tried beside the cap: copies may level the rest
FORBIDDEN = -1e5  # tokens that a swap is worth where its expert is on the rank already
LEVEL_STEPS = 4  # exchanges of copies per rank, at most
LEVEL_TRIALS = 12  # exchanges tried at each
SWAP_ROWS = 16_384  # tokens by which remote ranks are counted there; pairs are counted over all
MOST_SLOTS = 1_024  # of all ranks, where experts and copies are swapped alike: a swap costs their square
ROOMS = 1.0, 1.2  # over the cap, one after the other: the second where the first is not kept
SPARED_SHARE = 0.02  # of the remote ranks, that less load over the cap is worth
APART = 10.0  # pairs of the closest experts that two copies of one expert on a rank cost


class CopiedLayer(NamedTuple):
    """What the copies of one layer are chosen by; sent to a worker process."""

    rank_of_E: np.ndarray  # the placement of every expert once, int [E]
    expert_ids_TK: np.ndarray  # a sample of tokens; E stands for an empty slot
    load_E: np.ndarray  # activations
    affinity_EE: np.ndarray | None = None  # co-activation, int64; only looked at where slots are searched


def add_copies(
    layer: CopiedLayer,
    topology: Topology,
    *,
    slots: int,
    load_cap: float = np.inf,
    turns: int = 0,
    swaps: int = 0,
) -> np.ndarray:
    """Experts of every rank in slot order: its own in ascending order, then copies until the slots
    are full.

    Parameters:
        layer: the placement without copies, and what they are chosen by.
        topology: ranks and nodes.
        slots: S of each rank, E at most.
        load_cap: copies are exchanged while a rank serves more than this times the mean, where that
            helps.
        turns: of experts and copies, until one brings no fewer remote ranks; 0: experts stay.
        swaps: of experts and copies of the hottest on co-activation, and a third of them on remote
            ranks; 0: not tried.

    Returns:
        int32 [R, S], no expert twice on one rank.
    """
    ids_TK = layer.expert_ids_TK.astype(np.int64)
    most = max(LEAST_ROWS, MAX_CELLS // topology.num_ranks)
    ids_TK = ids_TK[:: max(1, -(-len(ids_TK) // most))]
    first, remote = _filled(layer.rank_of_E, ids_TK, layer.load_E, topology, slots)
    found = [first]
    # Experts and copies in turn; loads that swaps leave apart may be more than copies can level.
    for slack in sorted({min(load_cap, TURN_SLACK), TURN_SLACK}) if turns else ():
        copies, fewest = first, remote
        for turn in range(turns):
            again, fewer = _filled(copies.swapped_E(slack, seed=turn), ids_TK, layer.load_E, topology, slots)
            if fewer >= fewest:
                break
            copies, fewest = again, fewer
        found += [copies] if copies is not first else []
    if np.isfinite(load_cap):
        for copies in found:
            copies.level(load_cap)
    for room in ROOMS if swaps and slots * topology.num_ranks <= MOST_SLOTS else ():
        held_RS = _swapped_slots(layer, topology.num_ranks, slots, load_cap * room, swaps)
        if held_RS is None:
            break
        copies = _Copies.of(held_RS, first, layer.rank_of_E)
        copies.level(load_cap * room)
        found.append(copies)
        if copies.over(load_cap) <= 0:
            break
    best = found[0] if len(found) == 1 else _best(found, load_cap)
    return np.array(best.held_RS, np.int32)


def _best(found: list["_Copies"], load_cap: float) -> "_Copies":
    """What needs fewest remote ranks within the cap. Where nothing keeps it: the least load over it
    among what needs few more than the fewest."""
    over = [copies.over(load_cap) for copies in found]
    found = [copies for copies, beyond in zip(found, over, strict=True) if beyond <= 0] or found
    if len(found) == 1:
        return found[0]
    remote = [copies.remote() for copies in found]
    most = min(remote) * (1 if min(over) <= 0 else 1 + SPARED_SHARE)
    near = [copies for copies, ranks in zip(found, remote, strict=True) if ranks <= most]
    return min(near, key=lambda copies: copies.over(load_cap))


def _filled(
    rank_of_E: np.ndarray, ids_TK: np.ndarray, load_E: np.ndarray, topology: Topology, slots: int
) -> tuple["_Copies", int]:
    """The slots filled by what copies save, and the remote ranks that the tokens then need."""
    copies = _Copies(rank_of_E, ids_TK, load_E, topology, slots)
    # Step 1: one copy per rank at a time; tokens then choose their homes again.
    while copies.room_R.any():
        copies.settle()
        for rank in np.flatnonzero(copies.room_R).tolist():
            copies.add_best(rank)
    # Step 2: every copy reconsidered, for where tokens live with all of them.
    best = copies.remote(), [list(held) for held in copies.held_RS]
    for _ in range(ROUNDS):
        if not sum(copies.reconsider(rank) for rank in range(topology.num_ranks)):
            break
        found = copies.remote(), [list(held) for held in copies.held_RS]
        best = min(best, found, key=lambda x: x[0])
    copies.hold(best[1])
    copies.settle()
    return copies, best[0]


def _swapped_slots(
    layer: CopiedLayer, num_ranks: int, slots: int, load_cap: float, swaps: int
) -> list[list[int]] | None:
    """Experts of each rank after swaps of experts and of copies of the hottest, as if the copies of
    an expert shared its tokens evenly; None where an expert would be twice on a rank."""
    load_E, num_experts = layer.load_E.astype(np.float64), len(layer.load_E)
    # Step 1: copies of the hottest, each on the rank with room that carries least.
    expert_I, copies_E = replicate(load_E, slots * num_ranks, num_ranks)
    share_E = load_E / copies_E
    added = expert_I[num_experts:]
    expert_I = np.append(np.arange(num_experts), added[np.argsort(-share_E[added], kind="stable")])
    rank_of_I = layer.rank_of_E.tolist()
    held_R = [set(np.flatnonzero(layer.rank_of_E == rank).tolist()) for rank in range(num_ranks)]
    carried_R = np.bincount(layer.rank_of_E, share_E, num_ranks)
    for expert in expert_I[num_experts:].tolist():
        free_R = np.array([len(held) < slots and expert not in held for held in held_R])
        if not free_R.any():
            return None
        rank = int(np.where(free_R, carried_R, np.inf).argmin())
        rank_of_I.append(rank)
        held_R[rank].add(expert)
        carried_R[rank] += share_E[expert]
    # Step 2: swaps, on pairs and then on remote ranks.
    problem = _problem_of_slots(layer, expert_I, copies_E, num_ranks, load_cap)
    rank_of_I = search_pairs(np.array(rank_of_I), problem, swaps, seed=0)
    rank_of_I = polish(rank_of_I, problem, swaps // 3, seed=0)
    held_RS = [expert_I[rank_of_I == rank].tolist() for rank in range(num_ranks)]
    return held_RS if all(len(set(held)) == slots for held in held_RS) else None


def _problem_of_slots(
    layer: CopiedLayer, expert_I: np.ndarray, copies_E: np.ndarray, num_ranks: int, load_cap: float
) -> Problem:
    """Experts and copies as experts of their own, which tokens choose alike."""
    step = max(1, -(-len(layer.expert_ids_TK) // SWAP_ROWS))
    ids_TK, num_slots = layer.expert_ids_TK[::step].astype(np.int64), len(expert_I)
    affinity_EE = layer.affinity_EE
    if affinity_EE is None:
        affinity_EE = co_activation_EE(ids_TK, len(copies_E))
    # Step 1: slots of each expert, and of each choice of a token one of them.
    slot_EC = np.full((len(copies_E) + 1, copies_E.max()), num_slots)
    order = np.argsort(expert_I, kind="stable")
    place = np.arange(num_slots) - np.searchsorted(expert_I[order], expert_I[order])
    slot_EC[expert_I[order], place] = order
    turn_TK = np.random.default_rng(0).integers(0, 2**30, ids_TK.shape) % np.append(copies_E, 1)[ids_TK]
    kinds_XK, kind_T = token_kinds(slot_EC[ids_TK, turn_TK], num_slots)
    weight_X = np.bincount(kind_T, minlength=len(kinds_XK)).astype(np.float64)
    # Step 2: pairs, in tokens of these rows; copies of one expert keep apart.
    rows_share = ids_TK.size / max(float(np.trace(affinity_EE)), 1.0)
    pairs_EE = rows_share * affinity_EE / np.outer(copies_E, copies_E)
    pairs_II = pairs_EE[np.ix_(expert_I, expert_I)]
    is_same_II = (expert_I[:, None] == expert_I) & ~np.eye(num_slots, dtype=bool)
    pairs_II[is_same_II] = -APART * max(float(pairs_EE.max()), 1.0)
    load_JI = (layer.load_E / copies_E)[expert_I][None]
    return Problem(
        affinity_EE=pairs_II,
        expert_ids_XK=kinds_XK,
        cost_XR=np.repeat(weight_X[:, None], num_ranks, axis=1),
        home_ER=np.zeros((num_slots, num_ranks)),
        closeness_RR=np.eye(num_ranks),
        load_JE=load_JI,
        limit_J=load_limits(load_JI, num_ranks, load_cap),
    )


class _Copies:
    """Experts of each rank of one layer, where the tokens live, and what each copy saves them."""

    def __init__(
        self, rank_of_E: np.ndarray, ids_TK: np.ndarray, load_E: np.ndarray, topology: Topology, slots: int
    ) -> None:
        num_ranks = topology.num_ranks
        self.ids_TK, self.load_E, self.topology, self.slots = ids_TK, load_E, topology, slots
        self.rank_of_E, self.num_experts, self.num_ranks = rank_of_E, len(rank_of_E), num_ranks
        self.held_RS = [np.flatnonzero(rank_of_E == rank).tolist() for rank in range(num_ranks)]
        self._settled_ER = np.zeros((0, 0), bool)  # as tokens were last settled for
        self.own_R = np.array([len(held) for held in self.held_RS])  # slots of the ranks' own experts
        self.hold(self.held_RS)

    @classmethod
    def of(cls, held_RS: list[list[int]], like: "_Copies", rank_of_E: np.ndarray) -> "_Copies":
        """Slots with these experts; each is at home on its rank of before, where that still holds
        it."""
        hosts_ER = np.zeros((like.num_experts, like.num_ranks), bool)
        for rank, held in enumerate(held_RS):
            hosts_ER[held, rank] = True
        stays_E = hosts_ER[np.arange(len(hosts_ER)), rank_of_E]
        copies = cls(
            np.where(stays_E, rank_of_E, hosts_ER.argmax(axis=1)), like.ids_TK, like.load_E, like.topology, like.slots
        )
        own_RS = copies.held_RS
        copies.hold([own + sorted(set(held) - set(own)) for own, held in zip(own_RS, held_RS, strict=True)])
        copies.settle()
        return copies

    def hold(self, held_RS: list[list[int]]) -> None:
        """These experts on the ranks."""
        self.held_RS = held_RS
        self.hosts_ER = np.zeros((self.num_experts + 1, self.num_ranks), bool)
        for rank, held in enumerate(held_RS):
            self.hosts_ER[held, rank] = True
        self.home_T = np.zeros(0, np.int64)

    @property
    def room_R(self) -> np.ndarray:
        return self.slots - np.array([len(held) for held in self.held_RS])

    def settle(self) -> None:
        """Tokens sent where most of their experts are, in equal numbers per rank."""
        if np.array_equal(self.hosts_ER, self._settled_ER):
            self.home_T, self.serving_RE = self._settled_T, self._settled_RE.copy()
            return
        count_TR = np.zeros((len(self.ids_TK), self.num_ranks))
        for ids_T in self.ids_TK.T:
            count_TR += self.hosts_ER[ids_T]
        self.home_T = balanced_homes(count_TR, np.ones(len(count_TR)))
        self.serving_RE = self._serving_RE()
        self._settled_ER, self._settled_RE, self._settled_T = self.hosts_ER.copy(), self.serving_RE.copy(), self.home_T
        order = np.argsort(self.home_T, kind="stable")
        ends = np.searchsorted(self.home_T[order], np.arange(self.num_ranks + 1))
        self.tokens_R = [order[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]

    def _serving_RE(self) -> np.ndarray:
        """Rank that serves each expert, int64 [R, E + 1]; R for an empty slot."""
        serving_RE = serve_RE(self.hosts_ER[:-1], self.load_E, self.topology)
        return np.pad(serving_RE.astype(np.int64), ((0, 0), (0, 1)), constant_values=self.num_ranks)

    def remote(self) -> int:
        """Ranks other than their own that the tokens need, summed."""
        self.settle()
        remote = 0
        for rank in range(self.num_ranks):
            ranks_TK = np.sort(self.serving_RE[rank][self.ids_TK[self.tokens_R[rank]]], axis=1)
            is_new = np.ones(ranks_TK.shape, bool)
            is_new[:, 1:] = ranks_TK[:, 1:] != ranks_TK[:, :-1]
            remote += int((is_new & (ranks_TK != rank) & (ranks_TK < self.num_ranks)).sum())
        return remote

    def saved_E(self, rank: int) -> np.ndarray:
        """What each expert would save the tokens of the rank, in remote ranks, float64 [E]; 0 for
        what it holds."""
        ids_TK = self.ids_TK[self.tokens_R[rank]]
        serving_E = self.serving_RE[rank]
        here_E = np.append(self.hosts_ER[:-1, rank], False)
        ranks_TK = np.where(here_E[ids_TK], self.num_ranks + 1, serving_E[ids_TK])
        same_TK = np.zeros(ranks_TK.shape, np.int8)
        for ranks_T in ranks_TK.T:
            same_TK += ranks_TK == ranks_T[:, None]
        worth_TK = np.where(same_TK == 1, 1.0, np.where(same_TK == 2, PAIR_SHARE, 0.0))
        worth_TK[(ranks_TK >= self.num_ranks)] = 0
        return np.bincount(ids_TK.reshape(-1), worth_TK.reshape(-1), self.num_experts + 1)[:-1]

    def without(self, rank: int, slot: int) -> float:
        """What the copy in a slot saves the tokens of its rank, were it the only one missing."""
        expert = self.held_RS[rank][slot]
        self.hosts_ER[expert, rank] = False
        elsewhere = np.flatnonzero(self.hosts_ER[expert])
        before = self.serving_RE[rank, expert]
        self.serving_RE[rank, expert] = elsewhere[0]
        saved = float(self.saved_E(rank)[expert])
        self.serving_RE[rank, expert] = before
        self.hosts_ER[expert, rank] = True
        return saved

    def add_best(self, rank: int) -> None:
        """The copy that saves most, in the next slot of the rank; among equals, the hottest."""
        saved_E = np.where(self.hosts_ER[:-1, rank], -np.inf, self.saved_E(rank))
        expert = int(np.lexsort((self.load_E, saved_E))[-1])
        self.held_RS[rank].append(expert)
        self.hosts_ER[expert, rank] = True

    def reconsider(self, rank: int) -> int:
        """Each copy of the rank in turn, exchanged where another expert saves more; how many
        were."""
        changed = 0
        for slot in range(int(self.own_R[rank]), len(self.held_RS[rank])):
            expert = self.held_RS[rank][slot]
            self.hosts_ER[expert, rank] = False
            elsewhere = np.flatnonzero(self.hosts_ER[expert])
            self.serving_RE[rank, expert] = elsewhere[0]
            saved_E = np.where(self.hosts_ER[:-1, rank], -np.inf, self.saved_E(rank))
            better = int(saved_E.argmax())
            if saved_E[better] > saved_E[expert]:
                expert, changed = better, changed + 1
            self.held_RS[rank][slot] = expert
            self.hosts_ER[expert, rank] = True
            self.serving_RE[rank, expert] = rank
        return changed

    def over(self, load_cap: float) -> float:
        """Load over the cap in units of it, which comes first where choices are judged."""
        load_R = served_load_R(self.serving_RE[:, :-1], self.load_E)
        limit = min(load_cap, 1e9) * float(load_R.mean())
        return round(float(np.maximum(load_R - limit, 0).sum()) / max(limit, 1e-300), 3)

    def swapped_E(self, slack: float, *, seed: int) -> np.ndarray:
        """Rank of each expert's first place after swaps that save most remote ranks of the tokens,
        where they live now and beside the copies there are, int64 [E].

        Loads by the replica rule may be `slack` times the mean, as copies will be chosen anew.
        """
        home_T, num_experts, num_ranks = self.home_T, self.num_experts, self.num_ranks
        # What a copy serves at home is no matter of the others' places.
        own_TK = np.append(self.rank_of_E, num_ranks)[self.ids_TK] == home_T[:, None]
        ids_TK = np.where(self.hosts_ER[self.ids_TK, home_T[:, None]] & ~own_TK, num_experts, self.ids_TK)
        cost_TR = np.ones((len(ids_TK), num_ranks), np.float32)
        cost_TR[np.arange(len(ids_TK)), home_T] = 0
        copied_ER = self.hosts_ER[:-1].copy()
        copied_ER[np.arange(num_experts), self.rank_of_E] = False
        # What copies serve stays where it is: the load of an item that no swap may move from its
        # rank.
        served_ER = self._served_ER()
        first_E = served_ER[np.arange(num_experts), self.rank_of_E]
        fixed_R = served_ER.sum(axis=0) - np.bincount(self.rank_of_E, first_E, num_ranks)
        load_JI = np.append(first_E, fixed_R)[None]
        rank_of_I = np.append(self.rank_of_E, np.arange(num_ranks))
        worth_IR = FORBIDDEN * np.vstack([copied_ER, ~np.eye(num_ranks, dtype=bool)])
        pair_II = np.pad(PAIR_WORTH * co_activation_EE(ids_TK, num_experts), (0, num_ranks))
        ids_TK = np.where(ids_TK == num_experts, num_experts + num_ranks, ids_TK)
        gains = RemoteGains(rank_of_I, ids_TK, cost_TR, worth_IR, pair_II)
        most = max(slack * load_JI.sum() / num_ranks, rank_loads(rank_of_I, load_JI, num_ranks).max())
        options = {"num_ranks": num_ranks, "steps": TURN_STEPS, "patience": TURN_STEPS // 2, "seed": seed}
        return swap_search(gains, load_JI, np.array([most]), **options)[0][:num_experts]

    def _served_ER(self) -> np.ndarray:
        """Activations of each expert that each rank serves where every rank sends an equal share,
        float64 [E, R]."""
        keys_RE = np.arange(self.num_experts) * self.num_ranks + self.serving_RE[:, :-1]
        share_RE = np.broadcast_to(self.load_E / self.num_ranks, keys_RE.shape)
        size = self.num_experts * self.num_ranks
        return np.bincount(keys_RE.reshape(-1), share_RE.reshape(-1), size).reshape(-1, self.num_ranks)

    def level(self, load_cap: float) -> None:
        """Copies exchanged for others until no rank serves more than the cap or no exchange brings
        it nearer."""
        load_R = served_load_R(self.serving_RE[:, :-1], self.load_E)
        limit = load_cap * float(load_R.mean())
        saved_RE = np.stack([self.saved_E(rank) for rank in range(self.num_ranks)])
        kept = {
            (rank, slot): self.without(rank, slot)
            for rank, held in enumerate(self.held_RS)
            for slot in range(int(self.own_R[rank]), len(held))
        }
        tried: set[tuple[int, int, int]] = set()
        for _ in range(LEVEL_STEPS * self.num_ranks):
            over = float(np.maximum(load_R - limit, 0).sum())
            if over <= 0:
                return
            best = None
            for rank, slot, expert in self._exchanges(load_R, limit, saved_RE, kept, tried):
                tried.add((rank, self.held_RS[rank][slot], expert))
                old = self.held_RS[rank][slot]
                self.hosts_ER[[old, expert], rank] = False, True
                serving_RE = self._serving_RE()
                self.hosts_ER[[old, expert], rank] = True, False
                then_R = served_load_R(serving_RE[:, :-1], self.load_E)
                relief = over - float(np.maximum(then_R - limit, 0).sum())
                price = max(kept[rank, slot] - saved_RE[rank, expert], 1.0) / max(relief, 1e-9)
                if relief > 1e-9 * limit and (best is None or price < best[0]):
                    best = price, rank, slot, expert, serving_RE, then_R
            if best is None:
                return
            _, rank, slot, expert, self.serving_RE, load_R = best
            self.hosts_ER[[self.held_RS[rank][slot], expert], rank] = False, True
            self.held_RS[rank][slot] = expert
            saved_RE[rank] = self.saved_E(rank)
            kept[rank, slot] = self.without(rank, slot)

    def _exchanges(
        self,
        load_R: np.ndarray,
        limit: float,
        saved_RE: np.ndarray,
        kept: dict[tuple[int, int], float],
        tried: set[tuple[int, int, int]],
    ) -> list[tuple[int, int, int]]:
        """The exchanges (rank, slot, expert that comes) that promise most relief for what they
        lose, best first."""
        num_ranks, load_E = self.num_ranks, self.load_E
        over_R = np.maximum(load_R - limit, 0)
        over, little = float(over_R.sum()), 0.001 * len(self.ids_TK) / num_ranks
        # Only what an overloaded rank serves relieves it.
        relieving_E = self.hosts_ER[:-1][:, over_R > 0].any(axis=1)
        found = []
        for rank, slot in kept:
            held = self.held_RS[rank][slot]
            lost = load_E[held] / num_ranks * (self.serving_RE[:, held] == rank).sum()
            others = np.flatnonzero(self.hosts_ER[held])
            others = others[others != rank]
            coming = np.flatnonzero(relieving_E & ~self.hosts_ER[:-1, rank])
            if over_R[rank] > 0:  # it is relieved by whatever is served less
                coming = np.flatnonzero(~self.hosts_ER[:-1, rank])
            # What a new host serves: its own tokens, and its part of the others'.
            copies_X = self.hosts_ER[coming].sum(axis=1)
            gained_X = load_E[coming] * (1 / num_ranks + (num_ranks - 1 - copies_X) / num_ranks / (1 + copies_X))
            from_X = self.serving_RE[rank, coming]
            receiver = others[np.argmin(load_R[others])]
            change_X = np.maximum(load_R[rank] - lost + gained_X - limit, 0) - over_R[rank]
            change_X += max(load_R[receiver] + lost - limit, 0) - over_R[receiver]
            change_X += np.maximum(load_R[from_X] - gained_X - limit, 0) - over_R[from_X]
            price_X = np.maximum(kept[rank, slot] - saved_RE[rank, coming], 0) + little
            worth_X = -change_X / price_X
            for i in np.argsort(-worth_X, kind="stable")[:LEVEL_TRIALS]:
                if worth_X[i] > 0 and (rank, held, int(coming[i])) not in tried:
                    found.append((float(worth_X[i]), rank, slot, int(coming[i])))
        assert over > 0
        return [(rank, slot, expert) for _, rank, slot, expert in sorted(found, key=lambda x: -x[0])[:LEVEL_TRIALS]]
