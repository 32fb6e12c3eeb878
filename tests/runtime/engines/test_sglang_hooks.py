"""The plug-in inside SGLang, on stand-ins: a rank that is down is never set, and nothing of ours
stops the controller."""

import logging
import sys
import types
from types import SimpleNamespace

import pytest
from engine_plans import served_plan
from stand_ins.engine_stand_ins import controller

from semmoe.profiles.trace import RoutingTrace
from semmoe.runtime.engines.plan_files import read_plan_facts
from semmoe.runtime.engines.scorer import PlanScorer
from semmoe.runtime.engines.sglang_hooks import TARGET, Hook, Settings, install


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("sglang")
    served_plan(root).save(root / "p")
    return root


@pytest.fixture(scope="module")
def prompts(folder) -> list[list[int]]:
    batch = RoutingTrace.open(folder / "t").load()
    return [batch.prompt(b).tolist() for b in range(60)]


@pytest.fixture
def hook(folder) -> Hook:
    return Hook(Settings(read_plan_facts(folder / "p")))


def request(ids, pin=None):
    return SimpleNamespace(input_ids=ids, routed_dp_rank=pin, sampling_params=SimpleNamespace(max_new_tokens=16))


def original(controller, request):
    """What the real method does with a rank: one that is not active stops the server."""
    if request.routed_dp_rank is None:
        return False
    if request.routed_dp_rank not in controller._active_workers:
        raise ValueError(request.routed_dp_rank)
    return True


def test_the_first_request_goes_to_its_best_rank(folder, hook, prompts):
    asked = request(prompts[0])
    assert hook(original, controller(), asked) is True
    assert asked.routed_dp_rank == PlanScorer.open(folder / "p").scores(prompts[0]).argmax()


def test_a_pin_stays_and_unknown_prompts_are_left_to_sglang(hook, prompts):
    pinned, empty, strange = request(prompts[0], 3), request(None), request([99_999])
    server = controller()
    assert [hook(original, server, each) for each in (pinned, empty, strange)] == [True, False, False]
    assert (pinned.routed_dp_rank, empty.routed_dp_rank, strange.routed_dp_rank) == (3, None, None)
    assert hook.counters.requests == {"pinned": 1, "unknown": 2}


@pytest.mark.parametrize(
    "down", [{"_active_workers": [0, 2]}, {"status": [True, False, True, False]}, {"workers": ["a", None, "c", None]}]
)
def test_a_rank_that_is_down_is_never_set(hook, prompts, down):
    server = controller()
    server.__dict__.update(down)
    for ids in prompts:
        asked = request(ids)
        hook(original, server, asked)
        assert asked.routed_dp_rank in (0, 2)


def test_no_rank_is_up(hook, prompts):
    server, asked = controller(), request(prompts[0])
    server._active_workers = []
    assert hook(original, server, asked) is False and asked.routed_dp_rank is None


def test_the_budget_is_the_load_where_there_is_one_and_is_added_to(folder, hook, prompts):
    best = int(PlanScorer.open(folder / "p").scores(prompts[0]).argmax())
    server, asked = controller(), request(prompts[0])
    server.dp_budget.total_tokens = [100] * 4
    server.dp_budget.total_tokens[best] = 9_000
    hook(original, server, asked)
    assert asked.routed_dp_rank != best
    assert server.dp_budget.total_tokens[asked.routed_dp_rank] == 100 + len(prompts[0])
    assert sum(server.dp_budget.total_requests) == 1


def test_without_a_budget_what_was_sent_lately_is_the_load(hook, prompts):
    server, sent = controller(), []
    for _ in range(400):
        asked = request(prompts[0])
        hook(original, server, asked)
        sent.append(asked.routed_dp_rank)
    assert max(map(sent.count, range(4))) / 100 < 1.6  # the band


def test_a_fault_is_told_once_and_sglang_chooses(hook, prompts, caplog, monkeypatch):
    server = controller()
    hook(original, server, request(prompts[0]))
    monkeypatch.setattr(PlanScorer, "scores", lambda self, ids: 1 / 0)
    for ids in prompts[:5]:
        assert hook(original, server, request(ids)) is False
    assert hook.counters.requests["failed"] == 5
    assert sum(record.exc_info is not None for record in caplog.records) == 1


def test_a_controller_of_another_release_is_left_alone(hook, prompts, caplog):
    assert hook(lambda c, r: "own", SimpleNamespace(), request(prompts[0])) == "own"
    assert hook(lambda c, r: "own", SimpleNamespace(), request(prompts[0])) == "own"
    assert caplog.text.count("inactive, SGLang serves as without it") == 1


def test_a_plan_of_other_ranks_is_told_once(hook, prompts, caplog):
    for ids in prompts[:3]:
        assert hook(original, controller(3), request(ids)) is False
    assert caplog.text.count("do not divide over 3 DP ranks") == 1


@pytest.fixture
def registry(monkeypatch):
    """sglang.srt.plugins.hook_registry."""
    for name in ("sglang", "sglang.srt", "sglang.srt.plugins", "sglang.srt.plugins.hook_registry"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    registered = []
    module = sys.modules["sglang.srt.plugins.hook_registry"]
    module.__dict__.update(
        HookType=SimpleNamespace(AROUND="around"),
        HookRegistry=SimpleNamespace(register=lambda *a: registered.append(a)),
    )
    return registered


def test_the_hook_is_registered_and_says_that_it_is_live(folder, registry, prompts, caplog):
    install({"SEMMOE_PLAN": str(folder / "p")})
    ((target, hook, kind),) = registry
    assert target == TARGET and kind == "around"
    with caplog.at_level(logging.INFO):
        hook(original, controller(), request(prompts[0]))
    assert "the hook is live" in caplog.text


def test_a_plan_that_cannot_be_read_is_told(folder, registry, caplog, tmp_path):
    install({"SEMMOE_PLAN": str(tmp_path)})
    assert not registry and "inactive, SGLang serves as without it" in caplog.text
    with pytest.raises(SystemExit):
        install({"SEMMOE_PLAN": str(tmp_path), "SEMMOE_STRICT": "1"})
