"""What held-out tokens pay under each placement and schedule: the sums behind the rows of a report,
in worker processes.

Shape letters: T tokens, L MoE layers, E experts, R ranks.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import NamedTuple

import numpy as np

from semmoe.profiles.mapped import MappedView, mapped_copy, open_view, view_of
from semmoe.profiles.progress import Progress
from semmoe.profiles.trace import TraceBatch, TraceInfo
from semmoe.solvers.evaluate.metrics import TrafficSums, traffic_sums
from semmoe.solvers.place.replicas import serving_LRE
from semmoe.solvers.placement import Placement, Topology
from semmoe.solvers.schedule.fit import SMALL_TASK
from semmoe.solvers.schedule.schedule import Schedule
from semmoe.solvers.schedule.simulate import Setting, simulate
from semmoe.solvers.workers import layer_map

Row = tuple[str, str]  # placement, schedule


class RowTask(NamedTuple):
    """Everything that one row needs; sent to a worker process."""

    schedule_name: str
    batch: TraceBatch
    ids_view: MappedView | None  # where the batch's expert ids lie for a worker process
    info: TraceInfo
    placement: Placement
    load_LE: np.ndarray
    topology: Topology
    dispatch: str
    tables: dict[str, "np.ndarray | MappedView"]  # of the schedule
    setting: Setting
    group_of_B: np.ndarray


def summed_rows(
    rows: list[Row],
    placements: dict[str, Placement],
    batch: TraceBatch,
    info: TraceInfo,
    topology: Topology,
    *,
    load_LE: np.ndarray,
    dispatch: str,
    schedule: Schedule | None,
    setting: Setting,
    group_of_B: np.ndarray,
    processes: int = 1,
    progress: Progress | None = None,
) -> Iterator[tuple[Row, TrafficSums, float | None]]:
    """Sums of each row in order, and the token imbalance of those with a schedule; independent of
    `processes`.

    `group_of_B`: group of every request; the sums of groups are kept apart. Schedule "random" is
    homes at random, exactly; of others (`semmoe.solvers.schedule.simulate`), homes are simulated.
    """
    processes = max(1, min(processes, len(rows), batch.expert_ids_TLK.size // SMALL_TASK + 1))
    tables = {} if schedule is None else schedule.to_tables()
    shared: dict[str, np.ndarray | MappedView] = dict(tables)
    view, kept = None, []
    # Layer by layer, as it is read.
    ids_LTK = np.ascontiguousarray(batch.expert_ids_TLK.transpose(1, 0, 2))
    batch = replace(batch, expert_ids_TLK=ids_LTK.transpose(1, 0, 2))
    if processes > 1:
        ids_LTK = mapped_copy(ids_LTK)
        kept = [ids_LTK, *(mapped_copy(array) for array in tables.values())]  # as long as workers look at them
        shared = {name: view_of(array) or array for name, array in zip(tables, kept[1:], strict=True)}
        if (view := view_of(ids_LTK)) is not None:
            view = view_of(np.asarray(ids_LTK).transpose(1, 0, 2))
            batch = replace(batch, expert_ids_TLK=batch.expert_ids_TLK[:0])

    def task(placement: str, name: str) -> RowTask:
        its_tables = {} if name == "random" else shared
        about = (placements[placement], load_LE, topology, dispatch, its_tables, setting, group_of_B)
        return RowTask(name, batch, view, info, *about)

    def results(found: Iterator[tuple[TrafficSums, float | None]]) -> Iterator[tuple[Row, TrafficSums, float | None]]:
        for done, (row, (sums, imbalance)) in enumerate(zip(rows, found, strict=True), 1):
            if progress is not None:
                progress(done, len(rows))
            yield row, sums, imbalance

    tasks = (task(*row) for row in rows)
    if processes == 1:
        yield from results(map(row_sums, tasks))
        return
    with layer_map(processes, info.num_experts) as run:
        yield from results(run(row_sums, tasks))
    del kept


def row_sums(task: RowTask) -> tuple[TrafficSums, float | None]:
    """Sums of one row, and its token imbalance where homes are simulated."""
    batch = task.batch if task.ids_view is None else replace(task.batch, expert_ids_TLK=open_view(task.ids_view))
    homes_TL = imbalance = None
    if task.schedule_name != "random":
        tables = {k: a if isinstance(a, np.ndarray) else open_view(a) for k, a in task.tables.items()}
        schedule = Schedule.from_tables(tables)
        assert schedule is not None
        # Balance is kept within each batch or window, so that is where it is measured.
        homes_TL, imbalance = simulate(task.schedule_name, batch, task.placement, schedule, **asdict(task.setting))
    serving = serving_LRE(task.placement.hosts_LER, task.load_LE, task.topology)
    sums = traffic_sums(
        [batch],
        task.info,
        serving,
        task.topology,
        dispatch=task.dispatch,
        num_requests=batch.num_requests,
        homes=None if homes_TL is None else (lambda _: homes_TL),
        group_of_B=task.group_of_B,
    )
    return sums, imbalance
