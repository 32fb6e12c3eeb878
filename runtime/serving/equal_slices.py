"""Equal slices of a batch on the model's device: the arithmetic of solvers/schedule/slices.py in
torch, without a word to the host.

Every rank gets ceil(T / R) places, so that shapes are known before the scores are; places that no
token takes repeat token 0 and are ignored. Shapes depend on T and R only, and nothing is read back:
prices in a fixed number of sweeps, overflow in a fixed number of rounds. Scores are first taken
relative to each token's best and divided by their spread; prices and homes do not depend on either.

All ranks compute the homes of all tokens from the same numbers, so they must round alike: one kind
of device per group.

Shape letters: T tokens of the batch (the same on every rank), R ranks, P places (R times those of a
slice).
"""

from typing import NamedTuple

import torch
from torch.nn.functional import pad

from semmoe.solvers.schedule.slices import COOLING, ROUNDS, SWEEPS

NONE = -torch.inf


class Slices(NamedTuple):
    """Which token is where, slice after slice."""

    token_P: torch.Tensor  # int64; 0 where the place is empty
    place_T: torch.Tensor  # int64
    places: int  # of one slice
    empty_P: torch.Tensor | None  # bool; None where every place has a token

    def of_rank(self, rank: int) -> slice:
        """The places of a rank."""
        return slice(rank * self.places, (rank + 1) * self.places)


def places_of_slice(num_tokens: int, num_ranks: int) -> int:
    """Places of one rank: T / R, rounded up."""
    return -(-num_tokens // num_ranks)


def equal_slices(scores_TR: torch.Tensor) -> Slices:
    """Every token at its best rank net of prices, overflow at the next best; higher scores are
    better."""
    num_tokens, num_ranks = scores_TR.shape
    places = places_of_slice(num_tokens, num_ranks)
    unit_RT = unit_scores_RT(scores_TR, num_empty=num_ranks * places - num_tokens)
    net_RT = (unit_RT - prices_R(unit_RT, num_tokens)[:, None])[:, :num_tokens]
    return slices_by_home(fill_slices(net_RT, places), num_ranks)


def contiguous_slices(num_tokens: int, num_ranks: int, device: torch.device) -> Slices:
    """Equal consecutive slices: what a plain reduce-scatter does."""
    home_T = torch.arange(num_tokens, device=device) // max(places_of_slice(num_tokens, num_ranks), 1)
    return slices_by_home(home_T, num_ranks)


def slices_by_home(home_T: torch.Tensor, num_ranks: int) -> Slices:
    """Tokens by home, int64 [T] with at most ceil(T / R) of a kind; inside a slice in their own
    order."""
    num_tokens, places = len(home_T), places_of_slice(len(home_T), num_ranks)
    rank_R1 = torch.arange(num_ranks, device=home_T.device)[:, None]
    before_RT = (home_T == rank_R1).cumsum(1, dtype=torch.int32)
    place_T = home_T * places + before_RT.gather(0, home_T[None])[0] - 1
    token_P = torch.zeros(num_ranks * places, dtype=torch.int64, device=home_T.device)
    token_P.scatter_(0, place_T, torch.arange(num_tokens, device=home_T.device))
    if num_ranks * places == num_tokens:
        return Slices(token_P, place_T, places, None)
    empty_P = torch.ones(num_ranks * places, dtype=torch.bool, device=home_T.device)
    return Slices(token_P, place_T, places, empty_P.index_fill_(0, place_T, False))


def unit_scores_RT(scores_TR: torch.Tensor, *, num_empty: int) -> torch.Tensor:
    """Scores below each token's best in units of their spread (best over mean, on average), float32
    [R, T]; 0 where all are equal.

    One column more where places stay empty: zeros.
    """
    best_T1 = scores_TR.amax(1, keepdim=True)
    rows = len(scores_TR) + (num_empty > 0)
    spread = (best_T1[:, 0] - scores_TR.mean(1)).sum() / rows
    unit_RT = ((scores_TR - best_T1) / spread.clamp_(min=1e-30)).T
    return pad(unit_RT, (0, 1)) if num_empty else unit_RT.contiguous()


def prices_R(unit_RT: torch.Tensor, num_tokens: int, *, sweeps: int = SWEEPS) -> torch.Tensor:
    """Price of each rank at which every rank is wanted equally, up to a constant, float32 [R]
    (semmoe.solvers.schedule.slices.slice_prices)."""
    num_ranks, rows = unit_RT.shape
    places = num_ranks * places_of_slice(num_tokens, num_ranks)
    weight_T = torch.full((rows,), 1 / places, device=unit_RT.device)
    if rows > num_tokens:
        weight_T[-1].fill_((places - num_tokens) / places)
    least_R = torch.full((num_ranks,), 1e-6 / num_ranks, device=unit_RT.device)
    price_R1 = torch.zeros((num_ranks, 1), device=unit_RT.device)
    for sweep in range(sweeps):
        temperature = COOLING ** (sweep / max(sweeps - 1, 1))
        shares_RT = torch.softmax((unit_RT - price_R1).mul_(1 / temperature), 0)
        price_R1.add_(torch.addmv(least_R, shares_RT, weight_T).log_()[:, None], alpha=temperature)
    return price_R1[:, 0]


def fill_slices(net_RT: torch.Tensor, places: int) -> torch.Tensor:
    """Rank of each token, int64 [T], at most `places` of a kind
    (semmoe.solvers.schedule.slices.fill_slices)."""
    num_ranks, num_tokens = net_RT.shape
    device = net_RT.device
    rank_R1 = torch.arange(num_ranks, device=device)[:, None]
    free_R1 = torch.full((num_ranks, 1), places, device=device)
    home_T = torch.full((num_tokens,), num_ranks, device=device)  # R: none yet
    for _ in range(min(num_ranks, ROUNDS)):
        # 1. Every token without a place asks for its best rank that has room.
        open_RT = net_RT.masked_fill(free_R1 <= 0, NONE)
        best_T, rank_T = open_RT.max(0)
        regret_T = best_T - open_RT.scatter_(0, rank_T[None], NONE).amax(0)  # infinite for all with one rank left
        # 2. A rank takes those that would lose most elsewhere, in their own order where they lose
        # the same.
        order_T = regret_T.argsort(descending=True, stable=True)
        asks_T = torch.where(home_T == num_ranks, rank_T, num_ranks).index_select(0, order_T)
        asks_RT = asks_T == rank_R1
        taken_RT = asks_RT & (asks_RT.cumsum(1, dtype=torch.int32) <= free_R1)
        taken_T = torch.where(taken_RT.any(0), asks_T, home_T.index_select(0, order_T))
        home_T = home_T.scatter(0, order_T, taken_T)
        free_R1 = free_R1 - taken_RT.sum(1, keepdim=True)
    # 3. The few that are left take what is free.
    left_T = home_T == num_ranks
    ends_R = free_R1[:, 0].cumsum(0)
    rank_T = torch.searchsorted(ends_R, left_T.cumsum(0))
    return torch.where(left_T, rank_T, home_T)
