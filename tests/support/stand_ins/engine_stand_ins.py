"""Classes in place of the engines' own, as far as our hooks touch them: same names, same fields,
same order of calls. tests/engines runs the hooks on the engines' own code."""

import collections
import sys
import types
from types import SimpleNamespace
from typing import Any

from transformers import Qwen3MoeConfig


def model_config(vocab_size: int = 400) -> Any:
    """A config.json that the synthetic trace of engine_plans.py could be of."""
    return Qwen3MoeConfig(
        num_hidden_layers=3, num_experts=16, num_experts_per_tok=4, vocab_size=vocab_size, hidden_size=8
    )  # fmt: skip


def vllm_config(ranks: int = 4, load_format: str = "auto", hf_config: Any = None) -> SimpleNamespace:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(data_parallel_size=ranks),
        load_config=SimpleNamespace(load_format=load_format),
        model_config=SimpleNamespace(hf_config=hf_config or model_config(), model="stand-in"),
    )


def add_vllm(monkeypatch) -> types.ModuleType:
    """vllm.v1.engine.core_client, .async_llm and .llm_engine."""

    class MPClient:
        def __init__(self, vllm_config, ranks=4, first=0):
            self.vllm_config = vllm_config
            self.engine_ranks_managed = list(range(first, first + ranks))
            self.core_engines = [bytes([rank]) for rank in self.engine_ranks_managed]

    class DPLBAsyncMPClient(MPClient):
        def __init__(self, vllm_config, ranks=4, first=0):
            super().__init__(vllm_config, ranks, first)
            self.lb_engines = [[0, 0, 0.0] for _ in range(ranks)]
            self.reqs_in_flight, self.engine_inflight = {}, collections.Counter()
            self.client_count, self.turn = 1, 0

        def get_core_engine_for_request(self, request):
            rank = request.data_parallel_rank
            if rank is None:
                rank, self.turn = self.turn % len(self.core_engines), self.turn + 1
            self.reqs_in_flight[request.request_id] = self.core_engines[rank]
            self.engine_inflight[self.core_engines[rank]] += 1
            return self.core_engines[rank]

    class AsyncLLM:
        closed = 0

        async def generate(self, outputs):
            try:
                for output in outputs:
                    yield output
            finally:
                AsyncLLM.closed += 1

        async def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
            return []

    class LLMEngine:
        def step(self):
            return []

        def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
            return []

    names = (
        "vllm",
        "vllm.v1",
        "vllm.v1.engine",
        *(f"vllm.v1.engine.{n}" for n in ("core_client", "async_llm", "llm_engine")),
    )
    for name in names:
        module = types.ModuleType(name)
        module.__path__ = []  # a package
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], module)
    client = sys.modules["vllm.v1.engine.core_client"]
    client.__dict__.update(MPClient=MPClient, DPLBAsyncMPClient=DPLBAsyncMPClient)
    sys.modules["vllm.v1.engine.async_llm"].__dict__["AsyncLLM"] = AsyncLLM
    sys.modules["vllm.v1.engine.llm_engine"].__dict__["LLMEngine"] = LLMEngine
    return client


def vllm_request(name: str, ids: list[int] | None, pin: int | None = None, **more: Any) -> SimpleNamespace:
    known = {"pooling_params": None, "sampling_params": SimpleNamespace(max_tokens=16), "external_req_id": None}
    return SimpleNamespace(**{"request_id": name, "prompt_token_ids": ids, "data_parallel_rank": pin, **known, **more})


def finished(name: str, prompt: list[int], answer: list[int], ids_TLK: Any) -> SimpleNamespace:
    """vLLM's RequestOutput of one sequence."""
    sequence = SimpleNamespace(index=0, token_ids=answer, routed_experts=ids_TLK)
    return SimpleNamespace(request_id=name, prompt_token_ids=prompt, outputs=[sequence], finished=True)


def controller(ranks: int = 4, method: str = "round_robin") -> SimpleNamespace:
    """SGLang's DP controller."""
    return SimpleNamespace(
        workers=[f"rank {rank}" for rank in range(ranks)],
        _active_workers=list(range(ranks)),
        status=[True] * ranks,
        dp_budget=SimpleNamespace(total_tokens=[0] * ranks, total_requests=[0] * ranks),
        method=method,
    )
