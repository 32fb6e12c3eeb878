"""Importers: every kind of engine file, in every shape, gives the routing that went in."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from engine_samples import (
    NUM_EXPERTS,
    NUM_LAYERS,
    TOP_K,
    config,
    count_pass,
    megatron_lines,
    npy64,
    raw64,
    routing,
    save_recording,
    sglang_record,
    slot_map,
    token_pass,
    write_lines,
    write_statistics,
)

from semmoe.profiles.engines.columns import parse_layers, plausible_num_experts
from semmoe.profiles.engines.imports import KINDS, ImportOptions, import_trace
from semmoe.profiles.errors import InputError
from semmoe.profiles.trace import RoutingTrace

SHARED = Path(__file__).parents[4] / "shared" / "traces"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="the shared traces are not here")


def read(kind, files, tmp_path, **options):
    """Import and load again: the summary, the trace, its one batch."""
    files = files if isinstance(files, list) else [files]
    summary = import_trace(kind, files, tmp_path / "out", ImportOptions(made_by="test", **options))
    trace = RoutingTrace.open(tmp_path / "out")
    return summary, trace, trace.load() if trace.info.kind == "tokens" else None


def write_config(tmp_path, **extra):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config(**extra)))
    return str(path)


def refuses(kind, files, tmp_path, message, **options):
    with pytest.raises(InputError, match=message):
        import_trace(kind, files if isinstance(files, list) else [files], tmp_path / "out", ImportOptions(**options))
    assert not (tmp_path / "out").exists()


# --- SGLang ---


def test_sglang_generate_shape(tmp_path):
    ids, later = routing(40), routing(6, seed=1)
    record = sglang_record(ids, domain="math", model="m")
    file = write_lines(tmp_path / "a.jsonl", [record, sglang_record(later, name="r1", start=4, prompt=5)])
    summary, trace, batch = read("sglang", file, tmp_path)
    assert summary[:3] == (2, 46, 4)
    info = trace.info
    assert (info.model, info.num_experts, info.top_k, info.num_model_layers) == ("m", 16, 3, 5)
    assert info.model_layers == (1, 2, 3, 4)
    np.testing.assert_array_equal(batch.expert_ids_TLK, np.concatenate([ids, later])[:, 1:])
    assert batch.request_ids == ["r0", "r1"] and batch.domains == ["math", ""]
    assert batch.sequence(0).tolist() == list(range(100, 141)) and batch.token_ids_T[:40].tolist() == list(
        range(100, 140)
    )
    assert batch.is_prompt_T.sum() == 3 + 1 and batch.first_position_B.tolist() == [0, 4]


@pytest.mark.parametrize("key", ["sglext", "sgl_ext"])
def test_sglang_openai_shape_with_several_choices(tmp_path, key):
    ids, other = routing(40), routing(11, seed=1)
    choices = [
        {"index": i, key: {"routed_experts": raw64(x), "routed_experts_shape": list(x.shape)}}
        for i, x in enumerate((ids, other))
    ]
    response = {
        "id": "cmpl-1",
        "model": "m",
        "choices": choices,
        "usage": {"prompt_tokens": 9, "completion_tokens": 32},
    }
    _, _, batch = read("sglang", write_lines(tmp_path / "a.jsonl", [response]), tmp_path)
    assert batch.request_ids == ["cmpl-1/0", "cmpl-1/1"]
    np.testing.assert_array_equal(batch.expert_ids_TLK, np.concatenate([ids, other])[:, 1:])
    assert batch.num_prompt_tokens_B.tolist() == [9, 9] and len(batch.sequence(0)) == 0


def test_sglang_lists_gzip_and_whole_documents(tmp_path):
    records = [sglang_record(routing(20, seed=s), name=f"r{s}") for s in range(4)]
    packed = tmp_path / "packed.log"
    packed.write_bytes(gzip.compress(json.dumps(records[:3]).encode() + b"\n\n" + json.dumps(records[3]).encode()))
    pretty = tmp_path / "pretty.json"
    pretty.write_text(
        json.dumps([dict(r, meta_info=dict(r["meta_info"], id=f"p{i}")) for i, r in enumerate(records)], indent=1)
    )
    summary, _, batch = read("sglang", [packed, pretty], tmp_path)
    assert summary.requests == 8 and batch.request_ids[:4] == ["r0", "r1", "r2", "r3"]


def test_sglang_shape_from_the_model_or_from_a_record_before(tmp_path):
    ids = routing(40)
    bare = write_lines(tmp_path / "bare.jsonl", [sglang_record(ids, shape=False)])
    refuses("sglang", bare, tmp_path, r"bare.jsonl, line 1: no routed_experts_shape; name the model's config.json")
    _, trace, batch = read("sglang", bare, tmp_path, model_config=write_config(tmp_path))
    np.testing.assert_array_equal(batch.expert_ids_TLK, ids[:, 1:])
    assert trace.info.vocab_size == 500 and trace.info.model_type == "deepseek_v2"
    both = write_lines(tmp_path / "both.jsonl", [sglang_record(ids), sglang_record(ids, shape=False, name="r1")])
    assert import_trace("sglang", [both], tmp_path / "out2").tokens == 80


def test_sglang_rows_must_end_one_before_the_sequence(tmp_path):
    record = sglang_record(routing(40))
    record["output_ids"].append(1)  # a response does not say its start: 40 rows of 42 tokens start at 1
    _, _, batch = read("sglang", write_lines(tmp_path / "a.jsonl", [record]), tmp_path)
    assert batch.first_position_B.tolist() == [1]
    record["meta_info"]["routed_experts_start_len"] = 0
    message = r"b.jsonl, line 1: 40 rows from position 0, expected 41 for 3 prompt and 39 generated"
    with pytest.raises(InputError, match=message):
        import_trace("sglang", [write_lines(tmp_path / "b.jsonl", [record])], tmp_path / "b")
    record["output_ids"] = record["output_ids"][:5]
    record["meta_info"].pop("routed_experts_start_len")
    with pytest.raises(InputError, match="40 rows from position 0, expected 7 "):
        import_trace("sglang", [write_lines(tmp_path / "c.jsonl", [record])], tmp_path / "c")


# --- vLLM ---


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_vllm_http_shape(tmp_path, dtype):
    ids = routing(40)
    choice = {"index": 0, "routed_experts": npy64(ids, dtype), "token_ids": list(range(11))}
    response = {"id": "chat-1", "model": "m", "prompt_token_ids": list(range(30)), "choices": [choice]}
    _, trace, batch = read("vllm", write_lines(tmp_path / "a.jsonl", [response]), tmp_path)
    np.testing.assert_array_equal(batch.expert_ids_TLK, ids[:, 1:])
    assert trace.info.model == "m" and batch.num_prompt_tokens_B.tolist() == [30] and len(batch.sequence(0)) == 41


def test_vllm_offline_shapes(tmp_path):
    ids = routing(40)
    whole = {"index": 0, "token_ids": list(range(11)), "routed_experts": npy64(ids)}
    split = {"index": 0, "token_ids": list(range(11)), "routed_experts": ids[30:].tolist()}
    records = [
        {"request_id": "a", "prompt_token_ids": list(range(30)), "outputs": [whole, {**whole, "index": 1}]},
        {"request_id": "b", "prompt_routed_experts": ids[:30].tolist(), "outputs": [split]},
        {"request_id": "c", "routed_experts": npy64(ids[4:]), "routed_experts_prompt_start": 4},
    ]
    _, _, batch = read("vllm", write_lines(tmp_path / "a.jsonl", records), tmp_path)
    assert batch.request_ids == ["a/0", "a/1", "b", "c"]
    np.testing.assert_array_equal(batch.expert_ids_TLK, np.concatenate([ids, ids, ids, ids[4:]])[:, 1:])
    # The last response does not tell how long its prompt is: all rows are prompt.
    assert batch.num_prompt_tokens_B.tolist() == [30, 30, 30, 40] and batch.first_position_B.tolist() == [0, 0, 0, 4]


def test_vllm_generated_ids_that_are_missing_leave_no_half_sequence(tmp_path):
    response = {"prompt_token_ids": [1, 2, 3], "choices": [{"index": 0, "routed_experts": npy64(routing(40))}]}
    _, _, batch = read("vllm", write_lines(tmp_path / "a.jsonl", [response]), tmp_path)
    assert batch.request_ids == ["a.jsonl:1"] and len(batch.sequence(0)) == 0 and batch.num_prompt_tokens_B[0] == 3


# --- layers, columns, dummies ---


def test_dense_layers_named_taken_from_the_model_or_detected(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [sglang_record(routing(40, dense=(0, 3)))])
    by_config = {"model_config": write_config(tmp_path, moe_layer_freq=[0, 1, 1, 0, 1])}
    for i, options in enumerate(({}, {"dense_layers": "0,3"}, by_config)):
        import_trace("sglang", [file], tmp_path / f"t{i}", ImportOptions(**options))
        assert RoutingTrace.open(tmp_path / f"t{i}").info.model_layers == (1, 2, 4)
    refuses(
        "sglang", file, tmp_path, r"line 1, row 0: layer 1 is taken as dense but routes to expert", dense_layers="0-1,3"
    )
    refuses("sglang", file, tmp_path, "layer 3: expert 0 twice in one row; a dense layer", dense_layers="0")
    refuses("sglang", file, tmp_path, "dense layer 7 is not in the records: they hold layers 0..4", dense_layers="7")
    refuses("sglang", file, tmp_path, "none of the 5 layers in the records routes", dense_layers="0-4")
    assert parse_layers("0-2, 5") == {0, 1, 2, 5}
    for bad in ("", "a", "3-1", "1-", "-1", "1,,2"):
        with pytest.raises(InputError, match="neither a layer"):
            parse_layers(bad)


def test_top_1_tells_dense_layers_by_the_whole_file(tmp_path):
    ids = routing(30, top_k=1, num_experts=8)
    ids[:20, 2] = 0  # the first request alone would take layer 2 for dense
    records = [sglang_record(ids[:10], name="a"), sglang_record(ids[10:], name="b")]
    _, trace, batch = read("sglang", write_lines(tmp_path / "a.jsonl", records), tmp_path)
    assert trace.info.model_layers == (1, 2, 3, 4) and trace.info.top_k == 1
    np.testing.assert_array_equal(batch.expert_ids_TLK, ids[:, 1:])


def test_padding_columns_are_cut_and_empty_slots_kept(tmp_path):
    ids = routing(40)
    wide = np.concatenate([ids, np.full((40, NUM_LAYERS, 5), -1, np.int32)], axis=2)
    _, trace, batch = read("sglang", write_lines(tmp_path / "a.jsonl", [sglang_record(wide)]), tmp_path)
    assert trace.info.top_k == TOP_K and not trace.info.empty_slots
    np.testing.assert_array_equal(batch.expert_ids_TLK, ids[:, 1:])
    ids[7, 2, 1] = -1
    file = write_lines(tmp_path / "b.jsonl", [sglang_record(ids)])
    import_trace("sglang", [file], tmp_path / "b")
    trace = RoutingTrace.open(tmp_path / "b")
    assert trace.info.empty_slots and trace.load().expert_ids_TLK[7, 1, 1] == NUM_EXPERTS
    with pytest.raises(
        InputError, match=r"line 1, row 7, layer 2: no expert \(-1\), in a model whose every slot has one"
    ):
        import_trace("sglang", [file], tmp_path / "c", ImportOptions(model_config=write_config(tmp_path)))


def test_identity_experts_past_the_last_become_empty_slots(tmp_path):
    path = tmp_path / "longcat.json"
    facts = {
        "model_type": "longcat_flash",
        "n_routed_experts": 16,
        "zero_expert_num": 8,
        "moe_topk": 3,
        "num_layers": 5,
    }
    path.write_text(json.dumps(facts))
    ids = routing(40, num_experts=24, dense=())
    file = write_lines(tmp_path / "a.jsonl", [sglang_record(ids)])
    _, trace, batch = read("sglang", file, tmp_path, model_config=str(path))
    np.testing.assert_array_equal(batch.expert_ids_TLK, np.minimum(ids, 16))
    assert trace.info.empty_slots and trace.info.num_experts == 16


def test_the_model_must_fit_the_records(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [sglang_record(routing(40))])

    def refuse(message, **extra):
        refuses("sglang", file, tmp_path, message, model_config=write_config(tmp_path, **extra))

    refuse("the records are 3 ids wide, the model routes to 4: ids are lost", num_experts_per_tok=4)
    refuse("the records hold 5 layers, the model has 9, of which 8 route", num_hidden_layers=9)
    refuse(r"a.jsonl, line 1, row \d+, layer \d: expert 15 is outside 0..14", n_routed_experts=15)
    refuse(r"row 0, layer 1: expert \d+ past the top-2 of the model", num_experts_per_tok=2)


def test_records_of_routed_layers_only(tmp_path):
    ids = routing(40)[:, 1:]
    _, trace, batch = read(
        "sglang", write_lines(tmp_path / "a.jsonl", [sglang_record(ids)]), tmp_path, model_config=write_config(tmp_path)
    )
    assert trace.info.model_layers == (1, 2, 3, 4) and trace.info.num_model_layers == 5
    np.testing.assert_array_equal(batch.expert_ids_TLK, ids)


def test_warm_up_rows_are_left_out_and_counted(tmp_path):
    def blanked(num_rows, rows, value, seed):
        ids = routing(num_rows, seed=seed, num_layers=8)
        ids[rows, 1:] = value
        ids[rows, 0] = np.minimum(0, value)  # the dense layer is 0 or -1 whatever the others say
        return ids

    same = np.arange(TOP_K)  # what a router of equal logits picks, in every layer
    parts = [
        blanked(20, slice(0, 5), 0, 0),
        blanked(20, slice(18, 20), -1, 1),
        blanked(20, slice(8, 10), same, 2),
        blanked(4, slice(0, 4), 0, 3),
    ]
    file = write_lines(tmp_path / "a.jsonl", [sglang_record(x, name=f"r{i}") for i, x in enumerate(parts)])
    summary, trace, batch = read("sglang", file, tmp_path)
    assert summary.dropped == {"warm-up rows": 5 + 2 + 2 + 4, "requests without rows": 1}
    assert batch.request_ids == ["r0", "r1", "r2", "r2@10"] and summary.requests == 4
    assert batch.first_position_B.tolist() == [5, 0, 0, 10] and not trace.info.empty_slots
    kept = [parts[0][5:], parts[1][:18], parts[2][:8], parts[2][10:]]
    np.testing.assert_array_equal(batch.expert_ids_TLK, np.concatenate(kept)[:, 1:])
    assert batch.token_ids_T[0] == 105


def test_two_small_layers_that_agree_by_chance_are_no_dummies(tmp_path):
    ids = routing(200, num_layers=2, num_experts=4, top_k=2, dense=())
    assert (ids[:, 0] == ids[:, 1]).all(axis=1).any()
    summary, _, _ = read("sglang", write_lines(tmp_path / "a.jsonl", [sglang_record(ids)]), tmp_path)
    assert summary.tokens == 200 and not summary.dropped


# --- options ---


def test_repetition_domain_max_tokens_and_names(tmp_path):
    ids = routing(40)
    records = [sglang_record(ids, name="x", domain="a", repetition=i == 1) for i in range(3)]
    del records[2]["meta_info"]["id"]
    file = write_lines(tmp_path / "a.jsonl", [*records, {**records[0], "rid": 7}])
    summary, _, batch = read("sglang", file, tmp_path, domain="b", max_tokens=130)
    assert batch.request_ids == ["x", "x#2", "a.jsonl:3", "x#3"] and set(batch.domains) == {"b"}
    assert summary.tokens == 130 and np.diff(batch.starts_B1).tolist() == [40, 40, 40, 10]
    assert any("1 requests are marked as loops: kept" in n for n in summary.notes)
    assert any(n.startswith("2 requests had an id that came before") for n in summary.notes)
    dropping = import_trace("sglang", [file], tmp_path / "d", ImportOptions(repetition="drop"))
    assert dropping.dropped == {"requests that fell into a loop": 1} and dropping.requests == 3
    # A name keeps its number where a loop before it is left out: both imports agree.
    assert RoutingTrace.open(tmp_path / "d").load().request_ids == ["x", "a.jsonl:3", "x#3"]


def test_wrong_options_are_refused(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [sglang_record(routing(4))])
    refuses("sgl", file, tmp_path, "unknown kind 'sgl': expected one of sglang, vllm")
    refuses("sglang", file, tmp_path, "repetition is 'skip'", repetition="skip")
    refuses("sglang", file, tmp_path, "max-tokens is 0", max_tokens=0)
    refuses("sglang", [], tmp_path, "no files to import")
    looped = write_lines(tmp_path / "b.jsonl", [sglang_record(routing(4), repetition=True)])
    refuses("sglang", looped, tmp_path, "no request is left to write: 1 requests that fell", repetition="drop")
    import_trace("sglang", [file], tmp_path / "there")
    with pytest.raises(InputError, match="is there already"):
        import_trace("sglang", [file], tmp_path / "there")
    refuses("eplb", tmp_path / "nothing", tmp_path, "nothing does not exist")
    with pytest.raises(InputError, match="is not UTF-8"):
        import_trace("sglang", [file], tmp_path / os.fsdecode(b"\xff"))


def test_number_of_experts_from_the_largest_id():
    seen = {0: 2, 3: 4, 4: 8, 30: 32, 31: 32, 58: 60, 59: 60, 60: 64, 63: 64, 126: 128, 159: 160, 380: 384}
    assert {largest: plausible_num_experts(largest) for largest in seen} == seen
    assert set(KINDS) == {"sglang", "vllm", "sglang-recorder", "trtllm", "megatron", "eplb"}


# --- SGLang's recorder ---


def test_recorder_per_token(tmp_path):
    map_LS = slot_map()
    prefill, decode, other = routing(30), routing(4, seed=1), routing(6, seed=2)
    records = [token_pass(prefill, map_LS, extend=[18, 12], padding=2), token_pass(decode, map_LS, number=2)]
    first = save_recording(tmp_path / "expert_distribution_recorder_1_0.pt", records, map_LS)
    again = [
        token_pass(prefill, map_LS, extend=[18, 12], rank=1, padding=2),
        token_pass(other, map_LS, number=2, rank=1),
    ]
    save_recording(tmp_path / "expert_distribution_recorder_1_1.pt", again, map_LS)
    summary, trace, batch = read("sglang-recorder", tmp_path, tmp_path)
    assert batch.request_ids == ["rank0-pass1-0", "rank0-pass1-1", "rank0-pass2-0", "rank1-pass2-0"]
    np.testing.assert_array_equal(batch.expert_ids_TLK, np.concatenate([prefill, decode, other])[:, 1:])
    assert (trace.info.num_experts, trace.info.top_k, trace.info.model_layers) == (16, TOP_K, (1, 2, 3, 4))
    assert summary.dropped == {"passes that another rank recorded alike": 1}
    assert batch.num_prompt_tokens_B.tolist() == [18, 12, 0, 0] and batch.sequence(1).tolist() == list(range(68, 80))
    refuses(
        "sglang-recorder", first, tmp_path / "x", "the records are 8 ids wide, the model routes to 10",
        model_config=write_config(tmp_path, num_experts_per_tok=10),
    )  # fmt: skip


def test_recorder_per_pass_adds_up_ranks_and_replicas(tmp_path):
    map_LS, rng = slot_map(), np.random.default_rng(5)
    slots = rng.integers(0, 9, (2, 2, *map_LS.shape))  # [rank, pass, L, S]
    slots[:, :, 0] = 0
    slots[1, 1] = 0
    files = [
        save_recording(tmp_path / f"{r}.pt", [count_pass(slots[r, p], number=p, rank=r) for p in (0, 1)], map_LS)
        for r in (0, 1)
    ]
    summary, trace, _ = read("sglang-recorder", files, tmp_path)
    windows, load = trace.load_counts()
    expected = np.zeros((2, NUM_LAYERS, NUM_EXPERTS), np.int64)
    for p in (0, 1):
        for layer in range(NUM_LAYERS):
            np.add.at(expected[p, layer], map_LS[layer], slots[:, p, layer].sum(axis=0))
    assert windows == ["pass 0", "pass 1"] and trace.info.kind == "counts" and summary.layers == 4
    np.testing.assert_array_equal(load, expected[:, 1:])
    assert trace.info.notes["top_k"] == "unknown" and any("top-k" in n for n in summary.notes)


def test_recorder_stat_drops_unused_steps(tmp_path):
    import torch

    load = np.random.default_rng(6).integers(0, 9, (6, NUM_LAYERS, NUM_EXPERTS)).astype(np.int32)
    load[4:] = 0
    load[:, 0] = 0
    torch.save({"rank": 0, "logical_count": torch.from_numpy(load), "average_utilization_rate_over_window": None},
               tmp_path / "s.pt")  # fmt: skip
    summary, trace, _ = read("sglang-recorder", tmp_path / "s.pt", tmp_path, model_config=write_config(tmp_path))
    windows, counts = trace.load_counts()
    assert len(windows) == 4 and summary.dropped == {"windows without activations": 2} and trace.info.top_k == TOP_K
    np.testing.assert_array_equal(counts, load[:4, 1:])
    token = save_recording(tmp_path / "t.pt", [token_pass(routing(4), slot_map())], slot_map())
    refuses("sglang-recorder", [token, tmp_path / "s.pt"], tmp_path / "x", "mode per_token.*mode stat: import one mode")
    refuses("sglang-recorder", tmp_path / "s.pt", tmp_path / "x", "no domain or max-tokens applies", domain="d")


# --- TensorRT-LLM, Megatron, EPLB ---


def test_trtllm_adds_up_ranks(tmp_path):
    load = np.random.default_rng(7).integers(0, 99, (3, 4, NUM_EXPERTS))
    folder = write_statistics(tmp_path / "stats", load, [1, 2, 3, 4])
    _, trace, _ = read("trtllm", folder, tmp_path)
    windows, counts = trace.load_counts()
    assert windows == ["100", "101", "102"] and trace.info.model_layers == (1, 2, 3, 4) and trace.info.top_k == TOP_K
    np.testing.assert_array_equal(counts, load)
    (folder / "rank0.safetensors").rename(folder / "rank2.safetensors")
    refuses("trtllm", folder, tmp_path / "x", "lacks rank0.safetensors: loads add up over all ranks")


def test_megatron_steps_ranks_micro_batches_and_mtp(tmp_path):
    parts = [routing(n, seed=n, dense=()) for n in (6, 7, 8)]
    draft = megatron_lines(routing(6, num_layers=1, dense=()), layers=[0], block="mtp", mtp_idx=0)
    zero = [*megatron_lines(parts[0]), *draft, *megatron_lines(parts[1])]  # two micro-batches of step 0
    write_lines(tmp_path / "router_trace_rank0.jsonl", zero)
    write_lines(tmp_path / "router_trace_rank1.jsonl", megatron_lines(parts[2], rank=1))
    summary, trace, batch = read("megatron", tmp_path, tmp_path)
    assert batch.request_ids == ["rank0-step0", "rank0-step0-batch1", "rank1-step0"]
    assert summary.dropped == {"lines of multi-token-prediction layers": 1} and trace.info.model_layers == tuple(
        range(5)
    )
    np.testing.assert_array_equal(batch.expert_ids_TLK, np.concatenate(parts))


def test_megatron_layers_counted_from_one_and_pipelines(tmp_path):
    ids = routing(9, num_layers=4, dense=())
    file = write_lines(tmp_path / "a.jsonl", megatron_lines(ids, layers=[2, 3, 4, 5]))
    _, trace, _ = read("megatron", file, tmp_path, model_config=write_config(tmp_path))
    assert trace.info.model_layers == (1, 2, 3, 4)
    other = write_lines(tmp_path / "b.jsonl", megatron_lines(ids, layers=[6, 7, 8, 9], rank=1))
    refuses("megatron", [file, other], tmp_path / "x", r"b.jsonl, line 1: layers 6..9, the records before it hold 2..5")
    cut = write_lines(tmp_path / "c.jsonl", [*megatron_lines(ids), *megatron_lines(ids, step=1)[:2]])
    assert import_trace("megatron", [cut], tmp_path / "c").dropped == {"steps that lack layers": 1}
    with pytest.raises(InputError, match="line 5: a step that is cut off, it lacks layer 2, 3"):
        import_trace("megatron", [cut], tmp_path / "x", ImportOptions(strict=True))


def test_eplb_matrices_in_every_container(tmp_path):
    import torch

    load = np.random.default_rng(8).integers(1, 99, (3, 4, NUM_EXPERTS))
    np.save(tmp_path / "a.npy", load.astype(np.float32))
    torch.save({"logical_count": torch.from_numpy(load)}, tmp_path / "b.pt")
    (tmp_path / "c.json").write_text(json.dumps({"logical_count": load.tolist(), "other": 1}))
    (tmp_path / "d.json").write_text(json.dumps(load[0].tolist()))
    for name in ("a.npy", "b.pt", "c.json", "d.json"):
        import_trace("eplb", [tmp_path / name], tmp_path / f"{name}.t")
        windows, counts = RoutingTrace.open(tmp_path / f"{name}.t").load_counts()
        np.testing.assert_array_equal(counts, load if name != "d.json" else load[:1])
    assert windows == ["d"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[1, 2], [3]], "rows of unequal length"),
        ([1, 2], "a matrix with 1 axes"),
        ([[0.5, 1.0]], "has type float64"),
        ([["a", "b"]], "expected integers"),
        ([[1, 2], [3, -4]], "layer 1, expert 1: a load of -4"),
        ([[0, 0], [0, 0]], "every load is zero"),
        ({"count": []}, r"keys \['count'\], expected logical_count"),
    ],
)
def test_eplb_values_that_cannot_be(tmp_path, value, message):
    (tmp_path / "a.json").write_text(json.dumps(value))
    refuses("eplb", tmp_path / "a.json", tmp_path, f"a.json.*{message}")


# --- the shared traces ---


@needs_shared
def test_shared_gpt_oss(tmp_path):
    file = SHARED / "gpt-oss-20b.sglang.jsonl.gz"
    summary, trace, batch = read("sglang", file, tmp_path)
    assert summary[:4] == (314, 94_827, 24, {}) and (trace.info.num_experts, trace.info.top_k) == (32, 4)
    assert not batch.is_prompt_T.any() and (batch.token_ids_T >= 0).all()
    assert any("101 requests are marked as loops" in n for n in summary.notes)
    dropped = import_trace("sglang", [file], tmp_path / "d", ImportOptions(repetition="drop"))
    assert dropped.requests == 213 and dropped.dropped == {"requests that fell into a loop": 101}


@needs_shared
def test_shared_v2_lite(tmp_path):
    summary, trace, batch = read("vllm", SHARED / "deepseek-v2-lite.vllm.jsonl.gz", tmp_path)
    assert summary.tokens == 11_771 and summary.layers == 26
    assert trace.info.model_layers == tuple(range(1, 27)) and (trace.info.num_experts, trace.info.top_k) == (64, 6)
    assert set(batch.domains) == {"intent", "summary", "translation"} and batch.is_prompt_T.all()
