"""The health of a trace as a record: what the check finds, and what the terminal, the page and
`--json` read (docs/formats.md).

Field names are the keys of the JSON object. Parts that a trace is too small for are None.
"""

from dataclasses import dataclass, field

from semmoe.solvers.evaluate.time_report import TimeReport
from semmoe.solvers.json_record import JsonRecord

HEALTH_FORMAT = "semmoe-health"
HEALTH_VERSION = 1


@dataclass(frozen=True)
class LoadFacts(JsonRecord):
    """How unevenly experts are chosen."""

    busiest_over_mean: float  # mean over layers
    busiest_over_mean_layers: list[float]
    unused_share: float
    least_activations: int
    median_activations: float
    share_by_popularity: list[float]  # of a layer's activations, mean over layers


@dataclass(frozen=True)
class StructureFacts(JsonRecord):
    """Held-out co-activation inside groups over chance (solvers/health/structure.py)."""

    lift: float
    lift_layers: list[float]
    groups: int
    verdict: str


@dataclass(frozen=True)
class UnseenPoint(JsonRecord):
    """Share of held-out tokens with an id that so many training tokens did not show."""

    tokens: float
    rate: float


@dataclass(frozen=True)
class CurvePoint(JsonRecord):
    """Held-out REM after so many training tokens: mean, least and most of several orders."""

    tokens: float
    rem: float
    low: float
    high: float


@dataclass(frozen=True)
class PowerLaw(JsonRecord):
    """rem = floor + scale * tokens ** -power."""

    floor: float
    scale: float
    power: float


@dataclass(frozen=True)
class Forecast(JsonRecord):
    """What the law expects of so many times the tokens."""

    factor: int
    tokens: float
    rem: float


@dataclass(frozen=True)
class Learning(JsonRecord):
    """Held-out REM of the quick method by training size."""

    held_out_requests: int
    contiguous_rem: float
    points: list[CurvePoint]
    law: PowerLaw
    forecast: list[Forecast]


@dataclass(frozen=True)
class DomainDrift(JsonRecord):
    """A domain against all others: total variation of expert loads beside what random requests
    show, and what it costs to leave the domain out of learning."""

    domain: str
    requests: int
    tokens: int
    distance: float
    noise: float
    noise_95: float
    rem_known: float
    rem_left_out: float
    imbalance_known: float
    imbalance_left_out: float


@dataclass(frozen=True)
class WindowDrift(JsonRecord):
    """A tenth of the trace, in stored order, against the rest."""

    window: int
    distance: float
    noise: float
    noise_95: float


@dataclass(frozen=True)
class TimeDrift(JsonRecord):
    """The later half under a placement of the earlier one, and of requests from all of it."""

    windows: list[WindowDrift]
    rem_later: float
    rem_mixed: float
    imbalance_later: float
    imbalance_mixed: float


@dataclass(frozen=True)
class Finding(JsonRecord):
    """What a number means, and whether to act on it: "good", "watch" or "bad"."""

    topic: str
    level: str
    text: str


@dataclass(frozen=True)
class LeftOutFacts(JsonRecord):
    """Requests that an import left out, by reason, and their share of all."""

    requests: dict[str, int]
    requests_share: float
    tokens: int  # as far as the records told
    tokens_share: float

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.requests.items())
        return f"{reasons}: {self.requests_share:.1%} of the requests, {self.tokens_share:.1%} of the tokens"


@dataclass(frozen=True, kw_only=True)
class Health(JsonRecord):
    """Is a trace good enough to place experts by?"""

    format: str = HEALTH_FORMAT
    version: int = HEALTH_VERSION
    trace: str
    model: str
    layers: int
    experts: int
    top_k: int
    requests: int
    tokens: int
    sampled_tokens: int
    prompt_share: float
    phase: str = "all"
    ranks: int
    curve_layers: list[int]
    load: LoadFacts
    structure: StructureFacts | None
    unseen: list[UnseenPoint] | None
    learning: Learning | None
    domains: list[DomainDrift] | None
    time: TimeDrift | None
    left_out: LeftOutFacts | None = None
    impossible: dict[str, str] | None = None  # by number of the layer in the model
    findings: list[Finding] = field(default_factory=list)
    layer_time: TimeReport | None = None  # predicted, where hardware is given
