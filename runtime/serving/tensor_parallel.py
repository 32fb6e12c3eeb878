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
from typing import Any

import numpy as np
import torch

from semmoe.profiles.capture.layers import find_moe_layers
from semmoe.profiles.errors import InputError
from semmoe.profiles.families import layer_number
from semmoe.runtime.layer.shuffle import gather_slices, pack_slice, scatter_sums, unpack_slices
from semmoe.runtime.ranks.failures import ExchangeError, SharedRefusal, is_out_of_memory, naming
from semmoe.runtime.serving.home_tables import put
from semmoe.runtime.serving.token_homes import TokenHomes
from semmoe.runtime.transformers.attention_heads import keep_heads
from semmoe.runtime.transformers.ep import ExpertLayer, RunExperts
from semmoe.runtime.transformers.placed_model import PlacedModel

PARTS = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
PROBE_TOKENS = 24


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

    def run_layer(
        self,
        layer: Any,
        expert: tuple[int, ExpertLayer, RunExperts] | None,
        name: str,
        hidden_BSD: torch.Tensor,
        named: dict[str, Any],
    ) -> torch.Tensor:
        """The forward of one decoder layer. `expert`: number, exchange and experts of a MoE
        layer."""
        group, watch = self.placed.group, self.placed.state.stopwatch
        partial = layer.self_attn(hidden_states=layer.input_layernorm(hidden_BSD), **named)
        partial_TD = (partial[0] if isinstance(partial, tuple) else partial).reshape(-1, hidden_BSD.shape[-1])
        watch.mark("attention")
        slices = self.homes.slices(None if expert is None else expert[0])
        watch.mark("homes")
        own, counts_R = slices.of_rank(group.rank), [slices.places] * group.size
        row_P = slices.token_P if self.valid_T is None else self.valid_T.index_select(0, slices.token_P)
        # index_select copies whole rows: on a CPU five times faster than indexing with a tensor.
        flat_TD, shuffled_PD = hidden_BSD.reshape(partial_TD.shape), partial_TD.index_select(0, row_P)
        hidden_ND = flat_TD.index_select(0, row_P[own])
        watch.mark("shuffle")
        with naming(group.rank, f"the shuffled reduce-scatter at {name}"):
            hidden_ND += scatter_sums(shuffled_PD, counts_R, group.rank, group.handle)
        watch.mark("slices")
        # Empty places hold a copy of a token, which no expert sees and nobody reads.
        self.placed.state.empty_T = None if slices.empty_P is None else slices.empty_P[own]
        output = layer.mlp(layer.post_attention_layernorm(hidden_ND)[None])
        hidden_ND = hidden_ND + (output[0] if isinstance(output, tuple) else output).reshape(hidden_ND.shape)
        chosen_NK = torch.zeros((len(hidden_ND), 0), dtype=torch.int16, device=hidden_ND.device)
        if expert is not None:
            chosen_NK = self.placed.state.chosen_TK
        watch.mark("attention")
        packed_NB = pack_slice(hidden_ND, chosen_NK)
        watch.mark("shuffle")
        with naming(group.rank, f"the shuffled all-gather at {name}"):
            packed_PB = gather_slices(packed_NB, counts_R, group.handle)
        watch.mark("slices")
        gathered_PD, chosen_PK = unpack_slices(packed_PB, hidden_ND.shape[1], chosen_NK.shape[1], hidden_ND.dtype)
        whole_TD = gathered_PD.index_select(0, slices.place_T)
        if self.valid_T is not None:
            whole_TD = torch.zeros_like(flat_TD).index_copy_(0, self.valid_T, whole_TD)
        watch.mark("shuffle")
        if expert is not None:
            self.homes.record(expert[0], chosen_PK.index_select(0, slices.place_T))
        watch.mark("homes")
        return whole_TD.reshape(hidden_BSD.shape)


def install_tensor_parallel(
    placed: PlacedModel, homes: TokenHomes, model_layers: tuple[int, ...], name: str
) -> ShuffledModel:
    """Change a placed model's decoder layers; all ranks call it. Raises InputError for a family
    whose layers have another shape."""
    shuffled = ShuffledModel(placed, homes)
    stack = decoder_layers(placed.model, name)
    ids_BQ = np.arange(PROBE_TOKENS)[None] % 50 + 5
    ids = put(ids_BQ, placed.group.device)
    with torch.inference_mode():
        expected = placed.model(input_ids=ids, use_cache=False).logits.float()
    experts = {
        number: (place, layer, run)
        for place, (number, layer, run) in enumerate(zip(model_layers, placed.layers, placed.run_experts, strict=True))
    }
    with refusing_other_shapes(name):
        for number, layer in enumerate(stack):
            where = f"layer {number}"
            keep_heads(layer.self_attn, placed.group.rank, placed.group.size, where)

            def forward(
                hidden_states: torch.Tensor,
                *,
                layer: Any = layer,
                number: int = number,
                where: str = where,
                **named: Any,
            ) -> torch.Tensor:
                return shuffled.run_layer(layer, experts.get(number), where, hidden_states, named)

            layer.forward = forward
        with torch.inference_mode():
            shuffled.begin(ids_BQ, None, [-1], is_prompt=True)
            found = placed.model(input_ids=ids, use_cache=False).logits.float()
    difference = relative_difference(found[0], expected[0], placed.model.dtype)
    if not difference <= (1e-3 if placed.model.dtype == torch.float32 else 0.1):
        raise other_shape(name, f"gives other logits with its heads shared out (relative difference {difference:.2g})")
    return shuffled


def relative_difference(found_TV: torch.Tensor, expected_TV: torch.Tensor, dtype: torch.dtype) -> float:
    """How far logits are off, in units of the largest: at the worst token in float32, at the lower
    quartile in 16 bits.

    There rounding alone turns some routers' choices, and those tokens' logits with them; layers of
    another shape miss all tokens.
    """
    off_T = (found_TV - expected_TV).abs().amax(1) / expected_TV.abs().max().clamp(min=1)
    return float(off_T.max() if dtype == torch.float32 else off_T.quantile(0.25))


def other_shape(name: str, how: str) -> InputError:
    """The refusal of a family whose decoder layers are built in another way."""
    return SharedRefusal(
        f"--scheduler tp: {name} {how}: its layers have another shape than norm, attention, norm, feed-forward; use --scheduler dp"
    )


@contextmanager
def refusing_other_shapes(name: str) -> Iterator[None]:
    """What a model's own code raises where its attention is not what its parts' names promise
    becomes a refusal, alike on all ranks."""
    try:
        yield
    except InputError as error:
        raise SharedRefusal(str(error)) from None
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, ExchangeError) or is_out_of_memory(error):
            raise
        raise other_shape(name, "does not run with its heads shared out") from error


def decoder_layers(model: Any, name: str) -> list[Any]:
    """The decoder layers in order. Raises InputError where they lack a part of the usual shape."""
    moe = find_moe_layers(model)
    number = layer_number(moe[0].name)
    stack = model.get_submodule(moe[0].name.split(f".{number}.")[0])
    for place, layer in enumerate(stack):
        missing = [part for part in PARTS if not hasattr(layer, part)]
        if missing:
            raise SharedRefusal(f"--scheduler tp: layer {place} of {name} has no {missing[0]}; use --scheduler dp")
    return list(stack)
