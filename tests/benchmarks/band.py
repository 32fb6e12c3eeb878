#!/usr/bin/env python3
"""band.py PLAN TRACE: what the band rule gives on requests of a trace that the plan was not fitted
on: locality and balance, for several bands and numbers of requests under way, against requests in
turn, the best rank always, and the windows of a report. And what scoring a prompt costs, of this
plan and of a large one, against gathering the rows of its ids alone.

Requests arrive in a random order; one that is done makes room for the next. A request lasts one
step for each generated token, and one for its prompt.
"""

import heapq
import json
import sys
import time

import numpy as np

from semmoe.profiles.trace import RoutingTrace
from semmoe.runtime.engines.band import Band
from semmoe.runtime.engines.chooser import request_tokens
from semmoe.runtime.engines.plan_files import PlanFacts
from semmoe.runtime.engines.scorer import PlanScorer
from semmoe.solvers.make_plan import request_keys
from semmoe.solvers.plan import Plan
from semmoe.solvers.schedule.request_scorer import request_shares_BR
from semmoe.solvers.schedule.windows import assign_requests

BANDS, UNDER_WAY, WINDOW, SEED = (1.0, 1.1, 1.25, 1.5, float("inf")), (8, 16, 32, 128), 32, 0


def served(choose, tokens_B, steps_B, under_way: int, ranks: int) -> np.ndarray:
    """Rank of each request, int64 [B], when `under_way` run at once."""
    running: list[tuple[float, int, float]] = []
    load_R, rank_of_B, now = np.zeros(ranks), np.zeros(len(tokens_B), np.int64), 0.0
    for b, tokens in enumerate(tokens_B):
        while len(running) >= under_way:
            now, rank, done = heapq.heappop(running)
            load_R[rank] -= done
        rank_of_B[b] = rank = choose(b, load_R, tokens)
        load_R[rank] += tokens
        heapq.heappush(running, (now + steps_B[b], int(rank), tokens))
    return rank_of_B


def cost_of_a_score(vocabulary: int = 200_000, topics: int = 48, ranks: int = 64, length: int = 8_192) -> dict:
    """Milliseconds of processor time of a long prompt's scores, least of 30, and of gathering as many
    rows; ids of a Zipf law, and all alike."""
    draw = np.random.default_rng(0)
    tables = {
        "ids_V": np.arange(vocabulary, dtype=np.int32),
        "topic_VD": draw.random((vocabulary, topics), np.float32),
        "topic_DR": draw.random((topics, ranks), np.float32),
        "mean_V": draw.random(vocabulary, np.float32),
        "weight_VR": draw.random((vocabulary, ranks), np.float32),
    }
    experts_LRS = np.arange(ranks, dtype=np.int32).reshape(1, ranks, 1)
    facts = PlanFacts("large", "", {"num_experts": ranks}, experts_LRS, np.ones((1, ranks), np.int64), tables)
    scorer, table_VX = PlanScorer.of(facts), draw.random((vocabulary, topics + ranks), np.float32)

    def least_ms(call, drawn) -> float:
        seconds = []
        for _ in range(30):
            ids = drawn()
            begin = time.thread_time()
            call(ids)
            seconds.append(time.thread_time() - begin)
        return round(1e3 * min(seconds), 3)

    found: dict = {"ids": length, "vocabulary": vocabulary, "ranks": ranks}
    zipf = lambda: (draw.zipf(1.2, length) % vocabulary).astype(np.int64)  # noqa: E731
    for name, drawn in {"zipf": zipf, "alike": lambda: draw.integers(0, vocabulary, length)}.items():
        found[name] = {"score_ms": least_ms(scorer.scores, drawn)}
        found[name]["gather_ms"] = least_ms(lambda ids: table_VX.take(np.unique(ids), axis=0), drawn)
    return found


def main(plan_path: str, trace_path: str) -> dict:
    plan, trace = Plan.load(plan_path), RoutingTrace.open(trace_path)
    batch = trace.load(~np.isin(request_keys(trace.requests()), plan.fitted_keys))
    order = np.random.default_rng(SEED).permutation(batch.num_requests)
    scorer, ranks = PlanScorer.open(plan_path), plan.topology.num_ranks
    prompts = [batch.prompt(b) for b in order]
    begin = time.perf_counter()
    scores_BR = np.array([scorer.scores(ids) for ids in prompts])
    seconds = time.perf_counter() - begin
    shares_BR = request_shares_BR(batch, plan.placement.hosts_LER)[order]
    rows_B = np.diff(batch.starts_B1)[order].astype(float)
    new_B = rows_B + 1 - [len(ids) for ids in prompts]
    tokens_B = [request_tokens(len(ids), int(new)) for ids, new in zip(prompts, new_B, strict=True)]

    def row(name: str, under_way: int, rank_of_B: np.ndarray) -> dict:
        load_R = np.bincount(rank_of_B, rows_B, ranks)
        lar = np.average(shares_BR[np.arange(len(rank_of_B)), rank_of_B], weights=rows_B)
        found = {"rule": name, "under_way": under_way, "lar": round(float(lar), 4)}
        return found | {"tokens_max_mean": round(float(load_R.max() / load_R.mean()), 4)}

    rows = [
        row("in turn", 0, np.arange(len(prompts)) % ranks),
        row(f"windows of {WINDOW}", WINDOW, assign_requests(scores_BR, np.array(tokens_B), window=WINDOW)),
    ]
    for under_way in UNDER_WAY:
        for width in BANDS:
            band = Band(ranks, width)

            def choose(b: int, load_R: np.ndarray, tokens: float, band: Band = band) -> int:
                rank = band.choose(scores_BR[b], load_R, tokens=tokens).rank
                return rank if rank >= 0 else int(load_R.argmin())

            rows.append(row(f"band {width:g}", under_way, served(choose, tokens_B, new_B + 1, under_way, ranks)))
    return {
        "requests": len(prompts),
        "prompt_tokens": int(sum(map(len, prompts))),
        "microseconds_per_prompt": round(1e6 * seconds / len(prompts), 1),
        "long_prompt": cost_of_a_score(),
        "rows": rows,
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:3]), indent=1))
