"""--check: the same prompts through plain Transformers in one process, greedy, one at a time;
tokens must be equal.

In a narrow number type two tokens can have logits that are equal, or differ by less than sums in
another order do. Such a difference is a tie, not a mismatch: it is reported, the generated token is
taken, and the comparison goes on behind it. Tie: the model puts its own token above the generated
one by at most TIE_STEPS rounding steps of its largest logit (2e-6 of it in float32, 1.6 % in
float16, 12.5 % in bfloat16). Sums in another order move a logit by 1 or 2 steps in most places, and
by up to 12 where a router's choice lay at an edge and falls otherwise (measured on the 16M model).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from semmoe.profiles.progress import Progress, unshown
from semmoe.runtime.serving.batch import Limits, Prompt
from semmoe.runtime.transformers.forward import last_logits

MOST_REPORTED = 10
TIE_STEPS = 16


class Compared(NamedTuple):
    """Differences of one continuation: {"position", "expected", "got", "logit_gap"} each."""

    ties: list[dict[str, Any]]
    mismatch: dict[str, Any] | None


def check_completions(
    model: Any,
    prompts: list[Prompt],
    lines: list[dict[str, Any]],
    limits: Limits,
    *,
    tell: Callable[[str], None],
    progress: Progress = unshown,
) -> dict[str, Any]:
    """Compare completions with what the model itself generates.

    Parameters:
        model: whole, of plain Transformers.
        lines: completions as output lines, in the order of `prompts`.
        limits: those of the run.

    Returns:
        {"ok", "compared", "mismatches", "ties"}: no mismatch; completions; differences as {"id",
        "position", "expected", "got", "logit_gap"}, at most 10 of each. `logit_gap`: how far the
        model puts its own token above the one that was generated.
    """
    how_far = {"max_new_tokens": limits.max_new_tokens, "stop_ids": limits.stop_ids}
    mismatches, ties = [], []
    for number, (prompt, line) in enumerate(zip(prompts, lines, strict=True)):
        progress(number, len(prompts))
        found = compare_greedy(model, prompt, line["token_ids"], **how_far)
        ties += [{"id": prompt.request_id, **tie} for tie in found.ties]
        if wrong := found.mismatch:
            mismatches.append({"id": prompt.request_id, **wrong})
            tell(
                f"check: request {prompt.request_id} differs at generated token {wrong['position']}: expected {wrong['expected']}, "
                f"got {wrong['got']}, logit gap {wrong['logit_gap']:.3g}"
            )
    if ties:
        dtype_name = str(model.dtype).removeprefix("torch.")
        tell(f"check: {len(ties)} differences are ties: logits within {TIE_STEPS} rounding steps of {dtype_name}")
    return {
        "ok": not mismatches,
        "compared": len(prompts),
        "mismatches": mismatches[:MOST_REPORTED],
        "ties": ties[:MOST_REPORTED],
    }


def compare_greedy(
    model: Any, prompt: Prompt, got: list[int], *, max_new_tokens: int, stop_ids: frozenset[int]
) -> Compared:
    """Where `got` leaves the model's own greedy continuation; behind a tie the model continues
    `got`."""
    ids = torch.as_tensor(prompt.token_ids, dtype=torch.int64, device=model.device)[None]
    cache, ties = None, []
    with torch.inference_mode():
        for position in range(max_new_tokens):
            logits_BV, cache = last_logits(model, ids, cache)
            logits_V = logits_BV[0]
            expected = int(logits_V.argmax())
            if position >= len(got):
                return Compared(ties, difference(position, expected, None, float("inf")))
            token = got[position]
            if token != expected:
                gap = float(logits_V[expected] - logits_V[token])
                found = difference(position, expected, token, gap)
                if not gap <= TIE_STEPS * torch.finfo(model.dtype).eps * float(logits_V.abs().max()):
                    return Compared(ties, found)
                ties.append(found)
            if token in stop_ids:
                break
            ids = torch.tensor([[token]], device=model.device)
    if len(got) > position + 1:
        return Compared(ties, difference(position + 1, None, got[position + 1], float("inf")))
    return Compared(ties, None)


def difference(position: int, expected: int | None, got: int | None, gap: float) -> dict[str, Any]:
    """`expected` or `got` None: one of the two had ended."""
    return {"position": position, "expected": expected, "got": got, "logit_gap": gap}
