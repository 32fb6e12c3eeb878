"""How far a long command is, on stderr: a bar with the time left on a terminal, a plain line now
and then elsewhere.

One display; stages of steps or bytes, and a trace, say what it shows. rich is imported inside.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from semmoe.profiles.errors import visible
from semmoe.profiles.progress import Progress, Stages

if TYPE_CHECKING:
    from semmoe.profiles.capture.work import Limits, TraceProgress

LINE_SECONDS = 10.0
POLL_SECONDS = 0.2


class Moment(NamedTuple):
    """What the display shows of a moment."""

    stage: str  # another one begins another bar
    done: float
    total: float | None  # None: not known yet
    line: str  # all of it, where there is no bar
    text: str  # before the bar
    aside: str  # behind the bar


@contextmanager
def display() -> Iterator[Callable[[Moment], None]]:
    """A function to call with every moment while the block runs."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[aside]}", markup=False),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task, stage = bar.add_task("", total=None, visible=False, aside=""), None

        def show(moment: Moment) -> None:
            nonlocal task, stage
            if moment.stage != stage:
                bar.remove_task(task)
                task, stage = bar.add_task("", total=None, aside=""), moment.stage
            bar.update(
                task, description=visible(moment.text), completed=moment.done, total=moment.total, aside=moment.aside
            )

        yield show


def _lines() -> Callable[[Moment], None]:
    """A line at most every LINE_SECONDS, where something was done since: short work prints none."""
    last, shown = time.monotonic(), ("", 0.0)

    def show(moment: Moment) -> None:
        nonlocal last, shown
        if time.monotonic() - last >= LINE_SECONDS and shown != moment[:2]:
            last, shown = time.monotonic(), moment[:2]
            print(f"semmoe: {visible(moment.line)}", file=sys.stderr, flush=True)

    return show


def count(done: int, total: int) -> str:
    """Steps, for people."""
    return f"{done} of {total}"


def gigabytes(done: int, total: int) -> str:
    """Bytes, for people."""
    return f"{done / 1e9:.2f} of {total / 1e9:.2f} GB"


@contextmanager
def stages(amount: Callable[[int, int], str] = count) -> Iterator[Stages]:
    """A function to call with the name of a stage, and how much of how much of it is done."""
    stage, begun, done_before = "", 0.0, 0
    with display() as show_moment:

        def show(name: str, done: int, total: int) -> None:
            nonlocal stage, begun, done_before
            if name != stage or done < done_before:
                stage, begun, done_before = name, time.monotonic(), done
            left = time_left(done - done_before, total - done, time.monotonic() - begun)
            text = f"{name} {amount(done, total)}"
            show_moment(Moment(name, done, total, text, text, left))

        yield show


@contextmanager
def steps(name: str) -> Iterator[Progress]:
    """The same for one stage."""
    with stages() as show:
        yield partial(show, name)


@contextmanager
def tracing(
    progress: "TraceProgress", limits: "Limits", generated: int, *, ranks: int = 1, silent: bool = False
) -> Iterator[None]:
    """Show how far a trace is, by looking at `progress` again and again while the block runs.

    `generated`: tokens that a request is continued by. `ranks`: processes that share the requests.
    """
    if silent:
        yield
        return
    ended = threading.Event()

    def watch(show: Callable[[Moment], None]) -> None:
        while not ended.wait(POLL_SECONDS):
            if progress.tokens:
                show(_trace_moment(progress, expected_tokens(progress, limits, generated, ranks)))

    with display() as show:
        show(Moment("tracing", 0, None, "tracing", "tracing", ""))
        thread = threading.Thread(target=watch, args=(show,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _trace_moment(progress: "TraceProgress", total: float | None) -> Moment:
    done, seconds = progress.tokens, max(time.monotonic() - progress.started, 1e-6)
    text = f"{progress.requests} requests, {done} tokens"
    left = time_left(done, total - done, seconds) if total else ""
    line = f"{text}, {done / seconds:.0f} tokens/s" + (left and f", {left}")
    return Moment("tracing", done, total, line, text, f"{done / seconds:,.0f} tokens/s {left}")


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


def time_left(done: float, left: float, seconds: float) -> str:
    """As 0:01:05 left, after `seconds` for what is done; empty where nothing tells it."""
    if done <= 0 or left <= 0:
        return ""
    whole = int(seconds * left / done)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d} left"
