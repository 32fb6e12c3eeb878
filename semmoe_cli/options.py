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
    from semmoe.solvers.time.hardware import TimeAsked


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


class Phase(enum.StrEnum):
    """--phase: semmoe.profiles.split.PHASES."""

    prompt = "prompt"
    generated = "generated"
    all = "all"


class ScoreFrom(enum.StrEnum):
    """--score-from: semmoe.solvers.schedule.simulate.SIGNATURES."""

    prompt = "prompt"
    first_tokens = "first-tokens"


class Minimize(enum.StrEnum):
    """--minimize: semmoe.solvers.make_plan.PlanOptions."""

    time = "time"
    bytes = "bytes"


class RowType(enum.StrEnum):
    """--rows: semmoe.solvers.time.hardware.ROWS."""

    bf16 = "bf16"
    fp8 = "fp8"


class Overlap(enum.StrEnum):
    """--overlap: semmoe.solvers.time.hardware.OVERLAPS."""

    none = "none"
    two_batch = "two-batch"


class TraceKind(enum.StrEnum):
    """--from: semmoe.profiles.engines.imports.KINDS."""

    sglang = "sglang"
    vllm = "vllm"
    sglang_recorder = "sglang-recorder"
    trtllm = "trtllm"
    megatron = "megatron"
    eplb = "eplb"


class Api(enum.StrEnum):
    """--api: semmoe.profiles.capture.server.APIS."""

    vllm = "vllm"
    sglang = "sglang"


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


class Engine(enum.StrEnum):
    """--engine: semmoe.runtime.router.pins.ENGINES."""

    vllm = "vllm"
    sglang = "sglang"
    trtllm = "trtllm"


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
    """--layout: semmoe.profiles.numbering.LAYOUTS."""

    permuted = "permuted"
    ranks = "ranks"


class Verify(enum.StrEnum):
    """--verify: semmoe.runtime.reshard.reshard.VERIFY."""

    none = "none"
    bytes = "bytes"
    logits = "logits"


UNDER = 3  # exit code: 1 is bad input, 2 a wrong command line
UNTOLD_FLAGS = ("--json", "--debug", "-q", "--quiet", "-v", "--verbose")
UNTOLD = ("--output", "--processes", "--config")  # of a command line, where it is recorded

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of a table.")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice; same input and seed give the same bytes.", min=0)]

ReplicaChoiceOption = Annotated[
    str | None,
    typer.Option(
        "--replica-choice",
        metavar="RULE",
        help="Which copy of an expert serves: own-rank-then-node-then-load; cover (per token the fewest remote ranks); as an engine "
        "does it, by its name or engine with --engine. Of a plan its own, where it is not said.",
    ),
]


EngineOption = Annotated[
    str | None,
    typer.Option("--engine", metavar="NAME", help="Copies serve as in this engine: sglang, vllm, trtllm, vllm-ascend."),
]


def replica_rule(choice: str | None, engine: str | None) -> str | None:
    """The rule that --replica-choice and --engine name; None where neither is given."""
    from semmoe.profiles.errors import InputError
    from semmoe.solvers.place.replicas import ENGINE_RULES, check_rule

    if engine is not None and engine not in ENGINE_RULES:
        raise InputError(f"--engine {engine}: expected {', '.join(ENGINE_RULES)}")
    if choice == "engine" and engine is None:
        raise InputError(f"--replica-choice engine needs --engine NAME: {', '.join(ENGINE_RULES)}")
    found = engine if choice in (None, "engine") else choice
    return found and check_rule(found)


PhaseOption = Annotated[
    Phase | None,
    typer.Option(
        "--phase", help="Only tokens of prompts, or only generated ones; both where it is not said, of a plan its own."
    ),
]
AgainstOption = Annotated[
    str | None,
    typer.Option(
        "--against",
        metavar="contiguous|load|PLAN",
        help="What verdict, headline and tables hold the plan against, at as many slots; the better of contiguous and load otherwise.",
    ),
]


Force = Annotated[bool, typer.Option("--force", help="Replace what -o names where it is there already.")]
All = Annotated[
    bool,
    typer.Option("--all", help="Also print every schedule with its intervals, and what its predicted time is made of."),
]
FailUnder = Annotated[
    float | None,
    typer.Option(
        "--fail-under",
        metavar="PERCENT",
        help=f"End with exit code {UNDER} where less is saved: by the verdict, or of compare by any plan against the first.",
        show_default=False,
    ),
]


def refuse_to_replace(output: Path, *, force: bool) -> None:
    """The one rule of every command: raise InputError where a file, or a directory with something
    in it, is there already and --force is not given, before anything is computed. What is neither
    (a pipe, /dev/stdout) is written to."""
    from semmoe.profiles.errors import InputError

    if not force and (output.is_file() or (output.is_dir() and any(output.iterdir()))):
        raise InputError(f"{output} is there already: choose another name, or replace it with --force")


def check_saved(limit: float | None, saved: Mapping[str, float]) -> None:
    """End with exit code UNDER, one line for each, where a share of `saved` is under the limit in
    percent; without one, do nothing."""
    from semmoe.terminal.tables import note

    short = {what: share for what, share in saved.items() if limit is not None and not 100 * share >= limit}
    for what, share in short.items():
        note(f"--fail-under {limit:g}: {what} saves {100 * share:.1f}%")
    if short:
        raise typer.Exit(UNDER)


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
    score_from: Annotated[
        ScoreFrom | None,
        typer.Option(
            help="Also schedule requests of a decode pool by routing that is known when they get there: of their prompt, or of their "
            "first 16 generated tokens."
        ),
    ] = None
    seed: Seed = 0

    def setting(self) -> "Setting":
        """The same as solvers read it."""
        from semmoe.solvers.schedule.simulate import Setting

        return Setting(self.batch_tokens, self.window, self.seed, self.score_from.value if self.score_from else "")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The machine and the batches that times are predicted for (semmoe.solvers.time)."""

    hardware: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Predict the time of a MoE layer on this machine: a100, h100, h200, h800, h20, b200, gb200, mi300x, or a JSON file.",
        ),
    ] = None
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Exchange: deepep-normal, deepep-ll, nvlink-onesided, nccl-a2a, nccl-gather, self-balancing, cpu-proxy, semmoe.",
        ),
    ] = None
    tokens_per_rank: Annotated[
        int,
        typer.Option(metavar="N", help="Tokens of a batch on each rank; 0: 4096 for prompts, 128 generated.", min=0),
    ] = 0
    phase: PhaseOption = None
    weights: Annotated[
        str | None, typer.Option(metavar="bf16|fp8|mxfp4", help="Number type of the experts; the model's otherwise.")
    ] = None
    rows: Annotated[RowType, typer.Option(help="Number type of a row on dispatch.")] = RowType.bf16
    overlap: Annotated[
        Overlap, typer.Option(help="two-batch: the exchanges of one half run behind the work of the other.")
    ] = Overlap.none
    other_us: Annotated[
        float, typer.Option(metavar="U", help="Microseconds of a layer outside experts and exchanges.", min=0)
    ] = 0.0
    step_ms: Annotated[
        float, typer.Option(metavar="X", help="Milliseconds of a step of the whole model, for shares of it.", min=0)
    ] = 0.0
    gpu_hour: Annotated[
        float, typer.Option(metavar="USD", help="With --step-ms: price of a GPU hour, for money.", min=0)
    ] = 0.0
    measured: Annotated[
        Path | None,
        typer.Option(
            metavar="ROWS.csv", help="Measured exchanges (bytes,us) and experts (what,bytes,us) of the machine."
        ),
    ] = None
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Copies serve as in this engine, and with --hardware its backend and schedules: sglang, vllm, trtllm, vllm-ascend.",
        ),
    ] = None

    @property
    def whose(self) -> str | None:
        """One of semmoe.profiles.split.PHASES; None where it is not said."""
        return self.phase.value if self.phase else None

    def asked(self, hidden_size: int = 0, expert_size: int = 0) -> "TimeAsked | None":
        """The same as solvers read it; None without --hardware, which the others need."""
        from semmoe.solvers.time.hardware import TimeAsked

        if self.hardware is None:
            if others := given(self, but=("phase", "engine", "hidden_size", "expert_size")):
                raise typer.BadParameter(f"{others[0]} needs --hardware: times are predicted for a machine")
            return None
        return TimeAsked(
            hardware=self.hardware,
            backend=self.backend or "",
            tokens_per_rank=self.tokens_per_rank,
            phase="" if self.whose in (None, "all") else str(self.whose),
            weights=self.weights or "",
            rows=self.rows.value,
            overlap=self.overlap.value,
            other_us=self.other_us,
            step_ms=self.step_ms,
            gpu_hour=self.gpu_hour,
            measured=self.measured,
            engine=self.engine or "",
            hidden_size=hidden_size,
            expert_size=expert_size,
        )


@dataclass(frozen=True, kw_only=True)
class TimedPlacing(Timing):
    """The same, for a command that has no other use for the model's sizes."""

    hidden_size: Annotated[int, typer.Option(metavar="D", help="With --hardware: hidden size of the model.", min=0)] = 0
    expert_size: Annotated[
        int, typer.Option(metavar="I", help="With --hardware: intermediate size of an expert.", min=0)
    ] = 0

    def asked_here(self) -> "TimeAsked | None":
        """`asked`, with the sizes of these options."""
        return self.asked(self.hidden_size, self.expert_size)


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
        elif word in UNTOLD_FLAGS or word.partition("=")[0] in UNTOLD or re.match("-o.", word):
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
