"""What reshard refuses, each with one line and the reason, and that nothing is left of a run
that failed or was killed."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from checkpoint_factory import CONFIG, make_plan, random_orders, write_checkpoint
from checkpoint_specs import PER_EXPERT, D, E, F, assert_same_files, fused_model, per_expert_model

from semmoe.profiles.errors import InputError
from semmoe.runtime.reshard.records import ReshardOptions
from semmoe.runtime.reshard.reshard import reshard_checkpoint
from semmoe.runtime.reshard.undo import undo_reshard


def plan_of(orders: np.ndarray, ranks: int = 2, **facts):
    return make_plan(orders.reshape(len(orders), ranks, -1), **facts)


def refuse(source: Path, plan, match: str, **options) -> None:
    """The reshard raises InputError of one line and leaves nothing."""
    before = sorted(p.name for p in source.parent.iterdir())
    with pytest.raises(InputError, match=match) as caught:
        reshard_checkpoint(source, plan, source.parent / "out", ReshardOptions(**options))
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in source.parent.iterdir()) == before


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", per_expert_model(), shards=2)


PLAN = plan_of(random_orders(2))


def test_replicas(source: Path) -> None:
    experts_LRS = np.tile(np.asarray([[0, 1, 2, 3, 4], [4, 5, 6, 7, 0]]), (2, 1, 1))
    refuse(source, make_plan(experts_LRS), "1 replica slots")


@pytest.mark.parametrize(
    ("config", "groups"),
    [
        ({"n_group": 4, "topk_group": 2}, 4),
        ({"num_expert_group": 2, "topk_group": 1}, 2),
        ({"n_group": 4, "topk_group": 2, "topk_method": "greedy"}, 4),  # read by the router of DeepSeek-V2 only
        ({"model_type": "deepseek_v2", "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"}, 4),
        ({"model_type": "deepseek_v3", "n_routed_experts": 8}, 8),  # not in the file: the default of the class
    ],
)
def test_groups(config: dict, groups: int, tmp_path: Path) -> None:
    source = write_checkpoint(
        tmp_path / "source", per_expert_model(), config=CONFIG | {"first_k_dense_replace": 0} | config
    )
    facts = {"model_type": config.get("model_type", "qwen3_moe")}
    across = np.tile(np.asarray([1, 2, 3, 4, 5, 6, 7, 0]), (2, 1))
    if groups < 8:
        refuse(source, plan_of(across, **facts), "the plan splits a group")
    whole = np.arange(8).reshape(groups, -1)[::-1].ravel()
    reshard_checkpoint(source, plan_of(np.tile(whole, (2, 1)), **facts), tmp_path / "out")


@pytest.mark.parametrize(
    "config",
    [
        {"n_group": 4, "topk_group": 4},
        {"n_group": 1, "topk_group": 1},
        {"model_type": "deepseek_v2", "n_group": 4, "topk_group": 2},
    ],
)
def test_groups_that_do_not_limit_are_no_reason(config: dict, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", per_expert_model(), config=CONFIG | config)
    plan = plan_of(np.roll(np.tile(np.arange(8), (2, 1)), 1, 1), model_type=config.get("model_type", "qwen3_moe"))
    reshard_checkpoint(source, plan, tmp_path / "out")


@pytest.mark.parametrize("model_type", ["doge", "switch_transformers", "nllb-moe"])
def test_routers_that_cannot_be_relabelled(model_type: str, tmp_path: Path) -> None:
    config = CONFIG | {"model_type": model_type, "num_layers": 2, "encoder_layers": 2, "encoder_sparse_step": 1}
    source = write_checkpoint(tmp_path / "source", per_expert_model(), config=config)
    refuse(source, PLAN, f"{model_type} cannot be resharded")


@pytest.mark.parametrize(
    ("facts", "match"),
    [
        ({"num_model_layers": 4}, "has 2 layers, the plan is for a model with 4"),
        ({"model_type": "mixtral"}, "is a qwen3_moe model, the plan is for mixtral"),
    ],
)
def test_a_plan_for_another_model(source: Path, facts: dict, match: str) -> None:
    refuse(source, plan_of(random_orders(2), **facts), match)


@pytest.mark.parametrize("layout", ["permuted", "ranks"])
@pytest.mark.parametrize("stated", [2, 3, None, [3, 2], [2, None]])
def test_a_permutation_does_not_depend_on_top_k(stated: object, layout: str, tmp_path: Path) -> None:
    config = {key: value for key, value in CONFIG.items() if key != "num_experts_per_tok"}
    source = write_checkpoint(
        tmp_path / "source", per_expert_model(), config=config | ({"moe_topk": stated} if stated else {})
    )
    out = tmp_path / "out"
    result = reshard_checkpoint(source, plan_of(random_orders(2), top_k=3), out, ReshardOptions(layout=layout))
    assert any("3 experts a token, config.json says 2" in note for note in result.notes) == (stated == 2)
    undo_reshard(out, tmp_path / "back")
    assert_same_files(source, tmp_path / "back")


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "qwen3_vl_moe_text", "qwen3_moe", ""])
def test_a_plan_may_name_the_language_model_inside(model_type: str, tmp_path: Path) -> None:
    config = {"model_type": "qwen3_vl_moe", "text_config": CONFIG}
    source = write_checkpoint(tmp_path / "source", per_expert_model(), config=config)
    reshard_checkpoint(source, plan_of(random_orders(2), model_type=model_type), tmp_path / "out")


def test_a_plan_for_another_number_of_experts(source: Path) -> None:
    refuse(source, plan_of(random_orders(2, 16), num_experts=16), "has 8 experts, the plan is for a model with 16")


def test_a_plan_for_other_layers(source: Path) -> None:
    refuse(source, plan_of(random_orders(1), layers=(1,)), "experts of layer 0, the plan places none there")
    refuse(source, plan_of(random_orders(3), layers=(0, 1, 5), num_model_layers=0), "layer 5 .* has no experts")


@pytest.mark.parametrize(
    ("key", "spec"),
    [
        ("model.layers.0.mlp.experts.gate_up_proj_lora_a", ("BF16", (E, 4))),
        ("model.layers.0.mlp.experts.mystery", ("BF16", (E,))),
        ("model.layers.1.mlp.router.hash_table", ("I64", (32,))),
        ("model.layers.1.mlp.gate.weight_scale_inv", ("F32", (1, 1))),
        ("model.layers.1.mlp.image_gate.weight", ("BF16", (E, D))),
        ("model.layers.1.mlp.expert_scale", ("F32", (E,))),
        ("model.layers.0.mlp.experts.9.up_proj.weight", ("BF16", (F, D))),
        ("model.layers.0.mlp.experts.03.up_proj.weight", ("BF16", (F, D))),
        ("model.layers.0.mlp.experts.down_proj", ("BF16", (E + 1, D, F))),
        ("model.tower.experts.0.up_proj.weight", ("BF16", (F, D))),
    ],
)
def test_tensors_of_experts_with_unknown_names(key: str, spec: tuple, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", per_expert_model() | {key: spec})
    refuse(source, PLAN, key.replace(".", r"\."))


def test_experts_without_router_and_experts_missing(tmp_path: Path) -> None:
    specs = per_expert_model()
    no_router = {k: v for k, v in specs.items() if "layers.1.mlp.gate" not in k}
    refuse(write_checkpoint(tmp_path / "a", no_router), PLAN, "no router that semmoe knows")
    lacking = {k: v for k, v in specs.items() if "layers.1.mlp.experts.5." not in k}
    refuse(write_checkpoint(tmp_path / "b", lacking), PLAN, "lacks expert 5 of 8")
    ragged = {k: (d, (E - 2, *s[1:]) if "layers.1.mlp.gate.weight" in k else s) for k, (d, s) in specs.items()}
    refuse(write_checkpoint(tmp_path / "c", ragged), PLAN, "expected 8 experts on axis 0")
    no_experts = {k: v for k, v in specs.items() if "layers.1.mlp.experts" not in k}
    refuse(write_checkpoint(tmp_path / "d", no_experts), PLAN, "has a router but no experts")


def without(*ends: str) -> dict:
    """The model of `source` in FP8, less the tensors whose names end so."""
    return {k: v for k, v in per_expert_model("fp8").items() if not k.endswith(ends)}


@pytest.mark.parametrize("layout", ["permuted", "ranks"])
@pytest.mark.parametrize(
    ("lost", "match"),
    [
        (
            ("1.mlp.experts.5.up_proj.weight_scale_inv",),
            r"layer 1 \(model.layers\), expert 5 of .* lacks up_proj.weight_sc",
        ),
        (
            ("1.mlp.experts.5.up_proj.weight",),
            r"layer 1 \(model.layers\), expert 5 of .* lacks up_proj.weight, .* 0 has",
        ),
        (
            ("1.mlp.experts.5.up_proj.weight", "1.mlp.experts.5.up_proj.weight_scale_inv"),
            "expert 5 of .* lacks up_proj, ",
        ),
        (
            tuple(f"1.mlp.experts.{e}.up_proj.{s}" for e in range(E) for s in PER_EXPERT["fp8"]),
            "lacks up_proj of its exp",
        ),
        (
            ("1.mlp.gate.e_score_correction_bias",),
            "layer 1 of .* lacks mlp.gate.e_score_correction_bias, which layer 0 has",
        ),
    ],
)
def test_one_tensor_is_missing(lost: tuple[str, ...], match: str, layout: str, tmp_path: Path) -> None:
    refuse(write_checkpoint(tmp_path / "source", without(*lost)), PLAN, match, layout=layout)


@pytest.mark.parametrize("lost", ["down_proj_scales", "gate_up_proj_bias"])
def test_one_fused_tensor_is_missing(lost: str, tmp_path: Path) -> None:
    specs = {k: v for k, v in fused_model("mxfp4").items() if not k.endswith(f"1.mlp.experts.{lost}")}
    refuse(
        write_checkpoint(tmp_path / "source", specs), PLAN, f"layer 1 of .* lacks mlp.experts.{lost}, which layer 0 has"
    )


def test_experts_and_layers_of_another_precision_are_whole(tmp_path: Path) -> None:
    """Left unquantised: one projection of an expert, a whole layer; never reached in
    calibration: one expert."""
    specs = per_expert_model("fp8_tensor") | {"model.layers.0.mlp.experts.3.up_proj.weight": ("BF16", (F, D))}
    for gone in ("3.up_proj.weight_scale", "3.up_proj.input_scale", "5.gate_proj.input_scale"):
        del specs[f"model.layers.0.mlp.experts.{gone}"]
    plain = {k: v for k, v in per_expert_model().items() if ".layers.1." in k}
    specs = {k: v for k, v in specs.items() if ".layers.1." not in k} | plain
    reshard_checkpoint(write_checkpoint(tmp_path / "source", specs), PLAN, tmp_path / "out")
    fused = {k: v for k, v in fused_model("fp8").items() if ".layers.1." not in k}
    fused |= {k: v for k, v in fused_model().items() if ".layers.1." in k}
    reshard_checkpoint(write_checkpoint(tmp_path / "fused", fused), PLAN, tmp_path / "out2")


def test_damaged_files(source: Path) -> None:
    shard = sorted(source.glob("*.safetensors"))[0]
    whole = shard.read_bytes()
    for data, match in [
        (whole[:-1], "the file is cut short or damaged"),
        (whole + b"x", "the file is cut short or damaged"),
        (whole[:5], "does not begin with a safetensors header"),
        (b"\xff" * 100, "does not begin with a safetensors header"),
        (whole[:20] + b"\x00" + whole[21:], "its safetensors header cannot be read"),
        (whole.replace(b'"BF16"', b'"F32" ', 1), "do not fit its shape"),
        (whole.replace(b"[8,16]", b'["",8]', 1), "its safetensors header cannot be read"),
    ]:
        shard.write_bytes(data)
        refuse(source, PLAN, match)
    shard.unlink()
    refuse(source, PLAN, "is missing")
    shard.write_bytes(whole)
    index = source / "model.safetensors.index.json"
    text = index.read_text()
    named = '{"weight_map": {"lm_head.weight": 1}}'
    for bad, match in [("{", "is not JSON"), ("{}", "has no weight_map"), (named, "names something else than files")]:
        index.write_text(bad)
        refuse(source, PLAN, match)
    index.write_text(text.replace('"model-00001-of-00002.safetensors"', '""', 1))
    refuse(source, PLAN, "weight_map names .*: expected a name")
    index.write_text(text.replace("lm_head.weight", "lm_head.bias"))
    refuse(source, PLAN, r"lacks the tensor lm_head\.bias")


@pytest.mark.parametrize("layout", ["permuted", "ranks"])
def test_a_tensor_in_two_files_and_a_link_to_nothing(source: Path, layout: str) -> None:
    (source / "tokenizer.model").symlink_to("blobs/nothing")
    refuse(source, PLAN, "tokenizer.model is a link to nothing", layout=layout)
    (source / "tokenizer.model").unlink()
    shutil.copyfile(source / "model-00001-of-00002.safetensors", source / "model.safetensors")
    (source / "model.safetensors.index.json").unlink()
    refuse(source, PLAN, "is in model-00001-of-00002.safetensors and in model.safetensors of", layout=layout)


def test_links_to_directories_are_named(source: Path, tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (source / "code").symlink_to(tmp_path / "code")
    assert reshard_checkpoint(source, PLAN, tmp_path / "out").left_out == ("code",)


@pytest.mark.parametrize(("layout", "lost"), [("permuted", "new2old"), ("ranks", "placement")])
def test_a_damaged_sidecar(source: Path, tmp_path: Path, layout: str, lost: str) -> None:
    reshard_checkpoint(source, PLAN, tmp_path / "placed", ReshardOptions(layout=layout))
    facts = json.loads((tmp_path / "placed" / "semmoe.json").read_text())
    del facts["sha256"]  # as older versions wrote it
    good = facts.pop(lost)
    bad = {"0": [0, 0], "1": good["1"]} if layout == "permuted" else [[[0, 1], [2, 2]]] * 2
    wrong = "new2old.0 is list" if layout == "permuted" else "placement of layer 0 is list"
    for change, message in (({}, f"it lacks the key '{lost}'"), ({lost: bad}, wrong)):
        (tmp_path / "placed" / "semmoe.json").write_text(json.dumps(facts | change))
        with pytest.raises(InputError, match=f"semmoe.json: {message}"):
            undo_reshard(tmp_path / "placed", tmp_path / "back")


@pytest.mark.parametrize(
    ("layout", "file", "old", "new"),
    [
        ("permuted", "semmoe.json", '"0": [2, 4,', '"0": [4, 2,'),  # still a permutation
        ("permuted", "semmoe.json", '"checksums": [[', '"checksums": [[["x"], '),
        ("ranks", "semmoe.json", '"placement": [[[2, 4,', '"placement": [[[4, 2,'),
        ("ranks", "semmoe-source.json", '"header_bytes": ', '"header_bytes": "x", "header_bytes_": '),
    ],
)
def test_a_changed_sidecar(source: Path, tmp_path: Path, layout: str, file: str, old: str, new: str) -> None:
    reshard_checkpoint(source, PLAN, tmp_path / "placed", ReshardOptions(layout=layout))
    text = (tmp_path / "placed" / file).read_text()
    assert old in text
    (tmp_path / "placed" / file).write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=f"{file} was changed after it was written"):
        undo_reshard(tmp_path / "placed", tmp_path / "back", verify="none")


def test_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", PLAN, "holds no safetensors file")
    refuse(tmp_path / "nothing", PLAN, "is not a directory")


def test_targets(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    reshard_checkpoint(source, PLAN, out)  # an empty directory is no obstacle
    with pytest.raises(InputError, match="is there already"):
        reshard_checkpoint(source, PLAN, out)
    other = plan_of(random_orders(2, seed=1))
    reshard_checkpoint(source, other, out, ReshardOptions(force=True))
    assert json.loads((out / "semmoe.json").read_text())["plan"]["fingerprint"] == other.fingerprint
    with pytest.raises(InputError, match="is a reshard already"):
        reshard_checkpoint(out, PLAN, tmp_path / "twice")
    shutil.copytree(source, tmp_path / "precious")
    with pytest.raises(InputError, match=r"holds no semmoe\.json"):
        reshard_checkpoint(source, PLAN, tmp_path / "precious", ReshardOptions(force=True))
    assert_same_files(source, tmp_path / "precious")
    for inside in (source, source / "out", tmp_path):
        with pytest.raises(InputError, match="lie in each other"):
            reshard_checkpoint(source, PLAN, inside, ReshardOptions(force=True))
    with pytest.raises(InputError, match="does not exist"):
        reshard_checkpoint(source, PLAN, tmp_path / "no" / "out")
    with pytest.raises(InputError, match="is not a reshard"):
        undo_reshard(source, tmp_path / "back")


def test_a_link_to_a_directory_and_directories_that_cannot_be_replaced(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk/out")
    reshard_checkpoint(source, PLAN, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "out" / "semmoe.json").is_file()
    reshard_checkpoint(source, PLAN, tmp_path / "link", ReshardOptions(force=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "link", "source"]
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["out"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for fixed in (Path("."), Path("/proc")):
        with pytest.raises(InputError, match="is a mount point or the current directory"):
            reshard_checkpoint(source, PLAN, fixed)


@pytest.mark.parametrize(("named", "told"), [(["some file"], r" \(some file\)$"), ([], "$")])
def test_an_error_of_the_disk_is_one_line(
    source: Path, monkeypatch: pytest.MonkeyPatch, named: list[str], told: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *named)

    monkeypatch.setattr("semmoe.runtime.reshard.permuted.write_sidecar", fail)
    refuse(source, PLAN, "cannot write .*out: No space left on device" + told)


def test_a_full_disk_is_seen_before_anything_is_written(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(source)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    refuse(source, PLAN, "GB are needed")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=64 << 20))
    with (source / "tokenizer.json").open("wb") as large:
        large.truncate(64 << 20)
    for layout in ("permuted", "ranks"):
        refuse(source, PLAN, "GB are needed", layout=layout)


def run_reshard(source: Path, plan: Path, out: Path) -> list[str]:
    code = (
        "import sys; from pathlib import Path; from semmoe.solvers.plan import Plan; "
        "from semmoe.runtime.reshard.reshard import reshard_checkpoint;"
        "print('go', flush=True); reshard_checkpoint(Path(sys.argv[1]), Plan.load(sys.argv[2]), Path(sys.argv[3]))"
    )
    return [sys.executable, "-c", code, str(source), str(plan), str(out)]


def test_a_killed_run_leaves_no_out_and_the_next_run_is_whole(tmp_path: Path) -> None:
    wide = {k: (d, (s[0] * 256, s[1]) if ".experts." in k else s) for k, (d, s) in per_expert_model().items()}
    source = write_checkpoint(tmp_path / "source", wide, shards=4)
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    PLAN.save(tmp_path / "plan")
    out = tmp_path / "out"
    killed = 0
    for delay in (0.0, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08):
        run = subprocess.Popen(run_reshard(source, tmp_path / "plan", out), stdout=subprocess.PIPE)
        assert run.stdout is not None and run.stdout.readline() == b"go\n"
        time.sleep(delay)
        run.send_signal(signal.SIGKILL)
        if run.wait() == -signal.SIGKILL:
            killed += not out.exists()
        if out.exists():  # it was faster than the signal: then it is whole
            assert (out / "semmoe.json").exists()
            shutil.rmtree(out)
    assert killed
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before
    (tmp_path / ".out.lock").touch()
    (tmp_path / ".out.partial").mkdir(exist_ok=True)
    (tmp_path / ".out.partial" / "half-written.safetensors").write_bytes(b"stale")
    reshard_checkpoint(source, PLAN, out)
    undo_reshard(out, tmp_path / "back")
    assert_same_files(source, tmp_path / "back")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "out", "plan", "source"]


def test_two_runs_at_once(source: Path, tmp_path: Path) -> None:
    from semmoe.runtime.reshard.output_directory import output_directory

    with output_directory(tmp_path / "out", source, marker="semmoe.json", force=False):
        with pytest.raises(InputError, match="another run is writing"):
            reshard_checkpoint(source, PLAN, tmp_path / "out")
    reshard_checkpoint(source, PLAN, tmp_path / "out")


def test_fused_quantised_tensor_with_a_wrong_expert_axis(tmp_path: Path) -> None:
    specs = fused_model("mxfp4")
    specs["model.layers.1.mlp.experts.down_proj_scales"] = ("U8", (E // 2, D, 1))
    refuse(write_checkpoint(tmp_path / "source", specs), PLAN, "expected 8 experts on axis 0")
