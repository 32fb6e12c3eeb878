#!/usr/bin/env python3
"""What the plug-in adds to the path of a request through vLLM's API server, in processor time.

    python tests/benchmarks/plugin_path.py PLAN FOLDER

FOLDER holds the package vllm (site-packages, or the part of a wheel that tests/engines/short
unpacks). vLLM's own choice of a rank is timed bare and with the plug-in around it, and so is an
answer of 200 tokens that passes its generator. Prints one JSON object; microseconds are the least
of the repeats, so they hold on a busy machine too.
"""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "engines"))
import hooks_on_wheels

from semmoe.runtime.engines.plan_files import read_plan_facts
from semmoe.runtime.engines.vllm_hooks import install

PROMPT_TOKENS, ANSWER_TOKENS, REQUESTS, REPEATS = 200, 200, 50, 20
SHARE = 0.01  # of a request, at most
UNDER_WAY = 64  # requests that the client has sent and not heard the end of


async def answer(_: Any) -> AsyncIterator[Any]:
    sequence = SimpleNamespace(index=0, token_ids=[1], routed_experts=None)
    output = SimpleNamespace(outputs=[sequence])
    for _token in range(ANSWER_TOKENS):
        yield output


def least_us(run: Callable[[], None]) -> float:
    """Processor time of one of the REQUESTS requests that `run` serves."""
    taken = []
    for _ in range(REPEATS):
        begin = time.process_time()
        run()
        taken.append(time.process_time() - begin)
    return min(taken) / REQUESTS * 1e6


def choose_us(client: Any, prompts: list[list[int]]) -> float:
    for number in range(UNDER_WAY):
        client.get_core_engine_for_request(hooks_on_wheels.vllm_request(f"old{number}", prompts[0]))

    def serve() -> None:
        for number, ids in enumerate(prompts):
            name = f"r{number}"
            engine = client.get_core_engine_for_request(hooks_on_wheels.vllm_request(name, ids))
            del client.reqs_in_flight[name]  # as vLLM does at the request's end
            client.engine_inflight[engine] -= 1

    return least_us(serve)


def answer_us(llm: Any) -> float:
    async def serve() -> None:
        for _ in range(REQUESTS):
            async for _output in llm.generate():
                pass

    return least_us(lambda: asyncio.run(serve()))


def main(plan: str, folder: Path) -> None:
    facts = read_plan_facts(plan)
    model = facts.model
    hooks_on_wheels.CONFIG.update(
        model_type=model["model_type"],
        num_hidden_layers=model["num_layers"],
        num_experts=model["num_experts"],
        num_experts_per_tok=model["top_k"],
        vocab_size=int(facts.tables["ids_V"][-1]) + 1,
    )
    known_V = facts.tables["ids_V"]
    drawn = np.random.default_rng(0).choice(known_V, (REQUESTS, PROMPT_TOKENS))
    prompts = [ids.tolist() for ids in drawn]
    client_class = hooks_on_wheels.vllm_client_class(folder)
    llm_class = sys.modules["vllm.v1.engine.async_llm"].AsyncLLM
    llm_class.generate = answer
    bare = choose_us(client_class(facts.num_ranks), prompts), answer_us(llm_class())
    plugin = install({"SEMMOE_PLAN": plan})
    assert plugin is not None
    with_us = choose_us(client_class(facts.num_ranks), prompts), answer_us(llm_class())
    assert plugin.counters.requests["affine"] + plugin.counters.requests["spilled"] > REPEATS * REQUESTS
    added = [ours - its for its, ours in zip(bare, with_us, strict=True)]
    found = {"benchmark": "plugin_path", "prompt_tokens": PROMPT_TOKENS, "answer_tokens": ANSWER_TOKENS}
    found |= {"vocabulary": len(known_V), "ranks": facts.num_ranks, "choice_bare_us": round(bare[0], 1)}
    found |= {"choice_added_us": round(added[0], 1), "answer_added_us": round(added[1], 1)}
    # A request of 200 tokens for which this would be 1 %: any slower one loses less.
    print(json.dumps(found | {"one_percent_of_ms": round(sum(added) / SHARE / 1e3, 1)}))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], Path(sys.argv[2]))
