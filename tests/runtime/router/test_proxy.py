"""The proxy between a client and stand-in engines: what passes, what is refused, what ends."""

import asyncio
import contextlib
import json
import time

import aiohttp
import pytest
from routers import Router, in_loop, router, until
from stand_ins.standin_engine import engine
from yarl import URL

from semmoe.runtime.router.fleet import Upstream
from semmoe.runtime.router.proxy import Connection, Limits
from semmoe.runtime.router.serve import JoinedWrites

IDS = list(range(10, 60))
COMPLETIONS = "/v1/completions"


async def stream(served: Router, body: dict, path: str = COMPLETIONS) -> bytes:
    async with served.client.post(served.url + path, json=body | {"stream": True}) as response:
        return await response.read()


@in_loop
async def test_a_pin_arrives_and_the_answer_is_the_engines(plan):
    async with engine() as one, router(plan, one.url) as served:
        status, answer = await served.post(COMPLETIONS, {"prompt": IDS})
        assert (status, answer) == (200, one.whole(one.seen[0].body) | {"id": "r1"})
        assert one.seen[0].header("x-data-parallel-rank") in ("0", "1")
        assert served.decisions == {"affine": 1}


@in_loop
async def test_streams_are_equal_byte_for_byte(plan):
    async with engine(tokens=50, width=3) as one, router(plan, one.url) as served:
        body = {"prompt": IDS, "n": 2, "tools": [{"type": "function"}], "note": "\u00fcber \u4e16\u754c \U0001f600"}
        assert await stream(served, body) == b"".join(one.events(body))
        assert one.seen[0].body == body | {"stream": True}


@in_loop
async def test_what_the_client_wrote_arrives_as_it_was_spelled(plan):
    data = b'{ "prompt" : [10, 11, 12],  "max_tokens": 1e0, "x": 12345678901234567890123, "\xc3\xa9": "\\u00e9" }'
    async with engine() as one, router(plan, one.url) as served:
        async with served.client.post(URL(f"{served.url}{COMPLETIONS}?a=%2F&b=1", encoded=True), data=data) as response:
            assert response.status == 200
        assert one.seen[0].data == data
        assert one.seen[0].target == f"{COMPLETIONS}?a=%2F&b=1"


@in_loop
async def test_tools_and_images_pass(plan):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "what"}, image]}], "tools": [{"a": 1}]}
    async with engine() as one, router(plan, one.url) as served:
        assert (await served.post("/v1/chat/completions", body))[0] == 200
        assert one.seen[-1].body == body
        assert "base64" not in json.dumps(one.questions)  # the image is not sent twice


@in_loop
async def test_headers_of_one_connection_stay_there_and_the_rest_pass(plan):
    sent = (
        b"POST /v1/completions HTTP/1.1\r\nHost: elsewhere\r\nConnection: keep-alive, X-Secret\r\nX-Secret: 1\r\nTE: trailers\r\n"
        b"Upgrade: h2c\r\nKeep-Alive: timeout=1\r\nProxy-Authorization: x\r\nAuthorization: Bearer k\r\nX-Twice: 1\r\nX-Twice: 2\r\n"
        b"Content-Length: 14\r\n\r\n" + b'{"prompt": []}'
    )
    async with engine() as one, router(plan, one.url) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(sent)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        writer.close()
    assert head.count(b"x-engine: ") == 2 and b"keep-alive" not in head
    names = [name.lower() for name, _ in one.seen[0].headers]
    assert sorted(names) == ["authorization", "content-length", "host", "x-twice", "x-twice"]
    assert one.seen[0].header("host") == one.url.removeprefix("http://")


SMUGGLED = {
    "two lengths": b"Content-Length: 2\r\nContent-Length: 20\r\n\r\n{}",
    "two equal lengths": b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
    "length and chunks": b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "chunks and length": b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "chunks twice": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "another encoding": b"Transfer-Encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "an encoding that nobody knows": b"Transfer-Encoding: xchunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "a signed length": b"Content-Length: +2\r\n\r\n{}",
    "a list of lengths": b"Content-Length: 2, 2\r\n\r\n{}",
    "a space before the colon": b"Content-Length : 2\r\n\r\n{}",
    "a folded line": b"Content-Length: 2\r\nX: a\r\n  Content-Length: 20\r\n\r\n{}",
    "a bad chunk": b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "two hosts": b"Host: a\r\nContent-Length: 2\r\n\r\n{}",
}


@pytest.mark.parametrize("head", SMUGGLED.values(), ids=SMUGGLED)
@in_loop
async def test_a_head_of_two_meanings_is_refused_and_nothing_is_sent_on(plan, head):
    hidden = b"GET /hidden HTTP/1.1\r\nHost: a\r\n\r\n"
    async with engine() as one, router(plan, one.url) as served:
        answer = await served.raw(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n" + head + hidden)
        assert answer.startswith(b"HTTP/1.1 400"), answer
        assert answer.count(b"HTTP/1.1 ") == 1
        assert one.seen == []


@in_loop
async def test_trailers_of_a_request_are_no_headers(plan):
    body = b"e\r\n" + b'{"prompt": []}' + b"\r\n0\r\nAuthorization: x\r\nX-Data-Parallel-Rank: 1\r\nHost: b\r\n\r\n"
    sent = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nX-A: 1\r\n\r\n" + body
    async with engine() as one, router(plan, one.url) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(sent)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        writer.close()
        assert sorted(name.lower() for name, _ in one.seen[0].headers) == ["content-length", "host", "x-a"]
        assert one.seen[0].data == b'{"prompt": []}'


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
        b"GET elsewhere HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\r\n\r\n\0",
    ],
)
@in_loop
async def test_what_is_no_http_is_refused(plan, sent):
    async with engine() as one, router(plan, one.url) as served:
        assert (await served.raw(sent + b"\r\n\r\n"))[:12] in (b"HTTP/1.1 400", b"")
        assert one.seen == []


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[1]",
        b"\xff\xfe{\0}\0",
        b'{"prompt": NaN',
        b"[" * 100_000,
        b'{"prompt": {"a": 1}}',
        b'{"prompt": [1, "a"]}',
    ]
    + [
        b'{"prompt": [-1]}',
        b'{"prompt": [99999999999999999999999999]}',
        b'{"messages": 1, "prompt": null}',
        b'{"prompt": [[1], 2]}',
    ],
)
@in_loop
async def test_what_is_no_prompt_goes_on_unpinned_and_is_counted(plan, data):
    async with engine() as one, router(plan, one.url) as served:
        async with served.client.post(served.url + COMPLETIONS, data=data) as response:
            assert response.status == 200  # whether it can be served is the engine's to say
        assert one.seen[0].data == data
        assert one.seen[0].header("x-data-parallel-rank") is None
        assert served.decisions == {"unknown": 1}
        assert sum(served.status.to_json()["unknown"].values()) == 1


@in_loop
async def test_heads_are_bounded(plan):
    async with engine() as one, router(plan, one.url) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(b"GET / HTTP/1.1\r\nX: ")
        with contextlib.suppress(ConnectionError):  # closed while we were sending
            for _ in range(100):
                writer.write(b"a" * 10_000)
                await writer.drain()
                await asyncio.sleep(0)
            assert (await reader.read()).startswith(b"HTTP/1.1 400")
        assert reader.at_eof() or reader.exception()
        writer.close()
        async with served.client.get(served.url + "/v1/models", headers={"X": "a" * 30_000}) as response:
            assert response.status == 200


@in_loop
async def test_bodies_are_bounded_one_by_one_and_together(plan):
    async with engine(delay=0.2) as one, router(plan, one.url, limits=Limits(body=1000, bodies=1500)) as served:
        assert (await served.post(COMPLETIONS, {"prompt": IDS, "x": "y" * 1000}))[0] == 413
        chunked = b"Transfer-Encoding: chunked\r\n\r\n" + (b"200\r\n" + b"z" * 512 + b"\r\n") * 3
        assert b" 413 " in await served.raw(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n" + chunked)
        assert one.seen == []
        body = {"prompt": IDS, "x": "y" * 600}
        found = await asyncio.gather(*(served.post(COMPLETIONS, body) for _ in range(2)))
        assert sorted(status for status, _ in found) == [200, 429]
        assert served.status.proxy.buffered == 0


@in_loop
async def test_a_body_that_does_not_come_is_given_up(plan):
    async with engine() as one, router(plan, one.url, limits=Limits(body_seconds=0.1)) as served:
        answer = await served.raw(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n{")
        assert answer.startswith(b"HTTP/1.1 408") and one.seen == []


@in_loop
async def test_all_else_passes_through(plan):
    async with engine() as one, router(plan, one.url) as served:
        async with served.client.get(served.url + "/v1/models?x=1") as response:
            assert (response.status, await response.json()) == (200, {"at": "/v1/models?x=1"})
        async with served.client.post(served.url + "/v1/embeddings", json={"input": "a"}) as response:
            assert response.status == 200
        assert one.seen[1].header("x-data-parallel-rank") is None
        assert served.decisions == {"passed": 2}


@in_loop
async def test_when_the_client_goes_the_engine_hears_of_it(plan):
    async with engine(tokens=1000, interval=0.02) as one, router(plan, one.url) as served:
        response = await served.client.post(served.url + COMPLETIONS, json={"prompt": IDS, "stream": True})
        await response.content.readany()
        response.close()
        await until(lambda: one.seen[0].end == "aborted", 1)
        await until(lambda: served.status.to_json()["ends"] == {"client_gone": 1}, 1)
        assert served.status.proxy.fleet.in_flight_G == [0, 0]


@in_loop
async def test_a_client_that_goes_before_the_first_byte_is_noticed_too(plan):
    async with engine(delay=20) as one, router(plan, one.url) as served:
        asking = asyncio.ensure_future(served.post(COMPLETIONS, {"prompt": IDS}))
        await until(lambda: bool(one.seen))
        asking.cancel()
        await until(lambda: served.status.to_json()["ends"] == {"client_gone": 1}, 1)
        assert served.status.proxy.fleet.upstreams[0].in_flight == 0


@in_loop
async def test_an_upstream_that_dies_in_a_stream_leaves_half_an_answer_and_no_end(plan):
    async with engine(tokens=10, cut_after=3) as one, router(plan, one.url) as served:
        with pytest.raises(aiohttp.ClientPayloadError):
            await stream(served, {"prompt": IDS})
        assert len(one.generations) == 1  # what has begun is not tried again
        assert served.status.to_json()["ends"] == {"cut": 1}


@in_loop
async def test_503_and_broken_connections_are_tried_again_and_nothing_else(plan):
    async with engine(statuses=[503, 503]) as one, router(plan, one.url, limits=Limits(pause=0.01)) as served:
        assert (await served.post(COMPLETIONS, {"prompt": IDS}))[0] == 200
        assert len(one.generations) == 3
        for status in (400, 429, 500):
            one.statuses[:] = [status]
            assert (await served.post(COMPLETIONS, {"prompt": IDS}))[0] == status
        one.statuses[:] = [503] * 3
        assert (await served.post(COMPLETIONS, {"prompt": IDS}))[0] == 503  # the engine's own answer
        assert len(one.generations) == 9
        assert served.status.to_json()["retries"] == {"503": 4}


@in_loop
async def test_a_kept_connection_that_the_engine_has_closed_costs_no_request(plan):
    async with engine(tokens=2) as one, router(plan, one.url, limits=Limits(pause=0.01)) as served:
        for _ in range(10):  # the stand-in closes after every stream and does not say so
            assert await stream(served, {"prompt": IDS}) == b"".join(one.events({}))
        assert served.status.to_json()["refused"] == {}


@in_loop
async def test_what_may_have_been_done_is_not_done_twice(plan):
    async with engine(hang_up=True) as one, router(plan, one.url, limits=Limits(pause=0.01)) as served:
        async with served.client.post(served.url + "/v1/load_lora_adapter", json={}) as response:
            assert response.status == 502
        assert len(one.seen) == 1


@in_loop
async def test_a_request_goes_to_the_next_rank_where_its_own_is_gone(plan):
    async with engine() as one, engine() as two, router(plan, one.url, two.url) as served:
        await served.post(COMPLETIONS, {"prompt": IDS})
        there, other = (one, two) if one.generations else (two, one)
        there.hang_up = True
        there.healthy = False
        assert (await served.post(COMPLETIONS, {"prompt": IDS}))[0] == 200
        assert len(other.generations) == 1
        await until(lambda: [u["up"] for u in served.status.to_json()["upstreams"]].count(False) == 1)
        assert (await served.post(COMPLETIONS, {"prompt": IDS}))[0] == 200
        there.hang_up, there.healthy = False, True
        await until(lambda: all(u["up"] for u in served.status.to_json()["upstreams"]))


@in_loop
async def test_without_any_upstream_it_says_so(plan):
    async with engine(healthy=False) as one, router(plan, one.url) as served:
        async with served.client.get(served.url + "/readyz") as response:
            assert response.status == 503
        async with served.client.post(served.url + COMPLETIONS, json={"prompt": IDS}) as response:
            assert response.status == 503 and int(response.headers["retry-after"]) > 0
        one.healthy = True
        await until(lambda: served.status.ready)
        assert (await served.post(COMPLETIONS, {"prompt": IDS}))[0] == 200


def test_a_timeout_takes_no_upstream_out_while_it_answers():
    busy, silent = (Upstream("http://a", 0, 1, up=True, failures=0) for _ in range(2))
    busy.heard = time.monotonic()
    for upstream in (busy, silent):
        for _ in range(3):
            upstream.failed("ConnectionTimeoutError", TimeoutError())
    assert busy.up and not silent.up
    for _ in range(3):
        busy.failed("ClientConnectorError", ConnectionError())
    assert not busy.up and busy.errors == {"ConnectionTimeoutError": 3, "ClientConnectorError": 3}


@in_loop
async def test_beyond_the_bound_of_every_rank_a_request_waits_elsewhere(plan):
    async with engine(delay=0.3) as one, router(plan, one.url, max_inflight=2) as served:
        found = await asyncio.gather(*(served.post(COMPLETIONS, {"prompt": IDS}) for _ in range(6)))
        assert sorted(status for status, _ in found) == [200] * 4 + [429] * 2
        assert sorted(one.header("x-data-parallel-rank") or "" for one in one.generations) == ["0", "0", "1", "1"]
        assert served.status.to_json()["refused"] == {"full": 2}


@in_loop
async def test_a_slow_reader_holds_nothing_but_itself_up(plan):
    async with engine(tokens=2000, width=50_000) as one, router(plan, one.url) as served:  # 200 MB
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        body = json.dumps({"prompt": IDS, "stream": True}).encode()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await until(lambda: one.sent > 0)
        stuck = -1
        while stuck != one.sent:
            stuck = one.sent
            await asyncio.sleep(0.3)
        assert 0 < stuck < 60_000_000  # what the sockets and two buffers hold
        assert (await served.post(COMPLETIONS, {"prompt": IDS}))[0] == 200
        writer.transport.abort()
        await until(lambda: one.seen[0].end == "aborted")
        assert reader is not None


@in_loop
async def test_a_reader_that_stops_and_goes_on_has_every_byte_in_its_order(plan):
    async with engine(tokens=300, width=20_000) as one, router(plan, one.url) as served:  # 12 MB
        asked = {"prompt": IDS, "stream": True}
        async with served.client.post(served.url + COMPLETIONS, json=asked) as response:
            found = b""
            while piece := await response.content.readany():
                found += piece
                if len(found) % 5 == 0:
                    await asyncio.sleep(0.02)
        assert found == b"".join(one.events({}))


class Written(asyncio.Transport):
    """Keeps what is written, write by write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.writes.append(bytes(data))


def test_a_head_that_is_held_goes_with_what_follows():
    transport, line = Written(), Connection()
    joined = JoinedWrites(transport, line)
    for holds in (True, False):
        line.holds = holds
        for part in (b"head", b"piece", b"end"):
            joined.write(part)
    assert transport.writes == [b"headpiece", b"end", b"head", b"piece", b"end"]


@in_loop
async def test_a_head_waits_for_no_piece_that_is_not_there(plan):
    body = b'{"prompt": [10, 11]}'
    sent = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    has_head = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (await reader.readuntil(b"\r\n\r\n")).startswith(b"GET"):  # a probe
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n")
        await has_head.wait()
        writer.write(b"abc")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with router(plan, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(sent)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        has_head.set()
        assert await reader.readexactly(3) == b"abc"
        writer.close()
    server.close()


async def status_of(served: Router, data: bytes) -> int:
    async with served.client.post(served.url + COMPLETIONS, data=data) as response:
        return response.status


@in_loop
async def test_numbers_of_any_length_arrive_as_they_were(plan):
    long = b'{"prompt": [10, 11], "seed": 123456789012345678901234567890, "bias": NaN, "routed_dp_rank": 1}'
    exact = b'{"prompt": [10, 11], "seed": 123456789012345678901234567890}'
    async with engine() as one, engine() as two, router(plan, one.url, two.url, engine="sglang") as served:
        for data in (long, exact):
            assert await status_of(served, data) == 200
        assert [each.body["seed"] for each in one.generations + two.generations] == [123456789012345678901234567890] * 2
        assert served.status.to_json()["unknown"].get("no_prompt", 0) == 0
        infinite = b'{"prompt": [10, 11], "routed_dp_rank": 1e999}'
        assert await status_of(served, infinite) == 200


@in_loop
async def test_hundreds_of_streams_at_once(plan):
    async with engine(tokens=5, interval=0.02) as one, router(plan, one.url, max_inflight=200) as served:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as client:
            many = Router(served.url, served.status, client)
            found = await asyncio.gather(*(stream(many, {"prompt": IDS}) for _ in range(200)))
        assert set(found) == {b"".join(one.events({}))}
        ranks = [each.header("x-data-parallel-rank") for each in one.generations]
        assert abs(ranks.count("0") - ranks.count("1")) < 100
        assert served.status.proxy.fleet.tokens_G == [0, 0]


@in_loop
async def test_redirects_and_cookies_are_the_clients(plan):
    async with engine(statuses=[307]) as one, router(plan, one.url) as served:
        response = await served.client.post(served.url + COMPLETIONS, json={"prompt": IDS}, allow_redirects=False)
        assert response.status == 307
        response.release()
        assert len(one.generations) == 1


@in_loop
async def test_a_fault_of_the_router_is_one_answer(plan, caplog):
    async with engine() as one, router(plan, one.url) as served:
        served.status.proxy.scheduler.fleet.tokens_G = None  # pyright: ignore
        assert (await served.post(COMPLETIONS, {"prompt": IDS}))[0] == 500
        assert "a fault of the router" in caplog.text and "[10, 11" not in caplog.text
