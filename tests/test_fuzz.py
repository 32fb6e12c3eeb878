"""The harness of the fuzz corpus tells good answers from bad ones, and a sample of the corpus gets
good ones."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fuzzing.damage import Damage
from fuzzing.inputs import Input
from fuzzing.run import Answer, outcome, refused_well

BENCHMARK = Path(__file__).parent / "benchmarks" / "fuzz.py"
REFUSAL = "semmoe: t/trace.json: num_layers is -1, expected a whole number from 1\n"
TRACEBACK = 'Traceback (most recent call last):\n  File "a.py", line 1, in f\nKeyError: 1\n'


@pytest.mark.parametrize(
    "answer, expected",
    [
        (Answer(1, 0, 0.1, REFUSAL, []), "refused"),
        (Answer(1, 0, 0.1, "semmoe: reading text from field 'text'\n" + REFUSAL, []), "refused"),
        (Answer(2, 0, 0.1, "Usage: semmoe show\n\nError: no such option\n", []), "refused"),
        (Answer(1, 0, 0.1, "", []), "lines"),
        (Answer(1, 0, 0.1, "a warning of a library\n" + REFUSAL, []), "lines"),
        (Answer(1, 0, 0.1, REFUSAL + "and more of it\n", []), "lines"),
        (Answer(1, 0, 0.1, "semmoe: a name with \x1b[2J in it\n", []), "lines"),
        (Answer(1, 0, 0.1, f"semmoe: {'[' * 2000}\n", []), "lines"),
        (Answer(1, 0, 0.1, TRACEBACK, []), "traceback"),
        (Answer(0, 0, 0.1, "", []), "accepted"),
        (Answer(0, 0, 0.1, "", ["victim/x.safetensors"]), "escaped"),
        (Answer(1, 0, 0.1, REFUSAL, ["in/here/t/trace.json"]), "escaped"),
        (Answer(0, 9, 0.1, "", []), "signal"),
        (Answer(None, 0, 20.0, "", []), "slow"),
        (Answer(130, 0, 0.1, "semmoe: interrupted\n", []), "exit code"),
    ],
)
def test_outcomes(answer: Answer, expected: str) -> None:
    one = Input("trace.json", "t/trace.json", Damage("nothing", lambda file: None), "show t")
    assert outcome(one, answer) == expected


def test_a_change_of_bytes_may_leave_a_valid_file() -> None:
    one = Input("trace part", "t/a.parquet", Damage("a byte", lambda file: None, may_pass=True), "show t")
    assert outcome(one, Answer(0, 0, 0.1, "", [])) == "passed"
    assert outcome(one, Answer(1, 0, 0.1, TRACEBACK, [])) == "traceback"


def test_direction_marks_are_no_part_of_a_line() -> None:
    assert refused_well(Answer(1, 0, 0.1, REFUSAL, []))
    assert not refused_well(Answer(1, 0, 0.1, "semmoe: \u202etxt.exe\n", []))


def test_malformed_inputs_are_refused_in_one_line(tmp_path: Path) -> None:
    """A sample of every format, flipped bits among them; tests/benchmarks/fuzz.py runs all."""
    failures = tmp_path / "failures.json"
    words = [sys.executable, str(BENCHMARK), "--sample", "120", "--processes", "1", "--failures", str(failures)]
    ran = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert json.loads(ran.stdout)["inputs"] >= 100
    found = [
        f"--only {f['number']}: {f['outcome']}: {f['damage']}: {f['command']}" for f in json.loads(failures.read_text())
    ]
    assert not found, "\n".join(found)
