"""Named steps of a long command: a bar with the time left on a terminal, a plain line now and then
elsewhere. On stderr.

rich is imported inside.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from semmoe.profiles.progress import Progress, Stages

LINE_SECONDS = 10.0


@contextmanager
def steps(name: str) -> Iterator[Progress]:
    """A function to call with how many of how many steps are done, while the block runs."""
    with stages() as show:
        yield partial(show, name)


@contextmanager
def stages() -> Iterator[Stages]:
    """The same for stages one after another, each with a bar of its own."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task, current = bar.add_task("", total=None, visible=False), ""

        def show(name: str, done: int, total: int) -> None:
            nonlocal task, current
            if name != current:
                bar.remove_task(task)
                task, current = bar.add_task(name, total=total), name
            bar.update(task, completed=done, total=total)

        yield show


def _lines() -> Stages:
    """A line at most every LINE_SECONDS: short work prints none."""
    last = time.monotonic()

    def show(name: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_SECONDS:
            last = time.monotonic()
            print(f"semmoe: {name} {done} of {total}", file=sys.stderr, flush=True)

    return show
