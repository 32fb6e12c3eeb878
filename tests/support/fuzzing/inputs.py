"""An input of the corpus: a damaged file of one format, and a command that reads it."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fuzzing.damage import Damage

FLIPPED = "flipped bit"
WHOLE_FORMAT = "undamaged"  # what must be accepted, so that a refusal says something


@dataclass(frozen=True)
class Input:
    """`file` lies in the directory where the command runs, among whole files of the base."""

    format: str
    file: str
    damage: Damage
    words: str  # the command line after `semmoe`

    @property
    def command(self) -> str:
        words = self.words.split()
        return f"{words[0]} {words[1]}" if words[1].startswith("--") else words[0]

    @property
    def may_pass(self) -> bool:
        return self.damage.may_pass


def inputs_of(
    format: str, file: str, damages: Iterable[Damage], readers: Sequence[str], draw: random.Random
) -> list[Input]:
    """Each damage of the file with one of the commands that read it; a command named twice is
    chosen twice as often."""
    return [Input(format, file, damage, draw.choice(readers)) for damage in damages]


def whole_inputs(readers: Iterable[str]) -> list[Input]:
    """Every command line once, with nothing damaged."""
    nothing = Damage("nothing", lambda file: None)
    return [Input(WHOLE_FORMAT, "", nothing, words) for words in dict.fromkeys(readers)]
