"""What a report says of time: the records of report["time"] (docs/formats.md). Microseconds are per
MoE layer and batch, means over batches and layers; intervals are 95 % bootstrap intervals over
requests. `solvers/time/predict.py` fills them."""

from dataclasses import dataclass, field
from typing import Any

from semmoe.solvers.json_record import JsonRecord

Interval = tuple[float, float]


@dataclass(frozen=True)
class TimedRow(JsonRecord):
    """Time of one placement under one schedule."""

    placement: str
    schedule: str
    deployable: bool  # the engine runs the schedule
    us: dict[str, float]  # dispatch, experts, combine, total, median, p95
    imbalance: dict[str, float]  # experts, link: the busiest over the mean, averaged over batches
    bound_by: str  # experts, link or latency
    share_of_step: float | None
    ci: Interval | None  # of the total; None for schedules that no engine runs


@dataclass(frozen=True)
class TimeSaved(JsonRecord):
    """What the plan saves per layer under its best schedule that the engine runs."""

    us: float
    share: float
    ci: Interval  # of the share
    against: str
    schedule: str
    ms_per_step: float
    share_of_step: float | None
    usd_per_hour: float | None  # of the whole group; of an hour in MoE layers where no step is known


@dataclass(frozen=True)
class Ends(JsonRecord):
    """Share saved at both ends of an assumed parameter."""

    name: str
    low: float
    high: float
    saved: Interval
    agrees: bool  # both ends lead to the same decision


@dataclass(frozen=True)
class Sensitivity(JsonRecord):
    """Least and most share saved over the ends of all assumed parameters."""

    low: float
    high: float
    parameters: list[Ends]


@dataclass(frozen=True)
class TimeVerdict(JsonRecord):
    """Is the plan worth deploying, by time?"""

    decision: str  # "recommend", "not worth it" or "insufficient evidence"
    level: str  # "good", "bad" or "watch"
    sentence: str
    decides: str  # experts, link or latency: what most of the difference, or of the time, is
    missing: list[str] = field(default_factory=list)  # measurements that would decide
    cannot_help: list[str] = field(default_factory=list)  # why nothing, or placement alone, can help


@dataclass(frozen=True)
class DomainTime(JsonRecord):
    """What the plan's placement saves, tokens at random homes, in batches of one domain's requests:
    the most that a shift of the traffic towards it could change."""

    domain: str
    requests: int
    tokens: int
    us: float  # of the plan's layer
    saved: float  # share, against what `TimeSaved` names
    imbalance: float  # of the experts, the busiest rank over the mean


@dataclass(frozen=True)
class TimeReport(JsonRecord):
    """report["time"]."""

    hardware: str
    backend: str
    phase: str
    tokens_per_rank: int
    overlap: str
    engine: str
    parameters: list[dict[str, Any]]
    rows: list[TimedRow]
    saved: TimeSaved | None
    break_even_imbalance: float | None
    sensitivity: Sensitivity | None
    verdict: TimeVerdict | None
    batches: int
    resamples: int
    layers: int  # that were timed
    notes: list[str] = field(default_factory=list)
    domains: list[DomainTime] = field(default_factory=list)  # of the held-out requests, where there are two

    def row(self, placement: str, schedule: str = "random") -> TimedRow:
        """The row of a placement and a schedule, which is there."""
        return next(r for r in self.rows if (r.placement, r.schedule) == (placement, schedule))
