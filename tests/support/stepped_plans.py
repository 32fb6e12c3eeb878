"""Plans that are some random moves away from another one, with the delta that leads there."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from semmoe.profiles.document import line_per_key
from semmoe.solvers.placement import Placement
from semmoe.solvers.plan import Plan
from semmoe.solvers.replan.decision import Decision
from semmoe.solvers.replan.delta import DELTA_FILE, Delta, ExpertMove, LayerDelta, Moved, Ranks
from semmoe.solvers.replan.steps import steps_between

UNDECIDED = Decision(0.0, 0.0, 0.0, 0.0, 0.0, 0, "rows", move=False, forced=True)


def stepped(old: Plan, *, swaps: int, seed: int = 0) -> tuple[Plan, Delta]:
    """The plan after random exchanges at every layer between ranks, each of which holds as many
    experts as before; layers of the delta in reversed order."""
    draw = np.random.default_rng(seed)
    layers, placed = [], []
    for number, old_RS in enumerate(old.placement.experts_LRS):
        hosts_ER = old.placement.hosts_LER[number].copy()
        for _ in range(swaps):
            a, b = draw.choice(old.placement.num_ranks, 2, replace=False)
            e, f = (draw.choice(np.flatnonzero(hosts_ER[:, x] & ~hosts_ER[:, y])) for x, y in ((a, b), (b, a)))
            hosts_ER[[e, f], [a, b]], hosts_ER[[e, f], [b, a]] = False, True
        new_RS, moves = steps_between(old_RS, hosts_ER, old.topology)
        moved, at = sum(move.kind != "drop" for move in moves), old.model.model_layers[number]
        layers.append(LayerDelta(number, at, moved, 0.0, 0.0, 0.0, 1.0, 1.0, [ExpertMove.of(m) for m in moves]))
        placed.append(new_RS)
    new = replace(old, placement=Placement(np.stack(placed), old.placement.num_experts), method="replan")
    used, slots = sum(layer.moved for layer in layers), int((old.placement.experts_LRS >= 0).sum())
    delta = Delta(
        old=old.fingerprint,
        new=new.fingerprint,
        topology=Ranks(old.topology.num_ranks, old.topology.num_nodes),
        budget=Moved(slots, "100%", used, slots),
        expert_bytes=None,
        bytes=None,
        decision=UNDECIDED,
        layers=layers[::-1],
    )
    return new, delta


def save_stepped(old: Plan, path: Path, *, swaps: int, seed: int = 0) -> tuple[Plan, Delta]:
    """The same, written as `semmoe place --from-plan` does."""
    new, delta = stepped(old, swaps=swaps, seed=seed)
    new.save(path, beside={DELTA_FILE: line_per_key(delta.to_json())})
    return new, delta
