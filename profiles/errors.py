"""InputError: input that cannot be used. The command line prints it as one line and exits with 1.

Text of users on that line is made visible, lists are cut, and models have a name. And the one such
line that asks for an install: the base package runs without PyTorch, and what needs a package of an
extra says which.
"""

import os
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import PurePath
from unicodedata import category

# Packages that the base install lacks, by the extra of pyproject.toml that brings them.
EXTRAS = {
    "models": ("torch", "transformers", "datasets", "accelerate", "tokenizers", "huggingface_hub"),
    "route": ("starlette", "uvicorn", "httptools", "uvloop", "orjson"),
}
DEBUG = "SEMMOE_DEBUG"  # environment variable; `semmoe --debug` sets it, for ranks and workers too

UNNAMED = ("", "unknown")  # what a trace says of a model that nobody named

# Characters that nobody sees: control, format, half a character, ends of line and of paragraph;
# but words and emoji are made with the two joiners.
UNSEEN = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
JOINERS = "\u200c\u200d"


class InputError(Exception):
    """One line for the user: the value, what was expected, and where it was found.

    Every function of semmoe raises it for what cannot be used, and nothing else for that. Source:
    profiles/errors.py.
    """


def listed(names: Iterable[object], most: int = 12) -> str:
    """Names for a message: at most so many, and how many more there are."""
    shown = [str(name) for name in names]
    more = len(shown) - most
    return ", ".join(shown[:most]) + (f" and {more} more" if more > 0 else "")


def model_name(model: str, where: str = "") -> str:
    """Name of a model for people. One that nobody named is that of the trace or plan `where`, or
    ""."""
    if model not in UNNAMED:
        return model
    return f"the model of {PurePath(where).name}" if where else ""


def require_extra(what: str, *packages: str) -> None:
    """Raise InputError with the command to type unless `packages`, all of one extra, are installed.

    `what`: what needs them, as the subject of the sentence. Nothing is imported.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        extra = next(name for name, brought in EXTRAS.items() if missing[0] in brought)
        raise InputError(f"{what} needs {' and '.join(missing)}: pip install 'semmoe[{extra}]'")


def show_traceback(error: BaseException) -> None:
    """Print the traceback of an error that is about to end as one line, and of every error behind
    it, where SEMMOE_DEBUG is set to anything but 0."""
    if os.environ.get(DEBUG, "0") in ("", "0"):
        return
    import traceback

    behind: BaseException | None = error
    while behind is not None:
        behind.__suppress_context__ = False  # `raise ... from None` keeps the reader's line short
        behind = behind.__cause__ or behind.__context__
    traceback.print_exception(error)


def raised_by_us(error: BaseException) -> bool:
    """Whether the line that raised an exception is semmoe's own: a bug, not a mistake of the user
    that another package has found."""
    name, step = "", error.__traceback__
    while step is not None:
        name, step = step.tb_frame.f_globals.get("__name__", ""), step.tb_next
    return name.partition(".")[0] == "semmoe"


def visible(text: str) -> str:
    """Text of users on one line: what would move the cursor, turn the direction of letters or
    break the line is an escape, as Python writes it."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if is_seen(c) else ascii(c)[1:-1] for c in text)


def is_seen(character: str) -> bool:
    """Whether a reader sees the character, or the gap that it is, and nothing else happens."""
    number = ord(character)
    if number & 0xFFFE == 0xFFFE or 0xFDD0 <= number <= 0xFDEF:  # no characters: XML takes none of them
        return False
    return character in JOINERS or category(character) not in UNSEEN
