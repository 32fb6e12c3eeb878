"""The ASGI application of `semmoe route`: its own pages, and the proxy for all else."""

from collections.abc import Callable

from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from semmoe.runtime.router.page import CONTENT_SECURITY, PAGE
from semmoe.runtime.router.proxy import Message, Receive, Send
from semmoe.runtime.router.status import Status

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"

Pages = dict[str, Callable[[], Response]]


def health_pages(status: Status) -> Pages:
    """/healthz: the process answers; /readyz: some upstream is in service, and nothing drains."""

    def readyz() -> Response:
        word = "draining" if status.draining else "ready" if status.ready else "no upstream is in service"
        return PlainTextResponse(word + "\n", 200 if status.ready else 503)

    return {"/healthz": lambda: PlainTextResponse("ok\n"), "/readyz": readyz}


def number_pages(status: Status) -> Pages:
    """The page, its numbers and those of Prometheus."""
    headers = {"Content-Security-Policy": CONTENT_SECURITY, "Cache-Control": "no-store"}
    return {
        "/": lambda: HTMLResponse(PAGE, headers=headers),
        "/semmoe/status": lambda: JSONResponse(status.to_json(), headers={"Cache-Control": "no-store"}),
        "/metrics": lambda: PlainTextResponse(status.prometheus(), media_type=PROMETHEUS),
    }


def not_found() -> Response:
    return PlainTextResponse("not found: /, /healthz, /readyz, /metrics, /semmoe/status\n", 404)


class App:
    """Pages by their path, to GET and HEAD; `rest` has every other request, and without it there is
    nothing else."""

    def __init__(self, pages: Pages, rest: Callable[[Message, Receive, Send], object] | None = None) -> None:
        self.pages, self.rest = pages, rest

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        page = self.pages.get(scope["path"]) if scope["method"] in ("GET", "HEAD") else None
        if page is None and self.rest is not None:
            await self.rest(scope, receive, send)  # pyright: ignore[reportGeneralTypeIssues]
            return
        await (page or not_found)()(scope, receive, send)
