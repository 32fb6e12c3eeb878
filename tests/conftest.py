"""Built and installed once for all tests that need it: the wheel, and environments that hold it."""

import os
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling


class ByFile(LoadFileScheduling):
    """A file's tests stay in one process, which makes its fixtures once; so do the files that use
    what is built and installed here."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "built" if Path(file).stem in ("test_wheel", "test_names", "test_light_install") else file


LONG = ("test_light_install", "test_names", "test_wheel", "test_kill_points", "test_fuzz", "test_torchrun")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take a minute come first, so that none is alone at the end."""
    items.sort(key=lambda item: item.path.stem not in LONG)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFile:
    return ByFile(config, log)


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    """A folder with wheel and sdist, and the build's output as log.txt."""
    pytest.importorskip("build", reason="the test extra's build is not installed")
    from environments import copy_source

    root = tmp_path_factory.mktemp("wheel")
    source = copy_source(root / "source")
    words = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(root / "dist"), str(source)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}  # it is warned of
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (root / "dist" / "log.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    return root / "dist"


@pytest.fixture(scope="session")
def wheel(built) -> Path:
    return next(built.glob("*.whl"))


@pytest.fixture(scope="session")
def described(wheel) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="session")
def requirements(described) -> list[str]:
    return described.get_all("Requires-Dist") or []


@pytest.fixture(scope="session")
def with_models(wheel, requirements, tmp_path_factory) -> Path:
    """The bin folder of an environment with `semmoe[models]`."""
    from environments import install, make_environment

    environment = make_environment(tmp_path_factory.mktemp("with-models"), requirements, "models")
    install(environment, str(wheel))
    return environment


@pytest.fixture(scope="session")
def light(wheel, requirements, tmp_path_factory) -> Path:
    """The bin folder of an environment with `semmoe` alone: no PyTorch, no Transformers."""
    from environments import install, make_environment

    environment = make_environment(tmp_path_factory.mktemp("light"), requirements)
    install(environment, str(wheel))
    return environment
