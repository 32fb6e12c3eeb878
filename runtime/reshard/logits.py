"""Run a checkpoint and its relabelled form on the same tokens and compare what they say.

A relabelled model does the same arithmetic but for the order in which experts are summed, so logits
in float32 differ by rounding only; a router or a scale that was left behind shows at once.
"""

import json
from pathlib import Path
from typing import Any

from semmoe.profiles.config import text_config
from semmoe.profiles.errors import InputError

PROMPTS, LENGTH = 3, 32
TOLERANCE = 1e-4  # of the larger of 1 and the largest logit


def compare_logits(source: Path, relabelled: Path, *, seed: int = 0) -> float:
    """Largest absolute difference of the logits on random prompts. Raises InputError where it is
    not rounding."""
    import torch

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    vocab_size = int(text_config(config).get("vocab_size") or config.get("vocab_size") or 256)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, min(vocab_size, 50_000), (PROMPTS, LENGTH), generator=generator)
    before, after = logits_of(source, ids), logits_of(relabelled, ids)
    difference = (before - after).abs().max().item()
    limit = TOLERANCE * max(1.0, before.abs().max().item())
    if not difference <= limit:
        raise InputError(
            f"logits differ by {difference:.3g}, at most {limit:.3g} is rounding: the relabelled model is another model"
        )
    return difference


def logits_of(path: Path, ids: Any) -> Any:
    """float32 logits [prompts, length, vocabulary] of a checkpoint. Raises InputError where it
    cannot be loaded and run."""
    import torch
    from transformers.utils import logging as transformers_logging

    from semmoe.profiles.capture.loading import find_model, load_model, refusals

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    model = load_model(find_model(str(path)), dtype="float32", device=torch.device("cpu"))
    with torch.no_grad(), refusals(f"{path} cannot be run"):
        output = model(input_ids=ids)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state
