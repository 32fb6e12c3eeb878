"""Option types that several commands share, and the command line as it is recorded in results.

Nothing heavy is imported here.
"""

import enum
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer


class Method(enum.StrEnum):
    """Choices of --method; a test keeps them equal to semmoe.solvers.place.solve.METHODS."""

    semmoe = "semmoe"
    metis = "metis"
    spectral = "spectral"
    load = "load"
    contiguous = "contiguous"
    paper = "paper"
    exact = "exact"


class Dispatch(enum.StrEnum):
    """Choices of --dispatch; a test keeps them equal to
    semmoe.solvers.evaluate.metrics.DISPATCH_KINDS."""

    per_rank = "per-rank"
    per_expert = "per-expert"
    per_node = "per-node"
    gather = "gather"


class Objective(enum.StrEnum):
    """Choices of --objective; a test keeps them equal to semmoe.solvers.place.joint.OBJECTIVES."""

    tp = "tp"
    dp = "dp"
    both = "both"


class Effort(enum.StrEnum):
    """Choices of --effort; a test keeps them equal to semmoe.solvers.place.partition.EFFORTS."""

    fast = "fast"
    default = "default"
    max = "max"


class Expressible(enum.StrEnum):
    """Choices of --expressible."""

    permutation = "permutation"


BatchTokens = Annotated[int, typer.Option(help="Tokens of a simulated batch.", min=1)]
Window = Annotated[int, typer.Option(help="Requests of a simulated scheduling window.", min=1)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of a table.")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice; same input and seed give the same bytes.", min=0)]

Dataset = Annotated[
    str | None, typer.Option("--dataset", metavar="NAME", help="Texts: a data set of the Hugging Face hub, streamed.")
]
Subset = Annotated[str | None, typer.Option("--subset", help="Subset (configuration) of --dataset.")]
Split = Annotated[str | None, typer.Option("--split", help="Split of --dataset.")]
TextField = Annotated[
    str | None,
    typer.Option("--text-field", metavar="FIELD", help="Field that holds the text; found by itself otherwise."),
]
MessagesField = Annotated[
    str | None,
    typer.Option(
        "--messages-field", metavar="FIELD", help="Field that holds chat messages, for the tokenizer's chat template."
    ),
]


def command_line(*path_values: Path | str) -> str:
    """The command line as typed, without what cannot change the result: where files lie, how
    many processes work, how it is printed."""
    hidden = {str(p) for p in path_values}
    words, skip = [], False
    for word in sys.argv[1:]:
        if skip:
            skip = False
        elif word in ("-o", "--output", "--processes"):
            skip = True
        elif word in ("--json", "--debug") or word.startswith(("--output=", "--processes=")) or re.match("-o.", word):
            continue
        elif (value := word.partition("=")[2]) and value in hidden:
            words.append(word.partition("=")[0])  # an option that names a file, as where a space stands between the two
        elif word not in hidden and word.rstrip("/") not in hidden:
            words.append(word)
    return shlex.join(["semmoe", *words])


def given(**options: Any) -> list[str]:
    """The names of those options that have a value other than none, False and 0, as typed."""
    return [f"--{name.replace('_', '-')}" for name, value in options.items() if value not in (None, False, 0)]


def refuse_mixed(what: str, options: list[str]) -> None:
    """Raise BadParameter where there is an option that `what` would pass over."""
    if options:
        raise typer.BadParameter(f"{options[0]} does not go with {what}")
