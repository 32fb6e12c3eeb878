"""From one placement to another in steps that ranks can take one after the other: slots of experts
that stay are kept, and every prefix is a placement that serves.

An expert moves where it leaves a rank and arrives on another, is copied where it only arrives, and
dropped where it only leaves. Drops come first; then experts that arrive where a slot is free, which
frees the slot they leave; what remains are cycles of ranks, each of which receives one expert into
a spare slot while it sends its own; copies come last.

Shape letters: E experts, R ranks, S slots per rank.
"""

from collections import defaultdict
from typing import NamedTuple

import numpy as np

from semmoe.profiles.errors import InputError
from semmoe.solvers.placement import Topology

NONE = -1  # no rank, no slot, or no expert in a slot


class Move(NamedTuple):
    """What happens to one expert. Moves of one step happen at once; each reads what was there
    before the step."""

    step: int
    expert: int
    kind: str  # "move", "copy" or "drop"
    from_rank: int  # where it is read; of a drop: where it was
    from_slot: int
    to_rank: int  # NONE of a drop
    to_slot: int
    nearest_holder: int  # a rank that holds it, on the receiver's node where one does; of a drop: that still does


def steps_between(old_RS: np.ndarray, new_hosts_ER: np.ndarray, topology: Topology) -> tuple[np.ndarray, list[Move]]:
    """The new placement in slots, int32 [R, S], and the moves that lead there, in the order of
    their steps.

    Parameters:
        old_RS: expert in every slot, NONE where it is empty.
        new_hosts_ER: bool [E, R], whether rank r shall host expert e; each rank as many as before.
        topology: nodes, for what is nearest.

    Raises InputError where a rank would hold another number of experts, or an expert none.
    """
    work = _Work(old_RS, new_hosts_ER, topology)
    work.drop()
    work.move()
    work.copy()
    return work.slots_RS, work.moves


class _Work:
    """The placement on its way, and what is still to do."""

    def __init__(self, old_RS: np.ndarray, new_hosts_ER: np.ndarray, topology: Topology) -> None:
        self.slots_RS, self.node_of_R = np.array(old_RS, np.int32), topology.node_of_R
        self.slot_of = {(int(e), int(r)): int(s) for (r, s), e in np.ndenumerate(old_RS) if e >= 0}
        before = set(self.slot_of)
        after = {(int(e), int(r)) for e, r in np.argwhere(new_hosts_ER)}
        if not new_hosts_ER.any(axis=1).all():
            raise InputError(f"expert {int((~new_hosts_ER.any(axis=1)).argmax())} would be on no rank")
        arriving, leaving = _by_expert(after - before), _by_expert(before - after)
        held_R, held_then_R = (old_RS >= 0).sum(axis=1), new_hosts_ER.sum(axis=0)
        if (held_R != held_then_R).any():
            rank = int((held_R != held_then_R).argmax())
            raise InputError(f"rank {rank} would hold {held_then_R[rank]} experts, it has {held_R[rank]} slots in use")
        self.moves: list[Move] = []
        self.free: dict[int, list[int]] = defaultdict(list)  # slots of each rank that may be written over
        self.wanted: list[tuple[int, int, int]] = []  # (expert, from, to) of moves
        self.copies: list[tuple[int, int]] = []  # (expert, to)
        self.drops: list[tuple[int, int]] = []
        for expert in sorted(set(arriving) | set(leaving)):
            to, away = arriving[expert], leaving[expert]
            for rank in list(to):
                near = [r for r in away if self.node_of_R[r] == self.node_of_R[rank]] or away
                if near:
                    self.wanted.append((expert, near[0], rank))
                    away.remove(near[0])
                else:
                    self.copies.append((expert, rank))
            self.drops += [(expert, rank) for rank in away]

    def drop(self) -> None:
        for expert, rank in self.drops:
            slot = self.slot_of.pop((expert, rank))
            near = self._nearest(expert, rank)
            self.moves.append(Move(self._next(), expert, "drop", rank, slot, NONE, NONE, near))
            self.slots_RS[rank, slot] = NONE
            self.free[rank].append(slot)

    def move(self) -> None:
        waiting = self.wanted
        while waiting:
            ready = next((w for w in waiting if self.free[w[2]]), None)
            step = [ready] if ready else _cycle(waiting)
            waiting = [w for w in waiting if w not in step]
            self._exchange(step, "move")

    def copy(self) -> None:
        for expert, rank in self.copies:
            holder = self._nearest(expert, rank)
            self._exchange([(expert, holder, rank)], "copy")

    def _exchange(self, step: list[tuple[int, int, int]], kind: str) -> None:
        """Experts that arrive at once, each in a free slot or in that which its rank gives up in
        the same step."""
        number = self._next()
        nearest = [self._nearest(expert, to) for expert, _, to in step]
        leaves = {source: self.slot_of[expert, source] for expert, source, _ in step}
        for (expert, source, to), near in zip(step, nearest, strict=True):
            slot = self.free[to].pop(0) if self.free[to] else leaves.pop(to)
            self.moves.append(Move(number, expert, kind, source, self.slot_of[expert, source], to, slot, near))
        if kind == "move":
            for expert, source, _ in step:
                self.slots_RS[source, self.slot_of.pop((expert, source))] = NONE
            for rank, slot in leaves.items():
                self.free[rank].append(slot)
        for move in self.moves[-len(step) :]:
            self.slots_RS[move.to_rank, move.to_slot] = move.expert
            self.slot_of[move.expert, move.to_rank] = move.to_slot

    def _nearest(self, expert: int, rank: int) -> int:
        holders = sorted(r for e, r in self.slot_of if e == expert)
        return min(holders, key=lambda r: (self.node_of_R[r] != self.node_of_R[rank], r))

    def _next(self) -> int:
        return self.moves[-1].step + 1 if self.moves else 0


def _by_expert(pairs: set[tuple[int, int]]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = defaultdict(list)
    for expert, rank in sorted(pairs):
        found[expert].append(rank)
    return found


def _cycle(waiting: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Moves around a cycle of ranks, each rank once. Every rank that waits for an expert waits to
    give one away, so a walk along the moves comes back."""
    leaving: dict[int, tuple[int, int, int]] = {}
    for move in waiting:
        leaving.setdefault(move[1], move)
    path, rank = [], waiting[0][1]
    while rank not in [move[1] for move in path]:
        path.append(leaving[rank])
        rank = leaving[rank][2]
    return path[[move[1] for move in path].index(rank) :]


class Transfer(NamedTuple):
    """One expert's weights on their way, from a slot into a slot."""

    expert: int
    from_rank: int
    from_slot: int
    to_rank: int
    to_slot: int


def transfers_of(old_RS: np.ndarray, moves: list[Move]) -> list[list[Transfer]]:
    """What ranks send each other in each step, read from the nearest holder; drops send nothing.

    Raises InputError for a step that no rank could take with one spare slot, or in which an expert
    is read where it is not.
    """
    slots_RS, steps = np.array(old_RS, np.int32), list[list[Transfer]]()
    for step in sorted({move.step for move in moves}):
        now = [move for move in moves if move.step == step]
        sent = list[Transfer]()
        for move in now:
            if move.kind == "drop":
                continue
            found = np.flatnonzero(slots_RS[move.nearest_holder] == move.expert)
            if not len(found):
                raise InputError(
                    f"step {step} reads expert {move.expert} from rank {move.nearest_holder}, which lacks it"
                )
            sent.append(Transfer(move.expert, move.nearest_holder, int(found[0]), move.to_rank, move.to_slot))
        to = [transfer.to_rank for transfer in sent]
        if len(set(to)) < len(to):
            raise InputError(f"step {step} brings rank {max(to, key=to.count)} more than one expert at once")
        slots_RS = apply_moves(slots_RS, now)
        for transfer in sent:
            if slots_RS[transfer.to_rank, transfer.to_slot] != transfer.expert:
                raise InputError(f"step {step} brings two experts into one slot of rank {transfer.to_rank}")
        if sent:
            steps.append(sent)
    return steps


def apply_moves(old_RS: np.ndarray, moves: list[Move]) -> np.ndarray:
    """The placement after the moves, int32 [R, S]."""
    slots_RS = np.array(old_RS, np.int32)
    for move in moves:
        if move.kind != "copy":
            slots_RS[move.from_rank, move.from_slot] = NONE
    for move in moves:
        if move.kind != "drop":
            slots_RS[move.to_rank, move.to_slot] = move.expert
    return slots_RS


def inverse_moves(new_RS: np.ndarray, moves: list[Move]) -> list[Move]:
    """The way back from `new_RS`, int [R, S]: the same states in the opposite order, so every
    prefix of it serves too."""
    slots_RS, last, back = np.array(new_RS), max((move.step for move in moves), default=0), list[Move]()
    for step in sorted({move.step for move in moves}, reverse=True):
        number, now = last - step, list[Move]()
        for m in (move for move in moves if move.step == step):
            if m.kind == "copy":
                now.append(Move(number, m.expert, "drop", m.to_rank, m.to_slot, NONE, NONE, m.nearest_holder))
            elif m.kind == "drop":
                slot = int(np.flatnonzero(slots_RS[m.nearest_holder] == m.expert)[0])
                there = (m.nearest_holder, slot, m.from_rank, m.from_slot, m.nearest_holder)
                now.append(Move(number, m.expert, "copy", *there))
            else:
                there = (m.to_rank, m.to_slot, m.from_rank, m.from_slot, m.to_rank)
                now.append(Move(number, m.expert, "move", *there))
        slots_RS = apply_moves(slots_RS, now)
        back += now
    return back
