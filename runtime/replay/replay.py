"""Recorded routing through the real dispatch, experts and combine, on the user's own ranks and
network, without model weights.

Rows of a trace are cut into batches; at every layer each rank takes the rows that live on it under
a schedule, with random hidden values, and runs the same exchange as a model would
(runtime/layer/dispatch.py). Rows and bytes come from its counters, milliseconds from the clock;
the prediction comes from the evaluator's LINK and load on the same rows, and a bandwidth and
latency measured just before.

Shape letters: T tokens, L MoE layers, K top-k, R ranks, E experts, S slots per rank, D hidden size.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from semmoe.profiles.trace import TraceBatch
from semmoe.runtime.layer.counters import stacked
from semmoe.runtime.layer.dispatch import serve_tokens
from semmoe.runtime.layer.permute import row_sections
from semmoe.runtime.layer.tables import ExpertLayer, RankState, RunExperts, layer_tables
from semmoe.runtime.ranks.failures import naming
from semmoe.runtime.ranks.group import Group, open_group, share
from semmoe.runtime.ranks.progress import Show, shown_nowhere
from semmoe.runtime.replay.cases import Case, Prepared, ReplayOptions, largest_share, prepare
from semmoe.solvers.evaluate.metrics import metrics_XL
from semmoe.solvers.evaluate.sums import traffic_sums
from semmoe.solvers.place.replicas import MovingRule
from semmoe.solvers.placement import Placement, Topology
from semmoe.solvers.time.layer_time import EXCHANGES, LayerWork, Network, fit_network, layer_seconds

DTYPES = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class Replay:
    """What all measurements of a replay share."""

    options: ReplayOptions
    expert_ids_TLK: np.ndarray
    num_experts: int
    group: Group
    dtype: torch.dtype

    @property
    def top_k(self) -> int:
        return self.expert_ids_TLK.shape[2]

    @property
    def result_bytes(self) -> int:
        """Of a row on its way back."""
        return self.options.hidden_size * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Of a row on its way out."""
        return row_sections(self.options.hidden_size, self.top_k, self.dtype, torch.float32)[2]


def replay_rank(
    options: ReplayOptions, prepared: Prepared | None, tell: Callable[[str], None], show: Show = shown_nowhere
) -> dict[str, Any] | None:
    """Replay on this process's rank; all ranks call it.

    Parameters:
        prepared: what is replayed; None: rank 0 reads the trace.
        show: `show("...")` gives a function that rank 0 calls with how many of how many placements
            and schedules are measured.

    Returns:
        The result on rank 0, None elsewhere.
    """
    with (
        open_group(backend=options.backend, device=options.device, timeout_s=options.timeout_s) as group,
        (show if group.rank == 0 else shown_nowhere)("replay") as progress,
    ):
        if prepared is None:
            prepared = share(lambda: prepare(options, group.size, tell), group)
        replay = Replay(options, prepared.expert_ids_TLK, prepared.num_experts, group, DTYPES[options.dtype])
        timed = time_exchanges(replay)
        network = network_of(timed, replay)
        rows = []
        for number, case in enumerate(prepared.cases):
            progress(number, len(prepared.cases))
            run_experts, seconds = measure_experts(replay, case.experts_LRS.shape[2])
            measured = replay_case(replay, case, run_experts)
            if group.rank == 0:
                predicted = predict(replay, case, network, seconds)
                rows.append({"placement": case.placement, "schedule": case.schedule, **measured, **predicted})
        hardware = {} if options.write_hardware is None else {"hardware": measured_hardware(replay, timed, prepared)}
        if group.rank:
            return None
        return {
            **hardware,
            "ranks": group.size,
            "tokens": len(replay.expert_ids_TLK),
            "batch_tokens": options.batch_tokens,
            "hidden_size": options.hidden_size,
            "expert_size": options.expert_size,
            "network": {"bytes_per_s": network.bytes_per_s, "latency_s": network.latency_s},
            "device": str(group.device),
            "backend": group.backend,
            "rows": rows,
        }


class Timed(NamedTuple):
    """Dispatch and combine of as many rows on every rank."""

    rows_X: list[int]
    seconds_X: list[float]


def network_of(timed: Timed, replay: Replay) -> Network:
    """Bandwidth and latency of this network as the exchange sees it, equal on all ranks: packing
    and adding are in them."""
    both_ways = replay.row_bytes + replay.result_bytes
    whole = fit_network(np.array(timed.rows_X, np.float64) * both_ways, np.array(timed.seconds_X))
    return Network(whole.bytes_per_s, whole.latency_s / EXCHANGES)


def time_exchanges(replay: Replay) -> Timed:
    """Seconds of the slowest rank, equal on all ranks.

    Every rank sends each of its rows to one other rank, in turn, in batches of some sizes; nothing
    is computed.
    """
    options, group, num_ranks = replay.options, replay.group, replay.group.size
    one_each = Placement(np.arange(num_ranks, dtype=np.int32).reshape(1, num_ranks, 1), num_ranks)
    serving_LRE = np.tile(np.arange(num_ranks), (1, num_ranks, 1))
    (layer,) = expert_layers(replay, one_each, serving_LRE, ["the measurement of the network"])
    share_of_batch = max(4, options.batch_tokens // num_ranks)
    sizes, seconds = [1, share_of_batch // 2, share_of_batch, 2 * share_of_batch], []
    with torch.inference_mode():
        for size in sizes:
            others = (group.rank + 1 + np.arange(size) % max(num_ranks - 1, 1)) % num_ranks
            # One choice per row, the rest empty slots: every expert more that a row meets costs its
            # rank another row of arithmetic.
            ids_TK = np.full((size, replay.top_k), num_ranks)
            ids_TK[:, 0] = others
            ids_TK = torch.from_numpy(ids_TK).to(group.device)
            hidden_TD = torch.zeros(size, options.hidden_size, dtype=replay.dtype, device=group.device)
            weight_TK = torch.ones(ids_TK.shape, device=group.device)
            best = float("inf")
            for _ in range(3):
                barrier(group)
                begun = time.perf_counter()
                serve_tokens(layer, run_nothing, hidden_TD, ids_TK, weight_TK)
                best = min(best, seconds_of_slowest(time.perf_counter() - begun, group))
            seconds.append(best)
    return Timed(sizes, seconds)


def measured_hardware(replay: Replay, timed: Timed, prepared: Prepared) -> dict[str, Any]:
    """What `--hardware FILE` reads, measured on these ranks: microseconds of an exchange by bytes
    on the busiest link, and of a rank's experts by their activations (for experts of this size).

    The nominal numbers are those that the measurements amount to; the measurements themselves are
    what predictions are read off.
    """
    options, ranks = replay.options, replay.group.size
    one_way = (replay.row_bytes + replay.result_bytes) / 2
    exchange = [[n * one_way, s * 1e6 / 2] for n, s in zip(timed.rows_X, timed.seconds_X, strict=True)]
    gb_per_s = network_of(timed, replay).bytes_per_s / 1e9
    measured: dict[str, Any] = {"exchange": sorted(exchange)}
    tflops = 1.0
    if options.expert_size:
        slots = prepared.cases[0].experts_LRS.shape[2]
        share = max(slots, options.batch_tokens * replay.top_k // ranks)
        rows = sorted({max(slots, share // 4), share, 2 * share})
        measured["experts"] = [[n, measure_experts(replay, slots, n)[1] * n * 1e6] for n in rows]
        flop = 6 * options.hidden_size * options.expert_size * rows[-1]
        tflops = flop / measured["experts"][-1][1] / 1e6
        measured["experts_of"] = [options.hidden_size, options.expert_size]
    return {
        "format": "semmoe-hardware",
        "version": 1,
        "name": f"{ranks} ranks on {replay.group.device.type}",
        "backend": "semmoe",
        **{name: max(tflops, 1e-6) for name in ("bf16", "fp8")},
        "hbm": {"value": 1.0, "source": "not measured apart from the experts"},
        **{name: max(gb_per_s, 1e-6) for name in ("nvl", "nic")},
        "domain": ranks,
        "measured": measured,
    }


def run_nothing(rows_PD: torch.Tensor, slot_P1: torch.Tensor, weight_P1: torch.Tensor) -> torch.Tensor:
    """An expert that costs nothing."""
    return rows_PD * weight_P1.to(rows_PD.dtype)


def barrier(group: Group) -> None:
    seconds_of_slowest(0.0, group)
    if group.device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of_slowest(seconds: float, group: Group) -> float:
    """The largest value of all ranks."""
    if group.device.type == "cuda":
        torch.cuda.synchronize()
    worst = torch.tensor(seconds, dtype=torch.float64, device=group.device if group.backend == "nccl" else "cpu")
    with naming(group.rank, "the agreement on the time of a batch"):
        dist.all_reduce(worst, dist.ReduceOp.MAX, group=group.handle)
    return float(worst)


def measure_experts(replay: Replay, slots: int, pairs: int = 0) -> tuple[RunExperts, float]:
    """A gated expert layer with random weights (nothing for size 0), and its seconds per
    activation on this machine, all ranks at work. `pairs`: activations of a rank; 0: its share of a
    batch."""
    options, group = replay.options, replay.group
    if options.expert_size == 0:
        return run_nothing, 0.0
    from semmoe.runtime.transformers.random_experts import random_experts

    sizes = {"hidden_size": options.hidden_size, "expert_size": options.expert_size}
    run_experts = random_experts(slots, **sizes, device=group.device, dtype=replay.dtype)
    pairs = pairs or max(slots, options.batch_tokens // group.size)
    rows_PD = torch.randn(pairs, options.hidden_size, device=group.device).to(replay.dtype)
    slot_P1 = (torch.arange(pairs, device=group.device) % slots)[:, None]
    best = float("inf")
    with torch.inference_mode():
        for _ in range(3):
            barrier(group)
            begun = time.perf_counter()
            run_experts(rows_PD, slot_P1, torch.ones(pairs, 1, device=group.device))
            best = min(best, seconds_of_slowest(time.perf_counter() - begun, group))
    return run_experts, best / pairs


def replay_case(replay: Replay, case: Case, run_experts: RunExperts) -> dict[str, Any]:
    """Measured milliseconds per layer and batch, rows and bytes per token and layer, and the
    load of the ranks."""
    group = replay.group
    num_tokens, num_layers, top_k = replay.expert_ids_TLK.shape
    names = [f"layer {layer} of the trace" for layer in range(num_layers)]
    placement = Placement(case.experts_LRS, replay.num_experts, may_waste=True)
    layers = expert_layers(replay, placement, case.serving_LRE, names, case.moving)
    num_batches = int(case.batch_of_T.max()) + 1
    hidden_TD = torch.randn(
        largest_share(case, group.rank), replay.options.hidden_size, generator=torch.Generator().manual_seed(0)
    )
    hidden_TD = hidden_TD.to(group.device, replay.dtype)
    seconds = 0.0
    with torch.inference_mode():
        # The first batch once more, unmeasured: it pays for connections and first allocations.
        for number in [0, *range(num_batches)]:
            batch = list(own_rows(replay, case, number))
            if number == 0:
                layers[0].state.restart()
            barrier(group)
            begun = time.perf_counter()
            for layer, ids_TK in zip(layers, batch, strict=True):
                weight_TK = torch.full(ids_TK.shape, 1 / top_k, device=group.device)
                serve_tokens(layer, run_experts, hidden_TD[: len(ids_TK)], ids_TK, weight_TK)
            spent = seconds_of_slowest(time.perf_counter() - begun, group)
            seconds = spent if number == 0 else seconds + spent
    gathered: list[Any] = [None] * group.size
    with naming(group.rank, "the collection of counters"):
        dist.all_gather_object(gathered, layers[0].state.counters, group=group.handle)
    totals = stacked(gathered)
    served_RL = totals["served_L"]
    return {
        "ms_per_layer": 1000 * seconds / (num_batches * num_layers),
        "rows_per_token": float(totals["rows_LR"].sum() / (num_tokens * num_layers)),
        "bytes_per_token": float(totals["bytes_LR"].sum() / (num_tokens * num_layers)),
        "load_imbalance": float((served_RL.max(0) / np.maximum(served_RL.mean(0), 1e-12)).mean()),
    }


def expert_layers(
    replay: Replay,
    placement: Placement,
    serving_LRE: np.ndarray,
    names: list[str],
    moving: MovingRule | None = None,
) -> list[ExpertLayer]:
    """Expert layers of this rank. `moving`: what chooses copies in place of `serving_LRE`."""
    group = replay.group
    state = RankState.fresh(placement.num_layers, group)
    tables = layer_tables(placement, serving_LRE, group.rank, names, group.device, moving=moving)
    size = replay.options.hidden_size
    return [ExpertLayer(table, group, state, size, replay.dtype, replay.top_k) for table in tables]


def own_rows(replay: Replay, case: Case, number: int) -> Iterator[torch.Tensor]:
    """Choices of the rows of a batch that live on this rank, int64 [T, K] for each layer."""
    group, ids_TLK = replay.group, replay.expert_ids_TLK
    rows = np.flatnonzero(case.batch_of_T == number)
    for layer in range(ids_TLK.shape[1]):
        mine = rows[case.homes_TL[rows, layer] == group.rank]
        yield torch.from_numpy(ids_TLK[mine, layer].astype(np.int64)).to(group.device)


def predict(replay: Replay, case: Case, network: Network, seconds_per_activation: float) -> dict[str, float]:
    """Milliseconds per layer and batch by the cost model, from the evaluator's LINK, load and LAR
    of every batch."""
    seconds = []
    for number in range(int(case.batch_of_T.max()) + 1):
        rows_T = case.batch_of_T == number
        metrics = batch_metrics(replay, case, rows_T)
        work = LayerWork(
            tokens=int(rows_T.sum()),
            num_ranks=case.serving_LRE.shape[1],
            row_bytes=replay.row_bytes,
            result_bytes=replay.result_bytes,
            top_k=replay.top_k,
            seconds_per_activation=seconds_per_activation,
        )
        layers = zip(metrics["link"], metrics["load_imbalance"], metrics["lar"], strict=True)
        seconds += [layer_seconds(link, load, work, network, lar) for link, load, lar in layers]
    return {"predicted_ms_per_layer": 1000 * float(np.mean(seconds))}


def batch_metrics(replay: Replay, case: Case, rows_T: np.ndarray) -> dict[str, np.ndarray]:
    """The evaluator's metrics per layer of some rows, float64 [L] each."""
    ids_TLK = replay.expert_ids_TLK[rows_T]
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
    options = {"dispatch": "per-rank", "homes_TL": homes_TL, "moving": case.moving}
    sums = traffic_sums(batch, case.serving_LRE, topology, **options)
    return {
        name: values_XL[0]
        for name, values_XL in metrics_XL(sums.resampled(np.ones((1, 1))), topology, "per-rank").items()
    }
