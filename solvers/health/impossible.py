"""Routing that no router makes: a layer with one choice for every token, rows copied from token to
token or from layer to layer. Such a trace is of a broken capture, however well it could be placed.

Shape letters: T tokens, L MoE layers, K top-k, E experts.
"""

from math import comb

import numpy as np

from semmoe.profiles.trace import TraceBatch, TraceInfo

LEAST_TOKENS = 50  # fewer may agree by chance
LEAST_TOKENS_ONE = 1000  # of one expert that all of them chose
MOST_TOKENS = 20_000  # that are compared row by row
LEAST_CHOICES = 28  # sets of experts of a layer (2 of 8): of fewer, rows agree by chance
MANY_COPIES = 0.4  # share of rows that are those before them; texts repeat less


def impossible_routing(load_LE: np.ndarray, batch: TraceBatch, info: TraceInfo) -> dict[int, str]:
    """What cannot be, by layer (counted from 0): one sentence with the number that the model gives
    the layer. `load_LE`: activations of the whole trace, int64. `batch`: requests of it."""
    found: dict[int, str] = {}
    if batch.num_tokens < LEAST_TOKENS or info.num_experts <= info.top_k:
        return found
    names = info.model_layers
    for layer, load_E in enumerate(load_LE):
        chosen = np.flatnonzero(load_E)
        everyone = np.flatnonzero(load_E == load_E.sum() / info.top_k)
        if 0 < len(chosen) <= info.top_k:
            experts = ", ".join(map(str, chosen[:8])) + (", ..." if len(chosen) > 8 else "")
            found[layer] = (
                f"layer {names[layer]} chose the same experts ({experts}) for every token: its capture is broken, or "
                "shared experts are counted as routed"
            )
        elif len(everyone) and load_E.sum() / info.top_k >= LEAST_TOKENS_ONE:
            found[layer] = (
                f"every token chose expert {everyone[0]} at layer {names[layer]}: a shared expert is counted as routed"
            )
    if info.top_k < 2 or comb(info.num_experts, info.top_k) < LEAST_CHOICES:
        return found
    row_TL = _row_keys(batch.expert_ids_TLK[:MOST_TOKENS], info.num_experts)
    follows_T = _follows(batch, len(row_TL))
    for layer in range(info.num_layers):
        if layer in found:
            continue
        copied = (row_TL[1:, layer] == row_TL[:-1, layer])[follows_T]
        if copied.size >= LEAST_TOKENS and copied.mean() > MANY_COPIES:
            found[layer] = (
                f"layer {names[layer]} repeats the row of the token before for {copied.mean():.0%} of the tokens"
            )
            continue
        same_L = (row_TL[:, :layer] == row_TL[:, layer, None]).mean(axis=0)
        if layer and same_L.max() > MANY_COPIES:
            other = int(same_L.argmax())
            if other not in found:
                share = f"{same_L[other]:.0%} of the tokens"
                found[layer] = f"layer {names[layer]} has the rows of layer {names[other]} for {share}"
    return found


def _row_keys(ids_TLK: np.ndarray, num_experts: int) -> np.ndarray:
    """One number for the experts of each token and layer, in their order, uint64 [T, L]."""
    key_TL = np.zeros(ids_TLK.shape[:2], np.uint64)
    for column in range(ids_TLK.shape[2]):
        key_TL = key_TL * np.uint64(num_experts + 7919) + ids_TLK[:, :, column].astype(np.uint64)
    return key_TL


def _follows(batch: TraceBatch, num_tokens: int) -> np.ndarray:
    """Whether rows t and t + 1 are of one request and of different tokens, bool [T - 1]."""
    request_T, token_T = batch.request_of_T[:num_tokens], batch.token_ids_T[:num_tokens]
    return (request_T[1:] == request_T[:-1]) & ((token_T[1:] != token_T[:-1]) | (token_T[1:] < 0))
