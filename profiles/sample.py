"""A bounded random sample of the requests of traces: as many whole requests as fit a number of
tokens.

Shape letters: T tokens, B requests, S tokens of known sequences.
"""

from dataclasses import replace

import numpy as np

from semmoe.profiles.trace import RoutingTrace, TraceBatch, concat_batches, integers


def choose_requests(tokens_B: list[np.ndarray], keep: list[np.ndarray], max_tokens: int, seed: int) -> list[np.ndarray]:
    """Kept requests whose tokens fit the budget, drawn at random: bool [B] per trace."""
    tokens, kept = np.concatenate(tokens_B), np.concatenate(keep)
    order = np.random.default_rng(seed).permutation(len(tokens))
    order = order[kept[order]]
    sample = np.zeros(len(tokens), bool)
    if kept.any() and tokens[kept].sum() > max_tokens:
        order = order[: max(1, np.searchsorted(np.cumsum(tokens[order]), max_tokens, side="right"))]
    sample[order] = True
    return np.split(sample, np.cumsum([len(t) for t in tokens_B])[:-1])


def select_requests(batch: TraceBatch, keep_B: np.ndarray) -> TraceBatch:
    """The batch with only the requests of `keep_B` (bool [B])."""
    if keep_B.all():
        return batch
    keep_T = np.repeat(keep_B, np.diff(batch.starts_B1))
    keep_S = np.repeat(keep_B, np.diff(batch.sequence_starts_B1))
    chosen = np.flatnonzero(keep_B)
    return TraceBatch(
        request_ids=[batch.request_ids[b] for b in chosen],
        domains=[batch.domains[b] for b in chosen],
        starts_B1=np.concatenate([[0], np.cumsum(np.diff(batch.starts_B1)[keep_B])]),
        expert_ids_TLK=batch.expert_ids_TLK[keep_T],
        token_ids_T=batch.token_ids_T[keep_T],
        is_prompt_T=batch.is_prompt_T[keep_T],
        num_prompt_tokens_B=batch.num_prompt_tokens_B[keep_B],
        first_position_B=batch.first_position_B[keep_B],
        sequence_starts_B1=np.concatenate([[0], np.cumsum(np.diff(batch.sequence_starts_B1)[keep_B])]),
        sequences=batch.sequences[keep_S],
        rank_of_B=None if batch.rank_of_B is None else batch.rank_of_B[keep_B],
        prompts_apart=batch.prompts_apart and select_requests(batch.prompts_apart, keep_B),
    )


def rows_of(batch: TraceBatch, keep_T: np.ndarray) -> TraceBatch:
    """The batch with some rows only (bool [T]); requests may keep none. Where those that one keeps
    do not follow each other, only the first has its position."""
    ends = np.concatenate([[0], np.cumsum(keep_T)])
    starts_B1 = ends[batch.starts_B1]
    first_row_B = np.searchsorted(ends, starts_B1[:-1], side="right") - 1
    skipped_B = np.where(np.diff(starts_B1) > 0, first_row_B - batch.starts_B1[:-1], 0)
    return replace(
        batch,
        starts_B1=starts_B1,
        expert_ids_TLK=batch.expert_ids_TLK[keep_T],
        token_ids_T=batch.token_ids_T[keep_T],
        is_prompt_T=batch.is_prompt_T[keep_T],
        first_position_B=batch.first_position_B + skipped_B,
    )


def sample_requests(traces: list[RoutingTrace], keep: list[np.ndarray], *, max_tokens: int, seed: int) -> TraceBatch:
    """Requests of `keep` (bool [B] per trace) as one batch: all, or a random choice of about
    `max_tokens` tokens."""
    tokens_B = [integers(trace.requests().column("num_tokens")) for trace in traces]
    chosen = choose_requests(tokens_B, keep, max_tokens, seed)
    batches = [b for trace, chosen_B in zip(traces, chosen, strict=True) for b in trace.batches(chosen_B)]
    return concat_batches(batches, traces[0].info)


def bounded_requests(batch: TraceBatch, *, max_tokens: int, seed: int) -> TraceBatch:
    """The batch, or a random choice of its requests of about `max_tokens` tokens."""
    (chosen,) = choose_requests([np.diff(batch.starts_B1)], [np.ones(batch.num_requests, bool)], max_tokens, seed)
    return select_requests(batch, chosen)
