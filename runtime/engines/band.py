"""Which data-parallel rank gets a request: the best score among ranks that are not too busy.

The one rule, for the plug-ins inside engines and for `semmoe route` in front of them. A request
stays on its rank, and the ranks go through every layer together, so a busy rank makes all of them
wait: a rank is a candidate while its tokens in flight are at most `band` times the mean of all
ranks with the new request counted. The least loaded rank always is one.

Shape letters: R data-parallel ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

from semmoe.profiles.errors import InputError

Decision = Literal["affine", "spilled", "pinned", "unknown", "failed"]
DECISIONS: tuple[Decision, ...] = get_args(Decision)
BAND = 1.5  # of --band and SEMMOE_BAND; tighter ones lose locality, and level tokens no better: docs/experiments.md


class Choice(NamedTuple):
    """Where a request goes.

    Fields:
        rank: the data-parallel rank; -1: the engine's own choice stands.
        decision: "affine": the rank of the best score; "spilled": that one was too busy, the next
            best within the band; "pinned": the caller's rank; "unknown": no id of the prompt is
            known, or there was none; "failed": something went wrong here.
    """

    rank: int
    decision: Decision


@dataclass(frozen=True)
class Band:
    """How far over the mean a rank may be loaded and still be chosen.

    Fields:
        ranks: R.
        band: tokens in flight of a candidate over the mean, at most; from 1, inf for no bound.

    Raises InputError for less than one rank, or a band below 1.
    """

    ranks: int
    band: float = BAND

    def __post_init__(self) -> None:
        if self.ranks < 1 or not self.band >= 1:
            raise InputError(f"a band of {self.band} over {self.ranks} ranks: expected at least 1 of each")

    def choose(
        self,
        scores_R: Sequence[float] | np.ndarray,
        tokens_in_flight_R: Sequence[float] | np.ndarray,
        allowed_R: Sequence[bool] | np.ndarray | None = None,
        *,
        tokens: float = 1,
    ) -> Choice:
        """The rank of one request.

        Parameters:
            scores_R: `PlanScorer.scores` of its prompt; zeros where no id is known.
            tokens_in_flight_R: what each rank has taken and not finished.
            allowed_R: ranks that are up; None: all.
            tokens: what this request will add.

        Of equal scores the less loaded rank wins, then the lower one. With no allowed rank, or
        nothing known of the prompt, the engine chooses ("unknown").
        """
        scores, load = as_list(scores_R), as_list(tokens_in_flight_R)
        ranks = [r for r in range(self.ranks) if allowed_R is None or allowed_R[r]]
        if not ranks or not any(scores):
            return Choice(-1, "unknown")
        limit = self.limit([load[r] for r in ranks], tokens)
        score, _, place = max([(scores[r], -load[r], -r) for r in ranks if load[r] <= limit])
        return Choice(-place, "affine" if score == max([scores[r] for r in ranks]) else "spilled")

    def limit(self, load: Sequence[float], tokens: float) -> float:
        """Tokens in flight up to which a rank is a candidate. `load`: those of the ranks that are
        up."""
        return max(min(load), self.band * ((sum(load) + tokens) / len(load)))


def as_list(values_R: Sequence[float] | np.ndarray) -> list[float]:
    """Numbers of Python: over a few ranks a call of numpy takes longer than all of the rule."""
    return values_R if isinstance(values_R, list) else np.asarray(values_R).tolist()
