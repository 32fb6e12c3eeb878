"""A plan of a map that an engine runs today, so that it can be scored and compared."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from semmoe.profiles.counts import profile_traces
from semmoe.profiles.errors import InputError
from semmoe.profiles.split import phase_of
from semmoe.profiles.trace import RoutingTrace, hash_file
from semmoe.solvers.deployment import Deployment
from semmoe.solvers.evaluate.against import Against
from semmoe.solvers.evaluate.metrics import DISPATCH_KINDS
from semmoe.solvers.evaluate.score_plan import BETTER, score_placements
from semmoe.solvers.maps.origin import exported_from, sidecar_path
from semmoe.solvers.maps.read import read_placement
from semmoe.solvers.place.replicas import OWN_RULE, check_rule
from semmoe.solvers.placement import Topology
from semmoe.solvers.plan import ModelFacts, Plan
from semmoe.solvers.schedule.simulate import Setting


@dataclass(frozen=True)
class Served:
    """How an imported map is scored.

    Fields:
        dispatch: one of DISPATCH_KINDS.
        setting: of the simulated schedules; its seed also draws the sample.
        against: what the verdict holds the map against.
        replica_choice: the rule by which copies serve, one of REPLICA_RULES.
    """

    dispatch: str
    setting: Setting
    against: Against = BETTER
    replica_choice: str = OWN_RULE


def import_plan(
    traces: list[RoutingTrace],
    topology: Topology,
    *,
    kind: str,
    file: Path,
    served: Served,
    made_by: str,
) -> Plan:
    """A plan of the imported map, scored on all requests of the traces: none of them was used to
    make it.

    The exception is a map that `semmoe export` wrote from a plan for the same trace; a note of the
    plan says so.

    Parameters:
        traces: of one model, with routing per token.
        topology: the ranks that the map was made for.
        kind: one of KINDS.
        file: the map.
        served: how the engine serves, and what the map is scored against.
        made_by: the command, for the plan.

    Raises InputError as read_placement does, and for a trace of loads.
    """
    dispatch, setting, rule = served.dispatch, served.setting, check_rule(served.replica_choice)
    if dispatch not in DISPATCH_KINDS:
        raise InputError(f"dispatch {dispatch!r} is none of {', '.join(DISPATCH_KINDS)}")
    for trace in traces:
        trace.info.check_numbering(trace.path)
        trace.require_tokens("the score of an imported map")
    model = ModelFacts.of(traces[0].info)
    placement, notes_on_map = read_placement(kind, file, model, topology)
    profile = profile_traces(traces, seed=setting.seed)
    everything = [np.ones(trace.num_requests, bool) for trace in traces]
    scores = score_placements(
        Deployment(placement, profile.load_LE, topology, dispatch, replica_choice=rule),
        traces,
        everything,
        against=served.against,
        setting=setting,
    )
    num_requests = sum(trace.num_requests for trace in traces)
    fingerprints = [trace.fingerprint for trace in traces]
    notes = [
        f"the map of {file} was not made from this trace: all {num_requests} requests are scored; the load baseline is packed "
        "on the same requests, which flatters its balance"
    ]
    origin = exported_from(file)
    if origin is None:
        notes.append(
            f"{sidecar_path(file)} is about other bytes than those of {file}: where the map came from is not known"
        )
    elif set(origin["trace"].get("fingerprints", [])) & set(fingerprints):
        notes = [
            f"{file} was exported from a plan for this very trace: these scores are not held out, "
            "`semmoe report` on the plan has those that are"
        ]
    return Plan(
        placement=placement,
        topology=topology,
        model=model,
        method="imported",
        seed=setting.seed,
        dispatch=dispatch,
        load_LE=profile.load_LE,
        fitted_keys=np.empty(0, np.uint64),
        options={"import": kind, "sha256": hash_file(file)}
        | {"phase": phase_of(traces[0]), "replica_choice": rule}
        | ({"wasted_slots": placement.num_wasted} if placement.num_wasted else {}),
        trace={
            "fingerprints": fingerprints,
            "requests": num_requests,
            "tokens": sum(trace.num_tokens for trace in traces),
        },
        split={
            "holdout": 1.0,
            "holdout_domains": [],
            "seed": setting.seed,
            "held_out_requests": num_requests,
            "training_requests": 0,
            "refit": False,
        },
        scores=scores,
        notes=notes + notes_on_map,
        made_by=made_by,
    )
