"""Remote ranks counted exactly: what each swap of two experts does to the ranks that tokens must
reach.

A token touches a rank when one of its experts is there. Touching rank r costs the token cost[r]: 1
for a home that is not known (a uniformly random home only scales the sum), less where its home may
be r. The cost of a placement is the hypergraph connectivity of the tokens, with a home pin.
Swapping e (on a) and f (on b) changes it by

    freed[e] + freed[f] - opened[e, b] - opened[f, a] - shared[e, f] - shared[f, e]

where freed[e] is the cost of the ranks that only e makes its tokens touch, opened[e, r] the cost of
rank r to e's tokens that do not touch it, and shared[e, f] the part of freed[e] from tokens that
also chose f (they still touch a after the swap).

Shape letters: X distinct token kinds (expert sets, with the cost summed over their tokens), K
top-k, E experts, R ranks.
"""

import numpy as np

from semmoe.solvers.evaluate.reached import reached_TR


class RemoteGains:
    """Gains of all swaps, exact, in units where an average expert carries cost 1; plus linear terms
    home[e, x_e].

    `expert_ids_XK`: E stands for an empty slot. `cost_XR`: float, cost of touching each rank summed
    over a kind's tokens. `home_ER`: worth of expert e on rank r in the same units as the cost.
    `pair_EE`: worth of two experts on one rank, symmetric. A swap recounts only tokens with one of
    the pair.
    """

    def __init__(
        self,
        rank_of_E: np.ndarray,
        expert_ids_XK: np.ndarray,
        cost_XR: np.ndarray,
        home_ER: np.ndarray,
        pair_EE: np.ndarray,
    ) -> None:
        num_experts, num_ranks = home_ER.shape
        self.size, self.num_ranks = num_experts, num_ranks
        self.rank_of_E = np.array(rank_of_E, np.int64)
        # The empty slot is an expert of its own on a rank of its own, which costs nothing.
        self.ids_XK = np.ascontiguousarray(expert_ids_XK, np.intp)
        num_kinds, top_k = self.ids_XK.shape
        self.scale = max(float(cost_XR.mean(axis=1).sum()) * top_k / num_experts, 1e-300)
        self.cost_RX = np.zeros((num_ranks + 1, num_kinds), np.float32)
        self.cost_RX[:num_ranks] = cost_XR.T / self.scale
        self.home_ER = (home_ER / self.scale).astype(np.float32)
        self.pair_EE = ((pair_EE - np.diag(np.diagonal(pair_EE))) / self.scale).astype(np.float32)
        self.rank_of_all = np.append(self.rank_of_E, num_ranks).astype(np.int16)
        # Small integers are sorted by radix: the slots of each expert, ascending.
        order = np.argsort(self.ids_XK.reshape(-1).astype(np.uint16), kind="stable")
        ends = np.concatenate([[0], np.cumsum(np.bincount(self.ids_XK.reshape(-1), minlength=num_experts + 1))])
        self.kinds_of_E = [order[ends[e] : ends[e + 1]] // top_k for e in range(num_experts)]
        self.is_chosen_X = np.zeros(num_kinds, bool)
        self._count_all()
        self.gain_EE = np.empty((num_experts, num_experts), np.float32)
        self.same_EE = self.rank_of_E[:, None] == self.rank_of_E
        self._refresh()

    def _count_all(self) -> None:
        from scipy.sparse import csr_array

        size, ids_XK = self.size, self.ids_XK
        num_kinds, top_k = ids_XK.shape
        rank_XK = self.rank_of_all[ids_XK]
        keys = (rank_XK.astype(np.int64) * num_kinds + np.arange(num_kinds)[:, None]).reshape(-1)
        counts = np.bincount(keys, minlength=(self.num_ranks + 1) * num_kinds)
        self.count_RX = counts.reshape(self.num_ranks + 1, num_kinds).astype(np.int16)
        cost_XK = self.cost_RX.reshape(-1)[keys].reshape(num_kinds, top_k)
        lone_XK = cost_XK * (counts[keys] == 1).reshape(num_kinds, top_k)
        self.freed_E = np.bincount(ids_XK.reshape(-1), lone_XK.reshape(-1), size + 1).astype(np.float32)
        starts = np.arange(0, num_kinds * top_k + 1, top_k)
        chosen_XE = csr_array(
            (np.ones(num_kinds * top_k, np.float32), ids_XK.reshape(-1), starts), (num_kinds, size + 1)
        )
        open_XR = np.ascontiguousarray(np.where(self.count_RX == 0, self.cost_RX, 0).T)
        self.opened_RE = np.ascontiguousarray((chosen_XE.T @ open_XR).T)
        lone_XE = csr_array((lone_XK.reshape(-1), ids_XK.reshape(-1), starts), (num_kinds, size + 1))
        shared_EE = (lone_XE.T @ chosen_XE).toarray()
        # What a pair of experts gains less than each alone, both ways.
        self.tied_EE = np.zeros((size + 1, size + 1), np.float32)
        self.tied_EE -= shared_EE + shared_EE.T
        self.tied_EE[:size, :size] -= 2 * self.pair_EE
        self.pairs_RE = np.stack([self.pair_EE[:, self.rank_of_E == r].sum(axis=1) for r in range(self.num_ranks)])

    def swap(self, e: int, f: int) -> None:
        a, b = int(self.rank_of_E[e]), int(self.rank_of_E[f])
        with_e, with_f = self.kinds_of_E[e], self.kinds_of_E[f]
        # A token with both experts touches the same ranks before and after; its slots are recounted
        # as all others are.
        self.is_chosen_X[with_e] = True
        kinds = np.concatenate([with_e, with_f[~self.is_chosen_X[with_f]]])
        self.is_chosen_X[with_e] = False
        ids_XK = self.ids_XK.take(kinds, axis=0)
        cost_2X = self.cost_RX[a][kinds], self.cost_RX[b][kinds]
        before_2X = self.count_RX[a][kinds], self.count_RX[b][kinds]
        change_XK = self._lone_on((a, b), ids_XK, before_2X, cost_2X)
        self.rank_of_E[e], self.rank_of_E[f] = b, a
        self.rank_of_all[e], self.rank_of_all[f] = b, a
        self.count_RX[a, with_e] -= 1
        self.count_RX[b, with_e] += 1
        self.count_RX[b, with_f] -= 1
        self.count_RX[a, with_f] += 1
        after_2X = self.count_RX[a][kinds], self.count_RX[b][kinds]
        change_XK -= self._lone_on((a, b), ids_XK, after_2X, cost_2X)
        top_k, width = ids_XK.shape[1], self.size + 1
        slots = np.flatnonzero(change_XK.reshape(-1) != 0)
        change, lone_ids = change_XK.reshape(-1)[slots], ids_XK.reshape(-1)[slots]
        self.freed_E -= np.bincount(lone_ids, change, width).astype(np.float32)
        beside = ids_XK.take(slots // top_k, axis=0)
        changes = np.repeat(change, top_k)
        tied = self.tied_EE.reshape(-1)
        np.add.at(tied, (lone_ids[:, None] * width + beside).reshape(-1), changes)
        np.add.at(tied, (beside * width + lone_ids[:, None]).reshape(-1), changes)
        for rank, before_X, after_X, cost_X in zip((a, b), before_2X, after_2X, cost_2X, strict=True):
            closed_X = (before_X == 0).view(np.int8) - (after_X == 0).view(np.int8)
            moved = np.flatnonzero(closed_X)
            weights = np.repeat(closed_X[moved] * cost_X[moved], top_k)
            self.opened_RE[rank] -= np.bincount(ids_XK.take(moved, axis=0).reshape(-1), weights, width).astype(
                np.float32
            )
        difference_E = self.pair_EE[e] - self.pair_EE[f]
        self.pairs_RE[a] -= difference_E
        self.pairs_RE[b] += difference_E
        for i in (e, f):
            self.same_EE[i] = self.same_EE[:, i] = self.rank_of_E == self.rank_of_E[i]
        self._refresh()

    def _lone_on(
        self,
        ranks: tuple[int, int],
        ids_XK: np.ndarray,
        count_2X: tuple[np.ndarray, np.ndarray],
        cost_2X: tuple[np.ndarray, np.ndarray],
    ) -> np.ndarray:
        """Cost that each slot alone on one of two ranks makes its token pay, float32 [X, K]; 0
        elsewhere."""
        rank_XK = self.rank_of_all.take(ids_XK)
        lone_XK = (rank_XK == ranks[0]) * (cost_2X[0] * (count_2X[0] == 1))[:, None]
        lone_XK += (rank_XK == ranks[1]) * (cost_2X[1] * (count_2X[1] == 1))[:, None]
        return lone_XK

    def _refresh(self) -> None:
        size, rank_of_E = self.size, self.rank_of_E
        worth_RE = self.pairs_RE - self.opened_RE[: self.num_ranks, :size]
        worth_RE += self.home_ER.T
        each = np.arange(size)
        own_E = self.home_ER[each, rank_of_E] + self.pairs_RE[rank_of_E, each]
        worth_RE += self.freed_E[:size] - own_E
        move_EE = worth_RE[rank_of_E]
        np.add(self.tied_EE[:size, :size], move_EE, out=self.gain_EE)
        self.gain_EE += worth_RE.T.take(rank_of_E, axis=1)
        np.copyto(self.gain_EE, -np.inf, where=self.same_EE)


def remote_cost(rank_of_E: np.ndarray, expert_ids_XK: np.ndarray, cost_XR: np.ndarray) -> float:
    """Cost of all ranks that tokens touch, in the units of `cost_XR`."""
    return float((cost_XR * reached_TR(expert_ids_XK, rank_of_E, cost_XR.shape[1])).sum())


def token_kinds(expert_ids_TK: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct expert sets, integers [X, K] ascending in each row, and the kind of every token,
    int64 [T].

    Where a set does not fit 62 bits the tokens are their own kinds.
    """
    ids_TK = np.sort(expert_ids_TK, axis=1).astype(np.int64)
    if (num_experts + 1) ** ids_TK.shape[1] >= 2**62:
        return ids_TK, np.arange(len(ids_TK))
    key_T = np.zeros(len(ids_TK), np.int64)
    for column_T in ids_TK.T:
        key_T = key_T * (num_experts + 1) + column_T
    _, first_X, kind_T = np.unique(key_T, return_index=True, return_inverse=True)
    return ids_TK[first_X], kind_T
