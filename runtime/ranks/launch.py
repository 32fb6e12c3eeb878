"""Starts R ranks on this machine, one process each, and watches them: the first that fails, dies or
is stopped ends all, and its reason is told.

Under torchrun the agent starts the ranks, and `as_rank` tells their failures.

Shape letters: R ranks.
"""

import atexit
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from semmoe.profiles.errors import InputError, show_traceback
from semmoe.runtime.ranks.heartbeat import BEAT_S, LATE_S, Silence, parent_of, state_of
from semmoe.solvers.processes import Surroundings, copies_of, held_interrupts

IMPORTED = ("torch", "torch.distributed", "transformers")  # by every rank
GRACE_S = 2.0  # after a failure: how long other reasons are waited for, and processes for their end


def under_torchrun() -> bool:
    """Whether this process is a rank already."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


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
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    context = _context(work.__module__)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # the port is the system's choice
    processes, pipes = [], []
    resource_tracker.ensure_running()  # which unblocks SIGINT when it starts
    try:
        for rank in range(num_ranks):
            receiving, sending = context.Pipe(duplex=False)
            words = arguments if tasks is None else (*arguments, tasks[rank])
            # As bytes: what it names is imported once the rank beats.
            job = pickle.dumps((work, words))
            process = context.Process(
                target=_rank_main, args=(Surroundings(), sending, job, (rank, num_ranks, store.port)), daemon=True
            )
            # Ranks inherit the mask: Ctrl-C reaches this process alone, which ends them without a
            # traceback from each.
            with held_interrupts():
                process.start()
            sending.close()
            processes.append(process)
            pipes.append(receiving)
        result = _watch(processes, pipes)
    except BaseException:
        _stop(processes, ("terminate", "kill"))
        raise
    _stop(processes, ("join", "terminate", "kill"))
    return result


def _context(module: str) -> Any:
    """How ranks start: as copies of a process that has imported `module` and what else takes
    seconds. Where there is a GPU each imports for itself: what CUDA sets up in a process does not
    work in its copies."""
    import torch

    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    return copies_of([module, *IMPORTED])


def _watch(processes: list[Any], pipes: list[Connection]) -> Any:
    """The result of rank 0 once all ranks ended well."""
    result, failures, deadline = None, {}, None
    parents = [parent_of(process.pid) for process in processes]
    running, silence, beating = dict(enumerate(pipes)), Silence(len(pipes)), set()
    while running and (deadline is None or time.monotonic() < deadline):
        ready = wait(list(running.values()), timeout=BEAT_S if deadline is None else GRACE_S / 10)
        silence.pass_time()
        for rank in [r for r, pipe in running.items() if pipe in ready]:
            kind, value = _receive(running[rank], processes[rank], rank)
            if kind == "beat":
                silence.hear(rank)
                beating.add(rank)
                continue
            del running[rank]
            if kind == "done":
                result = value if rank == 0 else result
            else:
                failures[rank] = (kind, value)
        for rank in running:
            state = state_of(processes[rank].pid, parents[rank])
            # The others may give up waiting for a stopped rank before it is late.
            late_s = LATE_S if {kind for kind, _ in failures.values()} != {"exchange"} else BEAT_S
            if silence.of(rank) >= late_s and (state == "stopped" or (not state and rank in beating)):
                told = f", its process {processes[rank].pid} is stopped" if state else ""
                said = f"rank {rank} has not answered for {silence.of(rank):.0f} s{told}: the run is over"
                failures[rank] = ("stopped", said)
        if failures:
            deadline = deadline or time.monotonic() + GRACE_S
    if failures:
        # A rank that died, was stopped or refused is the cause: the others saw their exchange fail.
        order = ("killed", "stopped", "crashed", "refused", "exchange")
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


def as_rank(work: Callable[[], Any], tell: Callable[[str], None], kept: Callable[[], str] = str) -> Any:
    """What `work` returns on this rank under torchrun. A failure is one line, of one rank.

    Parameters:
        tell: prints the line where this rank is held up in an exchange.
        kept: what is added to it.
    """
    from semmoe.runtime.ranks.failures import ExchangeError
    from semmoe.runtime.ranks.watch import RankWatch

    stopped, working = False, True

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True
        if working:  # else it is ending already, and says why
            raise ExchangeError(
                f"rank {watch.rank} was stopped by SIGTERM: another rank has failed, or torchrun was ended"
            )

    watch = RankWatch(tell, kept)
    before = signal.signal(signal.SIGTERM, stop)
    try:
        try:
            result = work()
        finally:
            working = False
        signal.signal(signal.SIGTERM, before)  # after a failure it could end this rank before it tells
        return result
    except ExchangeError as error:
        show_traceback(error)
        failure = watch.cause(str(error), stopped=stopped)
    except InputError as error:
        show_traceback(error)
        failure = watch.publish("refused", str(error))
    except Exception as error:
        watch.publish("crashed", f"rank {watch.rank} failed: {type(error).__name__}")
        atexit.register(_leave)
        raise
    finally:
        watch.close()
    atexit.register(_leave)
    if watch.tells(failure):
        raise InputError(f"{failure.line}{kept()}")
    sys.exit(1)


def _leave() -> None:
    """End this process before its interpreter does: threads of an open group could abort it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _rank_main(_: object, pipe: Connection, job: bytes, place: tuple[int, int, int]) -> None:
    """One rank: its result or the reason of its failure goes through the pipe. `job`: what to call,
    and with what. `place`: rank, number of ranks, port."""
    rank, num_ranks, port = place
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        LOCAL_WORLD_SIZE=str(num_ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # the parent keeps the store, as torchrun's agent does
    )
    # A killed command must not leave ranks behind.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    ended, turn = threading.Event(), threading.Lock()
    threading.Thread(target=_beat, args=(pipe, turn, ended), daemon=True).start()
    message = _outcome(job, rank, num_ranks)
    ended.set()
    with turn:
        pipe.send(message)
        pipe.close()
    if message[0] != "done":
        _leave()  # a group whose peers are gone can block an orderly exit


def _beat(pipe: Connection, turn: threading.Lock, ended: threading.Event) -> None:
    while not ended.is_set():
        with turn:
            if not ended.is_set():
                pipe.send(("beat", None))
        ended.wait(BEAT_S)


def _outcome(job: bytes, rank: int, num_ranks: int) -> tuple[str, Any]:
    """What a rank says at its end."""
    from semmoe.runtime.ranks.failures import ExchangeError

    try:
        import torch

        asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # "4,2": of the outer level
        share = (os.cpu_count() or 1) // num_ranks  # ranks share the cores of this machine
        torch.set_num_threads(max(1, int(asked) if asked.isdigit() else share))
        work, arguments = pickle.loads(job)
        return "done", work(*arguments)
    except InputError as error:
        show_traceback(error)
        return "refused", str(error)
    except ExchangeError as error:
        show_traceback(error)
        return "exchange", str(error)
    except BaseException:
        import traceback

        return "crashed", f"rank {rank} failed:\n{traceback.format_exc()}"
