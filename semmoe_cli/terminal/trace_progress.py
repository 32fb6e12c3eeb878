"""How far a trace is: a bar with tokens per second and the time left on a terminal, plain lines
elsewhere. On stderr.

rich is imported inside.
"""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from semmoe.profiles.capture.run import Limits, TraceProgress

LINE_SECONDS = 10.0
BAR_SECONDS = 0.2


def expected_tokens(progress: "TraceProgress", limits: "Limits", generated: int, ranks: int = 1) -> float | None:
    """Rows that this run will have recorded at its end, from what has been read of the source so
    far; None while unknown."""
    if not progress.read_requests:
        return None
    fractions = [progress.read.fraction or 0.0]
    if limits.max_requests:
        fractions.append(progress.read_requests / limits.max_requests)
    if limits.max_tokens:
        fractions.append(progress.read_tokens / limits.max_tokens)
    if max(fractions) <= 0:
        return None
    rows = progress.read_tokens + max(generated - 1, 0) * progress.read_requests
    done_before = progress.skipped_tokens + max(generated - 1, 0) * progress.skipped
    return max(rows / min(1.0, max(fractions)) / ranks - done_before, float(progress.tokens))


@contextmanager
def shown(
    progress: "TraceProgress", limits: "Limits", generated: int, *, ranks: int = 1, silent: bool = False
) -> Iterator[None]:
    """Show `progress` while the block runs."""
    done = threading.Event()
    show = _show_bar if sys.stderr.isatty() else _show_lines
    thread = threading.Thread(target=show, args=(progress, limits, generated, ranks, done), daemon=True)
    if not silent:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if not silent:
            thread.join()


def _show_lines(progress: "TraceProgress", limits: "Limits", generated: int, ranks: int, done: threading.Event) -> None:
    before = 0
    while not done.wait(LINE_SECONDS):
        if not progress.tokens:
            continue
        seconds = time.monotonic() - progress.started
        total = expected_tokens(progress, limits, generated, ranks)
        left = f", {clock((total - progress.tokens) * seconds / progress.tokens)} left" if total else ""
        if progress.tokens > before:
            rate = progress.tokens / seconds
            line = f"semmoe: {progress.requests} requests, {progress.tokens} tokens, {rate:.0f} tokens/s{left}"
            print(line, file=sys.stderr, flush=True)
        before = progress.tokens


def _show_bar(progress: "TraceProgress", limits: "Limits", generated: int, ranks: int, done: threading.Event) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("tracing", total=None, rate="", left="")
        while not done.wait(BAR_SECONDS):
            if not progress.tokens:
                continue
            rate = progress.tokens / max(time.monotonic() - progress.started, 1e-6)
            total = expected_tokens(progress, limits, generated, ranks)
            bar.update(
                task,
                description=f"{progress.requests} requests, {progress.tokens} tokens",
                completed=progress.tokens,
                total=total,
                rate=f"{rate:,.0f} tokens/s",
                left=f"{clock((total - progress.tokens) / rate)} left" if total else "",
            )


def clock(seconds: float) -> str:
    """Hours, minutes and seconds as 0:01:05."""
    seconds = int(max(seconds, 0))
    return f"{seconds // 3600}:{seconds % 3600 // 60:02d}:{seconds % 60:02d}"
