"""Token ids of prompts: from the request itself, from the engine's /tokenize, or from a tokenizer
of our own with its chat template, in a thread.

A system prompt is long, the same in every request, and at the front: its ids are kept, and only
what follows is tokenised. A prompt that cannot be tokenised has no ids; why is counted.

Shape letters: T ids of a prompt.
"""

import asyncio
import json
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import orjson

from semmoe.profiles.errors import InputError, require_extra
from semmoe.runtime.router.client import Client, UpstreamError
from semmoe.runtime.router.fleet import Fleet
from semmoe.runtime.router.prompts import Message, Prompt, whole_numbers

LONG_HEAD = 2_000  # characters of a system prompt from which on its ids are worth a look-up
KEPT_IDS = 4_000_000  # ids of system prompts in all: 32 MB
TIMEOUT = 2.0  # seconds that an engine has to tokenise: routing must not hold up what it is for
JSON = ((b"content-type", b"application/json"),)
REST = 60.0  # seconds without a question to an engine that has no /tokenize


class Untokenised(Exception):
    """Why a prompt has no ids, in a word for the counter."""


class Tokenizer(Protocol):
    """Where ids come from. `encode` raises Untokenised."""

    async def encode(self, prompt: Prompt, model: object) -> np.ndarray: ...


class HeadCache:
    """Ids of system prompts by what they say; the one that was asked for longest ago goes first."""

    def __init__(self, most: int = KEPT_IDS) -> None:
        self.most, self.size = most, 0
        self.ids_of: OrderedDict[bytes, np.ndarray] = OrderedDict()

    def get(self, key: bytes) -> np.ndarray | None:
        ids_T = self.ids_of.get(key)
        if ids_T is not None:
            self.ids_of.move_to_end(key)
        return ids_T

    def put(self, key: bytes, ids_T: np.ndarray) -> None:
        if key in self.ids_of or ids_T.size > self.most:
            return
        self.ids_of[key] = ids_T
        self.size += ids_T.size
        while self.size > self.most:
            self.size -= self.ids_of.popitem(last=False)[1].size


def key_of(*parts: object) -> bytes:
    return blake2b(json.dumps(parts).encode(), digest_size=16).digest()


class EngineTokenizer:
    """The /tokenize of an engine: vLLM's takes messages and applies the chat template; SGLang's
    takes text, so that there the words of a chat are tokenised without their template."""

    def __init__(self, client: Client, fleet: Fleet, engine: str) -> None:
        self.client, self.fleet, self.chats = client, fleet, engine == "vllm"
        self.heads = HeadCache()
        self.rests_until = 0.0

    async def encode(self, prompt: Prompt, model: object) -> np.ndarray:
        """Token ids of a prompt, int64 [T]. Raises Untokenised."""
        named = {"model": model} if isinstance(model, str) else {}
        if prompt.text is not None:
            return await self._ask({**named, "prompt": prompt.text})
        if not self.chats:
            return await self._ask({**named, "prompt": "\n".join(m["content"] for m in prompt.messages)})
        head, rest = prompt.head, prompt.messages[len(prompt.head) :]
        template = prompt.template or {}
        if not rest or sum(len(m["content"]) for m in head) < LONG_HEAD:
            return await self._ask({**named, **template, "messages": prompt.messages})
        key = key_of(model, head, template)
        head_T = self.heads.get(key)
        if head_T is None:
            whole_T = await self._ask({**named, **template, "messages": prompt.messages})
            self._keep_head(key, head, named, whole_T)
            return whole_T
        return np.concatenate([head_T, await self._ask({**named, "messages": rest})])

    def _keep_head(self, key: bytes, head: tuple[Message, ...], named: dict[str, Any], whole_T: np.ndarray) -> None:
        """Ask for the ids of the system prompt behind this request's back."""

        async def ask() -> None:
            try:
                asked = {**named, "messages": head, "add_generation_prompt": False}
                self.heads.put(key, await self._ask(asked))
            except Untokenised:  # a template that wants a question: the start of the whole is no worse
                share = sum(len(m["content"]) for m in head)
                self.heads.put(key, whole_T[: min(len(whole_T), share // 4)])

        self.keeping = asyncio.ensure_future(ask())

    async def _ask(self, question: dict[str, Any]) -> np.ndarray:
        now = asyncio.get_running_loop().time()
        if now < self.rests_until:
            raise Untokenised("no_tokenize")
        upstream = next((u for u in self.fleet.upstreams if u.up), None)
        if upstream is None:
            raise Untokenised("no_upstream")
        asked = json.dumps(question).encode()
        try:
            async with asyncio.timeout(TIMEOUT):
                status, told = await self.client.fetch(upstream.url, "POST", b"/tokenize", JSON, asked)
            answer = orjson.loads(told) if status == 200 else None
        except (UpstreamError, TimeoutError, ValueError):
            raise Untokenised("no_answer") from None
        if status in (404, 405, 501):
            self.rests_until = now + REST
            raise Untokenised("no_tokenize")
        if status != 200:
            raise Untokenised("refused")
        return ids_of(answer.get("tokens") if isinstance(answer, dict) else None)


def ids_of(value: Any) -> np.ndarray:
    """Token ids that somebody answered with, int64 [T]. Raises Untokenised where they are none."""
    ids_T = whole_numbers(value) if isinstance(value, list) else None
    if ids_T is None:
        raise Untokenised("empty" if value == [] else "no_answer")
    return ids_T


class LocalTokenizer:
    """A tokenizer in this process: of a checkpoint directory or a hub id."""

    def __init__(self, name: str) -> None:
        """Raises InputError where it cannot be loaded."""
        require_extra("--tokenizer", "transformers")
        self.tokenizer = load_tokenizer(name)
        self.heads = HeadCache()
        # One thread: the tokenizers work outside the interpreter's lock and use cores of their own.
        self.threads = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    async def encode(self, prompt: Prompt, model: object) -> np.ndarray:
        """Token ids of a prompt, int64 [T]. Raises Untokenised."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, self._encode, prompt)

    def _encode(self, prompt: Prompt) -> np.ndarray:
        if prompt.text is not None:
            return self._ids(prompt.text, special=True)
        if getattr(self.tokenizer, "chat_template", None) is None and not (prompt.template or {}).get("chat_template"):
            raise Untokenised("no_chat_template")
        text = self._templated(prompt.messages, prompt, reply=True)
        head = self._head_text(prompt)
        if not head or not text.startswith(head):
            return self._ids(text, special=False)
        key = key_of(head)
        head_T = self.heads.get(key)
        if head_T is None:
            head_T = self._ids(head, special=False)
            self.heads.put(key, head_T)
        return np.concatenate([head_T, self._ids(text[len(head) :], special=False)])

    def _head_text(self, prompt: Prompt) -> str:
        """What the template makes of a long system prompt alone; "" where it makes nothing of
        it."""
        if len(prompt.head) == len(prompt.messages) or sum(len(m["content"]) for m in prompt.head) < LONG_HEAD:
            return ""
        try:
            return self._templated(prompt.head, prompt, reply=False)
        except Untokenised:
            return ""

    def _templated(self, messages: tuple[Message, ...], prompt: Prompt, *, reply: bool) -> str:
        template = dict(prompt.template or {})
        more = template.pop("chat_template_kwargs", None)
        more = more if isinstance(more, dict) else {}
        try:
            return self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                **{**template, **more, "tokenize": False, "add_generation_prompt": reply},
            )
        except Exception:  # whatever jinja2 raises for a template that refuses these messages
            raise Untokenised("template_refuses") from None

    def _ids(self, text: str, *, special: bool) -> np.ndarray:
        try:
            ids = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        except (TypeError, ValueError, UnicodeError):  # text with half a surrogate pair
            raise Untokenised("refused") from None
        return np.asarray(ids, np.int64)


def load_tokenizer(name: str) -> Callable[..., Any]:
    """The tokenizer of a checkpoint directory or a hub id. Raises InputError where it has none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = " ".join((str(error).strip() or type(error).__name__).split("\n")[0].split())
        raise InputError(f"--tokenizer {name}: {reason}") from None
    # Some families make a tokenizer of special tokens alone where a directory holds no tokenizer.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        where = "holds no tokenizer" if Path(name).exists() else "has no tokenizer"
        raise InputError(f"--tokenizer {name}: it {where}")
    return tokenizer
