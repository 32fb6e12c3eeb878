"""`--record`: the routing of what was served, written as a trace, and compared with what the plan
had promised.

Answers reach the trace through a bounded queue and a thread of their own: a full queue drops, and
counts; no answer waits for the disk. The trace can be read at any time, up to the last minute.

Shape letters: T rows, L MoE layers, K top-k, E experts, G data-parallel ranks.
"""

import asyncio
import logging
import queue
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from semmoe.profiles.engines.records import EngineRequest
from semmoe.profiles.engines.responses import read_answer
from semmoe.profiles.errors import InputError
from semmoe.profiles.numbering import Relabelling, find_relabelling
from semmoe.profiles.trace import TraceInfo
from semmoe.profiles.trace_writer import Served, TraceWriter
from semmoe.runtime.engines.plan_files import PlanFacts
from semmoe.runtime.engines.recorder import MOST_DISK_BYTES, WRITE_SECONDS
from semmoe.runtime.router.client import Response, UpstreamError
from semmoe.runtime.router.metrics import Metrics, Recent
from semmoe.runtime.router.proxy import Answer, UpstreamCut, answer_headers, pass_on
from semmoe.runtime.router.routed import Asking, Events, ask_for_routing, split_answer
from semmoe.runtime.router.scheduler import Asked, Chosen

LOG = logging.getLogger("semmoe.route")
QUEUE = 256  # answers that wait for the thread
LEAST_REQUESTS = 30  # for a finding
CONFIDENCE = 1.96  # standard errors of an interval of 95 %
JSON, EVENTS = b"application/json", b"text/event-stream"
LARGE_ANSWER = 1 << 16  # bytes from which on an answer is taken apart in a thread

# Reasons of the counter.
RECORDED, DROPPED, UNTOLD, LEFT_OUT, BEYOND = "recorded", "dropped", "untold", "left_out", "full"


@dataclass(frozen=True, eq=False)
class Told:
    """What an answer told: its JSON object, and where its request had gone."""

    record: dict[str, Any]
    asking: Asking
    chosen: Chosen


@dataclass(eq=False)
class Recorder:
    """Takes the routing out of answers. Open it with `recording`.

    Fields:
        path: the trace.
        plan, ranks: what served shares are computed against.
        writer: of the trace; used by the thread alone.
    """

    path: Path
    plan: PlanFacts
    ranks: int
    engine: str
    metrics: Metrics
    writer: TraceWriter
    short: Recent = field(default_factory=Recent)  # served less expected, by request
    counted: Counter[str] = field(default_factory=Counter)
    waiting: "queue.Queue[Told | None]" = field(default_factory=lambda: queue.Queue(QUEUE))
    relabelled: Relabelling | None = None
    full: bool = False  # the trace has its size

    def __post_init__(self) -> None:
        self.hosts_LEG, self.orders_LE1 = self.plan.hosts_LEG(self.ranks), None
        if self.relabelled is not None:
            info = self.writer.info
            self.orders_LE1 = self.relabelled.orders(info.model_layers, info.num_experts)
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="answers")
        self.thread = threading.Thread(target=self._write, name="trace", daemon=True)

    # What the proxy calls.

    def ask(self, asked: Asked) -> Asking | None:
        return ask_for_routing(self.engine, asked)

    async def pass_on(self, asking: Asking, chosen: Chosen, response: Response, answer: Answer) -> None:
        """Pass an answer on without what its client did not ask for, and keep what it tells."""
        kind = response.header(b"content-type").partition(b";")[0].strip().lower()
        if response.status != 200 or kind not in (JSON, EVENTS) or response.header(b"content-encoding"):
            await pass_on(response, answer)
        elif kind == EVENTS:
            await self._pass_stream(asking, chosen, response, answer)
        else:
            await self._pass_whole(asking, chosen, response, answer)

    async def _pass_whole(self, asking: Asking, chosen: Chosen, response: Response, answer: Answer) -> None:
        try:
            data = await response.read()
        except UpstreamError:
            raise UpstreamCut from None
        if len(data) >= LARGE_ANSWER:
            loop = asyncio.get_running_loop()
            split = await loop.run_in_executor(self.pool, split_answer, data, asking)
        else:
            split = split_answer(data, asking)
        sent = data if split.data is None else split.data
        headers = [(name, value) for name, value in answer_headers(response) if name != b"content-length"]
        await answer.start(response.status, [*headers, (b"content-length", b"%d" % len(sent))])
        await answer.body(sent, more=False)
        self._keep(split.record, asking, chosen)

    async def _pass_stream(self, asking: Asking, chosen: Chosen, response: Response, answer: Answer) -> None:
        events = Events(asking)
        headers = [(name, value) for name, value in answer_headers(response) if name != b"content-length"]
        await answer.start(response.status, headers)
        try:
            while piece := await response.piece():
                if passed := events.feed(piece):
                    await answer.body(passed)
        except UpstreamError:
            raise UpstreamCut from None
        await answer.body(events.end(), more=False)
        self._keep(events.record, asking, chosen)

    def _keep(self, record: dict[str, Any] | None, asking: Asking, chosen: Chosen) -> None:
        if record is None:
            if not self.counted[UNTOLD]:
                LOG.warning("an answer came without routing: the server needs --enable-return-routed-experts")
            self.counted[UNTOLD] += 1
            return
        try:
            self.waiting.put_nowait(Told(record, asking, chosen))
        except queue.Full:
            self.counted[DROPPED] += 1

    # The thread.

    def _write(self) -> None:
        published = time.monotonic()
        while True:
            try:
                told = self.waiting.get(timeout=1.0)
            except queue.Empty:
                told = ()
            try:
                if told is None:
                    self.writer.close()
                    return
                if told:
                    self._add(told)
                if time.monotonic() - published > WRITE_SECONDS:
                    self._publish()
                    published = time.monotonic()
            except (InputError, OSError) as error:
                self.counted[LEFT_OUT] += 1
                if self.counted[LEFT_OUT] == 1 or told is None:
                    LOG.warning("not recorded: %s", error)
                if told is None:
                    return

    def _publish(self) -> None:
        self.writer.complete()
        size = sum(file.stat().st_size for file in self.path.glob("*.parquet"))
        if size > MOST_DISK_BYTES and not self.full:
            self.full = True
            LOG.warning("%s holds %d bytes: routing is compared with the plan, and no longer kept", self.path, size)

    def _add(self, told: Told) -> None:
        record, info = told.record, self.writer.info
        if told.asking.ids_T is not None and record.get("prompt_token_ids") is None:
            record = {**record, "prompt_token_ids": told.asking.ids_T.tolist()}
        facts = {"num_model_layers": info.num_model_layers or info.num_layers, "top_k": info.top_k}
        for request in read_answer(self.engine, record, facts, "an answer"):
            ids_TLK = self._layers_of(request)
            self._compare(ids_TLK, told.chosen)
            if self.full:
                self.counted[BEYOND] += 1
                continue
            self.writer.add(
                request.request_id,
                ids_TLK,
                token_ids=request.token_ids,
                num_prompt_tokens=request.num_prompt_tokens or 0,
                first_position=request.first_position,
                served=Served(-1 if told.chosen.rank is None else told.chosen.rank, told.chosen.decision),
            )
            self.counted[RECORDED] += 1

    def _layers_of(self, request: EngineRequest) -> np.ndarray:
        """The layers of the plan in a record of theirs, or of all layers of the model, [T, L, K].
        Raises InputError for any other."""
        ids, info = request.expert_ids_TLK, self.writer.info
        if ids.shape[1] == info.num_layers:
            return ids
        if ids.shape[1] <= max(info.model_layers):
            raise InputError(f"an answer tells of {ids.shape[1]} layers, the plan has {info.num_layers}")
        return ids[:, list(info.model_layers)]

    def _compare(self, ids_TLK: np.ndarray, chosen: Chosen) -> None:
        """Count which share of the activations the rank served itself."""
        if chosen.rank is None or not ids_TLK.size or ids_TLK.min() < 0:
            return
        layers = np.arange(ids_TLK.shape[1])[:, None]
        if self.orders_LE1 is not None:
            ids_TLK = self.orders_LE1[layers, ids_TLK]
        served, now = float(self.hosts_LEG[:, :, chosen.rank][layers, ids_TLK].mean()), time.time()
        self.metrics.served.add(now, served)
        if chosen.expected is not None:
            self.short.add(now, served - chosen.expected)

    # What people are told.

    def counts(self) -> dict[str, int]:
        return dict(self.counted)

    def finding(self) -> str | None:
        """What to do where the last hour was served worse than expected by more than chance."""
        number, total, squares = self.short.sums(time.time())
        if number < LEAST_REQUESTS:
            return None
        mean = total / number
        half = CONFIDENCE * (max(squares / number - mean * mean, 0.0) / number) ** 0.5
        if mean + half >= 0:
            return None
        plan_ranks = self.plan.num_ranks
        return (
            f"Served falls short of expected by {-mean:.3f} of the activations, 95% interval {-mean - half:.3f} to {-mean + half:.3f}, "
            f"over {number} requests of the last hour: the traffic is no longer that of the plan's trace. A new plan: "
            f"semmoe place {self.path} --ranks {plan_ranks} --objective dp -o NEW"
        )

    def start(self) -> None:
        self.thread.start()

    def close(self) -> None:
        """Write what waits, and complete the trace."""
        self.waiting.put(None)
        self.thread.join()
        self.pool.shutdown()


def trace_info(plan: PlanFacts, ranks: int) -> TraceInfo:
    """What the trace says of the model: what the plan does."""
    model = {**plan.model, "model_layers": tuple(plan.model["model_layers"])}
    model.pop("checkpoint", None)
    return TraceInfo(**model, made_by="semmoe route", notes={"served": {"ranks": ranks, "plan": plan.fingerprint}})


def open_recorder(path: str, plan: PlanFacts, ranks: int, engine: str, metrics: Metrics, served: str) -> Recorder:
    """A recorder, whose thread is not started. A trace of the same model that is there is
    continued.

    `served`: the checkpoint that the servers run, where it is known; ids of a permuted reshard are
    mapped back. Raises InputError where the engine tells no routing, and where the trace cannot be
    written.
    """
    if engine == "trtllm":
        raise InputError("--record: TensorRT-LLM's server returns no routed experts")
    relabelled = find_relabelling(served) if served else None
    writer = TraceWriter(path, trace_info(plan, ranks), resume=True, relabelled=relabelled)
    return Recorder(Path(path), plan, ranks, engine, metrics, writer, relabelled=relabelled)
