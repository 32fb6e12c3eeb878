"""The README's commands are what CI runs and what a new user gets."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_ci_runs_the_commands_of_the_readme():
    """`.ci/run` takes both commands from the README by their last words; tests/test_wheel.py
    runs the demo from a wheel."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    patterns = re.findall(r"\$\(grep -E '(.+)' README.md\)", script)
    found = [[line for line in README.splitlines() if re.search(pattern, line)] for pattern in patterns]
    assert [len(lines) for lines in found] == [1, 1]
    assert found[0][0].endswith("pip install -c constraints-cpu.txt '.[models]' && .venv/bin/semmoe demo")
    assert found[1][0].endswith("pip install -c constraints-cpu.txt -e '.[test]' && .venv/bin/python -m pytest")
    assert "pip install" not in script, "a command is copied"


def test_every_command_of_the_readme_exists():
    known = subprocess.run([sys.executable, "-m", "semmoe", "--help"], capture_output=True, text=True).stdout
    for name in set(re.findall(r"^semmoe (\w+)", README, re.M)):
        assert re.search(rf"^  {name}\b", known, re.M), name


def test_the_readme_is_a_screen_with_a_picture_and_a_way_on():
    words = re.sub(r"```.*?```", "", README, flags=re.S).split()
    assert len(words) < 600, "a reader decides in a screen: move the rest to docs/"
    assert "(docs/images/report.png)" in README and "docs/faq.md#when-does-placement-not-help" in README


def test_the_script_of_ci_is_executable():
    assert shutil.which(str(ROOT / ".ci" / "run"))
