"""Time, memory and quality of `place_semmoe` on a made-up model of any size; prints one JSON object.

    python tests/benchmarks/place.py --layers 58 --experts 256 --top-k 8 --ranks 8 --tokens 1000000 --processes 2
    python tests/benchmarks/place.py --layers 2 --experts 128 --ranks 32 --tokens 200000 --compare

Timed: counting, placement (`--objective`), token tables (layers shared by the processes), and with `--schedules` all
that `semmoe place` fits beside them (context predictor, request scorer). `--layers-timed` takes only the first few
layers (CPU seconds per layer are then what scales). Routing is drawn into the mapped file that a profile keeps its
sample in. Memory is the peak over this process and its workers together (process_memory.py), from the first count to
the last table. `--compare` adds the other methods at the same cap, scored on the second half of the requests with
homes at random: METIS is the best of 10 seeds of both schemes, with `--nodes` also over nodes first and then over the
ranks inside each; packing by load is then EPLB's hierarchical one.
"""

import argparse
import json
import os
import resource
import time
from dataclasses import replace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from common.process_memory import watched
from common.routing_world import Tokens, draw_tokens, route_layer

from semmoe.profiles.counts import RoutingProfile, count_batches, profile_traces
from semmoe.profiles.mapped import MappedView, mapped_empty, open_view, view_of
from semmoe.profiles.trace import RoutingTrace, TraceBatch, TraceInfo
from semmoe.solvers.demands import Demands
from semmoe.solvers.deployment import Deployment
from semmoe.solvers.evaluate.sums import deployment_sums
from semmoe.solvers.place.replicas import served_load_R
from semmoe.solvers.place.solve import solve_placement
from semmoe.solvers.placement import Placement, Topology
from semmoe.solvers.schedule.fit import fit_schedule
from semmoe.solvers.schedule.token_fit import build_token_table
from semmoe.solvers.schedule.token_table import TokenTable
from semmoe.solvers.workers import layer_map

REQUEST_TOKENS = 256


def batch_of(tokens: Tokens, ids_TLK: np.ndarray) -> TraceBatch:
    num_requests = int(tokens.request_of_T[-1] - tokens.request_of_T[0]) + 1
    starts_B1 = np.minimum(np.arange(num_requests + 1) * REQUEST_TOKENS, len(ids_TLK))
    zeros = np.zeros(num_requests, np.int64)
    return TraceBatch(
        request_ids=[str(i) for i in range(num_requests)],
        domains=[""] * num_requests,
        starts_B1=starts_B1,
        expert_ids_TLK=ids_TLK,
        token_ids_T=tokens.token_ids_T,
        is_prompt_T=np.zeros(len(ids_TLK), bool),
        num_prompt_tokens_B=zeros,
        first_position_B=zeros,
        sequence_starts_B1=starts_B1,
        sequences=tokens.token_ids_T,
    )


def scores(placement: Placement, profile: RoutingProfile, held_out: TraceBatch, topology: Topology) -> dict[str, float]:
    """REM and NODE of held-out tokens at random homes, and the worst layer's load on the fitted requests."""
    deployment = Deployment(placement, profile.load_LE, topology)
    sums = deployment_sums(deployment, held_out)
    per_token = 1 / (held_out.num_tokens * placement.num_layers)
    loads = [served_load_R(s, load_E) for s, load_E in zip(deployment.serving_LRE, profile.load_LE, strict=True)]
    return {
        "rem": round(float(sums.remote_ranks_GL.sum()) * per_token, 4),
        "node": round(float(sums.remote_nodes_GL.sum()) * per_token, 4),
        "load": round(max(float(load_R.max() / load_R.mean()) for load_R in loads), 4),
    }


def drawn(a: argparse.Namespace) -> tuple[TraceBatch, TraceInfo, int, TraceBatch | None]:
    """Routing of a made-up model: requests to place for, and with `--compare` others to score on."""
    layers = a.layers_timed or a.layers
    tokens = draw_tokens(a.tokens * (2 if a.compare else 1), a.vocab, tokens_per_request=REQUEST_TOKENS, seed=a.seed)
    id_dtype = np.dtype(np.uint8 if a.experts <= 256 else np.uint16)
    ids_LTK = mapped_empty((layers, len(tokens.token_ids_T), a.top_k), id_dtype)
    for layer in range(layers):
        ids_LTK[layer] = route_layer(tokens, a.vocab, a.experts, a.top_k, num_groups=a.groups, layer=layer, seed=a.seed)
    ids_TLK = np.asarray(ids_LTK).transpose(1, 0, 2)
    cut = a.tokens // REQUEST_TOKENS * REQUEST_TOKENS if a.compare else a.tokens
    train = Tokens(*(x[:cut] for x in tokens))
    info = TraceInfo("made-up", layers, a.experts, a.top_k, tuple(range(layers)), n_group=a.groups, topk_group=a.groups)
    held_out = None
    if a.compare:
        scored = slice(cut, cut + min(a.scored_tokens, a.tokens) // REQUEST_TOKENS * REQUEST_TOKENS)
        held_out = batch_of(Tokens(*(x[scored] for x in tokens)), ids_TLK[scored])
    return batch_of(train, ids_TLK[:cut]), info, layers, held_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=58)
    parser.add_argument("--layers-timed", type=int, default=0)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--redundant", type=int, help="copies in all; else what the ranks leave of ceil(E / R) slots")
    parser.add_argument("--methods", default="metis,spectral,paper,load,contiguous")
    parser.add_argument("--scored-tokens", type=int, default=100_000)
    parser.add_argument("--dispatch", default="per-rank")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--vocab", type=int, default=129_280)
    parser.add_argument("--effort", default="default")
    parser.add_argument("--objective", default="both")
    parser.add_argument("--schedules", action="store_true")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--trace", help="a trace of large_trace.py instead of routing drawn here; without --compare")
    a = parser.parse_args()
    held_out = None
    if a.trace:
        profile = profile_traces([RoutingTrace.open(a.trace)])
        batch, info = profile.sample, profile.info
        layers = a.layers_timed or info.num_layers
        batch = replace(batch, expert_ids_TLK=batch.expert_ids_TLK[:, :layers])
        info = replace(info, num_layers=layers, model_layers=info.model_layers[:layers])
    else:
        batch, info, layers, held_out = drawn(a)
    topology = Topology(a.ranks, a.nodes)
    with watched() as memory:
        start, cpu = time.perf_counter(), cpu_seconds()
        num_tokens, load_LE, co_activation_LEE = count_batches([batch], info)
        profile = RoutingProfile(info, num_tokens, load_LE, co_activation_LEE, batch)
        counted, counted_cpu = time.perf_counter() - start, cpu_seconds() - cpu
        start, cpu = time.perf_counter(), cpu_seconds()
        asked = Demands(seed=a.seed, dispatch=a.dispatch, effort=a.effort, objective=a.objective, processes=a.processes)
        asked = replace(asked, redundant=a.redundant)
        placement = solve_placement(profile, topology, asked, method="semmoe").placement
        placed, placed_cpu = time.perf_counter() - start, cpu_seconds() - cpu
        start, cpu = time.perf_counter(), cpu_seconds()
        tables = token_tables(batch, placement, a.processes)
        tabled, tabled_cpu = time.perf_counter() - start, cpu_seconds() - cpu
        num_tables = sum(len(table.rare_LR) for table in tables)
        del tables
        start = time.perf_counter()
        if a.schedules:
            fit_schedule(batch, placement, seed=a.seed, processes=a.processes)
        scheduled = time.perf_counter() - start
    result = {
        "arguments": vars(a),
        "count_seconds": round(counted, 2),
        "count_cpu_seconds_per_layer": round(counted_cpu / layers, 3),
        "place_seconds": round(placed, 2),
        "place_cpu_seconds_per_layer": round(placed_cpu / layers, 3),
        "token_table_seconds": round(tabled, 2),
        "token_table_cpu_seconds_per_layer": round(tabled_cpu / layers, 3),
        "token_table_layers": num_tables,
        "all_schedules_seconds": round(scheduled, 2) if a.schedules else None,
        "peak_mib_all_processes": memory.mib,
        "peak_mib_this_process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "peak_mib_largest_worker": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
        "load_average": [round(x, 1) for x in os.getloadavg()],
    }
    if held_out is not None:
        result["semmoe"] = scores(placement, profile, held_out, topology)
        demands = Demands(seed=a.seed, redundant=a.redundant, processes=a.processes)
        for name in a.methods.split(","):
            placed = solve_placement(profile, topology, demands, method=name).placement
            result[name] = scores(placed, profile, held_out, topology)
        if a.nodes > 1:
            nodes_first = solve_placement(profile, topology, replace(demands, dispatch="per-node"), method="metis")
            result["metis-nodes"] = scores(nodes_first.placement, profile, held_out, topology)
    print(json.dumps(result))


def token_tables(batch: TraceBatch, placement: Placement, processes: int) -> list[TokenTable]:
    """Token tables of consecutive shares of the layers, one share per process."""
    shares = [s for s in np.array_split(np.arange(placement.num_layers), processes) if len(s)]
    view = view_of(batch.expert_ids_TLK)
    jobs = [(batch if view is None else replace(batch, expert_ids_TLK=batch.expert_ids_TLK[:0]), view) for _ in shares]
    with layer_map(processes, placement.num_experts) as run:
        return list(run(token_table, [(*j, s, placement.hosts_LER[s]) for j, s in zip(jobs, shares, strict=True)]))


def token_table(job: tuple[TraceBatch, MappedView | None, np.ndarray, np.ndarray]) -> TokenTable:
    batch, view, share, hosts_LER = job
    ids_TLK = batch.expert_ids_TLK if view is None else open_view(view)
    return build_token_table(replace(batch, expert_ids_TLK=ids_TLK[:, share[0] : share[-1] + 1]), hosts_LER)


def cpu_seconds() -> float:
    """User and system seconds of this process and of workers that ended."""
    own, workers = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + workers.ru_utime + workers.ru_stime


if __name__ == "__main__":
    main()
