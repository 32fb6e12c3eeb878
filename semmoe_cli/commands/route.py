"""`semmoe route`: a plan's request scheduler in front of engines."""

from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Annotated

import typer

from semmoe.options import Engine, grouped
from semmoe.profiles.errors import require_extra


@dataclass(frozen=True, kw_only=True)
class Upstreams:
    """Where requests go."""

    upstream: Annotated[
        list[str],
        typer.Option(
            metavar="URL",
            help="A server of the engine; again for each rank that has a port of its own, in the order of the ranks.",
        ),
    ]
    engine: Annotated[
        Engine, typer.Option(help="Whose server it is: how a request names its rank, and where prompts are tokenised.")
    ] = Engine.vllm
    dp_ranks: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Data-parallel ranks of all upstreams together; 0: the plan's ranks behind one upstream, one for each of several. "
            "Fewer than the plan's: consecutive ranks of the plan share one.",
            min=0,
        ),
    ] = 0
    tokenizer: Annotated[
        str,
        typer.Option(
            metavar="CKPT",
            help="Tokenise here, with this checkpoint's chat template; else the engine's /tokenize does.",
        ),
    ] = ""


@dataclass(frozen=True, kw_only=True)
class Listening:
    """Where it listens, and how much it takes."""

    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every network.")] = "127.0.0.1"
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0: any free one, named on stderr.", min=0, max=65535)
    ] = 8000
    metrics_port: Annotated[
        int | None,
        typer.Option(
            metavar="PORT", help="Serve /metrics and the page on this port, and not on --port.", min=0, max=65535
        ),
    ] = None
    band: Annotated[
        float,
        typer.Option(help="Tokens in flight of a rank that is still chosen, over the mean, at most.", min=1),
    ] = 1.1
    max_inflight: Annotated[
        int,
        typer.Option(metavar="N", help="Requests in flight on a rank; beyond them, 429 with Retry-After.", min=1),
    ] = 256


@grouped()
def route(
    plan: Annotated[
        Path,
        typer.Argument(metavar="PLAN", help="A plan, or what semmoe export wrote for a plug-in.", show_default=False),
    ],
    *,
    upstreams: Upstreams,
    listening: Listening,
    record: Annotated[
        Path | None,
        typer.Option(
            metavar="TRACE",
            help="Ask for routed experts and write them, with rank and decision, as a trace; clients do not see them. "
            "One that is there is continued.",
        ),
    ] = None,
) -> None:
    """Send every request to the rank that holds its experts, in front of any engine: a proxy for
    the OpenAI routes and the engines' own, with health, metrics and a page.

    Example: semmoe route p --upstream http://127.0.0.1:8001 --port 8000
    """
    require_extra("semmoe route", "starlette", "uvicorn", "httptools", "uvloop", "orjson")
    from semmoe.runtime.router.serve import RouteOptions, run
    from semmoe.terminal.decision import next_step
    from semmoe.terminal.tables import note
    from semmoe.terminal.text import quoted

    if not isfinite(listening.band):
        raise typer.BadParameter("expected a number from 1", param_hint="--band")
    options = RouteOptions(
        plan=str(plan),
        upstreams=tuple(upstreams.upstream),
        engine=upstreams.engine.value,
        dp_ranks=upstreams.dp_ranks,
        tokenizer=upstreams.tokenizer,
        host=listening.host,
        port=listening.port,
        metrics_port=listening.metrics_port,
        band=listening.band,
        max_inflight=listening.max_inflight,
        record="" if record is None else str(record),
    )
    run(options, note)
    where = quoted(str(plan))
    served = "served" if record is None else quoted(str(record))
    again = (
        [f"semmoe route {where} --upstream {quoted(upstreams.upstream[0])} --record served"] if record is None else []
    )
    next_step(*again, f"semmoe report {where} {served}", as_json=False, aside=True)
