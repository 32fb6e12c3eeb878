"""Which rank serves which request (Attention-DP): decided before prefill, kept for decode, where
the keys and values are.

`none` deals requests out in turn. `dp` asks the plan's request scorer, window by window, under a
cap on tokens per rank (solvers/schedule/slices.py); a request counts as its prompt and the most it
may generate.

Shape letters: B requests, R ranks.
"""

from collections.abc import Sequence

import numpy as np

from semmoe.profiles.errors import InputError
from semmoe.solvers.plan import Plan
from semmoe.solvers.schedule.schedule import Schedule
from semmoe.solvers.schedule.slices import WINDOW, assign_requests

SCHEDULERS = ("none", "dp", "tp")


def assign_round_robin(num_requests: int, num_ranks: int) -> np.ndarray:
    """Request b goes to rank b mod R, int64 [B]."""
    return np.arange(num_requests) % num_ranks


def assign_by_scorer(prompts: Sequence[np.ndarray], plan: Plan, *, max_new_tokens: int) -> np.ndarray:
    """Rank of each request, int64 [B]. Raises InputError for a plan without a request scorer."""
    schedule = Schedule.from_tables(plan.tables)
    if schedule is None or not schedule.has_requests:
        raise InputError(
            "--scheduler dp: this plan scores no requests (its trace had no token ids, or it was made without a schedule); "
            "use --scheduler none, or make the plan from a trace with token ids"
        )
    scores_BR = schedule.request.scores_BR(prompts)
    tokens_B = np.array([len(prompt) + max_new_tokens for prompt in prompts], np.int64)
    rank_of_B = np.zeros(len(prompts), np.int64)
    load_R = np.zeros(plan.topology.num_ranks)
    for begin in range(0, len(prompts), WINDOW):
        window = slice(begin, begin + WINDOW)
        rank_of_B[window] = assign_requests(scores_BR[window], tokens_B[window], load_R=load_R)
        load_R += np.bincount(rank_of_B[window], tokens_B[window], len(load_R))
    return rank_of_B


def assign(scheduler: str, prompts: Sequence[np.ndarray], plan: Plan, *, max_new_tokens: int) -> np.ndarray:
    """Rank of each request under "none" or "dp"; with "tp" every rank serves every request.
    Raises InputError for another name."""
    if scheduler == "dp":
        return assign_by_scorer(prompts, plan, max_new_tokens=max_new_tokens)
    if scheduler == "none":
        return assign_round_robin(len(prompts), plan.topology.num_ranks)
    raise InputError(f"--scheduler {scheduler}: expected one of {', '.join(SCHEDULERS)}")
