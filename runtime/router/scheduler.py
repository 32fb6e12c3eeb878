"""Where a request goes: its client's rank, the rank of its conversation, or the plan's choice among
ranks that are not too busy (semmoe.runtime.engines.band).

Shape letters: T ids of a prompt, G data-parallel ranks.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from semmoe.runtime.engines.band import DECISIONS, Band
from semmoe.runtime.engines.chooser import request_tokens
from semmoe.runtime.engines.scorer import PlanScorer
from semmoe.runtime.router.fleet import Fleet, Upstream, full
from semmoe.runtime.router.pins import HeaderList, client_pin
from semmoe.runtime.router.prompts import ROUTES, Prompt, answer_limits, read_body, read_prompt
from semmoe.runtime.router.sessions import HEADER, Key, Sessions
from semmoe.runtime.router.tokens import Tokenizer, Untokenised

SESSION, PASSED = "session", "passed"  # stayed with its conversation; no generation at all
ALL_DECISIONS = (*DECISIONS, SESSION, PASSED)
CHARACTERS = 4  # of text count as a token where nobody tokenised it


@dataclass(eq=False)
class Asked:
    """What is known of a request before it goes anywhere.

    Fields:
        path, headers, data: as they came.
        body: the JSON object in `data`; None where it is none.
        generates: whether it is a request to one of ROUTES.
        ids_T: token ids of its prompt, int64 [T]; None where they are not known.
        scores_G: of its prompt, a number for each rank; zeros where nothing is known of it. Read
            them by `Scheduler.scores`.
        tokens: what it counts as on a rank: its prompt and the longest answer.
        pin: the client's own rank; None for none.
        sessions: keys of its conversation.
    """

    path: str
    headers: HeaderList
    data: bytes
    body: dict[str, Any] | None = None
    generates: bool = False
    ids_T: np.ndarray | None = None
    scores_G: Sequence[float] | None = None
    tokens: int = 0
    pin: int | None = None
    sessions: Sequence[Key] = ()

    def forget(self) -> None:
        """Let go of what was sent: an answer has begun, and may take minutes."""
        self.data, self.body, self.ids_T = b"", None, None


@dataclass(eq=False)
class Chosen:
    """Where a request goes.

    Fields:
        upstream: the server.
        rank: the data-parallel rank; None: the engine's own choice.
        decision: why, one of ALL_DECISIONS.
        expected: share of its activations that the rank should serve itself, of
            `Scheduler.expect`; None before, and where nothing is known.
    """

    upstream: Upstream
    rank: int | None
    decision: str
    expected: float | None = None


@dataclass(eq=False)
class Scheduler:
    """Reads requests and chooses their ranks.

    Fields:
        scorer, band: the plan's, as the plug-ins use them.
        engine: how pins are spelled.
        tokenizer: None: only prompts of ids are known.
        unknown: prompts without ids, by cause.
    """

    scorer: PlanScorer
    band: Band
    fleet: Fleet
    engine: str
    tokenizer: Tokenizer | None
    sessions: Sessions = field(default_factory=Sessions)
    unknown: Counter[str] = field(default_factory=Counter)

    async def read(self, method: str, path: str, headers: HeaderList, data: bytes) -> Asked:
        """What a request asks. Raises Refused for a rank that is not there."""
        if method != "POST" or path not in ROUTES:
            return Asked(path, headers, data)
        named = dict(reversed(headers))  # the first of each name
        body = None if b"content-encoding" in named else read_body(data)
        pin = client_pin(self.engine, path, headers, body, self.fleet.ranks)
        prompt = None if body is None else read_prompt(path, body)
        if body is None or prompt is None:
            self.unknown["no_prompt"] += 1
            return Asked(path, headers, data, body, True, tokens=len(data) // CHARACTERS, pin=pin)
        ids_T = prompt.ids_T
        if ids_T is None:
            ids_T = await self._ids(prompt, body.get("model"))
        length = len(data) // CHARACTERS if ids_T is None else len(ids_T)
        keys = self.sessions.keys(named.get(HEADER, b""), body.get("user"), ids_T)
        longest, answers = answer_limits(body)
        tokens = int(request_tokens(0, longest) * answers) + length
        return Asked(path, headers, data, body, True, ids_T, None, tokens, pin, keys)

    async def _ids(self, prompt: Prompt, model: object) -> np.ndarray | None:
        try:
            if self.tokenizer is None:
                raise Untokenised("no_tokenizer")
            return await self.tokenizer.encode(prompt, model)
        except Untokenised as why:
            self.unknown[str(why)] += 1
            return None

    def scores(self, asked: Asked) -> Sequence[float]:
        """Scores of a request's prompt, computed when they are first asked for."""
        if asked.scores_G is not None:
            return asked.scores_G
        scores_G = [0.0] * self.fleet.ranks
        if asked.ids_T is not None:
            scores_G = self.scorer.scores(asked.ids_T).tolist()
            if not any(scores_G):
                self.unknown["unseen_ids"] += 1
        asked.scores_G = scores_G
        return scores_G

    def expect(self, asked: Asked, chosen: Chosen) -> None:
        """Fill in what a choice promises. Apart from the choice: a client's pin and a conversation
        that stays need no score, which can be computed while the request is under way."""
        if chosen.rank is not None and chosen.decision != PASSED and any(scores_G := self.scores(asked)):
            chosen.expected = self.scorer.expected_lar(scores_G, chosen.rank)

    def choose(self, asked: Asked, without: set[str]) -> Chosen:
        """The place of a request, which the URLs `without` had failed to serve. Raises Refused
        where there is none."""
        if not asked.generates:
            return Chosen(self.fleet.least_loaded(without), None, PASSED)
        free_G = self.fleet.free_G(without)
        if asked.pin is not None:
            return self._pinned(asked.pin, free_G)
        rank = self.sessions.rank(asked.sessions)
        if rank is not None and free_G[rank]:
            load = [tokens for tokens, free in zip(self.fleet.tokens_G, free_G, strict=True) if free]
            if self.fleet.tokens_G[rank] <= self.band.limit(load, asked.tokens):
                return self._at(rank, SESSION)
        rank, decision = self.band.choose(self.scores(asked), self.fleet.tokens_G, free_G, tokens=asked.tokens)
        if rank >= 0:
            return self._at(rank, decision)
        upstream = self.fleet.least_loaded(without)
        return Chosen(upstream, None if self.fleet.inner else upstream.first, decision)

    def _pinned(self, pin: int, free_G: list[bool]) -> Chosen:
        if not self.fleet.upstream_of(pin).up:
            # The client's rank is gone: the least loaded takes its place.
            free = [rank for rank, there in enumerate(free_G) if there]
            return self._at(min(free, key=self.fleet.tokens_G.__getitem__), "spilled")
        if not free_G[pin]:
            raise full()
        return self._at(pin, "pinned")

    def _at(self, rank: int, decision: str) -> Chosen:
        return Chosen(self.fleet.upstream_of(rank), rank, decision)
