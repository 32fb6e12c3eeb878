"""Time of placements and schedules on held-out requests: batches sampled as they will run, counted
under each placement, turned into microseconds, compared on the same batches and resampled requests.

What is averaged is the maximum over ranks of every batch and layer, never the other way round.

Shape letters: L MoE layers, R ranks, M batches, X resamples of requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from semmoe.profiles.errors import InputError
from semmoe.profiles.split import domain_groups
from semmoe.profiles.trace import TraceBatch
from semmoe.solvers.deployment import Deployment
from semmoe.solvers.evaluate.report import Key, Report
from semmoe.solvers.evaluate.time_report import DomainTime, TimedRow, TimeReport
from semmoe.solvers.evaluate.verdict import beside_time
from semmoe.solvers.place.replicas import MovingRule
from semmoe.solvers.placement import Placement, Topology
from semmoe.solvers.schedule.schedule import Schedule
from semmoe.solvers.schedule.simulate import DP_SCHEDULES, TP_SCHEDULES, Setting, available_schedules, simulate
from semmoe.solvers.schedule.slices import assign_equal_slices
from semmoe.solvers.time.batches import Pool, homes_of_requests, pool_of, random_homes
from semmoe.solvers.time.counted import Counted, Drawn, HomesOfLayer, Served, count_batches, count_drawn
from semmoe.solvers.time.hardware import Costing, TimeAsked, nodes_of_ranks, resolve
from semmoe.solvers.time.judge import compare_times
from semmoe.solvers.time.moe_layer import batch_tokens, layer_times

BATCH_IDS = 30_000_000  # choices of the batches that are averaged
RESAMPLED_IDS = 90_000_000  # of those behind intervals
LEAST_BATCHES, MOST_BATCHES = 8, 128
LEAST_RESAMPLES, MOST_RESAMPLES = 40, 100
PER_RESAMPLE = 6  # batches of one resample, at most
SCHEDULED_BATCHES = 4  # of schedules that no engine runs
LEAST_LAYERS = 6
PLAN = "plan"


@dataclass(frozen=True, eq=False)
class Sampled:
    """Batches of a trace, and what they are drawn from."""

    batch: TraceBatch
    ids_LTK: np.ndarray  # of the layers that are timed
    layers: np.ndarray  # their numbers
    pool: Pool
    drawn: Drawn  # batches at random homes
    drawn_XB: list[np.ndarray]  # requests of each resample
    per_resample: int
    resampled: Drawn  # their batches, resample by resample

    @property
    def rows_MJ(self) -> np.ndarray:
        return self.drawn.rows_MJ

    @property
    def resampled_MJ(self) -> np.ndarray:
        return self.resampled.rows_MJ


def timed_report(
    report: Report,
    deployment: Deployment,
    beside: dict[str, Deployment],
    batch: TraceBatch,
    asked: TimeAsked,
    against: str = "",
) -> Report:
    """The report of a deployment with its times beside those of others at random homes, and its
    verdict by bytes set beside that by time. `batch`: the requests of the report. `against`: which
    of the others the verdict takes, "": the faster."""
    options = {"setting": report.setting, "against": against or None}
    time = predict({PLAN: deployment, **beside}, batch, report.model, asked, **options)
    return replace(report, time=time, verdict=report.verdict and beside_time(report.verdict))


def predict(
    deployments: dict[str, Deployment],
    batch: TraceBatch,
    model: str,
    asked: TimeAsked,
    *,
    setting: Setting,
    against: str | None = None,
) -> TimeReport:
    """Times of deployments by name, "plan" among them for a comparison with the better of the
    others (or with `against`).

    Parameters:
        batch: requests that none of them was fitted on.
        model: its name or path, for its sizes.
        setting: of simulated schedules, and the seed.

    Raises InputError where the time cannot be known.
    """
    costing, topology, sizes = _costing(deployments, batch, model, asked)
    num_layers = batch.expert_ids_TLK.shape[1]
    sampled = sample(batch, costing, sizes, setting.seed)
    counted: dict[Key, Counted] = {}
    resampled: dict[Key, Counted] = {}
    for name, deployed in deployments.items():
        counted[name, "random"] = count_drawn(served(deployed, sampled, costing), sampled.drawn)
        resampled[name, "random"] = count_drawn(served(deployed, sampled, costing), sampled.resampled)
        if deployed.schedule is None:
            continue
        for schedule in available_schedules(deployed.schedule):
            if schedule == "random" or "oracle" in schedule or schedule == "tp-learning":
                continue
            both = _scheduled(deployed, schedule, sampled, costing, setting)
            counted[name, schedule] = both[0]
            if both[1] is not None:
                resampled[name, schedule] = both[1]
    rows = [timed_row(key, counted, resampled, costing, topology.num_ranks) for key in counted]
    report = TimeReport(
        hardware=costing.hardware,
        backend=costing.backend,
        phase=costing.phase,
        tokens_per_rank=costing.tokens_per_rank,
        overlap=asked.overlap,
        engine=asked.engine,
        parameters=[*(p.to_json() for p in costing.parameters.values()), *_said(costing)],
        rows=[_with_share(row, asked, num_layers) for row in rows],
        saved=None,
        break_even_imbalance=None,
        sensitivity=None,
        verdict=None,
        batches=len(sampled.rows_MJ),
        resamples=len(sampled.drawn_XB),
        layers=len(sampled.layers),
        notes=[note for note in (*costing.notes, sampled.pool.note) if note],
    )
    if PLAN not in deployments or len(deployments) < 2:
        return report
    judged = compare_times(report, counted, resampled, costing, (topology.num_ranks, num_layers), against)
    return replace(judged, domains=_by_domain(judged, deployments, sampled, costing, setting.seed))


def _by_domain(
    report: TimeReport, deployments: dict[str, Deployment], sampled: Sampled, costing: Costing, seed: int
) -> list[DomainTime]:
    """What the plan saves in batches of each domain's requests; nothing where there is one.

    Of a domain with fewer tokens than a batch all tokens are counted, and the counts scaled.
    """
    assert report.saved is not None
    pool, num_ranks = sampled.pool, deployments[PLAN].topology.num_ranks
    names, domain_of_B = domain_groups([sampled.batch.domains[b] for b in pool.request_of_pool])
    if len(names) < 2:
        return []
    size, found = num_ranks * batch_tokens(costing), []
    most = BATCH_IDS // (len(sampled.layers) * sampled.ids_LTK.shape[2])
    both = [served(deployments[name], sampled, costing) for name in (report.saved.against, PLAN)]
    for number, name in enumerate(names):
        requests = np.flatnonzero(domain_of_B == number)
        rows = np.concatenate([pool.rows_B[b] for b in requests])
        tokens = min(size, len(rows) - len(rows) % num_ranks)
        if not tokens:
            continue
        num_batches, factor = max(1, min(len(rows), most) // size), size / tokens
        chosen = np.random.default_rng([seed, number]).permutation(rows)[: num_batches * tokens]
        times, imbalance = [], 1.0
        for where in both:
            counts = count_batches(where._replace(tile=1) if factor > 1 else where, chosen.reshape(num_batches, -1))
            grown = layer_times(counts.of_larger(factor), costing, costing.values, num_ranks)
            times.append(float(grown.total_ML.mean()))
            imbalance = float((counts.rows_MLR.max(2) / np.maximum(counts.rows_MLR.mean(2), 1e-300)).mean())
        found.append(DomainTime(name, len(requests), len(rows), times[1], 1 - times[1] / times[0], imbalance))
    return found


def total_us(
    deployments: dict[str, Deployment], batch: TraceBatch, *, model: str, asked: TimeAsked, setting: Setting
) -> dict[str, float]:
    """Microseconds per layer of deployments at random homes, by name."""
    costing, topology, sizes = _costing(deployments, batch, model, asked)
    sampled = sample(batch, costing, sizes, setting.seed, intervals=False)
    found = {}
    for name, deployed in deployments.items():
        counts = count_drawn(served(deployed, sampled, costing), sampled.drawn)
        found[name] = float(layer_times(counts, costing, costing.values, topology.num_ranks).total_ML.mean())
    return found


def _costing(
    deployments: dict[str, Deployment], batch: TraceBatch, model: str, asked: TimeAsked
) -> tuple[Costing, Topology, tuple[int, int]]:
    """What turns counts into time, the ranks, and their number and that of experts."""
    first = next(iter(deployments.values()))
    topology, placement = first.topology, first.placement
    facts = (model, placement.num_layers, placement.num_experts, batch.expert_ids_TLK.shape[2])
    prompts = float(batch.is_prompt_T.mean()) if batch.num_tokens else 0.0
    costing = resolve(asked, facts, num_ranks=topology.num_ranks, num_nodes=topology.num_nodes, prompts=prompts)
    return costing, topology, (topology.num_ranks, placement.num_experts)


def _said(costing: Costing) -> list[dict[str, object]]:
    shape = costing.shape
    sizes = {"hidden": shape.hidden, "expert": shape.expert, "shared": shape.shared}
    return [
        *({"name": f"model.{name}", "value": value, "source": shape.source} for name, value in sizes.items()),
        {"name": "rows", "value": costing.asked.rows, "source": "--rows"},
        {"name": "weights", "value": costing.weights, "source": "--weights" if costing.asked.weights else shape.source},
    ]


def sample(
    batch: TraceBatch, costing: Costing, sizes: tuple[int, int], seed: int, *, intervals: bool = True
) -> Sampled:
    """Batches of the phase at random homes, and of resampled requests, of one where no `intervals`
    are asked for. `sizes`: ranks and experts. Raises InputError where there is no token."""
    pool = pool_of(batch, costing.phase)
    if pool.num_requests == 0:
        raise InputError("no token is left to time a batch of")
    rng = np.random.default_rng(seed)
    size = (sizes[0], batch_tokens(costing))
    _, num_layers, top_k = batch.expert_ids_TLK.shape
    per_layer = size[0] * size[1] * top_k
    most_layers = max(LEAST_LAYERS, BATCH_IDS // (LEAST_BATCHES * per_layer))
    layers = np.unique(np.linspace(0, num_layers - 1, min(num_layers, most_layers)).round().astype(np.int64))
    ids = per_layer * len(layers)
    num_batches = int(np.clip(BATCH_IDS // ids, LEAST_BATCHES, MOST_BATCHES))
    everyone = np.arange(pool.num_requests)
    rows_MJ = np.stack([random_homes(pool, everyone, size, costing.phase, rng) for _ in range(num_batches)])
    num_resamples = int(np.clip(RESAMPLED_IDS // ids, LEAST_RESAMPLES, MOST_RESAMPLES)) if intervals else 1
    per_resample = int(np.clip(RESAMPLED_IDS // (ids * num_resamples), 1, PER_RESAMPLE)) if intervals else 1
    drawn_XB = [rng.integers(0, pool.num_requests, pool.num_requests) for _ in range(num_resamples)]
    resampled = [random_homes(pool, drawn, size, costing.phase, rng) for drawn in drawn_XB for _ in range(per_resample)]
    ids_LTK = np.ascontiguousarray(batch.expert_ids_TLK[:, layers].transpose(1, 0, 2))
    drawn, again = (Drawn.of(rows, ids_LTK, *sizes) for rows in (rows_MJ, np.stack(resampled)))
    return Sampled(batch, ids_LTK, layers, pool, drawn, drawn_XB, per_resample, again)


def served(deployment: Deployment, sampled: Sampled, costing: Costing) -> Served:
    """A deployment as a count needs it."""
    topology = deployment.topology
    node_R = nodes_of_ranks(topology.num_ranks, topology.ranks_per_node, topology.num_nodes, costing.domain)
    tile = int(costing.values["experts.tile"])
    moving = deployment.moving
    if moving is not None:
        moving = MovingRule(moving.name, moving.hosts_LER[sampled.layers], moving.serving_LRE[sampled.layers])
    serving_LRE = deployment.serving_LRE[sampled.layers]
    return Served(sampled.ids_LTK, serving_LRE, node_R, costing.kind, tile, moving, costing.own_first)


def _scheduled(
    deployed: Deployment, name: str, sampled: Sampled, costing: Costing, setting: Setting
) -> tuple[Counted, Counted | None]:
    """Counts of batches under a schedule, and of resampled requests where an engine runs it."""
    found, rng = served(deployed, sampled, costing), np.random.default_rng(setting.seed)
    schedule = deployed.schedule
    assert schedule is not None
    if name in DP_SCHEDULES:
        size = (deployed.topology.num_ranks, batch_tokens(costing))
        homes_TL = simulate(
            name,
            sampled.batch,
            deployed.placement,
            schedule,
            batch_tokens=setting.batch_tokens,
            window=setting.window,
            seed=setting.seed,
        ).homes_TL
        homes_B = np.array([homes_TL[rows[0], 0] for rows in sampled.pool.rows_B], np.int64)

        def counts(requests_MB: Sequence[np.ndarray]) -> Counted:
            options = (size, costing.phase, homes_B, rng)
            rows_MJ = np.stack([homes_of_requests(sampled.pool, requests, *options) for requests in requests_MB])
            return count_drawn(found, Drawn.of(rows_MJ, sampled.ids_LTK, size[0], found.serving_LRE.shape[2]))

        everyone = [np.arange(len(homes_B))] * len(sampled.rows_MJ)
        if not costing.deployable(name):
            return counts(everyone), None
        return counts(everyone), counts([b for b in sampled.drawn_XB for _ in range(sampled.per_resample)])
    rows_MJ = sampled.rows_MJ[:SCHEDULED_BATCHES]
    homes = _sliced(name, sampled, deployed.placement, schedule, rows_MJ, rng)
    return count_batches(found, rows_MJ, homes), None


def _sliced(
    name: str,
    sampled: Sampled,
    placement: Placement,
    schedule: Schedule,
    rows_MJ: np.ndarray,
    rng: np.random.Generator,
) -> HomesOfLayer:
    """Homes of Attention-TP: equal slices of every batch by the schedule's scores."""
    scores = TP_SCHEDULES[name](sampled.batch, placement, schedule, rng)

    def homes_MJ(layer: int) -> np.ndarray:
        scores_TR = scores(int(sampled.layers[layer]))
        return np.stack([assign_equal_slices(scores_TR[rows_J]) for rows_J in rows_MJ])

    return homes_MJ


def timed_row(
    key: Key, counted: dict[Key, Counted], resampled: dict[Key, Counted], costing: Costing, num_ranks: int
) -> TimedRow:
    """Time of a row, from its counts."""
    counts = counted[key]
    times = layer_times(counts, costing, costing.values, num_ranks)
    total_M = times.total_ML.mean(1)
    by_card = (
        counts.nic_ML.any()
        and (counts.nic_ML / costing.values.get("nic", 1.0)).mean()
        > (counts.nvl_ML / costing.values.get("nvl", 1.0)).mean()
    )
    busiest, mean = (counts.nic_ML, counts.nic_mean_ML) if by_card else (counts.nvl_ML, counts.nvl_mean_ML)
    link = float(times.link_ML.mean())
    experts = float(times.experts_ML.mean())
    work = {"latency": times.latency, "link": link - _of_exchanges(times.latency, costing), "experts": experts}
    us = {
        "dispatch": float(times.dispatch_ML.mean()),
        "experts": experts,
        "combine": float(times.combine_ML.mean()),
        "total": float(total_M.mean()),
        "median": float(np.median(total_M)),
        "p95": float(np.quantile(total_M, 0.95)),
    }
    imbalance = {
        "experts": float((counts.rows_MLR.max(2) / np.maximum(counts.rows_MLR.mean(2), 1e-300)).mean()),
        "link": float((busiest / np.maximum(mean, 1e-300)).mean()) if mean.any() else 1.0,
    }
    ci = None
    if key in resampled:
        totals_M = layer_times(resampled[key], costing, costing.values, num_ranks).total_ML.mean(1)
        low, high = np.quantile(totals_M, [0.025, 0.975])
        ci = (float(low), float(high))
    bound_by = max(work, key=lambda name: work[name])
    return TimedRow(*key, costing.deployable(key[1]), us, imbalance, bound_by, None, ci)


def _of_exchanges(latency: float, costing: Costing) -> float:
    """The part of the latency that stands in dispatch and combine."""
    halves = 2 if costing.asked.overlap == "two-batch" else 1
    return latency - 2 * halves * costing.values.get("experts.a", 0.0)


def _with_share(row: TimedRow, asked: TimeAsked, num_layers: int) -> TimedRow:
    total = row.us["total"]
    if asked.step_ms:
        return replace(row, share_of_step=total * num_layers / (1000 * asked.step_ms))
    if asked.other_us:
        beside = 0.0 if asked.overlap == "two-batch" else asked.other_us
        return replace(row, share_of_step=total / (total + beside))
    return row
