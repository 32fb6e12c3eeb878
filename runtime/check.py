"""--check: the same prompts through plain Transformers in one process, greedy, one at a time; tokens must be equal."""

from collections.abc import Callable
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from profiles.errors import InputError
from profiles.loading import ModelSource, load_model
from runtime.engine import Prompt

MOST_REPORTED = 10


def check_completions(
    source: ModelSource,
    prompts: list[Prompt],
    lines: list[dict[str, Any]],
    *,
    dtype: str,
    device: torch.device,
    max_new_tokens: int,
    stop_ids: frozenset[int],
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """{"ok", "compared", "mismatches": [{"id", "position", "expected", "got", "logit_gap"}]}; at most 10 mismatches are listed.

    `logit_gap`: how far the model puts its own token above the one that was generated. A gap of rounding size is a tie.
    """
    transformers_logging.disable_progress_bar()
    model = load_model(source, dtype=dtype, device=device)
    mismatches = []
    for prompt, line in zip(prompts, lines, strict=True):
        if found := first_mismatch(model, prompt, line["token_ids"], max_new_tokens=max_new_tokens, stop_ids=stop_ids):
            mismatches.append({"id": prompt.request_id, **found})
            tell(
                f"check: request {prompt.request_id} differs at generated token {found['position']}: expected {found['expected']}, "
                f"got {found['got']}, logit gap {found['logit_gap']:.3g}"
            )
    return {"ok": not mismatches, "compared": len(prompts), "mismatches": mismatches[:MOST_REPORTED]}


def first_mismatch(
    model: Any, prompt: Prompt, got: list[int], *, max_new_tokens: int, stop_ids: frozenset[int]
) -> dict[str, Any] | None:
    """Where the model's own greedy continuation leaves `got`; None where they are equal."""
    ids = torch.as_tensor(prompt.token_ids, dtype=torch.int64, device=model.device)[None]
    cache = None
    with torch.inference_mode():
        for position in range(max_new_tokens):
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            logits_V, cache = output.logits[0, -1].float(), output.past_key_values
            expected = int(logits_V.argmax())
            if position >= len(got) or got[position] != expected:
                mine = got[position] if position < len(got) else None
                gap = float(logits_V[expected] - logits_V[mine]) if mine is not None else float("inf")
                return {"position": position, "expected": expected, "got": mine, "logit_gap": gap}
            if expected in stop_ids:
                break
            ids = torch.tensor([[expected]], device=model.device)
    return None


def require_checkable(layout_is_ranks: bool, checkpoint: str) -> None:
    """Raise InputError for a checkpoint that plain Transformers cannot load."""
    if layout_is_ranks:
        raise InputError(f"--check: {checkpoint} is a reshard for ranks, which plain Transformers cannot load")
