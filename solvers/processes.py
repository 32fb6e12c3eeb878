"""Processes that start as copies of one that has imported what they need: in hundredths of a
second, where an import takes seconds of each.

That one process (multiprocessing's fork server) lives as long as this one and computes nothing, so
no lock, thread or array of this process is copied.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from multiprocessing import resource_tracker
from multiprocessing.reduction import DupFd
from typing import Any

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def copies_of(imported: Sequence[str]) -> Any:
    """A context of multiprocessing whose processes have imported these modules; the first call of a
    process decides. Elsewhere than on Linux, where libraries of the system may start threads when
    they are imported, each process imports for itself."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    _start_server(context, tuple(imported))
    return context


@cache
def _start_server(context: Any, imported: tuple[str, ...]) -> None:
    """Returns when all is imported: a process that is asked for before may start when this one was
    interrupted, and what it is to take over is gone."""
    context.set_forkserver_preload(list(imported))
    resource_tracker.ensure_running()  # which unblocks SIGINT when it starts
    with one_thread_each(), held_interrupts():
        first = context.Process(target=int)
        first.start()
    first.join()


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Processes that start in the block compute on one BLAS thread."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def held_interrupts() -> Iterator[None]:
    """Ctrl-C in the block waits for its end, and never comes to processes that start in it: they
    inherit the mask.

    Without it a worker that is interrupted before it can ignore that would print a traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Surroundings:
    """Environment, standard output and standard error of this process, as an argument of one that
    it starts: which takes them for its own."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _take_surroundings, (dict(os.environ), {number: DupFd(number) for number in (1, 2) if is_open(number)})


def _take_surroundings(environment: dict[str, str], streams: dict[int, Any]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, stream in streams.items():
        descriptor = stream.detach()
        os.dup2(descriptor, number)
        os.close(descriptor)


def is_open(descriptor: int) -> bool:
    """Whether this process has such a file: a shell can close its output (`>&-`)."""
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True
