"""Records that cannot be used are left out and counted by reason; the rest is imported."""

import gzip
import json

import pytest
from engine_samples import megatron_lines, npy64, raw64, routing, sglang_record, write_lines

from semmoe.commands.show import describe_path
from semmoe.profiles.engines.imports import ImportOptions, import_trace
from semmoe.profiles.errors import InputError
from semmoe.profiles.trace import RoutingTrace
from semmoe.solvers.health.health import left_out_facts, trace_health

ABORT = {"text": "", "output_ids": [], "meta_info": {"finish_reason": {"type": "abort"}, "prompt_tokens": 5}}
SHORT = sglang_record(routing(10), start=0)
SHORT["meta_info"].update(routed_experts_start_len=0, routed_experts=raw64(routing(9)), routed_experts_shape=[9, 5, 3])
LONG = sglang_record(routing(10), start=0)
LONG["meta_info"].update(routed_experts=raw64(routing(11)), routed_experts_shape=[11, 5, 3])


def sglang_file(tmp_path, *bad, count=20):
    good = [json.dumps(sglang_record(routing(12, seed=s), name=f"r{s}")) for s in range(count)]
    lines = [*good[: count // 2], *(b if isinstance(b, str) else json.dumps(b) for b in bad), *good[count // 2 :]]
    file = tmp_path / "in.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.mark.parametrize(
    ("bad", "reason", "message"),
    [
        (ABORT, "aborted requests", "the request was aborted"),
        ({"error": {"message": "busy", "code": 503}}, "error responses", "answered with an error: 'busy'"),
        ({"object": "error", "message": "too long"}, "error responses", "answered with an error: 'too long'"),
        ({"text": "x", "meta_info": {"prompt_tokens": 3}}, "responses without routed_experts", "no routed_experts"),
        (SHORT, "requests with missing rows", "9 rows from position 0, expected 10"),
        (LONG, "requests with surplus rows", "11 rows from position 0, expected 10"),
        ('{"meta_info": {"prompt_to', "cut or damaged lines", "not JSON"),
        ({"status": "ok"}, "records of another kind", "neither meta_info nor choices"),
        ("null", "records of another kind", "null, expected a JSON object"),
        ({"meta_info": {"routed_experts": "A*"}}, "damaged responses", "not base64"),
    ],
)
def test_one_bad_record_of_sglang(tmp_path, bad, reason, message):
    file = sglang_file(tmp_path, bad)
    summary = import_trace("sglang", [file], tmp_path / "t")
    assert (summary.requests, summary.tokens, summary.dropped) == (20, 240, {reason: 1})
    trace = RoutingTrace.open(tmp_path / "t")
    assert trace.info.notes["left_out"]["requests"] == {reason: 1}
    assert f"1 {reason}: 4.8% of the requests" in describe_path(str(tmp_path / "t"), seed=0)["left_out"]
    with pytest.raises(InputError, match=f"in.jsonl, line 11.*{message}"):
        import_trace("sglang", [file], tmp_path / "s", ImportOptions(strict=True))
    assert not (tmp_path / "s").exists()
    alone = sglang_file(tmp_path, bad, bad, count=0)
    with pytest.raises(InputError, match=f"line 1.*{message}.*nothing is left to import: 2 {reason}"):
        import_trace("sglang", [alone], tmp_path / "s")


def test_rows_that_begin_late_where_no_start_was_asked_for(tmp_path):
    late = sglang_record(routing(10))
    late["meta_info"].pop("completion_tokens")
    late["output_ids"].append(1)
    summary = import_trace("sglang", [sglang_file(tmp_path, late)], tmp_path / "t")
    assert summary.dropped == {"requests with missing rows": 1}


def test_bad_records_of_vllm_and_of_one_choice_among_several(tmp_path):
    choice = {"index": 0, "finish_reason": "stop", "routed_experts": npy64(routing(12))}
    aborted = {"index": 1, "finish_reason": "abort", "prompt_token_ids": [3, 4], "token_ids": []}
    records = [
        {"id": "a", "choices": [choice]},
        {"id": "b", "choices": [choice, aborted]},
        {"id": "c", "choices": [{**aborted, "index": 0}], "usage": {"prompt_tokens": 7, "completion_tokens": 0}},
        {"error": {"message": "busy"}},
    ]
    summary = import_trace("vllm", [write_lines(tmp_path / "in.jsonl", records)], tmp_path / "t")
    assert summary.requests == 2 and summary.dropped == {"aborted requests": 2, "error responses": 1}
    facts = left_out_facts(RoutingTrace.open(tmp_path / "t"))
    assert facts.tokens == 2 + 7 and facts.requests_share == 3 / 5


def test_the_health_tells_what_is_missing(tmp_path):
    few = import_trace("sglang", [sglang_file(tmp_path, ABORT)], tmp_path / "few")
    many = import_trace("sglang", [sglang_file(tmp_path, *[ABORT] * 6)], tmp_path / "many")
    assert few.requests == many.requests == 20
    for name, level in (("few", "good"), ("many", "watch")):
        health = trace_health(RoutingTrace.open(tmp_path / name), seed=0)
        (finding,) = [f for f in health.findings if f.topic == "left out"]
        assert finding.level == level and "aborted requests" in finding.text


def test_loops_are_named_with_the_option_that_keeps_them(tmp_path):
    records = [sglang_record(routing(12, seed=s), name=f"r{s}", repetition=s < 3) for s in range(12)]
    file = write_lines(tmp_path / "in.jsonl", records)
    summary = import_trace("sglang", [file], tmp_path / "t", ImportOptions(repetition="drop"))
    assert any("3 requests that fell into a loop are left out (--repetition keep" in note for note in summary.notes)
    assert left_out_facts(RoutingTrace.open(tmp_path / "t")).tokens == 36
    with pytest.raises(InputError, match="no request is left to write: 3 requests that .*--repetition keep"):
        import_trace(
            "sglang", [write_lines(tmp_path / "l.jsonl", records[:3])], tmp_path / "l", ImportOptions(repetition="drop")
        )


def test_a_trace_of_several_files_adds_up_what_is_missing(tmp_path):
    first, second = sglang_file(tmp_path, ABORT).rename(tmp_path / "a.jsonl"), sglang_file(tmp_path, ABORT, ABORT)
    for _ in range(2):  # the same file again adds nothing
        import_trace("sglang", [first], tmp_path / "t", ImportOptions(resume=True))
        assert left_out_facts(RoutingTrace.open(tmp_path / "t")).requests == {"aborted requests": 1}
    import_trace("sglang", [second], tmp_path / "t", ImportOptions(resume=True))
    assert left_out_facts(RoutingTrace.open(tmp_path / "t")).requests == {"aborted requests": 3}


def test_a_step_of_megatron_with_a_cut_line(tmp_path):
    lines = [json.dumps(line) for step in range(3) for line in megatron_lines(routing(10)[:, 1:4], step=step)]
    file = tmp_path / "router_trace_rank0.jsonl"
    file.write_text("\n".join(lines)[:-30])
    summary = import_trace("megatron", [file], tmp_path / "t")
    assert summary.requests == 2
    assert summary.dropped == {"cut or damaged lines": 1, "steps that lack layers": 1}


def test_a_gzip_file_that_ends_early_gives_its_whole_lines(tmp_path):
    lines = [json.dumps(sglang_record(routing(12, seed=s), name=f"r{s}")) + "\n" for s in range(20)]
    whole = gzip.compress("".join(lines).encode())
    (tmp_path / "in.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    summary = import_trace("sglang", [tmp_path / "in.jsonl.gz"], tmp_path / "t")
    assert 5 < summary.requests < 15 and summary.dropped == {"cut or damaged lines": 1}
    damaged = bytearray(whole)
    damaged[-6] ^= 1  # its own checksum
    (tmp_path / "in.jsonl.gz").write_bytes(damaged)
    with pytest.raises(InputError, match="is a damaged gzip file"):
        import_trace("sglang", [tmp_path / "in.jsonl.gz"], tmp_path / "v")
