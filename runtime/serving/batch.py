"""Requests of one rank: those that wait, those that run as one batch padded on the left, and those
that are finished.

A request stays in the batch until it is finished, for its keys and values are there.

Shape letters: B requests of a batch, S positions (padding included).
"""

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from semmoe.runtime.transformers.kv_cache import is_joinable, join_caches, keep_requests

MAX_RUNNING = 64  # requests that one rank extends at a time


@dataclass(frozen=True, eq=False)
class Prompt:
    """A request to serve."""

    index: int  # place in the input
    request_id: str
    token_ids: np.ndarray  # int32


@dataclass(frozen=True, eq=False)
class Completion:
    """A finished request."""

    index: int
    request_id: str
    rank: int
    token_ids: list[int]  # generated
    finish_reason: str  # "stop" or "length"


@dataclass(frozen=True)
class Limits:
    """How far requests run and how large a forward pass may be."""

    max_new_tokens: int
    batch_tokens: int  # prompt tokens of one forward pass of a rank, padding included; a longer prompt runs alone
    stop_ids: frozenset[int]
    max_running: int = MAX_RUNNING


@dataclass(eq=False)
class Batch:
    """The running requests of a rank, padded on the left."""

    prompts: list[Prompt]
    generated: list[list[int]]
    cache: Any
    mask_BS: torch.Tensor  # int64
    done_B: list[bool]  # only where the cache cannot drop a request

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def running(self) -> int:
        """Requests that are not finished."""
        return len(self) - sum(self.done_B)


def padded(prompts: list[Prompt]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask of prompts padded on the left, int64 [B, S] each."""
    longest = max(len(prompt.token_ids) for prompt in prompts)
    ids_BS = np.zeros((len(prompts), longest), np.int64)
    mask_BS = np.zeros((len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        ids_BS[row, longest - len(prompt.token_ids) :] = prompt.token_ids
        mask_BS[row, longest - len(prompt.token_ids) :] = 1
    return ids_BS, mask_BS


def has_room(batch: Batch | None, limits: Limits) -> bool:
    """Whether a request can be added to the running ones."""
    return batch is None or (len(batch) < limits.max_running and is_joinable(batch.cache))


def take_prompts(pending: deque[Prompt], batch: Batch | None, limits: Limits) -> list[Prompt]:
    """The next prompts, in order, that fit one forward pass together; removed from `pending`. At
    least one."""
    free = limits.max_running - (0 if batch is None else len(batch))
    chosen, longest = [], 0
    while pending and len(chosen) < free:
        longest = max(longest, len(pending[0].token_ids))
        if chosen and longest * (len(chosen) + 1) > limits.batch_tokens:
            break
        chosen.append(pending.popleft())
    return chosen


def joined(batch: Batch | None, new: Batch) -> Batch:
    """Running requests and new ones as one batch."""
    if batch is None:
        return new
    length = max(batch.mask_BS.shape[1], new.mask_BS.shape[1])
    masks = [pad(mask_BS, (length - mask_BS.shape[1], 0)) for mask_BS in (batch.mask_BS, new.mask_BS)]
    return Batch(
        batch.prompts + new.prompts,
        batch.generated + new.generated,
        join_caches(batch.cache, new.cache),
        torch.cat(masks),
        batch.done_B + new.done_B,
    )


def retire(batch: Batch | None, limits: Limits, rank: int) -> tuple[Batch | None, list[Completion]]:
    """Take finished requests out of the batch; None where nothing is left running."""
    if batch is None:
        return None, []
    reasons = [finish_reason(generated, limits) for generated in batch.generated]
    new = [row for row, reason in enumerate(reasons) if reason and not batch.done_B[row]]
    finished = [
        Completion(batch.prompts[r].index, batch.prompts[r].request_id, rank, batch.generated[r], reasons[r])
        for r in new
    ]
    if all(reasons):
        return None, finished
    if new and is_joinable(batch.cache):
        kept = [row for row, reason in enumerate(reasons) if not reason]
        mask_BS = keep_requests(batch.cache, batch.mask_BS, torch.tensor(kept, device=batch.mask_BS.device))
        prompts, generated = [batch.prompts[r] for r in kept], [batch.generated[r] for r in kept]
        return Batch(prompts, generated, batch.cache, mask_BS, [False] * len(kept)), finished
    batch.done_B = [bool(reason) for reason in reasons]
    return batch, finished


def finish_reason(generated: list[int], limits: Limits) -> str:
    """ "stop" or "length", empty while the request goes on."""
    if generated[-1] in limits.stop_ids:
        return "stop"
    return "length" if len(generated) >= limits.max_new_tokens else ""
