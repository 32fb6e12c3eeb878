"""Where the time of a rank goes, by phase: clock marks on a CPU, CUDA events on a GPU (read once,
after the run).

Phases: attention (all that is not the expert layer), wait (until every rank has announced its
rows), dispatch (packing, and the part of the transfer that local experts do not hide), experts,
combine (results back, and adding them). Attention-TP has three more: homes (prediction of every
token's rank), shuffle (sorting, permuting, packing and the way back), slices (the reduce-scatter
and the all-gather, waiting for other ranks included).
"""

import time

import torch

PHASES = ("attention", "dispatch", "experts", "combine", "wait")
MOST_EVENTS = 20_000  # then they are read, with one synchronisation: events are not free


class Stopwatch:
    """`mark(phase)` gives the time since the last mark to `phase`."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._events: list[tuple[str | None, torch.cuda.Event]] = []
        self._last = time.perf_counter()

    def start(self) -> None:
        """Forget the time since the last mark."""
        self._mark(None)

    def restart(self) -> None:
        """Forget all times."""
        self._seconds, self._events = dict.fromkeys(PHASES, 0.0), []
        self._mark(None)

    def mark(self, phase: str) -> None:
        self._mark(phase)

    def _mark(self, phase: str | None) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append((phase, event))
            if len(self._events) >= MOST_EVENTS:
                self.seconds()
            return
        now = time.perf_counter()
        if phase is not None:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase so far: the five that every run has, and those that were marked."""
        if self._events:
            torch.cuda.synchronize()
            for (_, before), (phase, after) in zip(self._events, self._events[1:], strict=False):
                if phase is not None:
                    self._seconds[phase] = self._seconds.get(phase, 0.0) + before.elapsed_time(after) / 1000
            self._events = self._events[-1:]
        return dict(self._seconds)
