"""Routing of a made-up model at any size, quickly: Zipf token ids, requests with topics, group-limited top-k.

Token ids have latent vectors; an expert's score for an id is a product with its own vector. The router keeps the best
groups, then draws the k experts among the best candidates of the id, some of them replaced by the favourites of the
request's topic. Latents of neighbouring layers are independent, as labels of real layers are.

Shape letters: T tokens, L layers, E experts, K top-k, V vocabulary, C candidates of an id, O topics.
"""

from typing import NamedTuple

import numpy as np

LATENT = 16
TOPICS = 24


class Tokens(NamedTuple):
    token_ids_T: np.ndarray  # int32
    request_of_T: np.ndarray  # int64
    topic_T: np.ndarray  # int64


def draw_tokens(num_tokens: int, vocab_size: int, *, tokens_per_request: int, seed: int) -> Tokens:
    """Token ids of requests with one topic each: half of a request's tokens come from its topic's own Zipf order."""
    rng = np.random.default_rng([seed, 0])
    request_T = np.arange(num_tokens) // tokens_per_request
    topic_T = rng.integers(0, TOPICS, request_T[-1] + 1)[request_T]
    cumulative_V = np.cumsum(1 / (np.arange(vocab_size) + 2.7))
    rank_T = np.searchsorted(cumulative_V, rng.random(num_tokens) * cumulative_V[-1]).clip(max=vocab_size - 1)
    own_T = rng.random(num_tokens) < 0.5
    shift_T = np.where(own_T, (topic_T + 1) * (vocab_size // (TOPICS + 1)), 0)
    return Tokens(((rank_T + shift_T) % vocab_size).astype(np.int32), request_T, topic_T)


def route_layer(
    tokens: Tokens, vocab_size: int, num_experts: int, top_k: int, *, num_groups: int, layer: int, seed: int
) -> np.ndarray:
    """Experts of every token at one layer, uint8 or uint16 [T, K], distinct within a row."""
    rng = np.random.default_rng([seed, 1, layer])
    expert_ME = rng.normal(size=(LATENT, num_experts)).astype(np.float32)
    expert_ME += np.repeat(rng.normal(size=(LATENT, num_groups)) * 0.5, num_experts // num_groups, axis=1).astype(
        np.float32
    )
    expert_ME *= 4 / np.linalg.norm(expert_ME, axis=0)
    bias_E = rng.normal(0, 0.5, num_experts).astype(np.float32)
    seen_U, id_T = np.unique(tokens.token_ids_T, return_inverse=True)
    num_candidates = min(2 * top_k, num_experts)
    candidates_UC = np.empty((len(seen_U), num_candidates), np.int32)
    topic_OM = rng.normal(size=(TOPICS, LATENT)).astype(np.float32) * 2
    favourites_OC = np.argsort(-(topic_OM @ expert_ME + bias_E), axis=1)[:, :num_candidates].astype(np.int32)
    for start in range(0, len(seen_U), 16_384):
        latent_UM = rng.normal(size=(min(16_384, len(seen_U) - start), LATENT)).astype(np.float32)
        score_UE = latent_UM @ expert_ME + bias_E
        if num_groups > 1:
            by_group = score_UE.reshape(len(score_UE), num_groups, -1)
            best_UG = by_group.max(axis=2)
            cut_U = np.sort(best_UG, axis=1)[:, -max(2, num_groups // 2)]
            score_UE = np.where((best_UG >= cut_U[:, None])[:, :, None], by_group, -np.inf).reshape(len(score_UE), -1)
        part = np.argpartition(-score_UE, num_candidates - 1, axis=1)[:, :num_candidates]
        order = np.argsort(-np.take_along_axis(score_UE, part, 1), axis=1)
        candidates_UC[start : start + len(score_UE)] = np.take_along_axis(part, order, 1)
    ids_TK = np.empty((len(id_T), top_k), np.uint8 if num_experts <= 256 else np.uint16)
    decay_C = -0.25 * np.arange(num_candidates, dtype=np.float32)
    for start in range(0, len(id_T), 65_536):
        rows = slice(start, start + 65_536)
        mine_TC = candidates_UC[id_T[rows]]
        gumbel_TC = -np.log(-np.log(rng.random(mine_TC.shape, dtype=np.float32) * 0.9999 + 5e-5))
        picked = np.argpartition(-(gumbel_TC + decay_C), top_k - 1, axis=1)[:, :top_k]
        picked_TK = np.take_along_axis(mine_TC, picked, 1)
        # A quarter of the rows take one expert of their topic where they do not have it yet.
        pull_T = rng.random(len(picked_TK)) < 0.25
        wanted_T = favourites_OC[tokens.topic_T[rows], rng.integers(0, num_candidates, len(picked_TK))]
        pull_T &= ~(picked_TK == wanted_T[:, None]).any(axis=1)
        picked_TK[pull_T, rng.integers(0, top_k, int(pull_T.sum()))] = wanted_T[pull_T]
        ids_TK[rows] = picked_TK
    return ids_TK
