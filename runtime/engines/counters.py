"""What a plug-in did, counted: in the engine's own Prometheus endpoint, and as a line in its log
each minute in which something changed.
"""

import logging
import threading
from collections import Counter

from semmoe.runtime.engines.band import DECISIONS, Decision

LOG_SECONDS = 60.0
REQUESTS, EXPECTED_LAR = "semmoe_requests", "semmoe_expected_lar"  # Prometheus adds _total to a counter


class Counters:
    """Requests by decision, and the locality expected of those that were sent by the plan.

    Methods never raise; they may be called from any thread.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log, self._lock = log, threading.Lock()
        self.requests: Counter[Decision] = Counter()
        self._expected = self._average = 0.0  # summed over affine and spilled requests
        self.dropped = 0  # requests that were not recorded: the queue was full
        self._logged = ""
        self._metrics = _metrics()
        self._timer: threading.Thread | None = None

    def count(self, decision: Decision, expected_lar: float = 0.0, average_lar: float = 0.0) -> None:
        """One more request; of a request that was sent by the plan, what share of its activations
        its rank is expected to host, and what the average rank would."""
        with self._lock:
            self.requests[decision] += 1
            if decision in ("affine", "spilled"):
                self._expected += expected_lar
                self._average += average_lar
            mean = self._mean(self._expected)
        if self._metrics is not None:
            requests, gauge = self._metrics
            requests.labels(decision).inc()
            gauge.set(mean)
        if self._timer is None:
            self._timer = threading.Thread(target=self._log_often, name="semmoe-log", daemon=True)
            self._timer.start()

    def drop(self) -> None:
        """One more request that was not recorded."""
        with self._lock:
            self.dropped += 1

    def line(self) -> str:
        """What happened so far, for the log."""
        with self._lock:
            counts = ", ".join(f"{self.requests[name]} {name}" for name in DECISIONS)
            expected, average = self._mean(self._expected), self._mean(self._average)
        text = f"semmoe: requests {counts}; expected LAR {expected:.3f}, {expected - average:+.3f} over ranks in turn"
        return text + (f"; {self.dropped} not recorded, the queue was full" if self.dropped else "")

    def _mean(self, summed: float) -> float:
        return summed / max(self.requests["affine"] + self.requests["spilled"], 1)

    def _log_often(self) -> None:
        waiting = threading.Event()
        while True:
            waiting.wait(LOG_SECONDS)
            self.log_if_changed()

    def log_if_changed(self) -> None:
        """Write the line, where it says something new."""
        if (line := self.line()) != self._logged:
            self._logged = line
            self._log.info(line)


def _metrics():
    """A counter by decision and a gauge, where the engine has Prometheus; None else."""
    try:
        from prometheus_client import REGISTRY, Counter, Gauge  # pyright: ignore
    except ImportError:
        return None
    there = getattr(REGISTRY, "_names_to_collectors", {})
    try:
        requests = there.get(REQUESTS) or Counter(REQUESTS, "Requests by what semmoe decided.", ["decision"])
        gauge = there.get(EXPECTED_LAR) or Gauge(
            EXPECTED_LAR,
            "Share of activations that stay on their rank, expected of the requests sent by the plan.",
            multiprocess_mode="mostrecent",
        )
        for name in DECISIONS:
            requests.labels(name)
    except ValueError:  # another library has the name
        return None
    return requests, gauge
