"""The plug-in inside vLLM, on stand-ins for its classes: who decides the rank, what is counted,
what comes back, and that nothing of ours stops a request."""

import asyncio
import logging
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from engine_plans import served_plan
from stand_ins.engine_stand_ins import add_vllm, finished, vllm_config, vllm_request

from semmoe.profiles.errors import InputError
from semmoe.profiles.trace import RoutingTrace
from semmoe.runtime.engines import entry
from semmoe.runtime.engines.plan_files import read_plan_facts
from semmoe.runtime.engines.recorder import finished_of
from semmoe.runtime.engines.scorer import PlanScorer
from semmoe.runtime.engines.vllm_hooks import CHOOSER, install, old_ids

RANKS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("vllm")
    served_plan(root).save(root / "p")
    return root


@pytest.fixture
def core(monkeypatch):
    return add_vllm(monkeypatch)


@pytest.fixture
def prompts(folder) -> list[list[int]]:
    batch = RoutingTrace.open(folder / "t").load()
    return [batch.prompt(b).tolist() for b in range(batch.num_requests)]


def client(core, folder, ranks=RANKS, **more):
    install({"SEMMOE_PLAN": str(folder / "p"), **{k: v for k, v in more.items() if k.startswith("SEMMOE")}})
    config = {k: v for k, v in more.items() if not k.startswith("SEMMOE")}
    return core.DPLBAsyncMPClient(vllm_config(ranks, **config), ranks)


def counts(client):
    return dict(getattr(client, CHOOSER).counters.requests)


def test_each_request_goes_to_its_best_rank_while_nothing_is_under_way(core, folder, prompts):
    served, scorer = client(core, folder), PlanScorer.open(folder / "p")
    for number, ids in enumerate(prompts):
        engine = served.get_core_engine_for_request(vllm_request(str(number), ids))
        assert engine == served.core_engines[scorer.scores(ids).argmax()]
        served.reqs_in_flight.clear()  # it is done
    assert counts(served) == {"affine": len(prompts)}
    assert not getattr(served, CHOOSER).tokens_G.any() or len(getattr(served, CHOOSER).requests) == 1


def test_load_stays_within_the_band_while_requests_pile_up(core, folder, prompts):
    served, scorer = client(core, folder, SEMMOE_BAND="1.1"), PlanScorer.open(folder / "p")
    prompts.sort(key=lambda ids: scorer.scores(ids).argmax())  # all of one kind, then all of the next
    for number, ids in enumerate(prompts):
        served.get_core_engine_for_request(vllm_request(str(number), ids))
    tokens_G = getattr(served, CHOOSER).tokens_G
    assert tokens_G.max() / tokens_G.mean() < 1.15
    found = counts(served)
    assert found["affine"] > 0 < found["spilled"] and found["affine"] + found["spilled"] == len(prompts)


def test_pins_win_and_what_nobody_knows_is_left_to_vllm(core, folder, prompts):
    served = client(core, folder)
    assert served.get_core_engine_for_request(vllm_request("pin", prompts[0], 3)) == bytes([3])
    left = [None, [], [99_999]]
    engines = [served.get_core_engine_for_request(vllm_request(str(i), ids)) for i, ids in enumerate(left)]
    pooled = vllm_request("pooled", prompts[0], pooling_params=object())
    engines.append(served.get_core_engine_for_request(pooled))
    assert engines == served.core_engines  # in turn: its own choice
    assert counts(served) == {"pinned": 1, "unknown": 4}
    assert len(getattr(served, CHOOSER).requests) == 5  # all of them are load


def test_a_chunk_of_a_request_under_way_stays_where_it_is(core, folder, prompts):
    served = client(core, folder)
    served.get_core_engine_for_request(vllm_request("a", prompts[0]))
    again = vllm_request("a", prompts[1])
    served.get_core_engine_for_request(again)
    assert again.data_parallel_rank is None and counts(served) == {"affine": 1}


def test_other_api_servers_count_as_load(core, folder, prompts):
    served, scorer = client(core, folder), PlanScorer.open(folder / "p")
    served.client_count = 2
    best = int(scorer.scores(prompts[0]).argmax())
    served.get_core_engine_for_request(vllm_request("a", prompts[0]))
    served.lb_engines[best] = [30, 30, 0.5]  # a crowd that another server has sent there
    assert served.get_core_engine_for_request(vllm_request("b", prompts[0])) != bytes([best])


def test_a_fault_is_told_once_and_the_engine_chooses(core, folder, prompts, caplog, monkeypatch):
    served = client(core, folder)

    def broken(self, ids):
        raise ZeroDivisionError("injected")

    monkeypatch.setattr(PlanScorer, "scores", broken)
    with caplog.at_level(logging.INFO):
        engines = [served.get_core_engine_for_request(vllm_request(str(i), prompts[i])) for i in range(4)]
    assert engines == served.core_engines and counts(served) == {"failed": 4}
    assert sum("injected" in (r.exc_text or "") for r in caplog.records) == 1


def test_a_fault_in_a_request_itself_is_one_too(core, folder, caplog):
    served = client(core, folder)
    request = vllm_request("odd", [1, 2])
    del request.pooling_params
    assert served.get_core_engine_for_request(request) == bytes([0])
    assert counts(served) == {"failed": 1}


def test_two_gpus_of_a_rank_add_up(core, folder, prompts):
    served, scorer = client(core, folder, ranks=2), PlanScorer.open(folder / "p", ranks=2)
    engine = served.get_core_engine_for_request(vllm_request("a", prompts[5]))
    assert engine == bytes([int(scorer.scores(prompts[5]).argmax())])


def test_a_node_of_several_chooses_among_its_own(core, folder, prompts):
    """Hybrid balancing: this client has ranks 2 and 3 of four."""
    install({"SEMMOE_PLAN": str(folder / "p")})
    served = core.DPLBAsyncMPClient(vllm_config(4), 2, first=2)
    request = vllm_request("a", prompts[5])
    served.get_core_engine_for_request(request)
    assert request.data_parallel_rank == int(PlanScorer.open(folder / "p").scores(prompts[5])[2:].argmax())


@pytest.mark.parametrize(
    ("ranks", "config", "said"),
    [
        (3, {}, "do not divide over 3 DP ranks"),
        (4, {"hf_config": "smaller"}, "knows token"),
        (4, {"hf_config": "dense"}, "the number of experts is None"),
    ],
)
def test_a_plan_that_does_not_fit_is_told_and_vllm_serves_on(core, folder, prompts, caplog, ranks, config, said):
    from stand_ins.engine_stand_ins import model_config
    from transformers import LlamaConfig

    configs = {"smaller": model_config(vocab_size=20), "dense": LlamaConfig()}
    config = {key: configs[value] for key, value in config.items()}
    with caplog.at_level(logging.INFO):
        served = client(core, folder, ranks, **config)
    (line,) = [r.message for r in caplog.records if "semmoe" in r.message]
    assert "inactive, vLLM serves as without it" in line and said in line
    engines = [served.get_core_engine_for_request(vllm_request(str(i), prompts[i])) for i in range(ranks)]
    assert engines == served.core_engines


def test_strict_stops_instead(core, folder):
    with pytest.raises(InputError, match="do not divide over 3 DP ranks"):
        client(core, folder, 3, SEMMOE_STRICT="1")


def test_the_start_is_one_line_of_what_is_active(core, folder, caplog):
    with caplog.at_level(logging.INFO):
        client(core, folder)
    (line,) = [r.message for r in caplog.records if "semmoe" in r.message]
    fingerprint = read_plan_facts(folder / "p").fingerprint
    assert f"plan {folder}/p ({fingerprint}); active: DP rank by prompt, band 1.5; not: placement at load" in line
    caplog.clear()
    with caplog.at_level(logging.INFO):
        core.MPClient(vllm_config(1), 1)
    assert "DP rank by prompt (one engine)" in caplog.text


@pytest.mark.parametrize("wrong", [{"SEMMOE_BAND": "wide"}, {"SEMMOE_BAND": "0.5"}, {"SEMMOE_PLAN": "/nowhere"}])
def test_settings_that_cannot_be_used_are_told(core, folder, caplog, wrong):
    environment = {"SEMMOE_PLAN": str(folder / "p"), **wrong}
    install(environment)
    assert "inactive, vLLM serves as without it" in caplog.text
    assert not hasattr(core.DPLBAsyncMPClient.get_core_engine_for_request, "by_semmoe")
    with pytest.raises(InputError):
        install({**environment, "SEMMOE_STRICT": "1"})


def test_a_second_call_wraps_nothing_again(core, folder):
    install({"SEMMOE_PLAN": str(folder / "p")})
    wrapped = core.DPLBAsyncMPClient.get_core_engine_for_request
    install({"SEMMOE_PLAN": str(folder / "p")})
    assert core.DPLBAsyncMPClient.get_core_engine_for_request is wrapped


def test_without_settings_nothing_is_imported():
    code = (
        "import sys\n"
        "from semmoe.runtime.engines.entry import vllm, sglang\n"
        "before = set(sys.modules)\n"
        "vllm(); sglang()\n"
        "assert set(sys.modules) == before, set(sys.modules) - before\n"
        "assert not [n for n in sys.modules if n.startswith(('numpy', 'vllm', 'semmoe.profiles'))]\n"
    )
    clean = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


def test_the_load_format_is_known_once_the_loaders_are_imported(tmp_path, monkeypatch):
    package = tmp_path / "waited_for"
    package.mkdir()
    (package / "__init__.py").write_text("LOADERS = {}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    entry._when_imported("waited_for", lambda module: module.LOADERS.update(semmoe=1))
    import waited_for  # pyright: ignore

    assert waited_for.LOADERS == {"semmoe": 1}
    entry._when_imported("waited_for", lambda module: module.LOADERS.update(now=2))
    assert waited_for.LOADERS["now"] == 2


def answers(llm, outputs):
    async def collect():
        return [output async for output in llm.generate(outputs)]

    return asyncio.run(collect())


def test_ids_of_a_placed_model_come_back_in_its_own_numbering(core, folder):
    plan = read_plan_facts(folder / "p")
    client(core, folder, load_format="semmoe")
    own_TLK = np.random.default_rng(0).integers(0, 16, (7, 3, 4)).astype(np.uint8)
    new_of_old = np.argsort(plan.orders_LE, axis=1)
    served_TLK = new_of_old[np.arange(3)[:, None], own_TLK].astype(np.uint8)
    from vllm.v1.engine.async_llm import AsyncLLM  # pyright: ignore

    (output,) = answers(AsyncLLM(), [finished("a", [1] * 4, [2] * 4, served_TLK)])
    np.testing.assert_array_equal(output.outputs[0].routed_experts, own_TLK)
    deep_TLK = np.zeros((7, 5, 4), np.uint8)
    facts = plan.model | {"model_layers": [1, 3, 4]}
    deep_TLK[:, [1, 3, 4]] = served_TLK
    from dataclasses import replace

    back_TLK = old_ids(deep_TLK, replace(plan, model=facts))
    np.testing.assert_array_equal(back_TLK[:, [1, 3, 4]], own_TLK)
    assert not back_TLK[:, [0, 2]].any()


def test_a_client_that_leaves_is_heard_of(core, folder):
    client(core, folder)
    from vllm.v1.engine.async_llm import AsyncLLM  # pyright: ignore

    async def leave():
        stream = AsyncLLM().generate([finished(str(i), [1], [2], None) for i in range(3)])
        async for _ in stream:
            break
        await stream.aclose()

    asyncio.run(leave())
    assert AsyncLLM.closed == 1


def test_a_full_queue_drops_and_counts(core, folder, tmp_path, monkeypatch):
    plugin = install(
        {"SEMMOE_PLAN": str(folder / "p"), "SEMMOE_RECORD": str(tmp_path / "r"), "SEMMOE_RECORD_SHARE": "0.5"}
    )
    core.DPLBAsyncMPClient(vllm_config(RANKS), RANKS)
    recorder = plugin.recorder
    hanging = threading.Event()  # a disk that does not answer
    monkeypatch.setattr(recorder, "_add", lambda finished: hanging.wait())
    output = finished("0", [1, 2], [3], np.zeros((2, 3, 4), np.uint8))
    begin = time.monotonic()
    for number in range(4_000):
        output.request_id = str(number)
        recorder.put(finished_of(output, output.outputs[0], output.outputs[0].routed_experts, []))
    assert time.monotonic() - begin < 5
    wanted = sum(map(recorder.wants, map(str, range(4_000))))
    assert 1_800 < wanted < 2_200 and wanted - 1_030 < plugin.counters.dropped <= wanted - 1_024
    assert f"{plugin.counters.dropped} not recorded" in plugin.counters.line()
    hanging.set()
    recorder.close()


def test_what_is_served_is_recorded_with_rank_and_decision(core, folder, prompts, tmp_path):
    plugin = install({"SEMMOE_PLAN": str(folder / "p"), "SEMMOE_RECORD": str(tmp_path / "r")})
    served = core.DPLBAsyncMPClient(vllm_config(RANKS), RANKS)
    from vllm.v1.engine.async_llm import AsyncLLM  # pyright: ignore

    draw, sent = np.random.default_rng(0), []
    for number, ids in enumerate(prompts[:20]):
        pin = 2 if number % 5 == 0 else None
        engine = served.get_core_engine_for_request(vllm_request(f"in-{number}", ids, pin, external_req_id=str(number)))
        sent.append((engine[0], "pinned" if pin is not None else None))
        served.reqs_in_flight.clear()
        ids_TLK = draw.integers(0, 16, (len(ids) + 2, 3, 4)).astype(np.uint8)
        pieces = [
            finished(str(number), ids, [5], None),
            finished(str(number), ids, [6], None),
            finished(str(number), ids, [7], ids_TLK),
        ]
        for piece in pieces[:2]:
            piece.finished = False
        answers(AsyncLLM(), pieces)  # a stream: the last answer holds the last token alone
    plugin.recorder.close()
    trace = RoutingTrace.open(tmp_path / "r")
    batch = trace.load()
    assert batch.num_requests == 20 and batch.rank_of_B.tolist() == [rank for rank, _ in sent]
    assert [batch.sequence(b)[-3:].tolist() for b in range(20)] == [[5, 6, 7]] * 20
    assert trace.info.notes["served"] == {"ranks": 4, "plan": read_plan_facts(folder / "p").fingerprint}


@pytest.mark.parametrize("where", ["model_config", "aux_output_config"])  # until 0.30, from 0.32
def test_after_another_plan_ids_and_ranks_are_told_by_it(where, core, folder, tmp_path, monkeypatch):
    """What the front end does with the workers' answers; the workers themselves: tests/engines."""
    from stepped_plans import save_stepped
    from vllm.v1.engine.async_llm import AsyncLLM  # pyright: ignore

    from semmoe.solvers.plan import Plan

    save_stepped(Plan.load(folder / "p"), tmp_path / "p2", swaps=2)
    plans = [read_plan_facts(path) for path in (folder / "p", tmp_path / "p2")]
    calls, resets, applied = [], [], [True]

    async def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        calls.append((method, args))
        return [{"applied": each} for each in applied]

    async def reset_prefix_cache(self, reset_running_requests=False):
        resets.append(reset_running_requests)

    monkeypatch.setattr(AsyncLLM, "collective_rpc", collective_rpc)
    monkeypatch.setattr(AsyncLLM, "reset_prefix_cache", reset_prefix_cache, raising=False)
    served = client(core, folder, load_format="semmoe")
    llm = AsyncLLM()
    llm.engine_core, llm.vllm_config = served, served.vllm_config
    config = getattr(llm.vllm_config, where, SimpleNamespace())
    config.enable_return_routed_experts = True
    setattr(llm.vllm_config, where, config)
    own_TLK = np.random.default_rng(0).integers(0, 16, (7, 3, 4)).astype(np.uint8)

    def served_ids(plan):
        return np.argsort(plan.orders_LE, axis=1)[np.arange(3)[:, None], own_TLK].astype(np.uint8)

    def change(**words):
        return asyncio.run(llm.collective_rpc("semmoe_replan", **words))

    (before,) = answers(llm, [finished("a", [1] * 4, [2] * 4, served_ids(plans[0]))])
    applied[:] = [True, False]  # one worker cannot: none has
    assert not all(each["applied"] for each in change(args=(str(tmp_path / "p2"),))) and not resets
    (still,) = answers(llm, [finished("b", [1] * 4, [2] * 4, served_ids(plans[0]))])
    assert "no plan.json" in change(args=(str(tmp_path),))[0]["reason"] and len(calls) == 1
    applied[:] = [True]

    async def under_way():
        stream = llm.generate([finished(name, [1] * 4, [2] * 4, served_ids(plans[0])) for name in "cd"])
        first = await anext(stream)
        await llm.collective_rpc("semmoe_replan", kwargs={"plan": str(tmp_path / "p2")})
        return first, await anext(stream)

    first, mixed = asyncio.run(under_way())
    (after,) = answers(llm, [finished("e", [1] * 4, [2] * 4, served_ids(plans[1]))])
    for output in (before, still, first, after):
        np.testing.assert_array_equal(output.outputs[0].routed_experts, own_TLK)
    assert mixed.outputs[0].routed_experts is None and resets == [True]
    served.client_count = 2
    assert "several API servers" in change(args=(str(tmp_path / "p2"),))[0]["reason"]
