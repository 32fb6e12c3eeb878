"""Loads as CSV and as JSON lists, of one file a rank or of single activations."""

import json

import numpy as np
import pytest

from semmoe.profiles.engines.imports import ImportOptions, import_trace
from semmoe.profiles.errors import InputError
from semmoe.profiles.trace import RoutingTrace

COUNT_RLE = np.random.default_rng(0).integers(1, 900, (2, 2, 16))


def loads(kind, files, tmp_path):
    summary = import_trace(kind, files, tmp_path / "t", ImportOptions())
    trace = RoutingTrace.open(tmp_path / "t")
    assert summary.layers == trace.info.num_layers
    return trace.info.model_layers, trace.load_counts()[1].sum(axis=0)


@pytest.mark.parametrize("kind", ["eplb", "sglang-recorder"])
@pytest.mark.parametrize(("mark", "head"), [(",", "layer_id,expert_id,count"), ("\t", "Layer\tExpert\tLoad")])
def test_a_file_a_rank_adds_up(tmp_path, kind, mark, head):
    files = [tmp_path / f"rank{rank}.csv" for rank in range(2)]
    for count_LE, file in zip(COUNT_RLE, files, strict=True):
        rows = [mark.join(map(str, (layer + 3, e, count_LE[layer, e]))) for layer in range(2) for e in range(16)]
        file.write_text("\n".join([head, *rows[::-1]]) + "\n")
    layers, load_LE = loads(kind, files, tmp_path)
    assert layers == (3, 4)
    np.testing.assert_array_equal(load_LE, COUNT_RLE.sum(axis=0))


def test_a_line_an_activation_and_a_json_list(tmp_path):
    (tmp_path / "a.csv").write_text("layer,expert\n0,3\n1,15\n0,3\n")
    layers, load_LE = loads("eplb", [tmp_path / "a.csv"], tmp_path)
    assert layers == (0, 1) and load_LE[0, 3] == 2 and load_LE[1, 15] == 1 and load_LE.sum() == 3
    (tmp_path / "b.json").write_text(json.dumps([{"layer": 5, "expert": 7, "count": 9}, {"layer": 5, "expert": 0}]))
    import_trace("eplb", [tmp_path / "b.json"], tmp_path / "b", ImportOptions())
    trace = RoutingTrace.open(tmp_path / "b")
    assert trace.info.model_layers == (5,) and trace.load_counts()[1].tolist() == [[[1, 0, 0, 0, 0, 0, 0, 9]]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layer,expert,count\n0,1,2\n0,x,3\n", "a.csv, row 2: expert is 'x', expected a whole number"),
        ("layer,expert,count\n0,1,-2\n", "row 1: count is '-2'"),
        ("layer,expert,count\n0\n", "row 1: expert is ''"),
        ("layer,expert\n0,99999\n", "expert is '99999', expected a whole number from 0 to 4095"),
        ("a,b\n1,2\n", "read as CSV by its content: expected columns layer, expert and perhaps count, got 'a, b'"),
        ("layer,expert\n", "holds no row"),
    ],
)
def test_what_is_wrong_is_named_with_its_row(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        import_trace("eplb", [tmp_path / "a.csv"], tmp_path / "t")
