"""How a causal model of Transformers is called: names of arguments and of what comes back.

Shape letters: B requests, S positions (padding included), Q positions of one forward pass, V
vocabulary.
"""

import inspect
from typing import Any

import torch


def cache_name(model: Any) -> str:
    """What the model's forward calls its cache, as an argument and in its output: `cache` from
    Transformers 5.24 on."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def last_logits(
    model: Any,
    ids_BQ: torch.Tensor,
    cache: Any,
    *,
    mask_BS: torch.Tensor | None = None,
    position_BQ: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Any]:
    """One forward pass over the last Q of S positions.

    Parameters:
        ids_BQ: int64, token ids.
        cache: what the pass before gave back; None at first.
        mask_BS: int64, 0 at padding; None: there is none.
        position_BQ: int64, positions of the ids; None: those after the cache's.

    Returns:
        Logits of the last position, float32 [B, V], and the cache.
    """
    name = cache_name(model)
    arguments = {"input_ids": ids_BQ, "attention_mask": mask_BS, "position_ids": position_BQ, name: cache}
    arguments |= {"use_cache": True, "logits_to_keep": 1}
    takes = inspect.signature(model.forward).parameters
    output = model(**{key: value for key, value in arguments.items() if key in takes})
    return output.logits[:, -1].float(), getattr(output, name)


def all_logits(model: Any, ids_BQ: torch.Tensor) -> torch.Tensor:
    """Logits of whole requests, float32 [B, Q, V]."""
    return model(input_ids=ids_BQ, use_cache=False).logits.float()
