"""A placed model before it serves: a short text through the exchange, and through the same experts
without it, must give the same.

The reference (runtime/layer/reference.py) takes which expert lies in which slot from what was read
into it, not from the plan's tables. So the two differ where a choice reaches another expert than
the router meant, where a row is lost, doubled or mixed up on its way, or where a family's experts
do other things with the choices of one token than with one choice at a time. What both share, the
weights and the dense part, is not proved: `--check` does that.

Shape letters: T tokens, L MoE layers, R ranks, V vocabulary.
"""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from semmoe.profiles.errors import InputError
from semmoe.runtime.layer.dispatch import serve_tokens
from semmoe.runtime.layer.reference import counted_slots_LE, sum_over_ranks
from semmoe.runtime.layer.tables import ExpertLayer, RunExperts
from semmoe.runtime.ranks.failures import naming
from semmoe.runtime.ranks.group import Group
from semmoe.runtime.transformers.ep import one_expert_at_a_time
from semmoe.runtime.transformers.forward import all_logits
from semmoe.runtime.transformers.placed_model import PlacedModel

PROBE_TOKENS = 24
# Of the largest value: float32, and 16 bits. A layer gets the same rows and choices both times, so
# only rounding may differ; logits in 16 bits may follow a router that rounding has turned.
MOST_OFF_LAYER = (1e-3, 0.05)
MOST_OFF_LOGITS = (1e-3, 0.1)


def probe_ids() -> np.ndarray:
    """The short text, int64 [1, T]."""
    return np.arange(PROBE_TOKENS)[None] % 50 + 5


def check_exchange(placed: PlacedModel, name: str) -> None:
    """Compare layers and logits; all ranks call it. Raises InputError, alike on all ranks, where
    the exchange gives other values than the experts themselves."""
    group, state, dtype = placed.group, placed.state, placed.model.dtype
    num_experts = len(placed.layers[0].tables.rank_of_E) - 1
    held_RLS = gathered(placed.held_LS, group)
    slots_LE = torch.from_numpy(counted_slots_LE(held_RLS, group.rank, num_experts)).to(group.device)
    off_L = np.zeros(len(placed.layers))

    def both_ways(
        layer: ExpertLayer,
        run_experts: RunExperts,
        hidden_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        weight_TK: torch.Tensor,
    ) -> torch.Tensor:
        number = layer.tables.layer
        expected_TD = sum_over_ranks(layer, run_experts, hidden_TD, ids_TK, weight_TK, slots_LE[number])
        found_TD = serve_tokens(layer, run_experts, hidden_TD, ids_TK, weight_TK).float()
        off_L[number] = float((found_TD - expected_TD).abs().max() / expected_TD.abs().max().clamp(min=1e-30))
        return expected_TD.to(hidden_TD.dtype)

    ids = torch.from_numpy(probe_ids()).to(group.device)
    with torch.inference_mode():
        with one_expert_at_a_time(placed.modules):
            state.instead = both_ways
            expected_TV = all_logits(placed.model, ids)[0]
            state.instead = None
        found_TV = all_logits(placed.model, ids)[0]
    off = gathered(np.append(off_L, relative_difference(found_TV, expected_TV, dtype)), group)
    off_L, off_logits = np.nan_to_num(off, nan=np.inf)[:, :-1].max(0), np.nan_to_num(off, nan=np.inf)[:, -1].max()
    wrong = np.flatnonzero(off_L > limit(MOST_OFF_LAYER, dtype))
    if len(wrong):
        where = placed.layers[wrong[0]].tables.name
        raise InputError(
            f"{name}: {where} gives other values through the exchange than its experts do by themselves "
            f"(relative difference {off_L[wrong[0]]:.2g}): a choice reaches another expert than the router meant"
        )
    if off_logits > limit(MOST_OFF_LOGITS, dtype):
        raise InputError(
            f"{name} gives other logits with its experts on {group.size} ranks (relative difference {off_logits:.2g})"
        )
    state.restart()


def limit(of_dtype: tuple[float, float], dtype: torch.dtype) -> float:
    """The limit for a number type."""
    return of_dtype[dtype != torch.float32]


def gathered(mine: np.ndarray, group: Group) -> np.ndarray:
    """The arrays of all ranks, stacked by rank."""
    parts: list[Any] = [None] * group.size
    with naming(group.rank, "the comparison of ranks before they serve"):
        dist.all_gather_object(parts, mine, group=group.handle)
    return np.stack(parts)


def relative_difference(found_TV: torch.Tensor, expected_TV: torch.Tensor, dtype: torch.dtype) -> float:
    """How far logits are off, in units of the largest: at the worst token in float32, at the lower
    quartile in 16 bits.

    There rounding alone turns some routers' choices, and those tokens' logits with them; layers of
    another shape miss all tokens.
    """
    off_T = (found_TV - expected_TV).abs().amax(1) / expected_TV.abs().max().clamp(min=1)
    return float(off_T.max() if dtype == torch.float32 else off_T.quantile(0.25))
