"""Which rank a request gets: by its prompt, its conversation, the load; and where ids come
from."""

import asyncio

import numpy as np
import pytest
from routers import in_loop, router, until
from stand_ins.standin_engine import engine

from semmoe.profiles.trace import RoutingTrace
from semmoe.runtime.engines.scorer import PlanScorer
from semmoe.runtime.router.prompts import answer_limits, read_prompt
from semmoe.runtime.router.sessions import Sessions

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"


def prompts_of(plan: str) -> list[list[int]]:
    """Prompts of the plan's own trace."""
    batch = next(RoutingTrace.open(plan.rpartition("/")[0] + "/t").batches())
    return [batch.prompt(b).tolist() for b in range(batch.num_requests) if batch.prompt(b).size > 5]


@in_loop
async def test_requests_go_where_the_plans_scorer_says(plan):
    scorer, prompts = PlanScorer.open(plan), prompts_of(plan)[:30]
    async with engine() as one, router(plan, one.url) as served:
        for prompt in prompts:
            assert (await served.post(COMPLETIONS, {"prompt": prompt, "max_tokens": 4}))[0] == 200
        best = [str(scorer.scores(prompt).argmax()) for prompt in prompts]
        assert [each.header("x-data-parallel-rank") for each in one.generations] == best
        expected = np.mean([scorer.expected_lar(scorer.scores(p), int(r)) for p, r in zip(prompts, best, strict=True)])
        assert served.status.to_json()["expected_lar"] == pytest.approx(expected)
        assert set(best) == {"0", "1"}


@in_loop
async def test_a_busy_rank_is_passed_over_and_that_is_counted(plan):
    scorer = PlanScorer.open(plan)
    prompt = next(p for p in prompts_of(plan) if scorer.scores(p).argmax() == 0)
    async with engine(delay=0.5) as one, router(plan, one.url) as served:
        asking = [asyncio.ensure_future(served.post(COMPLETIONS, {"prompt": [i, *prompt]})) for i in range(2, 8)]
        await until(lambda: len(one.generations) == 6)
        assert abs(np.diff(served.status.proxy.fleet.in_flight_G)) <= 2
        await asyncio.gather(*asking)
        assert served.decisions["spilled"] >= 2


@pytest.mark.parametrize("known_by", ["header", "user", "prefix"])
@in_loop
async def test_a_conversation_stays_on_its_rank(plan, known_by):
    scorer = PlanScorer.open(plan)
    at_zero, at_one = ([p for p in prompts_of(plan) if scorer.scores(p).argmax() == rank] for rank in (0, 1))
    first, other = (at_zero[0] * 40)[:64], [number for prompt in at_one for number in prompt]
    second = first + other  # by itself, it would go to the other rank
    assert scorer.scores(second).argmax() != scorer.scores(first).argmax()
    headers = {"X-Session-Id": "s"} if known_by == "header" else {}
    more = {"user": "u"} if known_by == "user" else {}
    async with engine() as one, router(plan, one.url) as served:
        for prompt in (first, second):
            assert (await served.post(COMPLETIONS, {"prompt": prompt, **more}, **headers))[0] == 200
        assert served.decisions == {"affine": 1, "session": 1}
        pins = {each.header("x-data-parallel-rank") for each in one.generations}
        assert len(pins) == 1
        assert (await served.post(COMPLETIONS, {"prompt": other}))[0] == 200
        assert served.decisions == {"affine": 2, "session": 1}


def test_a_shared_system_prompt_is_no_conversation():
    sessions, system = Sessions(), np.arange(160)
    sessions.stay(sessions.keys(b"", None, np.concatenate([system, np.full(40, 7)])), 1)
    assert sessions.rank(sessions.keys(b"", None, np.concatenate([system, np.full(40, 8)]))) is None
    assert sessions.rank(sessions.keys(b"", None, np.concatenate([system, np.full(100, 7)]))) == 1


def test_the_oldest_conversation_is_forgotten_first():
    sessions = Sessions(most=2)
    keys = [sessions.keys(b"%d" % i, None, None) for i in range(3)]
    for i in (0, 1):
        sessions.stay(keys[i], i)
    sessions.stay(keys[0], 0)
    sessions.stay(keys[2], 1)
    assert [sessions.rank(key) for key in keys] == [0, None, 1]


@in_loop
async def test_text_and_chats_are_tokenised_by_the_engine(plan):
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": [{"type": "text", "text": "why"}]}]
    async with engine() as one, router(plan, one.url) as served:
        await served.post(COMPLETIONS, {"prompt": "a text", "model": "m"})
        await served.post(CHAT, {"messages": chat, "model": "m", "tools": [{"a": 1}]})
        await served.post(RESPONSES, {"input": "why", "instructions": "be brief"})
        flat = [chat[0], {"role": "user", "content": "why"}]
        assert one.questions == [
            {"model": "m", "prompt": "a text"},
            {"model": "m", "tools": [{"a": 1}], "messages": flat},
            {"messages": flat},
        ]
        assert served.decisions == {"affine": 2, "session": 1}  # the same prompt on another route


@in_loop
async def test_a_long_system_prompt_is_tokenised_once(plan):
    head = {"role": "system", "content": "be brief " * 500}
    async with engine() as one, router(plan, one.url) as served:
        for text in ("a", "b", "c"):
            await served.post(CHAT, {"messages": [head, {"role": "user", "content": text}]})
            await asyncio.sleep(0.05)
        asked = [question["messages"] for question in one.questions]
        rest = [{"role": "user", "content": text} for text in "abc"]
        assert asked == [[head, rest[0]], [head], [rest[1]], [rest[2]]]


@in_loop
async def test_an_engine_that_tokenises_nothing_is_not_asked_again(plan):
    async with engine(tokenize=False) as one, router(plan, one.url) as served:
        for _ in range(3):
            assert (await served.post(COMPLETIONS, {"prompt": "a text"}))[0] == 200
        assert len(one.questions) == 1
        assert served.status.to_json()["unknown"] == {"no_tokenize": 3}
        assert all(each.header("x-data-parallel-rank") is None for each in one.generations)


@in_loop
async def test_a_prompt_of_unseen_ids_is_the_engines_to_place(plan):
    async with engine() as one, router(plan, one.url) as served:
        assert (await served.post(COMPLETIONS, {"prompt": [100_000, 2**40]}))[0] == 200
        assert one.generations[0].header("x-data-parallel-rank") is None
        assert served.status.to_json()["unknown"] == {"unseen_ids": 1}
        assert served.status.to_json()["unpinned"] == 1


@in_loop
async def test_unpinned_requests_are_shared_among_urls(plan):
    async with engine(delay=0.2) as one, engine(delay=0.2) as two, router(plan, one.url, two.url) as served:
        await asyncio.gather(*(served.post(COMPLETIONS, {"prompt": [100_000]}) for _ in range(6)))
        assert len(one.generations) == len(two.generations) == 3


def test_what_a_request_counts_as():
    assert answer_limits({}) == (0, 1)
    assert answer_limits({"max_tokens": 5, "n": 3}) == (5, 3)
    assert answer_limits({"sampling_params": {"max_new_tokens": 7}}) == (7, 1)
    assert answer_limits({"max_tokens": -1, "max_completion_tokens": True, "n": "x"}) == (0, 1)


def test_batches_of_prompts_are_one_prompt():
    assert read_prompt(COMPLETIONS, {"prompt": ["a", "b"]}).text == "a\nb"  # pyright: ignore
    assert read_prompt(COMPLETIONS, {"prompt": [[1, 2], [3]]}).ids_T.tolist() == [1, 2, 3]  # pyright: ignore
