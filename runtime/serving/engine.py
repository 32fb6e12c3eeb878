"""Lockstep continuous batching: every rank serves its own requests, and all ranks go through the
expert layers together.

In each step the ranks agree on one phase. A step reads prompts where any rank has room for some;
otherwise it extends every running request by one token. A rank without work in a step still joins
the collectives of every expert layer (PlacedModel.join_empty), so requests may differ in length and
ranks in number of requests. Batches are padded on the left (runtime/serving/batch.py); padding is
never dispatched. The naive loop that proves it, one request at a time in one process, is in
runtime/serving/check.py.

Shape letters: B requests of a batch, S positions (padding included), R ranks.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from semmoe.profiles.errors import InputError
from semmoe.runtime.ranks.failures import is_out_of_memory, naming
from semmoe.runtime.ranks.group import Group
from semmoe.runtime.serving.batch import (
    Batch,
    Completion,
    Limits,
    Prompt,
    has_room,
    joined,
    padded,
    retire,
    take_prompts,
)
from semmoe.runtime.serving.replan import LiveReplan
from semmoe.runtime.serving.tensor_parallel import ShuffledModel
from semmoe.runtime.transformers.forward import last_logits
from semmoe.runtime.transformers.placed_model import PlacedModel


@dataclass(eq=False)
class PhaseTimes:
    """Wall-clock seconds and own tokens of the two phases."""

    seconds: dict[str, float] = field(default_factory=lambda: {"prefill": 0.0, "decode": 0.0})
    tokens: dict[str, int] = field(default_factory=lambda: {"prefill": 0, "decode": 0})


class Wants(NamedTuple):
    """What a rank tells the others before a step."""

    reads: bool  # it has prompts, and room for one
    runs: bool
    finished: int  # requests that wait to be delivered


def serve(
    placed: PlacedModel,
    prompts: list[Prompt],
    limits: Limits,
    *,
    deliver: Callable[[list[Completion]], None],
    shuffled: ShuffledModel | None = None,
    live: LiveReplan | None = None,
) -> PhaseTimes:
    """Serve this rank's prompts in step with the other ranks; every rank calls it.

    Parameters:
        prompts: those of this rank; with `shuffled`, all ranks have the same.
        deliver: gets the completions of all ranks on rank 0, soon after they are there.
        shuffled: Attention-TP around `placed`; rank 0 then speaks for all.
        live: a re-placement between two of the steps.

    Returns:
        Seconds and tokens of this rank. Raises ExchangeError where a collective fails, InputError
        where memory runs out.
    """
    group, watch, steps = placed.group, placed.state.stopwatch, shuffled or placed
    speaks = shuffled is None or group.rank == 0
    pending, batch, finished = deque(prompts), None, []
    times = PhaseTimes()
    watch.start()
    while True:
        # 1. All ranks tell what they want; finished requests go to rank 0.
        reads = bool(pending) and has_room(batch, limits)
        wants_R = agree(Wants(reads, batch is not None, len(finished)), group)
        watch.mark("wait")
        if any(wants.finished for wants in wants_R):
            collect(finished, group, deliver)
            finished = []
        # 2. One phase for all: prompts are read wherever somebody can.
        if not any(wants.reads or wants.runs for wants in wants_R):
            return times
        if live is not None and live.due:
            pending = live.move(pending)
            continue
        begun = time.perf_counter()
        phase = "prefill" if any(wants.reads for wants in wants_R) else "decode"
        chosen = take_prompts(pending, batch, limits) if phase == "prefill" and reads else []
        watch.start()
        # 3. One forward pass, or its collectives alone.
        running = 0 if batch is None else batch.running
        with naming_memory(group.rank, phase, chosen, running):
            if chosen:
                batch = joined(batch, prefill(placed, steps, chosen))
            elif phase == "decode" and batch is not None:
                decode(placed, steps, batch)
            else:
                placed.join_empty()
        # 4. Finished requests leave the batch.
        batch, stopped = retire(batch, limits, group.rank)
        steps.forget([completion.index for completion in stopped])
        finished += stopped if speaks else []
        watch.mark("attention")
        seconds = time.perf_counter() - begun
        times.seconds[phase] += seconds
        if speaks:
            times.tokens[phase] += sum(len(p.token_ids) for p in chosen) if phase == "prefill" else running
        if live is not None:
            live.took(phase, seconds)


def agree(wants: Wants, group: Group) -> list[Wants]:
    """What every rank wants, by rank."""
    mine = torch.tensor(wants, dtype=torch.int64, device=group.device if group.backend == "nccl" else "cpu")
    gathered = [torch.empty_like(mine) for _ in range(group.size)]
    with naming(group.rank, "the agreement on the next step"):
        dist.all_gather(gathered, mine, group=group.handle)
        return [Wants(bool(reads), bool(runs), count) for reads, runs, count in torch.stack(gathered).tolist()]


def collect(finished: list[Completion], group: Group, deliver: Callable[[list[Completion]], None]) -> None:
    """Bring the completions of all ranks to rank 0."""
    gathered: list[Any] | None = [None] * group.size if group.rank == 0 else None
    with naming(group.rank, "the delivery of finished requests"):
        dist.gather_object(finished, gathered, dst=0, group=group.handle)
    if gathered is not None:
        deliver([completion for part in gathered for completion in part])


def prefill(placed: PlacedModel, steps: PlacedModel | ShuffledModel, prompts: list[Prompt]) -> Batch:
    """Read prompts; the batch then holds the first generated token of each."""
    ids_BS, padded_BS = padded(prompts)
    kept_T = None if padded_BS.all() else np.flatnonzero(padded_BS)
    mask_BS = torch.from_numpy(padded_BS).to(placed.group.device)
    steps.begin(ids_BS, kept_T, [prompt.index for prompt in prompts], is_prompt=True)
    tokens, cache = next_tokens(placed, ids_BS, mask_BS, None)
    steps.finish()
    return Batch(list(prompts), [[token] for token in tokens], cache, mask_BS, [False] * len(prompts))


def decode(placed: PlacedModel, steps: PlacedModel | ShuffledModel, batch: Batch) -> None:
    """Extend every running request of `batch` by one token."""
    ids_B1 = np.array([generated[-1:] for generated in batch.generated])
    kept_T = np.flatnonzero(~np.array(batch.done_B)) if any(batch.done_B) else None
    batch.mask_BS = torch.nn.functional.pad(batch.mask_BS, (0, 1), value=1)
    steps.begin(ids_B1, kept_T, [prompt.index for prompt in batch.prompts], is_prompt=False)
    tokens, batch.cache = next_tokens(placed, ids_B1, batch.mask_BS, batch.cache)
    steps.finish()
    for generated, token, done in zip(batch.generated, tokens, batch.done_B, strict=True):
        if not done:
            generated.append(token)


def next_tokens(placed: PlacedModel, ids_BQ: np.ndarray, mask_BS: torch.Tensor, cache: Any) -> tuple[list[int], Any]:
    """The most likely next token of each request after the last Q of S positions, and the cache."""
    ids = torch.from_numpy(ids_BQ).to(placed.group.device)
    position_BS = (mask_BS.cumsum(1) - 1).clamp_(min=0)
    with torch.inference_mode():
        position_BQ = position_BS[:, -ids.shape[1] :]
        logits_BV, cache = last_logits(placed.model, ids, cache, mask_BS=mask_BS, position_BQ=position_BQ)
    return logits_BV.argmax(-1).tolist(), cache


@contextmanager
def naming_memory(rank: int, phase: str, chosen: list[Prompt], running: int) -> Iterator[None]:
    """Running out of memory inside the block becomes one line that names the rank and the batch."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        what = f"extending {running} requests"
        if phase == "prefill":
            longest = max((len(p.token_ids) for p in chosen), default=0)
            what = f"reading {len(chosen)} prompts padded to {longest} tokens"
        raise InputError(f"rank {rank} is out of memory {what}: lower --batch-tokens") from error
