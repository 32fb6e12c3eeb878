"""Throughput of a placed model over a slow network, against Transformers' own expert parallelism. Needs root; prints one JSON object.

    python tests/benchmarks/run.py MODEL TEXTS [GPT_OSS_TRACE] [--rate 25mbit] [--replay-rate 400mbit] [--requests 128]

Four ranks, each in a network namespace of its own with a link shaped by `tc tbf` in both directions. MODEL: a checkpoint (the shared
models/moe-16m); TEXTS: JSON lines with id, domain and text, of which one half is traced and placed on, and the other half is served. All
cases run in one group of processes one after the other, greedy, prompts cut to one length, so that no case computes padding:

    transformers     Transformers' AllToAllEP, contiguous experts, requests in turn
    dedup            our dispatch, contiguous experts, requests in turn
    plan             our dispatch, placed experts, requests by the plan's scorer
    plan+4           the same with 4 replica slots per rank
    tp transformers  Transformers alone: from_pretrained with DistributedConfig(tp_size=4, ep_size=4), on a checkpoint of the same function
                     whose heads divide over 4 ranks (3 key-value heads and one whose weights are 0)
    tp all-reduce    the same communication per layer around our cut of the heads: AllReduceEP, an all-reduce after each attention;
                     embedding and head of the vocabulary stay whole, so that it sends less than Transformers does
    tp contiguous    Attention-TP without a plan: contiguous experts, equal consecutive slices
    tp slices        equal consecutive slices, placed experts
    tp               Attention-TP with the plan: placed experts, its context predictor
    tp+4             the same with 4 replica slots per rank

Of every case: throughput, the time of its parts, bytes that a rank put on its link (`link_bytes`, with headers), and of Attention-TP the
share of the step that sorting, permuting and the way back take (`shuffle_share`).

GPT_OSS_TRACE: a trace to replay (hidden 2880, bfloat16), half of it placed on, the other half replayed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common.shaped_network import close_network, open_network, sent_bytes, shape_network
from common.transformers_ranks import NoShuffle, load_tensor_parallel, pad_heads, with_transformers

RANKS = 4
SEMMOE = [sys.executable, "-m", "semmoe"]


def run_ranks(work: Path, task: dict[str, Any]) -> Any:
    """Run `task` on every rank in its namespace; what rank 0 found."""
    (work / "task.json").write_text(json.dumps(task))
    processes = []
    for rank in range(RANKS):
        environment = os.environ | {
            **{"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank), "MASTER_ADDR": "10.77.0.1"},
            **{"MASTER_PORT": "29511", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        }
        words = ["ip", "netns", "exec", f"semmoe{rank}", sys.executable, __file__, "--rank-of", str(work)]
        processes.append(subprocess.Popen(words, env=environment, stdout=sys.stderr))
    codes = [process.wait() for process in processes]
    if any(codes):
        sys.exit(f"ranks ended with {codes}")
    return json.loads((work / "found.json").read_text())


def rank_main(work: Path) -> None:
    import torch

    torch.set_num_threads(1)
    task = json.loads((work / "task.json").read_text())
    found = serve_cases(task) if task["kind"] == "serve" else replay(task)
    if found is not None:
        (work / "found.json").write_text(json.dumps(found))


def serve_cases(task: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Metrics of every case on rank 0."""
    import torch
    import torch.distributed as dist

    from semmoe.profiles.capture.loading import find_model
    from semmoe.runtime.ranks.group import open_group
    from semmoe.runtime.serving.batch import Limits, Prompt
    from semmoe.runtime.serving.engine import serve
    from semmoe.runtime.serving.run import collect_metrics
    from semmoe.runtime.serving.schedulers import assign
    from semmoe.runtime.serving.tensor_parallel import install_tensor_parallel
    from semmoe.runtime.serving.token_homes import make_homes
    from semmoe.runtime.transformers.placed_model import load_placed
    from semmoe.runtime.transformers.rank_parts import rank_checkpoints
    from semmoe.solvers.plan import Plan

    found = []
    with open_group(timeout_s=600) as group:
        for case in task["cases"]:
            plan = Plan.load(case["plan"])
            source = find_model(task["model"])
            checkpoint = rank_checkpoints(Path(source.path), plan)[group.rank]
            placed: Any = load_placed(source, Path(source.path), checkpoint, plan, group, dtype="float32")
            shuffled: Any = None
            if case["implementation"] == "all_to_all":
                placed = with_transformers(placed, plan, "all_to_all")
            elif case["implementation"] == "all_reduce":
                placed, shuffled = with_transformers(placed, plan, "all_reduce"), NoShuffle()
            elif case["implementation"] == "transformers":
                placed, shuffled = load_tensor_parallel(Path(task["padded"]), group, plan, "float32"), NoShuffle()
            elif case["scheduler"] == "tp":
                homes = make_homes(case["predict"], plan, relabelled=False, device=group.device, group=group)
                shuffled = install_tensor_parallel(placed, homes, plan.model.model_layers, "the model")
            prompts = [Prompt(i, str(i), np.array(ids, np.int32)) for i, ids in enumerate(task["prompts"])]
            # With tp all ranks share one batch: as many tokens per rank as with dp.
            batch_tokens = task["batch_tokens"] * (RANKS if case["scheduler"] == "tp" else 1)
            limits = Limits(task["max_new_tokens"], batch_tokens, frozenset())
            mine = prompts
            if case["scheduler"] != "tp":
                ids = [p.token_ids for p in prompts]
                rank_of_B = assign(case["scheduler"], ids, plan, max_new_tokens=limits.max_new_tokens)
                mine = [p for p, rank in zip(prompts, rank_of_B, strict=True) if rank == group.rank]
            completions: dict[int, list[int]] = {}
            # Once with a few prompts, unmeasured: connections and first allocations.
            serve(placed, mine[:2], limits, deliver=lambda done: None, shuffled=shuffled)
            placed.state.restart()
            dist.barrier(group.handle)
            sent = sent_bytes()
            times = serve(placed, mine, limits, deliver=keep_in(completions), shuffled=shuffled)
            sent = torch.tensor(sent_bytes() - sent)
            dist.all_reduce(sent, group=group.handle)
            metrics = collect_metrics(placed, times, plan.model.model_layers)
            if metrics is not None:
                metrics |= {"scheduler": case["scheduler"], "ranks": group.size, "requests": len(prompts)}
                metrics["time"] = placed.state.stopwatch.seconds()
                if "shuffle" in metrics["time"]:
                    metrics["shuffle_share"] = metrics["time"]["shuffle"] / sum(metrics["time"].values())
                metrics["link_bytes"] = int(sent) // RANKS
                metrics["seconds"] = sum(times.seconds.values())
                tokens = sum(len(p.token_ids) for p in prompts) + sum(len(ids) - 1 for ids in completions.values())
                metrics["tokens_per_s"] = tokens / metrics["seconds"]
                found.append({**case, **metrics, "tokens": [completions[i] for i in sorted(completions)]})
                print(case["name"], {k: v for k, v in metrics.items() if k != "layers"}, file=sys.stderr)
    return found if group.rank == 0 else None


def keep_in(completions: dict[int, list[int]]) -> Any:
    return lambda done: completions.update((d.index, d.token_ids) for d in done)


def replay(task: dict[str, Any]) -> Any:
    from semmoe.runtime.replay.cases import ReplayOptions
    from semmoe.runtime.replay.replay import replay_rank
    from semmoe.runtime.transformers import random_experts

    sizes = {"hidden_size": 2880, "batch_tokens": task["batch_tokens"], "max_tokens": task["max_tokens"]}
    sizes |= {name: task[name] for name in ("expert_size", "write_hardware") if name in task}
    if "expert_us" in task:
        random_experts.random_experts = partial(waiting_experts, us=task["expert_us"])
    where = {"scheduler": "tp", "backend": "gloo", "device": "cpu", "dtype": "bfloat16", "timeout_s": 600.0}
    options = ReplayOptions(trace=task["trace"], plan=task["plan"], **sizes, **where)
    return replay_rank(options, None, lambda line: print(line, file=sys.stderr))


def waiting_experts(slots: int, *, us: float, **_: Any) -> Any:
    """Experts on a device of their own, as far as a machine with fewer cores than ranks can have them: a wait for each row."""

    def run(rows_PD: Any, slot_P1: Any, weight_P1: Any) -> Any:
        time.sleep(us * len(rows_PD) / 1e6)
        return rows_PD * weight_P1.to(rows_PD.dtype)

    return run


def make(out: Path, *words: str) -> None:
    """Run a semmoe command that writes `out`, unless it is there."""
    if not out.exists():
        subprocess.run([*SEMMOE, *words, "-o", str(out)], check=True, stdout=subprocess.DEVNULL)


def place(trace: Path, out: Path, objective: str, replicas: int) -> None:
    make(out, "place", str(trace), "--ranks", str(RANKS), "--objective", objective, "--replicas", str(replicas))


def split_jsonl(texts: Path, work: Path) -> None:
    """Every other text is placed on, the rest served."""
    import gzip

    lines = gzip.open(texts, "rt").readlines() if texts.suffix == ".gz" else texts.read_text().splitlines(keepends=True)
    (work / "fit.jsonl").write_text("".join(lines[::2]))
    (work / "serve.jsonl").write_text("".join(lines[1::2]))


def contiguous_plan(path: Path, out: Path) -> None:
    from dataclasses import replace

    from semmoe.solvers.place.baselines import place_contiguous
    from semmoe.solvers.placement import Placement
    from semmoe.solvers.plan import Plan

    plan = Plan.load(path)
    rank_of_LE = place_contiguous(plan.placement.num_layers, plan.placement.num_experts, RANKS)
    replace(plan, placement=Placement.from_ranks(rank_of_LE, RANKS), tables={}).save(out)


def split_trace(trace: str, work: Path) -> None:
    """Every other request of a trace to `replay-fit`, the rest to `replay-held`."""
    from semmoe.profiles.trace import RoutingTrace
    from semmoe.profiles.trace_writer import TraceWriter

    whole = RoutingTrace.open(trace)
    with TraceWriter(work / "replay-fit", whole.info) as fit, TraceWriter(work / "replay-held", whole.info) as held:
        number = 0
        for batch in whole.batches():
            for b in range(batch.num_requests):
                (fit if number % 2 == 0 else held).add(
                    batch.request_ids[b],
                    batch.expert_ids_TLK[batch.starts_B1[b] : batch.starts_B1[b + 1]],
                    domain=batch.domains[b],
                    token_ids=batch.sequence(b) if len(batch.sequence(b)) else None,
                    num_prompt_tokens=int(batch.num_prompt_tokens_B[b]),
                    first_position=int(batch.first_position_B[b]),
                )
                number += 1


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("texts", type=Path)
    parser.add_argument("trace", nargs="?")
    parser.add_argument("--work", type=Path, help="keep traces and plans here, and take what is there already")
    parser.add_argument("--only", action="append", metavar="CASE", help="run these cases only")
    parser.add_argument("--rate", default="25mbit")
    parser.add_argument("--replay-rate", default="400mbit")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--max-new-tokens", type=int, default=4)
    options = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "run", "ranks": RANKS, "rate": options.rate, "load_average": os.getloadavg()}
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        work.mkdir(exist_ok=True)
        split_jsonl(options.texts, work)
        make(work / "t", "trace", options.model, "--data", str(work / "fit.jsonl"))
        for objective, replicas in (("dp", 0), ("dp", 4), ("tp", 0), ("tp", 4)):
            place(work / "t", work / f"{objective}{replicas}", objective, replicas)
        contiguous_plan(work / "dp0", work / "contiguous")
        try:
            open_network(RANKS)
            result |= throughput(options, work)
            if options.trace:
                result["replay"] = replayed(options, work)
        finally:
            close_network(RANKS)
    print(json.dumps(result))


def throughput(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    from semmoe.profiles.capture.loading import find_model, load_tokenizer
    from semmoe.profiles.capture.requests import encode_requests, read_requests
    from semmoe.profiles.capture.sources import open_source

    requests = list(read_requests(open_source(str(work / "serve.jsonl"))))
    encoded = encode_requests(requests, load_tokenizer(find_model(options.model)))
    long_enough = [ids[: options.prompt_tokens].tolist() for ids in encoded if len(ids) >= options.prompt_tokens]
    order = np.random.default_rng(0).permutation(len(long_enough))[: options.requests]
    kinds = {  # plan, implementation, scheduler, predictor
        "transformers": ("contiguous", "all_to_all", "none", ""),
        "dedup": ("contiguous", "semmoe", "none", ""),
        "plan": ("dp0", "semmoe", "dp", ""),
        "plan+4": ("dp4", "semmoe", "dp", ""),
        "tp transformers": ("contiguous", "transformers", "tp", ""),
        "tp all-reduce": ("contiguous", "all_reduce", "tp", ""),
        "tp contiguous": ("contiguous", "semmoe", "tp", "none"),
        "tp slices": ("tp0", "semmoe", "tp", "none"),
        "tp": ("tp0", "semmoe", "tp", "context"),
        "tp+4": ("tp4", "semmoe", "tp", "context"),
    }
    cases = [
        {"name": name, "plan": str(work / plan), "implementation": kind, "scheduler": scheduler, "predict": predict}
        for name, (plan, kind, scheduler, predict) in kinds.items()
        if options.only is None or name in options.only
    ]
    shape_network(RANKS, options.rate)
    task = {"kind": "serve", "model": options.model, "cases": cases, "prompts": [long_enough[i] for i in order]}
    task["padded"] = str(work / "padded")
    pad_heads(Path(options.model), work / "padded", RANKS)
    found = run_ranks(work, task | {"max_new_tokens": options.max_new_tokens, "batch_tokens": 2048})
    same = [case["tokens"] == found[0]["tokens"] for case in found]
    rows = [{k: v for k, v in case.items() if k not in ("tokens", "layers", "plan")} for case in found]
    speed = {row["name"]: row["tokens_per_s"] for row in rows}
    ratios = {
        "plan_over_transformers": ("plan", "transformers"),
        "replicas_over_transformers": ("plan+4", "transformers"),
        "plan_over_dedup": ("plan", "dedup"),
        "tp_over_transformers": ("tp", "tp transformers"),
        "tp_over_all_reduce": ("tp", "tp all-reduce"),
        "tp_over_contiguous": ("tp", "tp contiguous"),
        "tp_over_slices": ("tp", "tp slices"),
        "tp_replicas_over_transformers": ("tp+4", "tp transformers"),
        "tp_replicas_over_all_reduce": ("tp+4", "tp all-reduce"),
        "tp_replicas_over_contiguous": ("tp+4", "tp contiguous"),
        "tp_replicas_over_slices": ("tp+4", "tp slices"),
    }
    found_ratios = {key: speed[a] / speed[b] for key, (a, b) in ratios.items() if a in speed and b in speed}
    return {"cases": rows, "same_tokens_in_all_cases": all(same), **found_ratios}


def replayed(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    if not (work / "replay-held").exists():
        split_trace(options.trace, work)
    for replicas in (0, 2):
        place(work / "replay-fit", work / f"r{replicas}", "tp", replicas)
    shape_network(RANKS, options.replay_rate)
    task = {"kind": "replay", "trace": str(work / "replay-held"), "batch_tokens": 512, "max_tokens": 8192}
    # A group of processes for each plan: ranks that are done would join the next group through the store of the last one.
    found = [run_ranks(work, task | {"plan": str(work / f"r{replicas}")}) for replicas in (0, 2)]
    rows = {
        (plan, row["placement"], row["schedule"]): row
        for plan, part in zip((0, 2), found, strict=True)
        for row in part["rows"]
    }
    base = rows[0, "contiguous", "random"]["rows_per_token"]
    return {
        "rate": options.replay_rate,
        "network": found[0]["network"],
        "rows": [{"replicas": replicas, **row} for (replicas, _, _), row in rows.items()],
        "tp_context_over_contiguous": rows[0, "plan", "tp-context"]["rows_per_token"] / base,
        "tp_context_replicas_over_contiguous": rows[2, "plan", "tp-context"]["rows_per_token"] / base,
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank-of"]:
        rank_main(Path(sys.argv[2]))
    else:
        main()
