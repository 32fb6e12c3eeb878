"""Every way in which servers write the same array of routed experts."""

import base64
import json

import numpy as np
import pytest
from engine_samples import config, routing, sglang_record, write_lines

from semmoe.profiles.engines.imports import ImportOptions, import_trace
from semmoe.profiles.errors import InputError
from semmoe.profiles.trace import RoutingTrace

IDS = routing(23, num_layers=3, dense=(), top_k=4)


def text(dtype):
    return base64.b64encode(IDS.astype(dtype).tobytes()).decode()


def record(kind, routed):
    tokens = {"prompt_token_ids": list(range(12)), "token_ids": list(range(12))}
    if kind == "vllm":
        return {"id": "c", "choices": [{"index": 0, "routed_experts": routed, **tokens}]}
    return {"output_ids": tokens["token_ids"], "prompt_token_ids": tokens["prompt_token_ids"]} | {
        "meta_info": {"id": "c", "routed_experts": routed}
    }


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
@pytest.mark.parametrize(
    "routed",
    [
        {"data": text("<i4"), "shape": [23, 3, 4], "dtype": "int32"},
        {"data": text("<i4"), "shape": [23, 3, 4]},
        {"data": text("u1"), "shape": [23, 3, 4]},
        {"data": text("<u2"), "shape": [23, 3, 4], "dtype": "torch.uint16"},
        {"data": text(">i8"), "shape": [23, 3, 4], "dtype": ">i8"},
        {"data": IDS.reshape(-1).tolist(), "shape": [23, 3, 4]},
        IDS.tolist(),
    ],
    ids=["dtype", "int32", "uint8", "torch", "big-endian", "list", "nested"],
)
def test_an_object_of_data_and_shape(tmp_path, kind, routed):
    import_trace(kind, [write_lines(tmp_path / "r.jsonl", [record(kind, routed)])], tmp_path / "t")
    np.testing.assert_array_equal(RoutingTrace.open(tmp_path / "t").load().expert_ids_TLK, IDS)


@pytest.mark.parametrize(
    ("routed", "message"),
    [
        (
            {"data": text("<i4"), "shape": [22, 3, 4], "dtype": "int32"},
            r"holds 276 values, its shape says \[22, 3, 4\]",
        ),
        ({"data": text("<i4"), "shape": [23, 12]}, "expected integers with 3 axes"),
        ({"data": text("<i4"), "shape": [23, 3, -4]}, "expected sizes from 0"),
        ({"data": text("<i4"), "shape": "x"}, "routed_experts.shape has type"),
        ({"data": text("<i4"), "shape": [23, 3, 4], "dtype": "float32"}, 'dtype is "float32", expected one of int8'),
        ({"data": text("<i4")[:-4], "shape": [23, 3, 4], "dtype": "int32"}, "expected values of 4 bytes"),
        ({"data": 3, "shape": [23, 3, 4]}, "routed_experts is 3, expected base64"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, routed, message):
    file = write_lines(tmp_path / "r.jsonl", [record("vllm", routed)])
    with pytest.raises(InputError, match=f"r.jsonl, line 1.*{message}"):
        import_trace("vllm", [file], tmp_path / "t", ImportOptions())


@pytest.mark.parametrize("with_model", [True, False])
def test_a_fused_shared_expert_is_a_last_column(tmp_path, with_model):
    ids = [routing(20, seed=seed) for seed in range(6)]
    wide = [np.concatenate([x, np.full((20, 5, 1), 16)], axis=2) for x in ids]
    for x in wide:
        x[:, 0] = 0  # the dense layer
    records = [sglang_record(x, name=f"r{i}") for i, x in enumerate(wide)]
    (tmp_path / "config.json").write_text(json.dumps(config()))
    options = ImportOptions(model_config=str(tmp_path) if with_model else None)
    summary = import_trace("sglang", [write_lines(tmp_path / "r.jsonl", records)], tmp_path / "t", options)
    trace = RoutingTrace.open(tmp_path / "t")
    assert (trace.info.top_k, trace.info.num_experts) == (3, 16) and any("fused shared" in n for n in summary.notes)
    np.testing.assert_array_equal(trace.load().expert_ids_TLK, np.concatenate(ids)[:, 1:])


def test_a_prompt_without_an_answer_has_a_row_for_each_token(tmp_path):
    answer = record("vllm", IDS.tolist())
    answer["choices"][0].update(prompt_token_ids=list(range(23)), token_ids=[])
    import_trace("vllm", [write_lines(tmp_path / "r.jsonl", [answer])], tmp_path / "t")
    batch = RoutingTrace.open(tmp_path / "t").load()
    assert batch.num_tokens == 23 and batch.first_position_B.tolist() == [0] and batch.is_prompt_T.all()


def test_prompts_whose_rows_are_zero_keep_their_answers(tmp_path):
    ids = IDS.copy()
    ids[:12] = 0
    summary = import_trace("vllm", [write_lines(tmp_path / "r.jsonl", [record("vllm", ids.tolist())])], tmp_path / "t")
    batch = RoutingTrace.open(tmp_path / "t").load()
    assert batch.first_position_B.tolist() == [12] and summary.dropped == {"warm-up rows": 12}
    np.testing.assert_array_equal(batch.expert_ids_TLK, IDS[12:])


@pytest.mark.parametrize("spelled", [-1, 0, 20])
def test_zero_experts_in_every_spelling(tmp_path, spelled):
    facts = {
        "model_type": "longcat_flash",
        "n_routed_experts": 16,
        "zero_expert_num": 8,
        "moe_topk": 4,
        "num_layers": 3,
    }
    (tmp_path / "config.json").write_text(json.dumps(facts))
    ids = IDS.copy()
    ids[:, :, 2] = np.where((ids == 0).any(axis=2), 0 if spelled == 0 else ids[:, :, 2], 0)  # expert 0 is chosen too
    ids = np.where((ids == 0) & (np.cumsum(ids == 0, axis=2) > 1), 17, ids)
    expected = np.minimum(ids, 16)
    expected[:, :, 3] = 16
    ids[:, :, 3] = spelled if spelled else 0
    written = np.where(ids == 17, spelled, ids)
    import_trace(
        "vllm",
        [write_lines(tmp_path / "r.jsonl", [record("vllm", written.tolist())])],
        tmp_path / "t",
        ImportOptions(model_config=str(tmp_path)),
    )
    got = RoutingTrace.open(tmp_path / "t").load().expert_ids_TLK
    np.testing.assert_array_equal(np.sort(got, axis=2), np.sort(expected, axis=2))


def test_tensors_that_numpy_has_not_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    plain = torch.ones(3, 8)
    for tensor in (plain.to(torch.bfloat16), plain.to_sparse(), plain.to("meta")):
        torch.save(tensor, tmp_path / "load.pt")
        with pytest.raises(InputError, match="no plain tensor of integers|cannot be loaded"):
            import_trace("eplb", [tmp_path / "load.pt"], tmp_path / "t")


def test_flags_are_no_ids(tmp_path):
    routed = IDS.tolist()
    routed[2][1][0] = True
    file = write_lines(tmp_path / "in.jsonl", [record("vllm", routed)])
    with pytest.raises(InputError, match="holds true or false"):
        import_trace("vllm", [file], tmp_path / "t", options=ImportOptions(strict=True))
