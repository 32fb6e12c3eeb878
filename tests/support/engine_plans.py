"""A plan with a request scorer, made from planted routing, for tests of what runs in engines."""

from pathlib import Path

from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic
from semmoe.profiles.trace import RoutingTrace
from semmoe.solvers.demands import Demands
from semmoe.solvers.make_plan import PlanOptions, make_plan
from semmoe.solvers.placement import Topology
from semmoe.solvers.plan import Plan


def served_plan(folder: Path, *, ranks: int = 4, replicas: int = 0) -> Plan:
    """The plan of a small synthetic trace, which lies in folder/"t"."""
    if not (folder / "t").exists():
        world = SyntheticWorld(num_layers=3, num_experts=16, num_requests=120, tokens_per_request=60, vocab_size=400)
        write_synthetic(folder / "t", world)
    demands = Demands(replicas=replicas, objective="dp", effort="fast")
    return make_plan([RoutingTrace.open(folder / "t")], Topology(ranks), demands, PlanOptions())
