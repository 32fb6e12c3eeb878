"""What `import semmoe` offers: a few lines each over the functions that the commands call.

`semmoe` itself imports this file when a name is first asked for. Nothing here imports torch. Notes
that a command prints on stderr go to the logger "semmoe".

Shape letters: B requests, T tokens, R ranks.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from semmoe.profiles.engines.imports import ImportOptions
from semmoe.profiles.engines.imports import import_trace as import_files
from semmoe.profiles.errors import InputError
from semmoe.profiles.progress import Stages, unshown_stages
from semmoe.profiles.trace import RoutingTrace
from semmoe.solvers.demands import Demands
from semmoe.solvers.evaluate.compare import Comparison, compare_plans
from semmoe.solvers.evaluate.report import Report
from semmoe.solvers.make_plan import PlanOptions, make_plan, score_plan
from semmoe.solvers.maps.write import MapOptions, write_map
from semmoe.solvers.placement import Placement, Topology
from semmoe.solvers.plan import Plan
from semmoe.solvers.replan.curve import gain_curve
from semmoe.solvers.schedule.request_scorer import RequestScorer
from semmoe.solvers.schedule.simulate import Setting
from semmoe.solvers.topology import read_topology

__all__ = [
    "Comparison",
    "Demands",
    "ImportOptions",
    "InputError",
    "MapOptions",
    "Placement",
    "Plan",
    "PlanOptions",
    "Report",
    "RequestScorer",
    "RoutingTrace",
    "Setting",
    "Topology",
    "compare",
    "export",
    "import_trace",
    "open_trace",
    "place",
    "read_plan",
    "read_topology",
    "request_scorer",
    "score",
]

LOG = logging.getLogger("semmoe")


def open_trace(path: str | Path) -> RoutingTrace:
    """A trace opened for reading; its routing is read when it is asked for.

    Parameters:
        path: directory of a trace, or a URL that fsspec knows (hf://, s3://).

    Returns the `RoutingTrace`. Raises InputError where there is none, or it is not finished.
    Source: profiles/trace.py; docs/formats.md, "trace".
    """
    return RoutingTrace.open(path)


def import_trace(
    kind: str,
    files: Iterable[str | Path],
    output: str | Path,
    options: ImportOptions = ImportOptions(),
) -> RoutingTrace:
    """The trace that a serving engine's files make, written to a new directory.

    Parameters:
        kind: "sglang", "vllm", "sglang-recorder", "trtllm", "megatron" or "eplb".
        files: what the engine wrote; .gz may stay packed.
        output: directory of the trace; it must not be there, unless `options.resume`.
        options: the model's configuration, and what is imported.

    Returns the `RoutingTrace`; what was left out is told to the logger "semmoe". Raises InputError
    with file, line and value for what cannot be read. Reading .pt files needs torch. Source:
    profiles/engines; docs/engines.md.
    """
    summary = import_files(kind, [Path(file) for file in files], Path(output), options)
    _tell(summary.notes)
    _tell(f"left out {count} {reason}" for reason, count in summary.dropped.items())
    return open_trace(output)


def place(
    traces: RoutingTrace | Sequence[RoutingTrace],
    ranks: int | Topology,
    demands: Demands = Demands(),
    options: PlanOptions = PlanOptions(),
    *,
    progress: Stages = unshown_stages,
) -> Plan:
    """A plan: experts placed on ranks, with schedules and scores on held-out requests.

    Parameters:
        traces: of one model, with routing per token.
        ranks: of the expert-parallel group; a `Topology` for several nodes or costs between ranks.
        demands: what the placement is asked for. With `processes` above 1, a program that calls
            this needs `if __name__ == "__main__":`, as workers import it.
        options: method, held-out requests, and how schedules are simulated.
        progress: told (stage, steps done, steps in all).

    Returns the `Plan`: `plan.placement.experts_LRS` is int32 [L, R, S], `plan.scores` the `Report`.
    It is written with `plan.save(path)`. Raises InputError where the model, the ranks or the
    demands do not fit each other, or the traces have nothing to hold out. The same bytes as
    `semmoe place` need OMP_NUM_THREADS=1 before numpy is imported. Source: solvers/make_plan.py,
    solvers/place; arXiv 2503.04398 and docs/method.md.
    """
    several = [traces] if isinstance(traces, RoutingTrace) else list(traces)
    if not several:
        raise InputError("no trace to place from")
    topology = Topology(ranks) if isinstance(ranks, int) else ranks
    return make_plan(several, topology, demands, options, progress=progress)


def read_plan(path: str | Path) -> Plan:
    """A plan from its directory; `Plan.save` writes one.

    Parameters:
        path: directory that `semmoe place` or `Plan.save` wrote.

    Returns the `Plan`. Raises InputError where it is none, or damaged. Source: solvers/plan.py;
    docs/formats.md, "plan".
    """
    return Plan.load(path)


def score(plan: Plan, trace: RoutingTrace, setting: Setting = Setting()) -> Report:
    """The report of a plan on a trace, beside what engines do without one.

    Parameters:
        plan: a plan for the trace's model.
        trace: requests to score on; those that the plan was fitted on are left out.
        setting: how schedules are simulated.

    Returns the `Report`: `report.rows` hold the metrics, means over layers. Where every request of
    the trace was fitted on, it is the plan's own report on requests that were held out then; notes
    on that go to the logger "semmoe". Raises InputError where the trace is of another model, or
    holds nothing to score on. Source: solvers/evaluate; docs/method.md says what the metrics are.
    """
    report, notes = score_plan(plan, trace, setting=setting)
    _tell(notes)
    return report


def compare(
    plans: Mapping[str, Plan],
    trace: RoutingTrace,
    setting: Setting = Setting(),
    *,
    bytes_per_expert: int = 0,
) -> Comparison:
    """Plans side by side on requests that none of them saw, and the experts to move between them.

    Parameters:
        plans: two or more of one model, by name; the first is what the others are held against.
        trace: requests to score on.
        setting: how schedules are simulated.
        bytes_per_expert: of one expert's weights at one layer; 0 where it does not matter.

    Returns the `Comparison`; notes go to the logger "semmoe". Raises InputError where plans and
    trace are of different models, or no request is left to compare on. Source:
    solvers/evaluate/compare.py.
    """
    if len(plans) < 2:
        raise InputError(f"{len(plans)} plans to compare, expected two or more")
    comparison, notes = compare_plans(dict(plans), trace, bytes_per_expert=bytes_per_expert, setting=setting)
    _tell(notes)
    if len(plans) == 2:
        return replace(comparison, curve=gain_curve(dict(plans), trace, seed=setting.seed))
    return comparison


def export(plan: Plan, kind: str, output: str | Path, options: MapOptions = MapOptions()) -> list[str]:
    """Write the expert map that a serving engine reads, and FILE.semmoe.json beside it; or the
    directory that a plug-in inside the engine reads.

    Parameters:
        plan: the placement and its model.
        kind: "sglang", "trtllm", "vllm", "vllm-ascend" or "eplb"; "vllm-plugin" or "sglang-plugin".
        output: file to write, of a plug-in a directory; its ending decides the container of eplb
            tables.
        options: what the map depends on beside the plan.

    Returns lines that say how to start the engine. Raises InputError where the engine could not use
    the plan, or the file is there and is no map of semmoe's. Writing a .pt file needs torch.
    Source: solvers/maps; docs/engines.md.
    """
    from semmoe.runtime.engines.write import KINDS, write_plugin_directory

    if kind in KINDS:
        return write_plugin_directory(plan, kind, Path(output), made_by=options.made_by)
    return write_map(plan, kind, Path(output), options)


def request_scorer(plan: Plan) -> RequestScorer:
    """What says, from a prompt alone, on which rank a request should live (Attention-DP).

    Parameters:
        plan: made from traces with token ids.

    Returns the `RequestScorer`: `scores_BR(prompts)` takes B arrays of token ids and gives float64
    [B, R], the predicted share of each request's activations on each rank, less the average
    request's. Raises InputError where the plan scores no requests. Source:
    solvers/schedule/request_scorer.py; docs/method.md.
    """
    if (scorer := plan.request_scorer) is None:
        raise InputError("the plan scores no requests: its traces had no token ids, or it was made without a schedule")
    return scorer


def _tell(notes: Iterable[str]) -> None:
    for note in notes:
        LOG.info(note)
