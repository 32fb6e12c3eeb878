"""Whatever stands beside an expert moves with it or is refused, by its axis and not by its name;
what has no axis of experts stays."""

from pathlib import Path

import numpy as np
import pytest
from checkpoint_factory import CONFIG, make_plan, random_orders, read_tensors, write_checkpoint
from checkpoint_specs import DENSE, D, E, F, assert_same_files, fused_model, per_expert_model, rows

from semmoe.profiles.errors import InputError
from semmoe.runtime.reshard.records import ReshardOptions
from semmoe.runtime.reshard.reshard import reshard_checkpoint
from semmoe.runtime.reshard.undo import undo_reshard

ORDERS = random_orders(2)
PLAN = make_plan(ORDERS.reshape(2, 2, 4))
WIDE = CONFIG | {"hidden_size": 2 * D}
STACKED = {  # Step 3: a stack per projection, ModelOpt's numbers beside it
    "weight": ("U8", (E, F, D // 2)),
    "weight_scale": ("F8_E4M3", (E, F, 1)),
    "weight_scale_2": ("F32", (E,)),
    "input_scale": ("F32", (E,)),
    "alpha": ("F32", (E, 1)),
    "bias": ("BF16", (E, F)),
    "weight_quantizer._amax": ("F32", (E, 1, 1)),
}


def stacked_model(block: str, router: str) -> dict:
    specs = dict(DENSE)
    for layer in (0, 1):
        base = f"model.layers.{layer}."
        specs[f"{base}{router}.weight"] = ("BF16", (E, D))
        projections = ("gate_proj", "up_proj", "down_proj") if block == "moe" else ("input_linear", "output_linear")
        specs |= {f"{base}{block}.{p}.{suffix}": spec for p in projections for suffix, spec in STACKED.items()}
    return specs


@pytest.mark.parametrize("layout", ["permuted", "ranks"])
@pytest.mark.parametrize(
    ("block", "router"),
    [("moe", "moe.gate"), ("block_sparse_moe", "block_sparse_moe.router.layer"), ("mlp", "mlp.router.layer")],
)
def test_every_companion_of_a_stack_moves(block: str, router: str, layout: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", stacked_model(block, router))
    reshard_checkpoint(source, PLAN, tmp_path / "out", ReshardOptions(layout=layout))
    before = read_tensors(source)
    places = (
        [("", ORDERS)] if layout == "permuted" else [(f"rank-{r:03d}", ORDERS.reshape(2, 2, 4)[:, r]) for r in (0, 1)]
    )
    for folder, slots_LS in places:
        after = read_tensors(tmp_path / "out" / folder)
        moved = {
            n: t for n, t in after.items() if n.startswith("model.layers.") and f".{block}." in n and "gate." not in n
        }
        moved = {name: tensor for name, tensor in moved.items() if ".router." not in name and "shared" not in name}
        assert len(moved) == sum(
            f".{block}." in n and "_proj" in n or "_linear" in n for n in before if "shared" not in n
        )
        for name, (_, shape, data) in moved.items():
            old, slots_S = rows(before[name][2], E), slots_LS[int(name.split(".")[2])]
            assert rows(data, len(slots_S)) == [old[expert] for expert in slots_S], name
            assert shape == (len(slots_S), *before[name][1][1:])
    undo_reshard(tmp_path / "out", tmp_path / "back")
    assert_same_files(source, tmp_path / "back")


@pytest.mark.parametrize("layout", ["permuted", "ranks"])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("moe.gate_proj.mystery", (E,)),
        ("moe.gate_proj.mystery", (E * 4,)),  # blocks of rows
        ("moe.up_proj_extra", (E, 3, 2)),
        ("moe.down_proj.g_idx", (E * 2, 3)),
        ("moe.w1_scale", (E,)),
        ("moe.anything.at_all", (E, 1)),
        ("moe.gate_proj.weight_scale_2", (E + 1,)),
        ("moe.experts_scale", (1, E)),
        ("moe.expert_rows.weight", (E * 4, D)),
        ("moe.experts_up_proj.weight", (E * D, D)),
        ("moe.routed_expert_norm.weight", (E, D)),
        ("moe.routed_expert_up_proj.weight", (E, F, D)),
        ("moe.experts.up_proj_extra", (E * 2,)),
        ("moe.experts.gate_proj.3.input_scale", ()),
        ("moe.expert_3.scale", ()),
        ("experts_temperature", (E,)),
    ],
)
def test_companions_of_unknown_names_are_refused(name: str, shape: tuple, layout: str, tmp_path: Path) -> None:
    key = f"model.layers.1.{name}"
    source = write_checkpoint(
        tmp_path / "source", stacked_model("moe", "moe.gate") | {key: ("F32", shape)}, config=WIDE
    )
    with pytest.raises(InputError, match=key.replace(".", r"\.")):
        reshard_checkpoint(source, PLAN, tmp_path / "out", ReshardOptions(layout=layout))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["mlp.up_proj_scale", "mlp.w2_alpha", "mlp.calibration.amax"])
def test_companions_of_single_experts_are_refused(name: str, tmp_path: Path) -> None:
    for number, model in enumerate((per_expert_model(), fused_model())):
        specs = model | {f"model.layers.0.{name}": ("F32", (E,))}
        source = write_checkpoint(tmp_path / f"source{number}", specs)
        with pytest.raises(InputError, match=name):
            reshard_checkpoint(source, PLAN, tmp_path / "out")


@pytest.mark.parametrize("layout", ["permuted", "ranks"])
def test_what_surrounds_the_experts_stays(layout: str, tmp_path: Path) -> None:
    around = {
        "routed_expert_down_proj.weight": ("BF16", (D, 2 * D)),  # D is two rows an expert
        "routed_expert_norm.weight": ("BF16", (D,)),
        "routed_expert_up_proj.weight": ("BF16", (2 * D, D)),
        "routed_expert_up_proj.weight_scale": ("BF16", (2 * D, 1)),
        "routed_experts_latent_proj.bias": ("BF16", (D,)),
        "expert_layernorm.weight": ("BF16", (2 * D,)),
        "experts.norm.weight": ("BF16", (D,)),
        "experts.temperature": ("F32", ()),
        "expert_offset": ("F32", (3,)),
        "fc1_latent_proj.weight": ("BF16", (E, D)),
        "shared_expert.gate.weight": ("BF16", (E, D)),
    }
    specs = per_expert_model() | {f"model.layers.{layer}.mlp.{k}": v for layer in (0, 1) for k, v in around.items()}
    specs |= {"model.layers.0.self_attn.q_norm.weight": ("BF16", (E,)), "model.experts_seen": ("I64", ())}
    source = write_checkpoint(tmp_path / "source", specs, config=WIDE)
    reshard_checkpoint(source, PLAN, tmp_path / "out", ReshardOptions(layout=layout))
    before, after = read_tensors(source), read_tensors(tmp_path / "out" / ("shared" if layout == "ranks" else ""))
    assert all(after[name] == value for name, value in before.items() if name.split("mlp.")[-1] in around)
    gate = "model.layers.0.mlp.gate.weight"
    assert (after[gate] == before[gate]) == (layout == "ranks")
    undo_reshard(tmp_path / "out", tmp_path / "back")
    assert_same_files(source, tmp_path / "back")
    assert np.any(ORDERS != np.arange(E))
