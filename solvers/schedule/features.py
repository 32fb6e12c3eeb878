"""Where a token is in its request: what is known of it before the model has seen anything of it, as
ids of one-hot features.

Requests of one kind open with the same template, close their prompts with the same few tokens, and
have prompts of similar length. The first MoE layer of a trace without token ids has nothing else to
go by. Three ids per token: its position (each of the first FIRST), its distance from the end of the
prompt (of the last LAST), and the octave of the prompt's length. Half octaves of later positions
add nothing.

Shape letters: T tokens, C columns of ids (3).
"""

import numpy as np

from semmoe.profiles.trace import TraceBatch

FIRST = 64
LAST = 16
OCTAVES = 16
NUM_POSITION_IDS = FIRST + LAST + OCTAVES


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
