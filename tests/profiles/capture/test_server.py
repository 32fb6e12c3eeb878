"""`semmoe trace --server`, against a stand-in of vLLM and of SGLang."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from engine_plans import served_plan
from stand_ins.stand_in_server import ids_of, pins_of, routing, stand_in, write_config
from typer.testing import CliRunner

from semmoe.main import app
from semmoe.options import Api
from semmoe.profiles.capture import connection
from semmoe.profiles.capture.server import APIS
from semmoe.profiles.trace import RoutingTrace


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(connection, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(connection, "TRIES", 5)


@pytest.fixture
def data(tmp_path):
    words = np.random.default_rng(0).integers(0, 10**6, (40, 12))
    rows = [
        {"id": f"r{i}", "domain": f"d{i % 3}", "text": " ".join(map(str, row[: 3 + i % 10]))}
        for i, row in enumerate(words)
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.fixture
def model(tmp_path):
    return write_config(tmp_path / "model")


def trace(server, folder, *words, data="x.jsonl"):
    arguments = [
        "trace",
        "--server",
        server.url,
        "--data",
        str(folder / data),
        "--max-new-tokens",
        "6",
        "-o",
        str(folder / "t"),
    ]
    return CliRunner().invoke(app, [*arguments, *map(str, words)])


def said(result) -> str:
    return str(result.exception)


def test_choices_equal_the_code():
    assert [api.value for api in Api] == list(APIS)


@pytest.mark.parametrize("api", APIS)
def test_the_trace_is_what_the_server_routed(tmp_path, data, model, api):
    with stand_in(model, api=api) as server:
        result = trace(server, tmp_path, "--concurrency", 8, "--json")
    assert result.exit_code == 0, result.output
    batch = RoutingTrace.open(tmp_path / "t").load()
    assert sorted(batch.request_ids) == sorted(row["id"] for row in data)
    texts = {row["id"]: row for row in data}
    for b, name in enumerate(batch.request_ids):
        sequence, rows = batch.sequence(b).tolist(), slice(*batch.starts_B1[b : b + 2])
        assert sequence[: batch.num_prompt_tokens_B[b]] == ids_of(texts[name]["text"])
        np.testing.assert_array_equal(batch.expert_ids_TLK[rows], routing(sequence))
        assert batch.domains[b] == texts[name]["domain"] and len(sequence) == batch.num_prompt_tokens_B[b] + 6
    assert 1 < server.most_at_once <= 8
    summary = json.loads(result.stdout)
    assert summary["requests"] == 40 and summary["dropped"] == {} and summary["ranks"] == 2
    told = batch.rank_of_B is not None
    assert told == (api == "sglang")  # which says so itself


def test_pins_in_turn_are_sent_and_kept(tmp_path, data, model):
    with stand_in(model) as server:
        assert trace(server, tmp_path, "--pin", "in-turn").exit_code == 0
        assert pins_of(server) == {0: 20, 1: 20}
    trace_ = RoutingTrace.open(tmp_path / "t")
    batch = trace_.load()
    assert batch.rank_of_B.tolist() == [int(name[1:]) % 2 for name in batch.request_ids]
    assert trace_.info.notes["served"] == {"ranks": 2, "plan": None}


def test_a_plan_names_the_ranks_and_the_report_has_a_row_of_what_happened(tmp_path, data, model):
    plan = served_plan(tmp_path / "planned" if (tmp_path / "planned").mkdir() is None else tmp_path)
    plan.save(tmp_path / "p")
    with stand_in(model, ranks=4) as server:
        result = trace(server, tmp_path, "--pin", tmp_path / "p", "--concurrency", 4)
        assert result.exit_code == 0, result.output
        sent = {tuple(one["ids"]): one["pin"] for one in server.seen}
    batch = RoutingTrace.open(tmp_path / "t").load()
    for b in range(batch.num_requests):
        rank = batch.rank_of_B[b]
        assert sent[tuple(batch.prompt(b).tolist())] == (rank if rank >= 0 else None)
    result = CliRunner().invoke(app, ["report", str(tmp_path / "p"), str(tmp_path / "t"), "--json"])
    rows = {row["schedule"]: row for row in json.loads(result.stdout)["rows"] if row["placement"] == "plan"}
    known = np.flatnonzero(batch.rank_of_B >= 0)
    hosts, local, count = plan.placement.hosts_LER, 0, 0
    for b in known:
        ids_TLK = batch.expert_ids_TLK[batch.starts_B1[b] : batch.starts_B1[b + 1]]
        local += hosts[np.arange(3)[None, :, None], ids_TLK, batch.rank_of_B[b]].sum()
        count += ids_TLK.size
    assert rows["as-served"]["lar"] == pytest.approx(local / count)
    told = CliRunner().invoke(app, ["report", str(tmp_path / "p"), str(tmp_path / "t")])
    assert re.search(rf"as served: what.* {rows['as-served']['lar']:.3f}", told.stdout), told.stdout
    page = tmp_path / "page.html"
    drawn = CliRunner().invoke(app, ["report", str(tmp_path / "p"), str(tmp_path / "t"), "-o", str(page)])
    assert drawn.exit_code == 0 and "as served: what the server did" in page.read_text()
    # Another plan's ranks are not these.
    served_plan(tmp_path / "planned", ranks=2).save(tmp_path / "q")
    result = CliRunner().invoke(app, ["report", str(tmp_path / "q"), str(tmp_path / "t"), "--json"])
    assert "no row as-served: the server had 4 DP ranks" in result.stderr
    assert "as-served" not in {row["schedule"] for row in json.loads(result.stdout)["rows"]}


def test_a_server_without_the_flag_is_told_which(tmp_path, data, model):
    with stand_in(model) as server:
        server.records = False
        assert "start vLLM with --enable-return-routed-experts" in said(trace(server, tmp_path))
        assert len(server.seen) == 1 and not (tmp_path / "t").exists()


def test_a_server_that_reads_no_pins_is_told(tmp_path, data, model):
    with stand_in(model) as server:
        server.reads_pins = False
        assert "does not read the rank of a request" in said(trace(server, tmp_path, "--pin", "in-turn"))


def test_a_busy_server_is_waited_for(tmp_path, data, model):
    with stand_in(model) as server:
        server.busy, server.cut_off = 3, 1
        assert trace(server, tmp_path).exit_code == 0
    assert RoutingTrace.open(tmp_path / "t").num_requests == 40


def test_errors_are_counted_by_cause(tmp_path, data, model):
    with stand_in(model) as server:
        server.refused = {data[3]["text"], data[9]["text"]}
        result = trace(server, tmp_path, "--json")
    assert json.loads(result.stdout)["dropped"] == {"requests answered with 400": 2}
    assert "prompt is too long" in result.stderr
    assert RoutingTrace.open(tmp_path / "t").info.notes["left_out"]["requests"] == {"requests answered with 400": 2}


def test_a_server_that_dies_leaves_what_came_and_resume_goes_on(tmp_path, data, model):
    with stand_in(model) as server:
        server.die_after = 25
        assert "cannot be used" in said(trace(server, tmp_path))
        assert "unfinished" in said(CliRunner().invoke(app, ["show", str(tmp_path / "t")]))
        server.die_after, before = 1 << 30, len(server.seen)
        assert before >= 25
        result = trace(server, tmp_path, "--resume", "--json")
        assert result.exit_code == 0 and json.loads(result.stdout)["skipped"] >= 17
    assert RoutingTrace.open(tmp_path / "t").num_requests == 40
    with stand_in(model) as server:
        assert trace(server, tmp_path, "--resume").exit_code == 0 and not server.seen


def test_nobody_answers(tmp_path, data, model):
    with stand_in(model) as server:
        url = server.url
    result = CliRunner().invoke(
        app, ["trace", "--server", url, "--data", str(tmp_path / "x.jsonl"), "-o", str(tmp_path / "t")]
    )
    assert f"{url} cannot be used" in said(result)


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://a:b"])
def test_an_address_that_is_none(tmp_path, data, url):
    result = CliRunner().invoke(
        app, ["trace", "--server", url, "--data", str(tmp_path / "x.jsonl"), "-o", str(tmp_path / "t")]
    )
    assert "expected an address" in said(result)


def test_limits_cut_by_the_servers_own_tokens(tmp_path, data, model):
    with stand_in(model) as server:
        assert trace(server, tmp_path, "--max-length", 4, "--max-requests", 10).exit_code == 0
    batch = RoutingTrace.open(tmp_path / "t").load()
    assert batch.num_requests == 10 and batch.num_prompt_tokens_B.max() == 4


def test_chats_go_through_the_servers_template(tmp_path, model):
    rows = [
        {"messages": [{"role": "user", "content": f"what is {i}"}, {"role": "assistant", "content": "no"}]}
        for i in range(3)
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with stand_in(model) as server:
        assert trace(server, tmp_path, data="c.jsonl").exit_code == 0
        assert {one["path"] for one in server.seen} == {"/v1/chat/completions"}
        assert {one["prompt"] for one in server.seen} == {f"what is {i}" for i in range(3)}


def test_what_does_not_go_together(tmp_path, data, model):
    with stand_in(model) as server:
        assert trace(server, tmp_path, "--generate", 3).exit_code == 2
        assert trace(server, tmp_path, "some-model").exit_code == 2
    assert CliRunner().invoke(app, ["trace", "m", "--pin", "in-turn", "-o", str(tmp_path / "t")]).exit_code == 2
    assert CliRunner().invoke(app, ["trace", "-o", str(tmp_path / "t")]).exit_code == 2


def test_ctrl_c_leaves_a_finished_trace(tmp_path, model):
    """Of a source that does not end soon."""
    (tmp_path / "long.txt").write_text("\n".join(f"line {i} of many" for i in range(50_000)))
    with stand_in(model) as server:
        words = ["trace", "--server", server.url, "--data", str(tmp_path / "long.txt"), "-o", str(tmp_path / "t")]
        process = subprocess.Popen(
            [sys.executable, "-m", "semmoe", *words], stderr=subprocess.PIPE, env=dict(os.environ)
        )
        while len(server.seen) < 30:
            time.sleep(0.05)
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    assert RoutingTrace.open(tmp_path / "t").num_requests >= 10
