"""A plan for a running server is taken where it fits what the server holds."""

import json
import shutil
from pathlib import Path

import pytest
from random_plans import random_plan
from stepped_plans import save_stepped
from tiny_models import tiny_model

from semmoe.profiles.errors import InputError
from semmoe.runtime.engines.plan_files import read_plan_facts
from semmoe.runtime.engines.vllm_worker import next_plan
from semmoe.runtime.engines.write import write_plugin_directory


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a plan `p` of 2 ranks, `p2` after it and `p3` after that, `other` of 4 ranks."""
    root = tmp_path_factory.mktemp("plans")
    tiny_model("qwen3_moe").save_pretrained(root / "source")
    plan = random_plan(root / "source")
    plan.save(root / "p")
    after, delta = save_stepped(plan, root / "p2", swaps=1)
    save_stepped(after, root / "p3", swaps=1, seed=1)
    random_plan(root / "source", ranks=4).save(root / "other")
    write_plugin_directory(after, "vllm-plugin", root / "small")
    shutil.copy(root / "p2" / "delta.json", root / "small.delta.json")
    return root


def test_a_plan_follows_the_one_that_its_delta_starts_from(folder: Path) -> None:
    held = read_plan_facts(folder / "p")
    for name in ("p2", "small", f"{folder / 'small'}/"):
        new = next_plan(folder / name, held)
        assert new.fingerprint == read_plan_facts(folder / "p2").fingerprint != held.fingerprint
    assert next_plan(folder / "p", held).fingerprint == held.fingerprint
    # A plan without a delta may follow any.
    assert next_plan(folder / "p", read_plan_facts(folder / "p3")).fingerprint == held.fingerprint


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    held = read_plan_facts(folder / "p")
    after = read_plan_facts(folder / "p2")
    with pytest.raises(InputError, match=f"starts from plan {after.fingerprint}, the server holds {held.fingerprint}"):
        next_plan(folder / "p3", held)
    with pytest.raises(InputError, match="on 4 ranks, the server holds 3 layers of 8 experts on 2 ranks"):
        next_plan(folder / "other", held)
    with pytest.raises(InputError, match="is not a plan"):
        next_plan(folder / "source", held)
    shutil.copytree(folder / "p2", tmp_path / "p2")
    delta = json.loads((tmp_path / "p2" / "delta.json").read_text())
    delta["layers"][0]["moves"].clear()
    (tmp_path / "p2" / "delta.json").write_text(json.dumps(delta))
    with pytest.raises(InputError, match="leads to plan"):
        next_plan(tmp_path / "p2", held)
    delta["layers"][0]["layer"] = 7
    (tmp_path / "p2" / "delta.json").write_text(json.dumps(delta))
    with pytest.raises(InputError, match="a layer or slot beyond"):
        next_plan(tmp_path / "p2", held)
