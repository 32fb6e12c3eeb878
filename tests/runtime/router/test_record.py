"""`--record`: what clients get, what the trace holds, and what is said where the plan's promise
fails."""

import asyncio
import json

import numpy as np
import pytest
from command_line import run
from engine_plans import served_plan
from routers import in_loop, router, until
from stand_ins.standin_engine import engine
from typer.testing import CliRunner

from semmoe.main import app
from semmoe.profiles.trace import RoutingTrace
from semmoe.runtime.engines.plan_files import read_plan_facts
from semmoe.runtime.engines.scorer import PlanScorer
from semmoe.runtime.router.record import LEAST_REQUESTS
from semmoe.runtime.router.routed import MARK, Asking, Events

COMPLETIONS, CHAT, GENERATE = "/v1/completions", "/v1/chat/completions", "/generate"


@pytest.fixture(scope="module")
def told(plan) -> dict:
    """An engine that runs the plan's model."""
    model = read_plan_facts(plan).model
    return {"routed_LK": (model["num_layers"], model["top_k"]), "num_experts": model["num_experts"]}


@in_loop
async def test_clients_get_what_they_would_without_it_and_the_trace_gets_the_routing(plan, told, tmp_path):
    prompts = [[10 + i, 20, 30, 40 + i] for i in range(6)]
    async with engine(**told) as one:
        async with router(plan, one.url, record=str(tmp_path / "t")) as served:
            answers = [await served.post(COMPLETIONS, {"prompt": prompt}) for prompt in prompts]
            await until(lambda: served.status.to_json()["recorded"].get("recorded") == 6)
            mean = served.status.to_json()["served_lar"]
        for status, answer in answers:
            choice = answer["choices"][0]
            assert status == 200 and choice["routed_experts"] is None and choice["text"]
            assert choice["token_ids"] is choice["prompt_token_ids"] is None
        pins = [int(each.header("x-data-parallel-rank") or -1) for each in one.generations]
        expected_ids = [one.routed({"prompt": prompt}) for prompt in prompts]
    trace = RoutingTrace.open(tmp_path / "t")
    batch = trace.load()
    assert batch.rank_of_B is not None and batch.rank_of_B.tolist() == pins
    assert [batch.prompt(b).tolist() for b in range(6)] == prompts
    assert [batch.sequence(b)[4:].tolist() for b in range(6)] == [[0, 1, 2, 3]] * 6
    np.testing.assert_array_equal(batch.expert_ids_TLK, np.concatenate(expected_ids))
    hosts_LEG = read_plan_facts(plan).hosts_LEG(2)
    layers = np.arange(expected_ids[0].shape[1])[:, None]
    shares = [hosts_LEG[layers, ids, rank].mean() for ids, rank in zip(expected_ids, pins, strict=True)]
    assert mean == pytest.approx(np.mean(shares))


@in_loop
async def test_a_client_that_asks_gets_them(plan, told, tmp_path):
    async with engine(**told) as one, router(plan, one.url, record=str(tmp_path / "t")) as served:
        body = {"prompt": [10, 20], "return_token_ids": True, "routed_experts_prompt_start": 0}
        assert (await served.post(COMPLETIONS, body))[1] == one.whole(body) | {"id": "r1"}


@in_loop
async def test_a_report_has_the_row_of_what_was_served(plan, told, tmp_path):
    async with engine(**told) as one:
        async with router(plan, one.url, record=str(tmp_path / "t")) as served:
            await asyncio.gather(*(served.post(COMPLETIONS, {"prompt": [9 + i, 30 + i, 70 + i]}) for i in range(40)))
            for i in range(3):  # the engine's to place, which does not say where
                await served.post(COMPLETIONS, {"prompt": [100_000 + i]})
            assert served.status.to_json()["unpinned"] == 3
    ranks_B = RoutingTrace.open(tmp_path / "t").load().rank_of_B
    assert ranks_B is not None and ranks_B[-3:].tolist() == [-1] * 3 and (ranks_B[:-3] >= 0).all()
    rows = json.loads(run("report", plan, tmp_path / "t", "--json"))["rows"]
    assert "as-served" in {row["schedule"] for row in rows}


@in_loop
async def test_a_router_that_starts_again_goes_on_with_its_trace(plan, told, tmp_path):
    for number in range(2):
        async with engine(**told) as one, router(plan, one.url, record=str(tmp_path / "t")) as served:
            one.seen += [None] * number  # pyright: ignore[reportArgumentType]  # ids of answers go on too
            await served.post(COMPLETIONS, {"prompt": [10, 20, 30]})
    assert RoutingTrace.open(tmp_path / "t").num_requests == 2


@pytest.mark.parametrize(("path", "asks"), [(GENERATE, False), (COMPLETIONS, False), (COMPLETIONS, True)])
@in_loop
async def test_streams_of_sglang_are_recorded_and_passed_without_the_last_event(plan, told, tmp_path, path, asks):
    prompt = {GENERATE: "input_ids", COMPLETIONS: "prompt"}[path]
    body = {prompt: list(range(10, 30)), "stream": True, **({"return_routed_experts": True} if asks else {})}
    async with engine(**told) as one, router(plan, one.url, engine="sglang", record=str(tmp_path / "t")) as served:
        async with served.client.post(served.url + path, json=body) as response:
            data = await response.read()
        assert data == b"".join(one.events(body))
        await until(lambda: served.status.to_json()["recorded"].get("recorded") == 1)
        expected = one.routed(body)
    batch = RoutingTrace.open(tmp_path / "t").load()
    np.testing.assert_array_equal(batch.expert_ids_TLK, expected)


def test_events_pass_whole_whatever_the_pieces():
    events = Events(Asking("sglang", ("sglext",), None, True))
    told = b'data: {"choices":[],"sglext":{"routed_experts":"AAAA"}}\n\n'
    sent = b'data: {"choices":[{"text":"\xc3\xa9"}]}\n\n' + told + b": a comment\n\n" + b"data: [DONE]\n\nrest"
    for size in (1, 7, 1000):
        found = b"".join(events.feed(sent[i : i + size]) for i in range(0, len(sent), size)) + events.end()
        assert found == sent.replace(told, b"")
        assert events.record == {"choices": [{}], "sglext": {"routed_experts": "AAAA"}}
    assert MARK in told


@in_loop
async def test_streams_of_vllm_tell_nothing_and_are_not_touched(plan, told, tmp_path):
    async with engine(**told) as one, router(plan, one.url, record=str(tmp_path / "t")) as served:
        async with served.client.post(served.url + COMPLETIONS, json={"prompt": [10], "stream": True}) as response:
            assert await response.read() == b"".join(one.events({}))
        assert one.generations[0].body == {"prompt": [10], "stream": True}


@in_loop
async def test_an_engine_without_the_flag_serves_on_and_is_told_of(plan, tmp_path, caplog):
    async with engine() as one, router(plan, one.url, record=str(tmp_path / "t")) as served:
        for _ in range(2):
            assert (await served.post(COMPLETIONS, {"prompt": [10]}))[0] == 200
        assert served.status.to_json()["recorded"] == {"untold": 2}
        assert caplog.text.count("--enable-return-routed-experts") == 1


@in_loop
async def test_answers_of_another_model_are_left_out(plan, tmp_path):
    async with engine(routed_LK=(2, 2), num_experts=500) as one:
        async with router(plan, one.url, record=str(tmp_path / "t")) as served:
            assert (await served.post(COMPLETIONS, {"prompt": [10]}))[0] == 200
            await until(lambda: served.status.to_json()["recorded"] == {"left_out": 1})


@in_loop
async def test_a_finding_says_that_the_promise_is_not_kept(plan, told, tmp_path):
    """The stand-in's routing has nothing to do with the plan's trace: with prompts that the plan is
    sure of, less is served at home than expected."""
    scorer = PlanScorer.open(plan)
    batch = next(RoutingTrace.open(plan.rpartition("/")[0] + "/t").batches())
    prompts = [batch.prompt(b).tolist() for b in range(batch.num_requests) if batch.prompt(b).size]
    sure = sorted(prompts, key=lambda p: -np.abs(scorer.scores(p)).max())[: LEAST_REQUESTS // 2 + 5]
    async with engine(**told) as one, router(plan, one.url, record=str(tmp_path / "t")) as served:
        for prompt in sure:
            await served.post(COMPLETIONS, {"prompt": prompt})
        assert served.status.to_json()["finding"] is None  # too few
        for prompt in sure:
            await served.post(COMPLETIONS, {"prompt": prompt})
        await until(lambda: served.status.to_json()["recorded"].get("recorded") == 2 * len(sure))
        finding = served.status.to_json()["finding"]
        status = served.status.to_json()
        if status["served_lar"] < status["expected_lar"] - 0.05:
            assert "falls short" in finding and f"semmoe place {tmp_path / 't'} --ranks 2" in finding
        else:
            pytest.fail(f"the stand-in served {status['served_lar']} of {status['expected_lar']}: no case")


def test_what_cannot_be_recorded_is_refused(plan, tmp_path):
    served_plan(tmp_path, ranks=2).save(tmp_path / "p")
    (tmp_path / "taken").write_text("x")
    for words, said in (
        (
            ("--engine", "trtllm", "--record", tmp_path / "x"),
            "--record: TensorRT-LLM's server returns no routed experts",
        ),
        (("--record", tmp_path / "taken"), "taken"),
        (("--record", tmp_path / "p"), "p is there already"),
    ):
        result = CliRunner().invoke(
            app, ["route", plan, "--upstream", "http://127.0.0.1:9", "--port", "0", *map(str, words)]
        )
        assert result.exit_code == 1 and said in str(result.exception), result.exception
    assert not (tmp_path / "x").exists()
