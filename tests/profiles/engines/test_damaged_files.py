"""Importers under bad weather: damaged and cut files, a kill in the middle, and any routing
there and back."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from engine_samples import (
    config,
    megatron_lines,
    npy64,
    raw64,
    routing,
    sample_files,
    save_recording,
    sglang_record,
    slot_map,
    token_pass,
    write_lines,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from semmoe.profiles.engines.imports import ImportOptions, ImportSummary, import_trace
from semmoe.profiles.errors import InputError
from semmoe.profiles.trace import RoutingTrace

SAMPLES = sorted(
    "sglang|sglang openai|vllm|sglang-recorder token|sglang-recorder pass|sglang-recorder stat|trtllm|megatron|"
    "eplb npy|eplb pt|eplb json".split("|")
)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return sample_files(tmp_path_factory.mktemp("samples"))


def test_samples_import(samples, tmp_path):
    assert sorted(samples) == SAMPLES
    for name, files in samples.items():
        summary = import_trace(name.split()[0], files, tmp_path / name)
        assert summary.layers == 4, name


def damaged_copy(files: list[Path], folder: Path, change) -> list[Path]:
    """The same input with `change` applied to the bytes of its largest file."""
    folder.mkdir()
    if files[0].is_dir():
        inside = folder / files[0].name
        inside.mkdir()
        for file in files[0].iterdir():
            (inside / file.name).write_bytes(file.read_bytes())
        victim, copy = max(inside.iterdir(), key=lambda f: f.stat().st_size), [inside]
    else:
        victim = folder / files[0].name
        victim.write_bytes(files[0].read_bytes())
        copy = [victim]
    victim.write_bytes(change(victim.read_bytes()))
    return copy


def imports_or_refuses(kind: str, files: list[Path], out: Path) -> ImportSummary | None:
    """True where the import gave a trace that reads; False for one line that names a file;
    anything else fails."""
    try:
        summary = import_trace(kind, files, out)
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 600, error
        assert str(files[0].parent) in str(error) or "records" in str(error) or "route" in str(error), error
        assert not out.exists()
        return None
    trace = RoutingTrace.open(out)
    assert (trace.load().num_tokens if trace.info.kind == "tokens" else len(trace.load_counts()[0])) > 0
    return summary


@pytest.mark.parametrize("name", SAMPLES)
def test_cut_files_are_refused_by_name(samples, tmp_path, name):
    for i, part in enumerate((0, 0.02, 0.3, 0.5, 0.9)):
        files = damaged_copy(samples[name], tmp_path / f"cut{i}", lambda b, p=part: b[: int(len(b) * p)])
        summary = imports_or_refuses(name.split()[0], files, tmp_path / f"out{i}")
        assert summary is None or "cut or damaged lines" in summary.dropped, part


@pytest.mark.parametrize("name", SAMPLES)
def test_changed_bytes_import_or_give_one_line(samples, tmp_path, name):
    rng = np.random.default_rng(SAMPLES.index(name))

    def scramble(data: bytes) -> bytes:
        values = bytearray(data)
        for at in rng.integers(0, len(values), 3):
            values[at] = int(rng.integers(0, 256))
        return bytes(values)

    for i in range(25):
        files = damaged_copy(samples[name], tmp_path / f"in{i}", scramble)
        imports_or_refuses(name.split()[0], files, tmp_path / f"out{i}")


@pytest.mark.parametrize("name", SAMPLES)
def test_other_kinds_files_are_refused(samples, tmp_path, name):
    for other in {sample.split()[0] for sample in SAMPLES} - {name.split()[0]}:
        if {name.split()[0], other} == {"eplb", "sglang-recorder"}:
            continue  # a stat dump is a load matrix, by design
        with pytest.raises(InputError):
            import_trace(other, samples[name], tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_cut_gzip_names_the_line(tmp_path):
    lines = [json.dumps(sglang_record(routing(40, seed=s), name=f"r{s}")) for s in range(20)]
    packed = gzip.compress("\n".join(lines).encode())
    for name, data, message in (
        ("cut.gz", packed[: len(packed) // 2], r"cut.gz is a gzip file that is cut after line \d+"),
        ("bad.gz", packed[:5000] + bytes(300) + packed[5300:], "bad.gz"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=message):
            import_trace("sglang", [tmp_path / name], tmp_path / "out", ImportOptions(strict=True))
        assert not (tmp_path / "out").exists()


def test_deep_json_and_pipes_are_one_line(tmp_path):
    deep = tmp_path / "deep.jsonl"
    deep.write_text("[" * 100_000)
    with pytest.raises(InputError, match="deep.jsonl, line 1: not JSON: it nests too deep"):
        import_trace("sglang", [deep], tmp_path / "out")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe is no file, and engine files are read twice"):
        import_trace("sglang", [tmp_path / "pipe"], tmp_path / "out")


def test_an_import_that_goes_on_tells_what_the_whole_trace_holds(tmp_path):
    files = [
        write_lines(tmp_path / name, [sglang_record(routing(40, seed=s), name=name)])
        for s, name in enumerate(("first", "second"))
    ]
    import_trace("sglang", files[:1], tmp_path / "out")
    summary = import_trace("sglang", files[1:], tmp_path / "out", ImportOptions(resume=True))
    assert (summary.requests, summary.tokens) == (2, 80)


def changed(record: dict, path: str, value) -> dict:
    """A copy of a record with the value at a dotted path replaced, or removed where it is
    Ellipsis."""
    copy = json.loads(json.dumps(record))
    *outer, last = path.split(".")
    inner = copy
    for key in outer:
        inner = inner[int(key) if key.isdigit() else key]
    if value is ...:
        inner.pop(last)
    else:
        inner[last] = value
    return copy


IDS = routing(10)


@pytest.mark.parametrize(
    ("kind", "path", "value", "message"),
    [
        ("sglang", "meta_info", ..., "neither meta_info nor choices"),
        ("sglang", "meta_info.routed_experts", ..., "no routed_experts; the server needs"),
        ("sglang", "meta_info.routed_experts", "AAA*", "routed_experts is not base64"),
        ("sglang", "meta_info.routed_experts", 7, "routed_experts is 7, expected base64"),
        ("sglang", "meta_info.routed_experts", raw64(IDS[:9]), r"135 values, its shape says \[10, 5, 3\]"),
        ("sglang", "meta_info.routed_experts", "AAAA", "has 3 bytes, expected int32"),
        ("sglang", "meta_info.routed_experts_shape", [10, 15], r"its shape says \[10, 15\]"),
        ("sglang", "meta_info.routed_experts_shape", [-10, -5, 3], "its shape says"),
        ("sglang", "meta_info.routed_experts_start_len", -1, "routed_experts_start_len is -1"),
        ("sglang", "meta_info.routed_experts_start_len", "0", 'routed_experts_start_len is "0"'),
        ("sglang", "prompt_token_ids", ["a"], "prompt_token_ids has type"),
        ("sglang", "prompt_token_ids", [1, 2**40, 3], "prompt_token_ids holds 1099511627776, expected"),
        ("sglang", "meta_info.routed_experts", npy64(IDS), "--from vllm reads that"),
        ("sglang", "domain", "cut \ud83d", r"not JSON: \\ud83d is half of a character"),
        ("sglang", "meta_info.routed_experts", raw64(np.where(IDS == 9, -7, IDS)), r"row \d+, layer \d: expert id -7"),
        ("vllm", "choices", [{"sglext": {"routed_experts": raw64(IDS)}}], "a response of SGLang: --from sglang"),
        ("vllm", "choices", [], "choices is not a list of objects"),
        ("vllm", "choices.0.routed_experts", ..., "no routed_experts; the server needs"),
        ("vllm", "choices.0.routed_experts", "AAAA", "routed_experts is not a .npy array"),
        ("vllm", "choices.0.routed_experts", npy64(IDS)[:-40], "routed_experts is not a .npy array"),
        ("vllm", "choices.0.routed_experts", npy64(IDS[:, 0]), r"shape \[10, 3\], expected integers with 3 axes"),
        ("vllm", "choices.0.routed_experts", npy64(IDS + 0.5, np.float32), "has type float32"),
        ("vllm", "choices.0.prompt_routed_experts", npy64(IDS[:, :2]), r"prompt_routed_experts has shape \[10, 2, 3\]"),
        ("megatron", "top_indices", [[1, 2, 3]], r"top_indices has shape \[1, 3\], num_tokens and topk say \[10, 3\]"),
        ("megatron", "layer", ..., "no layer, no top_indices"),
        ("megatron", "step", -1, "step is -1"),
    ],
)
def test_a_wrong_value_is_named_with_file_and_line(tmp_path, kind, path, value, message):
    good = {
        "sglang": sglang_record(IDS),
        "vllm": {"choices": [{"index": 0, "routed_experts": npy64(IDS)}]},
        "megatron": megatron_lines(IDS[:, 1:2])[0],
    }[kind]
    file = write_lines(tmp_path / "in.jsonl", [good, changed(good, path, value)])
    with pytest.raises(InputError, match=f"in.jsonl, line 2.*({message})"):
        import_trace(kind, [file], tmp_path / "out", ImportOptions(strict=True))


def test_recordings_that_cannot_be(tmp_path):
    map_LS = slot_map()
    good = token_pass(IDS, map_LS, extend=[10])
    for i, (change, message) in enumerate(
        [
            ({"extend_seq_lens": [4, 4]}, "record 0: extend_seq_lens add up to 8, there are 10 input_ids"),
            ({"input_ids": list(range(11))}, "for 11 input_ids"),
            ({"topk_ids_of_layer": good["topk_ids_of_layer"] + 30}, r"holds slot \d+, the map has 20 slots"),
            ({"topk_ids_of_layer": None}, "topk_ids_of_layer has type object"),
        ]
    ):
        file = save_recording(tmp_path / f"{i}.pt", [{**good, **change}], map_LS)
        with pytest.raises(InputError, match=f"{i}.pt, record 0.*{message.removeprefix('record 0: ')}"):
            import_trace("sglang-recorder", [file], tmp_path / "out")
    for records in ([], "text", [1]):
        file = save_recording(tmp_path / "r.pt", records, map_LS)
        with pytest.raises(InputError, match=r"r.pt holds (no record|neither)"):
            import_trace("sglang-recorder", [file], tmp_path / "out")


CHILD = """
import sys
from pathlib import Path
import semmoe.profiles.trace_writer
semmoe.profiles.trace_writer.PART_VALUES = 20_000
from semmoe.profiles.engines.imports import ImportOptions, import_trace
options = ImportOptions(resume=sys.argv[3] == "resume")
summary = import_trace("sglang", [Path(sys.argv[1])], Path(sys.argv[2]), options)
print(summary.requests, [note for note in summary.notes if "already" in note])
"""


def test_a_killed_import_resumes(tmp_path):
    records = [sglang_record(routing(200, seed=s), name=f"r{s % 300}", domain=f"d{s % 3}") for s in range(400)]
    file = write_lines(tmp_path / "in.jsonl", records)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    import_trace("sglang", [file], whole)
    command = [sys.executable, "-c", CHILD, str(file), str(killed)]
    child = subprocess.Popen([*command, "new"])
    deadline = time.monotonic() + 240
    while len(list(killed.glob("part-*.parquet"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    with pytest.raises(InputError, match="an unfinished trace"):
        RoutingTrace.open(killed)
    with pytest.raises(InputError, match="--resume"):
        import_trace("sglang", [file], killed)
    again = subprocess.run([*command, "resume"], capture_output=True, text=True, check=True)
    assert again.stdout.startswith("400 ['") and "requests were in the trace already" in again.stdout
    a, b = (RoutingTrace.open(path).load() for path in (whole, killed))
    assert a.request_ids == b.request_ids and a.domains == b.domains
    np.testing.assert_array_equal(a.expert_ids_TLK, b.expert_ids_TLK)
    np.testing.assert_array_equal(a.token_ids_T, b.token_ids_T)


def test_counts_import_again_with_resume(samples, tmp_path):
    for _ in range(2):
        import_trace("eplb", samples["eplb npy"], tmp_path / "out", ImportOptions(resume=True))
    assert len(RoutingTrace.open(tmp_path / "out").load_counts()[0]) == 1
    before = RoutingTrace.open(tmp_path / "out").load_counts()[1]
    summary = import_trace("eplb", samples["eplb pt"], tmp_path / "out", ImportOptions(resume=True))
    windows, load = RoutingTrace.open(tmp_path / "out").load_counts()
    assert windows == ["load", "load:0", "load:1", "load:2"] and "4 windows" in summary.notes[-1]
    np.testing.assert_array_equal(load[:1], before)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    num_layers=st.integers(1, 5),
    num_experts=st.sampled_from([8, 64, 256, 300]),
    top_k=st.integers(1, 8),
    seed=st.integers(0, 1000),
    kind=st.sampled_from(["sglang", "openai", "vllm", "megatron", "sglang-recorder"]),
)
def test_any_routing_there_and_back(tmp_path_factory, lengths, num_layers, num_experts, top_k, seed, kind):
    """With the model's config.json, whatever was routed comes back: layers, ids, order, number
    of rows."""
    folder = tmp_path_factory.mktemp("round")
    dense = (0,) if num_layers > 1 else ()
    sizes = {"num_layers": num_layers, "num_experts": num_experts, "top_k": top_k, "dense": dense}
    parts = [routing(n, seed=seed + i, **sizes) for i, n in enumerate(lengths)]
    text = config(
        n_routed_experts=num_experts,
        num_experts_per_tok=top_k,
        num_hidden_layers=num_layers,
        first_k_dense_replace=len(dense),
    )
    (folder / "config.json").write_text(json.dumps(text))
    routed = range(len(dense), num_layers)
    dtype = np.uint8 if num_experts <= 256 else np.uint16
    map_LS = slot_map(num_layers, num_experts)
    if kind == "sglang-recorder":
        passes = [token_pass(ids, map_LS, number=i, extend=[len(ids)], dense=dense) for i, ids in enumerate(parts)]
        file = save_recording(folder / "in.pt", passes, map_LS)
    else:
        lines = {
            "sglang": lambda i, x: [sglang_record(x, name=f"r{i}", prompt=1, shape=i % 2 == 0)],
            "openai": lambda i, x: [{"id": f"r{i}", "choices": [{"sglext": {"routed_experts": raw64(x)}}]}],
            "vllm": lambda i, x: [{"id": f"r{i}", "choices": [{"routed_experts": npy64(x, dtype)}]}],
            "megatron": lambda i, x: megatron_lines(x[:, len(dense) :], step=i, layers=routed),
        }[kind]
        file = write_lines(folder / "in.jsonl", [line for i, ids in enumerate(parts) for line in lines(i, ids)])
    out = folder / "out"
    import_trace({"openai": "sglang"}.get(kind, kind), [file], out, ImportOptions(model_config=str(folder)))
    batch = RoutingTrace.open(out).load()
    assert batch.num_requests == len(parts)
    expected = np.concatenate(parts)[:, len(dense) :]
    np.testing.assert_array_equal(batch.expert_ids_TLK, expected)
