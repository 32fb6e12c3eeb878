"""Where tensors of one name lie in several files, the index decides; without one it is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoint_factory import make_plan, random_orders, write_checkpoint, write_shard
from checkpoint_specs import D, E, F, assert_same_files, fused_model, per_expert_model, rows

from semmoe.profiles.errors import InputError
from semmoe.profiles.safetensors_file import INDEX_NAME, read_shard
from semmoe.runtime.reshard.records import ReshardOptions
from semmoe.runtime.reshard.reshard import reshard_checkpoint
from semmoe.runtime.reshard.undo import undo_reshard

ORDERS = random_orders(2)
PLAN = make_plan(ORDERS.reshape(2, 2, 4))
OVERLAY = "model-overlay-1.safetensors"
UP = "model.layers.0.mlp.experts.{}.up_proj.weight"
GATE = "model.layers.0.mlp.gate.weight"


def read_by_index(path: Path) -> dict[str, bytes]:
    """The bytes of every tensor as a loader that follows the index finds them."""
    weight_map = json.loads((path / INDEX_NAME).read_text())["weight_map"]
    shards = {name: read_shard(path / name) for name in set(weight_map.values())}
    result = {}
    for name, file in weight_map.items():
        shard = shards[file]
        tensor = shard.find(name)
        begin = shard.header_bytes + tensor.begin
        result[name] = shard.path.read_bytes()[begin : begin + tensor.num_bytes]
    return result


def overlaid(path: Path, specs: dict, replaced: dict, *, select: bool) -> Path:
    """A checkpoint with one more file, whose tensors the index selects or not."""
    source = write_checkpoint(path, specs, shards=2)
    write_shard(source / OVERLAY, replaced, np.random.default_rng(9))
    if select:
        index = json.loads((source / INDEX_NAME).read_text())
        index["weight_map"] |= dict.fromkeys(replaced, OVERLAY)
        (source / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    return source


STALE_NAMES = {UP.format(2): ("F32", (3, 3)), GATE: ("BF16", (E, D)), "model.embed_tokens.weight": ("BF16", (32, D))}


@pytest.mark.parametrize("select", [True, False])
@pytest.mark.parametrize("layout", ["permuted", "ranks"])
def test_the_index_decides(select: bool, layout: str, tmp_path: Path) -> None:
    extra = {
        "model.layers.0.mlp.experts.40.up_proj.weight": ("BF16", (F, D)),  # of a model before it was pruned
        "model.layers.0.mlp.experts.mystery": ("BF16", (E,)),
    }
    stale = STALE_NAMES | ({} if select else extra)
    source = overlaid(tmp_path / "source", per_expert_model(), stale, select=select)
    result = reshard_checkpoint(source, PLAN, tmp_path / "out", ReshardOptions(layout=layout))
    notes = " ".join(result.notes)
    assert f"{INDEX_NAME} does not select" in notes and (OVERLAY in notes) != select
    before = read_by_index(source)
    if layout == "permuted":
        after = read_by_index(tmp_path / "out")
        assert set(after) == set(before)
        for new, old in enumerate(ORDERS[0]):
            assert after[UP.format(new)] == before[UP.format(old)]
        assert rows(after[GATE], E) == [rows(before[GATE], E)[old] for old in ORDERS[0]]
    else:
        after = {}
        for folder in ("shared", "rank-000", "rank-001"):
            after |= read_by_index(tmp_path / "out" / folder)
        assert after == before
    undo_reshard(tmp_path / "out", tmp_path / "back")
    assert_same_files(source, tmp_path / "back")


@pytest.mark.parametrize("layout", ["permuted", "ranks"])
def test_a_stack_in_two_files(layout: str, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.down_proj"
    source = overlaid(tmp_path / "source", fused_model(), {name: ("BF16", (E, F, D))}, select=True)
    reshard_checkpoint(source, PLAN, tmp_path / "out", ReshardOptions(layout=layout))
    old = rows(read_by_index(source)[name], E)
    for rank, folder in enumerate(("rank-000", "rank-001") if layout == "ranks" else ("",)):
        new = read_by_index(tmp_path / "out" / folder)[name]
        slots = ORDERS.reshape(2, -1, 4 if layout == "ranks" else 8)[1, rank]
        assert rows(new, len(slots)) == [old[expert] for expert in slots]
    undo_reshard(tmp_path / "out", tmp_path / "back")
    assert_same_files(source, tmp_path / "back")


def test_a_stale_stack_of_other_experts_and_files_without_index(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.down_proj"
    source = overlaid(tmp_path / "source", fused_model(), {name: ("BF16", (2 * E, F, D))}, select=False)
    with pytest.raises(InputError, match=f"{name} of .*{OVERLAY}.* cannot move with it: remove it"):
        reshard_checkpoint(source, PLAN, tmp_path / "out")
    source = overlaid(tmp_path / "other", per_expert_model(), STALE_NAMES, select=True)
    (source / INDEX_NAME).unlink()
    with pytest.raises(InputError, match=rf"is in model-0000\d-of-00002.safetensors and in {OVERLAY} of"):
        reshard_checkpoint(source, PLAN, tmp_path / "out")
