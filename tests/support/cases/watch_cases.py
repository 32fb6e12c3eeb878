"""What ranks do that die, stop, refuse or are slow, in tests of who tells of it."""

import os
import signal
import time
from typing import Any

from cases.rank_cases import TIMEOUT_S, exchange_forever


def stop_itself(rank: int) -> None:
    """Rank `rank` is stopped in the middle of a run."""
    from semmoe.runtime.ranks.group import open_group

    with open_group(timeout_s=TIMEOUT_S) as group:
        exchange_forever(group, lambda number: signal_itself(signal.SIGSTOP, number, group.rank == rank))


def wait_for_a_stopped_rank(rank: int, timeout_s: float) -> None:
    """The others give up first."""
    from semmoe.runtime.ranks.group import open_group

    with open_group(timeout_s=timeout_s) as group:
        exchange_forever(group, lambda number: signal_itself(signal.SIGSTOP, number, group.rank == rank))


def signal_itself(number: int, step: int, mine: bool) -> None:
    if mine and step == 5:
        os.kill(os.getpid(), number)


def hold_the_interpreter(rank: int, seconds: float) -> str:
    """Rank `rank` does not let its other threads run for a while, those that beat included."""
    from semmoe.runtime.ranks.group import open_group

    with open_group(timeout_s=TIMEOUT_S) as group:
        exchange(group)
        if group.rank == rank:
            hold(seconds)
        exchange(group)
        return "held"


def hold(seconds: float) -> None:
    """Work in one call of a built-in function: no other thread of this process gets a turn."""
    begun, numbers = time.monotonic(), 1_000_000
    while time.monotonic() - begun < seconds:
        before = time.monotonic()
        sum(range(numbers))
        numbers = int(numbers * min(100.0, max(1.0, (seconds - (before - begun)) / (time.monotonic() - before))))


def exchange(group: Any) -> None:
    import torch.distributed as dist

    dist.all_gather_object([None] * group.size, "", group=group.handle)


def as_torchrun_does(case: str) -> None:
    """One rank of those that the environment tells of; rank 1 does what `case` says."""
    from semmoe.main import main_of
    from semmoe.runtime.ranks import watch
    from semmoe.runtime.ranks.launch import as_rank
    from semmoe.terminal.tables import note

    watch.LATE_S = 2.0
    main_of(lambda: as_rank(lambda: work_as_one_of_many(case), note, lambda: "; 3 are kept"))


def work_as_one_of_many(case: str) -> None:
    from semmoe.profiles.errors import InputError
    from semmoe.runtime.ranks.group import open_group

    mine = os.environ["RANK"] == "1"
    if case == "refuse early" and mine:
        raise InputError("rank 1 has no such device")
    with open_group(timeout_s=TIMEOUT_S) as group:
        if case == "slow":
            exchange(group)
            hold(4.0 if mine else 0.0)
            exchange(group)
            return
        signals = {"stop": signal.SIGSTOP, "kill": signal.SIGKILL}

        def before(number: int) -> None:
            if case in signals:
                signal_itself(signals[case], number, mine)
            elif number == 5 and case == "refuse all":
                raise InputError("everybody lacks a file")
            elif number == 5 and mine and case == "refuse":
                raise InputError("rank 1 lacks a file")
            elif number == 5 and mine and case == "bug":
                raise KeyError("no such key")

        exchange_forever(group, before)
