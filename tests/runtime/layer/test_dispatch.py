"""The record between dispatch and combine, and what the counters take from it."""

from types import SimpleNamespace
from typing import Any

import torch

from semmoe.runtime.layer.counters import Counters, stacked
from semmoe.runtime.layer.dispatch import Dispatched, Sizes


def dispatched(sizes: Sizes) -> Dispatched:
    """A record of rows of 40 bytes out and 8 values of 2 bytes back; the rest is not counted."""
    nothing: Any = SimpleNamespace()
    rows_MB = torch.empty((sum(sizes.sent_rows), 40), dtype=torch.uint8)
    return Dispatched(nothing, sizes, torch.empty(0), nothing, rows_MB, rows_MB[:0], [], 8, torch.bfloat16)


def test_counters_are_read_from_the_record() -> None:
    counters = Counters.zeros(2, 3)
    # Rank 0 of 3: 5 tokens with 2 choices; 4 choices stay, 6 go out in 3 + 2 rows; 7 come in 1 + 4.
    sizes = Sizes([0, 3, 2], [4, 4, 2], [0, 1, 4], [4, 2, 5], 5, 4, 7)
    for _ in range(2):
        counters.add(1, dispatched(sizes))
    found = {name: values_RL[0].tolist() for name, values_RL in stacked([counters]).items()}
    assert found == {
        "tokens_L": [0, 10],
        "activations_L": [0, 20],
        "local_L": [0, 8],
        "served_L": [0, 22],
        "rows_LR": [[0, 0, 0], [0, 6, 4]],
        "bytes_LR": [[0, 0, 0], [0, 2 * (3 * 40 + 1 * 16), 2 * (2 * 40 + 4 * 16)]],
    }
