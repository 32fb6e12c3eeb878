"""Commands that are killed in the middle leave the sources untouched and the target old, absent or
complete, and work when they are called again. A sample of the events; all of them:
tests/benchmarks/kill_points.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

WALK = Path(__file__).parent / "support" / "kill_points.py"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="tells open files by /proc")
def test_a_killed_command_leaves_nothing_half_written(tmp_path: Path) -> None:
    words = [sys.executable, str(WALK), str(tmp_path), "--sample", "1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    assert len(found["cases"]) <= found["again"] <= 2 * len(found["cases"]) and found["events"] > 200
    killed = {state for case in found["cases"].values() for state in case["states"]}
    assert killed <= {"old", "absent", "complete", "unfinished"} and len(killed) > 2, found
