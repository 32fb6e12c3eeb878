"""Layout "ranks": each rank has its experts and no others, the rest is stored once, and the
source comes back."""

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoint_factory import CONFIG, make_plan, random_orders, read_tensors, write_checkpoint, write_shard
from checkpoint_specs import DENSE, FUSED, PER_EXPERT, E, assert_same_files, fused_model, per_expert_model, rows

from semmoe.profiles.errors import InputError
from semmoe.runtime.reshard.records import ReshardOptions
from semmoe.runtime.reshard.reshard import reshard_checkpoint
from semmoe.runtime.reshard.undo import undo_reshard

WITH_REPLICAS = np.asarray([[[7, 1, 2, 3, 0], [4, 5, 6, 0, 1]], [[0, 1, 2, 3, 4], [7, 6, 5, 4, 3]]])


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("replicas", [False, True])
@pytest.mark.parametrize("kind", ["fp8", "gptq", "nvfp4"])
def test_per_expert_tensors(kind: str, replicas: bool, shards: int, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", per_expert_model(kind), shards=shards)
    experts_LRS = WITH_REPLICAS if replicas else random_orders(2).reshape(2, 2, 4)
    result = reshard_checkpoint(source, make_plan(experts_LRS), tmp_path / "out", ReshardOptions(layout="ranks"))
    before, shared = read_tensors(source), read_tensors(tmp_path / "out" / "shared")
    assert shared == {name: value for name, value in before.items() if ".experts." not in name}
    for rank in (0, 1):
        hosted = {(layer, int(e)) for layer in (0, 1) for e in experts_LRS[layer, rank]}
        mine = read_tensors(tmp_path / "out" / f"rank-{rank:03d}")
        assert mine == {n: v for n, v in before.items() if ".experts." in n and place(n) in hosted}
        assert len(mine) == len(hosted) * 3 * len(PER_EXPERT[kind])
    assert result.layout == "ranks" and (tmp_path / "out" / "shared" / "config.json").exists()
    undo_reshard(tmp_path / "out", tmp_path / "back")
    assert_same_files(source, tmp_path / "back")


def place(name: str) -> tuple[int, int]:
    parts = name.split(".")
    return int(parts[2]), int(parts[5])


@pytest.mark.parametrize("replicas", [False, True])
@pytest.mark.parametrize("kind", FUSED)
def test_fused_tensors_hold_the_slots_of_the_rank(kind: str, replicas: bool, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", fused_model(kind))
    experts_LRS = WITH_REPLICAS if replicas else random_orders(2).reshape(2, 2, 4)
    reshard_checkpoint(source, make_plan(experts_LRS), tmp_path / "out", ReshardOptions(layout="ranks"))
    before = read_tensors(source)
    for rank in (0, 1):
        for name, (dtype, shape, data) in read_tensors(tmp_path / "out" / f"rank-{rank:03d}").items():
            slots = experts_LRS[int(name.split(".")[2]), rank]
            whole = rows(before[name][2], E)
            assert data == b"".join(whole[e] for e in slots)
            assert (dtype, shape) == (before[name][0], (len(slots), *before[name][1][1:]))
    undo_reshard(tmp_path / "out", tmp_path / "back")
    assert_same_files(source, tmp_path / "back")


def test_one_rank_keeps_its_slot_order(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", fused_model())
    reshard_checkpoint(
        source, make_plan(random_orders(2).reshape(2, 1, 8)), tmp_path / "out", ReshardOptions(layout="ranks")
    )
    undo_reshard(tmp_path / "out", tmp_path / "back")
    assert_same_files(source, tmp_path / "back")


def test_grouped_routers_are_no_obstacle_and_the_sidecar_has_the_slots(tmp_path: Path) -> None:
    config = CONFIG | {"n_group": 4, "topk_group": 2}
    source = write_checkpoint(tmp_path / "source", per_expert_model(), config=config)
    plan = make_plan(WITH_REPLICAS)
    reshard_checkpoint(source, plan, tmp_path / "out", ReshardOptions(layout="ranks"))
    facts = json.loads((tmp_path / "out" / "semmoe.json").read_text())
    assert facts["placement"] == WITH_REPLICAS.tolist() and facts["model_layers"] == [0, 1]
    assert facts["plan"]["fingerprint"] == plan.fingerprint


def test_files_without_experts_can_be_linked(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", DENSE)
    experts = {name: spec for name, spec in per_expert_model().items() if name not in DENSE}
    write_shard(source / "experts.safetensors", experts, np.random.default_rng(5))
    reshard_checkpoint(source, make_plan(WITH_REPLICAS), tmp_path / "out", ReshardOptions(layout="ranks", link=True))
    assert (source / "model.safetensors").samefile(tmp_path / "out" / "shared" / "model.safetensors")
    undo_reshard(tmp_path / "out", tmp_path / "back")
    assert_same_files(source, tmp_path / "back")


def test_a_lost_byte_of_a_rank_is_found(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", per_expert_model())
    reshard_checkpoint(source, make_plan(WITH_REPLICAS), tmp_path / "out", ReshardOptions(layout="ranks"))
    file = tmp_path / "out" / "rank-001" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)
    with pytest.raises(InputError, match="was changed after it was written"):
        undo_reshard(tmp_path / "out", tmp_path / "back")


def test_logits_cannot_be_compared_here(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", per_expert_model())
    with pytest.raises(InputError, match="use --layout permuted"):
        reshard_checkpoint(
            source, make_plan(WITH_REPLICAS), tmp_path / "out", ReshardOptions(layout="ranks", verify="logits")
        )


@pytest.mark.parametrize("layout", ["permuted", "ranks"])
def test_a_header_in_another_order_is_told(layout: str, tmp_path: Path) -> None:
    """Its tensors come back the same; its names come back in the order of their bytes."""
    source = write_checkpoint(tmp_path / "source", per_expert_model())
    file = source / "model.safetensors"
    size = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    reversed_names = dict(reversed(json.loads(file.read_bytes()[8:size]).items()))
    text = json.dumps(reversed_names, separators=(",", ":")).encode().ljust(size - 8)
    file.write_bytes(file.read_bytes()[:8] + text + file.read_bytes()[size:])
    reshard_checkpoint(
        source, make_plan(random_orders(2).reshape(2, 2, 4)), tmp_path / "out", ReshardOptions(layout=layout)
    )
    notes = undo_reshard(tmp_path / "out", tmp_path / "back").notes
    assert notes == (
        "model.safetensors: same tensors, but the header is laid out differently from the original file's",
    )
    assert read_tensors(tmp_path / "back") == read_tensors(source)
