"""Random placements for the reshard tests: any permutation of the experts, groups onto groups
where the router has them."""

from pathlib import Path

import numpy as np

from semmoe.profiles.config import moe_facts, read_config
from semmoe.solvers.placement import Placement, Topology
from semmoe.solvers.plan import ModelFacts, Plan


def random_plan(checkpoint: Path, *, ranks: int = 2, seed: int = 0, grouped: bool = True) -> Plan:
    """A random placement of a checkpoint's experts; of a grouped model, one that maps groups
    onto groups."""
    facts = moe_facts(read_config(checkpoint))
    names = {name for name in ModelFacts.__dataclass_fields__} - {"model", "checkpoint"}
    model = ModelFacts(model=checkpoint.name, **{name: facts[name] for name in names})
    draw = np.random.default_rng(seed)
    groups = facts["n_group"] if grouped else 1
    experts = model.num_experts
    orders = []
    for _ in model.model_layers:
        members = np.arange(experts).reshape(groups, -1)
        orders.append(draw.permuted(members[draw.permutation(groups)], axis=1).ravel())
    experts_LRS = np.asarray(orders, np.int32).reshape(len(orders), ranks, -1)
    return Plan(
        placement=Placement(experts_LRS, experts),
        topology=Topology(ranks),
        model=model,
        method="random",
        seed=seed,
        dispatch="per-rank",
        load_LE=np.ones((len(orders), experts), np.int64),
        fitted_keys=np.zeros(0, np.uint64),
    )
