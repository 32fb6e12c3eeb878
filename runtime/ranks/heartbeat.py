"""Whether ranks live: what each says every second, and what the system says of processes on this
machine.

A rank beats from a thread of its own, so that a long step does not silence it. A rank that is
silent for LATE_S is over where its process is stopped, and where nobody here can look at it. One
whose process runs is left alone, however long it is silent: it may be importing from a slow disk.
"""

import os
import time
from pathlib import Path

BEAT_S = 1.0
LATE_S = 15.0  # with the time to look, to tell and to end the run: less than 30 s after a rank has stopped
PROC = Path("/proc")


class Silence:
    """Seconds since each rank was heard. They stand still while this process does: Ctrl-Z on a
    terminal stops all, and none of them is late."""

    def __init__(self, num_ranks: int) -> None:
        self._seconds_R = [0.0] * num_ranks
        self._last = time.monotonic()

    def pass_time(self) -> None:
        """To be called about every BEAT_S."""
        now = time.monotonic()
        step, self._last = min(now - self._last, 2 * BEAT_S), now
        self._seconds_R = [seconds + step for seconds in self._seconds_R]

    def hear(self, rank: int) -> None:
        self._seconds_R[rank] = 0.0

    def of(self, rank: int) -> float:
        """Seconds since `rank` was heard."""
        return self._seconds_R[rank]


def state_of(pid: int, parent: int) -> str:
    """ "stopped", "gone" or "alive" for the process `pid` of a parent on this machine; "" where the
    system does not tell. One that a debugger holds is alive: somebody is looking at it."""
    if not (PROC / "self").exists():
        return ""
    letter, found = _stat(pid)
    if found != parent or letter in "ZXx":
        return "gone"
    return "stopped" if letter == "T" else "alive"


def parent_of(pid: int) -> int:
    """The process that `pid` is a child of; -1 where the system does not tell."""
    return _stat(pid)[1]


def siblings() -> dict[int, int]:
    """The process of each rank on this machine, by rank, this one's included: those with the same
    parent and a RANK, as torchrun starts them. This one alone where the system does not tell."""
    found = {int(os.environ["RANK"]): os.getpid()}
    for folder in PROC.glob("[0-9]*"):
        pid = int(folder.name)
        if _stat(pid)[1] != os.getppid():
            continue
        try:
            words = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # gone, or somebody else's
            continue
        ranks = [word[len(b"RANK=") :] for word in words if word.startswith(b"RANK=")]
        if ranks and ranks[0].isdigit():
            found[int(ranks[0])] = pid
    return found


def _stat(pid: int) -> tuple[str, int]:
    """State and parent of a process; "X" and -1 where there is none."""
    try:
        words = (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
        return words[0], int(words[1])
    except (OSError, IndexError, ValueError):
        return "X", -1
