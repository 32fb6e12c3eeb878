"""What the expert layers of a rank did, in integers: taken from the record of each dispatch.

Shape letters: L MoE layers, R ranks.
"""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from semmoe.runtime.layer.dispatch import Dispatched


@dataclass(frozen=True, eq=False)
class Counters:
    """Sums of one rank per layer, int64."""

    tokens_L: np.ndarray  # rows of its own tokens
    activations_L: np.ndarray  # choices of its own tokens
    local_L: np.ndarray  # of them served by itself
    served_L: np.ndarray  # choices that it served, for any rank
    rows_LR: np.ndarray  # rows sent to each rank on dispatch; as many come back
    bytes_LR: np.ndarray  # bytes sent to each rank: its own rows going out, and results of the other's rows

    @classmethod
    def zeros(cls, num_layers: int, num_ranks: int) -> "Counters":
        per_layer = [np.zeros(num_layers, np.int64) for _ in range(4)]
        return cls(*per_layer, *(np.zeros((num_layers, num_ranks), np.int64) for _ in range(2)))

    def add(self, layer: int, done: "Dispatched") -> None:
        """Count one pass of a layer."""
        sizes = done.sizes
        self.tokens_L[layer] += sizes.tokens
        self.activations_L[layer] += sum(sizes.sent_pairs)
        self.local_L[layer] += sizes.local
        self.served_L[layer] += sizes.local + sizes.remote
        self.rows_LR[layer] += sizes.sent_rows
        self.bytes_LR[layer] += np.asarray(sizes.sent_rows) * done.row_bytes
        self.bytes_LR[layer] += np.asarray(sizes.received_rows) * done.result_bytes


def stacked(counters: list[Counters]) -> dict[str, np.ndarray]:
    """Counters of all ranks by name, with a leading rank axis: [R, L] or [R, L, R]."""
    return {f.name: np.stack([getattr(c, f.name) for c in counters]) for f in fields(Counters)}
