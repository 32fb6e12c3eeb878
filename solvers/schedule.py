"""Schedule: the tables of a plan that say where tokens and requests should live, fitted for one placement.

Everything is stored as arrays in the plan's tables.safetensors under names that begin with "schedule." (docs/formats.md); the same
profile, placement and seed give the same bytes.

Shape letters: L MoE layers, E experts, R ranks, U ids with a row, C candidates, D depth, V ids of prompts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

import numpy as np

from profiles.errors import InputError
from profiles.trace import TraceBatch
from solvers.context import ContextPredictor, fit_context
from solvers.placement import Placement
from solvers.request_scorer import RequestScorer, fit_request_scorer
from solvers.sequence_table import SequenceTable, build_sequence_table
from solvers.token_table import TokenTable, build_token_table

PREFIX = "schedule."


@dataclass(frozen=True, eq=False)
class Schedule:
    """Token table, context predictor and request scorer of one placement, and the paper's device-sequence table."""

    token: TokenTable
    context: ContextPredictor
    request: RequestScorer
    sequence: SequenceTable

    @property
    def num_ranks(self) -> int:
        return self.token.num_ranks

    @property
    def has_token_ids(self) -> bool:
        """Whether the profile knew token ids; without them only the context of earlier layers predicts."""
        return len(self.token.own.ids_U) > 0

    @property
    def has_requests(self) -> bool:
        """Whether prompts were known, so that requests can be scored before they run."""
        return len(self.request.ids_V) > 0

    def to_tables(self) -> dict[str, np.ndarray]:
        """Arrays by name, for a plan's `tables`."""
        return {PREFIX + name: array for name, array in _arrays(self)}

    @classmethod
    def from_tables(cls, tables: dict[str, np.ndarray]) -> "Schedule | None":
        """The schedule stored in a plan's tables; None where there is none. Raises InputError where it is not whole."""
        if not any(name.startswith(PREFIX) for name in tables):
            return None
        return _record(cls, PREFIX, tables)


def _arrays(record: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Arrays of nested records, by dotted name."""
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, np.ndarray):
            yield field.name, value
        else:
            yield from ((f"{field.name}.{name}", array) for name, array in _arrays(value))


def _record(kind: Any, prefix: str, tables: dict[str, np.ndarray]) -> Any:
    """The record of that kind from the arrays whose names begin with the prefix."""
    values = {}
    for name, hint in get_type_hints(kind).items():
        if hint is np.ndarray:
            if prefix + name not in tables:
                raise InputError(f"the plan's schedule is not whole: it lacks the table {prefix}{name}")
            values[name] = tables[prefix + name]
        else:
            values[name] = _record(hint, f"{prefix}{name}.", tables)
    return kind(**values)


def fit_schedule(
    sample: TraceBatch, placement: Placement, *, seed: int, embedding_VD: np.ndarray | None = None
) -> Schedule:
    """Schedule for the placement, from the sample of a profile. `embedding_VD`: the model's input embedding, for rare and unseen ids."""
    hosts_LER = placement.hosts_LER
    if (
        placement.num_layers != sample.expert_ids_TLK.shape[1]
        or sample.expert_ids_TLK.max(initial=0) > placement.num_experts
    ):
        raise InputError(
            f"the placement is for {placement.num_layers} layers of {placement.num_experts} experts, the trace has "
            f"{sample.expert_ids_TLK.shape[1]} layers and expert id {sample.expert_ids_TLK.max(initial=0)}"
        )
    token = build_token_table(sample, hosts_LER, embedding_VD=embedding_VD)
    return Schedule(
        token=token,
        context=fit_context(sample, token, hosts_LER, seed=seed),
        request=fit_request_scorer(sample, hosts_LER, seed=seed),
        sequence=build_sequence_table(sample.expert_ids_TLK, hosts_LER),
    )
