"""How much a command says on stderr beside its errors: -q nothing, -v also what took how long.

Kept in the environment, because ranks and workers are processes of their own.
"""

import os
import sys
from typing import Annotated, Any

import typer

from semmoe.profiles.errors import visible

VARIABLE = "SEMMOE_VERBOSITY"
QUIET, USUAL, VERBOSE = "quiet", "usual", "verbose"


def set_loudness(level: str) -> None:
    """For this process and those that it starts."""
    os.environ[VARIABLE] = level


def is_quiet() -> bool:
    """Notes, progress and next steps are left out; results and errors are not."""
    return os.environ.get(VARIABLE) == QUIET


def say(text: str) -> None:
    """A line for people on stderr, unless they asked for quiet."""
    if not is_quiet():
        print(text, file=sys.stderr)


def detail(line: str) -> None:
    """A line of ours for people who asked for more."""
    if os.environ.get(VARIABLE) == VERBOSE:
        print(f"semmoe: {visible(line)}", file=sys.stderr)


def loudness_words() -> list[str]:
    """What to type to make another command as loud as this one."""
    return {QUIET: ["--quiet"], VERBOSE: ["--verbose"]}.get(os.environ.get(VARIABLE, USUAL), [])


def _set(context: Any, parameter: Any, asked: bool) -> bool:
    if asked and not context.resilient_parsing:
        set_loudness(QUIET if parameter.name == "quiet" else VERBOSE)
    return asked


Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", is_eager=True, callback=_set, help="Say nothing but results and errors.")
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", is_eager=True, callback=_set, help="Say also what took how long, and how much memory."
    ),
]
