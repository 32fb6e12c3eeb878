"""Conversations: which rank holds what a request begins with in its prefix cache.

A request belongs to a conversation by its session header, by the `user` of its body, or because it
begins with the whole prompt of an earlier one. That is looked up by hashes of the prompt's first
ids, block by block: a system prompt that many conversations share ties none of them together,
since no prompt ended there.

Keys are hashes under secrets of this process; nothing that a client sent is kept. Those of a
prompt's beginnings are sums of its ids under random weights, all of them at once.

Shape letters: T ids of a prompt.
"""

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

HEADER = b"x-session-id"
BLOCK = 16  # ids: of vLLM's prefix cache
MOST = 100_000  # conversations that are remembered
MOST_IDS = 1 << 20  # of a prompt: what follows tells no conversation from another

Key = bytes | int


@dataclass(eq=False)
class Sessions:
    """Ranks of conversations; the one that was heard of longest ago is forgotten first."""

    most: int = MOST
    rank_of: OrderedDict[Key, int] = field(default_factory=OrderedDict)
    secret: bytes = field(default_factory=lambda: os.urandom(16))
    weights_T: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))

    def keys(self, header: bytes, user: object, ids_T: np.ndarray | None) -> Sequence[Key]:
        """What a request may be known by, the best last: of the first kind that it has.

        Prefixes ascend in length; the last one is the prompt itself, in whole blocks.
        """
        if header:
            return [self._key(b"header", header)]
        if isinstance(user, str) and user:
            return [self._key(b"user", user.encode("utf-8", "surrogatepass"))]
        return [] if ids_T is None else self._prefixes(ids_T)

    def _key(self, kind: bytes, value: bytes) -> bytes:
        return blake2b(value, digest_size=16, key=self.secret, person=kind).digest()

    def _prefixes(self, ids_T: np.ndarray) -> list[int]:
        size = min(len(ids_T), MOST_IDS) // BLOCK * BLOCK
        if size > len(self.weights_T):
            more = np.frombuffer(os.urandom(8 * size), np.uint64)[len(self.weights_T) :]
            self.weights_T = np.concatenate([self.weights_T, more])
        weights_T = self.weights_T[:size]
        values_T = ids_T[:size].view(np.uint64) * weights_T
        values_T += weights_T  # else zeros at the end would say nothing
        return values_T.cumsum()[BLOCK - 1 :: BLOCK].tolist()

    def rank(self, keys: Sequence[Key]) -> int | None:
        """The rank of the longest prefix that is known."""
        for key in reversed(keys):
            if (rank := self.rank_of.get(key)) is not None:
                return rank
        return None

    def stay(self, keys: Sequence[Key], rank: int) -> None:
        """Remember where the conversation is."""
        if not keys:
            return
        self.rank_of[keys[-1]] = rank
        self.rank_of.move_to_end(keys[-1])
        if len(self.rank_of) > self.most:
            self.rank_of.popitem(last=False)
