"""Environments that hold what semmoe declares and nothing else, made without network: the declared
dependencies, and theirs, are linked into them from the environment that runs the tests."""

import os
import shutil
import subprocess
import sys
import venv
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def copy_source(target: Path) -> Path:
    """The repository without what git ignores: a build writes beside its sources."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "semmoe-demo")
    shutil.copytree(ROOT, target, ignore=ignored)
    (target / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", target / ".ci")
    return target


def make_environment(root: Path, requirements: list[str], *extras: str) -> Path:
    """The bin folder of a fresh environment with what `requirements` (of the wheel) ask for,
    `extras` included, and not the wheel."""
    venv.create(root, symlinks=True)
    packages = next(root.glob("lib/python*/site-packages"))
    for found in declared(requirements, *extras):
        for top in _tops(found):
            source, target = Path(str(found.locate_file(top))), packages / top
            if source.exists() and not target.exists():
                target.symlink_to(source, target_is_directory=source.is_dir())
    return root / "bin"


def declared(requirements: list[str], *extras: str) -> list[Distribution]:
    """The installed distributions that the requirements name, and theirs."""
    found: dict[str, Distribution] = {}
    open_ = [(Requirement(text), extra) for text in requirements for extra in ("", *extras)]
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


def _tops(installed: Distribution) -> set[str]:
    """The names in site-packages that a distribution owns; without programs, and without what
    hooks into every start of Python."""
    names = {Path(str(file)).parts[0] for file in installed.files or []}
    return {name for name in names if name not in ("..", "__pycache__") and not name.endswith(".pth")}


def install(environment: Path, *words: str) -> None:
    """`pip install` into the environment, without network; the running pip does it, as one of the
    environment's own would bring build tools."""
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "python"), "install", "--quiet"]
    subprocess.run([*pip, "--no-index", "--no-deps", "--no-compile", *words], check=True, env=_clean_variables())


def outside(environment: Path, *words: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A program of the environment, as in a shell where it is active: in another folder and
    without this process's Python variables."""
    path = f"{environment}{os.pathsep}{os.environ.get('PATH', '')}"
    clean = _clean_variables() | {"PATH": path, "HF_HUB_OFFLINE": "1"} | variables
    program = str(environment / words[0])
    return subprocess.run([program, *words[1:]], cwd=cwd, capture_output=True, text=True, env=clean, check=False)


def _clean_variables() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COVERAGE", "VIRTUAL_ENV", "SEMMOE"))}
