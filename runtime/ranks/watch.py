"""What ranks under torchrun tell each other beside their collectives, through the store that
torchrun keeps: that they live, and why the run is over.

The first reason that is told there counts, and one rank prints it: rank 0 where it can, for it
knows what is kept. The others see their exchange fail and leave without a word.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from semmoe.runtime.ranks.heartbeat import BEAT_S, LATE_S, Silence, siblings, state_of

if TYPE_CHECKING:
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

JOIN_S = 300.0  # until the store can be reached
END_S = 5.0  # until a rank whose peers are gone has noticed it by itself
TOLD_S = 3.0  # until rank 0 has told what another rank knows
CAUSE_S = 3.0  # until the cause of a failed exchange is known, on one machine
LOST_S = 5.0  # after a failed exchange: so long silent is lost


class Failure(NamedTuple):
    """Why a run is over. `kind`: "lost" (stopped or dead, as another rank saw), else what the rank
    says of itself."""

    rank: int
    kind: str
    line: str


def open_store(name: str, timeout_s: float = JOIN_S) -> "Store":
    """The store of all ranks, under a name of its own. Raises RuntimeError where it is not to be
    reached."""
    from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        os.environ.get("MASTER_ADDR", "127.0.0.1"),
        int(os.environ.get("MASTER_PORT", "29500")),
        is_master=not served and os.environ["RANK"] == "0",
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        multi_tenant=True,  # rank 0 of a run without an agent asks for the port twice
    )
    return PrefixStore(f"semmoe/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}", store)


class RankWatch:
    """Of one rank: beats, and hears whether the others do, in a thread until `close`.

    `tell`: prints a line. `kept`: what is added to the line that ends a run. Where the store is not
    to be reached nothing is watched, and collectives end by their own timeout.
    """

    def __init__(self, tell: Callable[[str], None], kept: Callable[[], str]) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._tell, self._kept = tell, kept
        first = self.rank - int(os.environ.get("LOCAL_RANK", self.rank))
        self._local = range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", self.size)))
        self._pids: dict[int, int] = {}
        self._silence = Silence(self.size)
        self._beats_R, self._all_beat = [0] * self.size, False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._store: Store | None = None
        if self.size == 1:
            return
        try:
            self._store = open_store("watch")
        except (RuntimeError, ValueError):
            return
        self._thread.start()

    def close(self) -> None:
        """Stop watching; the others hear that this rank ends by itself."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(END_S)
        if self._thread.is_alive():
            self._store = None  # it answers no more: nobody is to wait for it
        self._try(lambda store: store.set(f"done/{self.rank}", "1"))

    def publish(self, kind: str, line: str, rank: int | None = None) -> Failure:
        """Tell the others why the run is over; what was told first comes back."""
        failure = Failure(self.rank if rank is None else rank, kind, line)
        first = self._try(lambda store: store.compare_set("failure", "", json.dumps(failure)))
        return Failure(*json.loads(first)) if first else failure

    def cause(self, line: str, *, stopped: bool = False) -> Failure:
        """Why the exchange of this rank failed: what another tells, or who is gone; else what this
        rank saw, `line`.

        `stopped`: by torchrun, which ends all where one fails, and where it is itself ended.
        """
        elsewhere = len(self._local) < self.size and not stopped
        end = time.monotonic() + (LOST_S + CAUSE_S if elsewhere else CAUSE_S)
        while self._store is not None and time.monotonic() < end:
            if failure := self._failure() or self._lost(LOST_S, missing=True):
                return self.publish(failure.kind, failure.line, failure.rank)
            time.sleep(0.1)
        return self.publish("exchange", line)

    def tells(self, failure: Failure) -> bool:
        """Whether this rank is the one that prints the failure: rank 0 goes first. The traceback of
        a bug is printed by its own rank."""
        if failure.kind == "crashed":
            return False
        first = 1 if (failure.rank, failure.kind) == (0, "lost") else 0
        end = time.monotonic() + (0.0 if self.rank == first else TOLD_S)
        while time.monotonic() < end:
            if self._try(lambda store: store.check(["told"])):
                return False
            time.sleep(0.05)
        return self._try(lambda store: store.add("told", 1)) in (None, 1)

    def _try(self, ask: "Callable[[Store], Any]") -> Any:
        """What the store answers; None where there is none, or none any more."""
        try:
            return None if self._store is None else ask(self._store)
        except RuntimeError:
            self._store = None
            return None

    def _failure(self) -> Failure | None:
        """What was told."""
        told = self._try(lambda store: store.get("failure") if store.check(["failure"]) else None)
        return Failure(*json.loads(told)) if told else None

    def _watch(self) -> None:
        while self._store is not None and not self._closed.wait(BEAT_S):
            self._hear()
            if failure := self._failure():
                return self._end(failure)
            if failure := self._lost(LATE_S):
                return self._end(self.publish("lost", failure.line, failure.rank))

    def _hear(self) -> None:
        """Beat, and note whose beats have come."""
        keys = [f"beat/{rank}" for rank in range(self.size)]
        self._try(lambda store: store.add(keys[self.rank], 1))
        self._all_beat = self._all_beat or bool(self._try(lambda store: store.check(keys)))
        beats_R = self._try(lambda store: store.multi_get(keys)) if self._all_beat else None  # it waits for all keys
        self._silence.pass_time()
        for rank, beats in enumerate(map(int, beats_R or [])):
            if beats != self._beats_R[rank]:
                self._beats_R[rank] = beats
                self._silence.hear(rank)
        self._look()

    def _look(self) -> None:
        """Find the processes of this machine's ranks that have not been seen yet."""
        if len(self._pids) < len(self._local):
            self._pids |= siblings()

    def _lost(self, late_s: float, *, missing: bool = False) -> Failure | None:
        """A rank that is dead, or stopped and silent for `late_s`. `missing`: also one of this
        machine whose process was never seen."""
        if missing:
            self._look()  # a rank that has not beaten once has seen nobody yet
        for rank in range(self.size):
            if rank == self.rank:
                continue
            state, silent_s = self._state(rank, missing=missing), self._silence.of(rank)
            late = silent_s >= late_s and (state == "stopped" or (not state and self._beats_R[rank] > 0))
            if (state == "gone" or late) and not self._try(lambda store, r=rank: store.check([f"done/{r}"])):
                said = f"has not answered for {silent_s:.0f} s"
                if state == "gone":
                    said = "has died"
                elif state == "stopped":
                    said += f", its process {self._pids[rank]} is stopped"
                return Failure(rank, "lost", f"rank {rank} {said}: the run is over")
        return None

    def _state(self, rank: int, *, missing: bool) -> str:
        """What this machine says of a rank; "" for one of another machine."""
        if rank in self._pids:
            return state_of(self._pids[rank], os.getppid())
        told = state_of(os.getpid(), os.getppid())
        return "gone" if told and missing and rank in self._local else ""

    def _end(self, failure: Failure) -> None:
        """End this rank where the failure of another does not."""
        if failure.rank == self.rank:
            return  # its own thread tells
        if failure.kind == "lost" and self._state(failure.rank, missing=False) == "stopped":
            os.kill(self._pids[failure.rank], signal.SIGKILL)  # it would keep torchrun waiting
        if self._closed.wait(BEAT_S):
            return  # the main thread has noticed
        if self.tells(failure):
            self._tell(f"{failure.line}{self._kept()}")
        if not self._closed.wait(END_S):
            os._exit(1)
