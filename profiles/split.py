"""How a trace is divided: requests held out or not, requests by domain, and tokens by phase.

A split to score on is by request, never by token: tokens of one request are not independent.
Prefill and decode run on different ranks with different exchanges, so what is good for one need not
be for the other: a view of a trace holds the tokens of one phase. A row is of the prompt where its
position is; the last token of a prompt is, the tokens that were sampled are not.

Shape letters: B requests, T tokens.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import pyarrow as pa

from semmoe.profiles.errors import InputError, listed
from semmoe.profiles.sample import rows_of
from semmoe.profiles.trace import RoutingTrace, TraceBatch, integers

OTHER = "other"  # the domain of the rare ones


def holdout_requests(requests: pa.Table, *, holdout: float, holdout_domains: list[str], seed: int) -> np.ndarray:
    """Requests to score on and not to learn from, bool [B].

    A share `holdout` of the requests, drawn at random; with `holdout_domains`, all requests of
    those domains instead: of the domain of that name, or where there is none, of all that begin
    with it. Raises InputError where a domain is unknown or one side would be empty.
    """
    num_requests = requests.num_rows
    if holdout_domains:
        domains = np.array(requests.column("domain").to_pylist(), dtype=object)
        known, chosen = sorted(set(domains)), set()
        for domain in holdout_domains:
            found = {domain} & set(known) or {name for name in known if domain and name.startswith(domain)}
            if not found:
                raise InputError(f"no request has the domain {domain!r}; domains are: {listed(known)}")
            chosen |= found
        held_out_B = np.isin(domains, list(chosen))
    else:
        if not 0 < holdout < 1:
            raise InputError(f"--holdout is {holdout}, expected a share between 0 and 1")
        held_out_B = np.zeros(num_requests, bool)
        chosen = np.random.default_rng(seed).permutation(num_requests)[: max(1, round(holdout * num_requests))]
        held_out_B[chosen] = True
    if held_out_B.all() or not held_out_B.any():
        raise InputError(
            f"{num_requests} request{'s' * (num_requests != 1)} cannot be split: {int(held_out_B.sum())} held out, "
            "the rest to learn from"
        )
    return held_out_B


def request_keys(requests: pa.Table) -> np.ndarray:
    """A key for each request, uint64 [B], equal for the same request in any trace: what a plan
    keeps of the requests it was fitted on.

    `requests`: the table of RoutingTrace.requests().
    """
    stored = "stored_tokens" if "stored_tokens" in requests.column_names else "num_tokens"  # of both phases
    columns = ("request_id", "domain", "num_prompt_tokens", stored)
    rows = zip(*(requests.column(name).to_pylist() for name in columns), strict=True)
    digests = b"".join(hashlib.blake2b("\0".join(map(str, row)).encode(), digest_size=8).digest() for row in rows)
    return np.frombuffer(digests, "<u8")


def domain_groups(domains_B: list[str], *, most: int = 12) -> tuple[list[str], np.ndarray]:
    """Domains as a short list, which a table or a picture can show: at most `most` names,
    ascending, and each request's index among them, int64 [B].

    Where there are more domains, they are taken by what stands before the first "/" (data
    set/subject), and beyond that the rare ones become "other".
    """
    names_B = [name or "(none)" for name in domains_B]
    if len(set(names_B)) > most:
        names_B = [name.split("/")[0] for name in names_B]
    counts = Counter(names_B)
    if len(counts) > most:
        kept = {name for name, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[: most - 1]}
        names_B = [name if name in kept else OTHER for name in names_B]
    names = sorted(set(names_B))
    index = {name: i for i, name in enumerate(names)}
    return names, np.array([index[name] for name in names_B], np.int64)


PHASES = ("all", "prompt", "generated")
ONE_SIDED = 0.95  # share of the tokens from which on a trace says little of the other phase
MEANING = {
    "prompt": "it speaks for prefill, whose exchange sends a row per token and rank (DeepEP normal); of decode, which sends "
    "one per token and expert (DeepEP low-latency), it says next to nothing",
    "generated": "it speaks for decode, whose exchange often sends a row per token and expert (DeepEP low-latency: "
    "--dispatch per-expert); of prefill, which sends one per token and rank, it says next to nothing",
}


def phase_of(trace: RoutingTrace) -> str:
    """Whose tokens a trace holds: one of PHASES."""
    return trace.phase if isinstance(trace, PhaseTrace) else "all"


def whole_of(trace: RoutingTrace) -> RoutingTrace:
    """The trace with the tokens of both phases."""
    return trace.whole if isinstance(trace, PhaseTrace) else trace


def only_phase(trace: RoutingTrace, phase: str, *, with_prompts: bool = False) -> RoutingTrace:
    """The trace with the tokens of one phase (one of PHASES); `with_prompts`: of generated ones the
    prompts apart. Raises InputError where it has none of them, or loads only."""
    if phase not in PHASES:
        raise InputError(f"--phase {phase}: expected one of {', '.join(PHASES)}")
    if phase == "all":
        return trace
    trace.require_tokens(f"--phase {phase}")
    view = PhaseTrace(trace, phase, with_prompts=with_prompts)
    if not view.num_tokens:
        raise InputError(f"{trace.path} holds no {phase} tokens: --phase {phase} has nothing to count")
    return view


def counted_phase(traces: Sequence[RoutingTrace], phase: str, *, timed: bool) -> str:
    """The phase, or "all" where times are asked for of a phase that no trace holds: its batches are
    then made of the tokens there are (`semmoe.solvers.time.batches.pool_of` says so)."""
    return "all" if timed and phase != "all" and not phase_shares(traces)[phase] else phase


def phase_shares(traces: Sequence[RoutingTrace]) -> dict[str, float]:
    """Share of the tokens of each phase over all tokens of the traces, by name; of a view, of the
    whole trace behind it."""
    tables = [whole_of(trace).requests() for trace in traces]
    prompt = sum(int(prompt_rows_B(table).sum()) for table in tables)
    tokens = sum(int(integers(table.column("num_tokens")).sum()) for table in tables)
    share = prompt / max(tokens, 1)
    return {"prompt": share, "generated": 1 - share if tokens else 0.0}


def one_sided(shares: dict[str, float]) -> str | None:
    """What it means that nearly all tokens are of one phase, a line; None where they are not."""
    phase = max(shares, key=shares.__getitem__)
    if shares[phase] < ONE_SIDED:
        return None
    amount = "all" if shares[phase] == 1 else f"{shares[phase]:.0%}"
    return f"{amount} of the tokens are {'of prompts' if phase == 'prompt' else 'generated'}: {MEANING[phase]}"


def prompt_rows_B(requests: pa.Table) -> np.ndarray:
    """Recorded rows of each request that are of its prompt, int64 [B]; they come first.
    `requests`: the table of RoutingTrace.requests()."""
    prompt_B, first_B, tokens_B = (
        integers(requests.column(name)).astype(np.int64)
        for name in ("num_prompt_tokens", "first_position", "num_tokens")
    )
    return np.clip(prompt_B - first_B, 0, tokens_B)


def split_requests(
    traces: Sequence[RoutingTrace], *, holdout: float, holdout_domains: list[str], seed: int
) -> list[np.ndarray]:
    """Held-out requests over all traces together, bool [B] per trace (see `holdout_requests`); the
    same ones whichever phase is looked at.

    Raises InputError where a request is in two of the traces: it would be learned from and scored
    on.
    """
    tables = [whole_of(trace).requests() for trace in traces]
    keys = np.concatenate([request_keys(table) for table in tables])
    if repeated := len(keys) - len(np.unique(keys)):
        raise InputError(f"{repeated} requests are in more than one of the traces: give each request once")
    held_out_B = holdout_requests(pa.concat_tables(tables), holdout=holdout, holdout_domains=holdout_domains, seed=seed)
    parts = np.split(held_out_B, np.cumsum([t.num_rows for t in tables])[:-1])
    return [
        part_B[trace.of_phase_B] if isinstance(trace, PhaseTrace) else part_B
        for trace, part_B in zip(traces, parts, strict=True)
    ]


class PhaseTrace(RoutingTrace):
    """The tokens of one phase of a trace; requests without any are left out.

    Fields:
        whole: the trace behind it.
        phase: "prompt" or "generated".
        with_prompts: batches of generated tokens bring their prompts' rows apart (`prompts_apart`).

    A request keeps its identity (`request_keys`): what was learned from its prompt counts as seen
    where its answer is scored. Source: profiles/split.py.
    """

    def __init__(self, whole: RoutingTrace, phase: str, *, with_prompts: bool = False) -> None:
        super().__init__(whole.path, whole.info, whole.facts, whole._filesystem)
        self.whole, self.phase, self.unchecked = whole, phase, whole.unchecked
        self.with_prompts = with_prompts and phase == "generated"

    @cached_property
    def _requests(self) -> tuple[pa.Table, np.ndarray]:
        """Requests with tokens of the phase, and which of all they are, bool [all requests]."""
        table = self.whole.requests()
        prompt_B = prompt_rows_B(table)
        stored_B = integers(table.column("num_tokens")).astype(np.int64)
        first_B = integers(table.column("first_position")).astype(np.int64)
        rows_B = prompt_B if self.phase == "prompt" else stored_B - prompt_B
        if self.phase == "generated":
            first_B = first_B + prompt_B
        for name, values_B in (("num_tokens", rows_B), ("first_position", first_B)):
            column = pa.array(values_B.astype(np.int32))
            table = table.set_column(table.schema.get_field_index(name), name, column)
        table = table.append_column("stored_tokens", pa.array(stored_B.astype(np.int32)))
        return table.filter(pa.array(rows_B > 0)), rows_B > 0

    @property
    def of_phase_B(self) -> np.ndarray:
        """Which requests of the whole trace have tokens of the phase, bool [all requests]."""
        return self._requests[1]

    @property
    def num_requests(self) -> int:
        return self._requests[0].num_rows

    @property
    def num_tokens(self) -> int:
        return int(integers(self._requests[0].column("num_tokens")).sum())

    @property
    def fingerprint(self) -> str:
        """Hash of the routing and the phase."""
        return hashlib.sha256(f"{self.whole.fingerprint} {self.phase}".encode()).hexdigest()[:16]

    def requests(self) -> pa.Table:
        """As of a whole trace, with the rows of the phase as num_tokens and those of both as
        stored_tokens."""
        return self._requests[0]

    def batches(self, keep_B: np.ndarray | None = None) -> Iterator[TraceBatch]:
        """Batches of the requests of `keep_B`, with their rows of the phase."""
        chosen_B = self.of_phase_B.copy()
        if keep_B is not None:
            chosen_B[chosen_B] = keep_B
        for batch in self.whole.batches(chosen_B):
            mine = rows_of(batch, batch.is_prompt_T == (self.phase == "prompt"))
            apart = rows_of(batch, batch.is_prompt_T) if self.with_prompts else None
            yield replace(mine, prompts_apart=apart)
