"""How a rank tells how far it is: a function that the command line gives, and one that shows
nothing.

A rank runs in a process of its own, so what is passed must be picklable: a function of a module, as
semmoe.terminal.progress.steps is.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

Show = Callable[
    [str], AbstractContextManager[Callable[[int, int], None]]
]  # a name -> a function of steps done, steps in all


def shown_nowhere(name: str) -> AbstractContextManager[Callable[[int, int], None]]:
    """Progress that nobody sees."""
    return nullcontext(lambda done, total: None)
