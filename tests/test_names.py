"""Every way to start semmoe works from a directory whose own modules have the names of our folders,
whatever they do when they are imported; from a wheel and from an editable install."""

import json
from pathlib import Path

import pytest
from environments import copy_source, install, make_environment, outside
from random_plans import random_plan

from semmoe.profiles.demo.paths import demo_model_path
from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic

NAMES = ("runtime/__init__.py", "solvers/__init__.py", "profiles.py", "semmoe_cli/__init__.py", "commands.py")
TORCHRUN = ("python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """A directory as users have them: a trace, a plan's name to be, and modules of their own."""
    root = tmp_path_factory.mktemp("hostile")
    for name in NAMES:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("raise RuntimeError('a module of the current directory was imported')\n")
    write_synthetic(root / "t", SyntheticWorld(num_requests=60, tokens_per_request=40, num_layers=2))
    return root


@pytest.fixture(scope="module", params=["wheel", "editable", "editable strict"])
def environment(request, with_models, requirements, tmp_path_factory) -> Path:
    """The bin folder of an environment with semmoe installed in one of the three ways."""
    if request.param == "wheel":
        return with_models
    root = tmp_path_factory.mktemp("editable")
    made = make_environment(root / "environment", [*requirements, "setuptools"], "models")
    strict = ("--config-settings", "editable_mode=strict") if "strict" in request.param else ()
    install(made, "--no-build-isolation", *strict, "-e", str(copy_source(root / "source")))
    return made


def run_in(folder: Path, environment: Path, *words: str) -> str:
    done = outside(environment, *words, cwd=folder, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_program_and_the_module_and_their_worker_processes(environment, hostile, tmp_path):
    place = ("place", "t", "--ranks", "4", "--method", "metis", "--processes", "2", "--json")
    plans = []
    for number, start in enumerate((("semmoe",), ("python", "-m", "semmoe"))):
        plans.append(tmp_path / f"p{number}")
        run_in(hostile, environment, *start, *place, "-o", str(plans[-1]))
        shown = json.loads(run_in(hostile, environment, *start, "show", str(plans[-1]), "--json"))
        assert shown["kind"] == "plan"
    assert [(plan / "plan.json").read_bytes() for plan in plans] == [(plans[0] / "plan.json").read_bytes()] * 2


def test_torchrun_starts_the_module_and_the_program(with_models, hostile, tmp_path):
    random_plan(demo_model_path(), ranks=2).save(tmp_path / "p")
    run = ("run", "demo", "--plan", str(tmp_path / "p"), "--prompts", "demo", "--max-requests", "4", "--json")
    short = ("--scheduler", "none", "--max-new-tokens", "2", "-o", str(tmp_path / "answers.jsonl"))
    found = json.loads(run_in(hostile, with_models, *TORCHRUN, "-m", "semmoe", *run, *short))
    assert (found["ranks"], found["requests"]) == (2, 4)
    shown = run_in(hostile, with_models, *TORCHRUN, "--no-python", "semmoe", "show", "t", "--json")
    assert shown.count('"requests": 60') == 2, "each rank says it"
