"""One run of a placed model: prompts in, completions and metrics out.

What is read once for all ranks (`prepare`, in the process that starts them, or on rank 0 under
torchrun): plan, index, headers and prompts. Each rank then gets a RankTask, and `run_rank` reads
its tensors and serves.

Shape letters: B requests, R ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

from semmoe.profiles.capture.loading import DTYPES, ModelSource, find_model, load_model, load_tokenizer, refusals
from semmoe.profiles.capture.requests import TextRequest, encode_requests, has_no_text
from semmoe.profiles.checkpoint import SIZES, checkpoint_identity, compare_checkpoint, same_routers
from semmoe.profiles.errors import InputError
from semmoe.runtime.ranks.failures import naming
from semmoe.runtime.ranks.group import Group, choose_device, hand_out, open_group, read_environment, together
from semmoe.runtime.ranks.progress import Show, shown_nowhere
from semmoe.runtime.reshard.ranks import SHARED
from semmoe.runtime.serving.batch import Completion, Limits, Prompt
from semmoe.runtime.serving.check import check_completions
from semmoe.runtime.serving.engine import PhaseTimes, serve
from semmoe.runtime.serving.metrics import rate, traffic_metrics
from semmoe.runtime.serving.options import RunOptions
from semmoe.runtime.serving.probe import check_exchange
from semmoe.runtime.serving.replan import Done, LiveReplan, ReplanTask, replan_metrics, replan_task
from semmoe.runtime.serving.results import ResultKeeper
from semmoe.runtime.serving.schedulers import assign
from semmoe.runtime.serving.tensor_parallel import ShuffledModel, install_tensor_parallel
from semmoe.runtime.serving.token_homes import find_schedule, make_homes
from semmoe.runtime.serving.verify import Entries, entries_to_verify, my_share, verifying
from semmoe.runtime.transformers.expert_moves import check_movable
from semmoe.runtime.transformers.placed_model import PlacedModel, load_placed
from semmoe.runtime.transformers.rank_parts import RankCheckpoint, rank_checkpoints
from semmoe.solvers.plan import Plan
from semmoe.solvers.replan.delta import Delta

MOST_TOLD = 10  # requests that cannot be served, a line each


@dataclass(frozen=True, eq=False)
class RankTask:
    """What one rank is told of all that was read."""

    scheduler: str
    plan: Plan  # without what no rank needs
    checkpoint: RankCheckpoint
    prompts: list[Prompt]  # of all ranks
    skipped: int  # requests that cannot be served
    rank_of_B: np.ndarray  # int64, the rank that serves each; with tp all do
    entries: Entries  # files that it may compare
    verified: bool | None  # whether they are all of the checkpoint
    same_checkpoint: bool | None  # as the plan was traced on; None where that is not known
    replan: ReplanTask | None = None


class LoadedRank(NamedTuple):
    """What a rank has read."""

    name: str  # of the model, for people
    placed: PlacedModel
    stop_ids: frozenset[int]
    tokenizer: Any  # on rank 0


@dataclass(frozen=True, eq=False)
class RunResult:
    """Of rank 0: completions in input order as output lines, metrics, and the prompts they
    answer."""

    lines: list[dict[str, Any]]
    metrics: dict[str, Any]
    prompts: list[Prompt]
    limits: Limits


def find_source(checkpoint: str) -> tuple[ModelSource, Path]:
    """The model to run and the directory of its checkpoint; a `ranks` reshard keeps its
    configuration in `shared`."""
    path = Path(checkpoint)
    if (path / SHARED / "config.json").is_file():
        return find_model(str(path / SHARED)), path
    source = find_model(checkpoint)
    if not Path(source.path).is_dir():  # a hub id: fetch the weights
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
        return source, Path(snapshot_download(source.path, revision=source.revision, allow_patterns=patterns))
    return source, source.folder


def prepare(
    options: RunOptions,
    plan: Plan,
    requests: list[TextRequest],
    num_ranks: int,
    tell: Callable[[str], None],
    *,
    replan: tuple[Plan, Delta] | None = None,
) -> list[RankTask]:
    """All that can be refused before weights are read, and the task of each rank. `replan`: the
    plan to go on with, and what leads there from `plan`.

    Raises InputError where plan, ranks, checkpoint and requests do not fit each other.
    """
    check_ranks(options.plan, plan, num_ranks)
    if options.dtype not in DTYPES:
        raise InputError(f"--dtype {options.dtype}: expected one of {', '.join(DTYPES)}")
    scheduler = options.scheduler if options.scheduler is not None else default_scheduler(plan, options.plan, tell)
    source, folder = find_source(options.checkpoint)
    checkpoints = rank_checkpoints(folder, plan)
    layout = checkpoints[0].layout
    home = folder / SHARED if layout == "ranks" else folder
    if options.check:
        check_reference(options, home, layout, tell)
    entries, verified = entries_to_verify(folder, num_ranks, wanted=options.verify, tell=tell)
    same, line = None, ""
    if layout != "permuted":  # a relabelled router is another one; the plan's fingerprint ties it
        same, line = compare_checkpoint(plan.model.checkpoint, home, options.checkpoint)
    if line:
        tell(line)
    prompts = encode_prompts(options, source, requests, tell)
    skipped = len(requests) - len(prompts)
    if scheduler == "tp":  # every rank serves every request; refuse before ranks start
        find_schedule(options.predict, plan)
        rank_of_B = np.zeros(len(prompts), np.int64)
    else:
        ids = [prompt.token_ids for prompt in prompts]
        rank_of_B = assign(scheduler, ids, plan, max_new_tokens=options.max_new_tokens)
    told, moving = for_ranks(plan, tables=scheduler == "tp"), None
    if replan is not None:
        moving = prepare_replan(options, plan, *replan, checkpoints[0], scheduler, tell)
    return [
        RankTask(scheduler, told, checkpoint, prompts, skipped, rank_of_B, entries[rank], verified, same, moving)
        for rank, checkpoint in enumerate(checkpoints)
    ]


def for_ranks(plan: Plan, *, tables: bool) -> Plan:
    """The plan without what no rank needs."""
    kept = plan.tables if tables else {}
    return replace(plan, tables=kept, fitted_keys=plan.fitted_keys[:0], trace={}, split={}, scores=None, notes=[])


def prepare_replan(
    options: RunOptions,
    old: Plan,
    new: Plan,
    delta: Delta,
    checkpoint: RankCheckpoint,
    scheduler: str,
    tell: Callable[[str], None],
) -> ReplanTask:
    """What ranks are told of the plan to go on with. Raises InputError where it lacks what the
    scheduler needs."""
    if scheduler == "tp":
        find_schedule(options.predict, new)
    elif scheduler == "dp" and new.request_scorer is None:
        tell(f"{options.replan} scores no requests: those that wait stay where they are")
    told = for_ranks(new, tables=scheduler != "none")
    return replan_task(old, told, delta, checkpoint, after=options.after, scheduler=scheduler)


def check_ranks(name: str, plan: Plan, num_ranks: int) -> None:
    """Raise InputError where the plan is for another number of ranks."""
    if num_ranks != plan.topology.num_ranks:
        raise InputError(f"{num_ranks} ranks run, the plan {name} is for {plan.topology.num_ranks}")


def default_scheduler(plan: Plan, name: str, tell: Callable[[str], None]) -> str:
    """dp where the plan scores requests; else none, and a note says so."""
    if plan.request_scorer is not None:
        return "dp"
    tell(f"{name} scores no requests: they go to the ranks in turn (--scheduler none)")
    return "none"


def check_reference(options: RunOptions, home: Path, layout: str, tell: Callable[[str], None]) -> None:
    """Raise InputError where plain Transformers have nothing to load that --check could compare
    with.

    `home`: where config.json and routers of the checkpoint lie. `tell` hears of a reference with
    other routers.
    """
    if options.reference is None:
        if layout == "ranks":
            raise InputError(
                f"--check: {options.checkpoint} is a reshard for ranks, which plain Transformers cannot load: "
                "name its original with --reference MODEL"
            )
        return
    named = f"--reference {options.reference}"
    if (Path(options.reference) / SHARED / "config.json").is_file():
        raise InputError(f"{named} is a reshard for ranks, which plain Transformers cannot load: name the original")
    own, other = checkpoint_identity(home), checkpoint_identity(find_source(options.reference)[1])
    if own is None or other is None:
        return
    for key in SIZES:
        mine, theirs = own["config"].get(key), other["config"].get(key)
        if mine is not None and theirs is not None and mine != theirs:
            raise InputError(f"{named} has {key} {theirs}, {options.checkpoint} has {key} {mine}: it is another model")
    if layout != "permuted" and same_routers(own, other) is False:
        tell(f"{named} has other router weights than {options.checkpoint}: it is another model, or a fine-tune of it")


def encode_prompts(
    options: RunOptions, source: ModelSource, requests: list[TextRequest], tell: Callable[[str], None]
) -> list[Prompt]:
    """The requests as token ids, without those that are empty or too long for the model, which
    `tell` hears of. Raises InputError where none is left."""
    encoded = encode_requests(requests, load_tokenizer(source), answer=True)
    longest = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    prompts, wrong = [], []
    for number, (request, ids) in enumerate(zip(requests, encoded, strict=True)):
        if has_no_text(request, ids):
            wrong.append(f"request {request.request_id} of {options.prompts} is empty")
        elif longest and len(ids) + options.max_new_tokens > longest:
            wrong.append(
                f"request {request.request_id} has {len(ids)} tokens and may get {options.max_new_tokens} more, "
                f"the model reads at most {longest}: shorten it, or lower --max-new-tokens"
            )
        else:
            prompts.append(Prompt(number, request.request_id, ids))
    if not prompts:
        raise InputError(f"no request can be served: {wrong[0]}")
    if wrong:
        for line in wrong[:MOST_TOLD]:
            tell(f"skipped: {line}")
        tell(f"{len(wrong)} of {len(requests)} requests are skipped")
    return prompts


def stop_token_ids(source: ModelSource) -> frozenset[int]:
    """Ids that end a generation, from generation_config.json or config.json. Raises InputError
    where that cannot be read."""
    ids = source.config.get_text_config().eos_token_id
    if (source.folder / "generation_config.json").is_file():
        with refusals(f"{source.name} has a generation_config.json that cannot be read"):
            ids = GenerationConfig.from_pretrained(source.folder).eos_token_id
    return frozenset([ids] if isinstance(ids, int) else ids or [])


def run_rank(
    options: RunOptions,
    tell: Callable[[str], None],
    show: Show = shown_nowhere,
    task: RankTask | None = None,
    *,
    read: Callable[[int], list[RankTask]] | None = None,
) -> RunResult | None:
    """Run this process's rank; all ranks call it.

    Parameters:
        show: `show("...")` gives a function that rank 0 calls with how many of how many requests
            are finished.
        task: what this rank is told; None: rank 0 reads it for all, by `read(number of ranks)`.

    Returns:
        The result on rank 0, None elsewhere.
    """
    transformers_logging.disable_progress_bar()  # one bar per rank would be noise, and one table of what a checkpoint lacks
    transformers_logging.set_verbosity_error()
    with open_group(backend=options.backend, device=options.device, timeout_s=options.timeout_s) as group:
        if task is None:
            assert read is not None, "somebody reads"
            task = hand_out(lambda: read(group.size), group)
        # 1. The model of this rank, and whether it says what its experts say.
        loaded = together(lambda: load_rank(options, task, group), group)
        placed, name = loaded.placed, loaded.name
        check_exchange(placed, name)
        shuffled = share_out_heads(options, task, placed, name) if task.scheduler == "tp" else None
        # 2. Serve.
        limits = Limits(options.max_new_tokens, options.batch_tokens, loaded.stop_ids)
        keeper = ResultKeeper(options.output, loaded.tokenizer, tell)
        mine = [p for p, rank in zip(task.prompts, task.rank_of_B, strict=True) if shuffled or rank == group.rank]
        with torch.inference_mode(), (show if group.rank == 0 else shown_nowhere)("requests") as progress:

            def deliver(completions: list[Completion]) -> None:
                keeper.add(completions)
                progress(keeper.finished, len(task.prompts))

            live = live_replan(options, task, placed, shuffled, tell)
            times = serve(placed, mine, limits, deliver=deliver, shuffled=shuffled, live=live)
        # 3. What all ranks did.
        metrics = collect_metrics(placed, times, task.plan.model.model_layers)
        moved = None if live is None else gather_to_first(live.done(), group)
        if metrics is None:
            return None
        asked: dict[str, Any] = {"scheduler": task.scheduler, "replica_choice": task.plan.replica_choice}
        asked |= {"ranks": group.size, "requests": len(task.prompts)}
        asked |= {"skipped": task.skipped, "verified": task.verified, "same_checkpoint": task.same_checkpoint}
        if moved is not None and task.replan is not None:
            asked["replan"] = told_of_replan(task, moved, metrics, tell)
        return RunResult(keeper.finish(), asked | metrics, task.prompts, limits)


def load_rank(options: RunOptions, task: RankTask, group: Group) -> LoadedRank:
    """What this rank reads of the checkpoint, with its share of the files compared meanwhile."""
    rank, _, local_rank, local_size = read_environment()
    source, folder = find_source(options.checkpoint)
    with verifying(folder, my_share(task.entries, rank, local_rank, local_size)):
        placed = load_placed(source, folder, task.checkpoint, task.plan, group, dtype=options.dtype)
        tokenizer = load_tokenizer(source) if group.rank == 0 else None
        return LoadedRank(source.name, placed, stop_token_ids(source), tokenizer)


def live_replan(
    options: RunOptions,
    task: RankTask,
    placed: PlacedModel,
    shuffled: ShuffledModel | None,
    tell: Callable[[str], None],
) -> LiveReplan | None:
    """The re-placement that was asked for, before the first step. Raises InputError, alike on all
    ranks, for a model whose experts cannot move."""
    if task.replan is None:
        return None
    together(lambda: check_movable(placed, options.checkpoint), placed.group)
    homes = None if shuffled is None else shuffled.homes
    return LiveReplan(task.replan, placed, task.prompts, options.max_new_tokens, homes, tell)


def told_of_replan(
    task: RankTask, done_R: list[Done], metrics: dict[str, Any], tell: Callable[[str], None]
) -> dict[str, Any]:
    """The metrics of a re-placement; `tell` hears of one that the run was too short for."""
    assert task.replan is not None
    if done_R[0].moved_after is None:
        tell(f"the run ended after {len(done_R[0].steps)} steps: no expert moved (--after {task.replan.after})")
    row_bytes = metrics["bytes_sent"] // max(metrics["rows_sent"], 1)
    return replan_metrics(task.replan, done_R, row_bytes, task.plan.model.model_layers)


def share_out_heads(options: RunOptions, task: RankTask, placed: PlacedModel, name: str) -> ShuffledModel:
    """Attention-TP around the placed model."""
    group, relabelled = placed.group, task.checkpoint.layout == "permuted"
    homes = together(
        lambda: make_homes(options.predict, task.plan, relabelled=relabelled, device=group.device, group=group), group
    )
    return install_tensor_parallel(placed, homes, task.plan.model.model_layers, name)


def collect_metrics(placed: PlacedModel, times: PhaseTimes, model_layers: tuple[int, ...]) -> dict[str, Any] | None:
    """The metrics of all ranks, on rank 0."""
    group, state = placed.group, placed.state
    gathered = gather_to_first((state.counters, times, state.stopwatch.seconds()), group)
    if gathered is None:
        return None
    seconds = {phase: max(t.seconds[phase] for _, t, _ in gathered) for phase in times.seconds}
    tokens = {phase: sum(t.tokens[phase] for _, t, _ in gathered) for phase in times.tokens}
    return {
        "prefill_tokens_per_s": rate(tokens["prefill"], seconds["prefill"]),
        "decode_tokens_per_s": rate(tokens["decode"], seconds["decode"]),
        **traffic_metrics([counters for counters, _, _ in gathered], model_layers),
        "time": {phase: float(np.mean([clock[phase] for _, _, clock in gathered])) for phase in gathered[0][2]},
        "device": str(group.device),
        "backend": group.backend,
    }


def gather_to_first(mine: Any, group: Group) -> list[Any] | None:
    """What every rank has, on rank 0; None elsewhere."""
    gathered: list[Any] | None = [None] * group.size if group.rank == 0 else None
    with naming(group.rank, "the collection of metrics"):
        dist.gather_object(mine, gathered, dst=0, group=group.handle)
    return gathered


def check_result(options: RunOptions, result: RunResult, tell: Callable[[str], None], show: Show) -> dict[str, Any]:
    """The same prompts through plain Transformers in this process (runtime/serving/check.py)."""
    transformers_logging.disable_progress_bar()
    source, _ = find_source(options.reference or options.checkpoint)
    with show("check") as progress:
        model = load_model(source, dtype=options.dtype, device=choose_device(options.device, 0))
        return check_completions(model, result.prompts, result.lines, result.limits, tell=tell, progress=progress)
