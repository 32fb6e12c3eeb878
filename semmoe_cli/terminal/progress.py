"""Named steps of a long command: a bar with the time left on a terminal, a plain line now and then
elsewhere. On stderr.

rich is imported inside.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

LINE_SECONDS = 10.0

Step = Callable[[int, int], None]  # steps done, steps in all
Stage = Callable[[str, int, int], None]  # name of a stage, steps done in it, its steps in all


@contextmanager
def steps(name: str) -> Iterator[Step]:
    """A function to call with how many of how many steps are done, while the block runs."""
    with stages() as show:
        yield partial(show, name)


@contextmanager
def stages() -> Iterator[Stage]:
    """The same for stages one after another, each with a bar of its own."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task, current = bar.add_task("", total=None, visible=False), ""

        def show(name: str, done: int, total: int) -> None:
            nonlocal task, current
            if name != current:
                bar.remove_task(task)
                task, current = bar.add_task(name, total=total), name
            bar.update(task, completed=done, total=total)

        yield show


def _lines() -> Stage:
    """A line at most every LINE_SECONDS: short work prints none."""
    last = time.monotonic()

    def show(name: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_SECONDS:
            last = time.monotonic()
            print(f"semmoe: {name} {done} of {total}", file=sys.stderr, flush=True)

    return show
