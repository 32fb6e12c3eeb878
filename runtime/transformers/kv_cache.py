"""Key-value caches of a batch padded on the left: join two batches, drop requests, trim padding
nobody needs.

Works on the growing attention layers of Transformers, full and sliding. Other layers (linear
attention, compressed or indexed keys) are left alone: `is_joinable` says so, and the engine then
finishes a batch before it starts the next.

Shape letters: B requests, S positions (padding included).
"""

from typing import Any

import torch
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer


def is_joinable(cache: Any) -> bool:
    """Whether every layer of the cache is of a kind that can be padded, cut and joined."""
    return type(cache) is DynamicCache and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
    )


def join_caches(first: Any, second: Any) -> Any:
    """`first` with the requests of `second` after its own; both padded on the left to the longer
    of the two. Changes `first`."""
    length = max(cache_length(first), cache_length(second))
    pad_cache(first, length)
    pad_cache(second, length)
    for mine, theirs in zip(first.layers, second.layers, strict=True):
        if mine.is_initialized:
            mine.keys, mine.values = torch.cat([mine.keys, theirs.keys]), torch.cat([mine.values, theirs.values])
    return first


def cache_length(cache: Any) -> int:
    """Positions that the cache stands for."""
    return max((layer.get_seq_length() for layer in cache.layers if layer.is_initialized), default=0)


def pad_cache(cache: Any, length: int) -> None:
    """Add padding on the left until the cache stands for `length` positions."""
    for layer in cache.layers:
        if layer.is_initialized:
            missing = kept_positions(layer, length) - layer.keys.shape[-2]
            layer.keys, layer.values = (pad(t, (0, 0, missing, 0)) for t in (layer.keys, layer.values))
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = length


def kept_positions(layer: Any, length: int) -> int:
    """How many of `length` positions a layer holds."""
    return min(length, layer.sliding_window - 1) if isinstance(layer, DynamicSlidingWindowLayer) else length


def keep_requests(cache: Any, mask_BS: torch.Tensor, kept_B: torch.Tensor) -> torch.Tensor:
    """Drop all requests but `kept_B` (int64), and padding that all of them have; the mask [B, S]
    of what is left. Changes the cache."""
    mask_BS = mask_BS[kept_B]
    used_S = mask_BS.any(0)
    begin = int(used_S.to(torch.int8).argmax()) if len(kept_B) else mask_BS.shape[1]
    length = mask_BS.shape[1] - begin
    for layer in cache.layers:
        if layer.is_initialized:
            first = layer.keys.shape[-2] - kept_positions(layer, length)
            layer.keys, layer.values = (t[kept_B, ..., max(first, 0) :, :] for t in (layer.keys, layer.values))
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = length
    return mask_BS[:, begin:]
