"""What the router says of itself: /healthz, /readyz, /metrics, the page's numbers.

Shape letters: G data-parallel ranks.
"""

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from semmoe.runtime.router.fleet import FAILURES_OUT
from semmoe.runtime.router.metrics import counter_lines
from semmoe.runtime.router.proxy import Proxy

Labels = dict[tuple[tuple[str, str], ...], float]


@dataclass(eq=False)
class Status:
    """Reads the counters of a proxy. `about`: what was asked for, shown on the page."""

    proxy: Proxy
    about: dict[str, Any]
    draining: bool = False

    @property
    def ready(self) -> bool:
        return not self.draining and any(upstream.up for upstream in self.proxy.fleet.upstreams)

    def to_json(self) -> dict[str, Any]:
        """Everything that the page shows."""
        metrics, fleet, now = self.proxy.metrics, self.proxy.fleet, time.time()
        decisions: Counter[str] = Counter()
        by_rank: Counter[int] = Counter()
        for (decision, rank), count in metrics.requests.items():
            decisions[decision] += count
            by_rank[rank] += count
        expected, served = dict(metrics.expected.by_minute(now)), dict(metrics.served.by_minute(now))
        recorder = self.proxy.recorder
        return {
            **self.about,
            "ready": self.ready,
            "draining": self.draining,
            "upstreams": [
                {"url": u.url, "up": u.up, "failures": u.failures, "in_flight": u.in_flight, "errors": dict(u.errors)}
                for u in fleet.upstreams
            ],
            "ranks": [
                {
                    "rank": rank,
                    "upstream": fleet.upstream_of(rank).url,
                    "up": fleet.upstream_of(rank).up,
                    "in_flight": int(fleet.in_flight_G[rank]),
                    "tokens": int(fleet.tokens_G[rank]),
                    "requests": by_rank[rank],
                }
                for rank in range(fleet.ranks)
            ],
            "decisions": dict(decisions),
            "unpinned": by_rank[-1],
            "unknown": dict(self.proxy.scheduler.unknown),
            "refused": dict(metrics.refused),
            "retries": dict(metrics.retries),
            "ends": dict(metrics.ends),
            "expected_lar": metrics.expected.mean(now),
            "served_lar": metrics.served.mean(now),
            "minutes": [
                {"ago": ago, "expected": expected.get(ago), "served": served.get(ago)}
                for ago in sorted(expected.keys() | served.keys(), reverse=True)
            ],
            "recorded": {} if recorder is None else recorder.counts(),
            "finding": None if recorder is None else recorder.finding(),
        }

    def prometheus(self) -> str:
        """The text that Prometheus reads."""
        metrics, fleet, now = self.proxy.metrics, self.proxy.fleet, time.time()
        ranks = range(fleet.ranks)
        requests: Labels = {
            (("decision", decision), ("rank", "engine" if rank < 0 else str(rank))): count
            for (decision, rank), count in sorted(metrics.requests.items())
        }
        errors: Labels = {
            (("upstream", u.url), ("cause", cause)): n for u in fleet.upstreams for cause, n in sorted(u.errors.items())
        }
        up: Labels = {(("upstream", u.url),): float(u.up) for u in fleet.upstreams}
        lines = counter_lines("semmoe_requests_total", "counter", "Requests sent, by decision and rank.", requests)
        for name, values_G, about in (
            ("semmoe_requests_in_flight", fleet.in_flight_G, "Requests on a rank now."),
            ("semmoe_tokens_in_flight", fleet.tokens_G, "Their tokens: prompts and longest answers."),
        ):
            lines += counter_lines(name, "gauge", about, {(("rank", str(r)),): float(values_G[r]) for r in ranks})
        for name, recent in (("expected", metrics.expected), ("served", metrics.served)):
            mean = recent.mean(now)
            about = f"Share of activations at home, {name}, of the last hour's requests."
            lines += counter_lines(f"semmoe_{name}_lar", "gauge", about, {} if mean is None else {(): mean})
        lines += counter_lines("semmoe_upstream_up", "gauge", f"0 after {FAILURES_OUT} failures in a row.", up)
        lines += counter_lines("semmoe_upstream_errors_total", "counter", "Errors of upstreams, by cause.", errors)
        counts = [
            ("semmoe_unknown_total", "Prompts without token ids, by cause.", self.proxy.scheduler.unknown),
            ("semmoe_refused_total", "Answers of the router's own, by kind.", metrics.refused),
            ("semmoe_retries_total", "Requests sent again, by cause.", metrics.retries),
            ("semmoe_answers_total", "What became of answers.", metrics.ends),
        ]
        if self.proxy.recorder is not None:
            about = "What became of answers whose routing was asked for."
            counts.append(("semmoe_recorded_total", about, Counter(self.proxy.recorder.counts())))
        for name, about, found in counts:
            lines += counter_lines(name, "counter", about, {(("cause", c),): n for c, n in sorted(found.items())})
        name = "semmoe_added_latency_seconds"
        lines += [f"# HELP {name} From a request's last byte here to its first byte to the upstream."]
        lines += [f"# TYPE {name} histogram", *metrics.added.lines(name)]
        return "\n".join([*lines, ""])
