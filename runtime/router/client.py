"""HTTP/1.1 to the upstreams: requests as bytes, answers piece by piece, connections that are kept.

Every token of every stream passes here, and a client for all purposes spends more time on it than
all the rest of the router (docs/experiments.md). llhttp (httptools) reads the answers; what it
calls malformed is no answer.
"""

import asyncio
import ssl
import time
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol
from urllib.parse import urlsplit

import httptools

CONNECT_SECONDS = 20.0  # health is what finds a dead server; a burst of connections takes its time
IDLE_SECONDS = 4.0  # of a connection that is kept: engines close theirs after 5
MOST_HEAD = 1 << 18  # bytes of an answer's head
HIGH_WATER = 1 << 16  # bytes of an answer that may wait here for a slow reader
PORTS = {"http": 80, "https": 443}
BODILESS = (b"GET", b"HEAD", b"OPTIONS", b"DELETE")  # without a body they state no length

HeaderList = list[tuple[bytes, bytes]]


class UpstreamError(Exception):
    """No answer, or half of one. `cause`: in a word, for the counters."""

    cause = "disconnected"


class NotConnected(UpstreamError):
    """Nothing of the request was sent."""

    cause = "not_connected"


class ConnectTimeout(NotConnected, TimeoutError):
    cause = "connect_timeout"


class NoHttp(UpstreamError):
    """What came is no answer of HTTP."""

    cause = "no_http"


@dataclass(frozen=True)
class Address:
    """Where a server is, by its URL: host and port, TLS or not, and how requests spell it."""

    host: str
    port: int
    tls: bool
    prefix: bytes
    host_header: bytes


@lru_cache(1024)
def address_of(url: str) -> Address:
    """Of an http(s) URL without a query."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    try:
        host = host.encode("idna").decode() if not host.isascii() else host
    except UnicodeError:  # no name of a server, which the look-up will say
        host = host.encode("ascii", "backslashreplace").decode()
    named = f"[{host}]" if ":" in host else host
    port = f":{parts.port}" if parts.port else ""
    where = parts.port or PORTS[parts.scheme]
    return Address(host, where, parts.scheme == "https", parts.path.encode(), (named + port).encode())


class Sink(Protocol):
    """Who takes pieces of an answer in the very callback that reads them."""

    def is_full(self) -> bool: ...

    def push(self, data: bytes) -> None: ...


class Line(asyncio.Protocol):
    """A connection to a server, and the answer that is read from it."""

    def __init__(self) -> None:
        self.transport: Any = None
        self.is_open = False
        self.idle_since = 0.0
        self.waiter: asyncio.Future[None] | None = None
        self.asked = False

    def ask(self, head: bytes, data: bytes, *, only_head: bool) -> None:
        """Send a request. `only_head`: of the answer to HEAD, whose length is of no body."""
        self.parser = httptools.HttpResponseParser(self)
        self.status, self.headers, self.head_size = 0, HeaderList(), 0
        self.parts: list[bytes] = []
        self.size = 0
        self.error: UpstreamError | None = None
        self.sink: Sink | None = None
        self.paused = self.complete = self.reusable = self.until_close = False
        self.only_head, self.asked = only_head, True
        self.transport.writelines((head, data)) if data else self.transport.write(head)

    async def wait(self) -> None:
        """Until something new is here."""
        self.waiter = asyncio.get_running_loop().create_future()
        try:
            await self.waiter
        finally:
            self.waiter = None

    def take(self) -> bytes:
        """What of the body is here."""
        parts, self.parts, self.size = self.parts, [], 0
        if self.paused:
            self.paused = False
            self.transport.resume_reading()
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def fail(self, error: UpstreamError) -> None:
        if not self.complete:
            self.error = self.error or error
        self.reusable = False
        self.transport.abort()

    def _wake(self) -> None:
        if self.waiter is None or self.waiter.done():
            return
        if self.sink is None or self.complete or self.error is not None or not self.status or self.sink.is_full():
            self.waiter.set_result(None)
        elif self.parts:
            self.sink.push(self.take())

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.is_open = transport, True

    def data_received(self, data: bytes) -> None:
        if not self.asked or self.complete:  # an answer that nobody asked for
            self.reusable = False
            self.transport.abort()
            return
        if not self.status:
            self.head_size += len(data)
        try:
            self.parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.fail(NoHttp())
        if not self.status and self.head_size > MOST_HEAD:
            self.fail(NoHttp())
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = self.reusable = False
        if self.asked and not self.complete:
            if self.until_close and exc is None and self.error is None:
                self.complete = True
            else:
                self.error = self.error or UpstreamError()
            self._wake()

    # What llhttp calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.status:  # else it stands behind the body
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self.parser.get_status_code()
        if self.status or status < 200:  # an answer too many, or one before the answer
            self.reusable, self.headers = False, self.headers if self.status else []
            return
        self.status, self.reusable = status, self.parser.should_keep_alive()
        stated = {name: value for name, value in self.headers}
        chunked = stated.get(b"transfer-encoding", b"").lower().endswith(b"chunked")
        self.until_close = not chunked and b"content-length" not in stated
        if self.only_head:
            self.complete, self.reusable = True, False

    def on_body(self, body: bytes) -> None:
        if self.complete:
            return
        self.parts.append(body)
        self.size += len(body)
        if self.size > HIGH_WATER and not self.paused:
            self.paused = True
            self.transport.pause_reading()

    def on_message_begin(self) -> None:
        if self.status:
            self.reusable = False

    def on_message_complete(self) -> None:
        self.complete = self.status > 0


class Response:
    """An answer whose head is here. Close it, or read it to its end and close it."""

    __slots__ = ("_client", "_line", "_url", "headers", "status")

    def __init__(self, client: "Client", url: str, line: Line) -> None:
        self._client, self._url, self._line = client, url, line
        self.status, self.headers = line.status, line.headers

    @property
    def at_end(self) -> bool:
        """Whether all of the body was handed out."""
        return self._line.complete and not self._line.parts

    @property
    def has_piece(self) -> bool:
        """Whether a piece of the body is here."""
        return bool(self._line.parts)

    def pass_to(self, sink: Sink) -> None:
        """While `piece` waits, hand what comes to `sink`, unless it is full; never the last
        piece."""
        self._line.sink = sink

    async def piece(self) -> bytes:
        """What of the body has come since the last call, at least a byte; b"" at its end. Raises
        UpstreamError where it is cut."""
        line = self._line
        while not line.parts:
            if line.complete:
                return b""
            if line.error is not None:
                raise line.error
            await line.wait()
        return line.take()

    async def read(self) -> bytes:
        """The whole body. Raises UpstreamError where it is cut."""
        parts = []
        while part := await self.piece():
            parts.append(part)
        return b"".join(parts)

    def header(self, name: bytes) -> bytes:
        """The first value of a header; b"" for none."""
        return next((value for key, value in self.headers if key == name), b"")

    def close(self) -> None:
        """Keep the connection where the answer was read to its end; else close it, which is how an
        engine learns that nobody waits for the rest."""
        self._client.give_back(self._url, self._line)


class Client:
    """Connections to all upstreams. Nothing of its own goes into a request but Host and
    Content-Length; no cookie is kept, no proxy or password of the environment is used, no redirect
    followed."""

    def __init__(self) -> None:
        self.idle: defaultdict[str, deque[Line]] = defaultdict(deque)  # the last used one at the end

    async def request(
        self,
        url: str,
        method: str,
        target: bytes,
        headers: Iterable[tuple[bytes, bytes]] = (),
        data: bytes = b"",
        *,
        repeatable: bool = True,
    ) -> Response:
        """The head of a server's answer.

        Parameters:
            url: of the server, as `address_of` takes it.
            target: path and query behind it, as they are spelled.
            headers: without Host and Content-Length.
            repeatable: whether it may be sent again where a kept connection ends before a byte of
                the answer: the server may have closed it while the request was on its way, which
                says nothing of the server.

        Raises UpstreamError where none comes.
        """
        address, verb = address_of(url), method.encode()
        lines = [b"%b %b%b HTTP/1.1\r\nHost: %b\r\n" % (verb, address.prefix, target, address.host_header)]
        lines += [b"%b: %b\r\n" % header for header in headers]
        if data or verb not in BODILESS:
            lines.append(b"Content-Length: %d\r\n" % len(data))
        lines.append(b"\r\n")
        sent, kept = (b"".join(lines), data), self._kept(url)
        if kept is not None:
            try:
                return await self._answer(url, kept, sent, only_head=verb == b"HEAD")
            except UpstreamError:
                if kept.head_size or not repeatable:
                    raise
        return await self._answer(url, await self._connected(address), sent, only_head=verb == b"HEAD")

    async def _answer(self, url: str, line: Line, sent: tuple[bytes, bytes], *, only_head: bool) -> Response:
        try:
            line.ask(*sent, only_head=only_head)
            while not line.status:
                if line.error is not None:
                    raise line.error
                await line.wait()
        except BaseException:
            line.transport.abort()
            raise
        return Response(self, url, line)

    async def fetch(
        self, url: str, method: str, target: bytes, headers: Iterable[tuple[bytes, bytes]] = (), data: bytes = b""
    ) -> tuple[int, bytes]:
        """Status and body of an answer; parameters and errors as of `request`."""
        response = await self.request(url, method, target, headers, data)
        try:
            return response.status, await response.read()
        finally:
            response.close()

    def _kept(self, url: str) -> Line | None:
        lines, oldest = self.idle[url], time.monotonic() - IDLE_SECONDS
        while lines and (lines[0].idle_since < oldest or not lines[0].is_open):
            lines.popleft().transport.abort()
        while lines:
            line = lines.pop()
            if line.is_open and not line.transport.is_closing():
                return line
        return None

    async def _connected(self, address: Address) -> Line:
        loop = asyncio.get_running_loop()
        tls = tls_context() if address.tls else None
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                _, line = await loop.create_connection(Line, address.host, address.port, ssl=tls)
        except TimeoutError:
            raise ConnectTimeout from None
        except (OSError, ValueError):  # ssl.SSLError is an OSError; a host of 64 letters a ValueError
            raise NotConnected from None
        return line

    def give_back(self, url: str, line: Line) -> None:
        sent = not line.transport.get_write_buffer_size() if line.is_open else False
        if not (line.reusable and line.complete and sent):
            line.transport.abort()
            return
        line.take()  # what nobody wanted, and reading goes on
        line.asked, line.reusable, line.idle_since = False, False, time.monotonic()
        self.idle[url].append(line)

    def close(self) -> None:
        for lines in self.idle.values():
            while lines:
                lines.pop().transport.abort()


@lru_cache(1)
def tls_context() -> ssl.SSLContext:
    """Servers must have a certificate that this machine trusts."""
    return ssl.create_default_context()
