"""What a batch would have sent had no expert moved: the choices that were made, under the tables of
before.

Choices are kept while a batch runs and counted after it, so that a step takes no longer.

Shape letters: T tokens of this rank, K top-k, L MoE layers, R ranks.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from semmoe.runtime.layer.choices import chosen_copies
from semmoe.runtime.layer.permute import find_destinations
from semmoe.runtime.layer.tables import LayerTables


class Traffic(NamedTuple):
    """Of one batch of this rank."""

    rows: int  # that leave it, all layers together
    pairs_LR: np.ndarray  # int64, choices served by each rank


@dataclass(eq=False)
class Unmoved:
    """`saw` the choices of every layer, then `counted` once for the batch."""

    tables_L: list[LayerTables]  # of before
    rank: int
    num_ranks: int
    chosen: list[tuple[int, torch.Tensor]] = field(default_factory=list)

    def saw(self, layer: int, expert_ids_TK: torch.Tensor) -> None:
        self.chosen.append((layer, expert_ids_TK))

    def counted(self) -> Traffic:
        """The traffic of the choices seen since the last count."""
        rows, pairs_LR = 0, np.zeros((len(self.tables_L), self.num_ranks), np.int64)
        for layer, ids_TK in self.chosen:
            to = find_destinations(*chosen_copies(self.tables_L[layer], ids_TK), self.num_ranks)
            rows_R, pairs_R = torch.stack([to.rows_R, to.pairs_R]).cpu().numpy()
            rows += int(rows_R.sum() - rows_R[self.rank])
            pairs_LR[layer] += pairs_R
        self.chosen = []
        return Traffic(rows, pairs_LR)
