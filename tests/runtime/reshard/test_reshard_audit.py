"""The second look of --verify bytes names what the classifier left and could be an expert's, though
the classifier be wrong; ordinary models are left in peace."""

from pathlib import Path

import pytest
from checkpoint_factory import CONFIG, make_plan, random_orders, write_checkpoint
from checkpoint_specs import FUSED, PER_EXPERT, D, E, F, fused_model, per_expert_model

from semmoe.runtime.reshard import complete, keys
from semmoe.runtime.reshard.records import ReshardOptions
from semmoe.runtime.reshard.reshard import reshard_checkpoint

PLAN = make_plan(random_orders(2).reshape(2, 2, 4))


def notes_of(tmp_path: Path, specs: dict, **options) -> tuple[str, ...]:
    number = len(list(tmp_path.iterdir()))
    source = write_checkpoint(tmp_path / f"source{number}", specs, config=CONFIG | {"hidden_size": 4 * D})
    return reshard_checkpoint(source, PLAN, tmp_path / f"out{number}", ReshardOptions(**options)).notes


@pytest.mark.parametrize("layout", ["permuted", "ranks"])
def test_ordinary_models_are_left_in_peace(layout: str, tmp_path: Path) -> None:
    extra = {
        "model.layers.0.self_attn.q_norm.weight": ("BF16", (E,)),
        "model.layers.0.input_layernorm.weight": ("BF16", (D,)),
        "model.layers.2.mlp.gate.weight": ("BF16", (E, D)),  # MTP
        "model.layers.2.mlp.experts.0.up_proj.weight": ("BF16", (F, D)),
        "model.layers.0.mlp.pre_expert_norm.weight": ("BF16", (D,)),
        "model.norm.weight": ("BF16", (E,)),
    }
    for kind in PER_EXPERT:
        assert notes_of(tmp_path, per_expert_model(kind) | extra, layout=layout) == ()
    for kind in FUSED:
        assert notes_of(tmp_path, fused_model(kind) | extra, layout=layout) == ()


@pytest.mark.parametrize("layout", ["permuted", "ranks"])
def test_what_is_left_and_could_be_an_experts_is_named(layout: str, tmp_path: Path) -> None:
    extra = {
        "mystery": ("F32", (E,)),
        "mlp.tail": ("F32", (3, E)),
        "mlp.calibration": ("F32", (4 * E, 2)),
        "mlp.routed_expert_up_proj.weight": ("BF16", (3 * D, D)),
        "expert_offset": ("F32", (3,)),
    }
    specs = per_expert_model() | {f"model.layers.{layer}.{k}": v for layer in (0, 1) for k, v in extra.items()}
    notes = notes_of(tmp_path, specs, layout=layout)
    assert len(notes) == len(extra)
    for name, (_, shape) in extra.items():
        assert any(f"left as it is: model.layers.*.{name} {list(shape)} (2 tensors): " in note for note in notes)
    assert notes_of(tmp_path, specs, layout=layout, verify="none") == ()


@pytest.mark.parametrize("layout", ["permuted", "ranks"])
def test_it_sees_what_a_wrong_classifier_leaves(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scales of stacked experts taken for dense tensors, as an earlier version did."""
    right = keys.classify_one

    def wrong(tensor, *rest):
        return keys.KEEP if len(tensor.shape) == 1 and "gate_proj" in tensor.name else right(tensor, *rest)

    monkeypatch.setattr(complete, "classify_one", wrong)
    specs = {k: v for k, v in per_expert_model().items() if ".experts." not in k and ".mlp.gate" not in k}
    for layer in (0, 1):
        base = f"model.layers.{layer}.moe."
        specs[f"{base}gate.weight"] = ("BF16", (E, D))
        for projection in ("gate_proj", "up_proj", "down_proj"):
            specs[f"{base}{projection}.weight"] = ("U8", (E, F, D))
            specs[f"{base}{projection}.weight_scale_2"] = ("F32", (E,))
    monkeypatch.setattr("semmoe.runtime.reshard.permuted.check_written", lambda *_: None)
    (note,) = notes_of(tmp_path, specs, layout=layout)
    assert note.startswith("left as it is: model.layers.*.moe.gate_proj.weight_scale_2 [8] (2 tensors): an axis")
