"""Schedule: the tables of a plan that say where tokens and requests should live, fitted for one
placement.

Everything is stored as arrays in the plan's tables.safetensors under names that begin with
"schedule." (docs/formats.md). They are fitted in solvers/schedule/fit.py.

Shape letters: L MoE layers, E experts, R ranks, U ids with a row, C candidates, D depth, V ids of
prompts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

import numpy as np

from semmoe.profiles.errors import InputError
from semmoe.solvers.schedule.context import ContextPredictor
from semmoe.solvers.schedule.features import NUM_POSITION_IDS
from semmoe.solvers.schedule.paper_table import SequenceTable
from semmoe.solvers.schedule.request_scorer import RequestScorer
from semmoe.solvers.schedule.token_table import TokenTable

PREFIX = "schedule."


@dataclass(frozen=True, eq=False)
class Schedule:
    """Token table, context predictor and request scorer of one placement, and the paper's
    device-sequence table."""

    token: TokenTable
    context: ContextPredictor
    request: RequestScorer
    sequence: SequenceTable

    @property
    def num_ranks(self) -> int:
        return self.token.num_ranks

    @property
    def has_token_ids(self) -> bool:
        """Whether the profile knew token ids; without them only earlier layers and positions
        predict."""
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
        """The schedule stored in a plan's tables; None where there is none. Raises InputError
        where it is not whole."""
        if not any(name.startswith(PREFIX) for name in tables):
            return None
        position, own = PREFIX + "context.position_LQR", PREFIX + "context.own_LDER"
        if position not in tables and own in tables:  # a plan written before positions were read
            num_layers, _, _, num_ranks = tables[own].shape
            tables = {**tables, position: np.zeros((num_layers, NUM_POSITION_IDS + 1, num_ranks), np.float16)}
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
                raise InputError(
                    f"the plan's schedule lacks the table {prefix}{name}: another version of semmoe wrote it, or its file was "
                    f"changed; make the plan again with semmoe place"
                )
            values[name] = tables[prefix + name]
        else:
            values[name] = _record(hint, f"{prefix}{name}.", tables)
    return kind(**values)
