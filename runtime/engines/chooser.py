"""The plan at work in an engine: settings from the environment, a check against the model that is
served, and the rank of each request. What the hooks of all engines share.

Shape letters: G data-parallel ranks.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from semmoe.profiles.config import moe_facts
from semmoe.profiles.errors import InputError
from semmoe.runtime.engines.band import BAND, Band, Choice
from semmoe.runtime.engines.counters import Counters
from semmoe.runtime.engines.plan_files import PlanFacts, read_plan_facts
from semmoe.runtime.engines.scorer import PlanScorer
from semmoe.runtime.engines.variables import BAND as BAND_NAME
from semmoe.runtime.engines.variables import PLAN, RECORD, RECORD_SHARE, STRICT

MOST_NEW_TOKENS = 1_024  # that a request counts for: a limit of the whole context says nothing of an answer's length


@dataclass(frozen=True)
class Settings:
    """What the environment asks for."""

    plan: PlanFacts | None
    strict: bool = False
    band: float = BAND
    record: str = ""
    record_share: float = 1.0

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> "Settings":
        """From environment variables. Raises InputError for one that cannot be used."""
        path = environment.get(PLAN, "")
        return cls(
            read_plan_facts(path) if path else None,
            is_strict(environment),
            _number(environment, BAND_NAME, BAND, 1.0, float("inf")),
            environment.get(RECORD, ""),
            _number(environment, RECORD_SHARE, 1.0, 0.0, 1.0),
        )


def is_strict(environment: Mapping[str, str]) -> bool:
    """Whether a plan that does not fit is to stop the engine."""
    return environment.get(STRICT, "0") not in ("", "0")


def _number(environment: Mapping[str, str], name: str, default: float, low: float, high: float) -> float:
    text = environment.get(name, "") or str(default)
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise InputError(f"{name} is {text!r}, expected a number from {low:g} to {high:g}")
    return value


def check_model(plan: PlanFacts, config: dict[str, Any]) -> None:
    """Raise InputError where the plan is not for the model of a config.json."""
    facts = moe_facts(config)
    for name in ("num_experts", "top_k"):
        if facts[name] != plan.model[name]:
            raise InputError(f"the model has {name} {facts[name]}, the plan is for {name} {plan.model[name]}")
    if list(facts["model_layers"]) != list(plan.model["model_layers"]):
        mine, theirs = len(plan.model["model_layers"]), len(facts["model_layers"])
        raise InputError(f"the plan places {mine} layers, the model has {theirs} with experts, or others")
    vocabulary, ids_V = facts["vocab_size"], plan.tables.get("ids_V", np.zeros(0, np.int32))
    if vocabulary and len(ids_V) and ids_V[-1] >= vocabulary:
        raise InputError(f"the plan knows token {ids_V[-1]}, the model has {vocabulary}")


@dataclass(eq=False)
class RankChooser:
    """Ranks for the requests of one engine client, with its own count of what is under way.

    Fields:
        scorer: over all data-parallel ranks of the server.
        band: over the ranks that this client sends to.
        counters: of what happened.
        ranks: those ranks, ascending, of the scorer's.
    """

    scorer: PlanScorer
    band: Band
    counters: Counters
    ranks: Sequence[int]
    log: logging.Logger
    requests: dict[str, tuple[int, float]] = field(default_factory=dict)  # under way: place and tokens
    _told: bool = False

    def __post_init__(self) -> None:
        self.tokens_G = np.zeros(len(self.ranks))

    def choose(
        self, ids: Sequence[int] | None, tokens: float, *, others_G: np.ndarray | float = 0.0, allowed_G: Any = None
    ) -> Choice:
        """Place in `ranks` for a prompt; counted. Never raises: a fault is logged once, and the
        engine's own choice stands.

        Parameters:
            ids: of the prompt; None where the request has none.
            tokens: what it will add, `request_tokens`.
            others_G: tokens in flight that this object has not counted itself.
            allowed_G: which ranks are up.
        """
        try:
            if ids is None or not len(ids):
                choice, expected, average = Choice(-1, "unknown"), 0.0, 0.0
            else:
                scores = self.scorer.scores(ids)
                scores_G = scores[list(self.ranks)]
                choice = self.band.choose(scores_G, self.tokens_G + others_G, allowed_G, tokens=tokens)
                average = float(self.scorer.average_G.mean())
                expected = self.scorer.expected_lar(scores, self.ranks[choice.rank]) if choice.rank >= 0 else 0.0
            self.counters.count(choice.decision, expected, average)
            return choice
        except Exception:
            return self.fail()

    def fail(self) -> Choice:
        """The choice after a fault, which is logged once; call it in the exception's handler."""
        if not self._told:
            self._told = True
            self.log.exception(
                "semmoe: a request could not be scored; the engine chooses its rank, and that of others alike"
            )
        self.counters.count("failed")
        return Choice(-1, "failed")

    def add(self, name: str, place: int, tokens: float) -> None:
        """A request is under way."""
        self.forget(name)
        self.requests[name] = (place, tokens)
        self.tokens_G[place] += tokens

    def forget(self, name: str) -> None:
        """A request is over, or was never there."""
        place, tokens = self.requests.pop(name, (0, 0.0))
        self.tokens_G[place] -= tokens


def request_tokens(num_prompt: int, max_new_tokens: int | None) -> float:
    """What a request counts for while it is under way: prompt and answer, whose length is not
    known."""
    return num_prompt + min(max_new_tokens or MOST_NEW_TOKENS, MOST_NEW_TOKENS)
