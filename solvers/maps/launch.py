"""How to start an engine with its map."""

from pathlib import Path

from semmoe.profiles.families import find_family
from semmoe.solvers.maps.kinds import KINDS
from semmoe.solvers.place.replicas import ENGINE_RULES
from semmoe.solvers.plan import Plan


def launch_lines(plan: Plan, kind: str, path: Path, *, format: str = "") -> list[str]:
    """How to start the engine with the file, and what to mind: lines for people (docs/engines.md
    says more)."""
    lines = KINDS[kind].launch(plan, str(path), format)
    if plan.placement.num_copies and kind in ENGINE_RULES:
        lines.append(f"which copy serves: {ENGINE_RULES[kind]}")
        if plan.replica_choice != kind:
            lines.append(
                f"the plan was scored with {plan.replica_choice}: semmoe report PLAN TRACE --replica-choice {kind} says what this "
                "engine will get"
            )
    if kind in find_family(plan.model.model_type).unmoved_by:
        lines.append(f"the engine's own class for {plan.model.model_type} moves no experts: use semmoe reshard instead")
    return lines
