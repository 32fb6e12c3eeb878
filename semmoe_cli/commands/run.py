"""`semmoe run`: a placed model on many ranks. With --replay see replay.py."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from semmoe.commands.replay import replay as replay_trace
from semmoe.options import (
    EngineOption,
    Force,
    Json,
    Loading,
    ReplicaChoiceOption,
    Seed,
    Texts,
    given,
    grouped,
    refuse_mixed,
    refuse_to_replace,
    replica_rule,
)
from semmoe.profiles.errors import InputError, require_extra
from semmoe.profiles.files import Lock, check_file_target, lock_beside
from semmoe.runtime.serving.results import kept_results, partial_path, partial_state
from semmoe.terminal.decision import next_step
from semmoe.terminal.progress import steps
from semmoe.terminal.tables import note, print_facts, print_json
from semmoe.terminal.text import quoted

if TYPE_CHECKING:
    from semmoe.profiles.capture.requests import RequestSource
    from semmoe.runtime.serving.options import RunOptions
    from semmoe.runtime.serving.run import RankTask, RunResult
    from semmoe.solvers.plan import Plan
    from semmoe.solvers.replan.delta import Delta


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What is served."""

    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Prompts: a .jsonl, .json, .parquet, .txt or .csv file (.gz may follow), a directory of them, - for stdin, or demo.",
        ),
    ] = None
    fields: Texts
    max_requests: Annotated[int | None, typer.Option(metavar="N", help="Run the first N prompts.", min=1)] = None

    def source(self) -> "RequestSource":
        """The same as profiles read it."""
        from semmoe.profiles.capture.requests import RequestSource

        return RequestSource(self.prompts, **asdict(self.fields), max_requests=self.max_requests)


@dataclass(frozen=True, kw_only=True)
class Replaying:
    """What is replayed in place of a model."""

    replay: Annotated[
        str | None,
        typer.Option(
            metavar="TRACE", help="Replay this trace's routing with random values instead of running a model."
        ),
    ] = None
    hidden_size: Annotated[
        int | None, typer.Option(metavar="D", help="With --replay: values of a token's row.", min=1)
    ] = None
    expert_size: Annotated[
        int, typer.Option(metavar="I", help="With --replay: width of the random experts; 0 for none.", min=0)
    ] = 0
    max_tokens: Annotated[
        int, typer.Option(metavar="N", help="With --replay: most rows to replay, a random choice of requests.", min=1)
    ] = 65536
    write_hardware: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="With --replay: also write the measured exchanges and experts, for --hardware FILE."
        ),
    ] = None
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class Running:
    """How the ranks work."""

    nproc: Annotated[
        int | None, typer.Option(metavar="R", help="Ranks to start here; the plan's number by default.", min=1)
    ] = None
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="none|dp|tp",
            help="Where work goes. none: requests in turn. dp: requests by the plan's scorer, balanced in tokens (the default where "
            "the plan has one). tp: heads shared over ranks, tokens by --predict. With --replay, all that the plan allows by default.",
        ),
    ] = None
    predict: Annotated[
        str | None,
        typer.Option(
            metavar="context|learning|table|paper|none",
            help="With --scheduler tp: what predicts a token's rank; context by default. learning: the context predictor, whose weights "
            "go on learning from what runs, for traffic that the plan's trace did not hold; none gives equal consecutive slices.",
        ),
    ] = None
    backend: Annotated[str, typer.Option(help="auto, nccl or gloo.")] = "auto"
    loading: Loading
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Most tokens to generate per request.", min=1)] = 32
    batch_tokens: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Prompt tokens of one forward pass of a rank, padding counted; with --replay, rows of a batch on all ranks together.",
            min=1,
        ),
    ] = 4096
    replica_choice: ReplicaChoiceOption = None
    engine: EngineOption = None
    replaying: Replaying
    timeout: Annotated[
        float,
        typer.Option(
            metavar="S", help="Seconds that a rank waits for the others before the run fails.", min=1, max=1e9
        ),
    ] = 300.0
    replan: Annotated[
        str | None,
        typer.Option(
            metavar="NEW",
            help="With --after: go on with this plan of `semmoe place --from-plan PLAN`; ranks exchange the experts that move, "
            "between two steps.",
        ),
    ] = None
    after: Annotated[int | None, typer.Option(metavar="N", help="With --replan: steps before it.", min=0)] = None
    check: Annotated[
        bool, typer.Option("--check", help="Run the same prompts through plain Transformers too: tokens must be equal.")
    ] = False
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="With --check: hub id or directory of the model to compare with, in place of CHECKPOINT; a reshard for ranks needs it.",
        ),
    ] = None
    verify: Annotated[
        bool,
        typer.Option(
            help="Compare a reshard with the checksums in its semmoe.json while it is read, on every machine."
        ),
    ] = True

    def everywhere(self, plan: Path) -> dict[str, Any]:
        """What RunOptions and ReplayOptions have in common."""
        options = {"plan": str(plan), "scheduler": self.scheduler, "backend": self.backend, "timeout_s": self.timeout}
        options |= {"replica_choice": replica_rule(self.replica_choice, self.engine)}
        loading = {"dtype": self.loading.dtype.value, "device": self.loading.device}
        return options | loading | {"batch_tokens": self.batch_tokens}


@grouped()
def run(
    plan: Annotated[Path, typer.Option("--plan", metavar="PLAN", help="Plan directory.")],
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            metavar="CHECKPOINT", help="Hub id or directory of the model, a reshard of it (permuted or ranks), or demo."
        ),
    ] = None,
    *,
    prompts: Prompts,
    running: Running,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="OUT.jsonl", help="Completions, one JSON line per request.")
    ] = None,
    force: Force = False,
    json_: Json = False,
) -> None:
    """Run a placed model: every rank holds its experts and serves its own requests. Or replay a
    trace on your own network.

    Examples: semmoe run demo --plan p --prompts demo -o out.jsonl; semmoe run --replay t --plan p
    --hidden-size 2880
    """
    from semmoe.profiles.capture.requests import RequestSource

    texts, everywhere, replaying = prompts.source(), running.everywhere(plan), running.replaying
    for written in filter(None, (output, replaying.write_hardware)):
        if os.environ.get("RANK", "0") == "0":
            refuse_to_replace(written, force=force)
    if replaying.replay is not None:
        if replaying.hidden_size is None or checkpoint is not None or texts != RequestSource():
            raise typer.BadParameter("--replay needs --hidden-size, and takes neither CHECKPOINT nor prompts")
        refused = given(output=output, check=running.check, reference=running.reference, predict=running.predict)
        refused += given(replan=running.replan) + ([] if running.after is None else ["--after"])
        refuse_mixed("--replay", refused)
        from semmoe.runtime.replay.cases import ReplayOptions

        if replaying.write_hardware is not None:
            check_file_target(replaying.write_hardware)
        sizes = asdict(replaying)
        options = ReplayOptions(trace=sizes.pop("replay"), **sizes, **everywhere)
        replay_trace(options, running.nproc, as_json=json_)
        return
    if checkpoint is None or (texts.data is None) == (texts.dataset is None):
        raise typer.BadParameter("CHECKPOINT and one of --prompts and --dataset are needed (or --replay TRACE)")
    if texts.data is not None and (texts.subset or texts.split):
        raise typer.BadParameter("--subset and --split go with --dataset")
    refuse_mixed("CHECKPOINT", given(replaying, but=("max_tokens", "seed")))
    if running.reference is not None and not running.check:
        raise typer.BadParameter("needs --check", param_hint="--reference")
    if running.scheduler != "tp":
        refuse_mixed("another scheduler than --scheduler tp", given(predict=running.predict))
    if (running.replan is None) != (running.after is None):
        lacks = ("--replan", "--after N") if running.after is None else ("--after", "--replan NEW")
        raise typer.BadParameter(f"needs {lacks[1]}", param_hint=lacks[0])
    require_extra("running a model", "torch", "transformers")
    from semmoe.runtime.serving.options import RunOptions

    options = RunOptions(
        checkpoint=checkpoint,
        prompts=texts,
        predict=running.predict or "context",
        max_new_tokens=running.max_new_tokens,
        output=str(output) if output else None,
        check=running.check,
        reference=running.reference,
        verify=running.verify,
        replan=running.replan,
        after=running.after or 0,
        **everywhere,
    )
    from semmoe.runtime.ranks.launch import as_rank, under_torchrun

    kept: Callable[[], str] = str if output is None else partial(kept_results, output, partial_state(output))
    work = partial(run_and_check, options, running.nproc, kept)
    result = as_rank(work, note, kept) if under_torchrun() else work()
    if result is not None:
        print_results(result.lines, result.metrics, output=output, as_json=json_)
        where = quoted(str(plan))
        next_step(f"semmoe export {where} --to sglang -o map.json", as_json=json_, aside=output is None)


def run_and_check(options: "RunOptions", nproc: int | None, kept: Callable[[], str]) -> "RunResult | None":
    """The result on rank 0, compared with plain Transformers where asked; None elsewhere."""
    held: AbstractContextManager[object] = nullcontext()
    if options.output is not None and os.environ.get("RANK", "0") == "0":
        output = Path(options.output)
        check_output(output)
        held = Lock(output, lock_beside(partial_path(output)))  # OUT's own lock is taken when it is written
    with held:
        result = run_ranks(options, nproc, kept)
    if result is None or not options.check:
        return result
    from semmoe.runtime.serving.run import check_result

    return replace(result, metrics=result.metrics | {"check": check_result(options, result, note, steps)})


def run_ranks(options: "RunOptions", nproc: int | None, kept: Callable[[], str]) -> "RunResult | None":
    """Start the ranks here, or be one of torchrun's: the result where rank 0's is, None elsewhere.

    `kept`: what the failure of ranks that were started here adds to its line.
    """
    from semmoe.profiles.capture.requests import read_all
    from semmoe.runtime.ranks.launch import launch, under_torchrun

    if under_torchrun():
        from semmoe.runtime.serving.run import prepare, run_rank

        def read(num_ranks: int) -> "list[RankTask]":
            plan, replan = read_plans(options)
            return prepare(options, plan, read_all(options.prompts, tell=note), num_ranks, note, replan=replan)

        return run_rank(options, note, steps, read=read)
    # Before PyTorch is imported: a plan or prompts that are not there are told at once.
    plan, replan = read_plans(options)
    requests = read_all(options.prompts, tell=note)
    from semmoe.runtime.ranks.group import check_group
    from semmoe.runtime.serving.run import prepare, run_rank

    ranks = plan.topology.num_ranks
    check_group(options.device, options.backend, ranks)
    tasks = prepare(options, plan, requests, nproc or ranks, note, replan=replan)
    try:
        return launch(run_rank, (options, note, steps), ranks, tasks=tasks)
    except InputError as error:
        raise InputError(f"{error}{kept()}") from None


def read_plans(options: "RunOptions") -> "tuple[Plan, tuple[Plan, Delta] | None]":
    """The plan, and the one to go on with beside what leads there."""
    from semmoe.solvers.plan import Plan
    from semmoe.solvers.replan.delta import read_step

    plan, rule = Plan.load(options.plan), options.replica_choice
    if options.replan is None:
        return plan.with_rule(rule), None
    new, delta = read_step(Path(options.replan), plan)
    return plan.with_rule(rule), (new.with_rule(rule), delta)


def check_output(output: Path) -> None:
    """Raise InputError where completions could not be written: told before weights are read."""
    check_file_target(output)
    check_file_target(partial_path(output))
    if partial_path(output).is_symlink():
        raise InputError(f"cannot write {partial_path(output)}: it is a link that semmoe did not leave there")
    for parent in {output.parent, Path(os.path.realpath(output)).parent}:
        if not os.access(parent, os.W_OK | os.X_OK):
            why = "cannot be written to" if parent.is_dir() else "does not exist"
            raise InputError(f"cannot write {output}: the directory {parent} {why}")


def print_results(lines: list[dict[str, Any]], metrics: dict[str, Any], *, output: Path | None, as_json: bool) -> None:
    """Completions on stdout unless they went to a file; metrics as one JSON object, or as facts."""
    if as_json:
        print_json(metrics)
        return
    if output is None:
        for line in lines:
            print_json(line)
    facts = {k: v for k, v in metrics.items() if k not in ("layers", "time", "check", "replan")}
    facts |= {f"time_{phase}": seconds for phase, seconds in metrics["time"].items()}
    if "replan" in metrics:
        moved = metrics["replan"]
        facts |= {f"replan_{name}": moved[name] for name in ("experts_moved", "seconds", "bytes", "bytes_saved")}
    if "check" in metrics:
        found = metrics["check"]
        facts["check"] = f"{'ok' if found['ok'] else 'MISMATCH'}, {found['compared']} compared"
        facts["check"] += f", {len(found['ties'])} ties" if found["ties"] else ""
    print_facts(facts, as_json=False)
