"""`semmoe run`: a placed model on many ranks. With --replay see replay.py."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from semmoe.commands.replay import replay as replay_trace
from semmoe.commands.trace import Dtype
from semmoe.options import Dataset, Json, MessagesField, Seed, Split, Subset, TextField, given, refuse_mixed
from semmoe.profiles.errors import InputError
from semmoe.runtime.serving.results import kept_results, partial_path, partial_state
from semmoe.terminal.progress import steps
from semmoe.terminal.tables import note, print_facts, print_json

if TYPE_CHECKING:
    from semmoe.runtime.serving.options import RunOptions
    from semmoe.runtime.serving.run import RankTask, RunResult


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
    from semmoe.profiles.capture.requests import RequestSource

    texts = RequestSource(prompts, dataset, subset, split, text_field, messages_field, None, max_requests)
    if replay is not None:
        if hidden_size is None or checkpoint is not None or texts != RequestSource():
            raise typer.BadParameter("--replay needs --hidden-size, and takes neither CHECKPOINT nor prompts")
        refuse_mixed("--replay", given(output=output, check=check, predict=predict))
        from semmoe.runtime.replay.cases import ReplayOptions

        replayed = ReplayOptions(
            trace=replay,
            plan=str(plan),
            hidden_size=hidden_size,
            expert_size=expert_size,
            batch_tokens=batch_tokens,
            max_tokens=max_tokens,
            scheduler=scheduler,
            backend=backend,
            device=device,
            dtype=dtype.value,
            timeout_s=timeout,
            seed=seed,
        )
        replay_trace(replayed, nproc, as_json=json_)
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
    from semmoe.runtime.serving.options import RunOptions

    options = RunOptions(
        checkpoint=checkpoint,
        plan=str(plan),
        prompts=texts,
        scheduler=scheduler,
        predict=predict or "context",
        backend=backend,
        dtype=dtype.value,
        device=device,
        max_new_tokens=max_new_tokens,
        batch_tokens=batch_tokens,
        output=str(output) if output else None,
        timeout_s=timeout,
        check=check,
    )
    result = run_ranks(options, nproc, kept)
    if result is None:
        return
    metrics = result.metrics
    if check:
        from semmoe.runtime.serving.run import check_result

        metrics = metrics | {"check": check_result(options, result, note, steps)}
    print_results(result.lines, metrics, output=output, as_json=json_)


def run_ranks(options: "RunOptions", nproc: int | None, kept: Callable[[], str]) -> "RunResult | None":
    """Start the ranks here, or be one of torchrun's: the result where rank 0's is, None elsewhere.

    `kept`: what a failure adds to its line.
    """
    from semmoe.profiles.capture.requests import read_all
    from semmoe.runtime.ranks.launch import as_rank, launch, under_torchrun
    from semmoe.solvers.plan import Plan

    if under_torchrun():
        from semmoe.runtime.serving.run import prepare, run_rank

        def read(num_ranks: int) -> "list[RankTask]":
            plan = Plan.load(options.plan)
            return prepare(options, plan, read_all(options.prompts, tell=note), num_ranks, note)

        return as_rank(lambda: run_rank(options, note, steps, read=read), kept)
    # Before PyTorch is imported: a plan or prompts that are not there are told at once.
    plan = Plan.load(options.plan)
    requests = read_all(options.prompts, tell=note)
    from semmoe.runtime.ranks.group import check_group
    from semmoe.runtime.serving.run import prepare, run_rank

    ranks = plan.topology.num_ranks
    check_group(options.device, options.backend, ranks)
    tasks = prepare(options, plan, requests, nproc or ranks, note)
    try:
        return launch(run_rank, (options, note, steps), ranks, tasks=tasks)
    except InputError as error:
        raise InputError(f"{error}{kept()}") from None


def check_output(output: Path) -> None:
    """Raise InputError where completions could not be written: told before weights are read."""
    taken = output if output.is_dir() else partial_path(output)
    if taken.is_dir():
        raise InputError(f"cannot write {taken}: it is a directory")
    if not os.access(output.parent, os.W_OK | os.X_OK):
        why = "cannot be written to" if output.parent.is_dir() else "does not exist"
        raise InputError(f"cannot write {output}: the directory {output.parent} {why}")


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
