"""`semmoe place`: traces in, plan out, with held-out scores."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from semmoe.commands.export import Kind
from semmoe.options import (
    BatchTokens,
    Dispatch,
    Effort,
    Expressible,
    Json,
    Method,
    Objective,
    Seed,
    Window,
    command_line,
    given,
)


def place(
    traces: Annotated[
        list[str], typer.Argument(metavar="TRACE...", help="Traces of one model (directories or fsspec URLs).")
    ],
    ranks: Annotated[int, typer.Option(help="Ranks of the expert-parallel group.", min=1)],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="PLAN", help="Plan directory to write.")],
    nodes: Annotated[int, typer.Option(help="Nodes that the ranks are spread over, R / N each.", min=1)] = 1,
    topology: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Costs between ranks: a JSON matrix, or the text of `nvidia-smi topo -m`."),
    ] = None,
    method: Annotated[Method, typer.Option(help="How to place.")] = Method.semmoe,
    dispatch: Annotated[
        Dispatch, typer.Option(help="How your engine's all-to-all counts rows; decides what is optimised and compared.")
    ] = Dispatch.per_rank,
    holdout: Annotated[float, typer.Option(help="Share of the requests to score on and not to learn from.")] = 0.2,
    holdout_domain: Annotated[
        list[str] | None,
        typer.Option(metavar="D", help="Hold out all requests of this domain instead; may be repeated."),
    ] = None,
    load_cap: Annotated[
        float, typer.Option(help="Most expert load of a rank over the mean, on the fitted requests.")
    ] = 1.05,
    refit: Annotated[bool, typer.Option(help="After scoring, fit the written plan on all requests.")] = True,
    objective: Annotated[
        Objective, typer.Option(help="Schedules to place for: tokens (tp), requests (dp), or both.")
    ] = Objective.both,
    lar_weight: Annotated[
        float, typer.Option(help="Remote ranks that one more local activation per token is worth.", min=0)
    ] = 0.0,
    replicas: Annotated[int, typer.Option(metavar="S", help="Extra expert slots per rank.", min=0)] = 0,
    robust: Annotated[
        int, typer.Option(metavar="K", help="Keep the load cap within each of K clusters of requests.", min=0)
    ] = 0,
    expressible: Annotated[
        Expressible | None,
        typer.Option(help="permutation: only placements that a permuted checkpoint of a grouped model can express."),
    ] = None,
    effort: Annotated[Effort, typer.Option(help="How long to search.")] = Effort.default,
    processes: Annotated[
        int | None, typer.Option(help="Processes to place layers in; the result does not depend on it.", min=1)
    ] = None,
    certify: Annotated[
        bool, typer.Option("--certify", help="Bound what any placement could reach; print and store the gap.")
    ] = False,
    batch_tokens: BatchTokens = 512,
    window: Window = 256,
    import_: Annotated[
        tuple[Kind, Path] | None,
        typer.Option(
            "--import",
            metavar="KIND FILE",
            help="Score an engine's expert map instead: no method, nothing held out or fitted.",
        ),
    ] = None,
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Place the experts of a traced model on ranks, and score it on held-out requests.

    Example: semmoe place t --ranks 4 --method metis -o p
    """
    from semmoe.solvers.workers import compute_on_one_thread

    compute_on_one_thread()  # before anything imports numpy
    from semmoe.profiles.trace import RoutingTrace
    from semmoe.solvers.demands import Demands
    from semmoe.solvers.make_plan import PlanOptions, make_plan
    from semmoe.solvers.placement import Topology
    from semmoe.solvers.plan import check_plan_target
    from semmoe.solvers.schedule.simulate import Setting
    from semmoe.solvers.topology import read_topology
    from semmoe.terminal.progress import stages
    from semmoe.terminal.tables import note, print_report, print_section

    check_plan_target(output)
    setting = Setting(batch_tokens, window, seed)
    if import_ is not None:
        unused = given(
            method=method is not Method.semmoe,
            holdout=holdout != 0.2,
            holdout_domain=bool(holdout_domain),
            load_cap=load_cap != 1.05,
            no_refit=not refit,
            objective=objective is not Objective.both,
            lar_weight=lar_weight,
            replicas=replicas,
            robust=robust,
            expressible=expressible,
            certify=certify,
        )
        if unused:
            note(f"--import takes the map as it is: {', '.join(unused)} has no use there")
    opened = [RoutingTrace.open(path) for path in traces]
    links = read_topology(topology, num_ranks=ranks, num_nodes=nodes) if topology else Topology(ranks, nodes)
    if import_ is not None:
        from semmoe.solvers.maps.import_plan import import_plan

        kind, file = import_
        made_by = command_line(output, file, *traces)
        plan = import_plan(
            opened, links, kind=kind.value, file=file, dispatch=dispatch.value, setting=setting, made_by=made_by
        )
    else:
        with stages() as show:
            plan = make_plan(
                opened,
                links,
                Demands(
                    load_cap=load_cap,
                    seed=seed,
                    dispatch=dispatch.value,
                    objective=objective.value,
                    lar_weight=lar_weight,
                    replicas=replicas,
                    robust=robust,
                    expressible=expressible and expressible.value,
                    effort=effort.value,
                    processes=processes or os.cpu_count() or 1,
                ),
                PlanOptions(
                    method=method.value,
                    holdout=holdout,
                    holdout_domains=holdout_domain or [],
                    refit=refit,
                    certify=certify,
                    setting=setting,
                    made_by=command_line(output, topology or output, *traces),
                ),
                progress=show,
            )
    plan.save(output)
    for line in plan.notes:
        note(line)
    assert plan.scores is not None, "a plan that was just made has its scores"
    print_report(replace(plan.scores, plan=str(output), trace=", ".join(traces)), as_json=json_)
    if plan.scores.certificate and not json_:
        from semmoe.pages.on_request import certified

        print_section(certified(plan.scores.certificate))
    note(
        f"wrote {output} ({plan.placement.num_layers} layers x {plan.placement.slots_per_rank} slots on {ranks} ranks)"
    )
