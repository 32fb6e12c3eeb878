"""reshard --from-plan: byte for byte what a reshard of the original for the new plan is, but only
files in which something moves are written; and --undo gives back the original."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoint_factory import CONFIG, make_plan, random_orders, write_checkpoint
from checkpoint_specs import FUSED, PER_EXPERT, assert_same_files, fused_model, per_expert_model
from command_line import run
from typer.testing import CliRunner

from semmoe.main import app
from semmoe.profiles.errors import InputError
from semmoe.runtime.reshard.records import ReshardOptions
from semmoe.runtime.reshard.replan import keep
from semmoe.runtime.reshard.replan.replan import replan_reshard
from semmoe.runtime.reshard.reshard import reshard_checkpoint
from semmoe.runtime.reshard.undo import undo_reshard

OLD = random_orders(2).reshape(2, 2, 4)
MODELS = {f"{kind}-one": (per_expert_model(kind), 3) for kind in PER_EXPERT} | {
    f"{kind}-fused": (fused_model(kind), 2) for kind in FUSED
}


def moved(old_LRS: np.ndarray) -> np.ndarray:
    """Two experts of the first layer change places."""
    new_LRS = old_LRS.copy()
    new_LRS[0, 0, 1], new_LRS[0, 1, 2] = old_LRS[0, 1, 2], old_LRS[0, 0, 1]
    return new_LRS


def both(
    tmp_path: Path, layout: str, specs: dict, shards: int, *, old: np.ndarray = OLD, verify: str = "bytes"
) -> Path:
    """`placed`, then `out` from it, and `direct` from the original."""
    source, plans = write_checkpoint(tmp_path / "source", specs, shards=shards), [make_plan(old), make_plan(moved(old))]
    options = ReshardOptions(layout=layout, verify=verify)
    reshard_checkpoint(source, plans[0], tmp_path / "placed", options)
    reshard_checkpoint(source, plans[1], tmp_path / "direct", options)
    replan_reshard(tmp_path / "placed", *plans, tmp_path / "out", ReshardOptions(verify=verify))
    return source


@pytest.mark.parametrize("linked", [True, False])
@pytest.mark.parametrize("layout", ["permuted", "ranks"])
@pytest.mark.parametrize("case", MODELS)
def test_it_is_what_a_reshard_of_the_original_is(
    case: str, layout: str, linked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not linked:  # as on another file system
        monkeypatch.setattr(keep.os, "link", _refuse)
    source = both(tmp_path, layout, *MODELS[case])
    assert_same_files(tmp_path / "direct", tmp_path / "out")
    undo_reshard(tmp_path / "out", tmp_path / "back")
    assert_same_files(source, tmp_path / "back")


def _refuse(*_: object) -> None:
    raise OSError(18, "Invalid cross-device link")


@pytest.mark.parametrize("layout", ["permuted", "ranks"])
def test_files_without_a_move_are_the_same_file(layout: str, tmp_path: Path) -> None:
    both(tmp_path, layout, per_expert_model(), 30)
    files = [path.relative_to(tmp_path / "placed") for path in (tmp_path / "placed").rglob("*.safetensors")]
    files = [name for name in files if (tmp_path / "out" / name).exists()]
    same = [os.path.samefile(tmp_path / "placed" / name, tmp_path / "out" / name) for name in files]
    assert any(same) and not all(same)
    for name, linked in zip(files, same, strict=True):
        equal = (tmp_path / "placed" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
        assert linked == equal, f"{name}: written anew where nothing changed, or the other way"


def test_copies_are_read_from_any_rank_that_has_them(tmp_path: Path) -> None:
    old = np.asarray([[[7, 1, 2, 3, 0], [4, 5, 6, 0, 1]], [[0, 1, 2, 3, 4], [7, 6, 5, 4, 3]]])
    new = old.copy()
    new[0, 0] = [7, 4, 2, 3, 0]  # a copy of 1 is dropped, one of 4 comes
    source = write_checkpoint(tmp_path / "source", fused_model())
    plans, options = [make_plan(old), make_plan(new)], ReshardOptions(layout="ranks")
    for name, plan in zip(("placed", "direct"), plans, strict=True):
        reshard_checkpoint(source, plan, tmp_path / name, options)
    result = replan_reshard(tmp_path / "placed", *plans, tmp_path / "out")
    assert result.experts_moved == 1 and result.layout == "ranks"
    assert_same_files(tmp_path / "direct", tmp_path / "out")


def test_settings_that_name_experts_follow(tmp_path: Path) -> None:
    config = CONFIG | {"quantization_config": {"ignore": ["re:.*layers\\.0\\.mlp\\.experts\\.[35]\\..*"]}}
    source = write_checkpoint(tmp_path / "source", per_expert_model(), config=config)
    plans = [make_plan(OLD), make_plan(moved(OLD))]
    reshard_checkpoint(source, plans[0], tmp_path / "placed")
    reshard_checkpoint(source, plans[1], tmp_path / "direct")
    replan_reshard(tmp_path / "placed", *plans, tmp_path / "out")
    assert_same_files(tmp_path / "direct", tmp_path / "out")
    undo_reshard(tmp_path / "out", tmp_path / "back")
    assert_same_files(source, tmp_path / "back")


def test_a_reshard_of_another_plan_or_one_that_was_changed_is_refused(tmp_path: Path) -> None:
    both(tmp_path, "permuted", per_expert_model(), 2)
    old, new = make_plan(OLD), make_plan(moved(OLD))
    with pytest.raises(InputError, match="placed was resharded for plan .*, --from-plan is"):
        replan_reshard(tmp_path / "placed", new, old, tmp_path / "not")
    shutil.copytree(tmp_path / "placed", tmp_path / "changed")
    file = sorted((tmp_path / "changed").glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with pytest.raises(InputError, match="was changed after it was written"):
        replan_reshard(tmp_path / "changed", old, new, tmp_path / "not")
    with pytest.raises(InputError, match="use --verify bytes"):
        replan_reshard(tmp_path / "placed", old, new, tmp_path / "not", ReshardOptions(verify="logits"))
    with pytest.raises(InputError, match=r"semmoe\.json"):
        replan_reshard(tmp_path / "source", old, new, tmp_path / "not")
    assert not (tmp_path / "not").exists()


def test_at_the_command_line(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", per_expert_model(), shards=30)
    for name, experts_LRS in (("p", OLD), ("n", moved(OLD))):
        make_plan(experts_LRS).save(tmp_path / name)
    run("reshard", source, tmp_path / "p", "-o", tmp_path / "placed")
    words = ["reshard", tmp_path / "placed", tmp_path / "n", "--from-plan", tmp_path / "p", "-o", tmp_path / "out"]
    told = json.loads(run(*words, "--json"))
    assert told["experts_moved"] == 2 and told["bytes_linked"] > 0 < told["bytes_written"]
    run("reshard", "--undo", tmp_path / "out", "-o", tmp_path / "back")
    assert_same_files(source, tmp_path / "back")
    for more in (["--layout", "ranks"], ["--link"]):
        assert CliRunner().invoke(app, [*map(str, words), *more]).exit_code == 2
