"""How a rank tells how far it is: a function that the command line gives, and one that shows
nothing.

A rank runs in a process of its own, so what is passed must be picklable: a function of a module, as
semmoe.terminal.progress.steps is.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from semmoe.profiles.progress import Progress, unshown

Show = Callable[[str], AbstractContextManager[Progress]]  # the name of what is done -> its progress


def shown_nowhere(name: str) -> AbstractContextManager[Progress]:
    """Progress that nobody sees."""
    return nullcontext(unshown)
