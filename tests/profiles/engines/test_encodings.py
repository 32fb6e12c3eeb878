"""Every way in which servers write the same array of routed experts."""

import base64

import numpy as np
import pytest
from engine_samples import routing, write_lines

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
