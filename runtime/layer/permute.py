"""What goes where: index arithmetic of de-duplicated dispatch and combine. No collectives, tested
with literals.

A token's hidden row travels once to each other rank that serves at least one of its experts. With
it go one slot and one weight for each of its K choices: the slot of the expert on that rank, or S
("not here") with weight 0. The receiver runs its slots and adds the weighted outputs, so that one
row comes back, which is added to the token. Choices that the token's own rank serves never leave
it.

A packed row is D hidden values, K weights and K slots (16 bits each), as bytes, padded to whole 8
bytes.

Shape letters: T tokens of this rank, K top-k, E experts, R ranks, S slots per rank, D hidden size,
M packed rows, P (row, slot) pairs.
"""

from typing import NamedTuple

import torch

ALIGNMENT = 8  # bytes; every section of a packed row can then be read in place


class Destinations(NamedTuple):
    """Where the choices of T tokens are served."""

    rank_TK: torch.Tensor  # int64
    slot_TK: torch.Tensor  # int64, on that rank
    needs_RT: torch.Tensor  # bool: rank r serves at least one choice of token t
    rows_R: torch.Tensor  # int64: tokens that need rank r; own rank included
    pairs_R: torch.Tensor  # int64: choices served by rank r


class Rows(NamedTuple):
    """Rows to send, grouped by destination rank in ascending order, own rank left out."""

    token_M: torch.Tensor  # int64
    slot_MK: torch.Tensor  # int16, S where the choice is served elsewhere
    weight_MK: torch.Tensor  # weight dtype, 0 there


def find_destinations(rank_TK: torch.Tensor, slot_TK: torch.Tensor, num_ranks: int) -> Destinations:
    """Destinations of each choice, from the rank that serves it and the slot there (int64, by
    `chosen_copies`). Rank `num_ranks`: served by nobody."""
    needs_RT = torch.zeros((num_ranks + 1, len(rank_TK)), dtype=torch.bool, device=rank_TK.device)
    needs_RT = needs_RT.scatter_(0, rank_TK.T, True)[:num_ranks]
    pairs_R = torch.zeros(num_ranks + 1, dtype=torch.int64, device=rank_TK.device)
    pairs_R = pairs_R.scatter_add_(0, rank_TK.reshape(-1), torch.ones_like(rank_TK).reshape(-1))[:num_ranks]
    return Destinations(rank_TK, slot_TK, needs_RT, needs_RT.sum(1), pairs_R)


def remote_rows(to: Destinations, weight_TK: torch.Tensor, *, rank: int, slots_per_rank: int, num_rows: int) -> Rows:
    """The rows that leave `rank`. `num_rows`: how many there are (known on the host from rows_R:
    no synchronisation here)."""
    needs_RT = to.needs_RT.clone()
    needs_RT[rank] = False
    rank_M, token_M = torch.nonzero_static(needs_RT, size=num_rows).unbind(1)
    here_MK = to.rank_TK[token_M] == rank_M[:, None]
    slot_MK = to.slot_TK[token_M].masked_fill(~here_MK, slots_per_rank).to(torch.int16)
    return Rows(token_M, slot_MK, weight_TK[token_M].masked_fill(~here_MK, 0))


def local_pairs(
    to: Destinations, weight_TK: torch.Tensor, *, rank: int, num_pairs: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choices that `rank` serves for its own tokens: token [P], slot [P] (int64) and weight [P],
    in token order."""
    token_P, k_P = torch.nonzero_static(to.rank_TK == rank, size=num_pairs).unbind(1)
    return token_P, to.slot_TK[token_P, k_P], weight_TK[token_P, k_P]


def received_pairs(
    slot_MK: torch.Tensor, weight_MK: torch.Tensor, *, slots_per_rank: int, num_pairs: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Work in received rows: row [P], slot [P] (int64) and weight [P], in row order."""
    row_P, k_P = torch.nonzero_static(slot_MK < slots_per_rank, size=num_pairs).unbind(1)
    return row_P, slot_MK[row_P, k_P].to(torch.int64), weight_MK[row_P, k_P]


def row_sections(
    hidden_size: int, top_k: int, hidden_dtype: torch.dtype, weight_dtype: torch.dtype
) -> tuple[int, int, int]:
    """Bytes of a packed row before the weights, before the slots, and in all."""
    weights_at = aligned(hidden_size * hidden_dtype.itemsize)
    slots_at = aligned(weights_at + top_k * weight_dtype.itemsize)
    return weights_at, slots_at, aligned(slots_at + top_k * 2)


def aligned(num_bytes: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def pack_rows(hidden_TD: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Packed rows, uint8 [M, bytes of a row]."""
    top_k, hidden_size = rows.slot_MK.shape[1], hidden_TD.shape[1]
    weights_at, slots_at, row_bytes = row_sections(hidden_size, top_k, hidden_TD.dtype, rows.weight_MK.dtype)
    packed = torch.zeros((len(rows.token_M), row_bytes), dtype=torch.uint8, device=hidden_TD.device)
    _section(packed, 0, hidden_TD.dtype, hidden_size).copy_(hidden_TD.index_select(0, rows.token_M))
    _section(packed, weights_at, rows.weight_MK.dtype, top_k).copy_(rows.weight_MK)
    _section(packed, slots_at, torch.int16, top_k).copy_(rows.slot_MK)
    return packed


def unpack_rows(
    packed: torch.Tensor, hidden_size: int, top_k: int, hidden_dtype: torch.dtype, weight_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of packed rows: hidden [M, D], slots [M, K] int16, weights [M, K]."""
    weights_at, slots_at, _ = row_sections(hidden_size, top_k, hidden_dtype, weight_dtype)
    hidden_MD = _section(packed, 0, hidden_dtype, hidden_size)
    weight_MK = _section(packed, weights_at, weight_dtype, top_k)
    return hidden_MD, _section(packed, slots_at, torch.int16, top_k), weight_MK


def _section(packed: torch.Tensor, begin: int, dtype: torch.dtype, count: int) -> torch.Tensor:
    return packed[:, begin : begin + count * dtype.itemsize].view(dtype)
