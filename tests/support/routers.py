"""A router on loopback in the test's own event loop, and the client that talks to it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import aiohttp
import uvloop

from semmoe.runtime.router.app import App, health_pages, number_pages
from semmoe.runtime.router.serve import RouteOptions, address_of, listen, make_server, open_router
from semmoe.runtime.router.status import Status


@dataclass(frozen=True, eq=False)
class Router:
    """A router that runs: its address, what it says of itself, and a client of it."""

    url: str
    status: Status
    client: aiohttp.ClientSession

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    async def post(self, path: str, body: object, **headers: str) -> tuple[int, dict[str, Any]]:
        async with self.client.post(self.url + path, json=body, headers=headers) as response:
            return response.status, await response.json()

    async def raw(self, sent: bytes) -> bytes:
        """All that comes back for bytes that are no proper request."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(sent)
        try:
            return await asyncio.wait_for(reader.read(), 5)
        finally:
            writer.close()

    @property
    def decisions(self) -> dict[str, int]:
        return self.status.to_json()["decisions"]


@asynccontextmanager
async def router(plan: object, *urls: str, **options: Any) -> AsyncIterator[Router]:
    """A router in front of `urls`, probed every 50 ms."""
    asked = RouteOptions(plan=str(plan), upstreams=urls, **{"probe_seconds": 0.05, **options})
    async with open_router(asked) as status, aiohttp.ClientSession() as client:
        server = make_server(App(health_pages(status) | number_pages(status), status.proxy))
        found = listen("127.0.0.1", 0)
        serving = asyncio.ensure_future(server.serve([found]))
        try:
            yield Router(address_of(found), status, client)
        finally:
            await client.close()
            server.should_exit = server.force_exit = True
            await serving


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """A test that is a coroutine, at most a minute long, in the event loop of the command."""

    @wraps(test)
    def run(*values: Any, **named: Any) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(asyncio.wait_for(test(*values, **named), 60))

    return run


async def until(true: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait until something holds."""
    end = asyncio.get_running_loop().time() + seconds
    while not true():
        assert asyncio.get_running_loop().time() < end, "it never came true"
        await asyncio.sleep(0.01)
