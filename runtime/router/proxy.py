"""The proxy, as an ASGI application: reads a request, sends it to its rank, passes the answer on as
it comes.

Bytes of an answer are never parsed and never queued: the next piece is read from the upstream when
the client has taken the last one. When the client goes, the connection to the upstream is closed at
once, which is how an engine learns that nobody waits for the rest. A request is tried again only
before the first byte of its answer, on a connection error or a 503.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from semmoe.runtime.router.client import Client, NoHttp, NotConnected, Response, UpstreamError
from semmoe.runtime.router.fleet import Fleet, Upstream
from semmoe.runtime.router.metrics import Metrics
from semmoe.runtime.router.pins import Pinned, with_pin, without_pin
from semmoe.runtime.router.refusals import HOP_BY_HOP, REWRITTEN, Refused, end_to_end, stated_length
from semmoe.runtime.router.scheduler import PASSED, Asked, Chosen, Scheduler

LOG = logging.getLogger("semmoe.route")
BUSY, GATEWAY = 503, 502
SAFE = ("GET", "HEAD", "OPTIONS")
CONNECTION = "semmoe.connection"  # in a scope: the client's

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


@dataclass(frozen=True)
class Limits:
    """Bounds of a router.

    Fields:
        body: bytes of a request.
        bodies: bytes of all requests that have not had a byte of their answer.
        body_seconds: between two pieces of a request.
        tries: of a request, all upstreams together.
        pause: seconds before the second try at the same server; twice as long before the next.
    """

    body: int = 64 << 20
    bodies: int = 1 << 30
    body_seconds: float = 60.0
    tries: int = 3
    pause: float = 0.1


class ClientGone(Exception):
    """The client closed its connection."""


class UpstreamCut(Exception):
    """The upstream's answer ended before its end."""


@dataclass(eq=False)
class Connection:
    """A client's connection, which the server puts into the scope of each of its requests.

    As a context: a block that ends with ClientGone as soon as the client goes.

    Fields:
        whole: whether all of the latest request is here.
        full: whether the client reads more slowly than it is written to.
        holds: whether what is written next, a head, waits for what is written behind it.
        task: which works for the client, and ends when the connection is lost.
    """

    whole: bool = False
    full: bool = False
    holds: bool = False
    task: asyncio.Task[None] | None = None
    is_lost: bool = False

    def lost(self) -> None:
        self.is_lost = True
        if self.task is not None:
            self.task.cancel()

    def __enter__(self) -> None:
        if self.is_lost:
            raise ClientGone
        self.task = asyncio.current_task()

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        task, self.task = self.task, None
        if kind is asyncio.CancelledError and self.is_lost and task is not None and not task.uncancel():
            raise ClientGone from None


class Passing(Protocol):
    """What `--record` does with the answers that it is interested in."""

    def ask(self, asked: Asked) -> object:
        """Change the request so that the engine tells its routing; what `pass_on` needs, or None
        for an answer that is passed on as it comes."""
        ...

    async def pass_on(self, asking: Any, chosen: Chosen, response: Response, answer: "Answer") -> None: ...

    def counts(self) -> dict[str, int]:
        """What became of those answers."""
        ...

    def finding(self) -> str | None:
        """What people must be told; None for nothing."""
        ...


@dataclass(eq=False)
class Answer:
    """The answer to a client: how far it is."""

    send: Send
    connection: Connection
    started: bool = False
    complete: bool = False
    upstream: Upstream | None = None  # whose answer it is

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.started = True
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def body(self, data: bytes, *, more: bool = True) -> None:
        self.complete = not more
        await self.send({"type": "http.response.body", "body": data, "more_body": more})
        if self.upstream is not None:
            self.upstream.heard = time.monotonic()

    def is_full(self) -> bool:
        return self.connection.full

    def push(self, data: bytes) -> None:
        """`body` without waiting, of a client that is not full, and not the end."""
        try:
            self.body(data).send(None)
        except StopIteration:
            return
        raise RuntimeError("the server made a client wait that is not full")

    async def refuse(self, refused: Refused) -> None:
        await self.start(refused.status, refused.headers)
        await self.body(refused.body, more=False)


@dataclass(eq=False)
class Proxy:
    """Every request that is not the router's own."""

    client: Client
    scheduler: Scheduler
    metrics: Metrics
    limits: Limits = Limits()
    recorder: Passing | None = None
    buffered: int = field(default=0, init=False)  # bytes of requests in memory

    @property
    def fleet(self) -> Fleet:
        return self.scheduler.fleet

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        answer = Answer(send, scope[CONNECTION])
        try:
            await self._serve(scope, receive, answer)
        except Refused as refused:
            self.metrics.refused[refused.kind] += 1
            await answer.refuse(refused)
        except ClientGone:
            # A client may also close its connection because it has all that it wanted.
            self.metrics.ends["finished" if answer.complete else "client_gone"] += 1
        except UpstreamCut:
            # The client must not take half an answer for a whole one: left without its end, the
            # server closes the connection.
            self.metrics.ends["cut"] += 1
        except Exception:
            LOG.exception("a fault of the router, in a request to %s", scope.get("path"))
            self.metrics.refused["fault"] += 1
            if not answer.started:
                await answer.refuse(Refused(500, "fault", "a fault of the router: its log has it"))

    async def _serve(self, scope: Message, receive: Receive, answer: Answer) -> None:
        headers = scope["headers"]
        if stated_length(headers, scope["raw_path"]) > self.limits.body:
            raise self._too_large()
        data = await self._body(answer.connection, receive)
        query = scope["query_string"]
        target = scope["raw_path"] + (b"?" + query if query else b"")
        exchange = Exchange(scope["method"], target, time.perf_counter(), len(data))
        try:
            kept = end_to_end(headers, REWRITTEN)
            asked = await self.scheduler.read(exchange.method, scope["path"], kept, data)
            del data
            with answer.connection:
                await self._work(exchange, asked, answer)
        finally:
            self._release(exchange)

    def _release(self, exchange: "Exchange") -> None:
        self.buffered -= exchange.held
        exchange.held = 0

    async def _body(self, connection: Connection, receive: Receive) -> bytes:
        """The whole body of a request, counted in `buffered`. Raises Refused where it is too large
        or too slow."""
        parts, size, more = [], 0, True
        try:
            while more:
                message = await (receive() if connection.whole else self._in_time(receive))
                if message["type"] == "http.disconnect":
                    raise ClientGone
                part, more = message.get("body", b""), message.get("more_body", False)
                parts.append(part)
                size += len(part)
                self.buffered += len(part)
                if size > self.limits.body:
                    raise self._too_large()
                if self.buffered > self.limits.bodies:
                    raise Refused(429, "full", "too many bytes of requests are there", retry_after=1, close=True)
            return parts[0] if len(parts) == 1 else b"".join(parts)
        except BaseException:
            self.buffered -= size
            raise

    async def _in_time(self, receive: Receive) -> Message:
        """The next piece of a request. Raises Refused where it does not come in time."""
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                return await receive()
        except TimeoutError:
            raise Refused(408, "slow", "the request's body did not come", close=True) from None

    def _too_large(self) -> Refused:
        return Refused(413, "too_large", f"a request may have {self.limits.body} bytes", close=True)

    async def _work(self, exchange: "Exchange", asked: Asked, answer: Answer) -> None:
        """Send a request until some upstream answers, and pass the answer on."""
        asking = self.recorder.ask(asked) if self.recorder is not None else None
        failed: set[str] = set()
        for left in reversed(range(self.limits.tries)):
            chosen = self.scheduler.choose(asked, failed)
            self.fleet.hold(chosen.upstream, chosen.rank, asked.tokens)
            asyncio.get_running_loop().call_soon(self.scheduler.expect, asked, chosen)
            try:
                response = await self._open(exchange, asked, chosen, again=left > 0)
                if response is not None:
                    # Counted behind what is passed on now: nobody waits for that.
                    asyncio.get_running_loop().call_soon(self._opened, exchange, asked, chosen)
                    answer.upstream = chosen.upstream
                    self._release(exchange)
                    try:
                        if asking is not None and self.recorder is not None:
                            await self.recorder.pass_on(asking, chosen, response, answer)
                        else:
                            await pass_on(response, answer)
                    finally:
                        response.close()
                    self.metrics.ends["finished"] += 1
                    return
            finally:
                self.fleet.hold(chosen.upstream, chosen.rank, asked.tokens, times=-1)
            await self._pause(chosen, failed)
            failed.add(chosen.upstream.url)

    async def _pause(self, chosen: Chosen, failed: set[str]) -> None:
        """Wait before the same server is asked again; another one is asked at once."""
        others = any(u.up and u.url not in failed and u is not chosen.upstream for u in self.fleet.upstreams)
        if not others:
            await asyncio.sleep(self.limits.pause * 2 ** len(failed))

    def _opened(self, exchange: "Exchange", asked: Asked, chosen: Chosen) -> None:
        metrics = self.metrics
        metrics.added.add(exchange.sent - exchange.begin)
        metrics.requests[chosen.decision, -1 if chosen.rank is None else chosen.rank] += 1
        if chosen.expected is not None:
            metrics.expected.add(time.time(), chosen.expected)
        if chosen.rank is not None and chosen.decision != PASSED:
            self.scheduler.sessions.stay(asked.sessions, chosen.rank)
        asked.forget()

    async def _open(self, exchange: "Exchange", asked: Asked, chosen: Chosen, *, again: bool) -> Response | None:
        """The head of the upstream's answer; None where the request is to be tried again. Raises
        Refused (502) where the upstream gives none."""
        upstream = chosen.upstream
        sent = self._sent(asked, chosen)
        exchange.sent = exchange.sent or time.perf_counter()
        repeatable = asked.generates or exchange.method in SAFE
        try:
            response = await self.client.request(
                upstream.url, exchange.method, exchange.target, sent.headers, sent.data, repeatable=repeatable
            )
        except UpstreamError as error:
            upstream.failed(error.cause, error)
            if again and (repeatable or isinstance(error, NotConnected)) and not isinstance(error, NoHttp):
                self.metrics.retries[error.cause] += 1
                return None
            raise Refused(GATEWAY, "upstream", f"no answer from the upstream ({error.cause})") from None
        if response.status != BUSY:
            upstream.answered()
            return response
        upstream.failed("503")
        if not again:
            return response
        self.metrics.retries["503"] += 1
        response.close()
        return None

    def _sent(self, asked: Asked, chosen: Chosen) -> Pinned:
        """The request with its rank, as the engine reads it."""
        engine = self.scheduler.engine
        if not asked.generates:
            return Pinned(asked.headers, asked.data)
        if not self.fleet.inner:
            return without_pin(engine, asked.path, asked.headers, asked.data, asked.body)
        if chosen.rank is None:
            return Pinned(asked.headers, asked.data)
        local = self.fleet.local(chosen.rank)
        if chosen.rank == asked.pin == local:
            return Pinned(asked.headers, asked.data)  # as the client spelled it
        return with_pin(engine, asked.path, asked.headers, asked.data, asked.body, local)


@dataclass(eq=False)
class Exchange:
    """A request on its way. `begin`: when it was all here; `held`: bytes of it that are in memory;
    `sent`: when it was first sent, 0 before."""

    method: str
    target: bytes
    begin: float
    held: int
    sent: float = 0.0


async def pass_on(response: Response, answer: Answer) -> None:
    """Pass an answer on, piece by piece as it comes. Raises UpstreamCut where it is cut."""
    answer.connection.holds = response.has_piece  # head and piece in one packet
    await answer.start(response.status, answer_headers(response))
    response.pass_to(answer)
    try:
        while piece := await response.piece():
            await answer.body(piece, more=not response.at_end)
    except UpstreamError:
        raise UpstreamCut from None
    if not answer.complete:
        await answer.body(b"", more=False)


def answer_headers(response: Response) -> list[tuple[bytes, bytes]]:
    return end_to_end(response.headers, HOP_BY_HOP)
