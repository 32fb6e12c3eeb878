"""What every run that fills a trace shares, whether a model or a server answers: how much of a
source it takes, how far it is, and how it is stopped.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from semmoe.profiles.capture.sources import ReadProgress

FLUSH_SECONDS = 20.0  # how much work a killed run loses at most, besides the batch in hand


@dataclass(frozen=True)
class Limits:
    """How much of a source is traced. None: no limit."""

    max_requests: int | None = None
    max_tokens: int | None = None  # prompt tokens in all
    max_length: int | None = None  # prompt tokens of one request, which is cut there


@dataclass
class TraceProgress:
    """What a run has done so far, for a progress display."""

    requests: int = 0
    tokens: int = 0  # rows of routing recorded
    skipped: int = 0  # requests that the trace held already
    skipped_tokens: int = 0  # their prompt tokens
    empty: int = 0  # requests without text
    cut: int = 0  # requests cut to max_length
    read_requests: int = 0  # of the source so far, in all ranks' shares, read ahead of the model
    read_tokens: int = 0  # their prompt tokens
    read: ReadProgress = field(default_factory=ReadProgress)
    started: float = 0.0  # time.monotonic() when the first batch began
    interrupted: bool = False


@contextmanager
def interruptible(progress: TraceProgress) -> Iterator[tuple[Callable[[], Any], Callable[[], None]]]:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt in the block, once. Yields `hold` and `check`.

    In `with hold()` it is raised at the end only, or at a call of `check`. So reading, which may
    wait for its source, ends at once; a model's pass ends at its next router, never inside a
    kernel; and the trace is never left between two states.
    """
    holding = False

    def stop(number: int, frame: Any) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        progress.interrupted = True
        if not holding:
            raise KeyboardInterrupt

    def check() -> None:
        if progress.interrupted:
            raise KeyboardInterrupt

    @contextmanager
    def hold() -> Iterator[None]:
        nonlocal holding
        holding = True
        try:
            yield
        finally:
            holding = False
        check()

    try:
        before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: signals are the caller's
        before = {}
    try:
        yield hold, check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
