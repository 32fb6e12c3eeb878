"""Weights of the context predictor that go on learning while a model serves:
solvers/schedule/learning.py on the ranks of a run.

All ranks see the experts of all tokens, and must cut the same slices. So each layer's equations are
kept and solved by one rank only, in turn, and the weights are gathered: a sum in another order on
another rank cannot make ranks disagree. That also shares out time and memory, 4 F^2 bytes for each
of L / R layers (11 MB per rank for 26 layers of 64 experts at 4 ranks, 24 MB for 58 layers of 256
at 8). A step after at least LEARN_EVERY tokens sends L * F * R * 4 bytes. Nothing is read back to
the host.

Shape letters: T tokens of a batch, L MoE layers, N layers of this rank (the last may be none), K
top-k, E experts, R ranks, F features that learn, X columns of their ids.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.functional import embedding_bag

from semmoe.runtime.ranks.failures import naming
from semmoe.runtime.ranks.group import Group
from semmoe.runtime.serving.home_tables import HomeTables
from semmoe.solvers.schedule.features import Places
from semmoe.solvers.schedule.learning import (
    HALF_LIFE,
    LEARN_EVERY,
    MOST_TRUST,
    RIDGE,
    learned_depth,
)

BLOCK = 4_096  # tokens whose features are spread out at once


class Predicted(NamedTuple):
    """What this rank remembers of one of its layers until the batch is over."""

    ids_TX: torch.Tensor  # int64, features that learn
    scores_TR: torch.Tensor


class WeightLearner:
    """`begin` a batch, then `predicted` and `chose` at every layer, then `finish`, which all
    ranks call together."""

    def __init__(self, tables: HomeTables, group: Group) -> None:
        num_layers, num_ranks, places = tables.num_layers, tables.num_ranks, tables.places
        self._tables, self.group = tables, group
        self._learned = Places(learned_depth(places.depth, places.num_experts), places.num_experts)
        self._features = self._learned.num_features
        self._layers = list(range(group.rank, num_layers, group.size))
        self._places = -(-num_layers // group.size)  # N
        empty = tables.weight_LFR.new_zeros
        self._plan_NFR = tables.weight_LFR[self._layers, -self._features :].clone()
        self._gram_NFF = empty((len(self._layers), self._features, self._features))
        self._right_NFR = empty((len(self._layers), self._features, num_ranks))
        self._learned_NFR = torch.zeros_like(self._plan_NFR)
        self._agreed_N, self._corrected_N = empty(len(self._layers)), empty(len(self._layers))
        self._trust_N = torch.ones_like(self._agreed_N)
        self._new_tokens = 0
        self.begin()

    def begin(self) -> None:
        """Forget what a batch that never finished has shown."""
        self._predicted: dict[int, Predicted] = {}
        self._served: dict[int, torch.Tensor] = {}

    def predicted(self, layer: int, ids_TX: torch.Tensor, scores_TR: torch.Tensor) -> None:
        """The features of all tokens at a layer, as places in the layer's table of weights, and
        the scores that they got."""
        if layer not in self._layers:
            return
        # The features that learn are the last ones of the table, and their columns the last of the
        # ids.
        columns = self._learned.num_columns(layer, self._tables.top_k)
        own_TX = ids_TX[:, -columns:].long() - (self._tables.places.num_features - self._features)
        self._predicted[layer] = Predicted(own_TX, scores_TR)

    def chose(self, layer: int, chosen_TK: torch.Tensor) -> None:
        """The experts that all tokens chose at a layer."""
        if layer in self._predicted:
            hosts_ER = self._tables.hosts_LER[layer]
            self._served[layer] = embedding_bag(chosen_TK, hosts_ER, mode="sum") / chosen_TK.shape[1]

    def finish(self, num_tokens: int) -> None:
        """Learn from the batch; every rank calls it, with the same number of tokens."""
        kept = 0.5 ** (num_tokens / HALF_LIFE)
        for sums in (self._gram_NFF, self._right_NFR, self._agreed_N, self._corrected_N):
            sums *= kept
        for place, layer in enumerate(self._layers):
            ids_TX, scores_TR = self._predicted[layer]
            for first in range(0, num_tokens, BLOCK):
                rows = slice(first, first + BLOCK)
                ones_TX = torch.ones_like(ids_TX[rows], dtype=torch.float32)
                features_TF = ones_TX.new_zeros((len(ones_TX), self._features)).scatter_add_(1, ids_TX[rows], ones_TX)
                correction_TR = features_TF @ self._learned_NFR[place]
                # Of the plan's weights alone.
                missed_TR = self._served[layer][rows] - scores_TR[rows] + self._trust_N[place] * correction_TR
                self._gram_NFF[place].addmm_(features_TF.T, features_TF)
                self._right_NFR[place].addmm_(features_TF.T, missed_TR)
                correction_TR -= correction_TR.mean(1, keepdim=True)
                self._agreed_N[place] += (correction_TR * missed_TR).sum()
                self._corrected_N[place] += correction_TR.square().sum()
        self._new_tokens += num_tokens
        self.begin()
        if self._new_tokens >= LEARN_EVERY:
            self._new_tokens = 0
            self._learn()

    def _learn(self) -> None:
        """Solve this rank's layers and bring the weights of all layers to all ranks."""
        num_layers, size = self._tables.num_layers, self.group.size
        trust_N = (self._agreed_N / self._corrected_N).clamp(0, MOST_TRUST)
        self._trust_N = torch.where(self._corrected_N > 0, trust_N, 1.0)
        weight_NFR = self._plan_NFR.new_zeros((self._places, *self._plan_NFR.shape[1:]))
        ridge_FF = RIDGE * torch.eye(self._features, device=weight_NFR.device)
        for place in range(len(self._layers)):
            # Without a look at the outcome, which would make the host wait: the ridge keeps the
            # matrix positive.
            factor_FF = torch.linalg.cholesky_ex(self._gram_NFF[place] + ridge_FF).L
            self._learned_NFR[place] = torch.cholesky_solve(self._right_NFR[place], factor_FF)
            weight_NFR[place] = self._plan_NFR[place] + self._trust_N[place] * self._learned_NFR[place]
        gathered = [torch.empty_like(weight_NFR) for _ in range(size)]
        with naming(self.group.rank, "the exchange of learned weights"):
            dist.all_gather(gathered, weight_NFR, group=self.group.handle)
        weight_LFR = torch.stack(gathered, 1).flatten(0, 1)[:num_layers]  # rank r learns layers r, r + R, ...
        self._tables.weight_LFR[:, -self._features :] = weight_LFR
