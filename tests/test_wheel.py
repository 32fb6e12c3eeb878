"""The wheel: complete, small, described, and at home in an environment that holds what it declares
and nothing else."""

import re
import tarfile
import zipfile
from pathlib import Path

from environments import install, make_environment, outside
from packaging.requirements import Requirement

from semmoe.profiles.errors import EXTRAS

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "semmoe_cli": "semmoe",
    "profiles": "semmoe/profiles",
    "solvers": "semmoe/solvers",
    "runtime": "semmoe/runtime",
}
MEGABYTES = 25
# What is PyTorch's by nature imports it at its head; all else works without it.
MODELS_ROOMS = (
    "semmoe.profiles.capture.",
    "semmoe.profiles.demo.train",
    "semmoe.runtime.layer.",
    "semmoe.runtime.ranks.",
    "semmoe.runtime.replay.",
    "semmoe.runtime.serving.",
    "semmoe.runtime.transformers.",
)
ROUTE_ROOM = "semmoe.runtime.router."  # a server's, and imports what it is made of
IN_ENGINE = "semmoe.runtime.engines.vllm_loader"  # a class of vLLM's, which imports it


def tracked(folder: str) -> list[str]:
    """The files of a folder, without what Python leaves there."""
    paths = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return sorted(path.relative_to(ROOT / folder).as_posix() for path in paths)


def installed_paths() -> list[str]:
    """Where the wheel must have every file of code that the folders hold."""
    return sorted(
        f"{name}/{path}" for folder, name in FOLDERS.items() for path in tracked(folder) if path.endswith(".py")
    )


def modules() -> list[str]:
    """Every module of the package; programs (__main__) are started and not imported."""
    return [path.removesuffix(".py").replace("/", ".") for path in installed_paths() if "/__" not in path]


def import_each(environment: Path, folder: Path) -> set[str]:
    """Those modules that can be imported in the environment; its own files answer for them."""
    code = """
import importlib, sys
for name in sys.argv[2:]:
    try:
        file = importlib.import_module(name).__file__
    except ModuleNotFoundError as error:
        if error.name.startswith("semmoe"):
            raise
        continue
    assert file.startswith(sys.argv[1]), file
    print(name)
"""
    done = outside(environment, "python", "-c", code, str(environment.parent), *modules(), cwd=folder)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_build_warns_of_nothing(built):
    log = (built / "log.txt").read_text(encoding="utf-8")
    assert "Successfully built" in log
    assert [line for line in log.splitlines() if "warning" in line.lower() or "deprecat" in line.lower()] == []


def test_the_wheel_holds_the_packages_and_nothing_else(wheel):
    assert wheel.stat().st_size < MEGABYTES * 1e6
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    data = {f"semmoe/profiles/demo/{name}" for name in tracked("profiles/demo") if not name.endswith(".py")}
    assert names == {*installed_paths(), *data, "semmoe/py.typed", "semmoe/solvers/time/hardware.json"}
    assert {"semmoe/profiles/demo/model/model.safetensors", "semmoe/profiles/demo/prompts.jsonl"} <= data


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


def test_the_base_asks_for_nothing_that_engines_pin(described):
    """An extra is what pins PyTorch and Transformers; `semmoe` alone installs beside any engine."""
    needed = [Requirement(text) for text in described.get_all("Requires-Dist", [])]
    base = {r.name for r in needed if r.marker is None}
    extras = {
        extra: {r.name for r in needed if r.marker and r.marker.evaluate({"extra": extra})}
        for extra in described.get_all("Provides-Extra", [])
    }
    assert set(extras) == {"models", "route", "all", "test", "docs"}
    assert not base & {name for names in EXTRAS.values() for name in names}
    for extra, names in EXTRAS.items():
        assert extras[extra] <= set(names) and extras[extra], (
            "profiles/errors.py tells another extra than pyproject.toml"
        )
    assert {"semmoe"} == extras["all"] and "semmoe" in extras["test"]


def test_the_base_is_enough_for_help_and_every_module_outside_of_the_rooms_of_extras(light, tmp_path):
    done = outside(light, "semmoe", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "Example" in done.stdout, done.stderr
    assert outside(light, "semmoe", "--version", cwd=tmp_path).stdout.startswith("semmoe ")
    for name in ("pytest", "torch", "transformers", "datasets", "accelerate"):
        absent = outside(light, "python", "-c", f"import {name}", cwd=tmp_path)
        assert f"No module named '{name}'" in absent.stderr, "the environment sees what the wheel does not declare"
    failed = set(modules()) - import_each(light, tmp_path)
    assert {name for name in failed if not name.startswith((*MODELS_ROOMS, ROUTE_ROOM, IN_ENGINE))} == set()


def test_an_extra_is_enough_for_every_module_of_its_rooms(with_models, wheel, requirements, tmp_path):
    routing = make_environment(tmp_path / "routing", requirements, "route")
    install(routing, str(wheel))
    in_room = {name for name in modules() if name.startswith(ROUTE_ROOM)}
    assert in_room and in_room <= import_each(routing, tmp_path)
    assert set(modules()) - import_each(with_models, tmp_path) <= in_room | {IN_ENGINE}


def test_the_installed_wheel_runs_the_demo(with_models, tmp_path):
    """What the README's first command ends in; `.ci/run` runs that command itself and leaves
    this test out."""
    done = outside(with_models, "semmoe", "demo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"today \(contiguous\) +2\.\d{3} .*\n.*\nthis plan, dp-scorer +1\.\d{3} ", done.stdout)
    assert (
        "answers on 4 ranks equal to those of plain Transformers" in done.stdout and "semmoe-demo/plan" in done.stderr
    )
    for name in ("trace/trace.json", "plan/plan.json", "report.html", "checkpoint/model.safetensors", "answers.jsonl"):
        assert (tmp_path / "semmoe-demo" / name).is_file()
