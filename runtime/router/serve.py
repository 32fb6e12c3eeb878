"""`semmoe route` as a process: sockets, server, probes, and an end that drains.

Shape letters: G data-parallel ranks.
"""

import asyncio
import gc
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from semmoe.profiles.errors import InputError
from semmoe.runtime.engines.band import Band
from semmoe.runtime.engines.plan_files import PlanFacts
from semmoe.runtime.engines.scorer import PlanScorer
from semmoe.runtime.router.app import App, health_pages, number_pages
from semmoe.runtime.router.client import Client
from semmoe.runtime.router.fleet import PROBE_SECONDS, Fleet, keep_probing, probe_all
from semmoe.runtime.router.metrics import Metrics
from semmoe.runtime.router.proxy import CONNECTION, Connection, Limits, Proxy
from semmoe.runtime.router.record import Recorder, open_recorder
from semmoe.runtime.router.scheduler import Scheduler
from semmoe.runtime.router.status import Status
from semmoe.runtime.router.tokens import EngineTokenizer, LocalTokenizer, Tokenizer

KEEP_ALIVE = 65  # seconds that a client's connection may rest
BACKLOG = 2048
MOST_HEAD = 1 << 18  # bytes of a request's head
LOOK_SECONDS, FINDING_SECONDS = 10.0, 3600.0  # until the next look for a finding; and after one


@dataclass(frozen=True, kw_only=True)
class RouteOptions:
    """What is asked of a router.

    Fields:
        plan: a plan directory, or what a plug-in's export wrote.
        upstreams: URLs, in the order of the ranks.
        engine: one of pins.ENGINES.
        dp_ranks: data-parallel ranks of all upstreams together; 0: the plan's ranks behind one
            upstream, one for each of several.
        tokenizer: a checkpoint whose tokenizer is used; "": the engine's /tokenize.
        host, port: where it listens; port 0: any free one.
        metrics_port: of its own pages; None: on the same port.
        band: as in Band.
        max_inflight: requests on a rank.
        probe_seconds: between two looks at an upstream's health.
        record: a trace that is written of what was served; "" for none.
    """

    plan: str
    upstreams: tuple[str, ...]
    engine: str = "vllm"
    dp_ranks: int = 0
    tokenizer: str = ""
    host: str = "127.0.0.1"
    port: int = 8000
    metrics_port: int | None = None
    band: float = 1.1
    max_inflight: int = 256
    probe_seconds: float = PROBE_SECONDS
    record: str = ""
    limits: Limits = Limits()


def make_fleet(options: RouteOptions, plan_ranks: int) -> Fleet:
    """Upstreams and their ranks. Raises InputError where they do not fit the plan."""
    several = len(options.upstreams) > 1
    ranks = options.dp_ranks or (len(options.upstreams) if several else plan_ranks)
    if plan_ranks % ranks:
        what = f"--dp-ranks {ranks}" if options.dp_ranks else f"{ranks} upstreams, a rank each"
        raise InputError(f"{options.plan} is for {plan_ranks} ranks, which do not divide over {what}")
    return Fleet(options.upstreams, ranks, options.max_inflight)


@asynccontextmanager
async def open_router(options: RouteOptions) -> AsyncIterator[Status]:
    """A router without sockets of its own, whose upstreams are probed while the block runs. Raises
    InputError for a plan, a tokenizer or upstreams that cannot be used."""
    scorer = PlanScorer.open(options.plan, ranks=0)
    fleet = make_fleet(options, scorer.ranks)
    if fleet.ranks != scorer.ranks:
        scorer = PlanScorer.of(scorer.plan, ranks=fleet.ranks)
    band = Band(fleet.ranks, options.band)
    tokenizer: Tokenizer | None = LocalTokenizer(options.tokenizer) if options.tokenizer else None
    metrics = Metrics()
    client = Client()
    async with recording(options, scorer.plan, fleet.ranks, metrics) as recorder:
        if tokenizer is None and options.engine != "trtllm":  # it has no /tokenize
            tokenizer = EngineTokenizer(client, fleet, options.engine)
        scheduler = Scheduler(scorer, band, fleet, options.engine, tokenizer)
        proxy = Proxy(client, scheduler, metrics, options.limits, recorder)
        about = {"plan": Path(options.plan).name, "engine": options.engine, "band": options.band}
        await probe_all(client, fleet)
        probing = asyncio.ensure_future(keep_probing(client, fleet, options.probe_seconds))
        try:
            yield Status(proxy, about)
        finally:
            probing.cancel()
            client.close()


@asynccontextmanager
async def recording(
    options: RouteOptions, plan: PlanFacts, ranks: int, metrics: Metrics
) -> AsyncIterator[Recorder | None]:
    """The recorder that was asked for; when the block ends, its trace is complete."""
    if not options.record:
        yield None
        return
    recorder = open_recorder(options.record, plan, ranks, options.engine, metrics, options.tokenizer)
    recorder.start()
    try:
        yield recorder
    finally:
        await asyncio.get_running_loop().run_in_executor(None, recorder.close)


class JoinedWrites:
    """The transport to a client, which writes a head together with the first of its body."""

    def __init__(self, transport: asyncio.Transport, line: Connection) -> None:
        self.transport, self.line, self.held = transport, line, b""
        self.is_closing, self.close = transport.is_closing, transport.close

    def write(self, data: bytes) -> None:
        if self.line.holds:
            self.line.holds, self.held = False, data
            return
        if self.held:
            data, self.held = self.held + data, b""
        self.transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)


class ClientProtocol(HttpToolsProtocol):
    """A client's connection: the head of a request has a bound, since the parser itself has none,
    and who works for the client hears at once that it has gone."""

    in_head, head = True, 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.line = Connection()
        super().connection_made(JoinedWrites(transport, self.line))  # pyright: ignore[reportArgumentType]

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.line.lost()

    def on_message_begin(self) -> None:
        self.in_head, self.head = True, 0
        super().on_message_begin()
        self.line.whole = False
        self.scope[CONNECTION] = self.line  # pyright: ignore

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self.line.whole = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.in_head:  # what stands behind the body is no header: it would be one to whom we send it
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self.in_head = False
        super().on_headers_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.line.full = True

    def resume_writing(self) -> None:
        super().resume_writing()
        self.line.full = False

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.in_head:
            self.head += len(data)
            if self.head > MOST_HEAD and not self.transport.is_closing():
                self.send_400_response("The head of the request is too large.")


class Server(uvicorn.Server):
    """A server whose signals are ours."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def make_server(app: App) -> Server:
    config = uvicorn.Config(
        app,  # pyright: ignore[reportArgumentType]
        http=ClientProtocol,
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE,
        backlog=BACKLOG,
    )
    return Server(config)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises InputError where the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot listen on {host}:{port}: {error}") from None
    found.setblocking(False)
    return found


def address_of(found: socket.socket) -> str:
    host, port = found.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve(options: RouteOptions, note: Callable[[str], None]) -> None:
    """Route until a signal says to stop; then take no more requests, and end when all answers have.

    `note`: told where it listens, and what happens. A second signal ends at once.
    Raises InputError where it cannot start.
    """
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # an answer cut on purpose is none
    main = listen(options.host, options.port)
    own = None if options.metrics_port is None else listen(options.host, options.metrics_port)
    async with open_router(options) as status:
        pages = health_pages(status) | (number_pages(status) if own is None else {})
        servers = [(make_server(App(pages, status.proxy)), main)]
        if own is not None:
            servers.append((make_server(App(health_pages(status) | number_pages(status))), own))
        gc.collect()
        gc.freeze()  # modules and plan stay: no collection looks at them while streams wait
        _drain_on_signals(status, [server for server, _ in servers], note)
        _say_start(status, options, note)
        for _, found in servers[1:]:
            note(f"pages and metrics: {address_of(found)}")
        note(f"listening on {address_of(main)}")
        beside = [asyncio.ensure_future(server.serve([found])) for server, found in servers[1:]]
        telling = asyncio.ensure_future(_tell_finding(status, note))
        await servers[0][0].serve([main])
        telling.cancel()
        for server, _ in servers[1:]:
            server.should_exit = True
        await asyncio.gather(*beside)


def _say_start(status: Status, options: RouteOptions, note: Callable[[str], None]) -> None:
    fleet = status.proxy.fleet
    how = "named in each request" if fleet.inner else "one per upstream"
    note(f"{options.plan}: {fleet.ranks} data-parallel ranks, {how}")
    for upstream in fleet.upstreams:
        if not upstream.up:
            note(f"{upstream.url} does not answer {', '.join(upstream.errors)}: it is probed until it does")
    if status.proxy.scheduler.tokenizer is None:
        note("prompts of text are not tokenised and go unpinned: TensorRT-LLM has no /tokenize, name --tokenizer CKPT")


async def _tell_finding(status: Status, note: Callable[[str], None]) -> None:
    """Say once an hour that what is served falls short of what the plan promised, where it does."""
    while True:
        recorder = status.proxy.recorder
        finding = None if recorder is None else recorder.finding()
        if finding is not None:
            note(finding)
        await asyncio.sleep(FINDING_SECONDS if finding else LOOK_SECONDS)


def _drain_on_signals(status: Status, servers: list[Server], note: Callable[[str], None]) -> None:
    def stop() -> None:
        again, status.draining = status.draining, True
        if again:
            note("ended at once")
            for server in servers:
                server.should_exit = server.force_exit = True
            return
        waiting = sum(upstream.in_flight for upstream in status.proxy.fleet.upstreams)
        note(f"no more requests; {waiting} in flight are finished, a second signal ends them")
        servers[0].should_exit = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)


def run(options: RouteOptions, note: Callable[[str], None]) -> None:
    """`serve` in a fresh event loop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(options, note))
