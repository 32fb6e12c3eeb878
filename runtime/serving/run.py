"""One run of a placed model: prompts in, completions and metrics out.

What is read once for all ranks (`prepare`, in the process that starts them, or on rank 0 under
torchrun): plan, index, headers and prompts. Each rank then gets a RankTask, and `run_rank` reads
its tensors and serves.

Shape letters: B requests, R ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

from semmoe.profiles.capture.loading import DTYPES, ModelSource, find_model, load_model, load_tokenizer, refusals
from semmoe.profiles.capture.requests import TextRequest, encode_requests
from semmoe.profiles.checkpoint import compare_checkpoint
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
from semmoe.runtime.serving.results import ResultKeeper
from semmoe.runtime.serving.schedulers import assign
from semmoe.runtime.serving.tensor_parallel import ShuffledModel, install_tensor_parallel
from semmoe.runtime.serving.token_homes import find_schedule, make_homes
from semmoe.runtime.serving.verify import Entries, entries_to_verify, my_share, verifying
from semmoe.runtime.transformers.placed_model import PlacedModel, load_placed
from semmoe.runtime.transformers.rank_parts import RankCheckpoint, rank_checkpoints
from semmoe.solvers.plan import Plan


@dataclass(frozen=True, eq=False)
class RankTask:
    """What one rank is told of all that was read."""

    scheduler: str
    plan: Plan  # without what no rank needs
    checkpoint: RankCheckpoint
    prompts: list[Prompt]  # of all ranks
    rank_of_B: np.ndarray  # int64, the rank that serves each; with tp all do
    entries: Entries  # files that it may compare
    verified: bool | None  # whether they are all of the checkpoint
    same_checkpoint: bool | None  # as the plan was traced on; None where that is not known


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
    options: RunOptions, plan: Plan, requests: list[TextRequest], num_ranks: int, tell: Callable[[str], None]
) -> list[RankTask]:
    """All that can be refused before weights are read, and the task of each rank.

    Raises InputError where plan, ranks, checkpoint and requests do not fit each other.
    """
    check_ranks(options.plan, plan, num_ranks)
    if options.dtype not in DTYPES:
        raise InputError(f"--dtype {options.dtype}: expected one of {', '.join(DTYPES)}")
    scheduler = options.scheduler if options.scheduler is not None else default_scheduler(plan, options.plan, tell)
    source, folder = find_source(options.checkpoint)
    checkpoints = rank_checkpoints(folder, plan)
    if options.check and checkpoints[0].layout == "ranks":
        raise InputError(f"--check: {options.checkpoint} is a reshard for ranks, which plain Transformers cannot load")
    layout = checkpoints[0].layout
    entries, verified = entries_to_verify(folder, num_ranks, wanted=options.verify, tell=tell)
    same, line = None, ""
    if layout != "permuted":  # a relabelled router is another one; the plan's fingerprint ties it
        home = folder / SHARED if layout == "ranks" else folder
        same, line = compare_checkpoint(plan.model.checkpoint, home, options.checkpoint)
    if line:
        tell(line)
    prompts = encode_prompts(options, source, requests)
    if scheduler == "tp":  # every rank serves every request; refuse before ranks start
        find_schedule(options.predict, plan)
        rank_of_B = np.zeros(len(prompts), np.int64)
    else:
        ids = [prompt.token_ids for prompt in prompts]
        rank_of_B = assign(scheduler, ids, plan, max_new_tokens=options.max_new_tokens)
    tables = plan.tables if scheduler == "tp" else {}
    told = replace(plan, tables=tables, fitted_keys=plan.fitted_keys[:0], trace={}, split={}, scores=None, notes=[])
    return [
        RankTask(scheduler, told, checkpoint, prompts, rank_of_B, entries[rank], verified, same)
        for rank, checkpoint in enumerate(checkpoints)
    ]


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


def encode_prompts(options: RunOptions, source: ModelSource, requests: list[TextRequest]) -> list[Prompt]:
    """The requests as token ids. Raises InputError where one is empty or too long for the model."""
    encoded = encode_requests(requests, load_tokenizer(source), answer=True)
    longest = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    for request, ids in zip(requests, encoded, strict=True):
        if len(ids) == 0:
            raise InputError(f"request {request.request_id} of {options.prompts} is empty: leave it out")
        if longest and len(ids) + options.max_new_tokens > longest:
            raise InputError(
                f"request {request.request_id} has {len(ids)} tokens and may get {options.max_new_tokens} more, "
                f"the model reads at most {longest}: shorten it, or lower --max-new-tokens"
            )
    return [Prompt(i, r.request_id, ids) for i, (r, ids) in enumerate(zip(requests, encoded, strict=True))]


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
        source, folder = find_source(options.checkpoint)
        placed, stop_ids = together(lambda: load_verified(options, task, source, folder, group), group)
        check_exchange(placed, source.name)
        shuffled = share_out_heads(options, task, placed, source.name) if task.scheduler == "tp" else None
        # 2. Serve.
        limits = Limits(options.max_new_tokens, options.batch_tokens, stop_ids)
        keeper = ResultKeeper(options.output, load_tokenizer(source) if group.rank == 0 else None, tell)
        mine = [p for p, rank in zip(task.prompts, task.rank_of_B, strict=True) if shuffled or rank == group.rank]
        with torch.inference_mode(), (show if group.rank == 0 else shown_nowhere)("requests") as progress:

            def deliver(completions: list[Completion]) -> None:
                keeper.add(completions)
                progress(keeper.finished, len(task.prompts))

            times = serve(placed, mine, limits, deliver=deliver, shuffled=shuffled)
        # 3. What all ranks did.
        metrics = collect_metrics(placed, times, task.plan.model.model_layers)
        if metrics is None:
            return None
        asked = {"scheduler": task.scheduler, "ranks": group.size, "requests": len(task.prompts)}
        asked |= {"verified": task.verified, "same_checkpoint": task.same_checkpoint}
        return RunResult(keeper.finish(), asked | metrics, task.prompts, limits)


def load_verified(
    options: RunOptions, task: RankTask, source: ModelSource, folder: Path, group: Group
) -> tuple[PlacedModel, frozenset[int]]:
    """The model of this rank and the ids that end a generation, with this rank's share of the
    files compared meanwhile."""
    rank, _, local_rank, local_size = read_environment()
    with verifying(folder, my_share(task.entries, rank, local_rank, local_size)):
        placed = load_placed(source, folder, task.checkpoint, task.plan, group, dtype=options.dtype)
        return placed, stop_token_ids(source)


def share_out_heads(options: RunOptions, task: RankTask, placed: PlacedModel, name: str) -> ShuffledModel:
    """Attention-TP around the placed model."""
    group, relabelled = placed.group, task.checkpoint.layout == "permuted"
    homes = make_homes(options.predict, task.plan, relabelled=relabelled, device=group.device, group=group)
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
    source, _ = find_source(options.checkpoint)
    with show("check") as progress:
        model = load_model(source, dtype=options.dtype, device=choose_device(options.device, 0))
        return check_completions(model, result.prompts, result.lines, result.limits, tell=tell, progress=progress)
