"""Ranks that do not divide the experts, and ranks that outnumber them: remote ranks and load on held-out requests.

    python tests/benchmarks/slots.py TRACE --ranks 5,6,7,12,20,40 [--redundant N] [--layers 4]

For each number of ranks: semmoe, METIS (best of 20, copies in spare slots chosen by the same rule) and EPLB's packing, all
with ceil(E / R) slots a rank or as many as `--redundant` asks for; tokens at random homes, copies by our replica rule.
Half of the requests are fitted, the other half is scored. `--layers` takes so many layers, spread over the model. Prints
one JSON object; `load` is the busiest rank over the mean at the worst layer, fitted and held out.
"""

import argparse
import json
import os
import sys
from dataclasses import replace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from semmoe.profiles.counts import RoutingProfile, profile_split
from semmoe.profiles.split import split_requests
from semmoe.profiles.trace import RoutingTrace, TraceBatch
from semmoe.solvers.demands import Demands
from semmoe.solvers.deployment import Deployment
from semmoe.solvers.evaluate.sums import deployment_sums
from semmoe.solvers.place.solve import solve_placement
from semmoe.solvers.placement import Placement, Topology


def some_layers(profile: RoutingProfile, layers: list[int]) -> RoutingProfile:
    info = replace(profile.info, num_layers=len(layers), model_layers=tuple(layers))
    sample = replace(profile.sample, expert_ids_TLK=profile.sample.expert_ids_TLK[:, layers])
    counts = profile.load_LE[layers], profile.co_activation_LEE[layers]
    return RoutingProfile(info, profile.num_tokens, *counts, sample)


def scores(placement: Placement, fitted: RoutingProfile, held_out: TraceBatch, topology: Topology) -> dict[str, float]:
    deployment = Deployment(placement, fitted.load_LE, topology)
    loads = {}
    for name, batch in (("load_fitted", fitted.sample), ("load", held_out)):
        sums = deployment_sums(deployment, batch)
        load_LR = sums.load_GLR.sum(axis=0)
        loads[name] = round(float((load_LR.max(axis=1) / load_LR.mean(axis=1)).max()), 3)
    rem = float(sums.remote_ranks_GL.sum()) / (held_out.num_tokens * placement.num_layers)
    return {"rem": round(rem, 4), **loads}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("--ranks", default="5,6,7,12,20,40")
    parser.add_argument("--redundant", type=int)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--effort", default="default")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    trace = RoutingTrace.open(a.trace)
    held_out = split_requests([trace], holdout=0.5, holdout_domains=[], seed=a.seed)
    profile, rest, _ = profile_split([trace], held_out, seed=a.seed)
    layers = np.unique(np.linspace(0, trace.info.num_layers - 1, a.layers).astype(int)).tolist()
    fitted, scored = some_layers(profile, layers), some_layers(rest, layers).sample
    result: dict[str, object] = {"arguments": vars(a), "layers": layers}
    for ranks in map(int, a.ranks.split(",")):
        topology = Topology(ranks)
        demands = Demands(seed=a.seed, redundant=a.redundant, objective="tp", effort=a.effort)
        found = {}
        for method in ("semmoe", "metis", "load"):
            solved = solve_placement(fitted, topology, demands, method=method)
            found[method] = scores(solved.placement, fitted, scored, topology)
        result[f"{ranks} ranks, {solved.placement.slots_per_rank} slots"] = found
        print(ranks, found, flush=True, file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
