"""A schedule's tables on the model's device, and the scores of ranks as homes:
solvers/schedule/{token_table,context,paper_table}.py in torch.

The one-hot features of the context predictor (solvers/schedule/features.py) lie in one table per
layer, so that their sum is one `embedding_bag`. Nothing is read back and no shape depends on a
value. Ids that the host knows (rows of the token table, positions) come with `Known`, once per
batch.

Shape letters: T tokens, L MoE layers, K top-k, E experts, R ranks, U ids with a row, C candidates,
F features, X columns of ids.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import embedding_bag

from semmoe.solvers.placement import Placement
from semmoe.solvers.schedule.features import Places
from semmoe.solvers.schedule.schedule import Schedule
from semmoe.solvers.schedule.token_table import Lookup, ShareRows


class Known(NamedTuple):
    """What a batch's token ids and positions say, on the device."""

    row_T: torch.Tensor  # int64: rows of the token table, 0 where there is none
    after_T: torch.Tensor  # int64: successor rows
    has_row_T1: torch.Tensor  # bool
    has_after_T1: torch.Tensor
    prior_T1: torch.Tensor  # float32: weight of the prior
    position_ids_TC: torch.Tensor  # int32


class Chosen(NamedTuple):
    """Experts of each token, and of the token before it in its request; E where there is none."""

    own_TLK: torch.Tensor  # int32
    previous_TLK: torch.Tensor  # int32, of one layer more: the first says nothing


@dataclass(frozen=True, eq=False)
class DeviceRows:
    """ShareRows on the device."""

    shares_LUC: torch.Tensor  # float16
    ranks_LUC: torch.Tensor | None  # int16; None: all ranks, in order

    @classmethod
    def of(cls, rows: ShareRows, device: torch.device) -> "DeviceRows":
        ranks = None if rows.ranks_LUC.size == 0 else put(rows.ranks_LUC.astype(np.int16), device)
        return cls(put(rows.shares_LUC, device), ranks)

    def shares_TR(
        self, layer: int, row_T: torch.Tensor, has_row_T1: torch.Tensor, rare_R: torch.Tensor
    ) -> torch.Tensor:
        """ShareRows.shares_TR."""
        if self.shares_LUC.shape[1] == 0:
            return rare_R.expand(len(row_T), len(rare_R))
        shares_TR = self.shares_LUC[layer].index_select(0, row_T).float()
        if self.ranks_LUC is not None:
            ranks_TC = self.ranks_LUC[layer].index_select(0, row_T).long()
            least_TR = torch.minimum(shares_TR.amin(1, keepdim=True), rare_R)
            shares_TR = least_TR.scatter_(1, ranks_TC, shares_TR)
        return torch.where(has_row_T1, shares_TR, rare_R)


@dataclass(frozen=True, eq=False)
class HomeTables:
    """Everything that scores read, for all layers."""

    schedule: Schedule  # for what the host looks up
    own: DeviceRows
    after: DeviceRows
    rare_LR: torch.Tensor  # float32
    prices_LR: torch.Tensor
    weight_LFR: torch.Tensor  # float32; a WeightLearner goes on with them
    places: Places  # of its features
    first_X: torch.Tensor  # int32: first feature of each column of ids
    top_k: int
    bias_LR: torch.Tensor
    share_LRR: torch.Tensor
    hosts_LER: torch.Tensor  # float32 [L, E + 1, R]
    sequence_rank_LRR: torch.Tensor  # int64
    sequence_confidence_LRR: torch.Tensor  # float32

    @classmethod
    def of(cls, schedule: Schedule, placement: Placement, top_k: int, device: torch.device) -> "HomeTables":
        token, context, sequence = schedule.token, schedule.context, schedule.sequence
        hosts_LER = np.pad(placement.hosts_LER, ((0, 0), (0, 1), (0, 0))).astype(np.float32)
        return cls(
            schedule,
            DeviceRows.of(token.own, device),
            DeviceRows.of(token.after, device),
            put(token.rare_LR, device),
            put(token.prices_LR, device),
            put(context.weight_LFR, device),
            context.places,
            put(context.places.first_X(top_k), device),
            top_k,
            put(context.bias_LR, device),
            put(context.share_LRR, device),
            put(hosts_LER, device),
            put(sequence.rank_LRR.astype(np.int64), device),
            put(sequence.confidence_LRR.astype(np.float32), device),
        )

    @property
    def num_layers(self) -> int:
        return self.hosts_LER.shape[0]

    @property
    def num_ranks(self) -> int:
        return self.hosts_LER.shape[2]

    def known(self, token_ids_T: np.ndarray, previous_ids_T: np.ndarray, position_ids_TC: np.ndarray) -> Known:
        """Rows and positions of a batch, looked up on the host: the one copy of a batch."""
        device = self.rare_LR.device
        lookup: Lookup = self.schedule.token.lookup(token_ids_T, previous_ids_T)
        return Known(
            put(np.maximum(lookup.row_T, 0), device),
            put(np.maximum(lookup.after_T, 0), device),
            put(lookup.row_T[:, None] >= 0, device),
            put(lookup.after_T[:, None] >= 0, device),
            put(self.schedule.token.prior_share(lookup.row_T)[:, None], device),
            put(position_ids_TC.astype(np.int32), device),
        )

    def shares_TR(self, layer: int, known: Known) -> torch.Tensor:
        """TokenTable.shares_TR."""
        rare_R = self.rare_LR[layer]
        own_TR = self.own.shares_TR(layer, known.row_T, known.has_row_T1, rare_R)
        after_TR = self.after.shares_TR(layer, known.after_T, known.has_after_T1, rare_R)
        return torch.addcmul(own_TR, after_TR - rare_R, known.prior_T1)

    def table_scores_TR(self, layer: int, known: Known) -> torch.Tensor:
        """TokenTable.scores_TR."""
        return self.shares_TR(layer, known) - self.prices_LR[layer]

    def context_ids_TX(self, layer: int, known: Known, chosen: Chosen, *, is_prompt: bool) -> torch.Tensor:
        """Places.ids_TX for tokens of one phase, int32 [T, X]: rows of `weight_LFR[layer]`."""
        depth = min(self.places.depth, layer)
        own_TX = chosen.own_TLK[:, layer - depth : layer].flatten(1)
        # A prompt's tokens see the layer before of the token before them, which is in the same
        # pass; see Chosen.previous_TLK.
        nothing_TK = chosen.previous_TLK[:, 0]
        prompt_TK, generated_TK = chosen.previous_TLK[:, layer], chosen.previous_TLK[:, layer + 1]
        previous = (prompt_TK, nothing_TK) if is_prompt else (nothing_TK, generated_TK)
        ids_TX = torch.cat([own_TX, *previous, known.position_ids_TC], 1)
        return ids_TX.add_(self.first_X[-ids_TX.shape[1] :])

    def context_scores_TR(self, layer: int, known: Known, ids_TX: torch.Tensor) -> torch.Tensor:
        """semmoe.solvers.schedule.context.context_scores_TR."""
        scores_TR = torch.addmm(self.bias_LR[layer], self.shares_TR(layer, known), self.share_LRR[layer])
        return scores_TR.add_(embedding_bag(ids_TX, self.weight_LFR[layer], mode="sum"))

    def paper_scores_TR(self, layer: int, known: Known, chosen: Chosen) -> torch.Tensor:
        """semmoe.solvers.schedule.paper_table.paper_scores_TR: the table knows ids only, not
        what they follow."""
        table_TR = self.own.shares_TR(layer, known.row_T, known.has_row_T1, self.rare_LR[layer])
        if layer < 2:  # the table of sequences begins at the third layer: confidence -1
            return table_TR
        last_T, before_T = (
            embedding_bag(chosen.own_TLK[:, i].contiguous(), self.hosts_LER[i], mode="sum").argmax(1)
            for i in (layer - 1, layer - 2)
        )
        rank_T1 = self.sequence_rank_LRR[layer][last_T, before_T][:, None]
        confidence_T1 = self.sequence_confidence_LRR[layer][last_T, before_T][:, None]
        confident_T1 = table_TR.amax(1, keepdim=True) * known.has_row_T1
        followed_TR = table_TR.scatter(1, rank_T1, 1 + confidence_T1)
        return torch.where(confident_T1 <= confidence_T1, followed_TR, table_TR)


def put(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array on the device; the same memory on a CPU."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)
