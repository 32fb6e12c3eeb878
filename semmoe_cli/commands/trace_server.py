"""`semmoe trace --server`: a running engine is asked, and what it returns is written as a trace."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from semmoe.options import Api, command_line
from semmoe.profiles.errors import InputError
from semmoe.terminal.tables import note

if TYPE_CHECKING:
    from semmoe.profiles.capture.requests import RequestSource
    from semmoe.profiles.capture.server import Pins
    from semmoe.profiles.capture.work import Limits

IN_TURN = "in-turn"


@dataclass(frozen=True, kw_only=True)
class RunningServer:
    """An engine that is running, and how it is asked."""

    server: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Ask a running vLLM or SGLang that returns routed experts, instead of running a model."
        ),
    ] = None
    api: Annotated[Api | None, typer.Option(help="With --server: which engine it is; found by itself otherwise.")] = (
        None
    )
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="With --server: tokens of an answer, at most.", min=1)
    ] = 64
    concurrency: Annotated[int, typer.Option(metavar="C", help="With --server: requests under way.", min=1)] = 16
    pin: Annotated[
        str | None,
        typer.Option(
            metavar="in-turn|PLAN",
            help="With --server: name the data-parallel rank of each request, in turn or by a plan, and keep it in the trace.",
        ),
    ] = None

    def pins(self) -> "Callable[[int], Pins] | None":
        """What names the ranks, for a number of them. Raises InputError for a plan that cannot."""
        if self.pin is None:
            return None
        return pins_in_turn if self.pin == IN_TURN else pins_by_plan(self.pin)


def pins_in_turn(ranks: int) -> "Pins":
    """Request i goes to rank i mod R."""
    from semmoe.profiles.capture.server import Pins

    return Pins(lambda number, ids: (number % ranks, "pinned"), lambda number: None)


def pins_by_plan(path: str) -> "Callable[[int], Pins]":
    """The plan's request scorer within a band of tokens under way, as the plug-in chooses. Raises
    InputError where the plan has none."""
    from semmoe.profiles.capture.server import Pins
    from semmoe.runtime.engines.band import Band
    from semmoe.runtime.engines.chooser import request_tokens
    from semmoe.runtime.engines.scorer import PlanScorer

    plan = PlanScorer.open(path).plan

    def pins(ranks: int) -> Pins:
        scorer, band = PlanScorer.of(plan, ranks=ranks), Band(ranks)
        under_way: dict[int, tuple[int, float]] = {}
        tokens_R = [0.0] * ranks

        def choose(number: int, ids: list[int]) -> tuple[int, str]:
            tokens = request_tokens(len(ids), None)
            choice = band.choose(scorer.scores(ids), tokens_R, tokens=tokens)
            if choice.rank >= 0:
                under_way[number] = choice.rank, tokens
                tokens_R[choice.rank] += tokens
            return choice

        def done(number: int) -> None:
            rank, tokens = under_way.pop(number, (0, 0.0))
            tokens_R[rank] -= tokens

        return Pins(choose, done, needs_ids=True, plan=plan.fingerprint)

    return pins


def trace_running_server(
    asked: RunningServer, source: "RequestSource", output: Path, limits: "Limits", *, model: str | None, resume: bool
) -> tuple[dict[str, Any], bool]:
    """Write a trace of what a server answers, say so; what was written, and whether it was
    interrupted."""
    from semmoe.profiles.capture.requests import open_requests
    from semmoe.profiles.capture.server import ServerOptions, trace_server
    from semmoe.profiles.capture.work import TraceProgress
    from semmoe.profiles.trace import RoutingTrace
    from semmoe.terminal.progress import tracing

    assert asked.server is not None
    progress = TraceProgress()
    options = ServerOptions(
        api=asked.api.value if asked.api else "",
        max_new_tokens=asked.max_new_tokens,
        concurrency=asked.concurrency,
        model_config=model or "",
        limits=limits,
        pins=asked.pins(),
        resume=resume,
        made_by=command_line(output),
    )
    with tracing(progress, limits, asked.max_new_tokens):
        requests = open_requests(source, progress.read, tell=note)
        dropped = trace_server(asked.server, requests, output, options, progress=progress, tell=note)
    for reason, count in dropped.items():
        note(f"left out {count} {reason}" + (f": {dropped.first}" if count == dropped.total() else ""))
    try:
        trace = RoutingTrace.open(output)
    except InputError as error:
        raise InputError(f"nothing was written: {error}") from None
    done = "interrupted: wrote" if progress.interrupted else "wrote"
    note(f"{done} {output}: {trace.num_requests} requests, {trace.num_tokens} tokens, {trace.info.num_layers} layers")
    counts = {name: getattr(progress, name) for name in ("skipped", "empty", "cut", "interrupted")}
    facts = {"requests": trace.num_requests, "tokens": trace.num_tokens, "layers": trace.info.num_layers}
    served = trace.info.notes.get("served", {})
    named = {
        "server": asked.server,
        "ranks": served.get("ranks"),
        "dropped": dict(dropped),
        "numbering": trace.info.numbering,
    }
    return {"trace": str(output), **facts, **counts, **named}, progress.interrupted
