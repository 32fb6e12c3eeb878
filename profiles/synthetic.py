"""Synthetic traces with a known best placement: the answer is planted, so a method can be checked
against it.

Every layer splits its experts into equal groups under its own random labels. A token's identity
decides its group for the whole depth of the model, a domain prefers the tokens of some groups, and
a row picks its experts inside the group of its token. Ranks that each host whole groups are then
the best placement, as long as `noise` is small. Experts of a group are not equally popular, so that
balance is a question as well.

Shape letters: L MoE layers, E experts, K top-k, T tokens (rows), V vocabulary, G planted groups, D
domains.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from semmoe.profiles.errors import InputError
from semmoe.profiles.trace import TraceInfo
from semmoe.profiles.trace_writer import TraceWriter

POPULARITY_SPREAD = 0.5  # standard deviation of the log popularity of the experts of one group
DOMAIN_PREFERENCE = 6.0  # how much likelier a domain's own group of tokens is than another group


@dataclass(frozen=True)
class SyntheticWorld:
    """The sizes of a synthetic trace, and the one seed of all that is drawn."""

    num_layers: int = 4
    num_experts: int = 32
    top_k: int = 4
    num_groups: int = 4  # planted
    num_requests: int = 200
    tokens_per_request: int = 64
    vocab_size: int = 500
    noise: float = 0.1  # share of rows, and of picks in a row, that leave their group
    num_domains: int = 4
    seed: int = 0


@dataclass(frozen=True, eq=False)
class PlantedStructure:
    """What a synthetic trace is drawn from: fixed by its sizes and one seed."""

    group_of_LE: np.ndarray  # int32 [L, E], groups of E / G experts
    group_of_V: np.ndarray  # int32 [V], groups of about equal mass
    log_popularity_LE: np.ndarray  # float64 [L, E]
    token_share_DV: np.ndarray  # float64 [D, V], rows sum to 1


class SyntheticRequest(NamedTuple):
    request_id: str
    domain: str
    token_ids: np.ndarray  # int32 [T + 1]: the last token was sampled and has no row
    num_prompt_tokens: int
    expert_ids_TLK: np.ndarray  # int32 [T, L, K], ascending within a row


def plant_structure(world: SyntheticWorld) -> PlantedStructure:
    """Groups of experts and tokens, popularity, domains. Raises InputError where experts do not
    split evenly."""
    num_experts, num_groups, num_domains = world.num_experts, world.num_groups, world.num_domains
    vocab_size = world.vocab_size
    if num_groups < 1 or num_experts % num_groups:
        raise InputError(f"{num_experts} experts do not divide into {num_groups} groups")
    if vocab_size < num_groups or num_domains < 1:
        raise InputError(f"{vocab_size} tokens in {num_domains} domains cannot fill {num_groups} groups")
    rng = np.random.default_rng([world.seed, 0])
    template_E = np.repeat(np.arange(num_groups, dtype=np.int32), num_experts // num_groups)
    group_of_LE = np.stack([rng.permutation(template_E) for _ in range(world.num_layers)])
    zipf_V = 1 / (np.arange(vocab_size) + 2.7)
    # Most frequent token first, each to the lightest group: whole groups of tokens then weigh about
    # the same.
    group_of_V, mass_G = np.empty(vocab_size, np.int32), np.zeros(num_groups)
    for token in range(vocab_size):
        group_of_V[token] = np.argmin(mass_G)
        mass_G[group_of_V[token]] += zipf_V[token]
    own_DV = np.arange(num_domains)[:, None] % num_groups == group_of_V[None, :]
    share_DV = zipf_V * np.where(own_DV, DOMAIN_PREFERENCE, 1.0)
    return PlantedStructure(
        group_of_LE=group_of_LE,
        group_of_V=group_of_V,
        log_popularity_LE=rng.normal(0, POPULARITY_SPREAD, (world.num_layers, num_experts)),
        token_share_DV=share_DV / share_DV.sum(axis=1, keepdims=True),
    )


def route(
    structure: PlantedStructure, token_ids_T: np.ndarray, *, top_k: int, noise: float, rng: np.random.Generator
) -> np.ndarray:
    """Expert ids int32 [T, L, K] of a run of tokens, distinct and ascending within a row.

    With probability `noise` a row follows a random group instead of its token's, and each pick
    leaves the group.
    """
    num_layers, num_experts = structure.group_of_LE.shape
    num_tokens = len(token_ids_T)
    num_groups = int(structure.group_of_LE.max()) + 1
    strays_T = rng.random(num_tokens) < noise
    group_T = np.where(strays_T, rng.integers(0, num_groups, num_tokens), structure.group_of_V[token_ids_T])
    group_size = num_experts // num_groups
    ids_TLK = np.empty((num_tokens, num_layers, top_k), np.int32)
    pick_K = np.arange(top_k)
    for layer in range(num_layers):
        # Gumbel noise on log popularity: the largest k are a weighted draw without replacement.
        score_TE = structure.log_popularity_LE[layer] + rng.gumbel(size=(num_tokens, num_experts))
        inside_TE = structure.group_of_LE[layer] == group_T[:, None]
        outside_T = np.clip(rng.binomial(top_k, noise, num_tokens), top_k - group_size, num_experts - group_size)
        best_TK = np.argsort(np.where(inside_TE, -score_TE, np.inf), axis=1)[:, :top_k]
        other_TK = np.argsort(np.where(inside_TE, np.inf, -score_TE), axis=1)[:, :top_k]
        from_other_TK = pick_K < outside_T[:, None]
        inner_TK = np.take_along_axis(best_TK, np.maximum(pick_K - outside_T[:, None], 0), axis=1)
        ids_TLK[:, layer] = np.sort(np.where(from_other_TK, other_TK, inner_TK), axis=1)
    return ids_TLK


def synthetic_requests(structure: PlantedStructure, world: SyntheticWorld) -> Iterator[SyntheticRequest]:
    """Requests one by one: request i depends on seed and i only, domains take turns, half of it
    is prompt."""
    if not 1 <= world.top_k <= world.num_experts:
        raise InputError(f"top-{world.top_k} of {world.num_experts} experts is not possible")
    num_rows = world.tokens_per_request
    for index in range(world.num_requests):
        rng = np.random.default_rng([world.seed, 1, index])
        domain = index % world.num_domains
        share_V = structure.token_share_DV[domain]
        tokens = rng.choice(world.vocab_size, num_rows + 1, p=share_V).astype(np.int32)
        ids_TLK = route(structure, tokens[:-1], top_k=world.top_k, noise=world.noise, rng=rng)
        yield SyntheticRequest(f"synthetic-{index:05d}", f"domain-{domain}", tokens, (num_rows + 1) // 2, ids_TLK)


def write_synthetic(
    path: str | Path, world: SyntheticWorld = SyntheticWorld(), *, made_by: str = "semmoe.profiles.synthetic"
) -> np.ndarray:
    """Write a synthetic trace; returns the planted group of every expert, int32 [L, E]."""
    structure = plant_structure(world)
    info = TraceInfo(
        model="synthetic",
        num_layers=world.num_layers,
        num_experts=world.num_experts,
        top_k=world.top_k,
        model_layers=tuple(range(world.num_layers)),
        num_model_layers=world.num_layers,
        vocab_size=world.vocab_size,
        made_by=made_by,
        notes={"planted_groups": world.num_groups, "noise": world.noise, "seed": world.seed},
    )
    with TraceWriter(path, info) as writer:
        for request in synthetic_requests(structure, world):
            writer.add(
                request.request_id,
                request.expert_ids_TLK,
                domain=request.domain,
                token_ids=request.token_ids,
                num_prompt_tokens=request.num_prompt_tokens,
            )
    return structure.group_of_LE
