"""Routing of a server's finished requests, written as a trace while it serves: SEMMOE_RECORD.

The engine's loop only puts a request into a bounded queue; a thread of its own writes. A full queue
drops the request and counts it. The trace is complete, for every reader, each time that the thread
has written; several API servers write parts of one trace. pyarrow is imported by the thread's side
alone.

Shape letters: T rows, L MoE layers, K top-k.
"""

import atexit
import logging
import os
import queue
import threading
import time
import zlib
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from semmoe.profiles.config import moe_facts
from semmoe.profiles.errors import InputError
from semmoe.runtime.engines.chooser import Settings
from semmoe.runtime.engines.counters import Counters

LOG = logging.getLogger("vllm.plugins.semmoe")
MOST_WAITING = 1_024  # requests in the queue
MOST_WAITING_BYTES = 256 << 20
MOST_DISK_BYTES = 8 << 30  # of a trace: then recording ends
MOST_EXPECTED = 65_536  # requests under way whose decision is remembered
WRITE_SECONDS = 20.0


class Finished(NamedTuple):
    """One sequence of a finished request."""

    request: str
    name: str  # unique in the trace
    prompt_ids: list[int] | None
    output_ids: list[int]
    ids_TLK: np.ndarray


def returns_routed_experts(config: Any) -> bool:
    """Whether a server was started with --enable-return-routed-experts, by its VllmConfig; 0.32
    keeps that elsewhere than 0.30. True where neither place is there."""
    parts = (getattr(config, name, None) for name in ("model_config", "aux_output_config"))
    said = [flag for part in parts if (flag := getattr(part, "enable_return_routed_experts", None)) is not None]
    return any(said) or not said


class Recorder:
    """Writes what it is given; `expect`, `sent` and `put` never wait and never raise."""

    def __init__(self, path: Path, share: float, writer: Any, counters: Counters, *, owns: bool) -> None:
        self._path, self._share, self._writer, self._counters = path, share, writer, counters
        self._owns = owns  # the trace's facts are this process's to write
        self._layers = list(writer.info.model_layers)
        self._queue: queue.Queue[Finished] = queue.Queue(MOST_WAITING)
        self._bytes = self._recorded = self._full = 0
        self._decisions: OrderedDict[str, tuple[int, str]] = OrderedDict()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._write, name="semmoe-record", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    @classmethod
    def open(cls, settings: Settings, config: dict[str, Any], client: Any, counters: Counters) -> "Recorder":
        """Begin, or go on with, the trace of a server. Raises InputError where it cannot be
        written, and where an answer would not tell the routing.

        Parameters:
            settings: where, and which share.
            config: config.json of the model.
            client: vLLM's, for the model's name and the number of ranks.
            counters: hear of what was dropped.
        """
        from semmoe.profiles.numbering import find_relabelling
        from semmoe.profiles.trace import TraceInfo
        from semmoe.profiles.trace_writer import TraceWriter

        model = client.vllm_config.model_config
        if not returns_routed_experts(client.vllm_config):
            raise InputError("SEMMOE_RECORD needs a server started with --enable-return-routed-experts")
        ranks = max(client.vllm_config.parallel_config.data_parallel_size, 1)
        served = {"ranks": ranks, "plan": settings.plan.fingerprint if settings.plan else None}
        info = TraceInfo(model=model.model, made_by="SEMMOE_RECORD", **moe_facts(config))
        info = replace(info, notes={"served": served})
        relabelled = find_relabelling(model.model)
        path, index = Path(settings.record), getattr(client, "client_index", 0)
        owns = index == 0
        there = (path / "trace.json").exists()
        writer = TraceWriter(
            path, info, resume=there or not owns, prefix=f"server{index}", lock=owns, relabelled=relabelled
        )
        return cls(path, settings.record_share, writer, counters, owns=owns)

    def wants(self, request: str) -> bool:
        """Whether a request is of the share that is recorded; always the same answer for a name."""
        return zlib.crc32(request.encode()) < self._share * 2**32

    def expect(self, request: str, decision: str) -> None:
        """Why a request will go where it goes."""
        self._decisions[request] = (-1, decision)
        if len(self._decisions) > MOST_EXPECTED:
            self._decisions.popitem(last=False)

    def sent(self, request: str, rank: int) -> None:
        """Where it went."""
        self._decisions[request] = (rank, self._decisions.get(request, (-1, ""))[1])

    def put(self, finished: Finished) -> None:
        """One sequence to write, where it is of the share and the queue has room."""
        if not self.wants(finished.request):
            return
        try:
            if self._full or self._bytes + finished.ids_TLK.nbytes > MOST_WAITING_BYTES:
                raise queue.Full
            self._queue.put_nowait(finished)
            self._bytes += finished.ids_TLK.nbytes
        except queue.Full:
            self._counters.drop()

    def close(self) -> None:
        """Write what is left, and end."""
        if not self._ending.is_set():
            self._ending.set()
            self._thread.join(timeout=60)

    def _write(self) -> None:
        last = time.monotonic()
        try:
            while not (self._ending.is_set() and self._queue.empty()):
                try:
                    self._add(self._queue.get(timeout=0.5))
                except queue.Empty:
                    pass
                if time.monotonic() - last >= WRITE_SECONDS:
                    self._publish()
                    last = time.monotonic()
            self._publish()
            self._writer.release()
        except Exception:
            self._full = 1
            LOG.exception("semmoe: recording into %s has ended", self._path)

    def _add(self, finished: Finished) -> None:
        from semmoe.profiles.trace_writer import Served

        ids_TLK = np.asarray(finished.ids_TLK)
        self._bytes -= ids_TLK.nbytes
        if ids_TLK.shape[1] != len(self._layers):
            ids_TLK = ids_TLK[:, self._layers]
        rank, decision = self._decisions.pop(finished.request, (-1, ""))
        tokens = None if finished.prompt_ids is None else np.array(finished.prompt_ids + finished.output_ids, np.int32)
        if tokens is not None and len(tokens) < len(ids_TLK):
            tokens = None  # better no sequence than half of one
        try:
            self._writer.add(
                finished.name,
                ids_TLK,
                token_ids=tokens,
                num_prompt_tokens=len(finished.prompt_ids or ()),
                served=Served(rank, decision),
            )
        except InputError as error:
            self._counters.drop()
            LOG.warning("semmoe: not recorded: %s", error)

    def _publish(self) -> None:
        """Make what was added part of a trace that is complete."""
        self._writer.flush()
        if self._owns:
            self._writer.complete()
        size = sum(file.stat().st_size for file in self._path.glob("*.parquet"))
        if size > MOST_DISK_BYTES and not self._full:
            self._full = 1
            LOG.warning("semmoe: %s holds %d bytes: recording has ended", self._path, size)


def finished_of(output: Any, sequence: Any, ids_TLK: np.ndarray, streamed: list[int]) -> Finished:
    """One sequence of vLLM's RequestOutput; `streamed`: its ids as they came, for an answer that
    holds only the last of them."""
    prompt = None if output.prompt_token_ids is None else list(output.prompt_token_ids)
    answer, rows = list(sequence.token_ids), len(ids_TLK)
    if len(streamed) == rows + 1 - len(prompt or ()):  # the last token of an answer has no row
        answer = streamed
    name = f"{os.getpid()}-{output.request_id}" + (
        f"/{sequence.index}" if len(output.outputs) > 1 or sequence.index else ""
    )
    return Finished(output.request_id, name, prompt, answer, np.asarray(ids_TLK))
