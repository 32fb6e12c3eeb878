"""Options that several commands share: each choice, each option and each group of options once.

A group is a record whose fields are options. A command names the records that it takes, and
`grouped` gives their fields to Typer as options of the command:

    @grouped(last=("seed", "json_"))
    def simulate(trace: Path, simulation: Simulation, json_: Json = False):
        print(simulation.batch_tokens)

Nothing heavy is imported here.
"""

import enum
import re
import shlex
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from semmoe.config import used_words

if TYPE_CHECKING:
    from semmoe.solvers.schedule.simulate import Setting


class Method(enum.StrEnum):
    """--method: semmoe.solvers.place.solve.METHODS (tests keep all of these equal to the code)."""

    semmoe = "semmoe"
    metis = "metis"
    spectral = "spectral"
    load = "load"
    contiguous = "contiguous"
    paper = "paper"
    exact = "exact"


class Dispatch(enum.StrEnum):
    """--dispatch: semmoe.solvers.evaluate.metrics.DISPATCH_KINDS."""

    per_rank = "per-rank"
    per_expert = "per-expert"
    per_node = "per-node"
    gather = "gather"


class Objective(enum.StrEnum):
    """--objective: semmoe.solvers.place.joint.OBJECTIVES."""

    tp = "tp"
    dp = "dp"
    both = "both"


class Effort(enum.StrEnum):
    """--effort: semmoe.solvers.place.partition.EFFORTS."""

    fast = "fast"
    default = "default"
    max = "max"


class Expressible(enum.StrEnum):
    """--expressible."""

    permutation = "permutation"


class Spare(enum.StrEnum):
    """--spare: semmoe.solvers.slots.SPARE."""

    copies = "copies"
    empty = "empty"


class TraceKind(enum.StrEnum):
    """--from: semmoe.profiles.engines.imports.KINDS."""

    sglang = "sglang"
    vllm = "vllm"
    sglang_recorder = "sglang-recorder"
    trtllm = "trtllm"
    megatron = "megatron"
    eplb = "eplb"


class Repetition(enum.StrEnum):
    """--repetition: semmoe.profiles.engines.imports.REPETITION."""

    drop = "drop"
    keep = "keep"


class MapKind(enum.StrEnum):
    """--import: semmoe.solvers.maps.kinds.KINDS."""

    sglang = "sglang"
    trtllm = "trtllm"
    vllm = "vllm"
    vllm_ascend = "vllm-ascend"
    eplb = "eplb"


class ExportKind(enum.StrEnum):
    """--to: MapKind, and semmoe.runtime.engines.write.KINDS."""

    sglang = "sglang"
    trtllm = "trtllm"
    vllm = "vllm"
    vllm_ascend = "vllm-ascend"
    eplb = "eplb"
    vllm_plugin = "vllm-plugin"
    sglang_plugin = "sglang-plugin"


class VllmFormat(enum.StrEnum):
    """--format: semmoe.solvers.maps.vllm.FORMATS."""

    pr41141 = "pr41141"
    pr49572 = "pr49572"
    pr34811 = "pr34811"


class Dtype(enum.StrEnum):
    """--dtype: semmoe.profiles.capture.loading.DTYPES."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class Layout(enum.StrEnum):
    """--layout: semmoe.runtime.reshard.sidecar.LAYOUTS."""

    permuted = "permuted"
    ranks = "ranks"


class Verify(enum.StrEnum):
    """--verify: semmoe.runtime.reshard.reshard.VERIFY."""

    none = "none"
    bytes = "bytes"
    logits = "logits"


UNTOLD = ("--output", "--processes", "--config")  # of a command line, where it is recorded

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of a table.")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice; same input and seed give the same bytes.", min=0)]


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Where texts come from beside files, and which fields hold them."""

    dataset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Texts: a data set of the Hugging Face hub, streamed.")
    ] = None
    subset: Annotated[str | None, typer.Option(help="Subset (configuration) of --dataset.")] = None
    split: Annotated[str | None, typer.Option(help="Split of --dataset.")] = None
    text_field: Annotated[
        str | None, typer.Option(metavar="FIELD", help="Field that holds the text; found by itself otherwise.")
    ] = None
    messages_field: Annotated[
        str | None,
        typer.Option(metavar="FIELD", help="Field that holds chat messages, for the tokenizer's chat template."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How the weights of a model are loaded."""

    dtype: Annotated[Dtype, typer.Option(help="Number type of the weights; auto: as stored.")] = Dtype.auto
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto"


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """How schedules are simulated."""

    batch_tokens: Annotated[int, typer.Option(help="Tokens of a simulated batch.", min=1)] = 512
    window: Annotated[int, typer.Option(help="Requests of a simulated scheduling window.", min=1)] = 256
    seed: Seed = 0

    def setting(self) -> "Setting":
        """The same as solvers read it."""
        from semmoe.solvers.schedule.simulate import Setting

        return Setting(self.batch_tokens, self.window, self.seed)


def grouped(
    *, first: Sequence[str] = (), last: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command that takes records, as Typer takes it: every field is an option of its own.

    Parameters:
        first, last: names of options that the help shows before and after the others

    A parameter annotated with a dataclass stands for that dataclass's fields, in their order; a
    field may be such a record again. Without names in `first` or `last` the help shows the options
    in the order of parameters and fields.
    """
    place_of = {name: i - len(first) for i, name in enumerate(first)} | {name: i + 1 for i, name in enumerate(last)}

    def as_typer_takes_it(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def flat(**values: Any) -> None:
            _call(command, values)

        parameters = sorted(_parameters(command), key=lambda parameter: place_of.get(parameter.name, 0))
        flat.__signature__ = Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
        return flat

    return as_typer_takes_it


def _parameters(function: Callable[..., Any]) -> Iterator[Parameter]:
    for parameter in signature(function).parameters.values():
        if record := _record_of(parameter):
            yield from _parameters(record)
        else:
            yield parameter.replace(kind=Parameter.KEYWORD_ONLY)


def _call(function: Callable[..., Any], values: Mapping[str, Any]) -> Any:
    """`function`, or the record of that class, with its records made from `values`."""
    return function(
        **{
            name: _call(record, values) if (record := _record_of(parameter)) else values[name]
            for name, parameter in signature(function).parameters.items()
        }
    )


def _record_of(parameter: Parameter) -> type | None:
    """The class of the record that a parameter is; None where it is an option."""
    kind = parameter.annotation
    return kind if isinstance(kind, type) and is_dataclass(kind) else None


def command_line(*path_values: Path | str) -> str:
    """The command line as typed, without what cannot change the result: where files lie, how
    many processes work, how it is printed. What semmoe.toml gave to it is added."""
    hidden = {str(p) for p in path_values}
    words, skip = [], False
    for word in sys.argv[1:]:
        if skip:
            skip = False
        elif word in ("-o", *UNTOLD):
            skip = True
        elif word in ("--json", "--debug") or word.partition("=")[0] in UNTOLD or re.match("-o.", word):
            continue
        elif (value := word.partition("=")[2]) and value in hidden:
            words.append(word.partition("=")[0])  # an option that names a file, as where a space stands between the two
        elif word not in hidden and word.rstrip("/") not in hidden:
            words.append(word)
    return shlex.join(["semmoe", *words, *used_words()])


def given(*records: Any, but: Container[str] = (), **options: Any) -> list[str]:
    """Names, as typed, of the options that say something: those of records that differ from their
    default, and others with a value other than none, False and 0. `but`: names passed over."""
    typed = []
    for record in records:
        for field in fields(record):
            value = getattr(record, field.name)
            if is_dataclass(value):
                typed += given(value, but=but)
            elif field.name not in but and value != field.default:
                typed.append(_typed(f"no_{field.name}" if field.default is True else field.name))
    return typed + [_typed(name) for name, value in options.items() if value not in (None, False, 0)]


def _typed(name: str) -> str:
    return f"--{name.strip('_').replace('_', '-')}"


def refuse_mixed(what: str, options: list[str]) -> None:
    """Raise BadParameter where there is an option that `what` would pass over."""
    if options:
        raise typer.BadParameter(f"{options[0]} does not go with {what}")
