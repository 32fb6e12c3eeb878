"""Deployment: a placement with what decides who serves and who sends, the five things that
scores, pictures and times all need.

Shape letters: L MoE layers, E experts, R ranks.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from semmoe.solvers.place.replicas import MOVING, OWN_RULE, MovingRule, static_serving_LRE
from semmoe.solvers.placement import Placement, Topology
from semmoe.solvers.schedule.schedule import Schedule


@dataclass(frozen=True, eq=False)
class Deployment:
    """Where experts are, and how tokens get to them."""

    placement: Placement
    load_LE: np.ndarray  # int64 [L, E]: activations of the fitted requests, for the choice among copies
    topology: Topology
    dispatch: str = "per-rank"  # one of DISPATCH_KINDS (solvers/evaluate/metrics.py)
    schedule: Schedule | None = None  # None: tokens live on random ranks
    replica_choice: str = OWN_RULE  # one of REPLICA_RULES (solvers/place/replicas.py)

    @cached_property
    def serving_LRE(self) -> np.ndarray:
        """Rank that serves expert e for a token that lives on rank r, int32 [L, R, E]; equal along
        R without copies."""
        return static_serving_LRE(self.replica_choice, self.placement.hosts_LER, self.load_LE, self.topology)

    @cached_property
    def moving(self) -> MovingRule | None:
        """What chooses copies token by token in place of `serving_LRE`; None under a rule that is
        static, and where no expert has copies."""
        if self.replica_choice not in MOVING or not self.placement.num_copies:
            return None
        return MovingRule(self.replica_choice, self.placement.hosts_LER, self.serving_LRE)
