"""A rank that is dead or stopped ends the run by its name, one that is only slow does not; one of
several ranks under torchrun tells."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cases import watch_cases
from torch.distributed import TCPStore

from semmoe.profiles.errors import InputError
from semmoe.runtime.ranks import launch as launching
from semmoe.runtime.ranks.heartbeat import BEAT_S, Silence, siblings, state_of
from semmoe.runtime.ranks.launch import launch

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
STOPPED = r"rank 1 has not answered for \d+ s, its process \d+ is stopped: the run is over"


def test_a_stopped_rank_is_named_and_a_slow_one_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "LATE_S", 2.0)
    with pytest.raises(InputError, match=STOPPED):
        launch(watch_cases.stop_itself, (1,), 2)
    assert launch(watch_cases.hold_the_interpreter, (1, 4.0), 2) == "held"


def test_a_stopped_rank_is_named_where_others_gave_up_first() -> None:
    with pytest.raises(InputError, match=STOPPED):
        launch(watch_cases.wait_for_a_stopped_rank, (1, 3.0), 2)


def test_time_stands_still_for_a_process_that_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    silence = Silence(2)
    for step in (0.5, 600.0, 1.0):  # Ctrl-Z, and ten minutes later fg
        now += step
        silence.pass_time()
    assert silence.of(0) == 0.5 + 2 * BEAT_S + 1.0
    silence.hear(0)
    assert (silence.of(0), silence.of(1)) == (0.0, 3.5)


def ranks_as_torchrun_starts_them(case: str, size: int) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each rank; this process keeps the store, as the agent does.
    Rank 1 does what `case` says."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started = []
    for rank in range(size):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
        place |= {"PYTHONPATH": Path(watch_cases.__file__).parents[1], "OMP_NUM_THREADS": 1}
        environment = os.environ | {name: str(value) for name, value in place.items()}
        words = [sys.executable, "-c", f"from cases import watch_cases; watch_cases.as_torchrun_does({case!r})"]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(words, env=environment, stdout=pipe, stderr=pipe, text=True))
    ended = [process.communicate(timeout=240) for process in started]
    return [(process.returncode, *texts) for process, texts in zip(started, ended, strict=True)]


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("stop", f"{STOPPED}; 3 are kept"),
        ("kill", "rank 1 has died: the run is over; 3 are kept"),
        ("refuse", "rank 1 lacks a file; 3 are kept"),
        ("refuse all", "everybody lacks a file; 3 are kept"),
        ("refuse early", "rank 1 has no such device; 3 are kept"),
    ],
)
def test_one_rank_tells_why_the_run_is_over(case: str, told: str) -> None:
    ended = ranks_as_torchrun_starts_them(case, 3)
    errors = "".join(errors for _, _, errors in ended)
    assert re.fullmatch(f"semmoe: {told}\n", errors), ended
    assert all(code != 0 for code, _, _ in ended)


def test_a_bug_is_a_traceback_of_its_rank_alone() -> None:
    ended = ranks_as_torchrun_starts_them("bug", 2)
    assert ended[0][2] == "" and ended[1][2].rstrip().endswith("KeyError: 'no such key'")


def test_a_slow_rank_under_torchrun_is_left_alone() -> None:
    assert [code for code, _, _ in ranks_as_torchrun_starts_them("slow", 2)] == [0, 0]


def test_processes_are_told_apart() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=os.environ | {"RANK": "7"})
    try:
        assert state_of(child.pid, os.getpid()) == "alive"
        child.send_signal(19)
        os.waitpid(child.pid, os.WUNTRACED)
        assert state_of(child.pid, os.getpid()) == "stopped"
        assert state_of(child.pid, 1) == "gone"  # another process has its number by now
    finally:
        child.kill()
        child.wait()
    assert state_of(child.pid, os.getpid()) == "gone"
    assert siblings.__doc__
