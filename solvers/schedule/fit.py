"""Schedule of one placement, fitted on the sample of a profile, in worker processes by layers.

The same sample, placement and seed give the same tables on any number of processes.

Shape letters: L MoE layers, E experts, R ranks, V vocabulary, D embedding size.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from semmoe.profiles.errors import InputError
from semmoe.profiles.mapped import MappedView, mapped_empty, open_view, view_of
from semmoe.profiles.progress import Progress
from semmoe.profiles.trace import TraceBatch
from semmoe.solvers.placement import Placement
from semmoe.solvers.schedule.context import ContextPredictor, default_depth
from semmoe.solvers.schedule.context_fit import fit_context, training_rows
from semmoe.solvers.schedule.features import layers_first_rows
from semmoe.solvers.schedule.paper_table import build_sequence_table
from semmoe.solvers.schedule.request_scorer import fit_request_scorer
from semmoe.solvers.schedule.schedule import Schedule
from semmoe.solvers.schedule.token_fit import Shares, build_token_table, row_sizes
from semmoe.solvers.schedule.token_table import TokenTable
from semmoe.solvers.workers import layer_map, step_file, tell_step

SMALL_TASK = 20_000_000  # expert ids that one more process is worth starting for
SCORER_LAYERS = 8  # that take as long as the request scorer does


class Learned(NamedTuple):
    """What is fitted of layers beside their token table."""

    seed: int
    depth: int  # of the context; 0: nothing
    embedding_VD: np.ndarray | None


class LayersTask(NamedTuple):
    """Consecutive layers of a sample to fit, and the layers before them that give their context."""

    sample: TraceBatch  # its expert ids hold only the layers of this task, or nothing where `ids_view` does
    ids_view: MappedView | None  # where the expert ids lie for a worker process
    hosts_LER: np.ndarray
    skip: int
    learned: Learned
    steps_path: str | None = None  # of `step_file`
    shares: tuple[MappedView | None, ...] = ()  # of `Shares`: where a worker process puts the token table's rows


class ScorerTask(NamedTuple):
    """The requests to fit the request scorer on."""

    sample: TraceBatch
    ids_view: MappedView | None
    hosts_LER: np.ndarray
    seed: int


def fit_schedule(
    sample: TraceBatch,
    placement: Placement,
    *,
    seed: int,
    embedding_VD: np.ndarray | None = None,
    processes: int = 1,
    progress: Progress | None = None,
) -> Schedule:
    """Schedule for the placement, from the sample of a profile; independent of `processes`.

    Parameters:
        sample: rows of a trace, with expert ids uint8 or uint16 [T, L, K]
        seed: of the rows and requests that are fitted on where there are very many
        embedding_VD: float [V, D], the model's input embedding, for rare and unseen ids

    Raises:
        InputError: where the placement is for another model
    """
    hosts_LER, num_layers = placement.hosts_LER, sample.expert_ids_TLK.shape[1]
    if placement.num_layers != num_layers or sample.expert_ids_TLK.max(initial=0) > placement.num_experts:
        raise InputError(
            f"the placement is for {placement.num_layers} layers of {placement.num_experts} experts, the trace has "
            f"{num_layers} layers and expert id {sample.expert_ids_TLK.max(initial=0)}"
        )
    depth = default_depth(num_layers, placement.num_experts)
    processes = _processes(sample, processes)
    with step_file(progress, 2 * num_layers) as steps_path:
        learned = Learned(seed, depth, embedding_VD)
        rows = _shared_rows(sample, placement, embedding_VD, processes)
        parts = _layer_shares(num_layers, processes)
        first, *others = [
            _layers_task(sample, hosts_LER, part, processes, learned, steps_path)._replace(shares=_views(rows, part))
            for part in parts
        ]
        # The scorer comes before the share that leaves it room.
        scorer = ScorerTask(*_sendable(sample, slice(None), processes), hosts_LER, seed)
        *found, request, first_found = _fitted([*others, scorer, first], processes, placement.num_experts)
    parts = [first_found, *found]
    chosen = training_rows(sample, placement.num_ranks, seed)
    return Schedule(
        token=_with_rows(_joined([token for token, _ in parts]), rows),
        context=_joined([context for _, context in parts]),
        request=request,
        sequence=build_sequence_table(layers_first_rows(sample.expert_ids_TLK, chosen), hosts_LER),
    )


def recount_tokens(
    schedule: Schedule,
    sample: TraceBatch,
    placement: Placement,
    *,
    embedding_VD: np.ndarray | None = None,
    processes: int = 1,
    progress: Progress | None = None,
) -> Schedule:
    """The schedule with its token table counted on another sample, the rest as it is. Arguments as
    of `fit_schedule`."""
    num_layers, processes = placement.num_layers, _processes(sample, processes)
    with step_file(progress, num_layers) as steps_path:
        rows = _shared_rows(sample, placement, embedding_VD, processes)
        bounds = np.linspace(0, num_layers, processes + 1).astype(int).tolist()
        counted = Learned(0, 0, embedding_VD)
        tasks = [
            _layers_task(sample, placement.hosts_LER, part, processes, counted, steps_path)._replace(
                shares=_views(rows, part)
            )
            for part in zip(bounds[:-1], bounds[1:], strict=True)
        ]
        found = _fitted(tasks, processes, placement.num_experts)
    return replace(schedule, token=_with_rows(_joined([token for token, _ in found]), rows))


def _processes(sample: TraceBatch, processes: int) -> int:
    """As many as the sample is worth starting."""
    return max(1, min(processes, sample.expert_ids_TLK.shape[1], sample.expert_ids_TLK.size // SMALL_TASK))


def _layer_shares(num_layers: int, processes: int) -> list[tuple[int, int]]:
    """First layer of each process and the one after its last; the first share is smaller by what
    the scorer takes."""
    spared = SCORER_LAYERS if num_layers >= processes * SCORER_LAYERS and processes > 1 else 0
    bounds = np.linspace(-spared, num_layers, processes + 1).astype(int)
    bounds[0] = 0
    return list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))


def _shared_rows(
    sample: TraceBatch, placement: Placement, embedding_VD: np.ndarray | None, processes: int
) -> Shares | None:
    """Where all processes put the rows of a token table, in one mapped file; None for one process,
    and for rows that are few."""
    if processes == 1:
        return None
    layers_ranks, sizes_U = (placement.num_layers, placement.num_ranks), row_sizes(sample, embedding_VD)
    kinds = Shares.of(layers_ranks, sizes_U, lambda shape, dtype: np.broadcast_to(np.zeros((), dtype), shape))
    ends = np.cumsum([kind.size * kind.itemsize for kind in kinds]).tolist()
    held = mapped_empty((ends[-1],), np.dtype(np.uint8))
    if view_of(held) is None:
        return None
    held = np.asarray(held)
    parts = zip([0, *ends[:-1]], ends, kinds, strict=True)
    return Shares(*(held[start:end].view(kind.dtype).reshape(kind.shape) for start, end, kind in parts))


def _views(rows: Shares | None, layers: tuple[int, int]) -> tuple[MappedView | None, ...]:
    """Where the rows of some layers, first and one after the last, lie."""
    return () if rows is None else tuple(view_of(array[slice(*layers)]) for array in rows)


def _with_rows(token: TokenTable, rows: Shares | None) -> TokenTable:
    """The table whose rows were put there."""
    if rows is None:
        return token
    own = replace(token.own, shares_LUC=rows.own_LUC, ranks_LUC=rows.own_ranks_LUC)
    return replace(
        token, own=own, after=replace(token.after, shares_LUC=rows.after_LUC, ranks_LUC=rows.after_ranks_LUC)
    )


def _layers_task(
    sample: TraceBatch,
    hosts_LER: np.ndarray,
    share: tuple[int, int],
    processes: int,
    learned: Learned,
    steps_path: str | None,
) -> LayersTask:
    first, last = share
    skip = int(min(learned.depth, first))
    part, view = _sendable(sample, slice(first - skip, last), processes)
    return LayersTask(part, view, hosts_LER[first:last], skip, learned, steps_path)


def _fitted(tasks: Sequence[LayersTask | ScorerTask], processes: int, num_experts: int) -> list[Any]:
    if processes == 1:
        return [fit_part(task) for task in tasks]
    with layer_map(processes, num_experts) as run:
        return list(run(fit_part, tasks))


def _sendable(sample: TraceBatch, layers: slice, processes: int) -> tuple[TraceBatch, MappedView | None]:
    """The sample with some layers only, and where its expert ids lie instead where other
    processes can map them."""
    part = replace(sample, expert_ids_TLK=sample.expert_ids_TLK[:, layers])
    view = view_of(part.expert_ids_TLK) if processes > 1 else None
    return part if view is None else replace(part, expert_ids_TLK=part.expert_ids_TLK[:0]), view


def fit_part(task: LayersTask | ScorerTask) -> Any:
    """What a task asks for: tables of its layers, or the request scorer."""
    if isinstance(task, LayersTask):
        return fit_layers(task)
    sample = task.sample if task.ids_view is None else replace(task.sample, expert_ids_TLK=open_view(task.ids_view))
    return fit_request_scorer(sample, task.hosts_LER, seed=task.seed)


def fit_layers(task: LayersTask) -> tuple[TokenTable, ContextPredictor | None]:
    """Token table and context predictor of a task's layers; a table whose rows have a place
    elsewhere comes without them."""
    sample = task.sample if task.ids_view is None else replace(task.sample, expert_ids_TLK=open_view(task.ids_view))
    fitted = replace(sample, expert_ids_TLK=sample.expert_ids_TLK[:, task.skip :])
    step, (seed, depth, embedding_VD) = partial(tell_step, task.steps_path), task.learned
    into, context = None, None
    if task.shares:
        into = Shares(*(open_view(view, writable=True) for view in task.shares if view is not None))
    token = build_token_table(fitted, task.hosts_LER, embedding_VD=embedding_VD, into=into, step=step)
    if depth:
        context = fit_context(sample, token, task.hosts_LER, seed=seed, depth=depth, skip=task.skip, step=step)
    if into is not None:
        token = replace(token, own=token.own.of_no_layer(), after=token.after.of_no_layer())
    return token, context


def _joined(records: list[Any]) -> Any:
    """One record over all layers from records of consecutive layers: arrays that have a layer
    axis are joined along it."""
    if len(records) == 1:
        return records[0]
    values = {}
    for field in fields(records[0]):
        parts = [getattr(record, field.name) for record in records]
        if not isinstance(parts[0], np.ndarray):
            values[field.name] = _joined(parts)
        elif field.name.split("_")[-1].startswith("L") and parts[0].ndim:
            values[field.name] = np.concatenate(parts)
        else:
            values[field.name] = parts[0]
    return type(records[0])(**values)
