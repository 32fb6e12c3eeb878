"""What the router counts, and how Prometheus reads it (text format 0.0.4).

Shape letters: G data-parallel ranks.
"""

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2.0)  # seconds
HOUR = 3600.0


@dataclass(eq=False)
class Histogram:
    """Counts of values up to each of BUCKETS, and over."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    total: float = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(BUCKETS, value)] += 1
        self.total += value

    def lines(self, name: str) -> Iterable[str]:
        so_far = 0
        for bound, count in zip((*map(str, BUCKETS), "+Inf"), self.counts, strict=True):
            so_far += count
            yield f'{name}_bucket{{le="{bound}"}} {so_far}'
        yield f"{name}_sum {self.total:.6f}"
        yield f"{name}_count {so_far}"


@dataclass(eq=False)
class Recent:
    """Values of the last hour by minute: how many, their sum, and the sum of their squares."""

    minutes: deque[tuple[int, list[float]]] = field(default_factory=lambda: deque(maxlen=int(HOUR / 60)))

    def add(self, seconds: float, value: float) -> None:
        minute = int(seconds // 60)
        if not self.minutes or self.minutes[-1][0] != minute:
            self.minutes.append((minute, [0, 0.0, 0.0]))
        for i, term in enumerate((1, value, value * value)):
            self.minutes[-1][1][i] += term

    def sums(self, seconds: float) -> tuple[int, float, float]:
        """Number, sum and sum of squares of the last hour's values."""
        first = int((seconds - HOUR) // 60)
        kept = [sums for minute, sums in self.minutes if minute > first]
        return int(sum(s[0] for s in kept)), sum(s[1] for s in kept), sum(s[2] for s in kept)

    def mean(self, seconds: float) -> float | None:
        number, total, _ = self.sums(seconds)
        return total / number if number else None

    def by_minute(self, seconds: float) -> list[tuple[int, float]]:
        """Minutes ago, and the mean of that minute."""
        now = int(seconds // 60)
        return [(now - m, s[1] / s[0]) for m, s in self.minutes if now - m < HOUR / 60]


@dataclass(eq=False)
class Metrics:
    """Counters of the router.

    Fields:
        requests: by decision and rank; rank -1: the engine's own choice.
        refused: answers of the router's own, by kind.
        ends: what became of the answers: finished, client_gone, cut (by the upstream).
        retries: by cause.
        added: seconds between a request's last byte here and its first byte to the upstream.
        expected, served: shares of activations at home, of the last hour.
    """

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    retries: Counter[str] = field(default_factory=Counter)
    added: Histogram = field(default_factory=Histogram)
    expected: Recent = field(default_factory=Recent)
    served: Recent = field(default_factory=Recent)


def counter_lines(name: str, kind: str, about: str, values: Mapping[tuple[tuple[str, str], ...], float]) -> list[str]:
    """One metric with its labels; nothing where it has no values."""
    if not values:
        return []
    lines = [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
    for labels, value in values.items():
        text = ",".join(f'{key}="{escaped(label)}"' for key, label in labels)
        lines.append(f"{name}{{{text}}} {value:g}" if text else f"{name} {value:g}")
    return lines


def escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
