"""What a replay runs: the rows of a trace, cut into batches, under every placement and schedule
that is compared.

Shape letters: T tokens, L MoE layers, K top-k, R ranks, E experts, S slots per rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from semmoe.profiles.errors import InputError
from semmoe.profiles.sample import sample_requests
from semmoe.profiles.split import request_keys
from semmoe.profiles.trace import RoutingTrace, TraceBatch
from semmoe.solvers.deployment import Deployment
from semmoe.solvers.evaluate.foreign_order import refuse_foreign_order
from semmoe.solvers.place.baselines import baselines
from semmoe.solvers.place.replicas import MovingRule
from semmoe.solvers.placement import Placement
from semmoe.solvers.plan import Plan
from semmoe.solvers.schedule.schedule import Schedule
from semmoe.solvers.schedule.simulate import available_schedules, simulate
from semmoe.solvers.schedule.windows import WINDOW
from semmoe.solvers.slots import Slots

SCHEDULES_OF = {"none": [], "dp": ["dp-scorer"], "tp": ["tp-context"]}


@dataclass(frozen=True, kw_only=True)
class ReplayOptions:
    """What the user asked for."""

    trace: str
    plan: str
    hidden_size: int
    expert_size: int = 0  # 0: no experts, rows come back as they are
    batch_tokens: int = 4096  # of all ranks together
    max_tokens: int = 65536
    replica_choice: str | None = None  # None: the plan's
    scheduler: str | None = None  # None: every one that the plan's tables allow
    backend: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    timeout_s: float = 300.0
    seed: int = 0
    write_hardware: Path | None = None  # measured exchanges and experts go there


class Case(NamedTuple):
    """One row of the result: where experts are, and where tokens live."""

    placement: str
    schedule: str
    experts_LRS: np.ndarray
    serving_LRE: np.ndarray
    moving: MovingRule | None  # what chooses copies token by token
    homes_TL: np.ndarray  # int16
    batch_of_T: np.ndarray  # int64


class Prepared(NamedTuple):
    """What every rank needs to know of the trace and the plan."""

    expert_ids_TLK: np.ndarray
    num_experts: int
    cases: list[Case]


def prepare(options: ReplayOptions, num_ranks: int, tell: Callable[[str], None]) -> Prepared:
    """Read trace and plan. Raises InputError where they do not fit each other or the ranks, and
    for sizes that experts cannot have."""
    unit = 4 if options.dtype in ("auto", "float32") else 8  # grouped matrix products take rows of whole 16 bytes
    if options.expert_size and (options.hidden_size % unit or options.expert_size % unit):
        sizes = f"--hidden-size {options.hidden_size} with --expert-size {options.expert_size}"
        raise InputError(f"{sizes}: expected multiples of {unit}, or --expert-size 0")
    plan, trace = Plan.load(options.plan).with_rule(options.replica_choice), RoutingTrace.open(options.trace)
    if plan.topology.num_ranks != num_ranks:
        raise InputError(f"{num_ranks} ranks run, the plan {options.plan} is for {plan.topology.num_ranks}")
    trace.require_tokens("replay")
    plan.model.check(trace.info, options.trace)
    schedules = {"plan": ["random", *chosen_schedules(options, plan)]}
    batch = sample_requests(
        [trace], [replayed_requests(plan, trace, tell)], max_tokens=options.max_tokens, seed=options.seed
    )
    if not batch.num_tokens:
        raise InputError(f"{options.trace} holds no rows to replay")
    refuse_foreign_order(plan, batch, trace.info, options.trace)
    for name, why in {**plan.unchecked, **trace.unchecked}.items():
        tell(f"{name} was not checked: {why}")
    if batch.num_tokens < trace.num_tokens:
        tell(f"replaying {batch.num_tokens:,} of {trace.num_tokens:,} tokens")
    cases = [
        make_case(options, plan, batch, name, placement, schedule)
        for name, placement in replayed_placements(plan).items()
        for schedule in schedules.get(name, ["random"])
    ]
    return Prepared(batch.expert_ids_TLK, trace.info.num_experts, cases)


def replayed_requests(plan: Plan, trace: RoutingTrace, tell: Callable[[str], None]) -> np.ndarray:
    """Requests to replay, bool [B]: those that the plan was not fitted on; all of them, and a
    word about it, where there are none."""
    unseen_B = ~np.isin(request_keys(trace.requests()), plan.fitted_keys)
    if not unseen_B.any():
        tell(
            f"the plan was fitted on every request of {trace.path}: its rows are fewer here than on new traffic; replay another trace, or "
            f"place with --no-refit"
        )
        return np.ones(trace.num_requests, bool)
    if num_seen := int((~unseen_B).sum()):
        tell(f"{num_seen} requests of {trace.path} were used to fit the plan and are left out")
    return unseen_B


def replayed_placements(plan: Plan) -> dict[str, Placement]:
    """The plan's placement and the two that need no co-activation, in as many slots."""
    beside = baselines(plan.load_LE, plan.topology, plan.model.n_group, slots=Slots.of(plan.placement))
    return {**beside, "plan": plan.placement}


def chosen_schedules(options: ReplayOptions, plan: Plan) -> list[str]:
    """Schedules to replay beside random homes. Raises InputError where the plan lacks the tables
    of one that was asked for."""
    schedule = Schedule.from_tables(plan.tables)
    available = available_schedules(schedule) if schedule else []
    if options.scheduler is None:
        return [name for names in SCHEDULES_OF.values() for name in names if name in available]
    if options.scheduler not in SCHEDULES_OF:
        raise InputError(f"--scheduler {options.scheduler}: expected one of {', '.join(SCHEDULES_OF)}")
    for name in SCHEDULES_OF[options.scheduler]:
        if name not in available:
            raise InputError(f"--scheduler {options.scheduler}: the plan {options.plan} has no tables for {name}")
    return SCHEDULES_OF[options.scheduler]


def make_case(
    options: ReplayOptions, plan: Plan, batch: TraceBatch, name: str, placement: Placement, schedule: str
) -> Case:
    """Homes and batches of every row under a schedule."""
    num_batches = max(1, -(-batch.num_tokens // options.batch_tokens))
    order = np.random.default_rng(options.seed).permutation(batch.num_tokens)
    batch_of_T = np.empty(batch.num_tokens, np.int64)
    tables = Schedule.from_tables(plan.tables)
    if schedule == "random":
        homes_TL = random_homes(order, num_batches, placement.num_ranks, placement.num_layers, seed=options.seed)
    else:
        assert tables is not None, "chosen_schedules names only what the tables allow"
        homes_TL = simulate(
            schedule, batch, placement, tables, batch_tokens=options.batch_tokens, window=WINDOW, seed=options.seed
        ).homes_TL
    if schedule.startswith("dp-"):
        # A rank takes its own requests' rows in nearly equal parts.
        for rank in range(placement.num_ranks):
            own = order[homes_TL[order, 0] == rank]
            batch_of_T[own] = np.arange(len(own)) * num_batches // max(len(own), 1)
    else:
        # The batches that equal slices were made in (solvers/schedule/simulate.py): the same order,
        # cut into the same parts.
        for number, rows in enumerate(np.array_split(order, num_batches)):
            batch_of_T[rows] = number
    serves = Deployment(placement, plan.load_LE, plan.topology, replica_choice=plan.replica_choice)
    return Case(name, schedule, placement.experts_LRS, serves.serving_LRE, serves.moving, homes_TL, batch_of_T)


def random_homes(order: np.ndarray, num_batches: int, num_ranks: int, num_layers: int, *, seed: int) -> np.ndarray:
    """Every batch dealt out at random in equal slices, int16 [T, L], another draw at each layer."""
    random = np.random.default_rng(seed + 1)
    homes_TL = np.empty((len(order), num_layers), np.int16)
    for rows in np.array_split(order, num_batches):
        for layer in range(num_layers):
            homes_TL[rows, layer] = random.permutation(len(rows)) % num_ranks
    return homes_TL


def largest_share(case: Case, rank: int) -> int:
    """Most rows that live on a rank in one batch and layer."""
    return max(
        (int(np.bincount(case.batch_of_T[homes_T == rank], minlength=1).max()) for homes_T in case.homes_TL.T),
        default=0,
    )
