"""What is known of a token before its router runs at a layer, as ids of one-hot features, and the
place of each feature in one table of weights. Scores, fits and the tables on a model's device read
their features here.

Choices: the experts that the token itself chose at earlier layers, and those of the token before it
in its request. A prompt token's predecessor runs in the same pass, so its choice at the layer
before is known; a generated token's predecessor has left the model, so its choice at this layer is.

Positions: requests of one kind open with the same template, close their prompts with the same few
tokens, and have prompts of similar length. The first MoE layer of a trace without token ids has
nothing else to go by. Three ids per token: its position (each of the first FIRST), its distance
from the end of the prompt (of the last LAST), and the octave of the prompt's length.

Shape letters: T tokens, L MoE layers, K top-k, C columns of position ids (3), F features, X columns
of their ids.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from semmoe.profiles.trace import TraceBatch

FIRST = 64
LAST = 16
OCTAVES = 16
NUM_POSITION_IDS = FIRST + LAST + OCTAVES
POSITION_COLUMNS = 3
PROMPT, GENERATED = 0, 1  # phases of a token


class Seen(NamedTuple):
    """What features are made of; num_experts where no expert is known."""

    chosen_TLK: np.ndarray  # experts of each token, read at earlier layers only
    previous_TLK: np.ndarray  # of the token before it in its request
    is_prompt_T: np.ndarray  # bool
    position_ids_TC: np.ndarray  # int16

    @classmethod
    def of(cls, batch: TraceBatch, num_experts: int, rows: np.ndarray | None = None) -> "Seen":
        """Of the rows of a batch; of all where None."""
        every = rows is None
        return cls(
            batch.expert_ids_TLK if every else layers_first_rows(batch.expert_ids_TLK, rows),
            previous_experts_TLK(batch, num_experts, rows),
            batch.is_prompt_T if every else batch.is_prompt_T[rows],
            batch_position_ids_TC(batch) if every else batch_position_ids_TC(batch)[rows],
        )


class Choices(NamedTuple):
    """K features of every token: the experts chosen at one layer."""

    kind: str  # "own", or "previous": by the token before
    number: int  # own: layers back, 0 the one just before; previous: the phase of the tokens that read it
    layer: int  # where they were chosen; -1 for nowhere

    def rows(self, is_prompt_T: np.ndarray) -> np.ndarray:
        """Tokens that may read it, ascending int64."""
        if self.kind == "own":
            return np.arange(len(is_prompt_T))
        return np.flatnonzero(is_prompt_T == (self.number == PROMPT)) if self.layer >= 0 else np.zeros(0, np.int64)

    def ids_TK(self, seen: Seen, num_experts: int) -> np.ndarray:
        """The experts; num_experts for tokens that may not read them."""
        if self.kind == "own":
            return seen.chosen_TLK[:, self.layer]
        ids_TK, rows = np.full_like(seen.previous_TLK[:, 0], num_experts), self.rows(seen.is_prompt_T)
        ids_TK[rows] = seen.previous_TLK[rows, self.layer]
        return ids_TK


def choices_before(layer: int, depth: int) -> list[Choices]:
    """What predicts a layer: own choices at up to `depth` layers before it, the nearest first, then
    those of the token before."""
    own = [Choices("own", back, layer - 1 - back) for back in range(min(depth, layer))]
    return [*own, Choices("previous", PROMPT, layer - 1), Choices("previous", GENERATED, layer)]


@dataclass(frozen=True)
class Places:
    """Where features are in one table of F rows: own choices of the farthest layer first, those of
    the token before (prompt, generated), positions; each kind with a row for "none" at its end.

    The places of fewer layers are the end of those of more.
    """

    depth: int
    num_experts: int

    @property
    def num_features(self) -> int:
        return (self.depth + 2) * (self.num_experts + 1) + NUM_POSITION_IDS + 1

    def first_X(self, top_k: int) -> np.ndarray:
        """First feature of each column of ids, int32 [X]: (depth + 2) * K choices, then
        positions."""
        kinds_X = np.append(np.repeat(np.arange(self.depth + 2), top_k), np.full(POSITION_COLUMNS, self.depth + 2))
        return (kinds_X * (self.num_experts + 1)).astype(np.int32)

    def num_columns(self, layer: int, top_k: int) -> int:
        """Columns of ids at a layer: the last ones, where fewer than `depth` layers come before."""
        return (min(self.depth, layer) + 2) * top_k + POSITION_COLUMNS

    def ids_TX(self, layer: int, seen: Seen) -> np.ndarray:
        """Features of every token at a layer, int32 [T, X], each below F."""
        top_k = seen.chosen_TLK.shape[2]
        *own, prompt, generated = choices_before(layer, self.depth)
        blocks = [choices.ids_TK(seen, self.num_experts) for choices in (*own[::-1], prompt, generated)]
        ids_TX = np.hstack([*blocks, seen.position_ids_TC]).astype(np.int32)
        return ids_TX + self.first_X(top_k)[-self.num_columns(layer, top_k) :]


def previous_experts_TLK(batch: TraceBatch, num_experts: int, rows: np.ndarray | None = None) -> np.ndarray:
    """Experts of the token before each row in its request, [T, L, K]; num_experts where the trace
    does not hold it.

    `rows`: only of these, in their order.
    """
    experts = batch.expert_ids_TLK
    dtype = experts.dtype if num_experts <= np.iinfo(experts.dtype).max else np.uint16
    is_first_T = np.zeros(batch.num_tokens, bool)
    is_first_T[batch.starts_B1[:-1][np.diff(batch.starts_B1) > 0]] = True
    rows = np.arange(batch.num_tokens) if rows is None else rows
    previous = layers_first_rows(experts, np.maximum(rows - 1, 0)).astype(dtype, copy=False)
    previous[is_first_T[rows]] = num_experts
    return previous


def layers_first_rows(expert_ids_TLK: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Copy of the rows, [T, L, K], laid out layer by layer: that is how it is read."""
    return np.take(expert_ids_TLK.transpose(1, 0, 2), rows, axis=1).transpose(1, 0, 2)


def position_ids_TC(position_T: np.ndarray, num_prompt_tokens_T: np.ndarray) -> np.ndarray:
    """Ids int16 [T, 3], each below NUM_POSITION_IDS, or that where there is nothing to say.

    `position_T`: place in the request's sequence from 0, -1 unknown. `num_prompt_tokens_T`: of the
    token's request, 0 unknown.
    """
    left_T = num_prompt_tokens_T - 1 - position_T
    octave_T = np.minimum(np.round(np.log2(np.maximum(num_prompt_tokens_T, 1))), OCTAVES - 1)
    known_T = position_T >= 0
    columns = (
        (known_T & (position_T < FIRST), position_T),
        (known_T & (left_T >= 0) & (left_T < LAST), FIRST + left_T),
        (num_prompt_tokens_T > 0, FIRST + LAST + octave_T),
    )
    return np.stack([np.where(says_T, ids_T, NUM_POSITION_IDS) for says_T, ids_T in columns], axis=1).astype(np.int16)


def batch_position_ids_TC(batch: TraceBatch) -> np.ndarray:
    """Ids of all rows of a batch, int16 [T, 3]."""
    request_T = batch.request_of_T
    position_T = np.arange(batch.num_tokens) - batch.starts_B1[request_T] + batch.first_position_B[request_T]
    return position_ids_TC(position_T, batch.num_prompt_tokens_B[request_T])
