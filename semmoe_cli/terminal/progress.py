"""How far a long command is, on stderr: a bar with the time left on a terminal, a plain line now
and then elsewhere.

One display; stages of steps or bytes, and a trace, say what it shows. rich is imported inside.
"""

import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from semmoe.profiles.errors import visible
from semmoe.profiles.progress import AGAIN, Progress, Stages
from semmoe.terminal.loudness import detail, is_quiet

if TYPE_CHECKING:
    from semmoe.profiles.capture.work import Limits, TraceProgress

LINE_SECONDS = 10.0
POLL_SECONDS = 0.2
SETTLING_SECONDS = 8.0  # in which the time left has moved most of the way to a new estimate
ALL = ""  # the one bar of all stages


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
    """A function to call with every moment while the block runs; it shows nothing with --quiet."""
    if is_quiet():
        yield lambda moment: None
        return
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


class Forecast:
    """Seconds left of work in stages: from how far the present one is, from what those before took
    and, for those to come, from their usual shares of the time.

    What is told moves to a new estimate by and by, so that it does not jump where a stage ends.
    """

    def __init__(self, usual: Mapping[str, float]) -> None:
        """`usual`: stages in their order, each with its share of the time; one that is called as an
        earlier one with AGAIN is expected to take as long as that did."""
        self.usual = dict(usual)
        self.took: dict[str, float] = {}
        self.stage, self.begun, self.done_before = "", time.monotonic(), 0
        self.told: tuple[float, float] | None = None  # seconds left, when that was said

    def left(self, stage: str, done: int, total: int) -> float | None:
        """Seconds left of all stages; None while nothing tells."""
        now = time.monotonic()
        if stage != self.stage:
            if self.stage:
                self.took[self.stage] = now - self.begun
            self.stage, self.begun, self.done_before = stage, now, done
            self.told = self.told if stage in self.usual else None
        elif done < self.done_before:
            self.begun, self.done_before = now, done
        self.took.pop(stage, None)
        fraction = (done - self.done_before) / max(total - self.done_before, 1)
        spent, whole = now - self.begun, self._expected(stage)
        if fraction:
            seen = spent / fraction
            whole = seen if whole is None else whole + (seen - whole) * min(3 * fraction, 1.0)
        if whole is None:
            return None
        self.took[stage] = whole  # as far as is known
        later = list(self.usual)[list(self.usual).index(stage) + 1 :] if stage in self.usual else []
        estimate = max(whole - spent, 0.0) + sum(self._expected(name) or 0.0 for name in later)
        if self.told is not None:
            passed = now - self.told[1]
            before = max(self.told[0] - passed, 0.0)
            estimate = before + (estimate - before) * (1 - math.exp(-passed / SETTLING_SECONDS))
        self.told = estimate, now
        return estimate

    def _expected(self, stage: str) -> float | None:
        """Seconds of a stage that is to come, from those before it."""
        if AGAIN in stage and (first := stage.replace(AGAIN, "")) in self.took:
            return self.took[first]
        known = [name for name in self.took if name in self.usual]
        if stage not in self.usual or not known:
            return None
        return sum(self.took[name] for name in known) / sum(self.usual[name] for name in known) * self.usual[stage]


@contextmanager
def stages(amount: Callable[[int, int], str] = count, usual: Mapping[str, float] | None = None) -> Iterator[Stages]:
    """A function to call with the name of a stage, and how much of how much of it is done.

    `usual`: the stages that will come, with their shares of the time (see `Forecast`): the bar and
    the time left are then of all of them. Others have a bar each.
    """
    order = list(usual or {})
    forecast, started, shown_of_all = Forecast(usual or {}), time.monotonic(), 0.0
    last, begun = "", started
    with display() as show_moment:

        def show(name: str, done: int, total: int) -> None:
            nonlocal last, begun, shown_of_all
            now = time.monotonic()
            if name != last:
                _tell_ended(last, now - begun)
                last, begun = name, now
            left = forecast.left(name, done, total)
            text, aside = f"{name} {amount(done, total)}", clock(left) if left and left >= 1 else ""
            stage, bar = name, (float(done), float(total))
            if name in order:
                text += f" (stage {order.index(name) + 1} of {len(order)})"
                passed = now - started
                shown_of_all = max(shown_of_all, passed / (passed + left) if left is not None and passed else 0.0)
                stage, bar = ALL, (shown_of_all, 1.0)
            show_moment(Moment(stage, *bar, text + (aside and f", {aside}"), text, aside))

        yield show
        _tell_ended(last, time.monotonic() - begun)


def _tell_ended(stage: str, seconds: float) -> None:
    if stage:
        detail(f"{stage}: {seconds:.1f} s")


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
    return "" if done <= 0 or left <= 0 else clock(seconds * left / done)


def clock(seconds: float) -> str:
    """As 0:01:05 left."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d} left"
