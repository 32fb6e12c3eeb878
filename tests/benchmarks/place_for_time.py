"""Predicted time of plans for time, plans for bytes and load packing, on the half of the requests that none saw. One JSON object.

    python tests/benchmarks/place_for_time.py TRACE [--ranks 8] [--nodes 8] [--settings nvlink,nics] [--replicas 1] [--bytes] [--even]
        [--split 0] [--layers 6]

Settings are those of docs/experiments.md, "Time": h100, 4096 prompt tokens a rank inside one node, on as many nodes as --nodes says, or
with two batches that overlap; 64 or 128 generated tokens, in DeepEP's normal and low-latency modes. `ratio`: over load packing with as
many slots, in the same batches. `excess`: activations of the busiest rank over the mean, less 1; `excess_ratio`: over load packing's.
--bytes also places at cap 1.05, --even for even activations alone. --split: seed of the halves; --layers: on so many of the layers.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from common.few_layers import few_layers

from semmoe.profiles.counts import RoutingProfile, profile_traces
from semmoe.profiles.trace import RoutingTrace
from semmoe.solvers.demands import Demands, Solved
from semmoe.solvers.deployment import Deployment
from semmoe.solvers.make_plan import split_requests
from semmoe.solvers.place.baselines import baselines
from semmoe.solvers.place.solve import solve_placement
from semmoe.solvers.placement import Placement, Topology
from semmoe.solvers.schedule.simulate import Setting
from semmoe.solvers.slots import Slots
from semmoe.solvers.time.balance import balance_layer
from semmoe.solvers.time.batches import pool_of
from semmoe.solvers.time.fit import fit_of
from semmoe.solvers.time.hardware import TimeAsked, costing_of
from semmoe.solvers.time.minimize import solve_for_time
from semmoe.solvers.time.predict import predict

PREFILL: dict[str, Any] = {"phase": "prompt", "tokens_per_rank": 4096, "backend": "deepep-normal"}
SETTINGS: dict[str, dict[str, Any]] = {
    "nvlink": PREFILL,
    "nics": PREFILL,
    "two-batch": {**PREFILL, "overlap": "two-batch", "other_us": 450.0},
    **{
        f"decode-{tokens}-{name}": {"phase": "generated", "tokens_per_rank": tokens, "backend": backend}
        for tokens in (64, 128)
        for name, backend in (("normal", "deepep-normal"), ("ll", "deepep-ll"))
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--nodes", type=int, default=8, help="of the setting nics")
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--replicas", type=int, default=0)
    parser.add_argument("--bytes", action="store_true")
    parser.add_argument("--even", action="store_true")
    parser.add_argument("--effort", default="default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", type=int, default=0)
    parser.add_argument("--layers", type=int, default=0)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        print(json.dumps(placed_and_timed(options, Path(folder))))


def even_placement(profile: RoutingProfile, packed: Placement, asked: TimeAsked, demands: Demands) -> Placement:
    """Load packing's experts swapped until the busiest rank of batches has the fewest activations, without copies."""
    num_ranks, info = packed.num_ranks, profile.info
    costing = costing_of(asked, info, Topology(num_ranks))
    fit = fit_of(pool_of(profile.sample, costing.phase), costing, num_ranks, demands)
    rank_of_LE = [
        balance_layer(
            fit.layer(profile.sample.expert_ids_TLK[:, layer], info.num_experts, 1).n_XE,
            hosts_ER.argmax(1),
            num_ranks,
            effort=demands.effort,
            seed=demands.seed,
        )
        for layer, hosts_ER in enumerate(packed.hosts_LER)
    ]
    return Solved.from_ranks(np.array(rank_of_LE), profile.load_LE, num_ranks).placement


def placed_and_timed(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    trace = RoutingTrace.open(options.trace)
    shape = costing_of(TimeAsked(hardware="h100"), trace.info, Topology(options.ranks)).shape
    sizes = (
        {"hidden_size": shape.hidden, "expert_size": shape.expert, "weights": shape.weights} if options.layers else {}
    )
    if options.layers:
        trace = few_layers(options.trace, work / "few", options.layers)
    (held_B,) = split_requests([trace], holdout=0.5, holdout_domains=[], seed=options.split)
    profile, batch = profile_traces([trace], [~held_B]), trace.load(held_B)
    found_by_bytes = {}
    if options.bytes:
        demands = Demands(replicas=options.replicas, seed=options.seed)
        found_by_bytes["bytes"] = solve_placement(profile, Topology(options.ranks), demands, method="semmoe").placement
    rows = []
    for name in options.settings.split(","):
        topology = Topology(options.ranks, options.nodes if name == "nics" else 1)
        asked = TimeAsked(hardware="h100", **sizes, **SETTINGS[name])
        demands = Demands(replicas=options.replicas, seed=options.seed, effort=options.effort)
        begun = time.process_time()
        solved = solve_for_time(profile, topology, demands, asked)
        seconds = time.process_time() - begun
        beside = baselines(profile.load_LE, topology, profile.info.n_group, slots=Slots.of(solved.placement))
        if options.even:
            beside["even"] = even_placement(profile, beside["load"], asked, demands)
        placements = {"plan": solved.placement, **beside, **found_by_bytes}
        deployed = {key: Deployment(placed, profile.load_LE, topology) for key, placed in placements.items()}
        report = predict(deployed, batch, trace.info.model, asked, setting=Setting(), against="load")
        load = report.row("load").us["total"]
        found = {
            key: {"us": r.us["total"], "ratio": r.us["total"] / load, "excess": r.imbalance["experts"] - 1}
            for key, r in ((key, report.row(key)) for key in placements)
        }
        assert report.saved is not None
        rest = {"saved": report.saved.to_json(), "cpu_s": seconds, "notes": solved.notes}
        rows.append(
            {"setting": name, "excess_ratio": found["plan"]["excess"] / found["load"]["excess"], **found, **rest}
        )
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    facts = {name: getattr(options, name) for name in ("ranks", "replicas", "seed", "split", "layers")}
    return {**facts, "settings": rows}


if __name__ == "__main__":
    main()
