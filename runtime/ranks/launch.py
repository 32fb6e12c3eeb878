"""Starts R ranks on this machine, one process each, and watches them: the first that fails ends
all, and its reason is told.

Under torchrun the agent starts and watches the ranks, and `as_rank` tells their failures.

Shape letters: R ranks.
"""

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from semmoe.profiles.errors import InputError, show_traceback

GRACE_S = 2.0  # after a failure: how long other reasons are waited for, and processes for their end


def under_torchrun() -> bool:
    """Whether this process is a rank already."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class RankError(RuntimeError):
    """A rank met a bug: its own traceback."""


def launch(
    work: Callable[..., Any], arguments: tuple[Any, ...], num_ranks: int, *, tasks: Sequence[Any] | None = None
) -> Any:
    """Run `work` on every rank of this machine.

    Parameters:
        work: importable; called with `arguments`, and with its task where there are any.
        arguments: picklable, the same on every rank.
        tasks: picklable, one for each rank.

    Returns:
        What rank 0 returns. Raises InputError with the reason of the rank that failed first,
        RankError with its traceback where that is a bug; the others are stopped within seconds.
    """
    context = multiprocessing.get_context("spawn")
    port = free_port()
    processes, pipes = [], []
    resource_tracker.ensure_running()  # which unblocks SIGINT when it starts
    try:
        for rank in range(num_ranks):
            receiving, sending = context.Pipe(duplex=False)
            words = arguments if tasks is None else (*arguments, tasks[rank])
            process = context.Process(
                target=_rank_main, args=(sending, work, words, (rank, num_ranks, port)), daemon=True
            )
            # Ranks inherit the mask: Ctrl-C reaches this process alone, which ends them without a
            # traceback from each.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            sending.close()
            processes.append(process)
            pipes.append(receiving)
        result = _watch(processes, pipes)
    except BaseException:
        _stop(processes, ("terminate", "kill"))
        raise
    _stop(processes, ("join", "terminate", "kill"))
    return result


def _watch(processes: list[Any], pipes: list[Connection]) -> Any:
    """The result of rank 0 once all ranks ended well."""
    result, failures, deadline = None, {}, None
    running = dict(enumerate(pipes))
    while running:
        ready = wait(
            list(running.values()), timeout=None if deadline is None else max(0.0, deadline - time.monotonic())
        )
        for rank in [r for r, pipe in running.items() if pipe in ready]:
            kind, value = _receive(running.pop(rank), processes[rank], rank)
            if kind == "done":
                result = value if rank == 0 else result
            else:
                failures[rank] = (kind, value)
                deadline = deadline or time.monotonic() + GRACE_S
        if deadline is not None and time.monotonic() >= deadline:
            break
    if failures:
        # A rank that died or refused is the cause; the others only saw their exchange fail.
        order = ("killed", "crashed", "refused", "exchange")
        kind, message = min(failures.values(), key=lambda failure: order.index(failure[0]))
        raise RankError(message) if kind == "crashed" else InputError(message)
    return result


def _receive(pipe: Connection, process: Any, rank: int) -> tuple[str, Any]:
    """What a rank said last, or how it ended without a word."""
    try:
        return pipe.recv()
    except (EOFError, OSError):
        process.join(GRACE_S)
        code = process.exitcode
        if code is not None and code < 0:
            return "killed", f"rank {rank} was killed by {signal.Signals(-code).name}: the run is over"
        return "killed", f"rank {rank} ended without a result (exit code {code}): the run is over"


def _stop(processes: list[Any], ways: tuple[str, ...]) -> None:
    """End the processes: `ways` in turn, each with some time to work. Rank 0, which serves the
    group's store, is told last."""
    for stop in ways:
        for process in reversed(processes):
            if stop != "join" and process.is_alive():
                getattr(process, stop)()
        deadline = time.monotonic() + GRACE_S
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "ranks are child processes"
    parent.join()
    os._exit(1)


def as_rank(work: Callable[[], Any], kept: Callable[[], str] = str) -> Any:
    """What `work` returns on this rank under torchrun. A failure is one line, told once where all
    ranks see it.

    `kept`: what rank 0 adds to it.
    """
    from semmoe.runtime.ranks.failures import ExchangeError, SharedRefusal

    rank = os.environ["RANK"]

    def stop(*_: object) -> None:
        raise ExchangeError(f"rank {rank} was stopped by SIGTERM: another rank has failed, or torchrun was ended")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        return work()
    except SharedRefusal as error:
        if os.environ.get("LOCAL_RANK", rank) != "0":
            sys.exit(1)
        raise InputError(str(error)) from None
    except (ExchangeError, InputError) as error:
        raise InputError(f"{error}{kept() if rank == '0' else ''}") from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _rank_main(
    pipe: Connection, work: Callable[..., Any], arguments: tuple[Any, ...], place: tuple[int, int, int]
) -> None:
    """One rank: its result or the reason of its failure goes through the pipe. `place`: rank,
    number of ranks, port."""
    from semmoe.runtime.ranks.failures import ExchangeError

    rank, num_ranks, port = place
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        LOCAL_WORLD_SIZE=str(num_ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    # A killed command must not leave ranks behind.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if "OMP_NUM_THREADS" not in os.environ:  # ranks share the cores of this machine
        import torch

        torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_ranks))
    try:
        message = ("done", work(*arguments))
    except InputError as error:
        show_traceback(error)
        message = ("refused", str(error))
    except ExchangeError as error:
        show_traceback(error)
        message = ("exchange", str(error))
    except BaseException:
        import traceback

        message = ("crashed", f"rank {rank} failed:\n{traceback.format_exc()}")
    pipe.send(message)
    pipe.close()
    sys.stdout.flush()
    sys.stderr.flush()
    if message[0] != "done":
        os._exit(1)  # a group whose peers are gone can block an orderly exit
