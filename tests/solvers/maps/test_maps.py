"""Every engine's map holds what its reader demands, comes back as the same placement, and a damaged
file is one line.

The schemas are written from the engines' readers: sglang srt/eplb/expert_location.py, tensorrt_llm
llmapi/llm_args.py, the tests of vLLM pull requests 41141, 49572 and 34811, vllm_ascend
eplb/core/eplb_utils.py, and eplb.py.
"""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from semmoe.commands.export import export
from semmoe.options import MapKind, VllmFormat
from semmoe.profiles.errors import InputError
from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic
from semmoe.profiles.trace import RoutingTrace
from semmoe.solvers.demands import Demands
from semmoe.solvers.make_plan import PlanOptions, make_plan
from semmoe.solvers.maps.eplb import eplb_tables
from semmoe.solvers.maps.import_plan import Served, import_plan
from semmoe.solvers.maps.kinds import KINDS
from semmoe.solvers.maps.launch import launch_lines
from semmoe.solvers.maps.origin import exported_from, sidecar_path
from semmoe.solvers.maps.read import import_placement
from semmoe.solvers.maps.vllm import FORMATS as VLLM_FORMATS
from semmoe.solvers.maps.write import MapOptions, check_config, export_map, render, write_export, write_map
from semmoe.solvers.placement import Placement, Topology
from semmoe.solvers.plan import ModelFacts, Plan
from semmoe.solvers.schedule.simulate import Setting

# (kind, format, ending) of everything that export can write.
FILES = [
    ("sglang", "", ".json"),
    ("trtllm", "", ".yaml"),
    ("vllm", "pr41141", ".jsonl"),
    ("vllm", "pr49572", ".json"),
    ("vllm-ascend", "", ".json"),
    ("eplb", "", ".pt"),
    ("eplb", "", ".safetensors"),
    ("eplb", "", ".npz"),
]
NAMES = [f"{kind}{format}{suffix}" for kind, format, suffix in FILES]

app = typer.Typer()
app.command()(export)


def random_rows(rng: np.random.Generator, layers: int, ranks: int, per_rank: int, replicas: int) -> np.ndarray:
    """A valid placement: every expert somewhere, none twice on a rank, slots in no order."""
    experts = ranks * per_rank
    rows = np.empty((layers, ranks, per_rank + replicas), np.int32)
    for layer in range(layers):
        own = rng.permutation(experts).reshape(ranks, per_rank)
        for rank in range(ranks):
            others = rng.permutation(np.setdiff1d(np.arange(experts), own[rank]))[:replicas]
            rows[layer, rank] = rng.permutation(np.concatenate([own[rank], others]))
    return rows


def plan_of(
    layers: int = 3,
    ranks: int = 4,
    per_rank: int = 2,
    replicas: int = 0,
    *,
    dense: int = 1,
    depth: int | None = None,
    seed: int = 0,
    **facts,
) -> Plan:
    experts = ranks * per_rank
    model = ModelFacts(
        **{
            "model": "m",
            "model_type": "deepseek_v3",
            "num_layers": layers,
            "num_experts": experts,
            "top_k": 2,
            "model_layers": tuple(range(dense, dense + layers)),
            "num_model_layers": dense + layers if depth is None else depth,
            **facts,
        }
    )
    rows = random_rows(np.random.default_rng(seed), layers, ranks, per_rank, replicas)
    return Plan(
        placement=Placement(rows, experts),
        topology=Topology(ranks),
        model=model,
        method="random",
        seed=seed,
        dispatch="per-rank",
        load_LE=np.ones((layers, experts), np.int64),
        fitted_keys=np.zeros(0, np.uint64),
    )


def write(plan: Plan, path: Path, kind: str, format: str = "", **options) -> Path:
    value = export_map(plan, kind, format=format, **options)
    write_export(path, kind, render(kind, value, path.suffix), plan, format=format)
    return path


def same(first: Placement, second: Placement) -> bool:
    return first.num_experts == second.num_experts and np.array_equal(first.experts_LRS, second.experts_LRS)


# What each engine's reader demands of a file, as plain assertions.


def sglang_reads(path: Path, depth: int, experts: int, redundant: int, ep_size: int) -> list[list[int]]:
    def init_by_mapping(physical_to_logical_map):  # called with **data_dict: a further key would be a TypeError
        return physical_to_logical_map

    rows = init_by_mapping(**json.loads(path.read_text()))
    assert len(rows) == depth
    for row in rows:
        assert len(row) == experts + redundant and len(row) % ep_size == 0
        assert set(row) == set(range(experts))
        local = len(row) // ep_size
        assert all(len(set(row[r * local : (r + 1) * local])) == local for r in range(ep_size))
    return rows


def trtllm_reads(path: Path, layers: list[int], ep_size: int) -> dict[int, list[int]]:
    config = yaml.safe_load(path.read_text())
    assert set(config) == {"num_slots", "initial_global_assignments", "layer_updates_per_iter"}  # a strict model
    assert config["layer_updates_per_iter"] == 0 and config["num_slots"] % ep_size == 0
    table = config["initial_global_assignments"]
    assert all(type(layer) is int for layer in table)
    for layer in layers:  # table[layer_idx]: a missing layer is a KeyError
        assert len(table[layer]) == config["num_slots"]
    return table


def ascend_reads(path: Path, layer: int) -> tuple[list[list[int]], int]:
    data = json.loads(path.read_text())
    assert layer < data["moe_layer_count"]
    devices = data["layer_list"][layer]["device_list"]
    assert data["layer_list"][layer]["device_count"] == len(devices)
    rows = [device["device_expert"] for device in devices]
    assert len({len(row) for row in rows}) == 1
    return rows, sum(map(len, rows))


def test_sglang_has_a_row_for_every_layer_under_its_only_key(tmp_path):
    plan = plan_of(replicas=1, dense=2, depth=6)
    rows = sglang_reads(write(plan, tmp_path / "m.json", "sglang"), 6, 8, 4, 4)
    assert rows[0] == rows[1] == rows[5] == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    assert rows[2:5] == plan.placement.physical_to_logical_LP.tolist()


def test_sglang_needs_the_depth_of_the_model(tmp_path):
    plan = plan_of(depth=0)
    with pytest.raises(InputError, match="--num-hidden-layers"):
        export_map(plan, "sglang")
    sglang_reads(write(plan, tmp_path / "m.json", "sglang", num_hidden_layers=5), 5, 8, 0, 4)
    with pytest.raises(InputError, match=r"layers 1\.\.3 do not fit a model of 3 layers"):
        export_map(plan, "sglang", num_hidden_layers=3)
    with pytest.raises(InputError, match="a model of 4 layers"):
        export_map(plan_of(), "sglang", num_hidden_layers=9)


def test_trtllm_has_three_keys_absolute_layers_and_mtp_rows(tmp_path):
    plan = plan_of(replicas=1, dense=3)
    table = trtllm_reads(write(plan, tmp_path / "m.yaml", "trtllm", num_mtp_layers=2), [3, 4, 5, 6, 7], 4)
    assert [table[layer] for layer in (3, 4, 5)] == plan.placement.physical_to_logical_LP.tolist()
    assert table[6] == table[7] == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3] and len(table) == 5
    with pytest.raises(InputError, match="MTP layers are numbered after the last layer"):
        export_map(plan_of(depth=0), "trtllm", num_mtp_layers=1)


def test_vllm_formats(tmp_path):
    plan = plan_of(replicas=2)
    rows = plan.placement.physical_to_logical_LP.tolist()
    (line,) = write(plan, tmp_path / "m.jsonl", "vllm", "pr41141").read_text().splitlines()
    assert json.loads(line) == {
        "record_type": "eplb_initial_mapping",
        "version": 1,
        "num_redundant_experts": 8,
        "num_slots": 16,
        "initial_global_assignments": {"0": rows[0], "1": rows[1], "2": rows[2]},
    }
    assert json.loads(write(plan, tmp_path / "m.json", "vllm", "pr49572").read_text()) == rows
    with pytest.raises(InputError, match="choose the pull request of your build"):
        export_map(plan, "vllm")


def test_pr34811_has_one_map_for_all_layers(tmp_path):
    model = plan_of(layers=2).model
    rank_of_E = np.array([3, 0, 1, 2, 2, 1, 0, 3])
    plan = plan_of(layers=2)
    shared = Plan(
        **{**vars(plan), "placement": Placement.from_ranks(np.tile(rank_of_E, (2, 1)), 4)},
    )
    path = write(shared, tmp_path / "m.json", "vllm", "pr34811")
    assert json.loads(path.read_text()) == {"expert_to_ep_rank": rank_of_E.tolist()}
    assert same(import_placement("vllm", path, model, Topology(4)), shared.placement)
    with pytest.raises(InputError, match="layer 1 is placed unlike layer 0, and pr34811 has one map for all layers"):
        export_map(plan, "vllm", format="pr34811")
    with pytest.raises(InputError, match="1 replica slots"):
        export_map(plan_of(layers=1, replicas=1), "vllm", format="pr34811")


def test_vllm_takes_one_row_for_all_layers_back(tmp_path):
    plan = plan_of(layers=1, dense=0)
    (tmp_path / "m.json").write_text(json.dumps(plan.placement.physical_to_logical_LP[0].tolist()))
    model = plan_of(layers=3).model
    got = import_placement("vllm", tmp_path / "m.json", model, Topology(4))
    assert (got.experts_LRS == plan.placement.experts_LRS).all() and got.num_layers == 3


def test_ascend_lists_devices_by_moe_layer(tmp_path):
    plan = plan_of(replicas=1)
    path = write(plan, tmp_path / "m.json", "vllm-ascend")
    for layer in range(3):
        rows, physical_count = ascend_reads(path, layer)
        assert rows == plan.placement.experts_LRS[layer].tolist() and physical_count == 12
    assert [entry["layer_id"] for entry in json.loads(path.read_text())["layer_list"]] == [0, 1, 2]


def test_eplb_tables_of_a_small_map():
    # EPLB's own example, first layer of its documented result.
    row = [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1]
    tables = eplb_tables(Placement(np.array(row, np.int32).reshape(1, 8, 2), 12))
    assert tables["phy2log"].tolist() == [row] and tables["logcnt"].tolist() == [[1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1]]
    assert tables["log2phy"].tolist() == [
        [[12, -1], [13, 15], [11, -1], [6, -1], [5, 7], [0, 2], [1, -1], [3, -1], [4, -1], [9, -1], [8, 10], [14, -1]]
    ]
    assert {array.dtype for array in tables.values()} == {np.dtype(np.int64)}


@pytest.mark.parametrize("container", [tuple, list])
def test_what_rebalance_experts_returns_is_read(tmp_path, container):
    plan = plan_of(replicas=1)
    tables = eplb_tables(plan.placement)
    torch.save(
        container(torch.from_numpy(tables[name]) for name in ("phy2log", "log2phy", "logcnt")), tmp_path / "m.pt"
    )
    torch.save(torch.from_numpy(tables["phy2log"]), tmp_path / "bare.pt")
    np.save(tmp_path / "bare.npy", tables["phy2log"])
    for name in ("m.pt", "bare.pt", "bare.npy"):
        assert same(import_placement("eplb", tmp_path / name, plan.model, Topology(4)), plan.placement)


def test_the_map_of_a_recorder_dump_is_read(tmp_path):
    plan = plan_of(replicas=1)
    rows = export_map(plan, "sglang")["physical_to_logical_map"]
    torch.save({"records": [], "last_physical_to_logical_map": torch.tensor(rows)}, tmp_path / "dump.pt")
    torch.save({"physical_to_logical_map": torch.tensor(rows)}, tmp_path / "map.pt")
    for name in ("dump.pt", "map.pt"):
        assert same(import_placement("sglang", tmp_path / name, plan.model, Topology(4)), plan.placement)


@pytest.mark.parametrize(("kind", "format", "suffix"), FILES, ids=NAMES)
@settings(max_examples=12, deadline=None)
@given(
    layers=st.integers(1, 4),
    ranks=st.integers(1, 5),
    per_rank=st.integers(1, 4),
    replicas=st.integers(0, 3),
    dense=st.integers(0, 2),
    seed=st.integers(0, 2**20),
)
def test_every_kind_comes_back(tmp_path_factory, kind, format, suffix, layers, ranks, per_rank, replicas, dense, seed):
    replicas = min(replicas, (ranks - 1) * per_rank)
    groups = ranks if per_rank > 1 else 1  # grouped models: an engine's map leaves the router alone
    plan = plan_of(layers, ranks, per_rank, replicas, dense=dense, seed=seed, n_group=groups, topk_group=1)
    path = write(plan, tmp_path_factory.mktemp("maps") / f"m{suffix}", kind, format)
    got = import_placement(kind, path, plan.model, plan.topology)
    assert same(got, plan.placement) and got.experts_LRS.dtype == np.int32


# Damaged, foreign and misleading files: (kind, change of the exported JSON value or None, message).

BAD_VALUES = [
    (
        "sglang",
        "",
        lambda v: {**v, "made_by": "me"},
        "has the key 'made_by': SGLang takes physical_to_logical_map alone",
    ),
    ("sglang", "", lambda v: {"logical_count": [[1]]}, "no physical_to_logical_map: these are loads"),
    ("sglang", "", lambda v: v["physical_to_logical_map"], "a list, expected an object"),
    ("sglang", "", lambda v: {"physical_to_logical_map": v["physical_to_logical_map"][1:]}, "has 3 rows, expected 4"),
    ("sglang", "", lambda v: {"physical_to_logical_map": [[0, 1], [2]]}, "rows of unequal length"),
    ("sglang", "", lambda v: {"physical_to_logical_map": [["a"] * 8] * 4}, "expected integers with 2 axes"),
    ("sglang", "", lambda v: {"physical_to_logical_map": [[0.0] * 8] * 4}, "is float64"),
    ("sglang", "", lambda v: {"physical_to_logical_map": [[10**30] * 8] * 4}, "is object"),
    ("sglang", "", lambda v: {"physical_to_logical_map": [[]] * 4}, "expected integers"),
    ("sglang", "", lambda v: {"physical_to_logical_map": None}, "expected integers"),
    (
        "sglang",
        "",
        lambda v: {"physical_to_logical_map": [[0] * 8] * 4},
        "layer 0: expert 1 is on no rank",
    ),
    ("sglang", "", lambda v: {"physical_to_logical_map": [list(range(4)) * 2] * 4}, "layer 0: expert 4 is on no rank"),
    ("sglang", "", lambda v: {"physical_to_logical_map": [list(range(1, 9))] * 4}, "names expert 8"),
    (
        "sglang",
        "",
        lambda v: {"physical_to_logical_map": [[2**32 + i for i in range(8)]] * 4},
        "names expert 4294967303",
    ),
    ("sglang", "", lambda v: {"physical_to_logical_map": [list(range(6))] * 4}, "6 slots do not divide over 4 ranks"),
    ("sglang", "", lambda v: {"physical_to_logical_map": [list(range(4))] * 4}, "4 slots cannot hold"),
    ("trtllm", "", lambda v: {**v, "ep_size": 4}, "has the key 'ep_size'"),
    ("trtllm", "", lambda v: {"num_slots": 8}, "no initial_global_assignments by layer"),
    ("trtllm", "", lambda v: {**v, "num_slots": 16}, "num_slots is 16, its rows have 8 slots"),
    ("trtllm", "", lambda v: {**v, "initial_global_assignments": {1: list(range(8))}}, "no row for layer 2"),
    ("trtllm", "", lambda v: {**v, "initial_global_assignments": {"1": [0]}}, "'1' is not the number of a layer"),
    (
        "trtllm",
        "",
        lambda v: {**v, "initial_global_assignments": {**v["initial_global_assignments"], 2: [0] * 8}},
        "layer 2: expert 1 is on no rank",
    ),
    ("vllm", "pr41141", lambda v: {**v, "record_type": "eplb_load_stats"}, "its record_type is 'eplb_load_stats'"),
    ("vllm", "pr41141", lambda v: {**v, "version": 2}, "has version 2, expected 1"),
    ("vllm", "pr41141", lambda v: {**v, "num_redundant_experts": 4}, "num_redundant_experts is 4, its rows make it 0"),
    ("vllm", "pr41141", lambda v: {**v, "initial_global_assignments": {"0": [1]}}, "rows for layers 0, expected MoE"),
    ("vllm", "pr41141", lambda v: {**v, "initial_global_assignments": [1]}, "a list, expected an object"),
    ("vllm", "pr49572", lambda v: v[:2], "has 2 rows, expected 3"),
    ("vllm", "pr49572", lambda v: [], "expected integers"),
    ("vllm", "pr49572", lambda v: "map.json", "a str, expected an object"),
    ("vllm", "pr49572", lambda v: {"expert_to_ep_rank": [0, 1]}, "ranks of 2 experts"),
    ("vllm", "pr49572", lambda v: {"expert_to_ep_rank": [0, 0, 0, 0, 1, 1, 2, 3]}, "the same number of experts"),
    ("vllm", "pr49572", lambda v: {"expert_to_ep_rank": [0, 0, 1, 1, 2, 2, 4, 4]}, r"ranks 0\.\.3 the same number"),
    ("vllm-ascend", "", lambda v: {**v, "moe_layer_count": 9}, r"layer_list of moe_layer_count \(9\) layers"),
    ("vllm-ascend", "", lambda v: {**v, "layer_list": v["layer_list"][::-1]}, "entry 0 has layer_id 2, expected 0"),
    ("vllm-ascend", "", lambda v: [], "a list, expected an object"),
    ("vllm-ascend", "", lambda v: {"moe_layer_count": 1, "layer_list": [3]}, "layer 0: a int, expected an object"),
    (
        "vllm-ascend",
        "",
        lambda v: {"moe_layer_count": 1, "layer_list": [{"layer_id": 0, "device_count": 1, "device_list": [{}]}]},
        "layer 0 has 1 devices, expected 4",
    ),
    (
        "vllm-ascend",
        "",
        lambda v: {**v, "moe_layer_count": 2, "layer_list": v["layer_list"][:2]},
        "has 2 rows, expected 3",
    ),
]


@pytest.mark.parametrize(("kind", "format", "change", "message"), BAD_VALUES)
def test_a_misleading_file_is_one_line(tmp_path, kind, format, change, message):
    plan = plan_of()
    path = tmp_path / f"map{KINDS[kind].endings[0]}"
    value = change(export_map(plan, kind, format=format))
    path.write_text(yaml.safe_dump(value) if kind == "trtllm" else json.dumps(value))
    with pytest.raises(InputError, match=message) as raised:
        import_placement(kind, path, plan.model, plan.topology)
    assert "\n" not in str(raised.value) and str(path) in str(raised.value) and len(str(raised.value)) < 400


BYTES = [
    b"",
    b"{",
    b"\xff\xfe\x00",
    b"[" * 100_000,
    b"a: b: c\n- d",
    b"PK\x03\x04 cut",
    b'{"a": 1}',
    b"3",
    b"!!python/object:os.x {}",
]


@pytest.mark.parametrize("content", BYTES, ids=[repr(b[:12]) for b in BYTES])
@pytest.mark.parametrize("kind", KINDS)
def test_garbage_is_one_line(tmp_path, kind, content):
    plan = plan_of()
    for suffix in KINDS[kind].endings:
        path = tmp_path / f"map{suffix}"
        path.write_bytes(content)
        with pytest.raises(InputError) as raised:
            import_placement(kind, path, plan.model, plan.topology)
        assert "\n" not in str(raised.value) and str(path) in str(raised.value) and len(str(raised.value)) < 400


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_file_or_a_directory_is_one_line(tmp_path, kind):
    plan = plan_of()
    for suffix in KINDS[kind].endings:
        (tmp_path / f"dir{suffix}").mkdir()
        for name in (f"none{suffix}", f"dir{suffix}"):
            with pytest.raises(InputError, match=str(tmp_path / name)):
                import_placement(kind, tmp_path / name, plan.model, plan.topology)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"log2phy": [[1]]}, "has no phy2log, but log2phy"),
        ({"phy2log": [[0, 1]]}, "has 1 rows, expected 3"),
        ({"phy2log": [[0.5] * 8] * 3}, "is float64"),
        ({"phy2log": [list(range(8))] * 3, "logcnt": [[2] * 8] * 3}, "logcnt does not count"),
    ],
)
def test_wrong_eplb_tables_are_one_line(tmp_path, tables, message):
    np.savez(tmp_path / "m.npz", **{name: np.array(rows) for name, rows in tables.items()})
    with pytest.raises(InputError, match=message):
        import_placement("eplb", tmp_path / "m.npz", plan_of().model, Topology(4))


def test_a_bfloat16_tensor_is_one_line(tmp_path):
    torch.save({"phy2log": torch.zeros(3, 8, dtype=torch.bfloat16)}, tmp_path / "m.pt")
    with pytest.raises(InputError, match="phy2log is no plain tensor of integers"):
        import_placement("eplb", tmp_path / "m.pt", plan_of().model, Topology(4))


def test_the_number_of_redundant_experts_is_checked():
    assert export_map(plan_of(replicas=1), "sglang", redundant=4)
    with pytest.raises(InputError, match="--redundant is 8, the plan has 4 redundant slots on 4 ranks"):
        export_map(plan_of(replicas=1), "sglang", redundant=8)


CONFIG = {
    "model_type": "deepseek_v3",
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
}


def test_a_config_checks_the_layers_and_counts_mtp():
    assert check_config(plan_of(), CONFIG) == (4, 1)
    assert check_config(plan_of(), {k: v for k, v in CONFIG.items() if k != "num_nextn_predict_layers"}) == (4, 0)
    for change, message in [
        ({"num_hidden_layers": 6}, "the plan lacks its MoE layer 4"),
        ({"first_k_dense_replace": 2}, "the plan places layer 1, which has no experts there"),
        ({"n_routed_experts": 16}, "has num_experts 16, the plan is for num_experts 8"),
    ]:
        with pytest.raises(InputError, match=message):
            check_config(plan_of(), {**CONFIG, **change})


def test_a_family_that_the_engine_cannot_move_is_refused_before_anything_is_written(tmp_path):
    plan = plan_of()
    for model_type, message in (("qwen3_moe", "the model is of type qwen3_moe"), ("mixtral", "moves no experts")):
        config = tmp_path / f"{model_type}.json"
        config.write_text(json.dumps({**CONFIG, "model_type": model_type}), encoding="utf-8")
        named = replace(plan, model=replace(plan.model, model_type="mixtral"))
        with pytest.raises(InputError, match=message):
            write_map(named, "sglang", tmp_path / "map.json", MapOptions(model=str(config)))
        assert not (tmp_path / "map.json").exists()


# The command.


def run(*arguments: object) -> object:
    """The result of a command; what it writes is written again."""
    return CliRunner().invoke(app, [*(str(a) for a in arguments), "--force"])


def failure(*arguments: object) -> str:
    result = run(*arguments)
    assert isinstance(result.exception, InputError), result.output
    assert "\n" not in str(result.exception)
    return str(result.exception)


@pytest.fixture
def saved(tmp_path) -> Path:
    plan_of(replicas=1).save(tmp_path / "p")
    return tmp_path / "p"


def test_choices_equal_the_kinds():
    assert [kind.value for kind in MapKind] == list(KINDS) and [f.value for f in VllmFormat] == list(VLLM_FORMATS)


def test_the_command_writes_the_map_its_origin_and_the_flags(saved, tmp_path):
    result = run(saved, "--to", "sglang", "-o", tmp_path / "map.json", "--json")
    assert result.exit_code == 0, result.output
    flags = next(line for line in result.stderr.splitlines() if "start SGLang with" in line)
    words = shlex.split(flags.split("with: ")[1])
    assert words[words.index("--ep-size") + 1] == "4" and words[words.index("--ep-num-redundant-experts") + 1] == "4"
    assert words[words.index("--init-expert-location") + 1] == str(tmp_path / "map.json")
    assert json.loads(result.stdout)["plan"] == Plan.load(saved).fingerprint
    origin = exported_from(tmp_path / "map.json")
    assert (origin["kind"], origin["ranks"], origin["slots"], origin["plan"]) == (
        "sglang",
        4,
        12,
        Plan.load(saved).fingerprint,
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["map.json", "map.json.semmoe.json", "p"]


@pytest.mark.parametrize(("kind", "format", "suffix"), FILES, ids=NAMES)
def test_the_command_repeats_to_the_byte_and_comes_back(saved, tmp_path, kind, format, suffix):
    path, plan = tmp_path / f"map{suffix}", Plan.load(saved)
    options = ["--format", format] if format else []
    contents = []
    for _ in range(2):
        assert run(saved, "--to", kind, "-o", path, *options).exit_code == 0
        contents.append((path.read_bytes(), sidecar_path(path).read_bytes()))
    assert contents[0] == contents[1]
    assert same(import_placement(kind, path, plan.model, plan.topology), plan.placement)


def test_the_command_takes_mtp_layers_from_a_config(saved, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert run(saved, "--to", "trtllm", "-o", tmp_path / "m.yml", "--model", tmp_path / "config.json").exit_code == 0
    trtllm_reads(tmp_path / "m.yml", [1, 2, 3, 4], 4)
    result = run(saved, "--to", "trtllm", "-o", tmp_path / "m.yml")
    assert "no rows for MTP layers" in result.stderr


def test_layers_that_a_map_has_no_rows_for_are_told(saved, tmp_path):
    done = run(saved, "--to", "eplb", "--num-hidden-layers", 4, "--mtp-layers", 1, "-o", tmp_path / "m.pt")
    assert done.exit_code == 0 and (tmp_path / "m.pt").exists()
    assert "--num-hidden-layers is for --to sglang and trtllm" in done.stderr
    assert "--mtp-layers is for --to trtllm" in done.stderr


def test_mistakes_are_one_line(saved, tmp_path):
    (tmp_path / "mine.json").write_text("{}")
    assert "semmoe export did not write it" in failure(saved, "--to", "sglang", "-o", tmp_path / "mine.json")
    assert (tmp_path / "mine.json").read_text() == "{}"
    assert "ends in .json" in failure(saved, "--to", "sglang", "-o", tmp_path / "map.txt")
    assert "does not exist" in failure(saved, "--to", "sglang", "-o", tmp_path / "no" / "map.json")
    assert "--format is for --to vllm" in failure(saved, "--to", "eplb", "--format", "pr49572", "-o", tmp_path / "m.pt")
    assert "--to vllm needs --format" in failure(saved, "--to", "vllm", "-o", tmp_path / "m.json")
    assert "is not a plan" in failure(tmp_path / "nothing", "--to", "sglang", "-o", tmp_path / "m.json")
    assert run(saved, "--to", "tgi", "-o", tmp_path / "m.json").exit_code == 2
    assert not list(tmp_path.glob("m.*")) and not list(tmp_path.glob(".*"))


def test_a_stale_origin_is_not_believed(saved, tmp_path):
    assert run(saved, "--to", "sglang", "-o", tmp_path / "map.json").exit_code == 0
    (tmp_path / "map.json").write_text("{}")
    assert exported_from(tmp_path / "map.json") is None
    sidecar_path(tmp_path / "map.json").unlink()
    assert exported_from(tmp_path / "map.json") == {"trace": {}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:30], "is not JSON"),
        (lambda text: text.replace("semmoe-export", "x"), "is not a sidecar of an engine's map"),
        (lambda text: text.replace('"ranks": 4', '"ranks": true'), "ranks is True, expected a whole number"),
        (lambda text: text.replace('"ranks": 4', '"ranks": 4, "ranks": 5'), "'ranks' stands twice"),
        (lambda text: text.replace('"trace": {', '"trace": 3, "x": {'), "trace is 3, expected an object"),
        (lambda text: text.replace('"sha256": "', '"sha256": "g'), "sha256 is 'g.*expected a SHA-256"),
    ],
)
def test_a_damaged_origin_is_one_line(saved, tmp_path, change, message):
    assert run(saved, "--to", "sglang", "-o", tmp_path / "map.json").exit_code == 0
    sidecar = sidecar_path(tmp_path / "map.json")
    sidecar.write_text(change(sidecar.read_text()))
    with pytest.raises(InputError, match=f"map.json.semmoe.json.*{message}"):
        exported_from(tmp_path / "map.json")


def test_the_documented_commands_run_and_the_flags_agree(saved, tmp_path, monkeypatch):
    docs = (Path(__file__).parents[3] / "docs" / "engines.md").read_text()
    commands = [line for line in docs.splitlines() if line.startswith("semmoe export p ") and "plugin" not in line]
    assert {words[words.index("--to") + 1] for words in map(shlex.split, commands)} == set(KINDS) - {"eplb"}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "CKPT").mkdir()
    (tmp_path / "CKPT" / "config.json").write_text(json.dumps(CONFIG))
    for line in commands:
        result = run(*shlex.split(line)[2:])
        assert result.exit_code == 0, (line, result.output, result.exception)
    # What export tells people to type is what the page says: options of JSON by their keys, the
    # others by their names.
    for kind, suffix, options in [
        ("sglang", ".json", ["--moe-a2a-backend deepep", "--init-expert-location", "--ep-num-redundant-experts"]),
        (
            "trtllm",
            ".yaml",
            ["--extra_llm_api_options", "enable_attention_dp: true", "backend: WIDEEP, load_balancer: "],
        ),
        (
            "vllm pr41141",
            ".jsonl",
            ["initial_mapping_path", '"disable_online_rebalancing": true', "deepep_high_throughput"],
        ),
        ("vllm pr49572", ".json", ["initial_expert_map_path", '"step_interval": 1000000000', "--enable-eplb"]),
        ("vllm-ascend", ".json", ["--additional-config", '{"eplb_config": {"expert_map_path": ']),
    ]:
        engine, _, format = kind.partition(" ")
        told = "\n".join(launch_lines(Plan.load(saved), engine, Path(f"map{suffix}"), format=format))
        for option in options:
            assert option in told and option in docs, (kind, option)


# The way back into a plan.


def test_an_imported_map_is_scored_on_all_requests(tmp_path):
    write_synthetic(tmp_path / "t", SyntheticWorld(num_requests=40))
    trace = RoutingTrace.open(tmp_path / "t")
    how = PlanOptions(method="spectral", holdout=0.25, made_by="semmoe place")
    plan = make_plan([trace], Topology(4), Demands(load_cap=1.2), how)
    options = {"served": Served("per-rank", Setting()), "made_by": "semmoe place"}
    path = write(plan, tmp_path / "map.jsonl", "vllm", "pr41141")
    imported = import_plan([trace], Topology(4), kind="vllm", file=path, **options)
    assert same(imported.placement, plan.placement) and imported.method == "imported"
    assert imported.scores.requests == 40 and not len(imported.fitted_keys)
    assert "these scores are not held out" in imported.notes[0]
    imported.save(tmp_path / "q")
    assert Plan.load(tmp_path / "q").options["import"] == "vllm"
    sidecar_path(path).unlink()
    assert "all 40 requests are scored" in import_plan([trace], Topology(4), kind="vllm", file=path, **options).notes[0]
    rows = {row.placement: row.rem for row in imported.scores.rows}
    assert rows["plan"] < rows["contiguous"]
    with pytest.raises(InputError, match="32 slots do not divide over 5 ranks"):
        import_plan([trace], Topology(5), kind="vllm", file=path, **options)


def test_place_imports_a_map(tmp_path):
    from semmoe.main import app as semmoe

    write_synthetic(tmp_path / "t", SyntheticWorld(num_requests=20))
    plan = plan_of(4, 4, 8, dense=0)
    path = write(plan, tmp_path / "map.json", "vllm-ascend")
    words = ["place", tmp_path / "t", "--ranks", 4, "--import", "vllm-ascend", path, "-o", tmp_path / "q", "--json"]
    result = CliRunner().invoke(semmoe, [str(w) for w in words])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["requests"] == 20 and "all 20 requests are scored" in result.stderr
    got = Plan.load(tmp_path / "q")
    assert same(got.placement, plan.placement) and got.method == "imported"


def test_aliases_of_yaml_stand_for_rows_alone(tmp_path):
    plan, path = plan_of(), tmp_path / "map.yaml"
    first, *others = plan.model.model_layers
    row = list(range(plan.model.num_experts))
    lines = [f"num_slots: {len(row)}", "initial_global_assignments:", f"  {first}: &row {row}"]
    path.write_text("\n".join([*lines, *(f"  {layer}: *row" for layer in others)]))
    read = import_placement("trtllm", path, plan.model, plan.topology)
    assert read.experts_LRS.reshape(len(others) + 1, -1).tolist() == [row] * (len(others) + 1)
    for text in ("a: &a [1]\nb: &b [*a, *a]\nc: [*b, *b]", "a: &a [1, *a]"):
        path.write_text(text)
        with pytest.raises(InputError, match="stands for more than a row of numbers"):
            import_placement("trtllm", path, plan.model, plan.topology)
