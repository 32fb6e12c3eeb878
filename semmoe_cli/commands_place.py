"""`semmoe place`: traces in, plan out, with held-out scores."""

from pathlib import Path
from typing import Annotated

import typer

from semmoe_cli.commands_export import Kind
from semmoe_cli.options import Dispatch, Json, Method, Seed, command_line


def place(
    traces: Annotated[
        list[str], typer.Argument(metavar="TRACE...", help="Traces of one model (directories or fsspec URLs).")
    ],
    ranks: Annotated[int, typer.Option(help="Ranks of the expert-parallel group.", min=1)],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="PLAN", help="Plan directory to write.")],
    nodes: Annotated[int, typer.Option(help="Nodes that the ranks are spread over, R / N each.", min=1)] = 1,
    method: Annotated[Method, typer.Option(help="How to place.")] = Method.metis,
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
    from profiles.trace import RoutingTrace
    from semmoe_cli.report import note, print_report
    from solvers.placement import Topology
    from solvers.plan import check_plan_target
    from solvers.planning import make_plan

    check_plan_target(output)
    opened, topology = [RoutingTrace.open(path) for path in traces], Topology(ranks, nodes)
    if import_ is not None:
        from solvers.import_map import import_plan

        kind, file = import_
        made_by = command_line(output, file, *traces)
        plan = import_plan(
            opened, topology, kind=kind.value, file=file, dispatch=dispatch.value, seed=seed, made_by=made_by
        )
    else:
        plan = make_plan(
            opened,
            topology,
            method=method.value,
            dispatch=dispatch.value,
            holdout=holdout,
            holdout_domains=holdout_domain or [],
            load_cap=load_cap,
            refit=refit,
            seed=seed,
            made_by=command_line(output, *traces),
        )
    plan.save(output)
    for line in plan.notes:
        note(line)
    print_report({**plan.scores, "plan": str(output), "trace": ", ".join(traces)}, as_json=json_)
    note(
        f"wrote {output} ({plan.placement.num_layers} layers x {plan.placement.slots_per_rank} slots on {ranks} ranks)"
    )
