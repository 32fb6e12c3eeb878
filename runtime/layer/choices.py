"""Which copy serves each choice of a token, on the token's rank: solvers/place/replicas.py in
PyTorch, for rules that look at more than the expert's number.

Nothing is read back to the host: every loop has as many turns as a token has choices.

Shape letters: T tokens of this rank, K top-k, E experts, R ranks.
"""

import torch

from semmoe.runtime.layer.tables import LayerTables
from semmoe.solvers.place.replicas import KNUTH


def chosen_copies(tables: LayerTables, expert_ids_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank that serves each choice and its slot there, int64 [T, K] both; rank R for the id E.
    `expert_ids_TK`: int64."""
    rank_TK = tables.rank_of_E[expert_ids_TK]
    copies = tables.copies
    if copies is None or not len(rank_TK):
        return rank_TK, tables.slot_of_E[expert_ids_TK]
    if copies.rule == "cover":
        rank_TK = cover(expert_ids_TK, rank_TK, copies.hosts_ER, copies.rank)
    else:
        count_TK = copies.count_E[expert_ids_TK]
        if copies.rule == "vllm":
            number_T = torch.arange(len(rank_TK), device=rank_TK.device)
            number_TK = ((number_T * KNUTH) & 0xFFFFFFFF)[:, None]
        else:
            number_TK = turns(expert_ids_TK) + copies.rank
        rank_TK = copies.copies_EC[expert_ids_TK, number_TK % count_TK]
    return rank_TK, copies.slot_RE[rank_TK, expert_ids_TK]


def turns(expert_ids_TK: torch.Tensor) -> torch.Tensor:
    """How many choices of the same expert come before each, row by row, int64 [T, K]."""
    key = expert_ids_TK.reshape(-1)
    ordered, order = torch.sort(key, stable=True)
    first = torch.searchsorted(ordered, ordered)
    place = torch.empty_like(key)
    place[order] = torch.arange(len(key), device=key.device) - first
    return place.reshape(expert_ids_TK.shape)


def cover(expert_ids_TK: torch.Tensor, preferred_TK: torch.Tensor, hosts_ER: torch.Tensor, rank: int) -> torch.Tensor:
    """Rank that serves each choice so that a token reaches few ranks, int64 [T, K]; greedy.

    `preferred_TK`: by the static rule, which decides between equals. `hosts_ER`: bool [E + 1, R].
    """
    num_tokens, top_k = expert_ids_TK.shape
    num_ranks = hosts_ER.shape[1]
    hosts_TKR = hosts_ER[expert_ids_TK]
    open_TK = (hosts_TKR.sum(2) > 1) & (preferred_TK != rank)
    reached_TR = torch.zeros((num_tokens, num_ranks + 1), dtype=torch.bool, device=preferred_TK.device)
    # 1. What nobody else serves is reached anyway, and so is the own rank.
    reached_TR.scatter_(1, preferred_TK.masked_fill(open_TK, num_ranks), True)
    reached_TR[:, rank] = True
    reached_TR[:, num_ranks] = False
    chosen_TK = preferred_TK
    for _ in range(top_k):
        # 2. Reached ranks serve what else they hold.
        able_TKR = hosts_TKR & reached_TR[:, None, :num_ranks]
        served_TK = open_TK & able_TKR.any(2)
        elsewhere_TK = served_TK & ~reached_TR.gather(1, preferred_TK)
        chosen_TK = torch.where(elsewhere_TK, able_TKR.to(torch.uint8).argmax(2), chosen_TK)
        open_TK = open_TK & ~served_TK
        # 3. One more rank: that which serves most of the rest.
        votes_TR = (hosts_TKR & open_TK[:, :, None]).sum(1) * (top_k + 1)
        votes_TR.scatter_add_(1, preferred_TK.clamp(max=num_ranks - 1), open_TK.to(torch.int64))
        more_T1 = open_TK.any(1)[:, None]
        reached_TR[:, :num_ranks] |= more_T1 & (
            torch.arange(num_ranks, device=votes_TR.device) == votes_TR.argmax(1)[:, None]
        )
    fewer_T = _num_reached(chosen_TK, num_ranks, rank) < _num_reached(preferred_TK, num_ranks, rank)
    return torch.where(fewer_T[:, None], chosen_TK, preferred_TK)


def _num_reached(rank_TK: torch.Tensor, num_ranks: int, rank: int) -> torch.Tensor:
    """Ranks that serve choices of each token, its own left out, int64 [T]."""
    reached_TR = torch.zeros((len(rank_TK), num_ranks + 1), dtype=torch.bool, device=rank_TK.device)
    reached_TR.scatter_(1, rank_TK, True)
    reached_TR[:, rank] = False
    return reached_TR[:, :num_ranks].sum(1)
