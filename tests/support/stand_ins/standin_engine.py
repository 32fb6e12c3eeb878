"""An engine's HTTP side on loopback, in the test's own event loop: it answers as told, and keeps
what it was sent. No model, no HTTP library: what arrives is read byte by byte."""

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Routed = np.ndarray


@dataclass(eq=False)
class Seen:
    """A request as it arrived, and how its answer ended."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    data: bytes
    end: str = "in flight"

    @property
    def body(self) -> dict[str, Any]:
        return json.loads(self.data)

    def header(self, name: str) -> str | None:
        found = [value for key, value in self.headers if key.lower() == name.lower()]
        assert len(found) < 2, found
        return found[0] if found else None


def asked_of(data: bytes) -> dict[str, Any]:
    """The object of a request; an empty one where a real engine would refuse it."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


@dataclass(eq=False)
class StandInEngine:
    """What it does, to be changed while it runs.

    Fields:
        statuses: of the next answers to generations, one each; then 200.
        cut_after: events of a stream after which the connection breaks; -1: never.
        hang_up: connections are closed where the answer should begin.
        tokens, interval, width: of an answer: events, seconds between them, letters in each.
        routed_LK: number of layers and top-k of routed experts in answers; None: none.
        stream_routed: also in the last event of streams, as SGLang does.
    """

    url: str = ""
    statuses: list[int] = field(default_factory=list)
    healthy: bool = True
    cut_after: int = -1
    hang_up: bool = False
    delay: float = 0.0
    tokens: int = 4
    interval: float = 0.0
    width: int = 1
    routed_LK: tuple[int, int] | None = None
    num_experts: int = 16
    tokenize: bool = True
    seen: list[Seen] = field(default_factory=list)
    questions: list[dict[str, Any]] = field(default_factory=list)  # to /tokenize
    sent: int = 0
    connections: int = 0

    @property
    def generations(self) -> list[Seen]:
        return [one for one in self.seen if one.method == "POST" and "tokenize" not in one.target]

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while await self.request(reader, writer):
                pass
        writer.close()

    async def request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = head[0].split(" ")
        headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in head[1:] if line)]
        size = next((int(value) for name, value in headers if name.lower() == "content-length"), 0)
        one = Seen(method, target, headers, await reader.readexactly(size))
        if target == "/health":
            await self.reply(writer, 200 if self.healthy else 503, {})
            return True
        if target == "/tokenize":
            self.questions.append(one.body)
            if one.header("content-type") != "application/json":  # vLLM takes no other
                await self.reply(writer, 400, {})
                return True
            text = one.body.get("prompt") or json.dumps(one.body.get("messages"), ensure_ascii=False)
            await self.reply(writer, 200 if self.tokenize else 404, {"tokens": [10 + b % 200 for b in text.encode()]})
            return True
        self.seen.append(one)
        if self.hang_up:
            return False
        await asyncio.sleep(self.delay)
        status = self.statuses.pop(0) if self.statuses else 200
        asked = asked_of(one.data)
        if status != 200 or method != "POST":
            await self.reply(writer, status, {"at": target})
        elif asked.get("stream"):
            return await self.stream(one, asked, reader, writer)
        else:
            await self.reply(writer, 200, self.whole(asked))
        one.end = "finished"
        return True

    async def reply(self, writer: asyncio.StreamWriter, status: int, answer: object) -> None:
        body = json.dumps(answer).encode()
        head = f"HTTP/1.1 {status} S\r\nContent-Type: application/json\r\nX-Engine: a\r\nX-Engine: b\r\n"
        writer.write(f"{head}Keep-Alive: timeout=5\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()

    async def stream(
        self, one: Seen, asked: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        writer.write(b"HTTP/1.1 200 S\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        gone = asyncio.ensure_future(reader.read(1))  # the client sends nothing while it listens
        try:
            for index, event in enumerate(self.events(asked)):
                if index == self.cut_after:
                    one.end = "cut"
                    writer.transport.abort()
                    return False
                done, _ = await asyncio.wait((gone,), timeout=self.interval if index else 0)
                if done:
                    one.end = "aborted"
                    return False
                writer.write(b"%x\r\n%s\r\n" % (len(event), event))
                self.sent += len(event)
                await writer.drain()
        except ConnectionError:
            one.end = "aborted"
            raise
        finally:
            gone.cancel()
        writer.write(b"0\r\n\r\n")
        one.end = "finished"
        return False

    def events(self, asked: dict[str, Any]) -> list[bytes]:
        """Server-sent events of a stream."""
        token = {"choices": [{"index": 0, "text": "\u00e9" * self.width}]}
        events = [json.dumps(token, ensure_ascii=False)] * self.tokens
        if self.routed_LK is not None and asked.get("return_routed_experts"):
            raw = base64.b64encode(self.routed(asked).astype("<i4").tobytes()).decode()
            events.append(json.dumps({"choices": [], "sglext": {"routed_experts": raw}}))
        return [f"data: {text}\n\n".encode() for text in (*events, "[DONE]")]

    def prompt(self, asked: dict[str, Any]) -> list[int]:
        given = next(
            (asked[key] for key in ("prompt", "input_ids", "token_ids") if isinstance(asked.get(key), list)), None
        )
        given = [number for number in given or () if isinstance(number, int)]
        return given or [10 + b % 200 for b in json.dumps(asked.get("messages") or asked.get("prompt")).encode()]

    def routed(self, asked: dict[str, Any]) -> Routed:
        """Experts of every token but the last: (token + layer + j) mod the number of experts."""
        assert self.routed_LK is not None
        layers, top_k = self.routed_LK
        ids_T = np.array([*self.prompt(asked), *range(self.tokens)])[:-1]
        return ((ids_T[:, None, None] + np.arange(layers)[:, None] + np.arange(top_k)) % self.num_experts).astype(
            np.uint8
        )

    def whole(self, asked: dict[str, Any]) -> dict[str, Any]:
        """An answer that is not streamed, as vLLM's."""
        choice: dict[str, Any] = {"index": 0, "text": "\u00e9" * self.tokens, "finish_reason": "length"}
        if asked.get("return_token_ids"):
            choice |= {"prompt_token_ids": self.prompt(asked), "token_ids": list(range(self.tokens))}
        if self.routed_LK is not None:
            file = io.BytesIO()
            np.save(file, self.routed(asked))
            choice["routed_experts"] = base64.b64encode(file.getvalue()).decode()
        usage = {"prompt_tokens": len(self.prompt(asked)), "completion_tokens": self.tokens}
        return {"id": f"r{len(self.seen)}", "model": asked.get("model"), "choices": [choice], "usage": usage}


@asynccontextmanager
async def engine(**told: Any) -> AsyncIterator[StandInEngine]:
    """A stand-in that listens while the block runs."""
    found = StandInEngine(**told)
    server = await asyncio.start_server(found.connection, "127.0.0.1", 0, limit=1 << 20)
    found.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield found
    finally:
        server.close()
