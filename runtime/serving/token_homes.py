"""The online half of Attention-TP: the rank of every token at every layer, from what is known
before the layer's router runs.

Keeps, for the batch that is running, the experts chosen so far, and for every running request the
id and experts of its last token, which predict its next one (solvers/schedule/context.py). Slices
are equal: runtime/serving/equal_slices.py settles the overflow.

All of it stays on the model's device: a batch's ids and positions are looked up on the host and
copied once, in `begin`; between the layers nothing is read back, and no shape depends on a value.
Cost per layer: that of solvers/schedule/context.py with weights in float32, and of
solvers/schedule/slices.py; about 230 small kernels, 144 of them the sweeps of the prices.

Shape letters: T tokens of the batch, L MoE layers, K top-k, E experts, R ranks, B requests.
"""

from typing import NamedTuple

import numpy as np
import torch

from semmoe.profiles.errors import InputError
from semmoe.runtime.ranks.group import Group
from semmoe.runtime.serving.equal_slices import Slices, contiguous_slices, equal_slices
from semmoe.runtime.serving.home_tables import Chosen, HomeTables, put
from semmoe.runtime.serving.weight_learner import WeightLearner
from semmoe.solvers.placement import Placement
from semmoe.solvers.plan import Plan
from semmoe.solvers.schedule.features import position_ids_TC
from semmoe.solvers.schedule.schedule import Schedule

UNKNOWN = -(1 << 40)  # position of a token whose request began elsewhere
PREDICT = ("context", "learning", "table", "paper", "none")


class LastToken(NamedTuple):
    """What is kept of a running request between batches."""

    token_id: int
    experts_LK: torch.Tensor
    position: int
    num_prompt_tokens: int


class TokenHomes:
    """Predicts slices for one batch at a time: `begin`, then per layer `slices` and `record`, then
    `finish`.

    Where weights learn, all ranks call `finish` together.
    """

    def __init__(
        self,
        predict: str,
        schedule: Schedule | None,  # None only for "none": equal consecutive slices
        placement: Placement,
        top_k: int,
        *,
        logical_LP: np.ndarray | None = None,  # int [L, E]: the model's expert for each id of a relabelled checkpoint
        group: Group | None = None,  # only for "learning", which all its ranks do together
        device: torch.device,
    ) -> None:
        self._predict, self._placement, self._top_k, self._device = predict, placement, top_k, device
        self._tables = None if schedule is None else HomeTables.of(schedule, placement, top_k, device)
        self._learner: WeightLearner | None = None
        if predict == "learning":
            assert self._tables is not None and group is not None, (
                "weights to start from, and the ranks that share them"
            )
            self._learner = WeightLearner(self._tables, group)
        self._logical_LP: torch.Tensor | None = None
        if logical_LP is not None:  # an empty slot stays one
            padded_LP = np.pad(logical_LP, ((0, 0), (0, 1)), constant_values=placement.num_experts)
            self._logical_LP = put(padded_LP.astype(np.int32), device)
        self.memory: dict[int, LastToken] = {}  # by request

    def begin(self, token_ids_T: np.ndarray, request_T: np.ndarray, *, is_prompt: bool) -> None:
        """Start a batch: the ids of its tokens and the request of each; a request's tokens are
        consecutive, a prompt is whole."""
        num_tokens = len(token_ids_T)
        self._plain = contiguous_slices(num_tokens, self._placement.num_ranks, self._device)
        if self._tables is None:
            return
        if self._learner is not None:
            self._learner.begin()
        # 1. On the host: where requests begin, and what is known of each.
        first_T = np.append(True, request_T[1:] != request_T[:-1])[:num_tokens]
        first_B = np.flatnonzero(first_T)
        count_B = np.diff(np.append(first_B, num_tokens))
        start_B, num_prompt_tokens_B = np.zeros_like(count_B), count_B if is_prompt else np.zeros_like(count_B)
        previous_ids_T = np.append(-1, token_ids_T[:-1])[:num_tokens]
        previous_ids_T[first_B] = -1
        found_B, experts_B = [], []
        for i, token in enumerate(first_B.tolist()):
            if known := self.memory.get(int(request_T[token])):
                previous_ids_T[token] = known.token_id
                start_B[i], num_prompt_tokens_B[i] = known.position + 1, known.num_prompt_tokens
                found_B.append(token)
                experts_B.append(known.experts_LK)
            elif not is_prompt:
                start_B[i] = UNKNOWN
        position_T = np.arange(num_tokens) + np.repeat(start_B - first_B, count_B)
        self._position_ids_TC = position_ids_TC(position_T, np.repeat(num_prompt_tokens_B, count_B))
        # 2. What `finish` keeps of every request.
        last_B = first_B + count_B - 1
        self._last_B, self._num_tokens = put(last_B, self._device), num_tokens
        self._kept_B = [
            (int(request_T[token]), int(token_ids_T[token]), int(position_T[token]), int(num_prompt_tokens))
            for token, num_prompt_tokens in zip(last_B.tolist(), num_prompt_tokens_B.tolist(), strict=True)
        ]
        # 3. On the device: rows of the tables, and the experts chosen so far.
        self._is_prompt, self._has_followers = is_prompt, len(first_B) < num_tokens
        self._known = self._tables.known(token_ids_T, previous_ids_T, self._position_ids_TC)
        self._first_T1 = put(first_T[:, None], self._device)
        num_layers, empty = self._placement.num_layers, self._placement.num_experts
        own_TLK = torch.full((num_tokens, num_layers, self._top_k), empty, dtype=torch.int32, device=self._device)
        previous_TLK = own_TLK.new_full((num_tokens, num_layers + 1, self._top_k), empty)
        if found_B:
            previous_TLK[:, 1:].index_copy_(0, put(np.array(found_B), self._device), torch.stack(experts_B))
        self._chosen = Chosen(own_TLK, previous_TLK)

    def slices(self, layer: int | None) -> Slices:
        """Which token goes where at MoE layer `layer`, in equal slices; None: a layer without
        experts."""
        if layer is None or self._tables is None:
            return self._plain
        return equal_slices(self.scores_TR(layer))

    def scores_TR(self, layer: int) -> torch.Tensor:
        """Score of each rank as a home of each token, float32 [T, R]."""
        tables = self._tables
        assert tables is not None, "only predict='none' goes without a schedule"
        if self._predict == "table":
            return tables.table_scores_TR(layer, self._known)
        if self._predict == "paper":
            return tables.paper_scores_TR(layer, self._known, self._chosen)
        ids_TX = tables.context_ids_TX(layer, self._known, self._chosen, is_prompt=self._is_prompt)
        scores_TR = tables.context_scores_TR(layer, self._known, ids_TX)
        if self._learner is not None:
            self._learner.predicted(layer, ids_TX, scores_TR)
        return scores_TR

    def record(self, layer: int, chosen_TK: torch.Tensor) -> None:
        """The experts that all tokens chose at a layer, in the checkpoint's numbers; integers,
        on the device."""
        if self._tables is None:
            return
        chosen_TK = chosen_TK.to(torch.int32)
        if self._logical_LP is not None:
            chosen_TK = self._logical_LP[layer].index_select(0, chosen_TK.reshape(-1)).view_as(chosen_TK)
        if self._learner is not None:
            self._learner.chose(layer, chosen_TK)
        own_TLK, previous_TLK = self._chosen
        own_TLK[:, layer] = chosen_TK
        if self._has_followers:
            # A prompt token's predecessor runs in the same batch: later layers may read it.
            before_TK = previous_TLK[:, layer + 1]
            before_TK.copy_(torch.where(self._first_T1, before_TK, chosen_TK.roll(1, 0)))

    def finish(self) -> None:
        """Remember the last token of every request of the batch, and learn from all of it."""
        if self._tables is None:
            return
        if self._learner is not None:
            self._learner.finish(self._num_tokens)
        experts_BLK = self._chosen.own_TLK.index_select(0, self._last_B)
        for (request, *what), experts_LK in zip(self._kept_B, experts_BLK.unbind(0), strict=True):
            token_id, position, num_prompt_tokens = what
            self.memory[request] = LastToken(token_id, experts_LK, position, num_prompt_tokens)

    def follow(self, schedule: Schedule | None, placement: Placement) -> None:
        """Predict for another placement of the same experts from the next batch on; what is known
        of running requests stays, what weights have learned does not."""
        self._placement = placement
        self._tables = None if schedule is None else HomeTables.of(schedule, placement, self._top_k, self._device)
        if self._learner is not None:
            assert self._tables is not None, "weights to start from"
            self._learner = WeightLearner(self._tables, self._learner.group)

    def forget(self, requests: list[int]) -> None:
        """Finished requests."""
        for request in requests:
            self.memory.pop(request, None)


def find_schedule(predict: str, plan: Plan) -> Schedule | None:
    """The tables that a way to predict needs; None where it needs none. Raises InputError where
    the plan lacks them."""
    if predict not in PREDICT:
        raise InputError(f"--predict {predict}: expected one of {', '.join(PREDICT)}")
    if predict == "none":
        return None
    schedule = Schedule.from_tables(plan.tables)
    if schedule is None:
        raise InputError(
            f"--predict {predict}: the plan holds no schedule; --predict none gives equal consecutive slices"
        )
    if predict in ("table", "paper") and not schedule.has_token_ids:
        raise InputError(f"--predict {predict}: the plan's trace had no token ids; use --predict context")
    return schedule


def make_homes(
    predict: str, plan: Plan, *, relabelled: bool, device: torch.device, group: Group | None = None
) -> TokenHomes:
    """Homes by a plan's tables; "learning" needs the group. Raises InputError for a choice that the
    tables do not allow.

    `relabelled`: the checkpoint is a permuted one.
    """
    logical_LP = plan.placement.order_LE if relabelled else None
    schedule = find_schedule(predict, plan)
    return TokenHomes(
        predict, schedule, plan.placement, plan.model.top_k, logical_LP=logical_LP, group=group, device=device
    )
