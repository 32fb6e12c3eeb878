"""A re-placement while a run serves: between two steps the ranks exchange the experts that move,
and go on under the new plan.

Layers come in the order of the delta. Requests that wait are assigned anew where the new plan
scores requests; running ones stay, where their keys and values are. What each later step saved is
counted: the same choices of the same tokens on the same ranks, under the tables of before.

Shape letters: L MoE layers, R ranks.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist

from semmoe.profiles.errors import InputError
from semmoe.runtime.layer.counters import Counters
from semmoe.runtime.layer.unmoved import Traffic, Unmoved
from semmoe.runtime.ranks.failures import naming
from semmoe.runtime.serving.batch import Prompt
from semmoe.runtime.serving.schedulers import assign
from semmoe.runtime.serving.token_homes import TokenHomes
from semmoe.runtime.transformers.expert_moves import move_experts
from semmoe.runtime.transformers.placed_model import PlacedModel, placed_tables
from semmoe.runtime.transformers.rank_parts import RankCheckpoint
from semmoe.solvers.placement import EMPTY, Placement
from semmoe.solvers.plan import Plan
from semmoe.solvers.replan.delta import Delta
from semmoe.solvers.replan.steps import Transfer, transfers_of
from semmoe.solvers.schedule.schedule import Schedule


class LayerSteps(NamedTuple):
    """What ranks send each other at one layer."""

    layer: int  # counted over MoE layers
    steps: list[list[Transfer]]  # in the checkpoint's own expert numbers


@dataclass(frozen=True, eq=False)
class ReplanTask:
    """What every rank is told of a re-placement."""

    after: int  # steps
    old: str  # fingerprint
    plan: Plan  # the new one, without what no rank needs
    placement: Placement  # of it, in the checkpoint's own expert numbers
    layers: list[LayerSteps]  # in the delta's order
    scheduler: str

    @property
    def moved(self) -> int:
        """Experts that ranks load."""
        return sum(len(sent) for _, steps in self.layers for sent in steps)


def replan_task(
    old: Plan, new: Plan, delta: Delta, checkpoint: RankCheckpoint, *, after: int, scheduler: str
) -> ReplanTask:
    """The task of a run under `old`, from which the delta leads to `new`. Raises InputError where
    ranks could not take its steps one after the other."""
    number_LE = None  # the checkpoint's own number of each expert
    if checkpoint.layout == "permuted":
        number_LE = np.argsort(old.placement.order_LE, axis=1)
    layers = []
    for layer in delta.layers:
        try:
            steps = transfers_of(old.placement.experts_LRS[layer.layer], [move.as_move() for move in layer.moves])
        except InputError as error:
            raise InputError(f"the delta cannot be carried out: layer {layer.layer}: {error}") from None
        if number_LE is not None:
            of_E = number_LE[layer.layer]
            steps = [[transfer._replace(expert=int(of_E[transfer.expert])) for transfer in sent] for sent in steps]
        if layer.moves:
            layers.append(LayerSteps(layer.layer, steps))
    placement = new.placement if number_LE is None else renumbered(new.placement, number_LE)
    return ReplanTask(after, old.fingerprint, new, placement, layers, scheduler)


def renumbered(placement: Placement, number_LE: np.ndarray) -> Placement:
    """The placement with other numbers for its experts, int [L, E]."""
    experts_LRS = placement.experts_LRS
    rows = np.arange(len(experts_LRS))[:, None, None]
    return Placement(
        np.where(experts_LRS == EMPTY, EMPTY, number_LE[rows, experts_LRS]).astype(np.int32), placement.num_experts
    )


@dataclass(frozen=True, eq=False)
class StepRecord:
    """One step of this rank; traffic only of steps after the move."""

    phase: str
    seconds: float
    rows: int = 0  # that left this rank
    served_L: np.ndarray | None = None  # int64, choices that it served
    before: Traffic | None = None  # of its own tokens, had no expert moved


@dataclass(frozen=True, eq=False)
class Done:
    """What one rank did; `layers`: seconds, and bytes that came, of each layer in the delta's
    order."""

    steps: list[StepRecord]
    layers: list[tuple[float, int]]
    moved_after: int | None  # steps that had run; None: it came to no move


@dataclass(eq=False)
class LiveReplan:
    """The re-placement of a run as it goes: `move` once it is due, `took` after every step."""

    task: ReplanTask
    placed: PlacedModel
    prompts: list[Prompt]  # of all ranks
    max_new_tokens: int
    homes: TokenHomes | None  # of Attention-TP
    tell: Callable[[str], None]
    steps: list[StepRecord] = field(default_factory=list)
    layers: list[tuple[float, int]] = field(default_factory=list)
    moved_after: int | None = None
    unmoved: Unmoved | None = None
    counted: tuple[int, np.ndarray] | None = None  # rows and served choices so far

    @property
    def due(self) -> bool:
        """Whether experts move before the next step."""
        return self.moved_after is None and len(self.steps) >= self.task.after

    def move(self, pending: deque[Prompt]) -> deque[Prompt]:
        """Exchange the experts and take the new plan's tables; what then waits on this rank. Every
        rank calls it. Raises ExchangeError where a rank is gone."""
        placed, task = self.placed, self.task
        if placed.group.rank == 0:
            self.tell(f"after {len(self.steps)} steps: {task.moved} experts move, in {len(task.layers)} layers")
        self.moved_after = len(self.steps)
        before_L = [layer.tables for layer in placed.layers]
        self.unmoved = Unmoved(before_L, placed.group.rank, placed.group.size)
        tables_L = placed_tables(task.placement, task.plan, [tables.name for tables in before_L], placed.group)
        for number, steps in task.layers:
            begun = time.perf_counter()
            received = move_experts(placed, number, steps)
            self.layers.append((time.perf_counter() - begun, received))
        # Which copy serves follows the new plan's loads, also where no expert moved.
        for layer, tables in zip(placed.layers, tables_L, strict=True):
            layer.tables = tables
        placed.state.unmoved = self.unmoved.saw
        if self.homes is not None:
            self.homes.follow(Schedule.from_tables(task.plan.tables), task.plan.placement)
        self.counted = _counted(placed.state.counters)
        return self._reassigned(pending)

    def took(self, phase: str, seconds: float) -> None:
        """A step is over."""
        if self.unmoved is None or self.counted is None:
            self.steps.append(StepRecord(phase, seconds))
            return
        rows, served_L = _counted(self.placed.state.counters)
        record = StepRecord(phase, seconds, rows - self.counted[0], served_L - self.counted[1], self.unmoved.counted())
        self.steps.append(record)
        self.counted = rows, served_L

    def done(self) -> Done:
        return Done(self.steps, self.layers, self.moved_after)

    def _reassigned(self, pending: deque[Prompt]) -> deque[Prompt]:
        """Requests that wait on any rank, dealt out by the new plan's scorer; this rank's."""
        task, group = self.task, self.placed.group
        if task.scheduler != "dp" or task.plan.request_scorer is None:
            return pending
        waiting_R: list[Any] = [None] * group.size
        with naming(group.rank, "the agreement on requests that wait"):
            dist.all_gather_object(waiting_R, [prompt.index for prompt in pending], group=group.handle)
        waits = {index for waiting in waiting_R for index in waiting}
        prompts = [prompt for prompt in self.prompts if prompt.index in waits]
        ids = [prompt.token_ids for prompt in prompts]
        rank_of_B = assign("dp", ids, task.plan, max_new_tokens=self.max_new_tokens)
        return deque(prompt for prompt, rank in zip(prompts, rank_of_B, strict=True) if rank == group.rank)


def _counted(counters: Counters) -> tuple[int, np.ndarray]:
    return int(counters.rows_LR.sum()), counters.served_L.copy()


def replan_metrics(
    task: ReplanTask, done_R: list[Done], row_bytes: int, model_layers: tuple[int, ...]
) -> dict[str, Any]:
    """The JSON object of a re-placement (docs/formats.md, "run"). `row_bytes`: of a row out and
    back."""
    first = done_R[0]
    found: dict[str, Any] = {"after": first.moved_after, "asked_after": task.after, "old": task.old}
    found |= {"new": task.plan.fingerprint, "experts_moved": task.moved if first.moved_after is not None else 0}
    seconds_L = np.array([[seconds for seconds, _ in done.layers] for done in done_R]).reshape(len(done_R), -1).max(0)
    bytes_L = (
        np.array([[count for _, count in done.layers] for done in done_R], np.int64).reshape(len(done_R), -1).sum(0)
    )
    found |= {"seconds": float(seconds_L.sum()), "bytes": int(bytes_L.sum())}
    found["layers"] = [
        {"model_layer": model_layers[number], "experts_moved": sum(map(len, steps)), "seconds": seconds, "bytes": size}
        for (number, steps), seconds, size in zip(task.layers, seconds_L.tolist(), bytes_L.tolist(), strict=False)
    ]
    split = len(first.steps) if first.moved_after is None else first.moved_after
    found["seconds_per_step"] = {
        phase: {
            "before": _median([step.seconds for step in first.steps[:split] if step.phase == phase]),
            "after": _median([step.seconds for step in first.steps[split:] if step.phase == phase]),
        }
        for phase in ("prefill", "decode")
    }
    steps = [
        _saved(split + i, row_R, row_bytes)
        for i, row_R in enumerate(zip(*(d.steps[split:] for d in done_R), strict=True))
    ]
    found |= {name: sum(step[name] for step in steps) for name in ("rows_saved", "bytes_saved")}
    return found | {"steps": steps}


def _saved(number: int, step_R: tuple[StepRecord, ...], row_bytes: int) -> dict[str, Any]:
    """What one step saved, all ranks together."""
    before_R = [step.before for step in step_R if step.before is not None]
    rows, before = sum(step.rows for step in step_R), sum(traffic.rows for traffic in before_R)
    served_LR = np.stack([step.served_L for step in step_R if step.served_L is not None], axis=1)
    before_LR = np.sum([traffic.pairs_LR for traffic in before_R], axis=0)
    return {
        "step": number,
        "phase": step_R[0].phase,
        "seconds": step_R[0].seconds,
        "rows_sent": rows,
        "rows_saved": before - rows,
        "bytes_saved": (before - rows) * row_bytes,
        "load_imbalance": _imbalance(served_LR),
        "load_imbalance_before": _imbalance(before_LR),
    }


def _imbalance(load_LR: np.ndarray) -> float:
    """Busiest rank over the mean, mean over layers."""
    return float((load_LR.max(1) / np.maximum(load_LR.mean(1), 1e-12)).mean())


def _median(values: list[float]) -> float | None:
    return float(np.median(values)) if values else None
