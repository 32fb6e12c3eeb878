"""--check on tokens made up by hand: equal, tied, wrong, cut off, and from another model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_model

from semmoe.profiles.capture.loading import find_model, load_model
from semmoe.runtime.serving.batch import Limits, Prompt
from semmoe.runtime.serving.check import check_completions, compare_greedy

PROMPT = Prompt(0, "r0", np.arange(5, 17, dtype=np.int32))
STOP = frozenset([3])


def greedy(model: Any, num_tokens: int, forced: dict[int, int] | None = None) -> list[int]:
    """The model's own tokens, except where `forced` says another."""
    ids, got = torch.from_numpy(PROMPT.token_ids).long()[None], []
    with torch.inference_mode():
        for position in range(num_tokens):
            token = int(model(input_ids=ids).logits[0, -1].float().argmax())
            got.append((forced or {}).get(position, token))
            ids = torch.cat([ids, torch.tensor([got[-1:]])], 1)
    return got


def twin_model(dtype: torch.dtype) -> tuple[Any, int, int]:
    """A model whose first token is tied with another: (model, token that it takes, its twin)."""
    model = tiny_model("qwen3_moe").to(dtype)
    first = greedy(model, 1)[0]
    twin = first + 1 if first + 1 < model.config.vocab_size else first - 1
    with torch.no_grad():
        model.lm_head.weight[twin] = model.lm_head.weight[first]
    return model, *sorted([first, twin])


def compared(model: Any, got: list[int], num_tokens: int = 4) -> Any:
    return compare_greedy(model, PROMPT, got, max_new_tokens=num_tokens, stop_ids=STOP)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_tie_is_no_mismatch(dtype: torch.dtype) -> None:
    model, first, twin = twin_model(dtype)
    assert compared(model, greedy(model, 4)) == ([], None)
    found = compared(model, greedy(model, 4, {0: twin}))
    tie = {"position": 0, "expected": first, "got": twin, "logit_gap": 0.0}
    assert found.ties[0] == tie and found.mismatch is None


def test_what_follows_a_tie_is_compared_too() -> None:
    model, _, twin = twin_model(torch.float32)
    got = greedy(model, 4, {0: twin})
    worst = int(model(input_ids=torch.tensor([[*PROMPT.token_ids, *got[:2]]])).logits[0, -1].argmin())
    found = compared(model, [*got[:2], worst, 9])
    assert len(found.ties) == 1
    assert (found.mismatch["position"], found.mismatch["expected"], found.mismatch["got"]) == (2, got[2], worst)


@pytest.mark.parametrize(("dtype", "steps"), [(torch.float32, 2.0**-23), (torch.bfloat16, 2.0**-7)])
def test_a_gap_over_the_tolerance_is_a_mismatch(dtype: torch.dtype, steps: float) -> None:
    model = tiny_model("qwen3_moe").to(dtype)
    logits_V = model(input_ids=torch.from_numpy(PROMPT.token_ids).long()[None]).logits[0, -1].detach().float()
    order = logits_V.argsort(descending=True).tolist()
    for token in order[1:]:
        gap = float(logits_V[order[0]] - logits_V[token])
        found = compared(model, greedy(model, 1, {0: token}), 1)
        assert (found.mismatch is None) == (gap <= 16 * steps * float(logits_V.abs().max())), token
    assert compared(model, [order[-1]], 1).mismatch["logit_gap"] > 0


def test_cut_off_and_overlong_continuations_are_mismatches() -> None:
    model = tiny_model("qwen3_moe")
    got = greedy(model, 4)
    assert compared(model, got[:3]).mismatch == {
        "position": 3,
        "expected": got[3],
        "got": None,
        "logit_gap": float("inf"),
    }
    with torch.no_grad():
        model.lm_head.weight[3] = model.lm_head.weight[got[0]] * 2  # now the model stops at once
    assert compared(model, [3]) == ([], None)
    assert compared(model, [3, 7]).mismatch["expected"] is None


def test_tokens_of_another_model_fail(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path / "m")
    tiny_model("qwen3_moe", seed=1).save_pretrained(tmp_path / "other")
    told: list[str] = []
    lines = [{"token_ids": greedy(model, 4)}]
    for folder, ok in (("m", True), ("other", False)):
        whole = load_model(find_model(str(tmp_path / folder)), dtype="float32", device=torch.device("cpu"))
        found = check_completions(whole, [PROMPT], lines, Limits(4, 100, STOP), tell=told.append)
        assert (found["ok"], found["compared"], len(found["mismatches"])) == (ok, 1, 0 if ok else 1)
    assert len(told) == 1 and told[0].startswith("check: request r0 differs at generated token ")
