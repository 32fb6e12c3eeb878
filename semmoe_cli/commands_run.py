"""`semmoe run`: a placed model on many ranks, or a recorded routing replayed on them."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from profiles.errors import InputError
from semmoe_cli.commands_trace import Dtype
from semmoe_cli.options import Json
from semmoe_cli.report import note, print_facts, print_json

if TYPE_CHECKING:
    from runtime.run import RunOptions, RunResult


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
            metavar="FILE", help="Prompts: a .jsonl, .json, .parquet, .txt or .csv file, a directory, - or demo."
        ),
    ] = None,
    nproc: Annotated[
        int | None, typer.Option(metavar="R", help="Ranks to start here; the plan's number by default.", min=1)
    ] = None,
    scheduler: Annotated[
        str,
        typer.Option(
            help="Which rank serves a request: none (in turn), or dp (by the plan's scorer, balanced in tokens)."
        ),
    ] = "dp",
    backend: Annotated[str, typer.Option(help="auto, nccl or gloo.")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="Number type of the weights; auto: as stored.")] = Dtype.auto,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Most tokens to generate per request.", min=1)] = 32,
    batch_tokens: Annotated[
        int, typer.Option(metavar="N", help="Prompt tokens of one forward pass of a rank, padding counted.", min=1)
    ] = 4096,
    timeout: Annotated[
        float, typer.Option(metavar="S", help="Seconds that a rank waits for the others before the run fails.", min=1)
    ] = 300.0,
    check: Annotated[
        bool, typer.Option("--check", help="Run the same prompts through plain Transformers too: tokens must be equal.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="OUT.jsonl", help="Completions, one JSON line per request.")
    ] = None,
    json_: Json = False,
) -> None:
    """Run a placed model: every rank holds its experts and serves its own requests.

    Example: semmoe run demo --plan p --prompts demo -o out.jsonl
    """
    from runtime.launch import launch, under_torchrun
    from runtime.run import RunOptions, load_plan, read_prompts, run_rank

    if checkpoint is None or prompts is None:
        raise typer.BadParameter("CHECKPOINT and --prompts are needed")
    options = RunOptions(
        checkpoint,
        str(plan),
        prompts,
        scheduler,
        backend,
        dtype.value,
        device,
        max_new_tokens,
        batch_tokens,
        str(output) if output else None,
        timeout,
    )
    if under_torchrun():
        result = run_rank_or_refuse(options)
        if result is None:
            return
    else:
        ranks = load_plan(options, nproc).topology.num_ranks
        check_start(options, ranks, check=check)
        try:
            result = launch(run_rank, (options, read_prompts(options, note), note), ranks)
        except InputError as error:
            raise InputError(f"{error}{kept_results(output)}") from None
    metrics = result.metrics
    if check:
        metrics = metrics | {"check": run_check(options, result)}
    print_results(result.lines, metrics, output=output, as_json=json_)


def run_rank_or_refuse(options: "RunOptions") -> "RunResult | None":
    """This rank under torchrun, with a failed exchange as one line."""
    from runtime.failures import ExchangeError
    from runtime.run import run_rank

    try:
        return run_rank(options, None, note)
    except ExchangeError as error:
        raise InputError(str(error)) from None


def check_start(options: "RunOptions", ranks: int, *, check: bool) -> None:
    """Raise InputError for what can be seen before any rank starts."""
    from runtime.check import require_checkable
    from runtime.group import choose_backend, choose_device
    from runtime.rank_weights import find_placed
    from runtime.run import find_source
    from solvers.plan import Plan

    device = choose_device(options.device, 0)
    choose_backend(options.backend, device, ranks)
    _, folder = find_source(options.checkpoint)
    placed = find_placed(folder, Plan.load(options.plan))
    if check:
        require_checkable(placed.layout == "ranks", options.checkpoint)


def kept_results(output: Path | None) -> str:
    """Where the finished requests of a failed run are, for its message."""
    from runtime.run import partial_path

    if output is None or not partial_path(output).exists():
        return ""
    with partial_path(output).open(encoding="utf-8") as file:
        return f"; {sum(1 for _ in file)} finished requests are in {partial_path(output)}"


def run_check(options: "RunOptions", result: "RunResult") -> dict[str, Any]:
    """The same prompts through plain Transformers in this process."""
    from runtime.check import check_completions
    from runtime.group import choose_device
    from runtime.run import find_source

    source, _ = find_source(options.checkpoint)
    return check_completions(
        source,
        result.prompts,
        result.lines,
        dtype=options.dtype,
        device=choose_device(options.device, 0),
        max_new_tokens=options.max_new_tokens,
        stop_ids=result.stop_ids,
        tell=note,
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
    print_facts(facts, as_json=False)
