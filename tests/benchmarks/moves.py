"""What re-placements under budgets of moves keep of a free re-placement's gain; prints one JSON object.

    python tests/benchmarks/moves.py GPT_OSS_TRACE V2_LITE_TRACE

The traces are `semmoe trace --from sglang` and `--from vllm` of two recorded models. Traffic shifts in seven ways at
4 and 8 ranks (subjects of gpt-oss: from science to all others; domains of v2-lite: from two to the third), and in six
it does not, or mildly (random halves of the subjects, random halves of the requests). The old placement is fitted on
the old traffic; the new traffic is halved by request, fitted on one half and scored on the other. `kept`: part of the
free re-placement's gain in the search's own measure (remote rows at random homes, and load above the cap), by share of
experts that move; every third layer. `decision`: the two-fold cross-fit inside the fitted half at 25 %.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from semmoe.profiles.counts import RoutingProfile, co_activation_EE
from semmoe.profiles.sample import select_requests
from semmoe.profiles.trace import RoutingTrace, TraceBatch, TraceInfo, concat_batches
from semmoe.solvers.demands import Demands
from semmoe.solvers.deployment import Deployment
from semmoe.solvers.evaluate.metrics import metrics_XL
from semmoe.solvers.evaluate.sums import deployment_sums
from semmoe.solvers.place.moves import count_moves
from semmoe.solvers.place.partition import EFFORTS, Problem, load_limits, partition
from semmoe.solvers.place.remote_gains import token_kinds
from semmoe.solvers.placement import Placement, Topology
from semmoe.solvers.replan.decision import decide, profile_of
from semmoe.solvers.replan.frontiers import Budget, search_frontiers
from semmoe.solvers.replan.tasks import NewTraffic
from semmoe.solvers.replan.worth import Worth

SCIENCE = (
    "physic chemis biolog math computer engineer astro electro genetic quantum mechan optics algebra machine_learning "
    "statistic matter gpqa virology anatomy"
).split()
BUDGETS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
FLOORS = {1 / 32: 0.37, 1 / 16: 0.52, 1 / 8: 0.70, 1 / 4: 0.88}
SHIFTED = [("stem", 4), ("stem", 8), ("v2:intent", 4), ("v2:intent", 8), ("v2:summary", 4), ("v2:summary", 8)]
SHIFTED += [("v2:translation", 8)]
UNSHIFTED = [(name, ranks) for name in ("a0", "c0", "c1") for ranks in (4, 8)]
EVERY = 3  # layers


class Shift(NamedTuple):
    """Old traffic, and new traffic in two halves."""

    old: RoutingProfile
    fit: RoutingProfile
    held_out: RoutingProfile


def traffic(path: str) -> tuple[TraceInfo, TraceBatch]:
    trace = RoutingTrace.open(path)
    batch, numbers = concat_batches(list(trace.batches()), trace.info), trace.info.model_layers[::EVERY]
    info = replace(trace.info, num_layers=len(numbers), model_layers=numbers)
    return info, replace(batch, expert_ids_TLK=np.ascontiguousarray(batch.expert_ids_TLK[:, ::EVERY]))


def shift(name: str, info: TraceInfo, batch: TraceBatch) -> Shift:
    """Requests of the old traffic, and halves of the new."""
    domains = np.array(batch.domains)
    if name.startswith("v2:"):
        new_B = domains == name.removeprefix("v2:")
    elif name == "stem":
        new_B = ~np.array([any(word in d.lower() for word in SCIENCE) for d in domains])
    else:
        units = np.unique(domains) if name.startswith("a") else np.arange(len(domains))
        chosen = np.random.default_rng([int(name[1:]), 3]).permutation(units)[: len(units) // 2]
        new_B = np.isin(domains if name.startswith("a") else units, chosen)
    fit_B = np.zeros(len(domains), bool)
    new = np.random.default_rng(5).permutation(np.flatnonzero(new_B))
    fit_B[new[: len(new) // 2]] = True
    empty_LEE = np.zeros((info.num_layers, info.num_experts, info.num_experts), np.int64)
    whole = RoutingProfile(info, batch.num_tokens, empty_LEE[:, 0], empty_LEE, batch)
    return Shift(*(profile_of(whole, select_requests(batch, b)) for b in (~new_B, fit_B, new_B & ~fit_B)))


def free_placement(profile: RoutingProfile, num_ranks: int) -> Placement:
    """`partition` at the default effort, layer by layer, homes at random."""
    ranks = []
    for layer in range(profile.info.num_layers):
        ids_TK, num_experts = profile.sample.expert_ids_TLK[:, layer], profile.info.num_experts
        kinds_XK, kind_T = token_kinds(ids_TK, num_experts)
        weight_X1 = np.bincount(kind_T).astype(np.float64)[:, None]
        load_JE = profile.load_LE[layer][None].astype(np.float64)
        nowhere_ER, limit_J = np.zeros((num_experts, num_ranks)), load_limits(load_JE, num_ranks, 1.05)
        pairs_EE = co_activation_EE(ids_TK, num_experts)
        problem = Problem(
            pairs_EE, kinds_XK, weight_X1.repeat(num_ranks, 1), nowhere_ER, np.eye(num_ranks), load_JE, limit_J
        )
        ranks.append(partition(problem, num_ranks, EFFORTS["default"], seed=0, contiguous=False))
    return Placement.from_ranks(np.stack(ranks), num_ranks)


def served(placement: Placement, profile: RoutingProfile, topology: Topology) -> tuple[float, float, float]:
    """Cost in remote rows per token, REM and load, mean over layers, on the profile's requests."""
    sums = deployment_sums(Deployment(placement, profile.load_LE, topology), profile.sample)
    metrics = metrics_XL(sums.resampled(np.ones((1, len(sums.tokens_G)))), topology, "per-rank")
    cost = float(Worth().cost_XL(metrics, profile.info.top_k).mean())
    return cost, float(metrics["rem"].mean()), float(metrics["load_imbalance"].mean())


def run(name: str, num_ranks: int, profiles: Shift, objective: str) -> dict[str, object]:
    """One row."""
    topology, demands = Topology(num_ranks), Demands(objective=objective)
    experts, num_layers = profiles.fit.info.num_experts, profiles.fit.info.num_layers
    old = free_placement(profiles.old, num_ranks)
    start = time.process_time()
    free = free_placement(profiles.fit, num_ranks)
    free_seconds = time.process_time() - start
    start = time.process_time()
    frontiers = search_frontiers(NewTraffic(profiles.fit, old, topology, demands, Worth(), experts), map)
    seconds = time.process_time() - start

    def replaced(profile: RoutingProfile, most: int = experts // 2):
        return search_frontiers(NewTraffic(profile, old, topology, demands, Worth(), most), map).within(Budget(0.25))

    deployed = Deployment(old, profiles.fit.load_LE, topology)
    decision = decide(profiles.fit, deployed, Worth(), 0.0, replaced, seed=0)
    was, then = served(old, profiles.held_out, topology), served(free, profiles.held_out, topology)
    kept, moved = {}, {}
    for share in BUDGETS:
        found = frontiers.within(Budget(share))
        kept[share] = (was[0] - served(found.placement, profiles.held_out, topology)[0]) / (was[0] - then[0])
        moved[share] = int(found.moved_L.sum())
    return {
        "shift": name,
        "ranks": num_ranks,
        "old_rem_load": [round(v, 2) for v in was[1:]],
        "free_rem_load": [round(v, 2) for v in then[1:]],
        "free_moved": round(float(count_moves(old, free, topology).per_layer_L.mean()) / experts, 2),
        "free_gain": round(was[0] - then[0], 2),
        "kept": {f"{100 * share:.4g}%": round(value, 2) for share, value in kept.items()},
        "moved": {f"{100 * share:.4g}%": round(value / num_layers / experts, 3) for share, value in moved.items()},
        "decision": [round(v, 3) for v in (decision.gain or 0, decision.lo or 0, decision.hi or 0)],
        "moves": decision.move,
        "seconds_per_layer": round(seconds / num_layers, 2),
        "free_seconds_per_layer": round(free_seconds / num_layers, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gpt_oss")
    parser.add_argument("v2_lite")
    parser.add_argument("--only", default="", help="rows whose name starts so")
    parser.add_argument("--objective", default="both")
    asked = parser.parse_args()
    traces = {"v2": traffic(asked.v2_lite), "gpt": traffic(asked.gpt_oss)}
    rows = []
    for name, ranks in SHIFTED + UNSHIFTED:
        if name.startswith(asked.only):
            info, batch = traces["v2" if name.startswith("v2") else "gpt"]
            rows.append(run(name, ranks, shift(name, info, batch), asked.objective))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    shifted = [row["kept"] for row in rows if (row["shift"], row["ranks"]) in SHIFTED]
    mean = {
        f"{100 * s:.4g}%": round(float(np.mean([kept[f"{100 * s:.4g}%"] for kept in shifted])), 3)
        for s in BUDGETS
        if shifted
    }
    floors = {f"{100 * share:.4g}%": value for share, value in FLOORS.items()}
    print(json.dumps({"rows": rows, "mean_kept_of_shifted": mean, "floors": floors}, indent=1))


if __name__ == "__main__":
    main()
