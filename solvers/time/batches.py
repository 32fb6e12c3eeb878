"""Batches as they will run, sampled from the requests of a trace: decode takes tokens of many
requests, prefill takes requests whole.

A decode step sees a request as often as it has tokens, so tokens are drawn evenly, none twice while
there are others. A prefill batch is filled with requests in random order, and starts over where
they do not suffice. Homes are either random (equal shares of the batch) or those of the requests:
then every rank fills its own share from its own requests.

Shape letters: T tokens of a trace, B requests, R ranks, J tokens of a batch (ordered by home, J / R
each), M batches.
"""

from dataclasses import dataclass

import numpy as np

from semmoe.profiles.trace import TraceBatch


@dataclass(frozen=True, eq=False)
class Pool:
    """Rows of a trace that batches are drawn from, request by request."""

    rows_B: list[np.ndarray]  # int64: rows of each request; none is empty
    request_of_pool: np.ndarray  # int64 [B]: its number in the trace
    note: str

    @property
    def num_requests(self) -> int:
        return len(self.rows_B)


def pool_of(batch: TraceBatch, phase: str) -> Pool:
    """The rows of a phase ("prompt" or "generated"); all rows, with a note, where it has none."""
    is_phase_T = batch.is_prompt_T == (phase == "prompt")
    note = ""
    if not is_phase_T.any():
        is_phase_T = np.ones(batch.num_tokens, bool)
        other = "generated" if phase == "prompt" else "prompt"
        note = f"the requests hold no {phase} tokens: times are of batches of their {other} tokens"
    parts = np.split(np.arange(batch.num_tokens), batch.starts_B1[1:-1])
    rows_B = [rows[is_phase_T[rows]] for rows in parts]
    kept = [b for b, rows in enumerate(rows_B) if len(rows)]
    return Pool([rows_B[b] for b in kept], np.array(kept, np.int64), note)


def random_homes(
    pool: Pool, requests: np.ndarray, size: tuple[int, int], phase: str, rng: np.random.Generator
) -> np.ndarray:
    """Rows of one batch at random homes, int64 [J].

    Parameters:
        requests: numbers in the pool that may be drawn, int64; one that stands twice counts twice.
        size: ranks, and tokens on each.
    """
    num_tokens = size[0] * size[1]
    rows_J = _drawn(pool, requests, num_tokens, phase, rng)
    return rows_J if phase == "generated" else rng.permutation(rows_J)


def homes_of_requests(
    pool: Pool, requests: np.ndarray, size: tuple[int, int], phase: str, homes_B: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """As `random_homes`, where request b of the pool lives on rank homes_B[b]. A rank without a
    request draws from all."""
    found = []
    for rank in range(size[0]):
        own = requests[homes_B[requests] == rank]
        found.append(_drawn(pool, own if len(own) else requests, size[1], phase, rng))
    return np.concatenate(found)


def _drawn(pool: Pool, requests: np.ndarray, num_tokens: int, phase: str, rng: np.random.Generator) -> np.ndarray:
    """Rows int64 [num_tokens] of one batch, or of a rank's share of it."""
    found: list[np.ndarray] = []
    missing = num_tokens
    while missing > 0:
        if phase == "generated":
            rows = np.concatenate([pool.rows_B[b] for b in requests])
            found.append(rng.permutation(rows)[:missing])
            missing -= len(found[-1])
            continue
        for request in rng.permutation(requests):
            found.append(pool.rows_B[request][:missing])
            missing -= len(found[-1])
            if missing <= 0:
                break
    return np.concatenate(found)
