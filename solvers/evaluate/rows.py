"""What held-out tokens pay under each placement and schedule: the sums behind the rows of a report,
in worker processes.

Shape letters: T tokens, L MoE layers, K top-k, B requests.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from semmoe.profiles.mapped import MappedView, mapped_copy, open_view, view_of
from semmoe.profiles.progress import Progress, unshown
from semmoe.profiles.sample import rows_of
from semmoe.profiles.trace import TraceBatch
from semmoe.solvers.deployment import Deployment
from semmoe.solvers.evaluate.metrics import Scores, score
from semmoe.solvers.evaluate.report import Key
from semmoe.solvers.evaluate.sums import TrafficSums, deployment_sums
from semmoe.solvers.schedule.fit import SMALL_TASK
from semmoe.solvers.schedule.schedule import Schedule
from semmoe.solvers.schedule.simulate import AS_SERVED, Setting, rows_that_run, served_homes, simulate, simulate_rows
from semmoe.solvers.workers import layer_map


class RowTask(NamedTuple):
    """Everything that one row needs; sent to a worker process."""

    schedule_name: str
    batch: TraceBatch
    ids_view: MappedView | None  # where the batch's expert ids lie for a worker process
    deployment: Deployment  # without its schedule, whose tables may lie in a file
    tables: dict[str, "np.ndarray | MappedView"]  # of the schedule
    setting: Setting
    group_of_B: np.ndarray
    domain_of_G: np.ndarray


class SummedRow(NamedTuple):
    """What came of one row."""

    sums: TrafficSums  # `TrafficSums.without_ranks`
    scores: Scores
    domain_scores: list[Scores | None]  # of each domain; None for one without a token


def summed_rows(
    rows: dict[Key, Deployment],
    batch: TraceBatch,
    setting: Setting,
    group_of_B: np.ndarray,
    domain_of_G: np.ndarray,
    *,
    processes: int = 1,
    progress: Progress | None = None,
) -> dict[Key, SummedRow]:
    """Sums and scores of each row, in order.

    Parameters:
        rows: what is deployed in each row. Schedule "random" is homes at random, exactly; of others
            (`semmoe.solvers.schedule.simulate`), homes are simulated by the deployment's tables.
        batch: the requests to sum over.
        setting: of the simulated schedules.
        group_of_B: group of every request, integers [B]; the sums of groups are kept apart.
        domain_of_G: domain of every group, integers [G] from 0.
        processes: worker processes; the sums do not depend on them.
    """
    processes = max(1, min(processes, len(rows), batch.expert_ids_TLK.size // SMALL_TASK + 1))
    schedule = next((deployed.schedule for deployed in rows.values() if deployed.schedule), None)
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
    plain = {id(deployed): replace(deployed, schedule=None) for deployed in rows.values()}
    # The last rows take longest, so they come first.
    order = list(rows)[::-1]
    tasks = (
        RowTask(
            name,
            batch,
            view,
            plain[id(rows[placement, name])],
            {} if name in ("random", AS_SERVED) else shared,
            setting,
            group_of_B,
            domain_of_G,
        )
        for placement, name in order
    )
    show, found = progress or unshown, {}

    def collect(made: Iterable[SummedRow]) -> None:
        for done, (key, row) in enumerate(zip(order, made, strict=True), 1):
            show(done, len(rows))
            found[key] = row

    if processes == 1:
        collect(map(summed_row, tasks))
    else:
        with layer_map(processes, next(iter(rows.values())).placement.num_experts) as run:
            collect(run(summed_row, tasks))
    del kept
    return {key: found[key] for key in rows}


def summed_row(task: RowTask) -> SummedRow:
    """One row, scored here: its sums by group, layer and rank are large, and its scores are not."""
    sums, imbalance = row_sums(task)
    topology, options = task.deployment.topology, {"dispatch": task.deployment.dispatch, "seed": task.setting.seed}
    scores = score(sums, topology, **options)
    if imbalance is not None:  # balance is kept within batches and windows: resampled requests do not speak of it
        scores.means["token_imbalance"] = imbalance
        scores.intervals["token_imbalance"] = (imbalance, imbalance)
    domain_scores: list[Scores | None] = []
    for domain in range(int(task.domain_of_G.max(initial=-1)) + 1):
        part = sums.of_groups(task.domain_of_G == domain)
        domain_scores.append(score(part, topology, **options) if part.tokens_G.any() else None)
    return SummedRow(sums.without_ranks(), scores, domain_scores)


def row_sums(task: RowTask) -> tuple[TrafficSums, float | None]:
    """Sums of one row, and its token imbalance where homes are simulated."""
    batch = task.batch if task.ids_view is None else replace(task.batch, expert_ids_TLK=open_view(task.ids_view))
    homes_TL = imbalance = None
    if task.schedule_name == AS_SERVED:
        num_ranks, window = task.deployment.placement.num_ranks, task.setting.window
        batch, known_B, (homes_TL, imbalance) = served_homes(batch, num_ranks, window=window)
        sums = deployment_sums(task.deployment, batch, homes_TL=homes_TL, group_of_B=task.group_of_B[known_B])
        return sums.widened(int(task.group_of_B.max()) + 1), imbalance
    if task.schedule_name != "random":
        tables = {k: a if isinstance(a, np.ndarray) else open_view(a) for k, a in task.tables.items()}
        schedule = Schedule.from_tables(tables)
        assert schedule is not None
        # Balance is kept within each batch or window, so that is where it is measured.
        placement = task.deployment.placement
        if (rows := rows_that_run(task.schedule_name, batch, placement, task.setting.seed)) is None:
            homes_TL, imbalance = simulate(task.schedule_name, batch, placement, schedule, **task.setting.sizes())
        else:
            homes_TL, imbalance = simulate_rows(task.schedule_name, batch, placement, schedule, task.setting, rows)
            batch = rows_of(batch, np.isin(np.arange(batch.num_tokens), rows))
    return deployment_sums(task.deployment, batch, homes_TL=homes_TL, group_of_B=task.group_of_B), imbalance
