"""RoutingProfile: what a solver needs of a trace, counted once. Load, co-activation, token x
expert, request x expert.

Counts are integers and additive over batches, parts and traces, so a trace larger than memory is
counted part by part. What cannot be kept whole (which token chose which experts) is kept for a
bounded random sample of the requests (`semmoe.profiles.sample`), layer by layer in a file that
worker processes map (`semmoe.profiles.mapped`).

Shape letters: T tokens, L MoE layers, E experts, K top-k, U token ids seen, B requests.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from semmoe.profiles.errors import InputError
from semmoe.profiles.mapped import MappedView, mapped_empty, open_view, view_of
from semmoe.profiles.progress import Progress
from semmoe.profiles.sample import choose_requests, select_requests
from semmoe.profiles.trace import RoutingTrace, TraceBatch, TraceInfo, concat_batches, integers

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Run = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]  # a map in worker processes
BLOCK_TOKENS = 32_768  # rows whose pair keys stay in the cache of one core
SAMPLE_IDS = 500_000_000  # expert ids that a profile keeps: half a gigabyte at one byte each


def load_E(expert_ids_TK: np.ndarray, num_experts: int) -> np.ndarray:
    """Activations per expert, int64 [E]. An id of num_experts (empty slot) is not counted."""
    return np.bincount(expert_ids_TK.reshape(-1), minlength=num_experts + 1)[:num_experts]


def co_activation_EE(expert_ids_TK: np.ndarray, num_experts: int) -> np.ndarray:
    """Tokens that chose both experts, symmetric int64 [E, E]; the diagonal is the load. Empty slots
    are not counted.

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
    """How often token id u chose expert e, sparse int32 [U, E]. Rows of index -1 (unknown token)
    are left out."""
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
    counts = np.zeros(num_requests * width, np.int64)
    for start in range(0, len(expert_ids_TK), BLOCK_TOKENS):
        # Requests follow each other, so those of a block of rows are few.
        request_T = request_of_T[start : start + BLOCK_TOKENS]
        first = int(request_T.min())
        keys_TK = (request_T - first)[:, None] * width + expert_ids_TK[start : start + BLOCK_TOKENS]
        found = np.bincount(keys_TK.reshape(-1))
        counts[first * width : first * width + len(found)] += found
    return counts.reshape(num_requests, width)[:, :num_experts]


def request_rows(sample: TraceBatch, requests_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the requests, int64 [T] in order, and which of the requests each belongs to, int64
    [T]."""
    lengths_B = np.diff(sample.starts_B1)[requests_B]
    index_T = np.repeat(np.arange(len(requests_B)), lengths_B)
    first_B = sample.starts_B1[requests_B] - (np.cumsum(lengths_B) - lengths_B)
    return np.arange(len(index_T)) + first_B[index_T], index_T


@dataclass(frozen=True, eq=False)
class RoutingProfile:
    """Counts over all tokens, and a bounded sample of the requests for what needs single tokens."""

    info: TraceInfo
    num_tokens: int
    load_LE: np.ndarray  # int64 [L, E]
    co_activation_LEE: np.ndarray  # int64 [L, E, E]
    sample: TraceBatch  # every request where the trace is small enough

    def token_index(self) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of the sample in ascending order, int32 [U], and each sample row's index
        among them, int64 [T] (-1 unknown)."""
        known_T = self.sample.token_ids_T >= 0
        ids_U, index = np.unique(self.sample.token_ids_T[known_T], return_inverse=True)
        index_T = np.full(len(known_T), -1, np.int64)
        index_T[known_T] = index
        return ids_U, index_T


class _Counts:
    """Tokens and co-activation added up batch by batch; additive over any split of them."""

    def __init__(self, info: TraceInfo) -> None:
        self.num_tokens = 0
        self.co_activation_LEE = np.zeros((info.num_layers, info.num_experts, info.num_experts), np.int64)
        self._waiting: list[np.ndarray] = []  # small batches wait for company: a pass costs E * E beside its rows

    def add(self, expert_ids_TLK: np.ndarray) -> None:
        self.num_tokens += len(expert_ids_TLK)
        self._waiting.append(expert_ids_TLK)
        if sum(len(ids_TLK) for ids_TLK in self._waiting) >= BLOCK_TOKENS:
            self._count()

    def _count(self) -> None:
        if self._waiting:
            ids_TLK = self._waiting[0] if len(self._waiting) == 1 else np.concatenate(self._waiting)
            for layer, both_EE in enumerate(self.co_activation_LEE):
                both_EE += co_activation_EE(ids_TLK[:, layer], len(both_EE))
            self._waiting = []

    def done(self) -> tuple[int, np.ndarray, np.ndarray]:
        """Tokens, load int64 [L, E] and co-activation int64 [L, E, E]."""
        self._count()
        return self.num_tokens, _loads_of(self.co_activation_LEE), self.co_activation_LEE


def count_batches(batches: Iterable[TraceBatch], info: TraceInfo) -> tuple[int, np.ndarray, np.ndarray]:
    """Tokens, load int64 [L, E] and co-activation int64 [L, E, E] over batches; additive over
    any split of them."""
    counts = _Counts(info)
    for batch in batches:
        counts.add(batch.expert_ids_TLK)
    return counts.done()


def profile_traces(
    traces: list[RoutingTrace], keep: list[np.ndarray] | None = None, *, seed: int = 0, sample_ids: int = SAMPLE_IDS
) -> RoutingProfile:
    """Profile of the requests of `keep` over several traces of one model.

    Parameters:
        traces: with routing per token.
        keep: bool [B] per trace, which requests to count; None: all.
        seed: of the sample, where not all requests fit into it.
        sample_ids: expert ids that the sample holds at most.

    Raises InputError where a trace is of another model or holds no request to count.
    """
    keep = keep or [np.ones(trace.num_requests, bool) for trace in traces]
    (profile,), _ = _profile_parts(traces, [keep], seed=seed, sample_ids=sample_ids)
    if profile.num_tokens == 0:
        raise InputError(f"{', '.join(t.path for t in traces)}: no token to learn from")
    return profile


def profile_split(
    traces: list[RoutingTrace],
    held_out: list[np.ndarray],
    *,
    seed: int = 0,
    sample_ids: int = SAMPLE_IDS,
    progress: Progress | None = None,
    run: Run | None = None,
) -> tuple[RoutingProfile, RoutingProfile, RoutingProfile]:
    """Profiles of the requests that are not held out, of those that are, and of all; from one
    reading.

    Counts are additive, and the sample of all requests is the other two one after the other in one
    file: nothing is kept twice.

    Parameters:
        traces, seed, sample_ids: as in `profile_traces`; the two sides share the sample by tokens.
        held_out: bool [B] per trace.
        progress: told the tokens read and the tokens in all.
        run: a map in worker processes, for the counts of a trace that the sample holds whole; they
            are the same without.

    Raises InputError as `profile_traces` does.
    """
    parts = [[~h for h in held_out], held_out]
    told = {"progress": progress, "run": run}
    (fitted, rest), ids_LTK = _profile_parts(traces, parts, seed=seed, sample_ids=sample_ids, **told)
    if fitted.num_tokens == 0:
        raise InputError(f"{', '.join(t.path for t in traces)}: no token to learn from")
    info = fitted.info
    bare = [replace(p.sample, expert_ids_TLK=p.sample.expert_ids_TLK[:0]) for p in (fitted, rest)]
    whole = RoutingProfile(
        info,
        fitted.num_tokens + rest.num_tokens,
        fitted.load_LE + rest.load_LE,
        fitted.co_activation_LEE + rest.co_activation_LEE,
        replace(concat_batches(bare, info), expert_ids_TLK=ids_LTK.transpose(1, 0, 2)),
    )
    return fitted, rest, whole


def _read_ahead(batches: Iterable[TraceBatch]) -> Iterator[TraceBatch]:
    """The batches, each read while the one before it is counted."""
    rest = iter(batches)
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, rest, None)
        while (batch := coming.result()) is not None:
            coming = reader.submit(next, rest, None)
            yield batch


def _profile_parts(
    traces: list[RoutingTrace],
    parts: list[list[np.ndarray]],
    *,
    seed: int,
    sample_ids: int,
    progress: Progress | None = None,
    run: Run | None = None,
) -> tuple[list[RoutingProfile], np.ndarray]:
    """Profiles of disjoint sets of requests (bool [B] per trace each), and the expert ids of
    their samples, [L, T, K]."""
    info = traces[0].info
    for trace in traces:
        trace.require_tokens("a profile")
        if wrong := info.mismatch(trace.info):
            raise InputError(f"{trace.path} is the trace of another model than {traces[0].path}: {wrong}")
    tokens_B = [integers(trace.requests().column("num_tokens")) for trace in traces]
    wanted = [sum(int(t[k].sum()) for t, k in zip(tokens_B, keep, strict=True)) for keep in parts]
    max_tokens = sample_ids // (info.num_layers * info.top_k)
    # Every set gets its share of the budget, so that together they are a sample of all.
    budgets = [max_tokens * tokens // max(sum(wanted), 1) for tokens in wanted]
    budgets = [max(b, 1) if sum(wanted) > max_tokens else tokens for b, tokens in zip(budgets, wanted, strict=True)]
    samples = [choose_requests(tokens_B, keep, most, seed) for keep, most in zip(parts, budgets, strict=True)]
    sizes = [sum(int(t[s].sum()) for t, s in zip(tokens_B, sample, strict=True)) for sample in samples]
    # Layers first: solvers look at the sample one layer at a time.
    id_dtype = np.result_type(*(trace.info.id_dtype for trace in traces))
    ids_LTK = mapped_empty((info.num_layers, sum(sizes), info.top_k), id_dtype)
    ends = np.cumsum(sizes).tolist()
    filled = [end - size for end, size in zip(ends, sizes, strict=True)]
    kept: list[list[TraceBatch]] = [[] for _ in parts]
    later = run is not None and sizes == wanted and view_of(ids_LTK) is not None
    counts, done = [_Counts(info) for _ in parts], 0
    for number, trace in enumerate(traces):
        keep_B = np.any([keep[number] for keep in parts], axis=0)
        first, chosen = 0, np.flatnonzero(keep_B)
        for batch in _read_ahead(trace.batches(keep_B)):
            which_B = chosen[first : first + batch.num_requests]
            first += batch.num_requests
            for p, keep in enumerate(parts):
                mine_B = keep[number][which_B]
                if not mine_B.any():
                    continue
                mine = select_requests(batch, mine_B)
                if not later:
                    counts[p].add(mine.expert_ids_TLK)
                sampled_B = samples[p][number][which_B[mine_B]]
                if sampled_B.any():
                    taken = select_requests(mine, sampled_B)
                    rows = slice(filled[p], filled[p] + taken.num_tokens)
                    ids_LTK[:, rows] = taken.expert_ids_TLK.transpose(1, 0, 2)
                    filled[p] = rows.stop
                    # A copy of nothing: a view would keep the batch.
                    kept[p].append(replace(taken, expert_ids_TLK=taken.expert_ids_TLK[:0].copy()))
            done += batch.num_tokens
            if progress is not None:
                progress(done, sum(wanted))
    counted = [c.done() for c in counts]
    if later and run is not None:
        rows = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        tasks = [_LayerCounts(view_of(layer_TK[r]), info.num_experts) for r in rows for layer_TK in ids_LTK]
        pairs = np.stack(list(run(_count_layer, tasks))).reshape(len(parts), *counted[0][2].shape)
        counted = [(size, _loads_of(pairs_LEE), pairs_LEE) for size, pairs_LEE in zip(sizes, pairs, strict=True)]
    ids_LTK = np.asarray(ids_LTK)
    profiles = []
    for p, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        ids_TLK = ids_LTK[:, end - size : end].transpose(1, 0, 2)
        sample = replace(concat_batches(kept[p], info), expert_ids_TLK=ids_TLK)
        profiles.append(RoutingProfile(info, *counted[p], sample))
    return profiles, ids_LTK


class _LayerCounts(NamedTuple):
    """One layer of mapped rows to count; sent to a worker process."""

    view: MappedView | None
    num_experts: int


def _count_layer(task: _LayerCounts) -> np.ndarray:
    assert task.view is not None
    return co_activation_EE(open_view(task.view), task.num_experts)


def _loads_of(co_activation_LEE: np.ndarray) -> np.ndarray:
    """Load, int64 [L, E]: how often experts were chosen beside themselves."""
    return np.diagonal(co_activation_LEE, axis1=1, axis2=2).copy()
