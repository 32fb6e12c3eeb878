"""How long work tells how far it is: two callback types, and the ones that show nothing.

The command line shows them (`semmoe.terminal.progress`); everything below only calls them.
"""

from collections.abc import Callable

Progress = Callable[[int, int], None]  # steps done, steps in all
Stages = Callable[[str, int, int], None]  # name of a stage, steps done in it, its steps in all
AGAIN = " again"  # in the name of a stage that does what an earlier one did


def unshown(done: int, total: int) -> None:
    """Progress that nobody sees."""


def unshown_stages(name: str, done: int, total: int) -> None:
    """Stages that nobody sees."""
