"""Our reader of safetensors files against the library's, and what is read with it."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from semmoe.profiles.embedding import MAX_FEATURES, input_embedding
from semmoe.profiles.errors import InputError
from semmoe.profiles.safetensors_file import INTEGERS, make_header, read_index, read_shard, write_arrays
from semmoe.profiles.trace import hash_file


def test_mapped_values_are_the_library_s(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    arrays = {name: draw.integers(0, 99, (3, 5)).astype(dtype) for name, dtype in INTEGERS.items()}
    arrays |= {"empty": np.empty((0, 4), np.int32), "one": np.array(7)}
    save_file(arrays, tmp_path / "a.safetensors", {"who": "us"})
    shard, read = read_shard(tmp_path / "a.safetensors"), load_file(tmp_path / "a.safetensors")
    assert shard.metadata == {"who": "us"} and {t.name for t in shard.tensors} == set(read)
    for tensor in shard.tensors:
        found = shard.map(tensor, INTEGERS[tensor.dtype])
        assert found.dtype == read[tensor.name].dtype and np.array_equal(found, read[tensor.name])
    header = make_header(shard.tensors, shard.metadata, header_bytes=shard.header_bytes)
    assert (tmp_path / "a.safetensors").read_bytes().startswith(header)
    with pytest.raises(InputError, match="a.safetensors holds no tensor other"):
        shard.find("other")


@pytest.mark.parametrize("columns", [12, MAX_FEATURES + 8])
def test_the_embedding_that_a_trace_refers_to(tmp_path: Path, columns: int) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    values_VD = torch.randn((50, columns), generator=torch.Generator().manual_seed(0))
    save_torch({"e": values_VD, "e16": values_VD.bfloat16(), "ids": torch.ones((50, columns), dtype=torch.int32)},
               tmp_path / "m.safetensors")  # fmt: skip
    place = {"checkpoint": str(tmp_path), "file": "m.safetensors", "key": "e", "shape": [50, columns]}
    exact, short = input_embedding(place), input_embedding({**place, "key": "e16"})
    assert exact is not None and short is not None and exact.shape == (50, min(columns, MAX_FEATURES))
    if columns <= MAX_FEATURES:
        np.testing.assert_array_equal(exact, values_VD.numpy())
        np.testing.assert_array_equal(short, values_VD.bfloat16().float().numpy())
    assert input_embedding(None) is None and input_embedding({**place, "file": "gone.safetensors"}) is None
    for wrong, message in [
        ({"key": "x"}, "holds no tensor x"),
        ({"key": "ids"}, "ids is of type I32"),
        ({"shape": [3, 4]}, r"the trace says \[3, 4\]"),
    ]:
        with pytest.raises(InputError, match=message):
            input_embedding({**place, **wrong})
    (tmp_path / "m.safetensors").write_bytes(b"no header")
    with pytest.raises(InputError, match="does not begin with a safetensors header"):
        input_embedding(place)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"weight_map": {"a": "../x.safetensors"}}', "weight_map names '../x.safetensors': expected a single name"),
        ('{"weight_map": {"a": "/x.safetensors"}}', "this one is absolute"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "the key 'a' stands twice"),
        ('{"weight_map": {"a": "x"}, "metadata": {"total_size": Infinity}}', "Infinity is no number of JSON"),
    ],
)
def test_an_index_that_cannot_be_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "i.json").write_text(text)
    with pytest.raises(InputError, match=f"i.json.*{message}"):
        read_index(tmp_path / "i.json")


def test_a_tensor_that_stands_twice_is_refused(tmp_path: Path) -> None:
    entry = b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    header = b"{" + entry + b"," + entry + b"}"
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    with pytest.raises(InputError, match="its safetensors header cannot be read"):
        read_shard(tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", ["", "u8", "U 8", "U8\n"])
def test_a_number_type_that_can_be_none_is_refused(tmp_path: Path, dtype: str) -> None:
    header = json.dumps({"a": {"dtype": dtype, "shape": [1], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    with pytest.raises(InputError, match="its safetensors header cannot be read"):
        read_shard(tmp_path / "a.safetensors")


def test_arrays_are_written_as_the_library_writes_them(tmp_path: Path) -> None:
    names = ("bool", "uint8", "int8", "int16", "uint16", "float16", "int32", "uint32", "float32", "float64", "int64")
    shapes = ((3, 2), (0,), (0, 4), (1, 5, 2))
    arrays = {f"{name} {shape}": np.ones(shape, name) for name in (*names, "uint64") for shape in shapes}
    arrays["turned"] = np.arange(6, dtype=np.uint16).reshape(2, 3).T
    digest = write_arrays(tmp_path / "own", arrays)
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, tmp_path / "library")
    assert (tmp_path / "own").read_bytes() == (tmp_path / "library").read_bytes()
    assert digest == hash_file(tmp_path / "own")
    with pytest.raises(FileExistsError):
        write_arrays(tmp_path / "own", arrays)
