"""The report of a plan as records: what the terminal, the pages and `--json` all read, and what a
plan stores (docs/formats.md).

Field names are the keys of the JSON object; means are over layers, intervals are 95 % bootstrap
intervals over requests.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape

from semmoe.profiles.errors import model_name
from semmoe.solvers.evaluate.metrics import METRICS, Scores
from semmoe.solvers.evaluate.time_report import TimeReport
from semmoe.solvers.html import table_html
from semmoe.solvers.json_record import JsonRecord
from semmoe.solvers.place.bounds import Certificate
from semmoe.solvers.place.replicas import OWN_RULE
from semmoe.solvers.schedule.simulate import Setting

REPORT_FORMAT = "semmoe-report"
REPORT_VERSION = 1

Interval = tuple[float, float]
Key = tuple[str, str]  # placement and schedule of a row


@dataclass(frozen=True)
class ScoreRow(JsonRecord):
    """Metrics of one placement under one schedule (METRICS: the names of the numbers)."""

    placement: str
    schedule: str
    lar: float
    rem: float
    node: float
    link: float
    load_imbalance: float
    load_imbalance_median: float
    token_imbalance: float
    ci: dict[str, Interval] | None = None  # by metric; None in the rows of a layer

    @property
    def key(self) -> Key:
        return self.placement, self.schedule

    @property
    def is_oracle(self) -> bool:
        """Whether its schedule knows the routing that is still to come."""
        return "oracle" in self.schedule

    def value(self, metric: str) -> float:
        """One of METRICS by name."""
        return getattr(self, metric)

    def interval(self, metric: str) -> Interval:
        """Interval of one of METRICS; the value itself where none is known."""
        value = self.value(metric)
        return (self.ci or {}).get(metric, (value, value))

    @classmethod
    def of(cls, key: Key, scores: Scores) -> "ScoreRow":
        """The row of averages over layers."""
        return cls(*key, **scores.means, ci={name: scores.intervals[name] for name in METRICS})

    @classmethod
    def of_layer(cls, key: Key, scores: Scores, layer: int) -> "ScoreRow":
        """The row of one layer."""
        return cls(*key, **{name: float(scores.layers[name][layer]) for name in METRICS}, ci=None)


@dataclass(frozen=True)
class DomainScores(JsonRecord):
    """The rows on the requests of one domain."""

    domain: str
    requests: int
    tokens: int
    rows: list[ScoreRow]


@dataclass(frozen=True)
class LayerScores(JsonRecord):
    """The rows of one layer, in the order of the report's."""

    layer: int
    model_layer: int
    rows: list[ScoreRow]


@dataclass(frozen=True)
class Judgement(JsonRecord):
    """Is a placement under one schedule worth deploying?"""

    decision: str  # "recommend", "not worth it" or "insufficient evidence"
    level: str  # "good", "bad" or "watch"
    sentence: str
    saved: float  # share of the bytes
    ci: Interval
    schedule: str
    tokens: int
    tokens_needed: int | None
    against: str  # name of a placement in the report's rows


@dataclass(frozen=True)
class Verdict(Judgement):
    """The judgement on a plan, on its best schedule without an oracle where that is another, and on
    the best that a serving engine can run with a plug-in or a router."""

    with_schedule: Judgement | None
    deployable: Judgement | None = None


@dataclass(frozen=True)
class WhatIfRow(JsonRecord):
    """A quick placement or a baseline on another number of ranks."""

    ranks: int
    nodes: int
    placement: str
    lar: float
    rem: float
    node: float
    link: float
    load_imbalance: float
    ci: dict[str, Interval]
    us_per_layer: float | None = None  # predicted, where --hardware is given

    def value(self, metric: str) -> float:
        """One of its metrics by name."""
        return getattr(self, metric)


@dataclass(frozen=True)
class TradeOff(JsonRecord):
    """A quick placement on a number of ranks with a number of expert slots, copies in the spare
    ones."""

    ranks: int
    slots: int  # of a rank and layer
    experts_per_rank: int  # over all layers: what its memory holds
    rem: float
    load_imbalance: float
    us_per_layer: float | None = None

    def value(self, metric: str) -> float:
        """One of its metrics by name."""
        return getattr(self, metric)


@dataclass(frozen=True)
class Skipped(JsonRecord):
    """A number of ranks that was asked for and cannot be."""

    ranks: int
    why: str


@dataclass(frozen=True)
class WhatIf(JsonRecord):
    """The same traffic on other numbers of ranks."""

    fitted_requests: int
    scored_requests: int
    rows: list[WhatIfRow]
    skipped: list[Skipped]
    trade_off: list[TradeOff] = field(default_factory=list)


@dataclass(frozen=True)
class PredictableToken(JsonRecord):
    """How well a token's id alone names the rank of its experts, on held-out requests."""

    id: int
    text: str
    tokens: int
    share: float


@dataclass(frozen=True)
class DispatchCost(JsonRecord):
    """Bytes of one token over all layers, there and back, under one dispatch kind."""

    dispatch: str
    bytes: dict[str, float]  # by placement


@dataclass(frozen=True)
class Costs(JsonRecord):
    """What every dispatch kind sends, before and after."""

    hidden_size: int
    dispatch_bytes: float
    rows: list[DispatchCost]
    assumption: str


@dataclass(frozen=True)
class RowTime(JsonRecord):
    """Predicted milliseconds of the exchanges of a layer under one row."""

    placement: str
    schedule: str
    link: float
    ms_per_layer: float
    ms_layers: list[float]


@dataclass(frozen=True)
class Times(JsonRecord):
    """Predicted time of every row for a batch of `batch_tokens` tokens on given links."""

    network: str
    batch_tokens: int
    row_bytes: float
    rows: list[RowTime]
    hidden_size: int
    assumption: str


@dataclass(frozen=True)
class Drift(JsonRecord):
    """What a re-placement within a budget would gain on requests that the plan was
    not made from: cost per token, its 95 % interval, and whether it is more than its moves cost."""

    gain: float
    lo: float
    hi: float
    unit: str
    moves: float
    share: float  # of the slots in use
    requests: int
    worth_it: bool
    sentence: str
    command: str


@dataclass(frozen=True, kw_only=True)
class Report(JsonRecord):
    """Scores of a plan and of what engines do without one, on requests that it was not fitted on;
    and, where asked for, what follows from them. `to_json()` gives it as one JSON object.

    Fields:
        format, version: of the JSON object.
        plan, trace: paths as given, "" in a stored report.
        model, ranks, nodes, dispatch: what was scored.
        replica_choice: the rule by which copies serve, for all rows.
        phase, phase_shares: whose tokens were scored, and the share of each phase in the trace.
        against: the placement that the verdict, headline and tables hold the plan against.
        requests, tokens: how many were scored.
        setting: of the simulated schedules.
        uniform: lar, rem and node of tokens that draw experts uniformly.
        verdict: is the plan worth deploying?
        rows: metrics of every placement under every schedule (`ScoreRow`): lar is a share, rem,
            node and link are remote ranks, nodes and costs per token and layer, imbalances are the
            busiest over the mean; `ci` their 95 % intervals.
        domains: the rows on the requests of each domain.
        layers: the rows of each layer.
        certificate: what any placement could reach, where asked for.
        drift: what a re-placement from the plan on would gain, where the trace is new to it.
        what_if, predictable_tokens, costs, times: what `semmoe report` adds on request.
        time: predicted on given hardware, with the verdict by time.

    Source: solvers/evaluate/report.py; docs/formats.md, "report", and docs/method.md.
    """

    format: str = REPORT_FORMAT
    version: int = REPORT_VERSION
    plan: str
    trace: str
    model: str
    ranks: int
    nodes: int
    dispatch: str
    replica_choice: str = OWN_RULE
    phase: str = "all"
    phase_shares: dict[str, float] | None = None
    against: str = ""
    requests: int
    tokens: int
    setting: Setting = field(default_factory=Setting)
    uniform: dict[str, float]
    verdict: Verdict | None = None
    rows: list[ScoreRow]
    domains: list[DomainScores] = field(default_factory=list)
    layers: list[LayerScores]
    certificate: Certificate | None = None
    drift: Drift | None = None
    what_if: WhatIf | None = None
    predictable_tokens: list[PredictableToken] | None = None
    costs: Costs | None = None
    times: Times | None = None
    time: TimeReport | None = None

    def _repr_html_(self) -> str:
        """What a notebook shows: the verdict, and a table of the rows with their intervals."""
        metrics = [metric for metric in METRICS if metric != "node" or self.nodes > 1]
        cells = ([*row.key, *(_shown(row, metric) for metric in metrics)] for row in self.rows)
        about = f"{model_name(self.model, self.trace)}: {self.requests} requests, {self.tokens} tokens, {self.ranks} ranks, {self.dispatch}"
        said = f"{about}. {self.verdict.sentence}" if self.verdict else about
        return f"<p>{escape(said)}</p>" + table_html(["placement", "schedule", *metrics], cells)

    @property
    def baseline(self) -> str:
        """Name of what the plan is held against: by time, the faster baseline; of an older report,
        what its verdict names."""
        if self.time is not None and self.time.saved is not None:
            return self.time.saved.against
        return self.against or (self.verdict.against if self.verdict else "contiguous")

    @property
    def plan_rows(self) -> list[ScoreRow]:
        """Rows of the plan, under every schedule."""
        return [row for row in self.rows if row.placement == "plan"]


def _shown(row: ScoreRow, metric: str) -> str:
    low, high = row.interval(metric)
    return f"{row.value(metric):.3f}" + (f" [{low:.3f}, {high:.3f}]" if high > low else "")


def random_row(rows: Iterable[ScoreRow], placement: str) -> ScoreRow:
    """The row of a placement with tokens at random homes; one is always there."""
    return next(row for row in rows if row.key == (placement, "random"))
