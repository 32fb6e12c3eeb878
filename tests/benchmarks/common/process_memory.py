"""Peak memory of a process and all its descendants together, shared pages counted once; or of a command, as one JSON object.

    python tests/benchmarks/common/process_memory.py semmoe place TRACE --ranks 8 -o PLAN

Read from /proc/PID/smaps_rollup (Linux): the proportional set size of a page is its size over the number of processes that map it, so
the sum over processes is what the machine holds for them. Pages of files that only this memory maps are part of it.
"""

import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EVERY_SECONDS = 0.25


class Peak:
    """The largest sum seen so far, in MiB, and how many processes were there."""

    def __init__(self) -> None:
        self.mib, self.processes, self.samples = 0, 0, 0

    def look(self, root: int) -> None:
        sizes = [size for size in (_pss_kib(pid) for pid in descendants(root)) if size is not None]
        self.samples += 1
        if sum(sizes) // 1024 > self.mib:
            self.mib, self.processes = sum(sizes) // 1024, len(sizes)


def descendants(root: int) -> list[int]:
    """The process and everything it started that still runs."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], [root]
    while waiting:
        found.append(waiting.pop())
        waiting += children.get(found[-1], [])
    return found


def _pss_kib(pid: int) -> int | None:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), None)


@contextmanager
def watched(root: int | None = None) -> Iterator[Peak]:
    """The peak of the process (this one by default) and its descendants while the block runs."""
    peak, done = Peak(), threading.Event()

    def watch() -> None:
        while not done.wait(EVERY_SECONDS):
            peak.look(root or os.getpid())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def main() -> None:
    start = time.perf_counter()
    process = subprocess.Popen(sys.argv[1:], stdout=sys.stderr)
    with watched(process.pid) as peak:
        code = process.wait()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = {
        "command": sys.argv[1:],
        "exit_code": code,
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_mib_all_processes": peak.mib,
        "processes_at_peak": peak.processes,
        "load_average": [round(x, 1) for x in os.getloadavg()],
    }
    print(json.dumps(result))
    sys.exit(code)


if __name__ == "__main__":
    main()
