"""`semmoe run`: a placed model on many ranks, or with --replay a recorded routing on them
without model weights."""

import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from semmoe.options import Dataset, Dtype, Json, MessagesField, Seed, Split, Subset, TextField, given, refuse_mixed
from semmoe.profiles.errors import InputError
from semmoe.terminal.progress import steps
from semmoe.terminal.tables import note, print_facts, print_json

UNMEASURED_BYTES_PER_S = 1e13  # no link is so fast: larger batches took no longer than smaller ones

if TYPE_CHECKING:
    from semmoe.runtime.replay.cases import ReplayOptions
    from semmoe.runtime.serving.run import RunOptions, RunResult
    from semmoe.solvers.plan import Plan


def run(
    plan: Annotated[Path, typer.Option("--plan", metavar="PLAN", help="Plan directory.")],
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            metavar="CHECKPOINT", help="Hub id or directory of the model, a reshard of it (permuted or ranks), or demo."
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Prompts: a .jsonl, .json, .parquet, .txt or .csv file (.gz may follow), a directory of them, - for stdin, or demo.",
        ),
    ] = None,
    dataset: Dataset = None,
    subset: Subset = None,
    split: Split = None,
    text_field: TextField = None,
    messages_field: MessagesField = None,
    max_requests: Annotated[int | None, typer.Option(metavar="N", help="Run the first N prompts.", min=1)] = None,
    nproc: Annotated[
        int | None, typer.Option(metavar="R", help="Ranks to start here; the plan's number by default.", min=1)
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="none|dp|tp",
            help="Where work goes. none: requests in turn. dp: requests by the plan's scorer, balanced in tokens (the default where "
            "the plan has one). tp: heads shared over ranks, tokens by --predict. With --replay, all that the plan allows by default.",
        ),
    ] = None,
    predict: Annotated[
        str | None,
        typer.Option(
            metavar="context|learning|table|paper|none",
            help="With --scheduler tp: what predicts a token's rank; context by default. learning: the context predictor, whose weights "
            "go on learning from what runs, for traffic that the plan's trace did not hold; none gives equal consecutive slices.",
        ),
    ] = None,
    backend: Annotated[str, typer.Option(help="auto, nccl or gloo.")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="Number type of the weights; auto: as stored.")] = Dtype.auto,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Most tokens to generate per request.", min=1)] = 32,
    batch_tokens: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Prompt tokens of one forward pass of a rank, padding counted; with --replay, rows of a batch on all ranks together.",
            min=1,
        ),
    ] = 4096,
    replay: Annotated[
        str | None,
        typer.Option(
            metavar="TRACE", help="Replay this trace's routing with random values instead of running a model."
        ),
    ] = None,
    hidden_size: Annotated[
        int | None, typer.Option(metavar="D", help="With --replay: values of a token's row.", min=1)
    ] = None,
    expert_size: Annotated[
        int, typer.Option(metavar="I", help="With --replay: width of the random experts; 0 for none.", min=0)
    ] = 0,
    max_tokens: Annotated[
        int, typer.Option(metavar="N", help="With --replay: most rows to replay, a random choice of requests.", min=1)
    ] = 65536,
    seed: Seed = 0,
    timeout: Annotated[
        float,
        typer.Option(
            metavar="S", help="Seconds that a rank waits for the others before the run fails.", min=1, max=1e9
        ),
    ] = 300.0,
    check: Annotated[
        bool, typer.Option("--check", help="Run the same prompts through plain Transformers too: tokens must be equal.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="OUT.jsonl", help="Completions, one JSON line per request.")
    ] = None,
    json_: Json = False,
) -> None:
    """Run a placed model: every rank holds its experts and serves its own requests. Or replay a
    trace on your own network.

    Examples: semmoe run demo --plan p --prompts demo -o out.jsonl; semmoe run --replay t --plan p
    --hidden-size 2880
    """
    from semmoe.profiles.capture.requests import RequestSource, read_all
    from semmoe.runtime.ranks.launch import launch, under_torchrun
    from semmoe.runtime.serving.results import kept_results, partial_state

    texts = RequestSource(prompts, dataset, subset, split, text_field, messages_field, None, max_requests)
    if replay is not None:
        if hidden_size is None or checkpoint is not None or texts != RequestSource():
            raise typer.BadParameter("--replay needs --hidden-size, and takes neither CHECKPOINT nor prompts")
        refuse_mixed("--replay", given(output=output, check=check, predict=predict))
        from semmoe.runtime.replay.cases import ReplayOptions

        run_replay(
            ReplayOptions(
                replay,
                str(plan),
                hidden_size,
                expert_size,
                batch_tokens,
                max_tokens,
                scheduler,
                backend,
                device,
                dtype.value,
                timeout,
                seed,
            ),
            nproc,
            as_json=json_,
        )
        return
    if checkpoint is None or (prompts is None) == (dataset is None):
        raise typer.BadParameter("CHECKPOINT and one of --prompts and --dataset are needed (or --replay TRACE)")
    if prompts is not None and (subset or split):
        raise typer.BadParameter("--subset and --split go with --dataset")
    refuse_mixed("CHECKPOINT", given(hidden_size=hidden_size, expert_size=expert_size))
    if scheduler != "tp":
        refuse_mixed("another scheduler than --scheduler tp", given(predict=predict))
    kept: Callable[[], str] = str
    if output is not None and os.environ.get("RANK", "0") == "0":
        check_output(output)
        kept = partial(kept_results, output, partial_state(output))
    # Before PyTorch is imported: a plan or prompts that are not there are told at once.
    alone = not under_torchrun()
    found_plan = read_plan(plan, alone=alone)
    scheduler = default_scheduler(found_plan, str(plan)) if scheduler is None else scheduler
    requests = read_all(texts, tell=note) if alone else []
    from semmoe.runtime.serving.run import RunOptions, assign_prompts, load_plan, run_rank

    options = RunOptions(
        checkpoint,
        str(plan),
        texts,
        scheduler,
        predict or "context",
        backend,
        dtype.value,
        device,
        max_new_tokens,
        batch_tokens,
        str(output) if output else None,
        timeout,
    )
    if not alone:
        result = as_rank(lambda: run_rank(options, None, note, steps), kept)
        if result is None:
            return
    else:
        placed_plan = load_plan(options, nproc)
        ranks = placed_plan.topology.num_ranks
        check_start(options, ranks, check=check)
        assigned = assign_prompts(options, placed_plan, requests)
        try:
            result = launch(run_rank, (options, assigned, note, steps), ranks)
        except InputError as error:
            raise InputError(f"{error}{kept()}") from None
    metrics = result.metrics
    if check:
        metrics = metrics | {"check": run_check(options, result)}
    print_results(result.lines, metrics, output=output, as_json=json_)


def read_plan(path: Path, *, alone: bool) -> "Plan":
    """The plan. Ranks of torchrun all read it: what is wrong with it is told once on each
    machine."""
    from semmoe.solvers.plan import Plan

    if alone:
        return Plan.load(path)
    from semmoe.runtime.ranks.failures import SharedRefusal

    def load() -> Plan:
        try:
            return Plan.load(path)
        except InputError as error:
            raise SharedRefusal(str(error)) from None

    return as_rank(load)


def default_scheduler(plan: "Plan", path: str) -> str:
    """dp where the plan scores requests; else none, and a note says so."""
    from semmoe.solvers.schedule.schedule import Schedule

    schedule = Schedule.from_tables(plan.tables)
    if schedule is not None and schedule.has_requests:
        return "dp"
    if os.environ.get("RANK", "0") == "0":
        note(f"{path} scores no requests: they go to the ranks in turn (--scheduler none)")
    return "none"


def run_replay(options: "ReplayOptions", nproc: int | None, *, as_json: bool) -> None:
    """Start or join the ranks, replay, print the rows."""
    from semmoe.runtime.ranks.launch import launch, under_torchrun
    from semmoe.runtime.replay.cases import prepare
    from semmoe.runtime.replay.replay import replay_rank
    from semmoe.solvers.plan import Plan

    if under_torchrun():
        result = as_rank(lambda: replay_rank(options, None, note, steps))
    else:
        ranks = Plan.load(options.plan).topology.num_ranks
        if nproc not in (None, ranks):
            raise InputError(f"{nproc} ranks run, the plan {options.plan} is for {ranks}")
        check_group(options.device, options.backend, ranks)
        result = launch(replay_rank, (options, prepare(options, ranks, note), note, steps), ranks)
    if result is not None:
        print_replay(result, as_json=as_json)


def print_replay(result: dict[str, Any], *, as_json: bool) -> None:
    """Rows of a replay as JSON or as a table."""
    if as_json:
        print_json(result)
        return
    from rich.console import Console
    from rich.table import Table

    rate = result["network"]["bytes_per_s"]
    link = f"{rate / 1e6:,.0f} MB/s" if rate < UNMEASURED_BYTES_PER_S else "too fast to measure in such batches"
    title = (
        f"{result['ranks']} ranks on {result['device']} ({result['backend']}), {result['tokens']:,} tokens in batches of "
        f"{result['batch_tokens']:,}; link {link}, "
        f"latency {result['network']['latency_s'] * 1e3:.2f} ms"
    )
    table = Table(title=title, title_justify="left")
    for heading in ("placement", "schedule"):
        table.add_column(heading)
    numbers = {
        "ms_per_layer": 3,
        "predicted_ms_per_layer": 3,
        "rows_per_token": 3,
        "bytes_per_token": 0,
        "load_imbalance": 3,
    }
    for heading in numbers:
        table.add_column(heading.replace("_", " "), justify="right")
    for row in result["rows"]:
        table.add_row(
            row["placement"], row["schedule"], *(f"{row[name]:,.{digits}f}" for name, digits in numbers.items())
        )
    Console(width=None if sys.stdout.isatty() else 140, highlight=False).print(table)


def as_rank(work: Callable[[], Any], kept: Callable[[], str] = str) -> Any:
    """What `work` returns on this rank under torchrun. A failure is one line, told once where all
    ranks see it.

    `kept`: what rank 0 adds to it.
    """
    from semmoe.runtime.ranks.failures import ExchangeError, SharedRefusal

    rank = os.environ["RANK"]

    def stop(*_: object) -> None:
        raise ExchangeError(f"rank {rank} was stopped by SIGTERM: another rank has failed, or torchrun was ended")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        return work()
    except SharedRefusal as error:
        if os.environ.get("LOCAL_RANK", rank) != "0":
            sys.exit(1)
        raise InputError(str(error)) from None
    except (ExchangeError, InputError) as error:
        raise InputError(f"{error}{kept() if rank == '0' else ''}") from None
    finally:
        signal.signal(signal.SIGTERM, before)


def check_start(options: "RunOptions", ranks: int, *, check: bool) -> None:
    """Raise InputError for what can be seen before any rank starts."""
    from semmoe.runtime.serving.check import require_checkable
    from semmoe.runtime.serving.run import find_source
    from semmoe.runtime.transformers.rank_weights import find_placed
    from semmoe.solvers.plan import Plan

    check_group(options.device, options.backend, ranks)
    _, folder = find_source(options.checkpoint)
    placed = find_placed(folder, Plan.load(options.plan))
    if check:
        require_checkable(placed.layout == "ranks", options.checkpoint)


def check_output(output: Path) -> None:
    """Raise InputError where completions could not be written: told before weights are read."""
    from semmoe.runtime.serving.results import partial_path

    taken = output if output.is_dir() else partial_path(output)
    if taken.is_dir():
        raise InputError(f"cannot write {taken}: it is a directory")
    if not os.access(output.parent, os.W_OK | os.X_OK):
        why = "cannot be written to" if output.parent.is_dir() else "does not exist"
        raise InputError(f"cannot write {output}: the directory {output.parent} {why}")


def check_group(device: str, backend: str, ranks: int) -> None:
    """Raise InputError where this machine has not what the ranks need."""
    from semmoe.runtime.ranks.group import choose_backend, choose_device

    choose_backend(backend, choose_device(device, 0), ranks)


def run_check(options: "RunOptions", result: "RunResult") -> dict[str, Any]:
    """The same prompts through plain Transformers in this process."""
    from semmoe.runtime.ranks.group import choose_device
    from semmoe.runtime.serving.check import check_completions
    from semmoe.runtime.serving.run import find_source

    source, _ = find_source(options.checkpoint)
    with steps("check") as progress:
        return check_completions(
            source,
            result.prompts,
            result.lines,
            dtype=options.dtype,
            device=choose_device(options.device, 0),
            max_new_tokens=options.max_new_tokens,
            stop_ids=result.stop_ids,
            tell=note,
            progress=progress,
        )


def print_results(lines: list[dict[str, Any]], metrics: dict[str, Any], *, output: Path | None, as_json: bool) -> None:
    """Completions on stdout unless they went to a file; metrics as one JSON object, or as facts."""
    if as_json:
        print_json(metrics)
        return
    if output is None:
        for line in lines:
            print(json.dumps(line, ensure_ascii=False))
    facts = {k: v for k, v in metrics.items() if k not in ("layers", "time", "check")}
    facts |= {f"time_{phase}": seconds for phase, seconds in metrics["time"].items()}
    if "check" in metrics:
        found = metrics["check"]
        facts["check"] = f"{'ok' if found['ok'] else 'MISMATCH'}, {found['compared']} compared"
        facts["check"] += f", {len(found['ties'])} ties" if found["ties"] else ""
    print_facts(facts, as_json=False)
