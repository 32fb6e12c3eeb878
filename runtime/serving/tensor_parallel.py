"""Attention-TP around a placed model: heads over ranks, and between attention and the next layer
every rank works on its slice of tokens.

Decoder layers of the usual pre-norm shape (norm, attention, residual, norm, feed-forward, residual)
get a forward of their own:

    full hidden -> norm -> this rank's heads -> shuffled reduce-scatter -> + residual
    -> norm -> router, experts, shared experts -> + residual -> shuffled all-gather -> full hidden

Other shapes show at once: `install_tensor_parallel` compares the logits of a short text with those
of the untouched model.

Shape letters: T tokens, D hidden size, K top-k, P places of all slices, N places of this rank's
slice.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from semmoe.profiles.errors import InputError, raised_by_us
from semmoe.runtime.layer.shuffle import gather_slices, pack_slice, scatter_sums, unpack_slices
from semmoe.runtime.ranks.failures import ExchangeError, is_out_of_memory, naming
from semmoe.runtime.serving.equal_slices import Slices
from semmoe.runtime.serving.home_tables import put
from semmoe.runtime.serving.probe import MOST_OFF_LOGITS, limit, probe_ids, relative_difference
from semmoe.runtime.serving.token_homes import TokenHomes
from semmoe.runtime.transformers.attention_heads import keep_heads
from semmoe.runtime.transformers.decoder_layers import attend, decoder_layers, feed_forward, replace_forward
from semmoe.runtime.transformers.forward import all_logits
from semmoe.runtime.transformers.placed_model import PlacedModel


class ShuffledModel:
    """What the decoder layers of a rank share: the homes, and which rows of the batch are
    tokens."""

    def __init__(self, placed: PlacedModel, homes: TokenHomes) -> None:
        self.placed, self.homes = placed, homes
        self.valid_T: torch.Tensor | None = None  # int64 rows of the batch that are tokens; None: all are

    def begin(self, ids_BQ: np.ndarray, kept_T: np.ndarray | None, requests: list[int], *, is_prompt: bool) -> None:
        """Before a forward pass: its ids, which rows are tokens (None: all), and the request of
        each row of the batch."""
        ids_T, request_T = ids_BQ.reshape(-1), np.repeat(np.asarray(requests), ids_BQ.shape[1])
        self.valid_T = None if kept_T is None else put(kept_T, self.placed.group.device)
        if kept_T is not None:
            ids_T, request_T = ids_T[kept_T], request_T[kept_T]
        self.homes.begin(ids_T, request_T, is_prompt=is_prompt)
        self.placed.state.valid_T = None  # slices hold tokens only

    def finish(self) -> None:
        """After a forward pass: what its tokens say about their next ones, and about others."""
        self.placed.state.stopwatch.mark("attention")
        self.homes.finish()
        self.placed.state.stopwatch.mark("homes")

    def forget(self, requests: list[int]) -> None:
        """Requests that are finished."""
        self.homes.forget(requests)

    def run_layer(
        self, layer: Any, expert: int | None, name: str, hidden_BSD: torch.Tensor, named: dict[str, Any]
    ) -> torch.Tensor:
        """The forward of one decoder layer. `expert`: its number among MoE layers; None: it has
        no experts."""
        watch = self.placed.state.stopwatch
        partial_TD = attend(layer, hidden_BSD, named).reshape(-1, hidden_BSD.shape[-1])
        watch.mark("attention")
        slices = self.homes.slices(expert)
        watch.mark("homes")
        hidden_ND = self._scatter(slices, name, hidden_BSD.reshape(partial_TD.shape), partial_TD)
        # Empty places hold a copy of a token, which no expert sees and nobody reads.
        own = slices.of_rank(self.placed.group.rank)
        self.placed.state.empty_T = None if slices.empty_P is None else slices.empty_P[own]
        hidden_ND = hidden_ND + feed_forward(layer, hidden_ND[None]).reshape(hidden_ND.shape)
        chosen_NK = torch.zeros((len(hidden_ND), 0), dtype=torch.int16, device=hidden_ND.device)
        if expert is not None:
            chosen_NK = self.placed.state.chosen_TK
        watch.mark("attention")
        whole_TD, chosen_PK = self._gather(slices, name, hidden_ND, chosen_NK)
        if self.valid_T is not None:
            whole_TD = torch.zeros_like(partial_TD).index_copy_(0, self.valid_T, whole_TD)
        watch.mark("shuffle")
        if expert is not None:
            self.homes.record(expert, chosen_PK.index_select(0, slices.place_T))
        watch.mark("homes")
        return whole_TD.reshape(hidden_BSD.shape)

    def _scatter(self, slices: Slices, name: str, flat_TD: torch.Tensor, partial_TD: torch.Tensor) -> torch.Tensor:
        """This rank's slice with attention added, [N, D], of hidden rows and partial sums of
        attention."""
        group, watch = self.placed.group, self.placed.state.stopwatch
        row_P = slices.token_P if self.valid_T is None else self.valid_T.index_select(0, slices.token_P)
        # index_select copies whole rows: on a CPU five times faster than indexing with a tensor.
        shuffled_PD = partial_TD.index_select(0, row_P)
        hidden_ND = flat_TD.index_select(0, row_P[slices.of_rank(group.rank)])
        watch.mark("shuffle")
        with naming(group.rank, f"the shuffled reduce-scatter at {name}"):
            hidden_ND += scatter_sums(shuffled_PD, [slices.places] * group.size, group.rank, group.handle)
        watch.mark("slices")
        return hidden_ND

    def _gather(
        self, slices: Slices, name: str, hidden_ND: torch.Tensor, chosen_NK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens of all ranks in their own order, [T, D], and what was chosen at every place,
        [P, K]."""
        group, watch = self.placed.group, self.placed.state.stopwatch
        packed_NB = pack_slice(hidden_ND, chosen_NK)
        watch.mark("shuffle")
        with naming(group.rank, f"the shuffled all-gather at {name}"):
            packed_PB = gather_slices(packed_NB, [slices.places] * group.size, group.handle)
        watch.mark("slices")
        gathered_PD, chosen_PK = unpack_slices(packed_PB, hidden_ND.shape[1], chosen_NK.shape[1], hidden_ND.dtype)
        return gathered_PD.index_select(0, slices.place_T), chosen_PK


def install_tensor_parallel(
    placed: PlacedModel, homes: TokenHomes, model_layers: tuple[int, ...], name: str
) -> ShuffledModel:
    """Change a placed model's decoder layers; all ranks call it.

    Parameters:
        homes: predicts the rank of every token.
        model_layers: numbers of the MoE layers in the model, in order.
        name: of the model, for people.

    Raises InputError for a family whose layers have another shape.
    """
    shuffled = ShuffledModel(placed, homes)
    ids_BQ = probe_ids()
    ids = put(ids_BQ, placed.group.device)
    with refusing_other_shapes(name):
        stack = decoder_layers(placed.model, name)
        with torch.inference_mode():
            expected_TV = all_logits(placed.model, ids)[0]
        experts = {number: place for place, number in enumerate(model_layers)}
        for number, layer in enumerate(stack):
            where = f"layer {number}"
            keep_heads(layer.self_attn, placed.group.rank, placed.group.size, where)
            replace_forward(layer, partial(shuffled.run_layer, layer, experts.get(number), where))
        with torch.inference_mode():
            shuffled.begin(ids_BQ, None, [-1], is_prompt=True)
            found_TV = all_logits(placed.model, ids)[0]
    difference = relative_difference(found_TV, expected_TV, placed.model.dtype)
    if not difference <= limit(MOST_OFF_LOGITS, placed.model.dtype):
        raise other_shape(name, f"gives other logits with its heads shared out (relative difference {difference:.2g})")
    placed.state.restart()
    return shuffled


def other_shape(name: str, how: str) -> InputError:
    """The refusal of a family whose decoder layers are built in another way."""
    return InputError(
        f"--scheduler tp: {name} {how}: its layers have another shape than norm, attention, norm, feed-forward; use --scheduler dp"
    )


@contextmanager
def refusing_other_shapes(name: str) -> Iterator[None]:
    """What a model's own code raises where its attention is not what its parts' names promise
    becomes a refusal, alike on all ranks."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, ExchangeError) or is_out_of_memory(error) or raised_by_us(error):
            raise
        raise other_shape(name, "does not run with its heads shared out") from error
