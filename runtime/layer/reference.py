"""An expert layer without its exchange: every rank runs the experts that it holds on the tokens of
all, and outputs are added up.

Dear and simple: no row moves, no table of ranks and slots is read. What runtime/layer/dispatch.py
gives must equal it (runtime/serving/probe.py). All ranks have the same tokens.

Shape letters: T tokens, K top-k, E experts, L MoE layers, R ranks, S slots per rank, D hidden size.
"""

import numpy as np
import torch
import torch.distributed as dist

from semmoe.runtime.layer.tables import ExpertLayer, RunExperts
from semmoe.runtime.ranks.failures import naming

NOT_HERE = -1


def counted_slots_LE(held_RLS: np.ndarray, rank: int, num_experts: int) -> np.ndarray:
    """The slot of `rank` that answers for each expert, int64 [L, E + 1]; -1 where another rank is.

    Of an expert with replicas the first rank's first slot answers; nobody does for E, no expert.
    `held_RLS`: the expert in each slot of each rank, -1 for none.
    """
    num_ranks, num_layers, _ = held_RLS.shape
    slot_LE = np.full((num_layers, num_experts + 1), NOT_HERE, np.int64)
    for other in reversed(range(num_ranks)):
        for layer, held_S in enumerate(held_RLS[other]):
            slot = np.flatnonzero(held_S >= 0)[::-1]
            slot_LE[layer, held_S[slot]] = slot if other == rank else NOT_HERE
    return slot_LE


def sum_over_ranks(
    layer: ExpertLayer,
    run_experts: RunExperts,
    hidden_TD: torch.Tensor,
    expert_ids_TK: torch.Tensor,
    weight_TK: torch.Tensor,
    slot_of_E: torch.Tensor,
) -> torch.Tensor:
    """Weighted sum of the chosen experts' outputs, float32 [T, D].

    Experts get all choices of a token at once, as their model calls them. In place of a choice that
    another rank serves stands one that this rank does, with weight 0. `slot_of_E`: int64 [E + 1],
    a row of `counted_slots_LE`.
    """
    slot_TK = slot_of_E[expert_ids_TK]
    here_TK = slot_TK >= 0
    row_N = here_TK.any(1).nonzero()[:, 0]
    slot_NK, here_NK = slot_TK[row_N], here_TK[row_N]
    slot_NK = torch.where(here_NK, slot_NK, slot_NK.amax(1, keepdim=True))
    sum_TD = torch.zeros(hidden_TD.shape, dtype=torch.float32, device=hidden_TD.device)
    if len(row_N):
        output_ND = run_experts(hidden_TD[row_N], slot_NK, weight_TK[row_N].masked_fill(~here_NK, 0))
        sum_TD[row_N] = output_ND.float()
    with naming(layer.group.rank, f"the sum over ranks at {layer.tables.name}"):
        dist.all_reduce(sum_TD, group=layer.group.handle)
    return sum_TD
