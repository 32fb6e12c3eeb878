"""Remote ranks counted exactly: what each swap of two experts does to the ranks that tokens must reach.

A token touches a rank when one of its experts is there. Touching rank r costs the token cost[r]: 1 for a home that is not
known (a uniformly random home only scales the sum), less where its home may be r. The cost of a placement is the
hypergraph connectivity of the tokens, with a home pin. Swapping e (on a) and f (on b) changes it by
    freed[e] + freed[f] - opened[e, b] - opened[f, a] - shared[e, f] - shared[f, e]
where freed[e] is the cost of the ranks that only e makes its tokens touch, opened[e, r] the cost of rank r to e's tokens
that do not touch it, and shared[e, f] the part of freed[e] from tokens that also chose f (they still touch a after the swap).

Shape letters: X distinct token kinds (expert sets, with the cost summed over their tokens), K top-k, E experts, R ranks.
"""

import numpy as np


class RemoteGains:
    """Gains of all swaps, exact, in units where an average expert carries cost 1; plus linear terms home[e, x_e].

    `expert_ids_XK`: E stands for an empty slot. `cost_XR`: float, cost of touching each rank summed over a kind's tokens.
    `home_ER`: worth of expert e on rank r in the same units as the cost. `pair_EE`: worth of two experts on one rank, symmetric.
    A swap recounts only tokens with one of the pair.
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
        self.ids_XK = expert_ids_XK.astype(np.int64)
        num_kinds, top_k = self.ids_XK.shape
        self.scale = max(float(cost_XR.mean(axis=1).sum()) * top_k / num_experts, 1e-300)
        self.cost_XR = np.zeros((num_kinds, num_ranks + 1))
        self.cost_XR[:, :num_ranks] = cost_XR / self.scale
        self.home_ER = home_ER / self.scale
        self.pair_EE = (pair_EE - np.diag(np.diagonal(pair_EE))) / self.scale
        self.rank_of_all = np.append(self.rank_of_E, num_ranks)
        flat = self.ids_XK.reshape(-1)
        order = np.argsort(flat, kind="stable")
        ends = np.searchsorted(flat[order], np.arange(num_experts + 1))
        self.kinds_of_E = [order[ends[e] : ends[e + 1]] // top_k for e in range(num_experts)]
        self._count_all()
        self.gain_EE = np.empty((num_experts, num_experts), np.float32)
        self._refresh()

    def _count_all(self) -> None:
        size, ids_XK = self.size, self.ids_XK
        num_kinds, top_k = ids_XK.shape
        rank_XK = self.rank_of_all[ids_XK]
        width = self.num_ranks + 1
        keys = (np.arange(num_kinds)[:, None] * width + rank_XK).reshape(-1)
        self.count_XR = np.bincount(keys, minlength=num_kinds * width).reshape(num_kinds, width).astype(np.int16)
        lone = np.take_along_axis(self.count_XR, rank_XK, 1) == 1
        lone_XK = np.where(lone, np.take_along_axis(self.cost_XR, rank_XK, 1), 0)
        self.freed_E = np.bincount(ids_XK.reshape(-1), lone_XK.reshape(-1), size + 1)
        open_XR = np.where(self.count_XR == 0, self.cost_XR, 0)
        self.opened_ER = np.zeros((size + 1, width))
        self.shared_EE = np.zeros((size + 1) ** 2)
        for k in range(top_k):
            for rank in range(self.num_ranks):
                self.opened_ER[:, rank] += np.bincount(ids_XK[:, k], open_XR[:, rank], size + 1)
            for j in range(top_k):
                keys = ids_XK[:, k] * (size + 1) + ids_XK[:, j]
                self.shared_EE += np.bincount(keys, lone_XK[:, k], (size + 1) ** 2)

    def swap(self, e: int, f: int) -> None:
        a, b = int(self.rank_of_E[e]), int(self.rank_of_E[f])
        with_e, with_f = self.kinds_of_E[e], self.kinds_of_E[f]
        # A token with both experts touches the same ranks before and after; its slots are recounted as all others are.
        kinds = np.union1d(with_e, with_f)
        ids_XK = self.ids_XK[kinds]
        counts_X2, cost_X2 = self.count_XR[kinds][:, [a, b]], self.cost_XR[kinds][:, [a, b]]
        before_XK = self._lone_on(ids_XK, (a, b), counts_X2, cost_X2)
        self.rank_of_E[e], self.rank_of_E[f] = b, a
        self.rank_of_all[e], self.rank_of_all[f] = b, a
        self.count_XR[with_e, a] -= 1
        self.count_XR[with_e, b] += 1
        self.count_XR[with_f, b] -= 1
        self.count_XR[with_f, a] += 1
        after_X2 = self.count_XR[kinds][:, [a, b]]
        change_XK = self._lone_on(ids_XK, (a, b), after_X2, cost_X2) - before_XK
        kind, slot = np.nonzero(change_XK)
        change, lone_ids = change_XK[kind, slot], ids_XK[kind, slot]
        np.add.at(self.freed_E, lone_ids, change)
        keys = (lone_ids * (self.size + 1))[:, None] + ids_XK[kind]
        np.add.at(self.shared_EE, keys.reshape(-1), np.repeat(change, ids_XK.shape[1]))
        opened_X2 = ((after_X2 == 0) * 1.0 - (counts_X2 == 0)) * cost_X2
        for column, rank in enumerate((a, b)):
            moved = np.flatnonzero(opened_X2[:, column])
            weights = np.repeat(opened_X2[moved, column], ids_XK.shape[1])
            self.opened_ER[:, rank] += np.bincount(ids_XK[moved].reshape(-1), weights, self.size + 1)
        self._refresh()

    def _lone_on(
        self, ids_XK: np.ndarray, ranks: tuple[int, int], counts_X2: np.ndarray, cost_X2: np.ndarray
    ) -> np.ndarray:
        """Cost that each slot on one of two ranks alone makes its token pay, [X, K]; 0 elsewhere."""
        rank_XK = self.rank_of_all[ids_XK]
        alone_X2 = np.where(counts_X2 == 1, cost_X2, 0)
        on_a = np.where(rank_XK == ranks[0], alone_X2[:, :1], 0)
        return np.where(rank_XK == ranks[1], alone_X2[:, 1:], on_a)

    def _refresh(self) -> None:
        size, rank_of_E = self.size, self.rank_of_E
        home_E = self.home_ER[np.arange(size), rank_of_E]
        pairs_ER = self.pair_EE @ np.eye(self.num_ranks)[rank_of_E]
        own_E = pairs_ER[np.arange(size), rank_of_E]
        constant_E = (self.freed_E[:size] - home_E - own_E).astype(np.float32)
        worth_ER = (self.home_ER + pairs_ER - self.opened_ER[:size, : self.num_ranks]).astype(np.float32)
        worth_ER += constant_E[:, None]
        move_EE = np.take(worth_ER, rank_of_E, axis=1)
        move_EE -= self.shared_EE.reshape(size + 1, size + 1)[:size, :size]
        move_EE -= self.pair_EE
        np.add(move_EE, move_EE.T, out=self.gain_EE)
        self.gain_EE[rank_of_E[:, None] == rank_of_E[None, :]] = -np.inf


def remote_cost(rank_of_E: np.ndarray, expert_ids_XK: np.ndarray, cost_XR: np.ndarray) -> float:
    """Cost of all ranks that tokens touch, in the units of `cost_XR`."""
    num_kinds, num_ranks = cost_XR.shape
    touched_XR = np.zeros((num_kinds, num_ranks + 1), bool)
    ranks_XK = np.append(rank_of_E, num_ranks)[expert_ids_XK.astype(np.int64)]
    touched_XR[np.arange(num_kinds)[:, None], ranks_XK] = True
    return float((cost_XR * touched_XR[:, :num_ranks]).sum())


def token_kinds(expert_ids_TK: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct expert sets, integers [X, K] ascending in each row, and the kind of every token, int64 [T].

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
