"""Conversations: which rank holds what a request begins with in its prefix cache.

A request belongs to a conversation by its session header, by the `user` of its body, or because it
begins with the whole prompt of an earlier one. That is looked up by hashes of the prompt's first
ids, block by block: a system prompt that many conversations share ties none of them together,
since no prompt ended there.

Keys are hashes under a key of this process; nothing that a client sent is kept.

Shape letters: T ids of a prompt.
"""

import os
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

HEADER = b"x-session-id"
BLOCK = 16  # ids: of vLLM's prefix cache
MOST = 100_000  # conversations that are remembered


@dataclass(eq=False)
class Sessions:
    """Ranks of conversations; the one that was heard of longest ago is forgotten first."""

    most: int = MOST
    rank_of: OrderedDict[bytes, int] = field(default_factory=OrderedDict)
    secret: bytes = field(default_factory=lambda: os.urandom(16))

    def keys(self, header: bytes, user: object, ids_T: np.ndarray | None) -> list[bytes]:
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

    def _prefixes(self, ids_T: np.ndarray) -> list[bytes]:
        data, size = ids_T.astype(np.int32).tobytes(), 4 * BLOCK
        state, keys = blake2b(digest_size=16, key=self.secret, person=b"prefix"), []
        for first in range(0, len(data) - size + 1, size):
            state.update(data[first : first + size])
            keys.append(state.copy().digest())
        return keys

    def rank(self, keys: Iterable[bytes]) -> int | None:
        """The rank of the longest prefix that is known."""
        return next((rank for key in reversed(list(keys)) if (rank := self.rank_of.get(key)) is not None), None)

    def stay(self, keys: list[bytes], rank: int) -> None:
        """Remember where the conversation is."""
        if not keys:
            return
        self.rank_of[keys[-1]] = rank
        self.rank_of.move_to_end(keys[-1])
        if len(self.rank_of) > self.most:
            self.rank_of.popitem(last=False)
