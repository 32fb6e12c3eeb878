"""RoutingProfile: what a solver needs of a trace, counted once. Load, co-activation, token x expert, request x expert.

Counts are integers and additive over batches, parts and traces, so a trace larger than memory is counted part by part. What cannot be
kept whole (which token chose which experts) is kept for a bounded random sample of the requests, layer by layer in a file that worker
processes map (`profiles.mapped`).

Shape letters: T tokens, L MoE layers, E experts, K top-k, U token ids seen, B requests.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from profiles.errors import InputError
from profiles.mapped import mapped_empty
from profiles.trace import RoutingTrace, TraceBatch, TraceInfo, concat_batches

if TYPE_CHECKING:
    from scipy.sparse import csr_array

BLOCK_TOKENS = 32_768  # rows whose pair keys stay in the cache of one core
SAMPLE_IDS = 500_000_000  # expert ids that a profile keeps: half a gigabyte at one byte each


def load_E(expert_ids_TK: np.ndarray, num_experts: int) -> np.ndarray:
    """Activations per expert, int64 [E]. An id of num_experts (empty slot) is not counted."""
    return np.bincount(expert_ids_TK.reshape(-1), minlength=num_experts + 1)[:num_experts]


def co_activation_EE(expert_ids_TK: np.ndarray, num_experts: int) -> np.ndarray:
    """Tokens that chose both experts, symmetric int64 [E, E]; the diagonal is the load. Empty slots are not counted.

    One bincount per column with all later ones: K * K / 2 keys per token and no sparse matrix.
    """
    width = num_experts + 1
    counts = np.zeros(width * width, np.int64)
    for start in range(0, len(expert_ids_TK), BLOCK_TOKENS):
        ids_KT = np.ascontiguousarray(expert_ids_TK[start : start + BLOCK_TOKENS].T).astype(np.intp)
        for i, first_T in enumerate(ids_KT[:-1] * width):
            counts += np.bincount((first_T + ids_KT[i + 1 :]).reshape(-1), minlength=width * width)
    pairs_EE = counts.reshape(width, width)[:num_experts, :num_experts]
    both_EE = pairs_EE + pairs_EE.T
    np.fill_diagonal(both_EE, load_E(expert_ids_TK, num_experts))
    return both_EE


def token_expert_UE(
    token_index_T: np.ndarray, expert_ids_TK: np.ndarray, num_ids: int, num_experts: int
) -> "csr_array":
    """How often token id u chose expert e, sparse int32 [U, E]. Rows of index -1 (unknown token) are left out."""
    from scipy.sparse import coo_array

    known = token_index_T >= 0
    rows = np.repeat(token_index_T[known], expert_ids_TK.shape[1]).astype(np.int32)
    columns = expert_ids_TK[known].reshape(-1).astype(np.int32)
    routed = columns < num_experts
    rows, columns = rows[routed], columns[routed]
    return coo_array((np.ones(len(rows), np.int32), (rows, columns)), shape=(num_ids, num_experts)).tocsr()


def request_expert_BE(
    request_of_T: np.ndarray, expert_ids_TK: np.ndarray, num_requests: int, num_experts: int
) -> np.ndarray:
    """How often request b activated expert e, int64 [B, E]."""
    width = num_experts + 1
    keys_TK = request_of_T[:, None] * width + expert_ids_TK
    return np.bincount(keys_TK.reshape(-1), minlength=num_requests * width).reshape(num_requests, width)[
        :, :num_experts
    ]


@dataclass(frozen=True, eq=False)
class RoutingProfile:
    """Counts over all tokens, and a bounded sample of the requests for what needs single tokens."""

    info: TraceInfo
    num_tokens: int
    load_LE: np.ndarray  # int64 [L, E]
    co_activation_LEE: np.ndarray  # int64 [L, E, E]
    sample: TraceBatch  # every request where the trace is small enough

    def token_index(self) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of the sample in ascending order, int32 [U], and each sample row's index among them, int64 [T] (-1 unknown)."""
        known_T = self.sample.token_ids_T >= 0
        ids_U, index = np.unique(self.sample.token_ids_T[known_T], return_inverse=True)
        index_T = np.full(len(known_T), -1, np.int64)
        index_T[known_T] = index
        return ids_U, index_T


def count_batches(batches: Iterable[TraceBatch], info: TraceInfo) -> tuple[int, np.ndarray, np.ndarray]:
    """Tokens, load int64 [L, E] and co-activation int64 [L, E, E] over batches; additive over any split of them."""
    num_tokens, size = 0, info.num_experts
    co_activation_LEE = np.zeros((info.num_layers, size, size), np.int64)
    for ids_TLK in _blocks(batches):
        num_tokens += len(ids_TLK)
        for layer in range(info.num_layers):
            co_activation_LEE[layer] += co_activation_EE(ids_TLK[:, layer], size)
    return num_tokens, np.diagonal(co_activation_LEE, axis1=1, axis2=2).copy(), co_activation_LEE


def _blocks(batches: Iterable[TraceBatch]) -> Iterator[np.ndarray]:
    """Expert ids of small batches together, [T, L, K] with about BLOCK_TOKENS rows or more: a pass costs E * E beside its rows."""
    waiting: list[np.ndarray] = []
    for batch in batches:
        waiting.append(batch.expert_ids_TLK)
        if sum(len(ids_TLK) for ids_TLK in waiting) >= BLOCK_TOKENS:
            yield waiting[0] if len(waiting) == 1 else np.concatenate(waiting)
            waiting = []
    if waiting:
        yield np.concatenate(waiting)


def profile_traces(
    traces: list[RoutingTrace], keep: list[np.ndarray] | None = None, *, seed: int = 0, sample_ids: int = SAMPLE_IDS
) -> RoutingProfile:
    """Profile of the requests of `keep` (bool [B] per trace; all where None) over several traces of one model.

    Raises InputError where a trace is of another model or holds no request to count.
    """
    info = traces[0].info
    for trace in traces:
        trace.require_tokens("a profile")
        if wrong := info.mismatch(trace.info):
            raise InputError(f"{trace.path} is the trace of another model than {traces[0].path}: {wrong}")
    keep = keep or [np.ones(trace.num_requests, bool) for trace in traces]
    tokens_B = [trace.requests().column("num_tokens").to_numpy() for trace in traces]
    in_sample = _sample_requests(tokens_B, keep, sample_ids // (info.num_layers * info.top_k), seed)
    num_sampled = sum(int(t[s].sum()) for t, s in zip(tokens_B, in_sample, strict=True))
    id_dtype = np.result_type(*(trace.info.id_dtype for trace in traces))
    # Layers first: solvers look at the sample one layer at a time.
    ids_LTK = mapped_empty((info.num_layers, num_sampled, info.top_k), id_dtype)
    kept: list[TraceBatch] = []

    def keep_sample(batch: TraceBatch) -> None:
        first = sum(b.num_tokens for b in kept)
        ids_LTK[:, first : first + batch.num_tokens] = batch.expert_ids_TLK.transpose(1, 0, 2)
        kept.append(replace(batch, expert_ids_TLK=batch.expert_ids_TLK[:0]))

    def all_batches() -> Iterator[TraceBatch]:
        for trace, keep_B, sample_B in zip(traces, keep, in_sample, strict=True):
            row = 0
            chosen = np.flatnonzero(keep_B)
            for batch in trace.batches(keep_B):
                sampled = sample_B[chosen[row : row + batch.num_requests]]
                row += batch.num_requests
                if sampled.any():
                    keep_sample(select_requests(batch, sampled))
                yield batch

    num_tokens, load_LE, co_activation_LEE = count_batches(all_batches(), info)
    if num_tokens == 0:
        raise InputError(f"{', '.join(t.path for t in traces)}: no token to learn from")
    sample = replace(concat_batches(kept, info), expert_ids_TLK=np.asarray(ids_LTK).transpose(1, 0, 2))
    return RoutingProfile(info, num_tokens, load_LE, co_activation_LEE, sample)


def _sample_requests(
    tokens_B: list[np.ndarray], keep: list[np.ndarray], max_tokens: int, seed: int
) -> list[np.ndarray]:
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
    )


def sample_requests(traces: list[RoutingTrace], keep: list[np.ndarray], *, max_tokens: int, seed: int) -> TraceBatch:
    """Requests of `keep` (bool [B] per trace) as one batch: all, or a random choice of about `max_tokens` tokens."""
    tokens_B = [trace.requests().column("num_tokens").to_numpy() for trace in traces]
    chosen = _sample_requests(tokens_B, keep, max_tokens, seed)
    batches = [b for trace, chosen_B in zip(traces, chosen, strict=True) for b in trace.batches(chosen_B)]
    return concat_batches(batches, traces[0].info)
