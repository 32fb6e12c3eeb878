"""`semmoe trace --server`: prompts go to an engine that is running, and the routing that it returns
becomes a trace as the answers come.

The engine does the tokenising, unless prompts are cut or pinned by a plan: then its own /tokenize
gives the ids. At most `concurrency` requests are under way, and an answer is written before the
next prompt is read, so memory does not grow with the source.
"""

import itertools
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from semmoe.profiles.capture.connection import Connection, GoneError, Refusal
from semmoe.profiles.capture.requests import TextRequest
from semmoe.profiles.capture.work import FLUSH_SECONDS, Limits, TraceProgress, interruptible
from semmoe.profiles.config import moe_facts, read_config
from semmoe.profiles.engines.columns import find_layout, survey_requests
from semmoe.profiles.engines.imports import Import, ImportOptions, RequestAdder
from semmoe.profiles.engines.records import EngineRequest, LeftOut
from semmoe.profiles.engines.responses import UNASKED, read_answer
from semmoe.profiles.errors import InputError
from semmoe.profiles.numbering import config_folder, find_relabelling
from semmoe.profiles.trace_writer import Served, TraceWriter, refuse_existing_trace

APIS = ("vllm", "sglang")
RANK_HEADER = "X-data-parallel-rank"
NO_RANK = 999  # no server has as many: one that reads pins refuses it
NO_ROUTING = {
    "vllm": "start vLLM with --enable-return-routed-experts (from 0.31 on also with prefix caching, and without pipeline parallelism)",
    "sglang": "start SGLang with --enable-return-routed-experts",
}
ENGINE_RANK = re.compile(rb'^vllm:num_requests_running\{[^}]*engine="(\d+)"', re.MULTILINE)


class Pins(NamedTuple):
    """Who names the rank of each request.

    Fields:
        choose: number of the request and ids of its prompt to the rank and why; -1: the engine
            chooses. Called by one thread at a time.
        done: a request of that number has been answered.
        needs_ids: `choose` reads the ids.
        plan: fingerprint of the plan, "" for none.
    """

    choose: Callable[[int, list[int]], tuple[int, str]]
    done: Callable[[int], None]
    needs_ids: bool = False
    plan: str = ""


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How a running engine is asked.

    Fields:
        api: "vllm" or "sglang"; "" finds out.
        max_new_tokens: of every answer, at most.
        concurrency: requests under way.
        model_config: config.json, checkpoint or hub id; "" asks the server for its model.
        limits: how much of the source is sent.
        pins: makes the pins for a number of data-parallel ranks; None: the engine chooses.
        resume, made_by: as of any trace.
    """

    api: str = ""
    max_new_tokens: int = 64
    concurrency: int = 16
    model_config: str = ""
    limits: Limits = Limits()
    pins: Callable[[int], Pins] | None = None
    resume: bool = False
    made_by: str = ""


class Sent(NamedTuple):
    """A request under way."""

    number: int
    source: TextRequest
    ids: list[int] | None = None  # of the prompt, where the engine was asked for them
    rank: int = -1
    why: str = ""


class Server:
    """One engine and the way it is asked. Methods raise InputError."""

    def __init__(self, url: str, api: str, stop: threading.Event) -> None:
        self.connection = Connection(url, stop)
        self.api = api or self._find_api()
        self.model = self._find_model()

    def _find_api(self) -> str:
        for path, api in (("/version", "vllm"), ("/get_model_info", "sglang"), ("/model_info", "sglang")):
            try:
                if isinstance(self.connection.get_json(path), dict):
                    return api
            except Refusal:
                pass
        raise InputError(f"{self.connection.url} is neither vLLM nor SGLang: name it with --api")

    def _find_model(self) -> tuple[str, str]:
        """The model's name in requests, and where its files may be."""
        listed = self.connection.get_json("/v1/models")
        try:
            first = listed["data"][0]
            return str(first["id"]), str(first.get("root") or first["id"])
        except (TypeError, KeyError, IndexError):
            raise InputError(f"{self.connection.url}/v1/models names no model") from None

    def num_ranks(self) -> int:
        """Data-parallel ranks behind this address; 1 where nothing tells."""
        if self.api == "vllm":
            ranks = {int(rank) for rank in ENGINE_RANK.findall(self.connection.get("/metrics"))}
            return len(ranks) or 1
        for path in ("/server_info", "/get_server_info"):
            try:
                facts = self.connection.get_json(path)
            except Refusal:
                continue
            if isinstance(facts, dict) and isinstance(facts.get("dp_size"), int):
                return facts["dp_size"]
        return 1

    def check_pins(self) -> None:
        """Raise InputError where the server does not read a rank: it must refuse one that no
        server has."""
        try:
            self.complete(Sent(0, TextRequest("pin", "", "a"), rank=NO_RANK), 1)
        except Refusal as refusal:
            if refusal.status == 400:
                return
            raise
        raise InputError(
            f"{self.connection.url} does not read the rank of a request (rank {NO_RANK} was served): a router in front of it takes pins "
            "away, or it has one rank; leave out --pin"
        )

    def tokenize(self, request: TextRequest) -> list[int]:
        """Ids of a prompt, as the engine makes them."""
        body: dict[str, Any] = {"model": self.model[0]}
        body |= {"prompt": request.text} if request.messages is None else {"messages": question(request)}
        answer = self.connection.post("/tokenize", body)
        ids = answer.get("tokens")
        if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
            raise InputError(f"{self.connection.url}/tokenize gave no token ids")
        return ids

    def complete(self, sent: Sent, max_new_tokens: int) -> dict[str, Any]:
        """The engine's answer to a request."""
        source, rank = sent.source, sent.rank
        if self.api == "sglang":
            body: dict[str, Any] = {"sampling_params": {"temperature": 0, "max_new_tokens": max_new_tokens}}
            body |= {"text": source.text} if sent.ids is None else {"input_ids": sent.ids}
            body |= {"routed_dp_rank": rank} if rank >= 0 else {}
            answer = self.connection.post("/generate", {**body, "return_routed_experts": True})
            return answer if sent.ids is None else {"input_ids": sent.ids, **answer}
        body = {"model": self.model[0], "max_tokens": max_new_tokens, "temperature": 0, "return_token_ids": True}
        headers = {RANK_HEADER: str(rank)} if rank >= 0 else {}
        if sent.ids is None and source.messages is not None:
            return self.connection.post("/v1/chat/completions", {**body, "messages": question(source)}, headers)
        prompt = source.text if sent.ids is None else sent.ids
        return self.connection.post("/v1/completions", {**body, "prompt": prompt}, headers)


def question(request: TextRequest) -> list[dict[str, str]]:
    """Messages of a chat up to the reply that the engine is to give."""
    messages = list(request.messages or ())
    while len(messages) > 1 and messages[-1]["role"] == "assistant":
        messages.pop()
    return messages


def trace_server(
    url: str,
    requests: Iterator[TextRequest],
    out: Path,
    options: ServerOptions = ServerOptions(),
    *,
    progress: TraceProgress,
    tell: Callable[[str], None] = lambda line: None,
) -> LeftOut:
    """Send `requests` to the engine at `url` and write the trace `out`; what was left out, by
    cause.

    Ctrl-C ends the run early with a finished trace of what is complete. Raises InputError for all
    that the user can mend: a server that does not return its routing, one that goes away (the trace
    then stays unfinished, and the same call with `resume` goes on).
    """
    refuse_existing_trace(out, resume=options.resume)
    first = list(itertools.islice(requests, 1))
    if not first:
        raise InputError("the data holds no request: there is nothing to trace")
    stop = threading.Event()
    server = Server(url, options.api, stop)
    where = options.model_config or server.model[1]
    try:
        facts = moe_facts(read_config(config_folder(where)))
    except InputError as error:
        if options.model_config:
            raise
        raise InputError(
            f"the server's model is {where}, whose config.json is needed: name it with --model ({error})"
        ) from None
    ranks = server.num_ranks()
    pins = options.pins(ranks) if options.pins is not None else None
    if pins is not None:
        server.check_pins()
    tell(f"{url}: {server.api}, model {server.model[0]}, {ranks} data-parallel rank{'s' * (ranks > 1)}")
    served = {"ranks": ranks, "plan": (pins.plan or None) if pins is not None else None}
    dropped = LeftOut()
    imported = ImportOptions(model_config=where, resume=options.resume, made_by=options.made_by, max_tokens=None)
    job = Import(out, imported, facts, None, {"server": server.api, "served": served}, dropped, find_relabelling(where))
    sender = Sender(server, options, pins, facts, dropped, progress)
    try:
        _write(job, sender, itertools.chain(first, requests), options, progress)
    finally:
        stop.set()
    return dropped


def _write(
    job: Import, sender: "Sender", requests: Iterator[TextRequest], options: ServerOptions, progress: TraceProgress
) -> None:
    """Send and write until the source or the limits end. One request goes alone: it shows whether
    the server records."""
    progress.started = last_flush = time.monotonic()
    numbered = enumerate(itertools.islice(requests, options.limits.max_requests))
    known = _known_requests(job.out) if options.resume else set()
    todo = sender.prepared(numbered, known)
    with interruptible(progress) as (hold, _):
        answer = next(filter(None, (sender.ask(sent) for sent in todo)), None)
        if answer is None:
            if progress.skipped:
                return
            raise job.dropped.first or InputError("the data holds no request with text: there is nothing to trace")
        layout = find_layout(survey_requests([answer]), job.facts, None)
        own = {"num_layers": layout.num_kept, "model_layers": layout.model_layers, "top_k": layout.top_k}
        own |= {"num_experts": layout.num_experts, "num_model_layers": layout.num_model_layers}
        info = job.trace_info({**own, "empty_slots": layout.empty_slots})
        with TraceWriter(job.out, info, resume=options.resume, relabelled=job.relabelled) as writer:
            adder = RequestAdder(job, layout, writer)
            try:
                for request in itertools.chain([answer], sender.answers(todo)):
                    with hold():
                        adder.add(request)
                        progress.requests += 1
                        progress.tokens += len(request.expert_ids_TLK)
                        if time.monotonic() - last_flush > FLUSH_SECONDS:
                            writer.flush()
                            last_flush = time.monotonic()
            except KeyboardInterrupt:
                writer.info.notes["interrupted"] = True
            except InputError:
                writer.flush()
                raise
            finally:
                sender.server.connection.stop.set()
            if job.dropped:
                left = {"requests": dict(job.dropped.requests), "tokens": dict(job.dropped.tokens)}
                writer.info = replace(writer.info, notes={**writer.info.notes, "left_out": left})


def _known_requests(out: Path) -> set[str]:
    """Ids of the requests that a trace which is continued holds already."""
    from semmoe.profiles.trace import open_part

    return {
        name
        for part in sorted(out.glob("*.parquet"))
        for name in open_part(part).read(["request_id"]).column(0).to_pylist()
    }


class Sender:
    """Sends requests and makes of each answer what a trace holds; counts what it cannot use."""

    def __init__(
        self,
        server: Server,
        options: ServerOptions,
        pins: Pins | None,
        facts: dict[str, Any],
        dropped: LeftOut,
        progress: TraceProgress,
    ) -> None:
        self.server, self._options, self._pins = server, options, pins
        self._facts, self._dropped, self._progress = facts, dropped, progress
        self._lock, self._worked = threading.Lock(), False
        self._tokens = 0  # prompt tokens sent

    def prepared(self, numbered: Iterator[tuple[int, TextRequest]], known: set[str]) -> Iterator[Sent]:
        """Requests that are new; with ids where the limit of all tokens needs them here."""
        most = self._options.limits.max_tokens
        for number, request in numbered:
            if request.messages is None and not request.text.strip():
                self._progress.empty += 1
                continue
            if request.request_id in known:
                self._progress.skipped += 1
                continue
            sent = Sent(number, request)
            if most is not None:
                try:
                    ids = self._ids(request)
                except Refusal as error:
                    self._leave(error)
                    continue
                if self._tokens + len(ids) > most:
                    if self._tokens:
                        return
                    ids = ids[:most]
                self._tokens += len(ids)
                sent = sent._replace(ids=ids)
            self._progress.read_requests += 1
            yield sent

    def _ids(self, request: TextRequest) -> list[int]:
        """Ids of a prompt, cut where that was asked for."""
        ids, longest = self.server.tokenize(request), self._options.limits.max_length
        if longest is not None and len(ids) > longest:
            self._progress.cut += 1
        return ids[:longest]

    def _ranked(self, sent: Sent) -> Sent:
        """The request with its ids, where they are needed, and its rank."""
        pins = self._pins
        needs_ids = self._options.limits.max_length is not None or self.server.api == "sglang"
        if sent.ids is None and (needs_ids or (pins is not None and pins.needs_ids)):
            sent = sent._replace(ids=self._ids(sent.source))
        if pins is not None:
            with self._lock:
                rank, why = pins.choose(sent.number, sent.ids or [])
            sent = sent._replace(rank=rank, why=why)
        return sent

    def answers(self, todo: Iterator[Sent]) -> Iterator[EngineRequest]:
        """What the engine answers, in the order that it does. Raises GoneError where it went
        away."""
        waiting: set[Future[EngineRequest | None]] = set()
        with ThreadPoolExecutor(self._options.concurrency, thread_name_prefix="semmoe-ask") as pool:
            try:
                while True:
                    new = itertools.islice(todo, self._options.concurrency - len(waiting))
                    waiting |= {pool.submit(self.ask, sent) for sent in new}
                    if not waiting:
                        return
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from filter(None, (future.result() for future in done))
            finally:
                self.server.connection.stop.set()
                pool.shutdown(wait=False, cancel_futures=True)

    def ask(self, sent: Sent) -> EngineRequest | None:
        """The answer to one request; None, counted by its cause, where it cannot be used. Raises
        GoneError, and InputError where the first answer shows that no other can be used either."""
        try:
            sent = self._ranked(sent)
            answer = self.server.complete(sent, self._options.max_new_tokens)
            (found,) = read_answer(self.server.api, answer, self._facts, f"request {sent.source.request_id}")
        except GoneError:
            raise
        except ValueError:
            self._leave(InputError(f"request {sent.source.request_id}: expected one answer"))
            return None
        except InputError as error:
            if not self._worked and getattr(error, "reason", "") == UNASKED:
                raise InputError(
                    f"{self.server.connection.url} does not return its routing: {NO_ROUTING[self.server.api]}"
                ) from None
            self._leave(error)
            return None
        finally:
            if self._pins is not None:
                with self._lock:
                    self._pins.done(sent.number)
        self._worked = True
        told = answer.get("meta_info", {}).get("dp_rank") if isinstance(answer.get("meta_info"), dict) else None
        rank = told if isinstance(told, int) and sent.rank < 0 else sent.rank
        served = Served(rank, sent.why) if rank >= 0 else None
        source = sent.source
        return replace(found, request_id=source.request_id, domain=source.domain, served=served)

    def _leave(self, error: InputError) -> None:
        status = getattr(error, "status", None)
        reason = f"requests answered with {status}" if status else getattr(error, "reason", "damaged responses")
        with self._lock:
            self._dropped.leave(reason, error)
