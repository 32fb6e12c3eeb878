"""The fleet: upstream servers, the data-parallel ranks behind them, what is in flight on each, and
which of them are in service.

A rank is a URL, or a URL and the number that a request names there. Everything here runs on one
event loop; nothing is locked.

Shape letters: G data-parallel ranks.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from urllib.parse import urlsplit

from semmoe.profiles.errors import InputError
from semmoe.runtime.router.client import Client, UpstreamError
from semmoe.runtime.router.refusals import Refused

FAILURES_OUT = 3  # in a row
PROBE_SECONDS = 2.0
PROBE_TIMEOUT = 5.0
BUSY_SECONDS = 30.0  # since a server was heard of, in which its timeouts mean that it is busy
HEALTH = b"/health"  # of vLLM, SGLang and TensorRT-LLM alike


@dataclass(eq=False)
class Upstream:
    """A server.

    Fields:
        url: without a slash at its end.
        first: number of its first rank; it has those up to `first + ranks`.
        up: whether requests go there.
        failures: since the last answer.
        in_flight: requests there now, pinned or not.
        errors: by cause, since the start.
        heard: when it last sent a byte, by the monotonic clock.
    """

    url: str
    first: int
    ranks: int
    up: bool = False
    failures: int = FAILURES_OUT
    in_flight: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    heard: float = -inf

    def answered(self) -> None:
        self.up, self.failures, self.heard = True, 0, time.monotonic()

    def failed(self, cause: str, error: BaseException | None = None) -> None:
        """Count a failure. A server that is busy with answers may be slow to say that it is well,
        or to take a connection: no reason to take it out."""
        self.errors[cause] += 1
        if isinstance(error, TimeoutError) and time.monotonic() < self.heard + BUSY_SECONDS:
            return
        self.failures += 1
        self.up = self.up and self.failures < FAILURES_OUT


class Fleet:
    """Upstreams and their ranks.

    Fields:
        upstreams: in the order of their ranks.
        most: requests that may be in flight on a rank.
        in_flight_G, tokens_G: requests and their tokens on each rank now. Lists: every request
            looks at them, and for a few ranks a call of numpy takes longer than a loop.
    """

    def __init__(self, urls: Sequence[str], ranks: int, most: int) -> None:
        """Raises InputError where ranks do not divide over upstreams, or a URL is none."""
        if len({checked_url(url) for url in urls}) < len(urls):
            raise InputError("--upstream names a server twice")
        if ranks % len(urls):
            raise InputError(f"{ranks} ranks do not divide over {len(urls)} upstreams")
        share = ranks // len(urls)
        self.upstreams = [Upstream(checked_url(url), i * share, share) for i, url in enumerate(urls)]
        self.most = most
        self.in_flight_G, self.tokens_G = [0] * ranks, [0] * ranks

    @property
    def ranks(self) -> int:
        return len(self.tokens_G)

    @property
    def inner(self) -> bool:
        """Whether a rank is more than a URL: a request must name it there."""
        return self.upstreams[0].ranks > 1

    def upstream_of(self, rank: int) -> Upstream:
        return self.upstreams[rank // self.upstreams[0].ranks]

    def local(self, rank: int) -> int:
        """The rank's number at its upstream."""
        return rank % self.upstreams[0].ranks

    def up_G(self, without: set[str]) -> list[bool]:
        """Which ranks are in service; those at the URLs `without` are not, as long as there are
        others."""
        share = self.upstreams[0].ranks
        up = [upstream.up and upstream.url not in without for upstream in self.upstreams]
        if without and not any(up):
            up = [upstream.up for upstream in self.upstreams]
        return [there for there in up for _ in range(share)]

    def free_G(self, without: set[str]) -> list[bool]:
        """Which ranks take a request now. Raises Refused: 503 where none is in service, 429 where
        all are full."""
        up_G = self.up_G(without)
        free_G = [up and number < self.most for up, number in zip(up_G, self.in_flight_G, strict=True)]
        if not any(free_G):
            raise full() if any(up_G) else no_upstream()
        return free_G

    def least_loaded(self, without: set[str]) -> Upstream:
        """The upstream for a request that no rank was chosen for. Raises Refused as `free_G`."""
        up_G = self.up_G(without)
        there = [upstream for upstream in self.upstreams if up_G[upstream.first]]
        if not there:
            raise no_upstream()
        chosen = min(there, key=lambda upstream: upstream.in_flight)
        if chosen.in_flight >= self.most * chosen.ranks:
            raise full()
        return chosen

    def hold(self, upstream: Upstream, rank: int | None, tokens: int, *, times: int = 1) -> None:
        """Count a request as in flight; `times` = -1: no longer."""
        upstream.in_flight += times
        if rank is not None:
            self.in_flight_G[rank] += times
            self.tokens_G[rank] += times * tokens


def no_upstream() -> Refused:
    return Refused(503, "no_upstream", "no upstream is in service", retry_after=int(PROBE_SECONDS))


def full() -> Refused:
    return Refused(429, "full", "as many requests as may be in flight are there: try again", retry_after=1)


def checked_url(url: str) -> str:
    """The URL without a slash at its end. Raises InputError where it is no http(s) URL of a server,
    or holds a password, which would stand in logs and on the page."""
    try:
        parts = urlsplit(url)
        port_fits = parts.port != 0
    except ValueError:
        port_fits, parts = False, urlsplit("")
    if not port_fits or parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise InputError(f"--upstream {url}: expected a URL such as http://127.0.0.1:8001")
    if parts.username or parts.password:
        raise InputError(
            f"--upstream {parts.hostname}: a URL with a password stands in logs; let clients send a header"
        )
    return url.rstrip("/")


async def probe(client: Client, upstream: Upstream) -> None:
    """Ask an upstream for its health: it is in service after one good answer."""
    try:
        async with asyncio.timeout(PROBE_TIMEOUT):
            status, _ = await client.fetch(upstream.url, "GET", HEALTH)
        if status == 200:
            upstream.answered()
        else:
            upstream.failed(f"health_{status}")
    except (UpstreamError, TimeoutError) as error:
        upstream.failed("health_unreachable", error)


async def probe_all(client: Client, fleet: Fleet) -> None:
    await asyncio.gather(*(probe(client, upstream) for upstream in fleet.upstreams))


async def keep_probing(client: Client, fleet: Fleet, seconds: float = PROBE_SECONDS) -> None:
    """Probe all upstreams every so many seconds, for ever."""
    while True:
        await asyncio.sleep(seconds)
        await probe_all(client, fleet)
