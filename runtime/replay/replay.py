"""Recorded routing through the real dispatch, experts and combine, on the user's own ranks and
network, without model weights.

Rows of a trace are cut into batches; at every layer each rank takes the rows that live on it under
a schedule, with random hidden values, and runs the same exchange as a model would
(runtime/transformers/ep.py). Rows and bytes come from its counters, milliseconds from the clock;
the prediction comes from the evaluator's LINK and load on the same rows, and a bandwidth and
latency measured just before.

Shape letters: T tokens, L MoE layers, K top-k, R ranks, E experts, S slots per rank, D hidden size.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from semmoe.profiles.trace import TraceBatch
from semmoe.runtime.layer.permute import row_sections
from semmoe.runtime.ranks.failures import naming
from semmoe.runtime.ranks.group import Group, open_group, share
from semmoe.runtime.ranks.progress import Show, shown_nowhere
from semmoe.runtime.ranks.stopwatch import Stopwatch
from semmoe.runtime.replay.cases import Case, Prepared, ReplayOptions, largest_share, prepare
from semmoe.runtime.serving.metrics import stacked
from semmoe.runtime.transformers.ep import Counters, ExpertLayer, RankState, RunExperts, dispatch_layer, layer_tables
from semmoe.solvers.evaluate.metrics import metrics_XL
from semmoe.solvers.evaluate.sums import traffic_sums
from semmoe.solvers.placement import Placement, Topology
from semmoe.solvers.time.layer_time import EXCHANGES, LayerWork, Network, fit_network, layer_seconds

DTYPES = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def replay_rank(
    options: ReplayOptions, prepared: Prepared | None, tell: Callable[[str], None], show: Show = shown_nowhere
) -> dict[str, Any] | None:
    """Replay on this process's rank: the result on rank 0, None elsewhere. `prepared` None: rank 0
    reads the trace.

    `show("...")` gives a function that rank 0 calls with how many of how many placements and
    schedules are measured.
    """
    with (
        open_group(backend=options.backend, device=options.device, timeout_s=options.timeout_s) as group,
        (show if group.rank == 0 else shown_nowhere)("replay") as progress,
    ):
        if prepared is None:
            prepared = share(lambda: prepare(options, group.size, tell), group)
        expert_ids_TLK, num_experts, cases = prepared
        dtype = DTYPES[options.dtype]
        network = measure_network(options, expert_ids_TLK.shape[2], group, dtype)
        rows = []
        for number, case in enumerate(cases):
            progress(number, len(cases))
            run_experts, seconds = random_experts(options, case.experts_LRS.shape[2], group, dtype)
            measured = replay_case(options, case, expert_ids_TLK, num_experts, run_experts, group, dtype)
            if group.rank == 0:
                predicted = predict(options, case, expert_ids_TLK, network, seconds, dtype)
                rows.append({"placement": case.placement, "schedule": case.schedule, **measured, **predicted})
        if group.rank:
            return None
        return {
            "ranks": group.size,
            "tokens": len(expert_ids_TLK),
            "batch_tokens": options.batch_tokens,
            "hidden_size": options.hidden_size,
            "expert_size": options.expert_size,
            "network": {"bytes_per_s": network.bytes_per_s, "latency_s": network.latency_s},
            "device": str(group.device),
            "backend": group.backend,
            "rows": rows,
        }


def measure_network(options: ReplayOptions, top_k: int, group: Group, dtype: torch.dtype) -> Network:
    """Bandwidth and latency of this network as the exchange sees it, equal on all ranks: packing
    and adding are in them.

    Every rank sends each of its rows to one other rank, in turn, in batches of some sizes; nothing
    is computed.
    """
    num_ranks, rank = group.size, group.rank
    names, state = ["the measurement of the network"], RankState(Stopwatch(group.device), Counters.zeros(1, num_ranks))
    one_each = Placement(np.arange(num_ranks, dtype=np.int32).reshape(1, num_ranks, 1), num_ranks)
    serving = np.tile(np.arange(num_ranks), (1, num_ranks, 1))
    table = layer_tables(one_each, serving, rank, names, group.device)[0]
    layer = ExpertLayer(table, rank, num_ranks, group.handle, state, options.hidden_size, dtype, top_k)
    share_of_batch = max(4, options.batch_tokens // num_ranks)
    sizes, seconds = [1, share_of_batch // 2, share_of_batch, 2 * share_of_batch], []
    with torch.inference_mode():
        for size in sizes:
            others = (rank + 1 + np.arange(size) % max(num_ranks - 1, 1)) % num_ranks
            # One choice per row, the rest empty slots: every expert more that a row meets costs its
            # rank another row of arithmetic.
            ids_TK = np.full((size, top_k), num_ranks)
            ids_TK[:, 0] = others
            ids_TK = torch.from_numpy(ids_TK).to(group.device)
            hidden_TD = torch.zeros(size, options.hidden_size, dtype=dtype, device=group.device)
            weight_TK = torch.ones(ids_TK.shape, device=group.device)
            best = float("inf")
            for _ in range(3):
                barrier(group)
                begun = time.perf_counter()
                dispatch_layer(layer, run_nothing, hidden_TD, ids_TK, weight_TK)
                best = min(best, seconds_of_slowest(time.perf_counter() - begun, group))
            seconds.append(best)
    _, _, row_bytes = row_sections(options.hidden_size, top_k, dtype, torch.float32)
    both_ways = row_bytes + options.hidden_size * dtype.itemsize
    whole = fit_network(np.array(sizes, np.float64) * both_ways, np.array(seconds))
    return Network(whole.bytes_per_s, whole.latency_s / EXCHANGES)


def run_nothing(rows_PD: torch.Tensor, slot_P1: torch.Tensor, weight_P1: torch.Tensor) -> torch.Tensor:
    """An expert that costs nothing."""
    return rows_PD * weight_P1.to(rows_PD.dtype)


def barrier(group: Group) -> None:
    with naming(group.rank, "a barrier"):
        seconds_of_slowest(0.0, group)
    if group.device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of_slowest(seconds: float, group: Group) -> float:
    """The largest value of all ranks."""
    if group.device.type == "cuda":
        torch.cuda.synchronize()
    worst = torch.tensor(seconds, dtype=torch.float64, device=group.device if group.backend == "nccl" else "cpu")
    dist.all_reduce(worst, dist.ReduceOp.MAX, group=group.handle)
    return float(worst)


def random_experts(options: ReplayOptions, slots: int, group: Group, dtype: torch.dtype) -> tuple[RunExperts, float]:
    """A gated expert layer with random weights (nothing for size 0), and its seconds per
    activation on this machine, all ranks at work."""
    if options.expert_size == 0:
        return run_nothing, 0.0
    config = Qwen3MoeConfig(
        hidden_size=options.hidden_size, moe_intermediate_size=options.expert_size, num_experts=slots
    )
    config._experts_implementation = "grouped_mm"
    experts = Qwen3MoeExperts(config).to(device=group.device, dtype=dtype)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.02)
    pairs = max(slots, options.batch_tokens // group.size)
    rows_PD = torch.randn(pairs, options.hidden_size, device=group.device).to(dtype)
    slot_P1 = (torch.arange(pairs, device=group.device) % slots)[:, None]
    best = float("inf")
    with torch.inference_mode():
        for _ in range(3):
            barrier(group)
            begun = time.perf_counter()
            experts(rows_PD, slot_P1, torch.ones(pairs, 1, device=group.device))
            best = min(best, seconds_of_slowest(time.perf_counter() - begun, group))
    return experts.forward, best / pairs


def replay_case(
    options: ReplayOptions,
    case: Case,
    expert_ids_TLK: np.ndarray,
    num_experts: int,
    run_experts: RunExperts,
    group: Group,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Measured milliseconds per layer and batch, rows and bytes per token and layer, and the
    load of the ranks."""
    num_tokens, num_layers, top_k = expert_ids_TLK.shape
    layers = replay_layers(options, case, num_experts, top_k, group, dtype)
    num_batches = int(case.batch_of_T.max()) + 1
    hidden_TD = torch.randn(
        largest_share(case, group.rank), options.hidden_size, generator=torch.Generator().manual_seed(0)
    )
    hidden_TD = hidden_TD.to(group.device, dtype)
    seconds = 0.0
    with torch.inference_mode():
        # The first batch once more, unmeasured: it pays for connections and first allocations.
        for number in [0, *range(num_batches)]:
            batch = list(own_rows(case, expert_ids_TLK, number, group))
            if number == 0:
                layers[0].state.counters = Counters.zeros(num_layers, group.size)
            barrier(group)
            begun = time.perf_counter()
            for layer, ids_TK in zip(layers, batch, strict=True):
                weight_TK = torch.full(ids_TK.shape, 1 / top_k, device=group.device)
                dispatch_layer(layer, run_experts, hidden_TD[: len(ids_TK)], ids_TK, weight_TK)
            spent = seconds_of_slowest(time.perf_counter() - begun, group)
            seconds = spent if number == 0 else seconds + spent
    gathered: list[Any] = [None] * group.size
    dist.all_gather_object(gathered, layers[0].state.counters, group=group.handle)
    totals = stacked(gathered)
    served_RL = totals["served_L"]
    return {
        "ms_per_layer": 1000 * seconds / (num_batches * num_layers),
        "rows_per_token": float(totals["rows_LR"].sum() / (num_tokens * num_layers)),
        "bytes_per_token": float(totals["bytes_LR"].sum() / (num_tokens * num_layers)),
        "load_imbalance": float((served_RL.max(0) / np.maximum(served_RL.mean(0), 1e-12)).mean()),
    }


def replay_layers(
    options: ReplayOptions, case: Case, num_experts: int, top_k: int, group: Group, dtype: torch.dtype
) -> list[ExpertLayer]:
    """Expert layers of this rank."""
    placement = Placement(case.experts_LRS, num_experts)
    names = [f"layer {layer} of the trace" for layer in range(placement.num_layers)]
    state = RankState(Stopwatch(group.device), Counters.zeros(placement.num_layers, group.size))
    tables = layer_tables(placement, case.serving_LRE, group.rank, names, group.device)
    return [
        ExpertLayer(
            table,
            group.rank,
            group.size,
            group.handle,
            state,
            options.hidden_size,
            dtype,
            top_k,
        )
        for table in tables
    ]


def own_rows(case: Case, expert_ids_TLK: np.ndarray, number: int, group: Group) -> Iterator[torch.Tensor]:
    """Choices of the rows of a batch that live on this rank, int64 [T, K] for each layer."""
    rows = np.flatnonzero(case.batch_of_T == number)
    for layer in range(expert_ids_TLK.shape[1]):
        mine = rows[case.homes_TL[rows, layer] == group.rank]
        yield torch.from_numpy(expert_ids_TLK[mine, layer].astype(np.int64)).to(group.device)


def predict(
    options: ReplayOptions,
    case: Case,
    expert_ids_TLK: np.ndarray,
    network: Network,
    seconds_per_activation: float,
    dtype: torch.dtype,
) -> dict[str, float]:
    """Milliseconds per layer and batch by the cost model, from the evaluator's LINK and load of
    every batch."""
    top_k, num_ranks = expert_ids_TLK.shape[2], case.serving_LRE.shape[1]
    _, _, row_bytes = row_sections(options.hidden_size, top_k, dtype, torch.float32)
    seconds = []
    for number in range(int(case.batch_of_T.max()) + 1):
        metrics = batch_metrics(case, expert_ids_TLK, case.batch_of_T == number)
        work = LayerWork(
            tokens=int((case.batch_of_T == number).sum()),
            num_ranks=num_ranks,
            row_bytes=row_bytes,
            result_bytes=options.hidden_size * dtype.itemsize,
            top_k=top_k,
            seconds_per_activation=seconds_per_activation,
        )
        links_and_loads = zip(metrics["link"], metrics["load_imbalance"], strict=True)
        seconds += [layer_seconds(link, load, work, network) for link, load in links_and_loads]
    return {"predicted_ms_per_layer": 1000 * float(np.mean(seconds))}


def batch_metrics(case: Case, expert_ids_TLK: np.ndarray, rows_T: np.ndarray) -> dict[str, np.ndarray]:
    """The evaluator's metrics per layer of some rows, float64 [L] each."""
    ids_TLK = expert_ids_TLK[rows_T]
    num_tokens = len(ids_TLK)
    ends, unknown = np.array([0, num_tokens]), np.full(num_tokens, -1, np.int32)
    batch = TraceBatch(
        [""],
        [""],
        ends,
        ids_TLK,
        unknown,
        np.zeros(num_tokens, bool),
        np.zeros(1, np.int64),
        np.zeros(1, np.int64),
        np.zeros(2, np.int64),
        np.empty(0, np.int32),
    )
    topology, homes_TL = Topology(case.serving_LRE.shape[1]), case.homes_TL[rows_T]
    sums = traffic_sums(batch, case.serving_LRE, topology, dispatch="per-rank", homes_TL=homes_TL)
    return {
        name: values_XL[0]
        for name, values_XL in metrics_XL(sums.resampled(np.ones((1, 1))), topology, "per-rank").items()
    }
