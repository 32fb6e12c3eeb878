"""Homes of tokens under each schedule, as the runtime would choose them: the rows of a report.

Only what is known at that moment is read: a DP home from the prompt, a TP home at layer l from
earlier layers. The oracles, which read the answer, bound what any predictor could reach under the
same capacities. Attention-TP: the rows of a trace are mixed over requests into batches of at most
`batch_tokens`, and every rank gets an equal slice of each. A predictor that goes on learning scores
every token by weights that saw earlier requests only; slices are then cut in the same batches, so
that rows compare. Attention-DP: requests arrive in a random order and are assigned as `semmoe run`
assigns its prompts (solvers/schedule/windows.py). How long an answer will get is not known: a
request counts as its prompt and as many tokens as the longest answer of the trace has.

Shape letters: T tokens, B requests, Q tokens of prompts, L MoE layers, K top-k, E experts, R ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from semmoe.profiles.errors import InputError
from semmoe.profiles.sample import rows_of, select_requests
from semmoe.profiles.trace import TraceBatch
from semmoe.solvers.placement import Placement
from semmoe.solvers.schedule.context import context_scores_TR
from semmoe.solvers.schedule.features import Places, Seen
from semmoe.solvers.schedule.learning import learned_depth, learned_scores_TR, request_groups
from semmoe.solvers.schedule.paper_table import needed_rank_T, paper_scores_TR, served_TR
from semmoe.solvers.schedule.request_scorer import request_shares_BR
from semmoe.solvers.schedule.schedule import Schedule
from semmoe.solvers.schedule.slices import assign_equal_slices
from semmoe.solvers.schedule.token_table import Lookup, previous_token_ids_T
from semmoe.solvers.schedule.windows import (
    WINDOW,
    assign_masked_round_robin,
    assign_prompts,
    assign_requests,
    assign_round_robin,
    request_tokens_B,
    window_imbalance,
)


@dataclass(frozen=True)
class Setting:
    """How schedules are simulated.

    Fields:
        batch_tokens: tokens of a batch (Attention-TP).
        window: requests that are weighed against each other (Attention-DP).
        seed: of the order of requests, and of the bootstrap.
        score_from: also score requests by routing that is known when they reach a decode pool: a
            key of SIGNATURES; "": not.

    Source: solvers/schedule/simulate.py; docs/method.md.
    """

    batch_tokens: int = 512
    window: int = WINDOW
    seed: int = 0
    score_from: str = ""

    def sizes(self) -> dict[str, int]:
        """What `simulate` takes of it."""
        return {"batch_tokens": self.batch_tokens, "window": self.window, "seed": self.seed}


class Simulation(NamedTuple):
    homes_TL: np.ndarray  # int16 [T, L]
    token_imbalance: float  # busiest rank over mean, averaged over batches (TP) or windows (DP)


MOST_CELLS = 2**26  # of tokens by layers by ranks that Attention-TP is simulated on: 144,000 tokens of 58 layers at 8
AS_SERVED = "as-served"  # of a trace that a server wrote: where requests ran
LayerScores = Callable[[int], np.ndarray]  # layer -> float [T, R]


def available_schedules(schedule: Schedule) -> list[str]:
    """Names of SCHEDULES that the schedule's tables allow, in order of a report."""
    needs = {
        "dp-scorer": schedule.has_requests,
        "dp-paper": schedule.has_requests and schedule.has_token_ids,
        "tp-table": schedule.has_token_ids,
        "tp-paper": schedule.has_token_ids,
    }
    return [name for name in SCHEDULES if needs.get(name, True)]


def simulate(
    name: str, batch: TraceBatch, placement: Placement, schedule: Schedule, *, batch_tokens: int, window: int, seed: int
) -> Simulation:
    """Homes of the batch's tokens under a schedule.

    Parameters:
        name: one of SCHEDULES, or of SIGNATURES behind "dp-"
        batch: requests with T rows in all
        placement: experts of L layers on R ranks
        schedule: the tables that `name` reads, fitted for the placement
        batch_tokens: tokens of a batch over all ranks, at most (TP)
        window: requests that are weighed against each other, at most (DP)
        seed: of the order in which rows are mixed, or requests arrive

    Returns:
        homes_TL: int16 [T, L]
        token_imbalance: tokens of the busiest rank over the mean, averaged over batches or windows

    Raises:
        InputError: for another name, or sizes under 1
    """
    if name.removeprefix("dp-") in SIGNATURES:
        return _homes_by_signature(name.removeprefix("dp-"), batch, placement, window, np.random.default_rng(seed))
    if name not in SCHEDULES:
        raise InputError(f"schedule {name!r} is none of {', '.join(SCHEDULES)}")
    _check_sizes(batch_tokens, window)
    rng = np.random.default_rng(seed)
    if name in DP_SCHEDULES:
        return _homes_by_request(DP_SCHEDULES[name], batch, placement, schedule, window, rng)
    scores = TP_SCHEDULES[name](batch, placement, schedule, rng)
    return _homes_by_token(scores, batch.num_tokens, placement, batch_tokens, rng)


def simulate_rows(
    name: str, batch: TraceBatch, placement: Placement, schedule: Schedule, setting: Setting, rows: np.ndarray
) -> Simulation:
    """Homes of some rows (ascending int64) under an Attention-TP schedule, as if no others ran:
    int16 [rows, L]. Other arguments as of `simulate`."""
    _check_sizes(setting.batch_tokens, setting.window)
    rng = np.random.default_rng(setting.seed)
    scores = TP_SCHEDULES[name](batch, placement, schedule, rng, rows)
    return _homes_by_token(scores, len(rows), placement, setting.batch_tokens, rng)


def _check_sizes(batch_tokens: int, window: int) -> None:
    if batch_tokens < 1 or window < 1:
        raise InputError(f"{batch_tokens} tokens a batch, {window} requests a window: both must be at least 1")


def most_that_run(placement: Placement) -> int:
    """Tokens that Attention-TP is simulated on, at most."""
    return max(MOST_CELLS // (placement.num_layers * placement.num_ranks), 1)


def rows_that_run(name: str, batch: TraceBatch, placement: Placement, seed: int) -> np.ndarray | None:
    """Rows that a simulation of an Attention-TP schedule looks at, ascending int64: a random choice
    over all requests where all would be more than MOST_CELLS; None for all.

    What a token pays there depends on its own scores and on a batch of others, mixed over requests,
    so fewer batches measure the same.
    """
    most = most_that_run(placement)
    if name not in TP_SCHEDULES or batch.num_tokens <= most:
        return None
    return np.sort(np.random.default_rng([seed, 19]).choice(batch.num_tokens, most, replace=False))


def _homes_by_token(
    scores: LayerScores, num_tokens: int, placement: Placement, batch_tokens: int, rng: np.random.Generator
) -> Simulation:
    """Equal slices of batches mixed over requests, at every layer by the scores of that layer."""
    num_ranks = placement.num_ranks
    homes_TL = np.zeros((num_tokens, placement.num_layers), np.int16)
    order = rng.permutation(num_tokens)
    batches = np.array_split(order, max(1, -(-num_tokens // batch_tokens)))
    imbalance = []
    for layer in range(placement.num_layers):
        scores_TR = scores(layer)
        for rows in batches:
            rank_of_T = assign_equal_slices(scores_TR[rows])
            homes_TL[rows, layer] = rank_of_T
            imbalance.append(np.bincount(rank_of_T, minlength=num_ranks).max() * num_ranks / max(len(rows), 1))
    return Simulation(homes_TL, float(np.mean(imbalance)) if imbalance else 1.0)


class Arrivals(NamedTuple):
    """Requests of a batch in order of arrival."""

    batch: TraceBatch
    request_of_B: np.ndarray  # int64: number of the request in the batch
    window: int

    @property
    def prompts(self) -> list[np.ndarray]:
        return [self.batch.prompt(request) for request in self.request_of_B]

    @property
    def tokens_B(self) -> np.ndarray:
        """What each counts as, int64 [B]: the runtime's rule, with the longest answer as the
        budget."""
        batch = self.batch
        answered_B = batch.first_position_B + np.diff(batch.starts_B1) - batch.num_prompt_tokens_B
        tokens_B = request_tokens_B(batch.num_prompt_tokens_B, 1 + max(answered_B.max(initial=0), 0))
        return tokens_B[self.request_of_B]


RequestRanks = Callable[[Arrivals, Placement, Schedule], np.ndarray]  # -> int [B], in order of arrival


def _homes_by_request(
    rank_requests: RequestRanks,
    batch: TraceBatch,
    placement: Placement,
    schedule: Schedule,
    window: int,
    rng: np.random.Generator,
) -> Simulation:
    """One home per request, of requests that arrive in a random order."""
    arrivals = Arrivals(batch, rng.permutation(batch.num_requests), window)
    rank_of_arrival = rank_requests(arrivals, placement, schedule)
    rank_of_B = np.empty(batch.num_requests, np.int16)
    rank_of_B[arrivals.request_of_B] = rank_of_arrival
    rows_B = np.diff(batch.starts_B1)
    homes_TL = np.broadcast_to(np.repeat(rank_of_B, rows_B)[:, None], (batch.num_tokens, placement.num_layers))
    rows_of_arrival = rows_B[arrivals.request_of_B]
    return Simulation(homes_TL, window_imbalance(rank_of_arrival, rows_of_arrival, placement.num_ranks, window=window))


def served_homes(batch: TraceBatch, num_ranks: int, *, window: int) -> tuple[TraceBatch, np.ndarray, Simulation]:
    """What a server did: the requests whose rank is known, which those are (bool [B]), and their
    homes; imbalance over windows in stored order. Raises InputError for ranks that the placement
    does not have."""
    rank_of_B = np.full(batch.num_requests, -1) if batch.rank_of_B is None else batch.rank_of_B
    if rank_of_B.max(initial=-1) >= num_ranks:
        raise InputError(f"the trace was served on rank {rank_of_B.max()}, the plan has ranks 0..{num_ranks - 1}")
    known_B = rank_of_B >= 0
    batch, rank_of_B = select_requests(batch, known_B), rank_of_B[known_B]
    rows_B = np.diff(batch.starts_B1)
    homes_TL = np.broadcast_to(
        np.repeat(rank_of_B.astype(np.int16), rows_B)[:, None], (batch.num_tokens, batch.expert_ids_TLK.shape[1])
    )
    return batch, known_B, Simulation(homes_TL, window_imbalance(rank_of_B, rows_B, num_ranks, window=window))


def _random_scores(
    batch: TraceBatch,
    placement: Placement,
    schedule: Schedule,
    rng: np.random.Generator,
    rows: np.ndarray | None = None,
) -> LayerScores:
    num_tokens = batch.num_tokens if rows is None else len(rows)
    return lambda layer: rng.random((num_tokens, placement.num_ranks), np.float32)


def _table_scores(
    batch: TraceBatch,
    placement: Placement,
    schedule: Schedule,
    rng: np.random.Generator,
    rows: np.ndarray | None = None,
) -> LayerScores:
    lookup = _lookup(batch, schedule, rows)
    return lambda layer: schedule.token.scores_TR(layer, lookup)


def _lookup(batch: TraceBatch, schedule: Schedule, rows: np.ndarray | None) -> Lookup:
    chosen = slice(None) if rows is None else rows
    return schedule.token.lookup(batch.token_ids_T[chosen], previous_token_ids_T(batch)[chosen])


def _paper_scores(
    batch: TraceBatch,
    placement: Placement,
    schedule: Schedule,
    rng: np.random.Generator,
    rows: np.ndarray | None = None,
) -> LayerScores:
    # The paper's table knows ids only, not what they follow.
    chosen = slice(None) if rows is None else rows
    row_T = schedule.token.own.index(batch.token_ids_T[chosen])
    sequence, hosts_LER = schedule.sequence, placement.hosts_LER

    def scores(layer: int) -> np.ndarray:
        shares_TR = schedule.token.own.shares_TR(layer, row_T, schedule.token.rare_LR[layer])
        rank_T, confidence_T = np.zeros(len(row_T), np.int64), np.full(len(row_T), -1.0)
        if layer >= 2:
            last_T, before_T = (
                needed_rank_T(batch.expert_ids_TLK[:, i][chosen], hosts_LER[i]) for i in (layer - 1, layer - 2)
            )
            rank_T = sequence.rank_LRR[layer, last_T, before_T].astype(np.int64)
            confidence_T = sequence.confidence_LRR[layer, last_T, before_T].astype(np.float64)
        return paper_scores_TR(shares_TR, row_T >= 0, rank_T, confidence_T)

    return scores


def _context_scores(
    batch: TraceBatch,
    placement: Placement,
    schedule: Schedule,
    rng: np.random.Generator,
    rows: np.ndarray | None = None,
) -> LayerScores:
    return _predicted_scores(_lookup(batch, schedule, rows), schedule, Seen.of(batch, placement.num_experts, rows))


def _predicted_scores(lookup: Lookup, schedule: Schedule, seen: Seen) -> LayerScores:
    return lambda layer: context_scores_TR(schedule.context, layer, schedule.token.shares_TR(layer, lookup), seen)


def _learning_scores(
    batch: TraceBatch,
    placement: Placement,
    schedule: Schedule,
    rng: np.random.Generator,
    rows: np.ndarray | None = None,
) -> LayerScores:
    seen, num_experts = Seen.of(batch, placement.num_experts, rows), placement.num_experts
    running = batch if rows is None else rows_of(batch, np.isin(np.arange(batch.num_tokens), rows))
    groups = request_groups(running, rng)
    plan_scores = _predicted_scores(_lookup(batch, schedule, rows), schedule, seen)
    learned = Places(learned_depth(schedule.context.depth, num_experts), num_experts)
    return lambda layer: learned_scores_TR(
        plan_scores(layer),
        learned.ids_TX(layer, seen),
        served_TR(running.expert_ids_TLK[:, layer], placement.hosts_LER[layer]),
        learned.num_features,
        groups,
    )


def _oracle_scores(
    batch: TraceBatch,
    placement: Placement,
    schedule: Schedule,
    rng: np.random.Generator,
    rows: np.ndarray | None = None,
) -> LayerScores:
    chosen = slice(None) if rows is None else rows
    return lambda layer: served_TR(batch.expert_ids_TLK[:, layer][chosen], placement.hosts_LER[layer])


def _round_robin_ranks(arrivals: Arrivals, placement: Placement, schedule: Schedule) -> np.ndarray:
    return assign_round_robin(len(arrivals.request_of_B), placement.num_ranks)


def _scorer_ranks(arrivals: Arrivals, placement: Placement, schedule: Schedule) -> np.ndarray:
    return assign_prompts(schedule.request, arrivals.prompts, arrivals.tokens_B, window=arrivals.window)


def _paper_ranks(arrivals: Arrivals, placement: Placement, schedule: Schedule) -> np.ndarray:
    token, prompts = schedule.token, arrivals.prompts
    request_Q = np.repeat(np.arange(len(prompts)), [len(prompt) for prompt in prompts])
    row_Q = token.own.index(np.concatenate(prompts)) if prompts else np.zeros(0, np.int64)
    request_Q, row_Q = request_Q[row_Q >= 0], row_Q[row_Q >= 0]
    scores_BR = np.zeros((len(prompts), placement.num_ranks))
    known_B, starts = np.unique(request_Q, return_index=True)
    for layer in range(placement.num_layers if len(starts) else 0):
        shares_QR = token.own.shares_TR(layer, row_Q, token.rare_LR[layer])
        scores_BR[known_B] += np.add.reduceat(shares_QR, starts, axis=0, dtype=np.float64)
    return assign_masked_round_robin(scores_BR)


def _oracle_ranks(arrivals: Arrivals, placement: Placement, schedule: Schedule) -> np.ndarray:
    scores_BR = request_shares_BR(arrivals.batch, placement.hosts_LER)[arrivals.request_of_B]
    return assign_requests(scores_BR, arrivals.tokens_B, window=arrivals.window)


def _homes_by_signature(
    source: str, batch: TraceBatch, placement: Placement, window: int, rng: np.random.Generator
) -> Simulation:
    """One home per request by where its signature's experts are; the rows that the signature is
    made of, and those before them, live where requests in turn do."""
    known = SIGNATURES[source](batch)
    arrivals = Arrivals(batch, rng.permutation(batch.num_requests), window)
    scores_BR = request_shares_BR(known.signature, placement.hosts_LER)[arrivals.request_of_B]
    rank_of_B, before_B = np.empty(batch.num_requests, np.int16), np.empty(batch.num_requests, np.int16)
    rank_of_arrival = assign_requests(scores_BR, arrivals.tokens_B, window=window)
    rank_of_B[arrivals.request_of_B] = rank_of_arrival
    before_B[arrivals.request_of_B] = assign_round_robin(batch.num_requests, placement.num_ranks)
    request_T = batch.request_of_T
    home_T = np.where(known.is_known_T, before_B[request_T], rank_of_B[request_T])
    homes_TL = np.broadcast_to(home_T[:, None], (batch.num_tokens, placement.num_layers))
    rows_of_arrival = np.diff(batch.starts_B1)[arrivals.request_of_B]
    return Simulation(homes_TL, window_imbalance(rank_of_arrival, rows_of_arrival, placement.num_ranks, window=window))


class Signature(NamedTuple):
    """What is known of requests when a decode pool must choose: rows of the same requests, in their
    order, and which rows of the batch are no later than these, bool [T]."""

    signature: TraceBatch
    is_known_T: np.ndarray


def _prompt_signature(batch: TraceBatch) -> Signature:
    """The experts of the prompt's tokens, as prefill recorded them."""
    source = batch if batch.prompts_apart is None else batch.prompts_apart
    return Signature(rows_of(source, source.is_prompt_T), batch.is_prompt_T)


def _first_signature(batch: TraceBatch) -> Signature:
    """The experts of the first FIRST_TOKENS generated tokens."""
    request_T = batch.request_of_T
    position_T = np.arange(batch.num_tokens) - batch.starts_B1[request_T] + batch.first_position_B[request_T]
    answered_T = position_T - batch.num_prompt_tokens_B[request_T]
    first_T = (answered_T >= 0) & (answered_T < FIRST_TOKENS)
    return Signature(rows_of(batch, first_T), answered_T < FIRST_TOKENS)


FIRST_TOKENS = 16  # generated tokens that a signature is made of
SIGNATURES: dict[str, Callable[[TraceBatch], Signature]] = {
    "prompt": _prompt_signature,
    "first-tokens": _first_signature,
}
DP_SCHEDULES: dict[str, RequestRanks] = {
    "dp-roundrobin": _round_robin_ranks,
    "dp-paper": _paper_ranks,
    "dp-scorer": _scorer_ranks,
    "dp-oracle": _oracle_ranks,
}
TP_SCHEDULES: dict[str, Callable[..., LayerScores]] = {  # (batch, placement, schedule, rng, rows or all)
    "random": _random_scores,
    "tp-table": _table_scores,
    "tp-paper": _paper_scores,
    "tp-context": _context_scores,
    "tp-learning": _learning_scores,
    "tp-oracle": _oracle_scores,
}
SCHEDULES = ("random", *DP_SCHEDULES, *(name for name in TP_SCHEDULES if name != "random"))
