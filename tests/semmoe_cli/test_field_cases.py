"""What people of the field brought along, through the commands that they ran: the right answer, or
one line that says why there is none."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from cases import field_cases as cases
from command_line import run
from engine_samples import write_lines
from safetensors.torch import load_file
from typer.testing import CliRunner

from semmoe.main import app
from semmoe.profiles.errors import InputError
from semmoe.profiles.numbering import find_relabelling
from semmoe.profiles.trace import RoutingTrace
from semmoe.profiles.trace_writer import TraceWriter
from semmoe.runtime.reshard.undo import undo_reshard
from semmoe.solvers.plan import Plan

FAST = ("--effort", "fast", "--no-refit")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(*words: object) -> str:
    """The one line with which a command refuses."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert isinstance(result.exception, InputError), result.output + repr(result.exception)
    line = str(result.exception)
    assert "\n" not in line
    return line


def traced(file: str, *words: str, out: str = "t") -> RoutingTrace:
    run("trace", "--from", "sglang", file, *words, "-o", out)
    return RoutingTrace.open(out)


def resharded(model: str, out: str) -> dict[str, list[int]]:
    """new2old of a reshard of `model` by a plan that moves experts."""
    run("place", "t", "--ranks", "2", "--method", "spectral", *FAST, "-o", f"p-{out}")
    run("reshard", model, f"p-{out}", "-o", out)
    new2old = json.loads(Path(out, "semmoe.json").read_text())["new2old"]
    assert any(order != sorted(order) for order in new2old.values())
    return new2old


def test_a_layer_that_always_chooses_the_same_is_a_finding() -> None:
    cases.constant_layer()
    traced("r.jsonl")
    report = json.loads(run("report", "t", "--json"))
    said = [finding for finding in report["findings"] if "layer 0" in json.dumps(finding)]
    assert said and said[0]["level"] == "bad" and "same experts" in json.dumps(said[0])
    structure = next(f for f in report["findings"] if f["topic"] == "structure")
    assert structure["level"] != "good" and np.isfinite(report["learning"]["contiguous_rem"])
    shown = json.loads(run("show", "t", "--json"))
    assert "co_activation_lift" not in shown and "same experts" in str(shown["impossible_routing"])


def test_wasted_slots_of_a_map_are_counted() -> None:
    cases.duplicate_slots()
    traced("r.jsonl")
    run("place", "t", "--ranks", "4", "--import", "eplb", "twice.pt", "-o", "p1")
    run("place", "t", "--ranks", "4", "--import", "eplb", "expert_map.pth", "-o", "p2")
    wasteful, local = Plan.load("p1"), Plan.load("p2")
    assert wasteful.placement.num_wasted == 8 and any("8 of 40 slots" in note for note in wasteful.notes)
    assert local.placement.experts_LRS.reshape(2, -1).tolist() == [list(range(16))] * 2


def test_the_index_decides_which_tensor_moves() -> None:
    cases.index_decides()
    traced("r.jsonl", "--model", "overlay")
    for model in ("overlay", "stale"):
        new2old = resharded(model, f"out-{model}")
        index = {m: json.loads(Path(m, "model.safetensors.index.json").read_text())["weight_map"] for m in (model,)}
        placed = json.loads(Path(f"out-{model}", "model.safetensors.index.json").read_text())["weight_map"]
        before = {name: load_file(Path(model, file))[name] for name, file in index[model].items()}
        after = {name: load_file(Path(f"out-{model}", file))[name] for name, file in placed.items()}
        assert before.keys() == after.keys()
        for layer, order in new2old.items():
            gate = f"model.layers.{layer}.mlp.gate.weight"
            assert after[gate].equal(before[gate][order])
            for new, old in enumerate(order):
                moved, source = (f"model.layers.{layer}.mlp.experts.{e}.up_proj.weight" for e in (new, old))
                assert after[moved].equal(before[source])
    Path("stale", "model.safetensors.index.json").unlink()
    line = refused("reshard", "stale", "p-out-stale", "-o", "out")
    assert cases.ONE in line and cases.TWO in line and not Path("out").exists()


def test_projections_around_the_experts_stay() -> None:
    cases.latent_projections()
    traced("r.jsonl", "--model", "m")
    new2old = resharded("m", "out")
    before, after = (
        {k: v for file in sorted(Path(m).glob("*.safetensors")) for k, v in load_file(file).items()}
        for m in ("m", "out")
    )
    for layer, order in new2old.items():
        moe = f"language_model.model.layers.{layer}.block_sparse_moe."
        assert all(after[moe + name + ".weight"].equal(before[moe + name + ".weight"]) for name in cases.LATENT)
        assert after[moe + "gate.e_score_correction_bias"].equal(before[moe + "gate.e_score_correction_bias"][order])
        for new, old in enumerate(order):
            assert after[f"{moe}experts.{new}.w1.weight_packed"].equal(before[f"{moe}experts.{old}.w1.weight_packed"])
    undo_reshard(Path("out"), Path("back"))
    for file in Path("m").glob("*.safetensors"):
        assert Path("back", file.name).read_bytes() == file.read_bytes()


def test_loads_in_csv_are_summed_over_files() -> None:
    total_LE = cases.loads_as_csv()
    files = [f"expert_distribution_rank{rank}.csv" for rank in range(2)]
    for number, kind in enumerate(("sglang-recorder", "eplb")):
        run("trace", "--from", kind, *files, "-o", f"t{number}")
        trace = RoutingTrace.open(f"t{number}")
        assert trace.info.model_layers == (3, 4)
        np.testing.assert_array_equal(trace.load_counts()[1].sum(0), total_LE)
    run("trace", "--from", "eplb", "activations.csv", "-o", "t2")
    load_WLE = RoutingTrace.open("t2").load_counts()[1]
    assert load_WLE.sum(0).sum(1).tolist() == [400] * 4


@pytest.mark.parametrize("checkpoint", ["absolute", "parent"])
def test_names_do_not_leave_the_output(checkpoint: str) -> None:
    cases.leaving_names()
    before = {path: path.read_bytes() for path in Path("victim").rglob("*") if path.is_file()}
    assert "semmoe.json: a name of 'files' is 'shared/" in refused("reshard", "--undo", checkpoint, "-o", "out")
    assert not Path("out").exists()
    assert {path: path.read_bytes() for path in Path("victim").rglob("*") if path.is_file()} == before


def test_one_bad_record_is_left_out_and_counted() -> None:
    cases.one_bad_record()
    for name, kind, reason in (
        ("aborted", "vllm", "aborted requests"),
        ("error", "vllm", "error responses"),
        ("sglang", "sglang", "aborted requests"),
    ):
        run("trace", "--from", kind, f"{name}.jsonl", "-o", name)
        trace = RoutingTrace.open(name)
        assert trace.num_requests == 20 and f"'{reason}': 1" in str(trace.info.notes)
        assert reason.split()[0] in refused("trace", "--from", kind, f"{name}-only.jsonl", "-o", "none")


def test_loads_are_enough_to_place_by_load() -> None:
    cases.counts_of_a_recorder()
    run("trace", "--from", "sglang-recorder", "expert_distribution_recorder_1.pt", "--model", "config.json", "-o", "t")
    shown = json.loads(run("show", "t", "--json"))
    assert shown["layers_without_counts"] == [0, 1, 2] and shown["unused_expert_share"] < 0.02
    run("place", "t", "--ranks", "8", "--method", "load", "-o", "p")
    plan = Plan.load("p")
    assert plan.scores is None and any("traffic is not scored" in note for note in plan.notes)
    assert "needs routing per token" in refused("place", "t", "--ranks", "8", "--method", "semmoe", "-o", "q")


def test_patterns_follow_the_expert_that_they_name() -> None:
    cases.quantisation_patterns()
    traced("r.jsonl", "--model", "escaped")
    for model, written in (
        ("escaped", r"re:.*layers\.0\.mlp\.experts\.{}\..*"),
        ("group", "re:model.layers.0.mlp.experts.({}).*"),
    ):
        new = resharded(model, f"out-{model}")["0"].index(3)
        ignore = json.loads(Path(f"out-{model}", "config.json").read_text())["quantization_config"]["ignore"]
        assert ignore == ["lm_head", written.format(new)]
        whole = [
            name for name in load_file(Path(f"out-{model}", "model.safetensors")) if name.endswith("up_proj.weight")
        ]
        assert whole == [f"model.layers.0.mlp.experts.{new}.up_proj.weight"]


def test_ranks_need_not_divide_the_experts() -> None:
    cases.undivided_ranks()
    traced("e160.jsonl", "--model", "e160.json", out="t160")
    traced("e256.jsonl", "--model", "e256.json", out="t256")
    run("place", "t160", "--ranks", "12", "--method", "load", *FAST, "-o", "p160")
    run("place", "t256", "--ranks", "72", "--replicas", "1", "--method", "load", *FAST, "-o", "p256")
    run("place", "t256", "--ranks", "72", "--import", "sglang", "map288.json", "-o", "p288")
    shapes = {name: Plan.load(name).placement.experts_LRS.shape for name in ("p160", "p256", "p288")}
    assert shapes == {"p160": (2, 12, 14), "p256": (2, 72, 5), "p288": (2, 72, 4)}
    for name, num_experts in (("p160", 160), ("p256", 256), ("p288", 256)):
        for experts_RS in Plan.load(name).placement.experts_LRS:
            assert set(range(num_experts)) <= set(experts_RS.ravel().tolist())


def test_routing_as_data_and_shape() -> None:
    cases.data_and_shape()
    run("trace", "--from", "vllm", "r.jsonl", "-o", "t")
    batch = RoutingTrace.open("t").load()
    assert batch.num_requests == 10 and batch.expert_ids_TLK.shape == (230, 3, 4)
    np.testing.assert_array_equal(batch.expert_ids_TLK[:23], cases.grouped_ids(23, 3, 16, 4, seed=0))
    line = refused("trace", "--from", "vllm", "wrong.jsonl", "--strict", "-o", "u")
    assert re.search(r"line 4.*holds 276 values, its shape says \[23, 3, 5\]", line)


def test_scales_of_stacked_experts_move_with_them() -> None:
    cases.stacked_scales()
    traced("r.jsonl", "--model", "m")
    new2old = resharded("m", "out")
    before, after = load_file("m/model.safetensors"), load_file("out/model.safetensors")
    for name, tensor in before.items():
        layer = re.match(r"model\.layers\.(\d+)\.moe\.", name)
        expected = tensor[new2old[layer[1]]] if layer else tensor
        assert after[name].float().equal(expected.float()), name


def test_top_k_may_differ_by_layer() -> None:
    cases.top_k_per_layer()
    trace = traced("r.jsonl", "--model", "m")
    assert trace.info.top_k == 3 and trace.info.model_layers == (1, 3)
    ids_TLK = trace.load().expert_ids_TLK
    assert (ids_TLK[:, 0] < 8).all() and (np.sort(ids_TLK[:, 1], axis=1)[:, 2] == 8).all()
    assert set(resharded("m", "out")) == {"1", "3"}
    line = refused("trace", "--from", "sglang", "r.jsonl", "--model", "experts-differ.json", "-o", "u")
    assert "8 in layer 1; 4 in layer 3" in line


@pytest.mark.parametrize("ranks", [128, 256])
def test_traffic_of_many_ranks_is_counted(ranks: int) -> None:
    for name, seeds in (("t", range(100, 108)), ("later", range(8))):
        write_lines(Path("r.jsonl"), [cases.sglang_response(cases.wide_ids(seed), seed) for seed in seeds])
        traced("r.jsonl", out=name)
    run("place", "t", "--ranks", ranks, "--method", "contiguous", *FAST, "-o", "p")
    rank_TK = np.concatenate([cases.wide_ids(seed)[:, 0] for seed in range(8)]) // (256 // ranks)
    by_hand = np.mean([len(set(row)) for row in rank_TK]) * (1 - 1 / ranks)
    rows = json.loads(run("report", "p", "later", "--json"))["rows"]
    reported = next(row["rem"] for row in rows if (row["placement"], row["schedule"]) == ("plan", "random"))
    assert reported == pytest.approx(by_hand, abs=1e-6)


def test_tables_belong_to_one_plan() -> None:
    write_lines(Path("r.jsonl"), cases.responses(30, 32, 2, 16, 4))
    write_lines(Path("new.jsonl"), cases.responses(10, 32, 2, 16, 4, seed=7))
    traced("r.jsonl")
    traced("new.jsonl", out="t-new")
    for name, method in (("p", "spectral"), ("q", "load")):
        run("place", "t", "--ranks", "4", "--method", method, "--effort", "fast", "-o", name)
    run("report", "p", "t-new")
    Path("p", "tables.safetensors").write_bytes(Path("q", "tables.safetensors").read_bytes())
    for words in (("report", "p", "t-new"), ("show", "p"), ("export", "p", "--to", "sglang", "-o", "map.json")):
        assert "is the tables.safetensors of another plan" in refused(*words)


def test_a_flipped_bit_is_refused_by_every_reader() -> None:
    write_lines(Path("r.jsonl"), cases.responses(20, 40, 3, 16, 4))
    traced("r.jsonl")
    run("place", "t", "--ranks", "4", "--method", "contiguous", *FAST, "-o", "p")
    part = next(Path("t").glob("*.parquet"))
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 16
    part.write_bytes(data)
    place = ("place", "t", "--ranks", "4", "--method", "contiguous", *FAST, "-o", "q")
    for words in (("show", "t"), place, ("report", "t"), ("report", "p", "t")):
        assert f"{part.name} was changed after it was written" in refused(*words)


def test_a_second_import_into_a_trace_is_told_who_writes_it() -> None:
    for seed, name in enumerate(("start", "one", "two")):
        write_lines(Path(f"{name}.jsonl"), cases.responses(12, 16, 2, 8, 2, seed=seed))
    info = traced("start.jsonl").info
    writer = TraceWriter(Path("t"), info, resume=True)
    line = refused("trace", "--from", "sglang", "two.jsonl", "-o", "t", "--resume")
    assert "another run is writing t" in line
    writer.close()
    for name in ("one", "two"):
        run("trace", "--from", "sglang", f"{name}.jsonl", "-o", "t", "--resume")
    requests = RoutingTrace.open("t").requests().column("request_id").to_pylist()
    assert len(requests) == len(set(requests)) == 36


def test_a_trace_of_a_reshard_agrees_with_one_of_its_source() -> None:
    tensors = cases.qwen_tensors()
    cases.write_checkpoint("m", cases.QWEN3_MOE, {"model.safetensors": tensors})
    write_lines(Path("r.jsonl"), cases.responses(30, 24, 2, 8, 2))
    model = traced("r.jsonl", "--model", "m").load().expert_ids_TLK
    new2old = resharded("m", "placed")
    write_lines(Path("served.jsonl"), cases.relabelled(cases.responses(30, 24, 2, 8, 2), new2old))
    known = traced("served.jsonl", "--model", "placed", out="known")
    assert known.info.numbering == {"plan": Plan.load("p-placed").fingerprint, "mapped_back": True}
    np.testing.assert_array_equal(np.sort(known.load().expert_ids_TLK), np.sort(model))
    write_lines(Path("later.jsonl"), cases.relabelled(cases.responses(30, 24, 2, 8, 2, seed=3), new2old))
    traced("later.jsonl", out="unknown")
    assert "import again with --model CHECKPOINT" in refused("report", "p-placed", "unknown")
    traced("later.jsonl", "--model", "placed", out="later")
    assert json.loads(run("report", "p-placed", "later", "--json"))["requests"] == 30


def test_a_reshard_in_ranks_is_named_where_a_model_is_asked_for() -> None:
    cases.stacked_scales()
    traced("r.jsonl", "--model", "m")
    run("place", "t", "--ranks", "2", "--method", "spectral", *FAST, "-o", "p")
    run("reshard", "m", "p", "--layout", "ranks", "-o", "ranks")
    write_lines(Path("texts.jsonl"), [{"text": "w3 w4"}])
    line = refused("trace", "ranks", "--data", "texts.jsonl", "-o", "u")
    assert "reshard of layout ranks" in line and "semmoe reshard --undo" in line
    assert find_relabelling("ranks") is None
