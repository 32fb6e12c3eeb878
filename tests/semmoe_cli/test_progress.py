"""How far a command is: lines now and then, bars on a terminal, and the time left."""

import itertools
import sys
import time

import pytest

from semmoe.profiles.capture.run import Limits, TraceProgress
from semmoe.terminal import progress as shown
from semmoe.terminal.loudness import QUIET, VARIABLE, VERBOSE
from semmoe.terminal.progress import Forecast, count, expected_tokens, gigabytes, stages, tracing


class Clock:
    """time.monotonic as the test sets it."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.monotonic", clock)
    return clock


def test_steps_off_a_terminal_are_a_line_now_and_then(capsys: pytest.CaptureFixture, clock: Clock) -> None:
    with stages() as show:
        for clock.now, done in ((3, 1), (12, 2), (15, 3)):
            show("placing layers", done, 4)
        clock.now = 25
        show("fitting schedules: layers", 1, 4)
        clock.now = 99
        show("fitting schedules: layers", 1, 4)  # nothing new
    printed = capsys.readouterr()
    assert (
        printed.err == "semmoe: placing layers 2 of 4, 0:00:18 left\nsemmoe: fitting schedules: layers 1 of 4\n"
        and not printed.out
    )


def test_a_terminal_sees_a_bar_with_the_time_left(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    for amount, done, total, text in ((gigabytes, 10**9, 4 * 10**9, "1.00 of 4.00 GB"), (count, 1, 4, "1 of 4")):
        with stages(amount) as show:
            show("reading", 0, 1)
            clock.now += 100
            show("writing", 0, total)
            clock.now += 4
            show("writing", done, total)
        bar = capsys.readouterr().err
        assert f"writing {text} " in bar and "0:00:12 left" in bar


def test_the_time_left_is_of_all_stages_and_does_not_jump(clock: Clock) -> None:
    forecast = Forecast({"reading": 1, "placing": 3, "placing again": 3})
    assert forecast.left("reading", 0, 10) is None
    told, ends = [], {"reading": 10, "placing": 60, "placing again": 60}  # placing takes twice what is usual
    for stage, seconds in ends.items():
        for done in range(1, seconds + 1):
            clock.now += 1
            told.append(forecast.left(stage, done, seconds))
    assert told[0] is not None and told[0] > 60  # of all stages, from the first step on
    assert max(abs(b - a) for a, b in itertools.pairwise(told)) < 9  # seconds, in one
    assert told[40] == pytest.approx(90, abs=15) and told[70] == pytest.approx(59, abs=5) and told[-1] < 1


def test_the_bar_of_planned_stages_is_one(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    monkeypatch.setattr(shown, "LINE_SECONDS", 0.0)
    with stages(usual={"reading": 1, "placing": 1}) as show:
        for stage in ("reading", "placing"):
            for done in range(5):
                show(stage, done, 4)
                clock.now += 5
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == "semmoe: reading 2 of 4 (stage 1 of 2), 0:00:30 left"
    assert lines[-1] == "semmoe: placing 4 of 4 (stage 2 of 2)"


def test_quiet_shows_nothing_and_verbose_what_stages_took(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    monkeypatch.setattr(shown, "LINE_SECONDS", 0.0)
    for level, said in ((QUIET, ""), (VERBOSE, "semmoe: reading: 7.0 s\nsemmoe: placing: 2.0 s\n")):
        monkeypatch.setenv(VARIABLE, level)
        with stages() as show:
            show("reading", 0, 1)
            clock.now += 7
            show("placing", 0, 1)
            clock.now += 2
        printed = capsys.readouterr().err
        assert said == "".join(line for line in printed.splitlines(True) if " s\n" in line)
        assert bool(printed) == bool(said)


def test_a_trace_tells_its_rate_and_the_time_left(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shown, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(shown, "POLL_SECONDS", 0.001)
    progress = TraceProgress(read_requests=5, read_tokens=500)
    with tracing(progress, Limits(max_requests=10), 0):
        progress.requests, progress.started = 2, time.monotonic() - 10
        progress.tokens = 200
        while "left" not in (line := capsys.readouterr().err):
            time.sleep(0.01)
    assert line.splitlines()[-1] == "semmoe: 2 requests, 200 tokens, 20 tokens/s, 0:00:40 left"
    with tracing(progress, Limits(), 0, silent=True):
        time.sleep(0.01)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("limits", "generated", "ranks", "expected"),
    [
        (Limits(), 0, 1, None),  # nothing tells how much there is
        (Limits(max_requests=10), 0, 1, 1000),
        (Limits(max_tokens=2000), 0, 1, 2000),
        (Limits(max_tokens=2000, max_requests=10), 0, 1, 1000),  # what ends first
        (Limits(max_requests=10), 3, 1, 1020),  # two more rows for every request
        (Limits(max_requests=10), 0, 2, 500),
    ],
)
def test_expected_tokens(limits: Limits, generated: int, ranks: int, expected: float | None) -> None:
    assert expected_tokens(TraceProgress(), limits, generated, ranks) is None
    assert expected_tokens(TraceProgress(read_requests=5, read_tokens=500), limits, generated, ranks) == expected
