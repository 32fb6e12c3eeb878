"""Which rank serves which request (Attention-DP): decided before prefill, kept for decode, where
the keys and values are.

`none` deals requests out in turn, `dp` asks the plan's request scorer: by the rule that reports
simulate (solvers/schedule/windows.py), with prompts in order of their arrival.

Shape letters: B requests, R ranks.
"""

from collections.abc import Sequence

import numpy as np

from semmoe.profiles.errors import InputError
from semmoe.solvers.plan import Plan
from semmoe.solvers.schedule.windows import WINDOW, assign_prompts, assign_round_robin, request_tokens_B

SCHEDULERS = ("none", "dp", "tp")


def assign(
    scheduler: str, prompts: Sequence[np.ndarray], plan: Plan, *, max_new_tokens: int, window: int = WINDOW
) -> np.ndarray:
    """Rank of each request under "none" or "dp", int64 [B]; with "tp" every rank serves every
    request. Raises InputError for another name, and under "dp" for a plan without a request
    scorer."""
    if scheduler == "none":
        return assign_round_robin(len(prompts), plan.topology.num_ranks)
    if scheduler != "dp":
        raise InputError(f"--scheduler {scheduler}: expected one of {', '.join(SCHEDULERS)}")
    if (scorer := plan.request_scorer) is None:
        raise InputError(
            "--scheduler dp: this plan scores no requests (its trace had no token ids, or it was made without a schedule); "
            "use --scheduler none, or make the plan from a trace with token ids"
        )
    tokens_B = request_tokens_B(np.array([len(prompt) for prompt in prompts], np.int64), max_new_tokens)
    return assign_prompts(scorer, prompts, tokens_B, window=window)
