"""Lockstep continuous batching: every rank serves its own requests, and all ranks go through the
expert layers together.

In each step the ranks agree on one phase. A step reads prompts where any rank has room for some;
otherwise it extends every running request by one token. A rank without work in a step still joins
the collectives of every expert layer (PlacedModel.join_empty), so requests may differ in length and
ranks in number of requests. Batches are padded on the left; padding is never dispatched. A request
stays on its rank until it is finished, for its keys and values are there.

Shape letters: B requests of a batch, S positions (padding included), R ranks.
"""

import inspect
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from semmoe.profiles.errors import InputError
from semmoe.runtime.ranks.failures import is_out_of_memory, naming
from semmoe.runtime.serving.tensor_parallel import ShuffledModel
from semmoe.runtime.transformers.kv_cache import cache_name, is_joinable, join_caches, keep_requests
from semmoe.runtime.transformers.placed_model import PlacedModel

MAX_RUNNING = 64  # requests that one rank extends at a time


@dataclass(frozen=True, eq=False)
class Prompt:
    """A request to serve."""

    index: int  # place in the input
    request_id: str
    token_ids: np.ndarray  # int32


@dataclass(frozen=True, eq=False)
class Completion:
    """A finished request."""

    index: int
    request_id: str
    rank: int
    token_ids: list[int]  # generated
    finish_reason: str  # "stop" or "length"


@dataclass(frozen=True)
class Limits:
    """How far requests run and how large a forward pass may be."""

    max_new_tokens: int
    batch_tokens: int  # prompt tokens of one forward pass of a rank, padding included; a longer prompt runs alone
    stop_ids: frozenset[int]
    max_running: int = MAX_RUNNING


@dataclass(eq=False)
class Batch:
    """The running requests of a rank, padded on the left."""

    prompts: list[Prompt]
    generated: list[list[int]]
    cache: Any
    mask_BS: torch.Tensor  # int64
    done_B: list[bool]  # only where the cache cannot drop a request

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(eq=False)
class PhaseTimes:
    """Wall-clock seconds and own tokens of the two phases."""

    seconds: dict[str, float] = field(default_factory=lambda: {"prefill": 0.0, "decode": 0.0})
    tokens: dict[str, int] = field(default_factory=lambda: {"prefill": 0, "decode": 0})


def serve(
    placed: PlacedModel,
    prompts: list[Prompt],
    limits: Limits,
    *,
    deliver: Callable[[list[Completion]], None],
    shuffled: ShuffledModel | None = None,
) -> PhaseTimes:
    """Serve this rank's prompts in step with the other ranks; every rank calls it.

    `deliver` gets the completions of all ranks on rank 0, soon after they are there. With
    `shuffled` (Attention-TP) all ranks serve the same prompts, and rank 0 speaks for all. Raises
    ExchangeError where a collective fails, InputError where memory runs out.
    """
    group, watch = placed.group, placed.state.stopwatch
    speaks = shuffled is None or group.rank == 0
    pending, batch, finished = deque(prompts), None, []
    times = PhaseTimes()
    watch.start()
    while True:
        room = bool(pending) and has_room(batch, limits)
        wants_R3 = agree([room, batch is not None, len(finished)], placed)
        watch.mark("wait")
        if any(count for _, _, count in wants_R3):
            collect(finished, placed, deliver)
            finished = []
        if not any(room or running for room, running, _ in wants_R3):
            return times
        begun = time.perf_counter()
        phase = "prefill" if any(room for room, _, _ in wants_R3) else "decode"
        chosen = take_prompts(pending, batch, limits) if phase == "prefill" and room else []
        watch.start()
        if speaks:
            own = sum(len(p.token_ids) for p in chosen) if phase == "prefill" else running_requests(batch)
            times.tokens[phase] += own
        with naming_memory(placed, phase, chosen, batch):
            if phase == "prefill":
                batch = joined(batch, prefill(placed, chosen, shuffled)) if chosen else idle(placed, batch)
            else:
                batch = decode(placed, batch, shuffled) if batch is not None else idle(placed, None)
        batch, stopped = retire(batch, limits, group.rank)
        if shuffled is not None:
            shuffled.homes.forget([completion.index for completion in stopped])
        finished += stopped if speaks else []
        watch.mark("attention")
        times.seconds[phase] += time.perf_counter() - begun


def agree(values: list[int], placed: PlacedModel) -> list[list[int]]:
    """The `values` of every rank, by rank."""
    group = placed.group
    device = group.device if group.backend == "nccl" else "cpu"
    mine = torch.tensor(values, dtype=torch.int64, device=device)
    gathered = [torch.empty_like(mine) for _ in range(group.size)]
    with naming(group.rank, "the agreement on the next step"):
        dist.all_gather(gathered, mine, group=group.handle)
        return torch.stack(gathered).tolist()


def collect(finished: list[Completion], placed: PlacedModel, deliver: Callable[[list[Completion]], None]) -> None:
    """Bring the completions of all ranks to rank 0."""
    group = placed.group
    gathered: list[Any] | None = [None] * group.size if group.rank == 0 else None
    with naming(group.rank, "the delivery of finished requests"):
        dist.gather_object(finished, gathered, dst=0, group=group.handle)
    if gathered is not None:
        deliver([completion for part in gathered for completion in part])


def running_requests(batch: Batch | None) -> int:
    return 0 if batch is None else len(batch) - sum(batch.done_B)


def has_room(batch: Batch | None, limits: Limits) -> bool:
    """Whether a request can be added to the running ones."""
    return batch is None or (len(batch) < limits.max_running and is_joinable(batch.cache))


def take_prompts(pending: deque[Prompt], batch: Batch | None, limits: Limits) -> list[Prompt]:
    """The next prompts, in order, that fit one forward pass together; removed from `pending`. At
    least one."""
    free = limits.max_running - (0 if batch is None else len(batch))
    chosen, longest = [], 0
    while pending and len(chosen) < free:
        longest = max(longest, len(pending[0].token_ids))
        if chosen and longest * (len(chosen) + 1) > limits.batch_tokens:
            break
        chosen.append(pending.popleft())
    return chosen


def idle(placed: PlacedModel, batch: Batch | None) -> Batch | None:
    """A step without own work."""
    placed.join_empty()
    return batch


def prefill(placed: PlacedModel, prompts: list[Prompt], shuffled: ShuffledModel | None = None) -> Batch:
    """Read prompts; the batch then holds the first generated token of each."""
    longest = max(len(p.token_ids) for p in prompts)
    ids_BS = np.zeros((len(prompts), longest), np.int64)
    mask_BS = np.zeros((len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        ids_BS[row, longest - len(prompt.token_ids) :] = prompt.token_ids
        mask_BS[row, longest - len(prompt.token_ids) :] = 1
    device = placed.group.device
    ids, mask = torch.from_numpy(ids_BS).to(device), torch.from_numpy(mask_BS).to(device)
    kept_T = None if mask_BS.all() else np.flatnonzero(mask_BS)
    begin_batch(placed, shuffled, ids_BS, kept_T, prompts, is_prompt=True)
    tokens, cache = forward(placed, ids, mask, None)
    end_batch(placed, shuffled)
    return Batch(list(prompts), [[token] for token in tokens], cache, mask, [False] * len(prompts))


def decode(placed: PlacedModel, batch: Batch, shuffled: ShuffledModel | None = None) -> Batch:
    """Extend every running request by one token."""
    device = placed.group.device
    ids_B1 = np.array([generated[-1:] for generated in batch.generated])
    ids = torch.from_numpy(ids_B1).to(device)
    mask = torch.nn.functional.pad(batch.mask_BS, (0, 1), value=1)
    kept_T = np.flatnonzero(~np.array(batch.done_B)) if any(batch.done_B) else None
    begin_batch(placed, shuffled, ids_B1, kept_T, batch.prompts, is_prompt=False)
    tokens, batch.cache = forward(placed, ids, mask, batch.cache)
    end_batch(placed, shuffled)
    batch.mask_BS = mask
    for generated, token, done in zip(batch.generated, tokens, batch.done_B, strict=True):
        if not done:
            generated.append(token)
    return batch


def begin_batch(
    placed: PlacedModel,
    shuffled: ShuffledModel | None,
    ids_BQ: np.ndarray,
    kept_T: np.ndarray | None,
    prompts: list[Prompt],
    *,
    is_prompt: bool,
) -> None:
    """Tell the layers which rows of the next forward pass are tokens, and whose."""
    placed.state.valid_T = None if kept_T is None else torch.from_numpy(kept_T).to(placed.group.device)
    if shuffled is not None:
        shuffled.begin(ids_BQ, kept_T, [prompt.index for prompt in prompts], is_prompt=is_prompt)


def end_batch(placed: PlacedModel, shuffled: ShuffledModel | None) -> None:
    """After a forward pass: what its tokens say about their next ones, and about others."""
    if shuffled is not None:
        placed.state.stopwatch.mark("attention")
        shuffled.homes.finish()
        placed.state.stopwatch.mark("homes")


def forward(placed: PlacedModel, ids_BQ: torch.Tensor, mask_BS: torch.Tensor, cache: Any) -> tuple[list[int], Any]:
    """One forward pass over the last Q of S positions: the most likely next token of each
    request, and the cache."""
    position_BS = (mask_BS.cumsum(1) - 1).clamp_(min=0)
    name = cache_name(placed.model)
    arguments = {
        "input_ids": ids_BQ,
        "attention_mask": mask_BS,
        "position_ids": position_BS[:, -ids_BQ.shape[1] :],
        name: cache,
        "use_cache": True,
        "logits_to_keep": 1,
    }
    takes = inspect.signature(placed.model.forward).parameters
    with torch.inference_mode():
        output = placed.model(**{key: value for key, value in arguments.items() if key in takes})
    return output.logits[:, -1].float().argmax(-1).tolist(), getattr(output, name)


def joined(batch: Batch | None, new: Batch) -> Batch:
    """Running requests and new ones as one batch."""
    if batch is None:
        return new
    length = max(batch.mask_BS.shape[1], new.mask_BS.shape[1])
    masks = [torch.nn.functional.pad(m, (length - m.shape[1], 0)) for m in (batch.mask_BS, new.mask_BS)]
    return Batch(
        batch.prompts + new.prompts,
        batch.generated + new.generated,
        join_caches(batch.cache, new.cache),
        torch.cat(masks),
        batch.done_B + new.done_B,
    )


def retire(batch: Batch | None, limits: Limits, rank: int) -> tuple[Batch | None, list[Completion]]:
    """Take finished requests out of the batch; None where nothing is left running."""
    if batch is None:
        return None, []
    reasons = [finish_reason(generated, limits) for generated in batch.generated]
    new = [row for row, reason in enumerate(reasons) if reason and not batch.done_B[row]]
    finished = [
        Completion(batch.prompts[r].index, batch.prompts[r].request_id, rank, batch.generated[r], reasons[r])
        for r in new
    ]
    if all(reasons):
        return None, finished
    if new and is_joinable(batch.cache):
        kept = [row for row, reason in enumerate(reasons) if not reason]
        mask = keep_requests(batch.cache, batch.mask_BS, torch.tensor(kept, device=batch.mask_BS.device))
        prompts, generated = [batch.prompts[r] for r in kept], [batch.generated[r] for r in kept]
        return Batch(prompts, generated, batch.cache, mask, [False] * len(kept)), finished
    batch.done_B = [bool(reason) for reason in reasons]
    return batch, finished


def finish_reason(generated: list[int], limits: Limits) -> str:
    """ "stop" or "length", empty while the request goes on."""
    if generated[-1] in limits.stop_ids:
        return "stop"
    return "length" if len(generated) >= limits.max_new_tokens else ""


class naming_memory:
    """Running out of memory inside the block becomes one line that names the rank and the batch."""

    def __init__(self, placed: PlacedModel, phase: str, chosen: list[Prompt], batch: Batch | None) -> None:
        self._rank, self._phase, self._chosen, self._batch = placed.group.rank, phase, chosen, batch

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if error is None or not is_out_of_memory(error):
            return
        if self._phase == "prefill":
            longest = max((len(p.token_ids) for p in self._chosen), default=0)
            what = f"reading {len(self._chosen)} prompts padded to {longest} tokens"
        else:
            what = f"extending {running_requests(self._batch)} requests"
        raise InputError(f"rank {self._rank} is out of memory {what}: lower --batch-tokens") from error
