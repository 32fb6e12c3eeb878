"""Deployment: a placement with what decides who serves and who sends, the five things that
scores, pictures and times all need.

Shape letters: L MoE layers, E experts, R ranks.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from semmoe.solvers.place.replicas import serving_LRE
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

    @cached_property
    def serving_LRE(self) -> np.ndarray:
        """Rank that serves expert e for a token that lives on rank r, int32 [L, R, E]; equal along
        R without replicas."""
        return serving_LRE(self.placement.hosts_LER, self.load_LE, self.topology)
