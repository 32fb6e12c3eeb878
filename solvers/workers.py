"""Worker processes for layers: a map in order, with bounded work in flight, that ends at once
when the work is interrupted."""

import ctypes
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

from semmoe.profiles.progress import Progress
from semmoe.solvers.processes import THREADS, Surroundings, copies_of, held_interrupts, one_thread_each

LOOK_SECONDS = 0.2  # between two looks at how far workers are
IMPORTED = ("semmoe.solvers.make_plan", "pymetis", "scipy.linalg", "scipy.optimize", "scipy.sparse")  # by workers
KEPT_BYTES = {-3: 64 * 2**20, -1: 128 * 2**20}  # glibc's M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
# Neither numpy nor pyarrow asks for huge pages then.
SMALL_PAGES = {"NUMPY_MADVISE_HUGEPAGE": "0", "ARROW_DEFAULT_MEMORY_POOL": "system"}

LayerMap = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


@contextmanager
def layer_map(processes: int, num_experts: int) -> Iterator[LayerMap]:
    """A `map` over layers, in order, in worker processes with one BLAS thread each.

    Small layers run in this process when one is asked for: their arithmetic is too small for BLAS
    threads to matter. Where the block is left by an exception (Ctrl-C), workers are ended in the
    middle of their work.
    """
    if processes <= 1 and num_experts <= 64:
        yield map
        return
    pool = ProcessPoolExecutor(
        processes, mp_context=copies_of(IMPORTED), initializer=_start_worker, initargs=(Surroundings(),)
    )
    try:
        with one_thread_each(), held_interrupts():
            started = [pool.submit(abs, 0) for _ in range(processes)]  # workers start here
        for future in started:
            future.result()
        yield partial(_map_bounded, pool, processes + 1)
    except BaseException:
        workers = list((getattr(pool, "_processes", None) or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()
        raise
    pool.shutdown()


@contextmanager
def step_file(progress: Progress | None, total: int) -> Iterator[str | None]:
    """A file that worker processes tell their steps to (`tell_step`), and that is read for
    `progress` while the block runs.

    None where nobody asks, or where the system has no /proc to name a file that leaves nothing
    behind.
    """
    if progress is None or not os.path.exists("/proc/self/fd"):
        yield None
        return
    with tempfile.TemporaryFile(prefix="semmoe-") as file:
        ended = threading.Event()

        def watch() -> None:
            progress(0, total)
            while not ended.wait(LOOK_SECONDS):
                progress(min(os.fstat(file.fileno()).st_size, total), total)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield f"/proc/{os.getpid()}/fd/{file.fileno()}"
        finally:
            ended.set()
            thread.join()
    progress(total, total)


def tell_step(path: str | None) -> None:
    """One step is done: a byte more in the file of `step_file`."""
    if path is not None:
        with open(path, "ab", buffering=0) as file:
            file.write(b".")


def compute_on_one_thread() -> None:
    """This process computes on one BLAS thread, as its workers do, if called before numpy is
    imported.

    Sums are then added in one order whatever the machine: the same input gives the same bytes on 2
    cores and on 64.

    Nor does it ask the system for huge pages: arrays come and go, and a virtual machine may take
    milliseconds to find each, which was a fifth of the time of a large plan (docs/experiments.md).
    """
    os.environ.update(dict.fromkeys(THREADS, "1"))
    os.environ.update({name: value for name, value in SMALL_PAGES.items() if name not in os.environ})
    keep_freed_memory()


def keep_freed_memory() -> None:
    """This process keeps memory that it freed for its next arrays, where the C library can be told
    so (glibc).

    Arrays of some megabytes are made and dropped at every step; to get their pages from the system
    each time takes as long as the arithmetic.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        for option, size in KEPT_BYTES.items():
            mallopt(option, size)


def _start_worker(_: object) -> None:
    """Ctrl-C is the main process's to handle; where that ends without a word, so does its
    worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_freed_memory()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _map_bounded(
    pool: ProcessPoolExecutor, in_flight: int, solve: Callable[[Any], Any], tasks: Iterable[Any]
) -> Iterator[Any]:
    """Results in order with a bounded number of tasks submitted: a task holds its layer's rows."""
    pending: list[Future[Any]] = []
    for task in tasks:
        pending.append(pool.submit(solve, task))
        if len(pending) > in_flight:
            yield pending.pop(0).result()
    while pending:
        yield pending.pop(0).result()
