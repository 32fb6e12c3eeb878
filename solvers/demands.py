"""What a placement is asked for, and what a method gives back.

Shape letters: L MoE layers, E experts, R ranks.
"""

from dataclasses import dataclass, field

import numpy as np

from semmoe.solvers.placement import Placement
from semmoe.solvers.slots import Slots


@dataclass(frozen=True)
class Demands:
    """What a placement is asked for. Methods that only look at co-activation or load use the cap
    and the seed.

    Fields:
        load_cap: most load of a rank over the mean, on the fitted requests.
        seed: of every random choice; the same input and seed give the same bytes.
        dispatch: how the engine's all-to-all counts rows: "per-rank", "per-expert", "per-node" or
            "gather".
        objective: the schedules that placement is made for: "tp" (tokens), "dp" (requests) or
            "both".
        lar_weight: remote ranks that one more local activation per token is worth.
        replicas: expert slots of a rank beyond ceil(E / R).
        slots: expert slots of a rank in all; 0: ceil(E / R) and `replicas`.
        redundant: copies of experts on all ranks together, in place of `slots` and `replicas`.
        spare: what slots beyond one for each expert hold: "copies" or "empty" (every expert once).
        robust: resamples of the requests that each keep the cap; 0: only all of them.
        expressible: "permutation": only what a permuted checkpoint of a grouped model can express.
        effort: how long to search: "fast", "default" or "max".
        processes: worker processes; the result does not depend on it.

    Source: docs/method.md; `semmoe place --help` names the same.
    """

    load_cap: float = 1.05
    seed: int = 0
    dispatch: str = "per-rank"
    objective: str = "both"
    lar_weight: float = 0.0
    replicas: int = 0
    slots: int = 0
    redundant: int | None = None
    spare: str = "copies"
    robust: int = 0
    expressible: str | None = None
    effort: str = "default"
    processes: int = 1

    def slots_of(self, num_experts: int, num_ranks: int) -> Slots:
        """The slots that are asked for. Raises InputError where they do not fit."""
        return Slots.asked(
            num_experts,
            num_ranks,
            slots=self.slots,
            replicas=self.replicas,
            redundant=self.redundant,
            spare=self.spare,
        )


@dataclass(frozen=True, eq=False)
class Solved:
    """What a method found, as scipy.optimize's OptimizeResult holds it."""

    placement: Placement
    loads_LR: np.ndarray  # float64 [L, R]: activations of the fitted requests that each rank serves
    rounds: int = 1  # passes over the layers: the first placement, and each turn of homes and experts
    notes: list[str] = field(default_factory=list)  # what could not be kept, a line each

    @classmethod
    def from_ranks(cls, rank_of_LE: np.ndarray, load_LE: np.ndarray, num_ranks: int, *, rounds: int = 1) -> "Solved":
        """Without copies, from the rank and the load of each expert, [L, E] both."""
        loads = [np.bincount(r_E, load_E, num_ranks) for r_E, load_E in zip(rank_of_LE, load_LE, strict=True)]
        return cls(Placement.from_ranks(rank_of_LE, num_ranks), np.stack(loads), rounds)
