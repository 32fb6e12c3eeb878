"""The online half of Attention-TP: the rank of every token at every layer, from what is known before the layer's router runs.

Keeps, for the batch that is running, the experts chosen so far, and for every running request the id and experts of its last token, which
predict its next one (solvers/context.py). Slices are equal: solvers/assign.py settles the overflow.

Shape letters: T tokens of the batch, L MoE layers, K top-k, E experts, R ranks, B requests.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from profiles.errors import InputError
from runtime.shuffle import contiguous_homes
from solvers.assign import assign_equal_slices
from solvers.context import context_scores_TR
from solvers.placement import Placement
from solvers.plan import Plan
from solvers.position import position_ids_TC
from solvers.schedule import Schedule
from solvers.sequence_table import needed_rank_T, paper_scores_TR
from solvers.token_table import Lookup

UNKNOWN = -(1 << 40)  # position of a token whose request began elsewhere
PREDICT = ("context", "table", "paper", "none")


class LastToken(NamedTuple):
    """What is kept of a running request between batches."""

    token_id: int
    experts_LK: np.ndarray
    position: int
    num_prompt_tokens: int


@dataclass(eq=False)
class TokenHomes:
    """Predicts homes for one batch at a time: `begin`, then per layer `home_T` and `record`, then `finish`."""

    predict: str
    schedule: Schedule | None  # None only for "none": equal consecutive slices
    placement: Placement
    top_k: int
    logical_LP: np.ndarray | None = None  # int [L, E]: the model's expert for each id of a relabelled checkpoint
    memory: dict[int, LastToken] = field(default_factory=dict)  # by request

    def begin(self, token_ids_T: np.ndarray, request_T: np.ndarray, *, is_prompt: bool) -> None:
        """Start a batch: the ids of its tokens and the request of each; a request's tokens are consecutive, a prompt is whole."""
        num_layers, empty = self.placement.num_layers, self.placement.num_experts
        self._ids_T, self._request_T = token_ids_T, request_T
        self._is_prompt_T = np.full(len(token_ids_T), is_prompt)
        self._chosen_TLK = np.full((len(token_ids_T), num_layers, self.top_k), empty, np.int16)
        self._previous_TLK = self._chosen_TLK.copy()
        previous_ids_T = np.full(len(token_ids_T), -1, np.int64)
        self._first_T = np.ones(len(token_ids_T), bool)
        self._first_T[1:] = request_T[1:] != request_T[:-1]
        previous_ids_T[~self._first_T] = token_ids_T[np.flatnonzero(~self._first_T) - 1]
        first = np.flatnonzero(self._first_T)
        count = np.diff(np.append(first, len(token_ids_T)))
        start, num_prompt_tokens = np.zeros(len(first), np.int64), count if is_prompt else np.zeros_like(count)
        for i, token in enumerate(first.tolist()):
            if known := self.memory.get(int(request_T[token])):
                previous_ids_T[token], self._previous_TLK[token] = known.token_id, known.experts_LK
                start[i], num_prompt_tokens[i] = known.position + 1, known.num_prompt_tokens
            elif not is_prompt:
                start[i] = UNKNOWN
        self._position_T = np.arange(len(token_ids_T)) + np.repeat(start - first, count)
        self._num_prompt_tokens_T = np.repeat(num_prompt_tokens, count)
        self._position_ids_TC = position_ids_TC(self._position_T, self._num_prompt_tokens_T)
        self._lookup: Lookup | None = None
        if self.schedule is not None:
            self._lookup = self.schedule.token.lookup(token_ids_T, previous_ids_T)

    def home_T(self, layer: int | None) -> np.ndarray:
        """Rank of every token at MoE layer `layer`, int64 [T], in equal slices; None: a layer without experts."""
        if layer is None or self.predict == "none":
            return contiguous_homes(len(self._ids_T), self.placement.num_ranks)
        return assign_equal_slices(self._scores_TR(layer))

    def _scores_TR(self, layer: int) -> np.ndarray:
        schedule, lookup = self.schedule, self._lookup
        assert schedule is not None and lookup is not None, "only predict='none' goes without a schedule"
        if self.predict == "table":
            return schedule.token.scores_TR(layer, lookup)
        if self.predict == "context":
            shares_TR = schedule.token.shares_TR(layer, lookup)
            return context_scores_TR(
                schedule.context,
                layer,
                shares_TR,
                self._chosen_TLK,
                self._previous_TLK,
                self._is_prompt_T,
                self._position_ids_TC,
            )
        # The paper's table knows ids only, not what they follow.
        shares_TR = schedule.token.own.shares_TR(layer, lookup.row_T, schedule.token.rare_LR[layer])
        hosts_LER, sequence = self.placement.hosts_LER, schedule.sequence
        rank_T, confidence_T = np.zeros(len(shares_TR), np.int64), np.full(len(shares_TR), -1.0)
        if layer >= 2:
            last_T, before_T = (needed_rank_T(self._chosen_TLK[:, i], hosts_LER[i]) for i in (layer - 1, layer - 2))
            rank_T = sequence.rank_LRR[layer, last_T, before_T].astype(np.int64)
            confidence_T = sequence.confidence_LRR[layer, last_T, before_T].astype(np.float64)
        return paper_scores_TR(shares_TR, lookup.row_T >= 0, rank_T, confidence_T)

    def record(self, layer: int, chosen_TK: np.ndarray) -> None:
        """The experts that all tokens chose at a layer, in the checkpoint's numbers."""
        if self.logical_LP is not None:
            chosen_TK = self.logical_LP[layer][chosen_TK]
        self._chosen_TLK[:, layer] = chosen_TK
        # A prompt token's predecessor runs in the same batch: later layers may read it.
        inside = np.flatnonzero(~self._first_T)
        self._previous_TLK[inside, layer] = chosen_TK[inside - 1]

    def finish(self) -> None:
        """Remember the last token of every request of the batch."""
        last_T = np.append(self._first_T[1:], True)
        for token in np.flatnonzero(last_T).tolist():
            self.memory[int(self._request_T[token])] = LastToken(
                int(self._ids_T[token]),
                self._chosen_TLK[token].copy(),
                int(self._position_T[token]),
                int(self._num_prompt_tokens_T[token]),
            )

    def forget(self, requests: list[int]) -> None:
        """Finished requests."""
        for request in requests:
            self.memory.pop(request, None)


def make_homes(predict: str, plan: Plan, *, relabelled: bool) -> TokenHomes:
    """Homes by a plan's tables. Raises InputError for a choice that they do not allow. `relabelled`: the checkpoint is a permuted one."""
    if predict not in PREDICT:
        raise InputError(f"--predict {predict}: expected one of {', '.join(PREDICT)}")
    schedule = Schedule.from_tables(plan.tables)
    if predict != "none" and schedule is None:
        raise InputError(
            f"--predict {predict}: the plan holds no schedule; --predict none gives equal consecutive slices"
        )
    if predict in ("table", "paper") and schedule is not None and not schedule.has_token_ids:
        raise InputError(f"--predict {predict}: the plan's trace had no token ids; use --predict context")
    logical_LP = plan.placement.physical_to_logical_LP if relabelled else None
    return TokenHomes(predict, None if predict == "none" else schedule, plan.placement, plan.model.top_k, logical_LP)
