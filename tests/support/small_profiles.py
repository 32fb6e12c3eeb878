"""Profiles of a few tokens, for tests of solvers."""

import numpy as np

from semmoe.profiles.counts import RoutingProfile, count_batches
from semmoe.profiles.trace import TraceBatch, TraceInfo


def random_rows(rng: np.random.Generator, experts: int, tokens: int, skew: float = 0.0, top_k: int = 2) -> np.ndarray:
    weight_E = np.exp(skew * rng.random(experts))
    weight_E /= weight_E.sum()
    return np.array([rng.choice(experts, top_k, replace=False, p=weight_E) for _ in range(tokens)])


def profile_of(ids_TK: np.ndarray, experts: int, layers: int = 1) -> RoutingProfile:
    """Profile of one request per 10 rows, the same rows at every layer, and no token ids."""
    tokens, top_k = ids_TK.shape
    info = TraceInfo("m", layers, experts, top_k, tuple(range(layers)))
    starts_B1 = np.append(np.arange(0, tokens, 10), tokens)
    requests = len(starts_B1) - 1
    none = np.zeros(requests, np.int64)
    batch = TraceBatch(
        request_ids=[str(i) for i in range(requests)],
        domains=[""] * requests,
        starts_B1=starts_B1,
        expert_ids_TLK=np.repeat(ids_TK[:, None], layers, axis=1).astype(info.id_dtype),
        token_ids_T=np.full(tokens, -1, np.int32),
        is_prompt_T=np.zeros(tokens, bool),
        num_prompt_tokens_B=none,
        first_position_B=none,
        sequence_starts_B1=np.zeros(requests + 1, np.int64),
        sequences=np.empty(0, np.int32),
    )
    num_tokens, load_LE, co_activation_LEE = count_batches([batch], info)
    return RoutingProfile(info, num_tokens, load_LE, co_activation_LEE, batch)
