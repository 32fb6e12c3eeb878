"""Reshard on keys and bytes: every suffix of an expert moves, what is no expert stays, and back
again."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoint_factory import CONFIG, make_plan, random_orders, read_tensors, write_checkpoint
from checkpoint_specs import DENSE, FUSED, PER_EXPERT, D, E, F, assert_same_files, fused_model, per_expert_model, rows

from semmoe.profiles.errors import InputError
from semmoe.profiles.safetensors_file import INDEX_NAME
from semmoe.runtime.reshard.records import ReshardOptions
from semmoe.runtime.reshard.reshard import reshard_checkpoint
from semmoe.runtime.reshard.source import open_checkpoint
from semmoe.runtime.reshard.undo import undo_reshard


def check_relabelled(source: Path, out: Path, orders: np.ndarray) -> None:
    """Every tensor of `out` is what new2old `orders` [L, E] says, told from the definition
    alone."""
    before, after = read_tensors(source), read_tensors(out)
    assert set(before) == set(after)
    for name, (dtype, shape, data) in after.items():
        parts = name.split(".")
        layer = int(parts[2]) if name.startswith("model.layers.") else -1
        if ".experts." in name and parts[5].isdigit():
            parts[5] = str(orders[layer][int(parts[5])])
            assert (dtype, shape, data) == before[".".join(parts)], name
        elif layer >= 0 and shape[:1] == (E,) and "shared" not in name and "self_attn" not in name:
            old = rows(before[name][2], E)
            assert rows(data, E) == [old[i] for i in orders[layer]], name
            assert (dtype, shape) == before[name][:2]
        else:
            assert (dtype, shape, data) == before[name], name


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", PER_EXPERT)
def test_every_suffix_of_an_expert_moves(kind: str, shards: int, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", per_expert_model(kind), shards=shards)
    orders = random_orders(2)
    reshard_checkpoint(source, make_plan(orders.reshape(2, 2, 4)), tmp_path / "out")
    check_relabelled(source, tmp_path / "out", orders)
    undo_reshard(tmp_path / "out", tmp_path / "back")
    assert_same_files(source, tmp_path / "back")


@pytest.mark.parametrize("kind", FUSED)
def test_fused_tensors_are_gathered(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "source", fused_model(kind))
    orders = random_orders(2, seed=3)
    plan = make_plan(orders.reshape(2, 4, 2))
    reshard_checkpoint(source, plan, tmp_path / "out")
    check_relabelled(source, tmp_path / "out", orders)
    monkeypatch.setattr(
        "semmoe.runtime.reshard.relabel.EDIT_BYTES", 0
    )  # the way of large tensors: expert by expert by the kernel
    reshard_checkpoint(source, plan, tmp_path / "slabs")
    assert read_tensors(tmp_path / "out") == read_tensors(tmp_path / "slabs")
    undo_reshard(tmp_path / "slabs", tmp_path / "back")
    assert_same_files(source, tmp_path / "back")


def test_everything_else_is_carried_over_and_the_sidecar_tells(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", per_expert_model(), shards=2)
    (source / "original").mkdir()
    (source / "original" / "consolidated.pth").write_bytes(b"weights in another format")
    orders = random_orders(2)
    plan = make_plan(orders.reshape(2, 2, 4))
    result = reshard_checkpoint(source, plan, tmp_path / "out", ReshardOptions(made_by="semmoe reshard"))
    for name in ("config.json", "tokenizer_config.json", "modeling_custom.py"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert result.left_out == ("original/consolidated.pth",)
    facts = json.loads((tmp_path / "out" / "semmoe.json").read_text())
    assert facts["plan"]["fingerprint"] == plan.fingerprint and facts["made_by"] == "semmoe reshard"
    assert facts["new2old"] == {"0": orders[0].tolist(), "1": orders[1].tolist()}
    index = json.loads((tmp_path / "out" / INDEX_NAME).read_text())["weight_map"]
    old = json.loads((source / INDEX_NAME).read_text())["weight_map"]
    key = "model.layers.1.mlp.experts.{}.up_proj.weight"
    assert all(index[key.format(new)] == old[key.format(orders[1][new])] for new in range(E))


def test_runs_of_one_plan_give_the_same_bytes(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", per_expert_model(), shards=3)
    plan = make_plan(random_orders(2).reshape(2, 2, 4))
    reshard_checkpoint(source, plan, tmp_path / "a")
    reshard_checkpoint(source, plan, tmp_path / "b")
    assert_same_files(tmp_path / "a", tmp_path / "b")


def test_a_header_that_grows_keeps_the_place_of_the_data_in_its_page(tmp_path: Path) -> None:
    # Each file holds one expert of twelve; renaming expert 1 to 11 makes its header longer.
    config = CONFIG | {"num_experts": 12, "num_hidden_layers": 1}
    specs = {"model.layers.0.mlp.gate.weight": ("BF16", (12, D))}
    specs |= {f"model.layers.0.mlp.experts.{e}.up_proj.weight": ("BF16", (F, D)) for e in range(12)}
    source = write_checkpoint(tmp_path / "source", specs, config=config, shards=13)
    order = np.roll(np.arange(12), 5)
    plan = make_plan(order.reshape(1, 2, 6), layers=(0,), num_experts=12, num_model_layers=1)
    reshard_checkpoint(source, plan, tmp_path / "out")
    before = {s.name: s.header_bytes for s in open_checkpoint(source).shards}
    after = {s.name: s.header_bytes for s in open_checkpoint(tmp_path / "out").shards}
    assert all((after[name] - before[name]) % 4096 == 0 for name in before)
    undo_reshard(tmp_path / "out", tmp_path / "back")
    assert_same_files(source, tmp_path / "back")


def test_mtp_layers_and_towers_stay(tmp_path: Path) -> None:
    moe = {k.removeprefix("model.layers.0."): v for k, v in per_expert_model(layers=1).items() if ".layers.0.mlp" in k}
    side = {
        f"{stack}{name}": spec
        for stack in (
            "model.layers.2.",
            "mtp.layers.0.",
            "mtp.0.",
            "vision_encoder.blocks.0.",
            "talker.model.layers.0.",
        )
        for name, spec in moe.items()
    }
    source = write_checkpoint(tmp_path / "source", per_expert_model() | side)
    orders = random_orders(2)
    reshard_checkpoint(source, make_plan(orders.reshape(2, 2, 4)), tmp_path / "out")
    before, after = read_tensors(source), read_tensors(tmp_path / "out")
    assert all(before[name] == after[name] for name in side)
    main = "model.layers.0.mlp.gate.weight"
    assert before[main] != after[main]


def test_settings_that_name_experts_follow_them(tmp_path: Path) -> None:
    """An unquantised expert in the list of a quantised model: after renaming, the list must name
    it as it is called now."""
    names = ["lm_head", "model.layers.0.mlp.experts.3", "model.layers.1.mlp.experts.5.down_proj", "re:.*mlp.gate$"]
    names += [
        "model.layers.0.mlp.shared_experts.up_proj",
        "talker.model.layers.0.mlp.experts.3",
        "model.layers.9.mlp.experts.3",
    ]
    source = write_checkpoint(tmp_path / "source", per_expert_model(), config=CONFIG | {"ignore": names})
    orders = random_orders(2)
    reshard_checkpoint(source, make_plan(orders.reshape(2, 2, 4)), tmp_path / "out")
    new = [list(order).index(old) for order, old in zip(orders, (3, 5), strict=True)]
    assert new != [3, 5]
    expected = [f"model.layers.0.mlp.experts.{new[0]}", f"model.layers.1.mlp.experts.{new[1]}.down_proj"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["ignore"] == [names[0], *expected, *names[3:]]
    undo_reshard(tmp_path / "out", tmp_path / "back")
    assert_same_files(source, tmp_path / "back")


def test_hash_tables_get_new_values(tmp_path: Path) -> None:
    config = CONFIG | {"model_type": "deepseek_v4", "n_routed_experts": E, "mlp_layer_types": ["hash_moe", "moe"]}
    specs = {"embed.weight": ("BF16", (32, D)), "layers.0.ffn.gate.tid2eid": ("I64", (32, 2))}
    for layer in (0, 1):
        specs[f"layers.{layer}.ffn.gate.weight"] = ("BF16", (E, D))
        specs |= {f"layers.{layer}.ffn.experts.{e}.w{i}.weight": ("BF16", (F, D)) for e in range(E) for i in (1, 2, 3)}
    specs |= {"layers.1.ffn.gate.bias": ("F32", (E,)), "mtp.0.ffn.gate.bias": ("F32", (E,))}
    source = write_checkpoint(tmp_path / "source", specs, config=config)
    orders = random_orders(2)
    reshard_checkpoint(source, make_plan(orders.reshape(2, 2, 4), model_type="deepseek_v4"), tmp_path / "out")
    before, after = read_tensors(source), read_tensors(tmp_path / "out")
    old = np.frombuffer(before["layers.0.ffn.gate.tid2eid"][2], "<i8")
    new = np.frombuffer(after["layers.0.ffn.gate.tid2eid"][2], "<i8")
    assert (orders[0][new] == old).all() and (new != old).any()
    bias = [np.frombuffer(t["layers.1.ffn.gate.bias"][2], "<f4").view("<u4") for t in (before, after)]
    assert (bias[1] == bias[0][orders[1]]).all()
    assert before["mtp.0.ffn.gate.bias"] == after["mtp.0.ffn.gate.bias"]


def test_link_shares_only_files_that_do_not_change(tmp_path: Path) -> None:
    specs = per_expert_model()
    source = write_checkpoint(tmp_path / "source", {k: v for k, v in specs.items() if k not in DENSE})
    shutil.move(source / "model.safetensors", tmp_path / "experts.safetensors")
    shutil.rmtree(source)
    source = write_checkpoint(tmp_path / "source", DENSE)
    shutil.move(tmp_path / "experts.safetensors", source / "experts.safetensors")
    weight_map = {t.name: s.name for s in open_checkpoint(source).shards for t in s.tensors}
    (source / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    orders = random_orders(2)
    result = reshard_checkpoint(source, make_plan(orders.reshape(2, 2, 4)), tmp_path / "out", ReshardOptions(link=True))
    check_relabelled(source, tmp_path / "out", orders)
    assert os.path.samefile(source / "model.safetensors", tmp_path / "out" / "model.safetensors")
    assert not os.path.samefile(source / "experts.safetensors", tmp_path / "out" / "experts.safetensors")
    assert result.bytes_linked == (source / "model.safetensors").stat().st_size
    undo_reshard(tmp_path / "out", tmp_path / "back")
    assert read_tensors(tmp_path / "back") == read_tensors(source)


def test_checkpoints_of_the_hub_cache_are_links_to_blobs(tmp_path: Path) -> None:
    (tmp_path / "models--a--b").mkdir()
    written = write_checkpoint(tmp_path / "models--a--b" / "blobs", per_expert_model())
    source = tmp_path / "models--a--b" / "snapshots" / "main"
    source.mkdir(parents=True)
    blob, small = "ab" * 32, "cd" * 20
    (written / "model.safetensors").rename(written / blob)
    (written / "config.json").rename(written / small)
    (source / "model.safetensors").symlink_to(f"../../blobs/{blob}")
    (source / "config.json").symlink_to(f"../../blobs/{small}")
    orders = random_orders(2)
    reshard_checkpoint(source, make_plan(orders.reshape(2, 2, 4)), tmp_path / "out")
    check_relabelled(source, tmp_path / "out", orders)
    assert not (tmp_path / "out" / "config.json").is_symlink()
    facts = json.loads((tmp_path / "out" / "semmoe.json").read_text())
    assert facts["files"]["model.safetensors"]["source_sha256"] == blob


def test_copies_where_the_kernel_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "source", fused_model())
    plan = make_plan(random_orders(2).reshape(2, 2, 4))
    reshard_checkpoint(source, plan, tmp_path / "kernel")
    monkeypatch.setattr("semmoe.runtime.reshard.copy.KERNEL_COPY", False)
    monkeypatch.setattr("semmoe.runtime.reshard.relabel.EDIT_BYTES", 0)
    reshard_checkpoint(source, plan, tmp_path / "buffer")
    assert read_tensors(tmp_path / "kernel") == read_tensors(tmp_path / "buffer")


def test_undo_refuses_a_reshard_that_was_changed(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", per_expert_model())
    reshard_checkpoint(source, make_plan(random_orders(2).reshape(2, 2, 4)), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match="was changed after it was written"):
        undo_reshard(tmp_path / "out", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_verify_finds_a_byte_that_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that loses a bit: what was written is read again, so nothing appears."""
    import semmoe.runtime.reshard.copy as checkpoint_copy

    source = write_checkpoint(tmp_path / "source", per_expert_model())
    plan = make_plan(random_orders(2).reshape(2, 2, 4))
    copy_range = checkpoint_copy.copy_range

    def losing_copy(inputs: int, output: int, piece: checkpoint_copy.Piece) -> None:
        copy_range(inputs, output, piece)
        place = piece.offset + piece.num_bytes // 2
        os.pwrite(output, bytes([os.pread(output, 1, place)[0] ^ 1]), place)

    monkeypatch.setattr(checkpoint_copy, "copy_range", losing_copy)
    with pytest.raises(InputError, match="differs from its source"):
        reshard_checkpoint(source, plan, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    reshard_checkpoint(source, plan, tmp_path / "out", ReshardOptions(verify="none"))
    with pytest.raises(AssertionError):
        check_relabelled(source, tmp_path / "out", random_orders(2))


def test_verify_finds_a_name_that_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two experts swapped in the header only: every byte was copied well, and still nothing
    appears."""
    import semmoe.runtime.reshard.copy as checkpoint_copy

    source = write_checkpoint(tmp_path / "source", per_expert_model())
    create_file = checkpoint_copy.create_file

    def mixed_up(target: Path, header: bytes, size: int) -> None:
        first, second, other = b"layers.0.mlp.experts.1.up", b"layers.0.mlp.experts.2.up", b"layers.0.mlp.experts.?.up"
        create_file(target, header.replace(first, other).replace(second, first).replace(other, second), size)

    monkeypatch.setattr(checkpoint_copy, "create_file", mixed_up)
    with pytest.raises(InputError, match="not written as its header says"):
        reshard_checkpoint(source, make_plan(random_orders(2).reshape(2, 2, 4)), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_the_checksum_tells_bytes_and_their_order() -> None:
    from semmoe.runtime.reshard.copy import BUFFER_BYTES, add_block

    draw = np.random.default_rng(0)
    data = draw.integers(0, 256, 2 * BUFFER_BYTES + 13, dtype=np.uint8).tobytes()

    def checksum(some: bytes) -> int:
        total = 0
        for start in range(0, len(some), BUFFER_BYTES):
            total = add_block(total, memoryview(some)[start : start + BUFFER_BYTES])
        return total

    known = checksum(data)
    assert known == checksum(bytes(data)) and 0 <= known < 2**64
    for place in (0, 7, 8, BUFFER_BYTES - 1, BUFFER_BYTES, len(data) - 1):
        assert checksum(data[:place] + bytes([data[place] ^ 128]) + data[place + 1 :]) != known
    half = BUFFER_BYTES
    assert checksum(data[half : 2 * half] + data[:half] + data[2 * half :]) != known
    assert checksum(data[8:16] + data[:8] + data[16:]) != known
