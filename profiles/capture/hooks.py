"""Records which experts the routers of a model choose, while the model reads (and continues)
requests in batches.

Hooks keep each layer's chosen ids where they were computed; after a forward pass they are stacked,
narrowed to 8 or 16 bits and copied to the host at once.

Reading pads on the right. In a causal model (one that can generate) nothing before the padding sees
it, so no attention mask is given, which leaves the attention kernels their causal fast path; other
models get the mask. Generating pads on the left with the attention mask, as `generate` expects.
tests/profiles/capture/test_families.py holds both equal to one request at a time for every family.

Shape letters: T tokens, L MoE layers, K top-k, B requests of a batch, E experts.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from semmoe.profiles.capture.batches import TokenRequest, pad_batch
from semmoe.profiles.capture.layers import MoeLayer, explain_unsupported, find_moe_layers
from semmoe.profiles.errors import InputError

PROBE_TOKENS = 4


@dataclass(frozen=True, eq=False)
class Recorded:
    """One request with its routing. Row t of the ids belongs to token_ids[t]; a generated last
    token has no row."""

    request_id: str
    domain: str
    token_ids: np.ndarray  # int32, prompt and generated
    num_prompt_tokens: int
    expert_ids_TLK: np.ndarray  # uint8 or uint16
    expert_weights_TLK: np.ndarray | None = None  # float16


@dataclass(frozen=True, eq=False)
class Recording:
    """How to record a model: its MoE layers that take part in reading text, their top-k, and
    whether weights are kept."""

    layers: tuple[MoeLayer, ...]
    top_k: int
    weights: bool = False

    @property
    def empty_slots(self) -> bool:
        return any(layer.empty_slots for layer in self.layers)

    @property
    def num_experts(self) -> int:
        return max(layer.num_experts for layer in self.layers)

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8 if self.num_experts + self.empty_slots <= 256 else torch.uint16


class AllChosen(Exception):
    """Ends a forward pass whose last router has chosen: nothing after that is recorded."""


@contextmanager
def hooked(
    layers: Iterable[MoeLayer], *, stop: bool = False, check: Callable[[], None] = lambda: None
) -> Iterator[list[list[Any]]]:
    """Within the block, every forward pass appends each layer's choice to that layer's list of the
    yielded lists.

    With `stop` a pass ends in AllChosen as soon as the last layer's router has chosen. What
    `check`, called at every router, raises ends a pass too.
    """
    layers = list(layers)
    choices: list[list[Any]] = [[] for _ in layers]

    def attach(layer: MoeLayer, into: list[Any]) -> Any:
        def keep(module: nn.Module, args: tuple, kwargs: dict, output: Any = None) -> None:
            check()
            into.append(layer.read(args, kwargs, output))
            if stop and layer is layers[-1]:
                raise AllChosen

        if layer.after:
            return layer.module.register_forward_hook(keep, with_kwargs=True)
        return layer.module.register_forward_pre_hook(keep, with_kwargs=True)

    # GPT-OSS in MXFP4 fuses router and experts unless its experts say that they are hooked; then
    # they take the router's choice.
    fused = [m for m in (layer.module for layer in layers) if hasattr(m, "forward_routed")]
    handles = [attach(layer, into) for layer, into in zip(layers, choices, strict=True)]
    for module in fused:
        module._is_hooked = True  # pyright: ignore
    try:
        yield choices
    finally:
        for handle in handles:
            handle.remove()
        for module in fused:
            module._is_hooked = False  # pyright: ignore


def start_recording(model: Any, name: str, *, weights: bool = False) -> Recording:
    """Find the MoE layers that read text, and their top-k, by reading a few tokens.

    Towers for images and layers that only other inputs reach are left out. Raises InputError where
    nothing is routed.
    """
    layers = find_moe_layers(model)
    if not layers:
        raise explain_unsupported(model, name)
    ids = torch.arange(PROBE_TOKENS, device=model.device)[None]
    with torch.inference_mode(), hooked(layers) as choices:
        read_batch(model, ids, None)
    reached = [(layer, taken) for layer, taken in zip(layers, choices, strict=True) if taken]
    if not reached:
        raise InputError(
            f"{name}: model type {model.config.model_type!r} is not supported: its experts do not read text"
        )
    for layer, taken in reached:
        if len(taken) != 1 or taken[0][0].numel() % PROBE_TOKENS:
            raise InputError(f"{name}: {layer.name} is not called once for every token, so its choices have no tokens")
    top_ks = [taken[0][0].numel() // PROBE_TOKENS for _, taken in reached]
    used = [replace(layer, empty_slots=layer.empty_slots or min(top_ks) < max(top_ks)) for layer, _ in reached]
    return Recording(tuple(used), max(top_ks), weights)


def read_batch(model: Any, input_ids_BT: torch.Tensor, attention_mask_BT: torch.Tensor | None) -> None:
    """One forward pass without the output head: logits of a long batch would take more memory
    than the rest."""
    model.base_model(input_ids=input_ids_BT, attention_mask=attention_mask_BT, use_cache=False)


def take_choices(choices: list[list[Any]], recording: Recording, step: int = 0) -> tuple[np.ndarray, np.ndarray | None]:
    """Ids [T, L, K] and weights (float16, or None) of one forward pass, in one copy per device;
    that pass is then forgotten."""
    index = [taken[step][0] for taken in choices]
    weights = [taken[step][1] for taken in choices] if recording.weights else None
    narrow = _stack_on_host([_as_rows(i, recording.top_k, recording.num_experts) for i in index], recording.dtype)
    kept = (
        None if weights is None else _stack_on_host([_as_rows(w, recording.top_k, 0) for w in weights], torch.float16)
    )
    for taken in choices:
        taken[step] = None
    return narrow, kept


def _as_rows(values: torch.Tensor, top_k: int, fill: int) -> torch.Tensor:
    """[T, K], with `fill` in slots that a layer of smaller top-k lacks."""
    rows = values.reshape(-1, values.shape[-1])
    return rows if rows.shape[-1] == top_k else nn.functional.pad(rows, (0, top_k - rows.shape[-1]), value=fill)


def _stack_on_host(layers_TK: list[torch.Tensor], dtype: torch.dtype) -> np.ndarray:
    """Layers stacked to [T, L, K] of `dtype` on the host. Layers of one device travel together."""
    devices = list(dict.fromkeys(t.device for t in layers_TK))
    order = [[i for i, t in enumerate(layers_TK) if t.device == device] for device in devices]
    pieces = [torch.stack([layers_TK[i] for i in at], dim=1).to(dtype).cpu().numpy() for at in order]
    if len(pieces) == 1:
        return pieces[0]
    return np.concatenate(pieces, axis=1)[:, np.argsort(np.concatenate(order))]


@torch.inference_mode()
def record_prefill(
    model: Any, recording: Recording, batch: list[TokenRequest], *, check: Callable[[], None] = lambda: None
) -> list[Recorded]:
    """Read a batch once and return every request's routing. What `check`, called at every router,
    raises ends the pass.

    The pass ends at the last router: the experts behind it, whose output nobody needs, are not
    computed. A model that is spread over devices runs to its end, since hooks of its own move
    weights after each module.
    """
    ids, mask = pad_batch(batch, left=False)
    needs_mask = not (mask.all() or model.can_generate())
    stop = len(set((getattr(model, "hf_device_map", None) or {}).values())) < 2
    with suppress(AllChosen), hooked(recording.layers, stop=stop, check=check) as choices:
        read_batch(
            model,
            torch.from_numpy(ids).to(model.device),
            torch.from_numpy(mask).to(model.device) if needs_mask else None,
        )
    index, weights = (a if a is None else a.reshape(*ids.shape, *a.shape[1:]) for a in take_choices(choices, recording))
    rows = [slice(len(r.token_ids)) for r in batch]
    return [
        Recorded(
            r.request_id,
            r.domain,
            r.token_ids,
            len(r.token_ids),
            index[b, rows[b]],  # pyright: ignore
            None if weights is None else weights[b, rows[b]],
        )
        for b, r in enumerate(batch)
    ]


@torch.inference_mode()
def record_generation(
    model: Any,
    recording: Recording,
    batch: list[TokenRequest],
    num_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    check: Callable[[], None] = lambda: None,
) -> list[Recorded]:
    """Continue every request of a batch by up to `num_tokens` tokens with a KV cache, and return
    the routing of all its tokens.

    Temperature 0 takes the likeliest token, else tokens are drawn from the softmax of logits /
    temperature, with random numbers that depend on the seed, the request's id and the place only,
    not on the batch. A request ends at an end-of-sequence token.
    """
    ids, mask = pad_batch(batch, left=True)
    sampler = [Sampler(batch, temperature, seed, model.device)] if temperature > 0 else []
    with hooked(recording.layers, check=check) as choices:
        output = model.generate(
            input_ids=torch.from_numpy(ids).to(model.device),
            attention_mask=torch.from_numpy(mask).to(model.device),
            max_new_tokens=num_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            logits_processor=sampler,
            pad_token_id=0,
        )
    sequences = (output if isinstance(output, torch.Tensor) else output.sequences).cpu().numpy()[:, ids.shape[1] :]
    steps = [take_choices(choices, recording, step) for step in range(len(choices[0]))]
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else np.atleast_1d(ends)
    results = []
    for b, request in enumerate(batch):
        stops = np.flatnonzero(np.isin(sequences[b], ends))
        generated = sequences[b, : stops[0] + 1] if stops.size else sequences[b]
        index, weights = (
            _rows_of(b, part, ids.shape, len(request.token_ids), len(generated)) for part in zip(*steps, strict=True)
        )
        tokens = np.concatenate([request.token_ids, generated]).astype(np.int32)
        results.append(Recorded(request.request_id, request.domain, tokens, len(request.token_ids), index, weights))  # pyright: ignore
    return results


def _rows_of(b: int, steps: tuple, shape: tuple[int, ...], num_prompt: int, num_generated: int) -> np.ndarray | None:
    """Rows of request b: the unpadded end of the prompt's pass, then one row of each later pass
    but for the last token."""
    if steps[0] is None:
        return None
    prompt = steps[0].reshape(*shape, *steps[0].shape[1:])[b, shape[1] - num_prompt :]
    return np.concatenate([prompt, *(step[b : b + 1] for step in steps[1:num_generated])])


class Sampler:
    """A logits processor that turns "take the likeliest" into sampling: it adds Gumbel noise to
    logits / temperature.

    Each request has its own generator, so what is drawn for it does not depend on its batch.
    """

    def __init__(self, batch: list[TokenRequest], temperature: float, seed: int, device: torch.device) -> None:
        self._temperature = temperature
        self._generators = [
            torch.Generator(device).manual_seed(
                int.from_bytes(hashlib.sha256(f"{seed}/{r.request_id}".encode()).digest()[:7], "little")
            )
            for r in batch
        ]

    def __call__(self, input_ids: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        noise = torch.empty_like(scores_BV, dtype=torch.float32)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores_BV.float() / self._temperature - noise.log()
