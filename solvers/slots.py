"""How many expert slots a rank has, and what the spare ones hold.

E experts on R ranks leave S * R - E spare slots; S is at least ceil(E / R). Engines fill them with
copies (redundant experts), or leave them empty, as vLLM's linear split does without EPLB.

Shape letters: E experts, R ranks, S slots per rank.
"""

from typing import NamedTuple

from semmoe.profiles.errors import InputError
from semmoe.solvers.placement import Placement

SPARE = ("copies", "empty")


class Slots(NamedTuple):
    """The memory that a placement may use."""

    per_rank: int  # S
    copies: bool = True  # spare slots hold copies of experts; else nothing

    @classmethod
    def least(cls, num_experts: int, num_ranks: int) -> "Slots":
        """ceil(E / R) slots a rank."""
        return cls(-(-num_experts // num_ranks))

    @classmethod
    def of(cls, placement: Placement) -> "Slots":
        """The slots of a placement: what a baseline gets for an equal comparison."""
        return cls(placement.slots_per_rank, not placement.num_empty)

    def has_spare(self, num_experts: int, num_ranks: int) -> bool:
        """Whether slots are left for copies."""
        return self.copies and self.per_rank * num_ranks > num_experts

    @classmethod
    def asked(
        cls, num_experts: int, num_ranks: int, *, slots: int, replicas: int, redundant: int | None, spare: str
    ) -> "Slots":
        """The slots that were asked for in one of three ways, or ceil(E / R).

        Parameters:
            num_experts, num_ranks: E, R.
            slots: of each rank, all together; 0: not said.
            replicas: of each rank, beyond ceil(E / R); 0: not said.
            redundant: copies in all, E + N dividing over R; None: not said.
            spare: one of SPARE.

        Raises InputError, with numbers that work, where they do not fit.
        """
        least = cls.least(num_experts, num_ranks).per_rank
        said = {"--slots": slots > 0, "--replicas": replicas > 0, "--redundant": redundant is not None}
        given = [name for name, is_said in said.items() if is_said]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} all say how many slots a rank has: give one of them")
        if spare not in SPARE:
            raise InputError(f"spare {spare!r} is none of {', '.join(SPARE)}")
        if spare == "empty":
            if given and slots != least:
                raise InputError(
                    f"--spare empty holds every expert once, in {least} slots a rank: leave {given[0]} out, or --spare"
                )
            return cls(least, copies=False)
        if redundant is not None:
            slots = _with_redundant(num_experts, num_ranks, redundant)
        if slots and not least <= slots <= num_experts:
            raise InputError(
                f"--slots {slots}: {num_ranks} ranks hold {num_experts} experts in {least} to {num_experts} slots each"
            )
        if not 0 <= replicas <= num_experts - least:
            raise InputError(f"--replicas {replicas}: a rank can host {num_experts - least} more experts at most")
        return cls(slots or least + replicas)


def _with_redundant(num_experts: int, num_ranks: int, redundant: int) -> int:
    """Slots of a rank with N copies in all. Raises InputError, with the nearest N that divide."""
    most = num_experts * (num_ranks - 1)
    over = (num_experts + redundant) % num_ranks
    if not over and 0 <= redundant <= most:
        return (num_experts + redundant) // num_ranks
    near = [min(redundant - over, most), redundant - over + num_ranks]
    fits = [f"{n}" for n in near if 0 <= n <= most]
    why = (
        f"{num_experts} + {redundant} slots do not divide over {num_ranks} ranks"
        if over
        else f"{num_ranks} ranks can hold 0 to {most} copies of {num_experts} experts"
    )
    raise InputError(f"--redundant {redundant}: {why}; --redundant {' or '.join(fits)} would")
