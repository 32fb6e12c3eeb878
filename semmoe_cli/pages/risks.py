"""What to do with a plan, and what could go wrong: the two parts of a page between its first screen
and the evidence.

Heavy modules are imported inside.
"""

from typing import TYPE_CHECKING

from semmoe.pages.deployment import deploy_lines, deployment
from semmoe.pages.page import Block, Commands, Grid, Section, Text
from semmoe.profiles.errors import model_name
from semmoe.terminal.text import quoted

if TYPE_CHECKING:
    from semmoe.pages.plan_report import PlanReport
    from semmoe.solvers.evaluate.decision import Decision

NEXT, RISKS, EVIDENCE, OTHERS = "Do this next", "What do I risk", "Evidence", "Other engines"
PLUGINS = ("vllm", "sglang")


def engine_of(about: "PlanReport") -> str:
    """The engine that the report or the plan names; "" where neither does."""
    from semmoe.pages.deployment import ENGINES

    kinds = {engine.kind for engine in ENGINES}
    named = (about.report.time.engine if about.report.time else "", about.report.replica_choice)
    return next((name for name in named if name in kinds), "")


def next_section(about: "PlanReport", decision: "Decision") -> Section:
    """The commands for the engine chosen, or the two ways where none was."""
    plan, where, engine = about.plan, quoted(about.plan_path), engine_of(about)
    blocks: list[Block] = []
    if decision.level == "bad":
        blocks.append(Text("Keep what you have: the plan saves nothing worth a change here."))
        trace = quoted(about.report.trace or "TRACE")
        more = [] if about.report.time else [f"semmoe report {where} {trace} --hardware h100"]
        lines = [*more, f"semmoe place {trace} --ranks {plan.topology.num_ranks} --replicas 1 -o plan-with-copies"]
        blocks.append(Commands("To look further", lines, []))
        return Section("Nothing to deploy", blocks, part=NEXT)
    found = [commands for commands in deployment(plan, about.plan_path) if _is_of(commands, engine)]
    blocks += found or [Commands("One of these", deploy_lines(plan, where, None), [])]
    if decision.plan.needs == "the plug-in or router":
        kinds = [engine] if engine in PLUGINS else PLUGINS
        lines = [f"semmoe export {where} --to {kind}-plugin -o {kind}-plugin" for kind in kinds]
        lines.append(f"semmoe route {where} --upstream http://127.0.0.1:8000")
        notes = ["one of them sends requests to ranks: the plug-in inside the engine, or the router in front of it"]
        blocks.append(Commands("For the schedule of requests", lines, notes))
    asked = [
        "semmoe trace --server http://127.0.0.1:8000 --data prompts.jsonl -o served",
        f"semmoe report {where} served",
    ]
    blocks.append(Commands("Then see that it does what was promised", asked, ["the row as-served is what happened"]))
    return Section("Bring it into the engine, and look again", blocks, part=NEXT)


def _is_of(commands: Commands, engine: str) -> bool:
    from semmoe.pages.deployment import ENGINES

    return bool(engine) and commands.name in {e.name for e in ENGINES if e.kind == engine}


def other_engines(about: "PlanReport") -> Section:
    """Commands for every other engine."""
    engine = engine_of(about)
    rest = [commands for commands in deployment(about.plan, about.plan_path) if not _is_of(commands, engine)]
    return Section("How to deploy it with other engines" if engine else "How to deploy it", list(rest), part=OTHERS)


def risk_section(about: "PlanReport", decision: "Decision") -> Section:
    """Load by domain, drift, phase, memory of copies, the way back, and what re-placing moves."""
    plan, report = about.plan, about.report
    where = quoted(about.plan_path)
    risk = decision.risk
    rows = [
        ["load", f"{risk[0].upper()}{risk[1:]}."],
        ["drift", _drift(about)],
        ["phase", _phase(about)],
        ["memory", _memory(about)],
        ["re-placing later", _moves(about)],
    ]
    blocks: list[Block] = [Grid(["risk", "what is known"], rows, words=True)]
    if (domains := _domains(about)) is not None:
        blocks += [domains]
    source = model_name(plan.model.model) or "CHECKPOINT"
    placed = f"{source.rstrip('/').rpartition('/')[2]}-placed"
    back = ["start the server without the map, or without the plug-in's variables: nothing else was changed"]
    lines = [f"semmoe reshard --undo {quoted(placed)} -o {quoted(source.rpartition('/')[2] + '-back')}"]
    blocks.append(Commands("The way back from a rewritten checkpoint", lines, back))
    again = [f"semmoe place t2 --from-plan {where} --moves 25% -o plan-2"]
    blocks.append(Commands("When traffic has changed", again, ["t2: a trace of later traffic"]))
    return Section(f"The busiest rank, other traffic, and the way back ({report.ranks} ranks)", blocks, part=RISKS)


def _drift(about: "PlanReport") -> str:
    if about.report.drift is not None:
        return about.report.drift.sentence
    return "Not known from the requests of the plan's own trace: score it on another day's traffic before you trust it."


def _phase(about: "PlanReport") -> str:
    from semmoe.profiles.split import one_sided

    report = about.report
    scored = {"all": "Prompt and generated tokens", "prompt": "Prompt tokens", "generated": "Generated tokens"}
    said = f"{scored.get(report.phase, report.phase)} were scored"
    if not report.phase_shares:
        return f"{said}."
    shares = ", ".join(f"{share:.0%} {name}" for name, share in report.phase_shares.items())
    warning = one_sided(report.phase_shares)
    return f"{said}; the trace is {shares}." + (f" {warning[0].upper()}{warning[1:]}." if warning else "")


def _memory(about: "PlanReport") -> str:
    placement = about.plan.placement
    copies = placement.num_copies
    if not copies:
        return "No copies: every expert lies on one rank, as without a plan."
    each = placement.num_replicas * placement.num_layers
    said = f"{copies} copies a layer over all ranks, {each} more experts on a rank over all layers"
    size = bytes_of_expert(about)
    return f"{said}, {each * size / 1e9:.2f} GB." if size else f"{said}."


def bytes_of_expert(about: "PlanReport") -> int:
    """Bytes of one expert by the sizes and the number type that times were predicted for; 0 where
    none are known."""
    from semmoe.solvers.place.moves import expert_bytes

    if about.report.time is None:
        return 0
    values = {parameter["name"]: parameter["value"] for parameter in about.report.time.parameters}
    return expert_bytes(values["model.hidden"], values["model.expert"], values["experts.w"])


def _moves(about: "PlanReport") -> str:
    placement = about.plan.placement
    slots = placement.num_layers * placement.num_ranks * placement.slots_per_rank
    drift = about.report.drift
    known = f"{drift.moves:.0f} moves were worth looking at on this trace" if drift else "a quarter is the default"
    return f"A re-placement moves as many of the {slots:,} experts as you allow ({known}), in steps that can stop after any."


def _domains(about: "PlanReport") -> Grid | None:
    """Each domain: how much less it reaches, and its busiest rank beside the baseline's."""
    from semmoe.solvers.evaluate.report import random_row

    report = about.report
    if len(report.domains) < 2:
        return None
    rows = []
    for domain in report.domains:
        before, after = (random_row(domain.rows, name) for name in (report.baseline, "plan"))
        saved = f"{1 - after.rem / before.rem:.1%}" if before.rem else "-"
        loads = (f"{row.load_imbalance:.2f}" for row in (before, after))
        rows.append([domain.domain, f"{domain.requests:,}", saved, *loads])
    headings = ["domain", "requests", "REM saved", f"busiest rank, {report.baseline}", "busiest rank, plan"]
    return Grid(headings, rows)
