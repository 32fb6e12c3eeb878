"""The README's commands are what CI runs and what a new user gets."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_ci_runs_the_test_command_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    command = next(line for line in README.splitlines() if "pytest" in line)
    assert "pip install -c constraints-cpu.txt -e '.[test]'" in command
    assert "-c constraints-cpu.txt -e '.[test]'" in script and ".venv/bin/python -m pytest" in script
    assert command.endswith(".venv/bin/python -m pytest")


def test_the_first_command_runs_the_demo(tmp_path):
    command = next(line for line in README.splitlines() if "pip install -c constraints-cpu.txt . &&" in line)
    words = command.rsplit("&&", 1)[1].strip().removeprefix(".venv/bin/").split()
    assert words == ["semmoe", "demo"]
    result = subprocess.run(
        [sys.executable, "-m", "semmoe_cli", *words[1:]], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert re.search(r"plan .* random .* 0\.250", result.stdout)
    for name in ("trace/trace.json", "plan/plan.json", "checkpoint/model.safetensors"):
        assert (tmp_path / "semmoe-demo" / name).is_file()
    assert "semmoe-demo/plan" in result.stderr


def test_every_command_of_the_readme_exists():
    known = subprocess.run([sys.executable, "-m", "semmoe_cli", "--help"], capture_output=True, text=True).stdout
    for name in set(re.findall(r"^semmoe (\w+)", README, re.M)):
        assert re.search(rf"^  {name}\b", known, re.M), name


def test_links_of_the_readme_lead_somewhere():
    for target in re.findall(r"\]\((docs/[^)#]+)", README):
        assert (ROOT / target).is_file(), target


def test_the_script_of_ci_is_executable():
    assert shutil.which(str(ROOT / ".ci" / "run"))
