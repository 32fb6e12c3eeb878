"""The wheel: complete, small, described, and at home in an environment that holds what it declares
and nothing else.

The environment is made without network: the declared dependencies, and theirs, are linked into it
from the one that runs the tests.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest

pytest.importorskip("build", reason="the test extra's build is not installed")

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "semmoe_cli": "semmoe",
    "profiles": "semmoe/profiles",
    "solvers": "semmoe/solvers",
    "runtime": "semmoe/runtime",
}
MEGABYTES = 25


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with wheel and sdist, and the build's output as log.txt; built from a copy: a
    build writes beside its sources."""
    root = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "semmoe-demo")
    shutil.copytree(ROOT, root / "source", ignore=ignored)
    (root / "source" / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", root / "source" / ".ci")
    words = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(root / "dist"), str(root / "source")]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}  # it is warned of
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (root / "dist" / "log.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    return root / "dist"


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def described(wheel) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="module")
def bare(wheel, described, tmp_path_factory) -> Path:
    """The bin folder of a fresh environment with the wheel and its declared dependencies."""
    root = tmp_path_factory.mktemp("bare")
    venv.create(root, symlinks=True)
    packages = next(root.glob("lib/python*/site-packages"))
    for found in declared(described.get_all("Requires-Dist") or []):
        for top in tops(found):
            source, target = Path(str(found.locate_file(top))), packages / top
            if source.exists() and not target.exists():
                target.symlink_to(source, target_is_directory=source.is_dir())
    # Its own pip would install build tools; the running one puts files there.
    words = [sys.executable, "-m", "pip", "--python", str(root / "bin" / "python"), "install", "--quiet"]
    subprocess.run([*words, "--no-index", "--no-deps", "--no-compile", str(wheel)], check=True)
    return root / "bin"


def declared(requirements: list[str]) -> list[Distribution]:
    """The installed distributions that the requirements name, and theirs, without extras of the
    wheel."""
    found: dict[str, Distribution] = {}
    open_ = [(Requirement(text), "") for text in requirements]
    while open_:
        requirement, extra = open_.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        key = f"{requirement.name.lower().replace('_', '-')}[{','.join(sorted(requirement.extras))}]"
        if key in found:
            continue
        try:
            found[key] = distribution(requirement.name)
        except PackageNotFoundError:  # an optional one of another platform
            continue
        for text in found[key].requires or []:
            open_ += [(Requirement(text), name) for name in ("", *requirement.extras)]
    return list(found.values())


def installed_paths() -> list[str]:
    """Where the wheel must have every file of code that the folders hold."""
    return sorted(
        f"{name}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, name in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    )


def tops(installed: Distribution) -> set[str]:
    """The names in site-packages that a distribution owns; without programs, and without what
    hooks into every start of Python."""
    names = {Path(str(file)).parts[0] for file in installed.files or []}
    return {name for name in names if name not in ("..", "__pycache__") and not name.endswith(".pth")}


def outside(bare: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A program of the environment, in another folder and without this process's Python
    variables."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COVERAGE", "VIRTUAL_ENV"))}
    return subprocess.run([str(bare / words[0]), *words[1:]], cwd=cwd, capture_output=True, text=True, env=environment)


def test_the_build_warns_of_nothing(built):
    log = (built / "log.txt").read_text(encoding="utf-8")
    assert "Successfully built" in log
    assert [line for line in log.splitlines() if "warning" in line.lower() or "deprecat" in line.lower()] == []


def test_the_wheel_holds_the_packages_and_is_small(wheel):
    assert wheel.stat().st_size < MEGABYTES * 1e6
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"semmoe"}
    assert set(installed_paths()) <= names
    for name in ("model/model.safetensors", "model/config.json", "model/tokenizer.json", "prompts.jsonl", "README.md"):
        assert f"semmoe/profiles/demo/{name}" in names


def test_the_sdist_holds_what_tests_and_docs_need(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "constraints-cpu.txt", ".ci/run", "docs/formats.md"} <= names
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")} <= names


def test_the_metadata(wheel, described):
    assert (described["Name"], described["License-Expression"]) == ("semmoe", "Apache-2.0")
    assert described["Requires-Python"] == ">=3.11" and described["Description-Content-Type"] == "text/markdown"
    assert "Programming Language :: Python :: 3.11" in described.get_all("Classifier", [])
    with zipfile.ZipFile(wheel) as archive:
        license_ = next(n for n in archive.namelist() if n.endswith("licenses/LICENSE"))
        assert archive.read(license_) == (ROOT / "LICENSE").read_bytes()
    needed = [Requirement(text) for text in described.get_all("Requires-Dist", [])]
    assert not {"pytest", "build", "coverage", "ruff"} & {r.name for r in needed if r.marker is None}


def test_declared_dependencies_are_enough_for_help(bare, tmp_path):
    done = outside(bare, "semmoe", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "Example" in done.stdout, done.stderr
    assert outside(bare, "semmoe", "--version", cwd=tmp_path).stdout.startswith("semmoe ")
    absent = outside(bare, "python", "-c", "import pytest", cwd=tmp_path)
    assert "No module named 'pytest'" in absent.stderr, (
        "the environment is not bare: it sees what the wheel does not declare"
    )


def test_declared_dependencies_are_enough_for_every_module(bare, tmp_path):
    with_code = [path.removesuffix(".py").replace("/", ".") for path in installed_paths() if "/__" not in path]
    code = f"import importlib\nfor name in {with_code!r}: print(importlib.import_module(name).__file__)"
    done = outside(bare, "python", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = done.stdout.split()
    assert len(files) == len(with_code) and all(file.startswith(str(bare.parent)) for file in files)


def test_the_installed_wheel_runs_the_demo(bare, tmp_path):
    """What the README's first command ends in; `.ci/run` runs that command itself and leaves
    this test out."""
    done = outside(bare, "semmoe", "demo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"plan .* random .* 0\.250", done.stdout) and "semmoe-demo/plan" in done.stderr
    for name in ("trace/trace.json", "plan/plan.json", "report.html", "checkpoint/model.safetensors", "answers.jsonl"):
        assert (tmp_path / "semmoe-demo" / name).is_file()
