"""`semmoe try`: from what a server wrote to a verdict for prefill and for decode."""

import os
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from semmoe.options import All, Force, Json, Seed, TimedPlacing, given, grouped, refuse_to_replace, replica_rule

if TYPE_CHECKING:
    from semmoe.profiles.trace import RoutingTrace
    from semmoe.solvers.make_plan import PlanOptions
    from semmoe.solvers.placement import Topology
    from semmoe.solvers.plan import Plan

FORMATS = {"sglang": "sglang", "vllm": "vllm", "trtllm": "trtllm", "vllm-ascend": "vllm"}  # of answers, by engine
NAMES = {"prompt": "prefill", "generated": "decode"}
HOLDOUT = 0.5


@grouped(first=("engine", "ranks", "nodes", "hardware", "output"), last=("seed", "force", "all_", "json_"))
def try_(
    responses: Annotated[
        list[str],
        typer.Argument(metavar="RESPONSES...", help="Files of answers that the engine wrote, or a trace directory."),
    ],
    ranks: Annotated[int, typer.Option(help="Ranks of the expert-parallel group.", min=1)],
    *,
    nodes: Annotated[int, typer.Option(help="Nodes that the ranks are spread over, R / N each.", min=1)] = 1,
    timing: TimedPlacing,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Also write a page: .html (one file), .md or .png."),
    ] = None,
    seed: Seed = 0,
    force: Force = False,
    all_: All = False,
    json_: Json = False,
) -> None:
    """Say from a server's answers whether placement is worth it, for prefill and decode apart:
    import, place for time, report.

    Example: semmoe try responses.jsonl.gz --engine sglang --ranks 8 --hardware h100 -o try.html
    """
    from semmoe.solvers.workers import compute_on_one_thread

    compute_on_one_thread()  # before anything imports numpy
    from semmoe.profiles.errors import InputError
    from semmoe.solvers.placement import Topology
    from semmoe.solvers.time.hardware import table
    from semmoe.terminal.decision import Shown, next_step
    from semmoe.terminal.tables import note, print_json

    engine = timing.engine
    if engine is None:
        raise typer.BadParameter("which engine wrote the answers?", param_hint="--engine")
    if engine not in table()["engines"]:
        raise InputError(f"--engine {engine}: known are {', '.join(table()['engines'])}")
    if timing.hardware is None and (unused := given(timing, but=("engine",))):
        raise typer.BadParameter(f"{unused[0]} needs --hardware: times are predicted for a machine")
    if output is not None:
        from semmoe.pages.page import check_page_target

        check_page_target(output)
        refuse_to_replace(output, force=force)
    with TemporaryDirectory(prefix="semmoe-try-") as folder:
        trace = _trace(responses, FORMATS[engine], Path(folder) / "t")
        phases = _phases(trace, timing.whose, timed=timing.hardware is not None)
        options = {phase: _options(trace, timing, phase, seed) for phase in phases}
        tried = _plans(trace, Topology(ranks, nodes), options, ", ".join(responses))
    found = {NAMES[phase]: plan.scores for phase, plan in tried.items() if plan.scores}
    for name, report in found.items():
        for line in report.time.notes if report.time else []:
            note(f"{name}: {line}")
    commands = _commands(responses, nodes, timing, tried)
    if json_:
        print_json({name: report.to_json() for name, report in found.items()})
    else:
        for name, report in found.items():
            print(f"{name[0].upper()}{name[1:]}\n")
            Shown(everything=all_, as_json=False).print(report)
            print()
    if output is not None:
        from semmoe.pages.page import write_page
        from semmoe.pages.tried import tried_page

        write_page(tried_page(found, commands), output)
        note(f"wrote {output} ({output.stat().st_size / 1e3:,.0f} kB)")
    next_step(*commands, as_json=json_)


def _trace(responses: list[str], kind: str, out: Path) -> "RoutingTrace":
    """The trace of one directory or URL, or of answers imported to `out`."""
    from semmoe.profiles.engines.imports import ImportOptions, import_trace
    from semmoe.profiles.trace import RoutingTrace
    from semmoe.terminal.tables import note

    if len(responses) == 1 and (Path(responses[0]).is_dir() or "://" in responses[0]):
        return RoutingTrace.open(responses[0])
    summary = import_trace(kind, [Path(file) for file in responses], out, ImportOptions(repetition="drop"))
    for line in summary.notes:
        note(line)
    note(f"read {summary.requests} requests, {summary.tokens} tokens, {summary.layers} layers")
    return RoutingTrace.open(out)


def _phases(trace: "RoutingTrace", asked: str | None, *, timed: bool) -> list[str]:
    """Phases to tell apart: the one that was asked for, else both; without times those that the
    trace holds tokens of."""
    from semmoe.profiles.split import phase_shares

    trace.require_tokens("semmoe try")
    if asked not in (None, "all"):
        return [asked]
    shares = phase_shares([trace])
    return [phase for phase in NAMES if timed or shares[phase]]


def _options(trace: "RoutingTrace", timing: TimedPlacing, phase: str, seed: int) -> "PlanOptions":
    """How the plan for a phase is made and scored: as the commands that are told do it, but
    without a second fit."""
    from semmoe.options import Phase
    from semmoe.profiles.split import counted_phase
    from semmoe.solvers.make_plan import PlanOptions
    from semmoe.solvers.place.replicas import OWN_RULE
    from semmoe.solvers.schedule.simulate import Setting

    timed = timing.hardware is not None
    return PlanOptions(
        holdout=HOLDOUT,
        refit=False,
        setting=Setting(seed=seed),
        time=replace(timing, phase=Phase(phase)).asked_here() if timed else None,
        phase=counted_phase([trace], phase, timed=timed),
        replica_choice=replica_rule(None, timing.engine) or OWN_RULE,
    )


def _plans(
    trace: "RoutingTrace", topology: "Topology", options: dict[str, "PlanOptions"], name: str
) -> dict[str, "Plan"]:
    """A plan for each phase, by a quick search. `name`: of the trace in their scores."""
    from semmoe.solvers.demands import Demands
    from semmoe.solvers.make_plan import make_plan, usual_stages
    from semmoe.terminal.progress import stages

    (seed,) = {asked.setting.seed for asked in options.values()}
    demands = Demands(seed=seed, effort="fast", processes=os.cpu_count() or 1)
    shape = demands, trace.info.num_experts, topology.num_ranks
    usual = {f"{phase}: {stage}": n for phase, o in options.items() for stage, n in usual_stages(o, *shape).items()}
    tried: dict[str, Plan] = {}
    with stages(usual=usual) as show:
        for phase, asked in options.items():

            def told(stage: str, done: int, total: int, phase: str = phase) -> None:
                show(f"{phase}: {stage}", done, total)

            plan = make_plan([trace], topology, demands, asked, progress=told)
            tried[phase] = replace(plan, scores=plan.scores and replace(plan.scores, trace=name))
    return tried


def _commands(responses: list[str], nodes: int, timing: TimedPlacing, tried: dict[str, "Plan"]) -> list[str]:
    """What to type to get the plans themselves."""
    from semmoe.pages.deployment import ENGINES, export_command
    from semmoe.terminal.text import quoted

    assert timing.engine is not None
    (engine,) = (e for e in ENGINES if e.kind == timing.engine)
    imported = not (len(responses) == 1 and Path(responses[0]).is_dir())
    trace = "t" if imported else quoted(responses[0])
    files = " ".join(quoted(file) for file in responses)
    lines = [f"semmoe trace --from {FORMATS[timing.engine]} {files} -o t"] if imported else []
    for phase, plan in tried.items():
        words = [f"semmoe place {trace} --ranks {plan.topology.num_ranks}"]
        words += [f"--nodes {nodes}"] if nodes > 1 else []
        words += [f"--hardware {quoted(timing.hardware)}"] if timing.hardware is not None else []
        words += [f"--engine {timing.engine} --phase {phase}"]
        lines.append(f"{' '.join(words)} -o plan-{NAMES[phase]}")
        name = NAMES[phase]
        lines.append(export_command(engine, plan.model, f"plan-{name}", f"{name}-{engine.file}"))
    return lines
