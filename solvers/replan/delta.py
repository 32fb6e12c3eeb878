"""Delta: what it takes to get from one plan to another, as delta.json (docs/formats.md).

Layers stand in the order of their gain per byte, so that who stops early has had the most of it;
each layer's moves stand in steps, one after the other. After any number of steps, of any number of
layers, every expert is on some rank: it can be stopped and gone on with.

Shape letters: L MoE layers, R ranks, S slots per rank.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from semmoe.profiles.document import parse_json, read_bounded
from semmoe.profiles.errors import InputError
from semmoe.solvers.json_record import JsonRecord
from semmoe.solvers.placement import Placement
from semmoe.solvers.plan import Plan
from semmoe.solvers.replan.decision import Decision
from semmoe.solvers.replan.steps import NONE, Move, apply_moves, inverse_moves

DELTA_FORMAT = "semmoe-delta"
DELTA_VERSION = 1
DELTA_FILE = "delta.json"
KINDS = ("move", "copy", "drop")


@dataclass(frozen=True)
class ExpertMove(JsonRecord):
    """One expert's part of a step."""

    step: int
    expert: int
    kind: str  # "move", "copy" or "drop"
    from_rank: int
    from_slot: int
    to_rank: int | None  # null of a drop
    to_slot: int | None
    nearest_holder: int  # rank that holds it: on the receiver's node where one there does; of a drop, that still does

    @classmethod
    def of(cls, move: Move) -> "ExpertMove":
        to_rank, to_slot = (None if v == NONE else v for v in (move.to_rank, move.to_slot))
        there = (move.from_rank, move.from_slot, to_rank, to_slot)
        return cls(move.step, move.expert, move.kind, *there, move.nearest_holder)

    def as_move(self) -> Move:
        """The same as the solver writes it."""
        to_rank, to_slot = (NONE if v is None else v for v in (self.to_rank, self.to_slot))
        there = (self.from_rank, self.from_slot, to_rank, to_slot)
        return Move(self.step, self.expert, self.kind, *there, self.nearest_holder)


@dataclass(frozen=True)
class LayerDelta(JsonRecord):
    """One layer. Gain and metrics are on the requests that the new plan was fitted on, tokens at
    random homes."""

    layer: int
    model_layer: int
    moved: int  # experts that ranks load: moves and copies
    gain: float
    rem_before: float
    rem_after: float
    load_before: float
    load_after: float
    moves: list[ExpertMove]


@dataclass(frozen=True)
class Ranks(JsonRecord):
    """The ranks of both plans."""

    ranks: int
    nodes: int


@dataclass(frozen=True)
class Moved(JsonRecord):
    """A budget of moves: all experts that may move (`asked`), of how many slots, and that do."""

    asked: int
    asked_as: str  # as typed: 12.5%, 40, 4 per layer
    used: int
    slots: int


@dataclass(frozen=True, kw_only=True)
class Delta(JsonRecord):
    """From the plan with fingerprint `old` to that with fingerprint `new`.

    Fields:
        format, version: of the JSON object.
        old, new: fingerprints of the two plans.
        topology: their ranks.
        budget: moves that were asked for, and that are used.
        expert_bytes: of one expert's weights; null where the plan does not know its checkpoint.
        bytes: of all that ranks load; null likewise.
        decision: whether the moves are worth it, and why.
        layers: by gain per byte, the highest first; layers without moves last.

    Source: solvers/replan/delta.py; docs/formats.md.
    """

    format: str = DELTA_FORMAT
    version: int = DELTA_VERSION
    old: str
    new: str
    topology: Ranks
    budget: Moved
    expert_bytes: int | None
    bytes: int | None
    decision: Decision
    layers: list[LayerDelta]

    def applied(self, placement: Placement) -> Placement:
        """The placement after all moves. Raises InputError where it is not the one that they start
        from."""
        return replace(placement, experts_LRS=self.led(placement.experts_LRS))

    def led(self, experts_LRS: np.ndarray) -> np.ndarray:
        """The slots after all moves, int32 [L, R, S]. Raises InputError as `applied`."""
        experts_LRS = experts_LRS.copy()
        for layer in self.layers:
            try:
                experts_LRS[layer.layer] = _after(experts_LRS[layer.layer], layer)
            except IndexError:
                raise InputError(f"the delta names a layer or slot beyond {list(experts_LRS.shape)}") from None
        return experts_LRS

    def inverse(self, placement: Placement) -> "Delta":
        """The way back from the new placement: steps in the opposite order. Gains are those of the
        way here, with the sign changed."""
        layers = [_inverse(layer, placement.experts_LRS[layer.layer]) for layer in self.layers]
        used = sum(layer.moved for layer in layers)
        return replace(
            self,
            old=self.new,
            new=self.old,
            budget=replace(self.budget, used=used),
            bytes=None if self.expert_bytes is None else used * self.expert_bytes,
            layers=layers,
        )


def _after(experts_RS: np.ndarray, layer: LayerDelta) -> np.ndarray:
    moves = [move.as_move() for move in layer.moves]
    for move in moves:
        num_ranks, num_slots = experts_RS.shape
        if not (move.from_rank < num_ranks and move.from_slot < num_slots and move.to_rank < num_ranks):
            raise InputError(f"the delta names rank {max(move.from_rank, move.to_rank)}, the plan has {num_ranks}")
        if move.kind != "copy" and experts_RS[move.from_rank, move.from_slot] != move.expert:
            raise InputError(
                f"layer {layer.layer}: slot {move.from_slot} of rank {move.from_rank} holds expert "
                f"{experts_RS[move.from_rank, move.from_slot]}, the delta moves {move.expert} from it"
            )
    return apply_moves(experts_RS, moves)


def _inverse(layer: LayerDelta, new_RS: np.ndarray) -> LayerDelta:
    moves = inverse_moves(new_RS, [move.as_move() for move in layer.moves])
    return replace(
        layer,
        moved=sum(move.kind != "drop" for move in moves),
        gain=-layer.gain,
        rem_before=layer.rem_after,
        rem_after=layer.rem_before,
        load_before=layer.load_after,
        load_after=layer.load_before,
        moves=[ExpertMove.of(move) for move in moves],
    )


def read_delta(path: Path) -> Delta:
    """The delta of a file, or of the plan directory that holds one. Raises InputError where there
    is none or it is damaged."""
    file = path / DELTA_FILE if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{path} holds no {DELTA_FILE}: `semmoe place TRACE --from-plan OLD` writes one")
    try:
        facts = parse_json(read_bounded(file))
        if not isinstance(facts, dict) or facts.get("format") != DELTA_FORMAT:
            raise InputError(f"{file} is no {DELTA_FORMAT}: its format is {_format(facts)!r}")
        if facts.get("version") != DELTA_VERSION:
            raise InputError(f"{file} has version {facts.get('version')!r}, this semmoe reads {DELTA_VERSION}")
        delta = Delta.from_json(facts)
    except ValueError as error:
        raise InputError(f"{file} is damaged: {error}") from None
    for layer in delta.layers:
        for move in layer.moves:
            numbers = (move.step, move.expert, move.from_rank, move.from_slot, move.to_rank or 0, move.to_slot or 0)
            if move.kind not in KINDS or min(numbers) < 0 or (move.to_rank is None) != (move.kind == "drop"):
                raise InputError(f"{file} is damaged: layer {layer.layer}, step {move.step}: {move.kind!r} cannot be")
    return delta


def read_step(path: Path, old: Plan) -> tuple[Plan, Delta]:
    """The plan at `path` and its delta, which leads there from `old`. Raises InputError where it
    starts from another plan, or leads to another one."""
    new, delta = Plan.load(path), read_delta(path)
    if delta.old != old.fingerprint:
        raise InputError(f"the delta of {path} starts from plan {delta.old}, this plan is {old.fingerprint}")
    try:
        led = delta.applied(old.placement).experts_LRS
    except InputError as error:
        raise InputError(f"{path / DELTA_FILE} is damaged: {error}") from None
    if delta.new != new.fingerprint or not np.array_equal(led, new.placement.experts_LRS):
        raise InputError(f"the delta of {path} leads to plan {delta.new}, the plan there is {new.fingerprint}")
    return new, delta


def _format(facts: object) -> object:
    return facts.get("format") if isinstance(facts, dict) else type(facts).__name__
