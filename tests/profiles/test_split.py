"""A trace with the tokens of one phase: rows, identity and split of its requests."""

import numpy as np
import pytest

from semmoe.profiles.errors import InputError
from semmoe.profiles.split import one_sided, only_phase, phase_of, phase_shares, request_keys, split_requests
from semmoe.profiles.trace import RoutingTrace, TraceInfo
from semmoe.profiles.trace_writer import TraceWriter

INFO = TraceInfo("tiny", num_layers=2, num_experts=8, top_k=3, model_layers=(1, 2))


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> RoutingTrace:
    """Three requests: rows 3.. of a prompt of 5 and its answer, a prompt alone, an answer alone."""
    path, rng = tmp_path_factory.mktemp("phases") / "t", np.random.default_rng(0)
    with TraceWriter(path, INFO) as writer:
        for name, rows, prompt, first in (("both", 6, 5, 3), ("prompt", 4, 9, 0), ("answer", 3, 2, 2)):
            ids = rng.integers(0, 8, (rows, 2, 3))
            sequence = np.arange(first + rows + 1)
            writer.add(name, ids, token_ids=sequence, num_prompt_tokens=prompt, first_position=first)
    return RoutingTrace.open(path)


def test_rows_of_a_phase_keep_their_ids_and_positions(trace) -> None:
    whole = trace.load()
    for phase, names, first_B in (("prompt", ["both", "prompt"], [3, 0]), ("generated", ["both", "answer"], [5, 2])):
        view = only_phase(trace, phase)
        batch = view.load()
        mine_T = whole.is_prompt_T == (phase == "prompt")
        np.testing.assert_array_equal(batch.expert_ids_TLK, whole.expert_ids_TLK[mine_T])
        np.testing.assert_array_equal(batch.token_ids_T, whole.token_ids_T[mine_T])
        assert batch.request_ids == names and batch.first_position_B.tolist() == first_B
        assert (view.num_requests, view.num_tokens) == (2, int(mine_T.sum())) == (2, len(batch.token_ids_T))
        assert batch.starts_B1.tolist() == [0, *np.cumsum(view.requests().column("num_tokens").to_pylist())]
        assert phase_of(view) == phase and view.fingerprint != trace.fingerprint
        (one,) = (part.request_ids for part in view.batches(np.array([False, True])))
        assert one == names[1:]
    assert only_phase(trace, "all") is trace
    assert phase_shares([trace]) == phase_shares([view]) == {"prompt": 6 / 13, "generated": 7 / 13}


def test_a_request_is_itself_in_every_phase(trace) -> None:
    keys = dict(zip(trace.load().request_ids, request_keys(trace.requests()), strict=True))
    for phase in ("prompt", "generated"):
        view = only_phase(trace, phase)
        assert [keys[name] for name in view.load().request_ids] == request_keys(view.requests()).tolist()
    options = {"holdout": 0.4, "holdout_domains": [], "seed": 3}
    held = dict(zip(keys, split_requests([trace], **options)[0], strict=True))
    for phase in ("prompt", "generated"):
        view = only_phase(trace, phase)
        assert [held[name] for name in view.load().request_ids] == split_requests([view], **options)[0].tolist()


def test_what_one_phase_means_is_said(tmp_path) -> None:
    assert one_sided({"prompt": 0.5, "generated": 0.5}) is None
    assert str(one_sided({"prompt": 1.0, "generated": 0.0})).startswith(
        "all of the tokens are of prompts: it speaks for"
    )
    assert "97% of the tokens are generated" in str(one_sided({"prompt": 0.03, "generated": 0.97}))
    with TraceWriter(tmp_path / "g", INFO) as writer:
        writer.add("a", np.zeros((2, 2, 3), int) + np.arange(3), num_prompt_tokens=1, first_position=1)
    alone = RoutingTrace.open(tmp_path / "g")
    with pytest.raises(InputError, match="holds no prompt tokens: --phase prompt has nothing to count"):
        only_phase(alone, "prompt")
    with pytest.raises(InputError, match="--phase x: expected one of all, prompt, generated"):
        only_phase(alone, "x")
