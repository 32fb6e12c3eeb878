"""HTTP to the upstreams: what is an answer and what is none, and which connections are kept."""

import asyncio
import contextlib
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from routers import in_loop, until

from semmoe.runtime.router import client as client_module
from semmoe.runtime.router.client import Client, Line, NoHttp, NotConnected, UpstreamError, address_of


@dataclass(eq=False)
class Script:
    """A server that answers every request with the same bytes, and closes where it is told so."""

    answer: bytes
    closes: bool = False
    url: str = ""
    heads: list[bytes] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    connections: int = 0
    open: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                self.heads.append(head)
                size = next((int(h[15:]) for h in head.lower().split(b"\r\n") if h.startswith(b"content-length:")), 0)
                self.bodies.append(await reader.readexactly(size))
                writer.write(self.answer)
                await writer.drain()
                if self.closes:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        self.open -= 1
        writer.close()


@asynccontextmanager
async def script(
    answer: bytes, *, closes: bool = False, tls: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[Script, Client]]:
    found = Script(answer, closes)
    server, client = await asyncio.start_server(found.serve, "127.0.0.1", 0, ssl=tls), Client()
    port = server.sockets[0].getsockname()[1]
    found.url = f"https://localhost:{port}" if tls else f"http://127.0.0.1:{port}"
    try:
        yield found, client
    finally:
        client.close()
        server.close()


WHOLE = {
    "with a length": (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", True),
    "in chunks": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1;x=y\r\nc\r\n0\r\nX: trailer\r\n\r\n",
        True,
    ),
    "after 100 and 103": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
        True,
    ),
    "of a server that will close": (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 3\r\n\r\nabc", False),
    "of HTTP/1.0": (b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nabc", False),
    "with bytes behind it": (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcHTTP/1.1 200 OK\r\n", False),
}


@pytest.mark.parametrize(("answer", "kept"), WHOLE.values(), ids=WHOLE)
@in_loop
async def test_an_answer_is_read_to_its_end_and_its_connection_kept_where_it_may_be(answer, kept):
    async with script(answer) as (server, client):
        for _ in range(3):
            assert await client.fetch(server.url, "POST", b"/a?b=%2F", ((b"x-y", b"1"),), b"body") == (200, b"abc")
        assert server.connections == (1 if kept else 3)
        host = server.url.removeprefix("http://").encode()
        assert (
            server.heads[0] == b"POST /a?b=%2F HTTP/1.1\r\nHost: " + host + b"\r\nx-y: 1\r\nContent-Length: 4\r\n\r\n"
        )
        assert server.bodies == [b"body"] * 3
        await until(lambda: server.open == (1 if kept else 0))


class Nowhere(asyncio.Transport):
    """Takes what is sent."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        pass


@pytest.mark.parametrize("answer", [answer for answer, _ in list(WHOLE.values())[:5]])
def test_an_answer_may_come_in_any_pieces(answer):
    for step in (1, 2, 7, len(answer)):
        line = Line()
        line.connection_made(Nowhere())
        line.ask(b"GET / HTTP/1.1\r\n\r\n", b"", only_head=False)
        for first in range(0, len(answer), step):
            assert not line.complete
            line.data_received(answer[first : first + step])
        assert (line.status, line.take(), line.complete, line.error) == (200, b"abc", True, None)


@in_loop
async def test_an_answer_that_nobody_takes_leaves_its_connection_readable():
    async with script(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + bytes(100_000)) as (server, client):
        for _ in range(3):
            response = await client.request(server.url, "GET", b"/")
            await asyncio.sleep(0.1)
            response.close()
        assert len((await asyncio.wait_for(client.fetch(server.url, "GET", b"/"), 2))[1]) == 100_000


@in_loop
async def test_names_of_headers_come_in_small_letters_and_trailers_are_none():
    answer = b"HTTP/1.1 200 OK\r\nX-A: 1\r\nX-A: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-Late: 1\r\n\r\n"
    async with script(answer) as (server, client):
        response = await client.request(server.url, "GET", b"/")
        assert await response.read() == b"" and response.at_end
        response.close()
        assert response.headers == [(b"x-a", b"1"), (b"x-a", b"2"), (b"transfer-encoding", b"chunked")]
        assert response.header(b"x-a") == b"1" and response.header(b"x-b") == b""
        assert b"content-length" not in server.heads[0].lower()


@pytest.mark.parametrize(("method", "answer"), [
    ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 3000\r\n\r\n"),
    ("GET", b"HTTP/1.1 204 No\r\n\r\n"),
    ("GET", b"HTTP/1.1 304 No\r\nContent-Length: 30\r\n\r\n"),
])  # fmt: skip
@in_loop
async def test_answers_without_a_body_have_none(method, answer):
    async with script(answer) as (server, client):
        for _ in range(2):
            assert (await asyncio.wait_for(client.fetch(server.url, method, b"/"), 2))[1] == b""


@in_loop
async def test_an_answer_without_a_length_ends_with_its_connection():
    async with script(b"HTTP/1.1 200 OK\r\n\r\nabc", closes=True) as (server, client):
        assert await client.fetch(server.url, "GET", b"/") == (200, b"abc")


CUT = {
    "in its length": b"HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\nabc",
    "in its chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
    "in a chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n30\r\nabc",
}


@pytest.mark.parametrize("answer", CUT.values(), ids=CUT)
@in_loop
async def test_half_an_answer_is_none(answer):
    async with script(answer, closes=True) as (server, client):
        response = await client.request(server.url, "GET", b"/")
        assert await response.piece() == b"abc"
        with pytest.raises(UpstreamError):
            await response.piece()
        assert not response.at_end
        response.close()
        assert not client.idle[server.url]


NONE = {
    "nothing": b"",
    "half a head": b"HTTP/1.1 200 OK\r\nX: ",
    "no HTTP": b"SSH-2.0-OpenSSH_9.9\r\n",
    "two ends": b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "a folded header": b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 0\r\n\r\n",
    "an upgrade": b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    "a head without end": b"HTTP/1.1 200 OK\r\nX: " + b"a" * (client_module.MOST_HEAD + 1),
}


@pytest.mark.parametrize("answer", NONE.values(), ids=NONE)
@in_loop
async def test_what_is_no_answer_is_said_so(answer):
    async with script(answer, closes=True) as (server, client):
        with pytest.raises(UpstreamError) as error:
            await asyncio.wait_for(client.request(server.url, "GET", b"/"), 2)
        assert isinstance(error.value, NoHttp) == (len(answer) > 30 or answer.startswith(b"SSH"))


@in_loop
async def test_a_server_that_is_not_there(monkeypatch):
    client = Client()
    for url in ("http://127.0.0.1:9", "http://" + "a" * 70 + ".invalid"):
        with pytest.raises(NotConnected):
            await client.request(url, "GET", b"/")
    monkeypatch.setattr(client_module, "CONNECT_SECONDS", 0.0)
    with pytest.raises(TimeoutError) as error:  # no reason to call a server that answers others dead
        await client.request("http://127.0.0.1:9", "GET", b"/")
    assert isinstance(error.value, NotConnected)


@in_loop
async def test_a_connection_that_was_closed_or_rested_too_long_is_not_used(monkeypatch):
    async with script(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", closes=True) as (server, client):
        await client.fetch(server.url, "GET", b"/")
        await until(lambda: server.open == 0 and not client.idle[server.url][0].is_open)
        await client.fetch(server.url, "GET", b"/")
        assert server.connections == 2
        await until(lambda: server.open == 0 and not client.idle[server.url][0].is_open)
        server.closes = False
        await client.fetch(server.url, "GET", b"/")
        monkeypatch.setattr(client_module, "IDLE_SECONDS", 0.0)
        await client.fetch(server.url, "GET", b"/")
        assert server.connections == 4
        await until(lambda: server.open == 1)


@in_loop
async def test_a_kept_connection_that_the_server_leaves_is_no_failure_of_the_server():
    asked = []

    async def once_each(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", b""):
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                asked.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(answer)
        writer.close()

    server, client = await asyncio.start_server(once_each, "127.0.0.1", 0), Client()
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        for _ in range(2):  # the second is read from the first's connection, and sent again on its own
            assert await client.fetch(url, "POST", b"/a") == (200, b"abc")
        assert len(asked) == 3
        with pytest.raises(UpstreamError):
            await client.request(url, "POST", b"/a", repeatable=False)
        assert len(asked) == 4
    finally:
        client.close()
        server.close()


@in_loop
async def test_bytes_that_nobody_asked_for_end_a_connection_that_rests():
    async with script(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n") as (server, client):
        await client.fetch(server.url, "GET", b"/")
        line = client.idle[server.url][0]
        line.data_received(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhidden")
        assert await client.fetch(server.url, "GET", b"/") == (200, b"")
        assert server.connections == 2


@in_loop
async def test_an_answer_before_the_request_was_sent_ends_the_connection():
    """The rest of a large body must not be taken for a request."""
    received, ended = 0, asyncio.Event()

    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal received
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Large\r\nContent-Length: 0\r\n\r\n")
        await asyncio.sleep(0.2)
        with contextlib.suppress(ConnectionError):
            while part := await reader.read(1 << 16):
                received += len(part)
        writer.close()
        ended.set()

    server, client = await asyncio.start_server(early, "127.0.0.1", 0), Client()
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    assert (await client.fetch(url, "POST", b"/", (), bytes(30 << 20)))[0] == 413
    assert not client.idle[url]
    await ended.wait()
    assert received < 30 << 20
    server.close()


@in_loop
async def test_what_is_not_taken_waits_at_the_server():
    async with script(b"HTTP/1.1 200 OK\r\nContent-Length: 30000000\r\n\r\n" + bytes(30_000_000)) as (server, client):
        response = await client.request(server.url, "GET", b"/")
        await asyncio.sleep(0.3)
        assert 0 < len(await response.piece()) < 1 << 20
        size = len(await response.read())
        assert size > 28_000_000
        response.close()
        assert len(client.idle[server.url]) == 1


@in_loop
async def test_a_request_that_is_given_up_closes_its_connection():
    async with script(b"") as (server, client):
        asking = asyncio.ensure_future(client.request(server.url, "POST", b"/", (), b"x"))
        await until(lambda: bool(server.bodies))
        asking.cancel()
        await until(lambda: server.open == 0)


@in_loop
async def test_over_tls_to_servers_that_are_trusted(tmp_path, monkeypatch):
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    files = ["-addext", "subjectAltName=DNS:localhost", "-keyout", tmp_path / "key", "-out", tmp_path / "cert"]
    try:
        subprocess.run(["openssl", *words.split(), *files], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no openssl that makes a certificate")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    async with script(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", tls=tls) as (server, client):
        with pytest.raises(NotConnected):
            await client.fetch(server.url, "GET", b"/")
        context = ssl.create_default_context(cafile=str(tmp_path / "cert"))
        monkeypatch.setattr(client_module, "tls_context", lambda: context)
        for _ in range(2):
            assert await client.fetch(server.url, "GET", b"/") == (200, b"abc")


def test_how_urls_are_spelled():
    found = address_of("https://ex\u00e4mple.org/engine/a")
    assert (found.host, found.port, found.tls) == ("xn--exmple-cua.org", 443, True)
    assert (found.prefix, found.host_header) == (b"/engine/a", b"xn--exmple-cua.org")
    found = address_of("http://[::1]:8001")
    assert (found.host, found.port, found.host_header) == ("::1", 8001, b"[::1]:8001")
