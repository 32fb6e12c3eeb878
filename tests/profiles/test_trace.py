"""The trace format: what is written comes back, parts survive a kill, damage is one line."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semmoe.profiles import trace_writer as writer_module
from semmoe.profiles.errors import InputError
from semmoe.profiles.trace import RoutingTrace, TraceInfo, hash_file, integers
from semmoe.profiles.trace_writer import Served, TraceWriter, refuse_existing_trace

INFO = TraceInfo("tiny", num_layers=2, num_experts=8, top_k=3, model_layers=(1, 2), num_model_layers=3)


def random_ids(rng: np.random.Generator, tokens: int, info: TraceInfo = INFO) -> np.ndarray:
    return rng.integers(0, info.num_experts, (tokens, info.num_layers, info.top_k))


def write(path, lengths=(5, 0, 7), info=INFO, **options) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    rows = [random_ids(rng, n, info) for n in lengths]
    with TraceWriter(path, info, **options) as writer:
        for i, ids in enumerate(rows):
            sequence = np.arange(len(ids) + 5) + 100 * i
            writer.add(f"r{i}", ids, domain=f"d{i % 2}", token_ids=sequence, num_prompt_tokens=5, first_position=3)
    return rows


def test_a_rank_that_nobody_knows_is_no_damage(tmp_path):
    with TraceWriter(tmp_path / "t", INFO) as writer:
        for number, served in enumerate((Served(1, "affine"), Served(-1, "failed"), Served(0))):
            writer.add(f"r{number}", random_ids(np.random.default_rng(0), 4), served=served)
    batch = RoutingTrace.open(tmp_path / "t").load()
    assert batch.rank_of_B is not None and batch.rank_of_B.tolist() == [1, -1, 0]


def sign(path) -> None:
    """Write the hashes of the parts as they are now into trace.json."""
    facts = json.loads((path / "trace.json").read_text())
    for part in facts["parts"]:
        part["sha256"] = hash_file(path / part["file"])
    (path / "trace.json").write_text(json.dumps(facts))


def test_round_trip_keeps_ids_tokens_and_phases(tmp_path):
    rows = write(tmp_path / "t")
    trace = RoutingTrace.open(tmp_path / "t")
    assert (trace.num_requests, trace.num_tokens, trace.info) == (3, 12, INFO)
    batch = trace.load()
    assert batch.request_ids == ["r0", "r1", "r2"] and batch.domains == ["d0", "d1", "d0"]
    np.testing.assert_array_equal(batch.expert_ids_TLK, np.concatenate(rows))
    assert batch.expert_ids_TLK.dtype == np.uint8
    np.testing.assert_array_equal(batch.token_ids_T, [3, 4, 5, 6, 7, *range(203, 210)])
    np.testing.assert_array_equal(batch.is_prompt_T, [1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(batch.prompt(2), [200, 201, 202, 203, 204])
    np.testing.assert_array_equal(batch.request_of_T, [0] * 5 + [2] * 7)


def test_unknown_tokens_are_minus_one_and_kept_requests_are_filtered(tmp_path):
    with TraceWriter(tmp_path / "t", INFO) as writer:
        for name in "abc":
            writer.add(name, random_ids(np.random.default_rng(0), 4))
    batch = RoutingTrace.open(tmp_path / "t").load(np.array([True, False, True]))
    assert batch.request_ids == ["a", "c"] and (batch.token_ids_T == -1).all() and batch.sequence(1).size == 0


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    experts=st.sampled_from([4, 256, 300]),
    values_per_part=st.integers(1, 60),
)
def test_any_cut_into_parts_and_row_groups_reads_the_same(tmp_path_factory, lengths, experts, values_per_part):
    path = tmp_path_factory.mktemp("traces") / "t"
    info = TraceInfo("m", 2, experts, 3, (0, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "PART_VALUES", values_per_part)
        patch.setattr(writer_module, "ROW_GROUP_VALUES", 7)
        rows = write(path, lengths, info)
        batches = list(RoutingTrace.open(path).batches())
    np.testing.assert_array_equal(np.concatenate([b.expert_ids_TLK for b in batches]), np.concatenate(rows))
    assert [r for b in batches for r in b.request_ids] == [f"r{i}" for i in range(len(lengths))]
    assert batches[0].expert_ids_TLK.dtype == (np.uint8 if experts <= 256 else np.uint16)


def test_ids_of_a_batch_are_a_view_of_the_file_buffer(tmp_path):
    write(tmp_path / "t")
    ids = next(RoutingTrace.open(tmp_path / "t").batches()).expert_ids_TLK
    assert not ids.flags.owndata and not ids.flags.writeable


def test_a_trace_is_read_without_pandas(tmp_path):
    """Its import, inside pyarrow's to_numpy, loses a Ctrl-C that comes meanwhile: the command
    went on to its end."""
    write(tmp_path / "t")
    code = (
        "import sys; from semmoe.profiles.trace import RoutingTrace; from semmoe.profiles.counts import profile_traces;"
        f"profile_traces([RoutingTrace.open({str(tmp_path / 't')!r})]); print('pandas' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
    array = pa.array([3, None, 5, 250, 7], pa.uint8())
    assert integers(array).tolist() == [3, 0, 5, 250, 7] and integers(array[2:]).tolist() == [5, 250, 7]
    assert integers(pa.chunked_array([array[3:], array[:1]])).tolist() == [250, 7, 3]
    assert integers(pa.array([], pa.int32())).dtype == np.int32


def test_other_tools_read_the_parts(tmp_path):
    import datasets
    import duckdb
    import polars

    rows = write(tmp_path / "t")
    pattern = str(tmp_path / "t" / "part-*.parquet")
    total = duckdb.sql(f"select sum(num_tokens), sum(len(expert_ids)) from '{pattern}'").fetchall()[0]
    assert total == (12, 12 * 6)
    frame = polars.read_parquet(pattern)
    np.testing.assert_array_equal(frame["expert_ids"][2].to_numpy().reshape(-1, 2, 3), rows[2])
    loaded = datasets.load_dataset("parquet", data_files=pattern, split="train", cache_dir=str(tmp_path / "cache"))
    assert np.array(loaded[0]["expert_ids"]).reshape(-1, 2, 3).tolist() == rows[0].tolist()


def test_reading_through_a_url(tmp_path):
    import fsspec

    write(tmp_path / "t")
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "t"), "/traces/t", recursive=True)
    assert RoutingTrace.open("memory://traces/t").load().num_tokens == 12
    with pytest.raises(InputError, match="cannot be opened"):
        RoutingTrace.open("nosuchscheme://x/t")


def test_resume_adds_only_what_is_missing(tmp_path):
    write(tmp_path / "t", (5, 6))
    with pytest.raises(InputError, match="there already"):
        TraceWriter(tmp_path / "t", INFO)
    first = RoutingTrace.open(tmp_path / "t").fingerprint
    write(tmp_path / "t", (5, 6), resume=True)
    assert RoutingTrace.open(tmp_path / "t").fingerprint == first
    write(tmp_path / "t", (5, 6, 3), resume=True)
    trace = RoutingTrace.open(tmp_path / "t")
    assert (trace.num_requests, trace.num_tokens) == (3, 14) and trace.fingerprint != first
    with pytest.raises(InputError, match="another model or run: num_experts 9 against 8"):
        TraceWriter(tmp_path / "t", TraceInfo("tiny", 2, 9, 3, (1, 2)), resume=True)


def test_a_trace_of_another_checkpoint_is_not_continued(tmp_path):
    def info(digit):
        return replace(INFO, checkpoint={"config": {}, "router_sha256": 64 * digit, "index_sha256": None})

    write(tmp_path / "t", (5,), info("a"))
    first = RoutingTrace.open(tmp_path / "t")
    assert first.info.checkpoint == info("a").checkpoint
    write(tmp_path / "t", (5, 6), info("a"), resume=True)
    with pytest.raises(InputError, match="is the trace of another checkpoint: its router weights are others"):
        TraceWriter(tmp_path / "t", info("b"), resume=True)
    write(tmp_path / "u", (5,))
    assert RoutingTrace.open(tmp_path / "u").fingerprint == first.fingerprint  # of the routing, however it was made


def test_a_killed_writer_loses_only_the_current_part(tmp_path):
    script = f"""
import numpy as np, time
from semmoe.profiles import trace
from semmoe.profiles import trace_writer
trace_writer.PART_VALUES = 60
writer = trace_writer.TraceWriter({str(tmp_path / "t")!r}, trace.TraceInfo("tiny", 2, 8, 3, (1, 2)))
for i in range(100000):
    writer.add(f"r{{i}}", np.zeros((5, 2, 3), int))
    time.sleep(0.002)
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    while len(list((tmp_path / "t").glob("part-*.parquet"))) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(InputError, match="unfinished trace"):
        RoutingTrace.open(tmp_path / "t")
    (tmp_path / "t" / ".part-99999.parquet.tmp").write_bytes(b"half a part")
    with TraceWriter(tmp_path / "t", INFO, resume=True) as writer:
        assert len(writer.request_ids) >= 6
        for i in range(len(writer.request_ids) + 5):
            writer.add(f"r{i}", np.zeros((5, 2, 3), int))
    batch = RoutingTrace.open(tmp_path / "t").load()
    assert sorted(batch.request_ids) == sorted({f"r{i}" for i in range(batch.num_requests)})
    assert not list((tmp_path / "t").glob(".part*"))


def test_the_same_requests_give_the_same_bytes(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b")
    for name in ("trace.json", "part-00000.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.zeros((3, 2, 2), int), r"shape \[3, 2, 2\], expected \[T, 2, 3\]"),
        (np.full((1, 2, 3), 8), "expert id 8 is outside 0..7"),
        (np.full((1, 2, 3), -1), "expert id -1 is outside 0..7"),
    ],
)
def test_bad_requests_are_refused(tmp_path, ids, message):
    writer = TraceWriter(tmp_path / "t", INFO)
    with pytest.raises(InputError, match=message):
        writer.add("r", ids)


def test_damage_is_one_line(tmp_path):
    write(tmp_path / "t")
    part, facts = tmp_path / "t" / "part-00000.parquet", tmp_path / "t" / "trace.json"
    whole, text = part.read_bytes(), facts.read_text()
    part.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="part-00000.parquet was changed after it was written"):
        RoutingTrace.open(tmp_path / "t").load()
    sign(tmp_path / "t")
    with pytest.raises(InputError, match="part-00000.parquet cannot be read as Parquet"):
        RoutingTrace.open(tmp_path / "t").load()
    facts.write_text(text)
    middle = bytearray(whole)
    middle[20:200] = bytes(180)
    part.write_bytes(bytes(middle))
    with pytest.raises(InputError, match="part-00000.parquet"):
        RoutingTrace.open(tmp_path / "t").load()
    part.unlink()
    with pytest.raises(InputError, match="part-00000.parquet"):
        RoutingTrace.open(tmp_path / "t").load()
    part.write_bytes(whole)
    for broken, message in [
        (text[:50], "is not JSON"),
        ("[]", "its format is not"),
        (text.replace('"version": 1', '"version": 99'), "has version 99"),
        (json.dumps({**json.loads(text), "top_k": 4}), "expected 5 tokens x 2 layers x top-4"),
        (json.dumps({**json.loads(text), "num_experts": 2}), "holds expert id"),
    ]:
        facts.write_text(broken)
        with pytest.raises(InputError, match=message):
            RoutingTrace.open(tmp_path / "t").load()
    with pytest.raises(InputError, match="holds no trace.json"):
        RoutingTrace.open(tmp_path / "nowhere")


def test_every_flipped_bit_of_a_part_is_found(tmp_path):
    write(tmp_path / "t")
    part = tmp_path / "t" / "part-00000.parquet"
    whole = part.read_bytes()
    for bit in np.random.default_rng(0).choice(8 * len(whole), 260, replace=False):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << (bit % 8)
        part.write_bytes(changed)
        for read in (RoutingTrace.load, RoutingTrace.requests):
            with pytest.raises(InputError, match="part-00000.parquet was changed after it was written: its SHA-256"):
                read(RoutingTrace.open(tmp_path / "t"))
    with pytest.raises(InputError, match="part-00000.parquet was changed"):
        TraceWriter(tmp_path / "t", INFO, resume=True)


def test_parts_behind_a_url_are_checked_where_they_are_read_whole(tmp_path):
    import fsspec

    write(tmp_path / "t")
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "t"), "/checked/t", recursive=True)
    trace = RoutingTrace.open("memory://checked/t")
    assert trace.requests().num_rows == 3
    assert trace.unchecked == {"/checked/t/part-00000.parquet": "it lies behind a URL and was not read whole"}
    trace.load()
    assert trace.unchecked == {}
    content = bytearray(memory.cat_file("/checked/t/part-00000.parquet"))
    content[100] ^= 4
    memory.pipe_file("/checked/t/part-00000.parquet", bytes(content))
    with pytest.raises(InputError, match="^/checked/t/part-00000.parquet was changed after it was written"):
        RoutingTrace.open("memory://checked/t").load()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_layers", True, "num_layers is True, expected a whole number from 1 to 100000"),
        ("num_layers", 10**30, "num_layers is 10+, expected"),
        ("num_experts", 8.0, "num_experts is 8.0, expected a whole number from 1 to 65535"),
        ("model_layers", [1, 1], r"model_layers\[1\] is 1, which stands there twice"),
        ("model_layers", [1], "model_layers names 1 layers, num_layers is 2"),
        ("kind", "token", "kind is 'token', expected one of 'tokens', 'counts'"),
        ("empty_slots", 1, "empty_slots is 1, expected true or false"),
        ("notes", [], "notes is list, expected an object with named keys"),
        ("model", "x" * 200_000, "model is 'x+[.]{3}, expected text of at most 100000 characters"),
        ("counts", {"requests": 4, "tokens": 12}, "counts.requests is 4, expected 3, the sum of its parts"),
        ("counts", {"requests": 3}, "counts lacks the key 'tokens'"),
        ("parts", {}, "parts is dict, expected a list|parts is {}"),
        ("parts.file", "../part-00000.parquet", r"parts\[0\].file is '../part-00000.parquet': expected a single name"),
        ("parts.file", "/etc/part.parquet", r"parts\[0\].file is '/etc/part.parquet': .* absolute"),
        ("parts.file", "trace.json", r"parts\[0\].file is 'trace.json': expected a name that ends in .parquet"),
        ("parts.sha256", "0", r"parts\[0\].sha256 is '0', expected a SHA-256"),
        ("embedding", {"file": 3}, "embedding lacks the key 'checkpoint'"),
    ],
)
def test_facts_are_what_they_must_be(tmp_path, key, value, message):
    write(tmp_path / "t")
    file = tmp_path / "t" / "trace.json"
    facts = json.loads(file.read_text())
    name, _, inner = key.partition(".")
    (facts["parts"][0] if inner else facts)[inner or name] = value
    file.write_text(json.dumps(facts))
    with pytest.raises(InputError, match=f"trace.json: {message}") as refused:
        RoutingTrace.open(tmp_path / "t")
    assert len(str(refused.value)) < 400


def test_json_that_says_two_things_or_no_number_is_refused(tmp_path):
    write(tmp_path / "t")
    file = tmp_path / "t" / "trace.json"
    text = file.read_text()
    for broken, message in [
        (text.replace('"top_k": 3', '"top_k": 3, "top_k": 2'), "the key 'top_k' stands twice"),
        (text.replace('"notes": {}', '"notes": {"x": NaN}'), "NaN is no number"),
        (text.replace('"notes": {}', '"notes": {"x": 1e999}'), r"notes.x is inf, expected a finite number"),
        (text.replace('"notes": {}', '"notes": ' + '{"x": ' * 90 + "1" + "}" * 91), "nests deeper than 32|is not JSON"),
        (text.replace('"notes": {}', '"notes": ' + "[" * 100_000), "nests too deep"),
    ]:
        file.write_text(broken)
        with pytest.raises(InputError, match=message):
            RoutingTrace.open(tmp_path / "t")
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(InputError, match="a pipe"):
        RoutingTrace.open(tmp_path / "t")


def test_a_part_is_a_file_of_the_trace(tmp_path):
    write(tmp_path / "t")
    write(tmp_path / "other")
    part = tmp_path / "t" / "part-00000.parquet"
    part.unlink()
    part.symlink_to(tmp_path / "other" / "part-00000.parquet")
    with pytest.raises(InputError, match="a link out of"):
        RoutingTrace.open(tmp_path / "t").load()
    part.unlink()
    os.mkfifo(part)
    with pytest.raises(InputError, match="is a pipe, expected a file"):
        RoutingTrace.open(tmp_path / "t").requests()


def test_columns_of_other_types_are_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    write(tmp_path / "t")
    part = tmp_path / "t" / "part-00000.parquet"
    table = pq.read_table(part)
    place = table.schema.get_field_index("first_position")
    for column, message in [
        (pa.array([0.0, 0.0, 0.0]), "'first_position' is double, expected int32"),
        (pa.array([-1, 0, 0], pa.int32()), "holds a negative first_position"),
        (pa.array([None, 0, 0], pa.int32()), "the column 'first_position' holds 1 nulls"),
        (pa.array([9, 0, 0], pa.int32()), "request r0: 10 token ids, expected at least 14"),
    ]:
        pq.write_table(table.set_column(place, "first_position", column), part)
        sign(tmp_path / "t")
        with pytest.raises(InputError, match=message):
            RoutingTrace.open(tmp_path / "t").load()


def test_requests_without_a_name_of_their_own_are_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    write(tmp_path / "t")
    part = tmp_path / "t" / "part-00000.parquet"
    table = pq.read_table(part)
    no_text = pa.array([b"\xff", b"\xfe", b"a"], pa.binary()).view(pa.string())
    for column, message in [
        (pa.array(["r0", "r0", "r1"]), "1 of its 3 requests have the id of another"),
        (pa.array([None, "r0", "r1"], pa.string()), "the column 'request_id' holds 1 nulls"),
        (no_text, "is damaged: .*UTF8"),
    ]:
        pq.write_table(table.set_column(0, "request_id", column), part)
        sign(tmp_path / "t")
        with pytest.raises(InputError, match=message):
            RoutingTrace.open(tmp_path / "t").requests()


def test_counts_are_kept_apart_from_tokens(tmp_path):
    info = TraceInfo("tiny", 2, 8, 3, (0, 1), kind="counts")
    load = np.arange(48).reshape(3, 2, 8)
    with TraceWriter(tmp_path / "t", info) as writer:
        writer.add_counts(["a", "b", "c"], load)
    windows, read = RoutingTrace.open(tmp_path / "t").load_counts()
    assert windows == ["a", "b", "c"]
    np.testing.assert_array_equal(read, load)
    with pytest.raises(InputError, match="holds only expert loads"):
        RoutingTrace.open(tmp_path / "t").load()


def test_routing_groups_divide_the_experts():
    with pytest.raises(InputError, match="60 experts do not divide into 8 routing groups"):
        TraceInfo("m", 1, 60, 4, (0,), n_group=8, topk_group=4)


def test_one_writer_of_a_trace_at_a_time(tmp_path: Path) -> None:
    write(tmp_path / "t")
    with TraceWriter(tmp_path / "t", INFO, resume=True):
        for resume in (True, False):
            with pytest.raises(InputError, match=rf"^another run is writing .*t: process {os.getpid()} since "):
                TraceWriter(tmp_path / "t", INFO, resume=resume)
        assert (tmp_path / "t" / "trace.json").exists()  # a run that is refused takes nothing away
        TraceWriter(tmp_path / "t", INFO, resume=True, prefix="rank1", lock=False)  # another rank of the same run
    before = sorted(p.name for p in (tmp_path / "t").iterdir())
    assert ".lock" not in before
    # What a killed run leaves: its lock, and half of a part. A link of that name is left alone.
    (tmp_path / "t" / ".lock").write_text("semmoe lock\n1\n2026-01-01 00:00:00\nsemmoe trace")
    (tmp_path / "t" / ".part-00009.parquet.tmp").touch()
    with TraceWriter(tmp_path / "t", INFO, resume=True):
        pass
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == before
    # One that was killed before its first fact left no trace.
    (tmp_path / "early").mkdir()
    for name in (".lock", ".trace.json.tmp"):
        (tmp_path / "early" / name).touch()
    with TraceWriter(tmp_path / "early", INFO):
        pass
    assert [p.name for p in (tmp_path / "early").iterdir()] == ["trace.json"]


def test_where_a_trace_cannot_be_is_known_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "none").symlink_to("missing")
    for path, wrong in (("file/t", "is no directory"), ("none", "is a link to nothing"), ("file", "is there already")):
        with pytest.raises(InputError, match=wrong):
            refuse_existing_trace(tmp_path / path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    refuse_existing_trace(tmp_path / "link")
    with pytest.raises(InputError, match="nothing came"), TraceWriter(tmp_path / "link", INFO):
        raise InputError("nothing came")
    assert not list((tmp_path / "empty").iterdir())
    with pytest.raises(InputError, match="nothing came"), TraceWriter(tmp_path / "new", INFO):
        raise InputError("nothing came")
    assert not (tmp_path / "new").exists()
