"""Batches of requests for a model to read.

Requests are read ahead in a window, sorted by length and cut into batches of about equal lengths
under a budget of tokens, so little padding is computed, none is recorded, and memory depends on the
window only.

Shape letters: T tokens, B requests of a batch.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

WINDOW_BATCHES = 32  # batches that a window is cut into
WINDOW_REQUESTS = 8192


@dataclass(frozen=True, eq=False)
class TokenRequest:
    """One request as token ids, int32."""

    request_id: str
    domain: str
    token_ids: np.ndarray


def length_batches(
    requests: Iterable[TokenRequest], batch_tokens: int, *, extra_tokens: int = 0
) -> Iterator[list[TokenRequest]]:
    """Batches of requests of similar lengths, at most `batch_tokens` tokens each after padding (one
    request may be longer).

    `extra_tokens`: tokens that each request will grow by. Windows of the input are sorted, longest
    first; requests of a window change places, windows do not. Nothing of a later window is read
    before its turn.
    """
    window: list[TokenRequest] = []
    tokens = 0
    for request in requests:
        window.append(request)
        tokens += len(request.token_ids) + extra_tokens
        if tokens >= WINDOW_BATCHES * batch_tokens or len(window) >= WINDOW_REQUESTS:
            yield from _cut_window(window, batch_tokens, extra_tokens)
            window, tokens = [], 0
    yield from _cut_window(window, batch_tokens, extra_tokens)


def _cut_window(window: list[TokenRequest], batch_tokens: int, extra_tokens: int) -> Iterator[list[TokenRequest]]:
    batch: list[TokenRequest] = []
    for request in sorted(window, key=lambda r: -len(r.token_ids)):
        longest = len((batch or [request])[0].token_ids) + extra_tokens
        if batch and longest * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


def pad_batch(batch: list[TokenRequest], *, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and attention mask, int64 [B, T], of requests padded to the longest."""
    longest = max(len(r.token_ids) for r in batch)
    ids, mask = np.zeros((2, len(batch), longest), np.int64)
    for b, request in enumerate(batch):
        place = slice(longest - len(request.token_ids), longest) if left else slice(len(request.token_ids))
        ids[b, place], mask[b, place] = request.token_ids, 1
    return ids, mask
