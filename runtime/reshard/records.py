"""What a reshard is asked for, and what it did."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from semmoe.runtime.reshard.copy import FilePlan, total_bytes


@dataclass(frozen=True)
class ReshardOptions:
    """How to reshard.

    `link`: hard-link safetensors files that do not change instead of copying. `verify`: "bytes"
    reads everything again and compares, "logits" also runs both models, "none" trusts the disk.
    `force`: replace an output that is a reshard. `made_by`: the command, for the sidecar.
    """

    layout: str = "permuted"
    link: bool = False
    verify: str = "bytes"
    force: bool = False
    made_by: str = ""

    @property
    def compares(self) -> bool:
        """Whether what was written is read again."""
        return self.verify != "none"


@dataclass(frozen=True, kw_only=True)
class ReshardResult:
    """What a reshard did."""

    out: str
    layout: str
    num_layers: int
    experts_moved: int  # (layer, expert) pairs with another number than before (ranks: on another rank than by number)
    files: int
    bytes_written: int
    bytes_linked: int
    verified: str
    logits_difference: float | None = None  # largest absolute difference, where logits were compared
    left_out: tuple[str, ...] = ()  # files of the checkpoint that were not carried over
    notes: tuple[str, ...] = ()
    same_checkpoint: bool | None = None  # as the plan was traced on; None where it does not know


def size_facts(files: Sequence[FilePlan]) -> dict[str, Any]:
    """The number and sizes of files in a ReshardResult."""
    return {
        "files": len(files),
        "bytes_written": total_bytes(files),
        "bytes_linked": sum(file.size for file in files if file.link),
    }
