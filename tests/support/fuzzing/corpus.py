"""The corpus: every damaged input over every command and format, in one order, the same for one
seed."""

import random
from pathlib import Path

from fuzzing.checkpoints import checkpoint_inputs
from fuzzing.engines import engine_inputs
from fuzzing.inputs import Input, whole_inputs
from fuzzing.maps import map_inputs
from fuzzing.plans import plan_inputs
from fuzzing.reshards import reshard_inputs
from fuzzing.texts import text_inputs
from fuzzing.traces import flipped_inputs, trace_inputs

NUM_FLIPS = 260
# Seconds of processor time each where they are accepted: a sample holds few of them.
SLOW = ("run ", "trace m ", "report p t -o ")


def corpus(base: Path, *, seed: int = 0) -> list[Input]:
    """All inputs. `base`: what write_base made."""

    def draw(name: str) -> random.Random:
        return random.Random(f"{seed} {name}")

    damaged = [
        *trace_inputs(base, draw("traces")),
        *plan_inputs(base, draw("plans")),
        *reshard_inputs(base, draw("reshards")),
        *map_inputs(base, draw("maps")),
        *checkpoint_inputs(base, draw("checkpoints")),
        *engine_inputs(base, draw("engines")),
        *text_inputs(base, draw("texts")),
        *flipped_inputs(base, draw("flips"), NUM_FLIPS),
    ]
    # Wherever a command line reads a file that a damage makes, there is no whole one.
    readers = [one.words for one in damaged if (base / one.file).exists()]
    return [*damaged, *whole_inputs(readers)]


def sample(inputs: list[Input], count: int) -> list[int]:
    """Numbers of about `count` inputs of every format, in proportion, without slow commands."""
    groups: dict[str, list[int]] = {}
    for number, one in enumerate(inputs):
        if not one.words.startswith(SLOW):
            groups.setdefault(one.format, []).append(number)
    total = sum(map(len, groups.values()))
    chosen: list[int] = []
    for numbers in groups.values():
        share = max(2, round(count * len(numbers) / total))
        chosen += [numbers[i * len(numbers) // share] for i in range(min(share, len(numbers)))]
    return sorted(set(chosen))
