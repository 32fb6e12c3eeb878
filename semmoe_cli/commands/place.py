"""`semmoe place`: traces in, plan out, with held-out scores."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from semmoe.commands.replan import Replacing, replace_plan
from semmoe.options import (
    AgainstOption,
    All,
    Dispatch,
    Effort,
    Expressible,
    Json,
    MapKind,
    Method,
    Minimize,
    Objective,
    ReplicaChoiceOption,
    Simulation,
    Spare,
    TimedPlacing,
    command_line,
    given,
    grouped,
    refuse_mixed,
    refuse_to_replace,
    replica_rule,
)

if TYPE_CHECKING:
    from semmoe.solvers.demands import Demands
    from semmoe.solvers.evaluate.against import Against
    from semmoe.solvers.make_plan import PlanOptions
    from semmoe.solvers.placement import Topology
    from semmoe.solvers.plan import Plan
    from semmoe.terminal.decision import Shown

# What an expert map is scored with too, or that changes no result.
AUTO = "auto"  # --load-cap, --lar-weight
FINE_WITH_IMPORT = ("dispatch", "effort", "processes")


@dataclass(frozen=True, kw_only=True)
class Network:
    """The ranks to place on, and the links between them."""

    ranks: Annotated[
        int | None, typer.Option(help="Ranks of the expert-parallel group; needed without --from-plan.", min=1)
    ] = None
    nodes: Annotated[int, typer.Option(help="Nodes that the ranks are spread over, R / N each.", min=1)] = 1
    topology: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Costs between ranks: a JSON matrix, or the text of `nvidia-smi topo -m`."),
    ] = None

    def read(self) -> "Topology":
        """The same as solvers read it."""
        from semmoe.solvers.placement import Topology
        from semmoe.solvers.topology import read_topology

        if self.ranks is None:
            raise typer.BadParameter("missing: only --from-plan tells the number of ranks", param_hint="--ranks")
        if self.topology is None:
            return Topology(self.ranks, self.nodes)
        return read_topology(self.topology, num_ranks=self.ranks, num_nodes=self.nodes)

    def refuse_other(self, old: "Plan") -> None:
        """Raise InputError where other ranks are asked for than the old plan's."""
        from semmoe.profiles.errors import InputError

        if self.topology is not None:
            refuse_mixed("--from-plan", ["--topology"])
        asked = {"ranks": self.ranks, "nodes": self.nodes if self.nodes > 1 else None}
        has = {"ranks": old.topology.num_ranks, "nodes": old.topology.num_nodes}
        for name, value in asked.items():
            if value not in (None, has[name]):
                raise InputError(f"--{name} {value}: the old plan is for {has[name]}, and a re-placement keeps them")


@dataclass(frozen=True, kw_only=True)
class Placing:
    """How to place, and which requests to learn from."""

    method: Annotated[Method, typer.Option(help="How to place.")] = Method.semmoe
    dispatch: Annotated[
        Dispatch, typer.Option(help="How your engine's all-to-all counts rows; decides what is optimised and compared.")
    ] = Dispatch.per_rank
    holdout: Annotated[float, typer.Option(help="Share of the requests to score on and not to learn from.")] = 0.2
    holdout_domain: Annotated[
        list[str] | None,
        typer.Option(
            metavar="D", help="Hold out all requests of this domain, or of those that begin so; may be repeated."
        ),
    ] = None
    load_cap: Annotated[
        str,
        typer.Option(
            metavar="CAP|auto",
            help="Most expert load of a rank over the mean, on the fitted requests; auto: by predicted time, with --minimize bytes.",
        ),
    ] = "1.05"
    refit: Annotated[bool, typer.Option(help="After scoring, fit the written plan on all requests.")] = True
    objective: Annotated[
        Objective, typer.Option(help="Schedules to place for: tokens (tp), requests (dp), or both.")
    ] = Objective.both
    lar_weight: Annotated[
        str,
        typer.Option(
            metavar="W|auto",
            help="Remote ranks that one more local activation per token is worth; auto: by predicted time, with --minimize bytes.",
        ),
    ] = "0.0"
    slots: Annotated[
        int,
        typer.Option(metavar="S", help="Expert slots of each rank; ceil(E / R) otherwise.", min=0, show_default=False),
    ] = 0
    replicas: Annotated[int, typer.Option(metavar="X", help="Expert slots of each rank beyond ceil(E / R).", min=0)] = 0
    redundant: Annotated[
        int | None,
        typer.Option(metavar="N", help="Copies of experts in all, as engines count them; E + N divides over R.", min=0),
    ] = None
    spare: Annotated[
        Spare, typer.Option(help="Slots beyond one for each expert: filled with copies, or left empty.")
    ] = Spare.copies
    robust: Annotated[
        int,
        typer.Option(
            metavar="K",
            help="Keep the load cap in each of K resamples of the requests too, so that more of it stays on others.",
            min=0,
        ),
    ] = 0
    expressible: Annotated[
        Expressible | None,
        typer.Option(help="permutation: only placements that a permuted checkpoint of a grouped model can express."),
    ] = None
    minimize: Annotated[
        Minimize | None,
        typer.Option(
            help="What to place for: the predicted time, where --hardware is given, or bytes under --load-cap."
        ),
    ] = None
    effort: Annotated[Effort, typer.Option(help="How long to search.")] = Effort.default
    processes: Annotated[
        int | None, typer.Option(help="Processes to place layers in; the result does not depend on it.", min=1)
    ] = None
    certify: Annotated[
        bool, typer.Option("--certify", help="Bound what any placement could reach; print and store the gap.")
    ] = False

    def demands(self, seed: int) -> "Demands":
        """The same as solvers read it."""
        from semmoe.solvers.demands import Demands

        return Demands(
            load_cap=self._number("load_cap", 1.05),
            seed=seed,
            dispatch=self.dispatch.value,
            objective=self.objective.value,
            lar_weight=self._number("lar_weight", 0.0),
            replicas=self.replicas,
            slots=self.slots,
            redundant=self.redundant,
            spare=self.spare.value,
            robust=self.robust,
            expressible=self.expressible and self.expressible.value,
            effort=self.effort.value,
            processes=self.processes or os.cpu_count() or 1,
        )

    def _number(self, name: str, first: float) -> float:
        """The number of an option; `first` where it is chosen later."""
        text = getattr(self, name)
        if text == AUTO:
            return first
        try:
            return float(text)
        except ValueError:
            option = f"--{name.replace('_', '-')}"
            raise typer.BadParameter(f"{text!r} is no number, nor auto", param_hint=option) from None

    def options(self, simulation: Simulation, timing: TimedPlacing, against: "Against", made_by: str) -> "PlanOptions":
        """The rest, as solvers read it."""
        from semmoe.solvers.make_plan import PlanOptions

        return PlanOptions(
            method=self.method.value,
            holdout=self.holdout,
            holdout_domains=self.holdout_domain or [],
            refit=self.refit,
            certify=self.certify,
            setting=simulation.setting(),
            against=against,
            made_by=made_by,
            time=timing.asked_here(),
            minimize=self.minimize.value if self.minimize else "",
            auto=tuple(name for name in ("load_cap", "lar_weight") if getattr(self, name) == AUTO),
        )


@dataclass(frozen=True, kw_only=True)
class Written:
    """What the plan is called, and whether it may replace another."""

    name: Annotated[str, typer.Option(metavar="MODEL", help="Name of the model, where the trace does not know it.")] = (
        ""
    )
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Replace PLAN where it is a plan already; with --from-plan, move though no gain is shown."
        ),
    ] = False

    def check(self, output: Path) -> None:
        """Raise InputError where the plan cannot be written, before anything is computed."""
        from semmoe.solvers.plan import check_plan_target

        check_plan_target(output)
        refuse_to_replace(output, force=self.force)

    def check_name(self, known: str) -> None:
        """Raise InputError where the trace knows another name of its model."""
        from semmoe.profiles.errors import InputError, model_name

        if self.name and model_name(known) not in ("", self.name):
            raise InputError(f"--name {self.name}: the trace is of {known}")

    def named(self, plan: "Plan") -> "Plan":
        """The plan with the name that was given."""
        if not self.name:
            return plan
        scores = plan.scores and replace(plan.scores, model=self.name)
        return replace(plan, model=replace(plan.model, model=self.name), scores=scores)


@grouped(first=("ranks", "output"), last=("seed", "json_"))
def place(
    traces: Annotated[
        list[str], typer.Argument(metavar="TRACE...", help="Traces of one model (directories or fsspec URLs).")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="PLAN", help="Plan directory to write.")],
    *,
    network: Network,
    placing: Placing,
    replacing: Replacing,
    simulation: Simulation,
    timing: TimedPlacing,
    replica_choice: ReplicaChoiceOption = None,
    against: AgainstOption = None,
    import_: Annotated[
        tuple[MapKind, Path] | None,
        typer.Option(
            "--import",
            metavar="KIND FILE",
            help="Score an engine's expert map instead: no method, nothing held out or fitted.",
        ),
    ] = None,
    written: Written,
    all_: All = False,
    json_: Json = False,
) -> None:
    """Place the experts of a traced model on ranks, and score it on held-out requests.

    Example: semmoe place t --ranks 4 --method metis -o p; semmoe place t2 --from-plan p -o p2
    """
    from semmoe.solvers.workers import compute_on_one_thread

    compute_on_one_thread()  # before anything imports numpy
    from semmoe.profiles.split import counted_phase, only_phase
    from semmoe.profiles.trace import RoutingTrace
    from semmoe.solvers.evaluate.against import Against, read_against
    from semmoe.solvers.place.replicas import OWN_RULE
    from semmoe.solvers.plan import ModelFacts
    from semmoe.terminal.decision import Shown
    from semmoe.terminal.tables import note, note_unchecked

    written.check(output)
    if replacing.from_plan is not None:
        refuse_mixed("--from-plan", given(import_=import_, replica_choice=replica_choice, against=against))
        if timing.hardware is None:
            refuse_mixed("--from-plan without --hardware", given(timing))
        replan, made_by = replacing.read(written.force), command_line(output, replacing.from_plan, *traces)
        options = placing.options(simulation, timing, Against(), made_by)
        network.refuse_other(replan.old)
        shown = Shown(everything=all_, as_json=json_)
        replace_plan(traces, output, replan, placing.demands(simulation.seed), options, shown)
        return
    refuse_mixed("a placement without --from-plan", given(replacing))
    if import_ is not None and (unused := given(placing, but=FINE_WITH_IMPORT)):
        note(f"--import takes the map as it is: {', '.join(unused)} has no use there")
    opened, links = [RoutingTrace.open(path) for path in traces], network.read()
    written.check_name(opened[0].info.model)
    held = read_against(against, ModelFacts.of(opened[0].info), links)
    named = [Path(against)] if held.deployment and against else []
    whose = counted_phase(opened, timing.whose or "all", timed=timing.hardware is not None)
    rule = replica_rule(replica_choice, timing.engine) or OWN_RULE
    if import_ is not None:
        from semmoe.solvers.maps.import_plan import Served, import_plan

        kind, file = import_
        plan = import_plan(
            [only_phase(trace, whose) for trace in opened],
            links,
            kind=kind.value,
            file=file,
            served=Served(placing.dispatch.value, simulation.setting(), held, rule),
            made_by=command_line(output, file, *named, *traces),
        )
    else:
        from semmoe.solvers.make_plan import make_plan, usual_stages
        from semmoe.terminal.progress import stages

        files = (output, network.topology or output, *named, *traces)
        options = placing.options(simulation, timing, held, command_line(*files))
        options = replace(options, phase=whose, replica_choice=rule)
        demands = placing.demands(simulation.seed)
        info = opened[0].info
        num_ids = sum(trace.num_tokens for trace in opened) * info.num_layers * info.top_k
        usual = usual_stages(options, demands, info.num_experts, links.num_ranks, num_ids)
        with stages(usual=usual) as show:
            plan = make_plan(opened, links, demands, options, progress=show)
    plan = written.named(plan)
    plan.save(output)
    note_unchecked(*opened)
    timed = plan.scores.time if plan.scores else None
    for line in [*plan.notes, *(timed.notes if timed else [])]:
        note(line)
    placement = plan.placement
    note(
        f"wrote {output} ({placement.num_layers} layers x {placement.slots_per_rank} slots on {placement.num_ranks} ranks)"
    )
    _print(plan, output, traces, timing.engine, Shown(everything=all_, as_json=json_))


def _print(plan: "Plan", output: Path, traces: list[str], engine: str | None, shown: "Shown") -> None:
    """What a plan is worth, and what to do with it."""
    from semmoe.pages.deployment import deploy_lines
    from semmoe.solvers.evaluate.decision import decide
    from semmoe.terminal.decision import next_step
    from semmoe.terminal.tables import print_balance
    from semmoe.terminal.text import quoted

    if plan.scores is None:
        print_balance(plan.options["balance"], {"plan": str(output), "trace": ", ".join(traces)}, as_json=shown.as_json)
    else:
        shown.print(replace(plan.scores, plan=str(output), trace=", ".join(traces)))
    if plan.scores and plan.scores.certificate and not shown.as_json:
        from semmoe.pages.on_request import certified
        from semmoe.pages.page import print_section

        print_section(certified(plan.scores.certificate))
    where = quoted(str(output))
    report = [f"semmoe report {where} {quoted(traces[0])} -o report.html"] if plan.scores else []
    useless = plan.scores is not None and decide(plan.scores).level == "bad"
    next_step(*report, *([] if useless else deploy_lines(plan, where, engine)), as_json=shown.as_json)
