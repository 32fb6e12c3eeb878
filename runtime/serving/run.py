"""One run of a placed model: prompts in, completions and metrics out. What each rank does, and what
rank 0 does besides.

Rank 0 reads the prompts, assigns them and writes results (runtime/serving/results.py).

Shape letters: B requests, R ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

from semmoe.profiles.capture.loading import DTYPES, ModelSource, find_model, load_tokenizer, refusals
from semmoe.profiles.capture.requests import RequestSource, TextRequest, encode_requests, read_all
from semmoe.profiles.errors import InputError
from semmoe.runtime.ranks.failures import naming
from semmoe.runtime.ranks.group import open_group, share, together
from semmoe.runtime.ranks.progress import Show, shown_nowhere
from semmoe.runtime.reshard.ranks import SHARED
from semmoe.runtime.serving.engine import Completion, Limits, PhaseTimes, Prompt, serve
from semmoe.runtime.serving.metrics import rate, traffic_metrics
from semmoe.runtime.serving.results import ResultKeeper
from semmoe.runtime.serving.schedulers import assign
from semmoe.runtime.serving.tensor_parallel import install_tensor_parallel
from semmoe.runtime.serving.token_homes import find_schedule, make_homes
from semmoe.runtime.transformers.ep import Counters
from semmoe.runtime.transformers.placed_model import PlacedModel, load_placed
from semmoe.runtime.transformers.rank_weights import find_placed
from semmoe.solvers.place.replicas import serving_LRE
from semmoe.solvers.plan import Plan


@dataclass(frozen=True)
class RunOptions:
    """What the user asked for."""

    checkpoint: str
    plan: str
    prompts: RequestSource
    scheduler: str
    predict: str
    backend: str
    dtype: str
    device: str
    max_new_tokens: int
    batch_tokens: int
    output: str | None
    timeout_s: float


@dataclass(frozen=True, eq=False)
class RunResult:
    """Of rank 0: completions in input order as output lines, metrics, and the prompts they
    answer."""

    lines: list[dict[str, Any]]
    metrics: dict[str, Any]
    prompts: list[Prompt]
    stop_ids: frozenset[int]


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


class Assigned(NamedTuple):
    """The prompts and the rank that serves each, int64 [B]."""

    prompts: list[Prompt]
    rank_of_B: np.ndarray


def assign_prompts(options: RunOptions, plan: Plan, requests: list[TextRequest]) -> Assigned:
    """Encode and assign the requests. Raises InputError where they, the model and the plan do
    not fit each other."""
    prompts = encode_prompts(options, requests)
    ids = [prompt.token_ids for prompt in prompts]
    if options.scheduler == "tp":  # every rank serves every request; refuse before ranks start
        find_schedule(options.predict, plan)
        return Assigned(prompts, np.zeros(len(prompts), np.int64))
    return Assigned(prompts, assign(options.scheduler, ids, plan, max_new_tokens=options.max_new_tokens))


def encode_prompts(options: RunOptions, requests: list[TextRequest]) -> list[Prompt]:
    """The requests as token ids. Raises InputError where one is empty or too long for the model."""
    source, _ = find_source(options.checkpoint)
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


def load_plan(options: RunOptions, num_ranks: int | None) -> Plan:
    """The plan; raises InputError where it is for another number of ranks."""
    plan = Plan.load(options.plan)
    if num_ranks is not None and num_ranks != plan.topology.num_ranks:
        raise InputError(f"{num_ranks} ranks run, the plan {options.plan} is for {plan.topology.num_ranks}")
    if options.dtype not in DTYPES:
        raise InputError(f"--dtype {options.dtype}: expected one of {', '.join(DTYPES)}")
    return plan


def prepare(options: RunOptions, num_ranks: int, tell: Callable[[str], None]) -> Assigned:
    """All that can be refused before weights are read, and the prompts. Raises InputError."""
    plan = load_plan(options, num_ranks)
    find_placed(find_source(options.checkpoint)[1], plan)
    return assign_prompts(options, plan, read_all(options.prompts, tell=tell))


def stop_token_ids(source: ModelSource) -> frozenset[int]:
    """Ids that end a generation, from generation_config.json or config.json. Raises InputError
    where that cannot be read."""
    ids = source.config.get_text_config().eos_token_id
    if (source.folder / "generation_config.json").is_file():
        with refusals(f"{source.name} has a generation_config.json that cannot be read"):
            ids = GenerationConfig.from_pretrained(source.folder).eos_token_id
    return frozenset([ids] if isinstance(ids, int) else ids or [])


def run_rank(
    options: RunOptions, assigned: Assigned | None, tell: Callable[[str], None], show: Show = shown_nowhere
) -> RunResult | None:
    """Run this process's rank; the result on rank 0, None elsewhere. `assigned` None: rank 0 reads
    the prompts.

    `show("...")` gives a function that rank 0 calls with how many of how many requests are
    finished.
    """
    transformers_logging.disable_progress_bar()  # one bar per rank would be noise, and one table of what a checkpoint lacks
    transformers_logging.set_verbosity_error()
    with open_group(backend=options.backend, device=options.device, timeout_s=options.timeout_s) as group:
        if assigned is None:
            assigned = share(lambda: prepare(options, group.size, tell), group)
        plan = load_plan(options, group.size)
        source, folder = find_source(options.checkpoint)
        placed_checkpoint = find_placed(folder, plan)
        prompts, rank_of_B = assigned
        serving = serving_LRE(placed_checkpoint.placement.hosts_LER, plan.load_LE, plan.topology)
        placed, stop_ids = together(
            lambda: (
                load_placed(source, placed_checkpoint, plan, serving, group, dtype=options.dtype),
                stop_token_ids(source),
            ),
            group,
        )
        shuffled, mine = None, [prompt for prompt, rank in zip(prompts, rank_of_B, strict=True) if rank == group.rank]
        if options.scheduler == "tp":
            relabelled = placed_checkpoint.layout == "permuted"
            homes = make_homes(options.predict, plan, relabelled=relabelled, device=group.device, group=group)
            shuffled, mine = install_tensor_parallel(placed, homes, plan.model.model_layers, source.name), prompts
            placed.state.counters = Counters.zeros(plan.placement.num_layers, group.size)
        limits = Limits(options.max_new_tokens, options.batch_tokens, stop_ids)
        keeper = ResultKeeper(options.output, load_tokenizer(source) if group.rank == 0 else None)
        with torch.inference_mode(), (show if group.rank == 0 else shown_nowhere)("requests") as progress:

            def deliver(completions: list[Completion]) -> None:
                keeper.add(completions)
                progress(keeper.finished, len(prompts))

            times = serve(placed, mine, limits, deliver=deliver, shuffled=shuffled)
        metrics = collect_metrics(options, plan, placed, times, len(prompts))
        if metrics is None:
            return None
        return RunResult(keeper.finish(), metrics, prompts, limits.stop_ids)


def collect_metrics(
    options: RunOptions, plan: Plan, placed: PlacedModel, times: PhaseTimes, num_requests: int
) -> dict[str, Any] | None:
    """The metrics of all ranks, on rank 0."""
    group, state = placed.group, placed.state
    mine = (state.counters, times, state.stopwatch.seconds())
    gathered: list[Any] | None = [None] * group.size if group.rank == 0 else None
    with naming(group.rank, "the collection of metrics"):
        dist.gather_object(mine, gathered, dst=0, group=group.handle)
    if gathered is None:
        return None
    seconds = {phase: max(t.seconds[phase] for _, t, _ in gathered) for phase in times.seconds}
    tokens = {phase: sum(t.tokens[phase] for _, t, _ in gathered) for phase in times.tokens}
    return {
        "scheduler": options.scheduler,
        "ranks": group.size,
        "requests": num_requests,
        "prefill_tokens_per_s": rate(tokens["prefill"], seconds["prefill"]),
        "decode_tokens_per_s": rate(tokens["decode"], seconds["decode"]),
        **traffic_metrics([counters for counters, _, _ in gathered], plan.model.model_layers),
        "time": {phase: float(np.mean([clock[phase] for _, _, clock in gathered])) for phase in gathered[0][2]},
        "device": str(group.device),
        "backend": group.backend,
    }
