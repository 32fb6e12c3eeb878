"""Heads of an attention module shared out over ranks: projections cut, the output projection left
with this rank's columns.

Two shapes of attention: q/k/v/o projections (with grouped key-value heads, biases, sinks, norms per
head or over all heads), and latent attention (DeepSeek), whose latents stay whole and whose
per-head projections are cut. The output of the cut module is a partial sum.

Shape letters: R ranks.
"""

from typing import Any

import numpy as np
import torch
from torch import nn

from semmoe.profiles.errors import InputError

LATENT = ("kv_b_proj", "o_proj")
GROUPED = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim")


def heads_of_rank(num_heads: int, rank: int, num_ranks: int) -> list[int]:
    """Query heads of a rank: nearly equal consecutive runs."""
    return np.array_split(np.arange(num_heads), num_ranks)[rank].tolist()


def key_heads(query_heads: list[int], queries_per_key: int) -> tuple[list[int], int]:
    """Key-value heads that these query heads need, in order, and how many query heads share each.

    Where they do not share evenly every query head gets a copy of its own: [0, 1, 2] of 2 per key
    -> ([0, 0, 1], 1).
    """
    needed = [head // queries_per_key for head in query_heads]
    distinct = sorted(set(needed))
    shares = {needed.count(key) for key in distinct}
    return (distinct, shares.pop()) if len(shares) == 1 else (needed, 1)


class SelectedHeads(nn.Module):
    """A norm over all heads, followed by the choice of this rank's: such a norm needs every
    head."""

    def __init__(self, norm: nn.Module, columns: torch.Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("columns", columns, persistent=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(hidden)[..., self.columns]


def keep_heads(attention: Any, rank: int, num_ranks: int, where: str) -> None:
    """Cut an attention module down to the heads of `rank`. Raises InputError for attention of
    another shape."""
    unknown = f"--scheduler tp: {where} ({type(attention).__name__}) has no heads that semmoe knows how to share out"
    try:
        if all(hasattr(attention, name) for name in LATENT):
            _keep_latent_heads(attention, rank, num_ranks, where)
        elif all(hasattr(attention, name) for name in GROUPED):
            _keep_grouped_heads(attention, rank, num_ranks, where)
        else:
            raise InputError(unknown)
    except (AttributeError, IndexError) as error:  # parts of the right names and another build
        raise InputError(unknown) from error


def _keep_grouped_heads(attention: Any, rank: int, num_ranks: int, where: str) -> None:
    size = attention.head_dim
    num_heads, num_keys = attention.q_proj.out_features // size, attention.k_proj.out_features // size
    queries = _own_heads(num_heads, rank, num_ranks, where)
    keys, sharing = key_heads(queries, num_heads // num_keys)
    for name, heads in (("q", queries), ("k", keys), ("v", keys)):
        projection, norm = getattr(attention, f"{name}_proj"), getattr(attention, f"{name}_norm", None)
        rows = _rows(heads, size, projection.weight.device)
        width = None if norm is None or not hasattr(norm, "weight") else norm.weight.shape[-1]
        if width == projection.out_features and width != size:
            setattr(attention, f"{name}_norm", SelectedHeads(norm, rows))  # pyright: ignore
        else:
            _keep_rows(projection, rows)
    _keep_columns(
        attention.o_proj,
        _rows(queries, attention.o_proj.in_features // num_heads, attention.o_proj.weight.device),
        rank,
    )
    if getattr(attention, "sinks", None) is not None:
        attention.sinks = nn.Parameter(attention.sinks.data[queries], requires_grad=False)
    attention.num_key_value_groups = sharing


def _keep_latent_heads(attention: Any, rank: int, num_ranks: int, where: str) -> None:
    num_heads = attention.num_heads
    heads = _own_heads(num_heads, rank, num_ranks, where)
    queries = attention.q_b_proj if getattr(attention, "q_lora_rank", None) else attention.q_proj
    for projection in (queries, attention.kv_b_proj):
        _keep_rows(projection, _rows(heads, projection.out_features // num_heads, projection.weight.device))
    output = attention.o_proj
    _keep_columns(output, _rows(heads, output.in_features // num_heads, output.weight.device), rank)
    attention.num_heads = len(heads)
    attention.num_key_value_groups = 1


def _own_heads(num_heads: int, rank: int, num_ranks: int, where: str) -> list[int]:
    if num_heads < num_ranks:
        raise InputError(f"--scheduler tp: {where} has {num_heads} heads, fewer than the {num_ranks} ranks")
    return heads_of_rank(num_heads, rank, num_ranks)


def _rows(heads: list[int], size: int, device: torch.device) -> torch.Tensor:
    """Rows of a projection that belong to heads of `size` values, int64."""
    return (torch.tensor(heads, device=device)[:, None] * size + torch.arange(size, device=device)).reshape(-1)


def _keep_rows(linear: nn.Linear, rows: torch.Tensor) -> None:
    linear.weight = nn.Parameter(linear.weight.data[rows], requires_grad=False)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.data[rows], requires_grad=False)
    linear.out_features = len(rows)


def _keep_columns(linear: nn.Linear, columns: torch.Tensor, rank: int) -> None:
    """Cut the inputs. The bias is added once: by rank 0."""
    linear.weight = nn.Parameter(linear.weight.data[:, columns].contiguous(), requires_grad=False)
    if linear.bias is not None and rank:
        linear.bias = None  # pyright: ignore
    linear.in_features = len(columns)
