"""How each engine is told its rank, and what becomes of the client's own pin."""

import json

import pytest
from routers import in_loop, router
from stand_ins.standin_engine import engine

from semmoe.runtime.router.pins import with_fields

IDS = list(range(10, 60))
COMPLETIONS, CHAT, GENERATE = "/v1/completions", "/v1/chat/completions", "/generate"


@pytest.mark.parametrize("data", [b'{"a": 1}', b' \n{ "a":1 }', b"{}", b'{"a": {"b": "{"}}', b'{"a":1,"a":2}'])
def test_a_field_is_inserted_and_the_rest_stays_as_it_was(data):
    body = json.loads(data)
    found = with_fields(data, body, {"rank": 3})
    assert json.loads(found) == {"rank": 3, **body}
    assert found.replace(b'"rank": 3', b"").replace(b"{,", b"{") == data


def test_a_field_that_is_there_is_replaced():
    body = {"text": "\u00e9\ud800", "rank": None}
    assert json.loads(with_fields(json.dumps(body).encode(), body, {"rank": 1})) == {"text": "\u00e9\ud800", "rank": 1}


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, GENERATE])
@in_loop
async def test_sglang_reads_its_rank_in_the_body(plan, path):
    asked = {
        COMPLETIONS: {"prompt": IDS},
        CHAT: {"messages": [{"role": "user", "content": "a"}]},
        GENERATE: {"input_ids": IDS},
    }
    async with engine() as one, router(plan, one.url, engine="sglang") as served:
        assert (await served.post(path, asked[path]))[0] == 200
        pin = one.generations[0].body.pop("routed_dp_rank")
        assert pin in (0, 1) and one.generations[0].header("x-data-parallel-rank") is None


@in_loop
async def test_tensorrt_llm_reads_its_rank_in_the_body(plan):
    async with engine() as one, router(plan, one.url, engine="trtllm") as served:
        assert (await served.post(COMPLETIONS, {"prompt": IDS}))[0] == 200
        body = one.generations[0].body
        assert body["attention_dp_rank"] in (0, 1) and body["attention_dp_relax"] is False
        assert one.questions == []


@in_loop
async def test_where_the_rank_is_the_url_nothing_is_added(plan):
    async with engine() as one, engine() as two, router(plan, one.url, two.url) as served:
        for number in range(4):
            assert (await served.post(COMPLETIONS, {"prompt": [10 * number + i for i in range(30)]}))[0] == 200
        sent = one.generations + two.generations
        assert len(sent) == 4
        assert all(each.header("x-data-parallel-rank") is None and list(each.body) == ["prompt"] for each in sent)


@in_loop
async def test_two_ranks_of_the_plan_in_one_rank_of_the_engine(plan, tmp_path):
    from engine_plans import served_plan

    served_plan(tmp_path, ranks=8).save(tmp_path / "p")
    async with engine() as one, engine() as two, router(tmp_path / "p", one.url, two.url, dp_ranks=4) as served:
        for number in range(12):
            assert (await served.post(COMPLETIONS, {"prompt": [20 * number + i for i in range(30)]}))[0] == 200
        pins = {each.header("x-data-parallel-rank") for each in one.generations + two.generations}
        assert pins <= {"0", "1"}  # each server counts its own two ranks
        assert len(served.status.to_json()["ranks"]) == 4


@pytest.mark.parametrize(
    ("kind", "headers", "fields"),
    [
        ("vllm", {"X-Data-Parallel-Rank": "{}"}, {}),
        ("sglang", {"X-Data-Parallel-Rank": "{}"}, {}),
        ("sglang", {}, {"routed_dp_rank": "{}"}),
        ("sglang", {}, {"data_parallel_rank": "{}"}),
        ("trtllm", {}, {"attention_dp_rank": "{}"}),
    ],
)
@in_loop
async def test_the_clients_pin_wins(plan, kind, headers, fields):
    async with engine() as one, engine() as two:
        async with router(plan, one.url, engine=kind) as served:
            for rank in (0, 1):
                told = {k: v.format(rank) for k, v in headers.items()}
                body = {"prompt": IDS, **{k: rank for k in fields}}
                assert (await served.post(COMPLETIONS, body, **told))[0] == 200
                assert one.generations[-1].body == body
                assert {n.lower(): v for n, v in one.generations[-1].headers}.items() >= {
                    k.lower(): v for k, v in told.items()
                }.items()
            assert served.decisions == {"pinned": 2}
            told = {k: v.format(2) for k, v in headers.items()}
            assert (await served.post(COMPLETIONS, {"prompt": IDS, **dict.fromkeys(fields, 2)}, **told))[0] == 400
        async with router(plan, two.url, one.url, engine=kind) as served:
            one.seen.clear()
            told = {k: v.format(1) for k, v in headers.items()}
            assert (await served.post(COMPLETIONS, {"prompt": IDS, **dict.fromkeys(fields, 1)}, **told))[0] == 200
            assert one.generations[0].body == {"prompt": IDS} and two.generations == []
            assert one.generations[0].header("x-data-parallel-rank") is None


@in_loop
async def test_a_pin_that_vllm_ignores_is_ours_to_set(plan):
    async with engine() as one, router(plan, one.url) as served:
        assert (await served.post(COMPLETIONS, {"prompt": IDS}, **{"X-Data-Parallel-Rank": "abc"}))[0] == 200
        assert one.generations[0].header("x-data-parallel-rank") in ("0", "1")
