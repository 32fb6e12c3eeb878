"""semmoe run from end to end on real ranks: the demo model, resharded checkpoints, refusals, and
ranks that fail."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cases import rank_cases
from random_plans import random_plan
from tiny_models import tiny_model
from typer.testing import CliRunner

from semmoe.main import app
from semmoe.profiles.counts import profile_traces
from semmoe.profiles.demo.paths import demo_model_path
from semmoe.profiles.errors import InputError
from semmoe.profiles.files import Lock
from semmoe.profiles.split import request_keys
from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic
from semmoe.profiles.trace import RoutingTrace
from semmoe.runtime.ranks.launch import launch
from semmoe.runtime.replay.cases import ReplayOptions, prepare
from semmoe.runtime.reshard.records import ReshardOptions
from semmoe.runtime.reshard.reshard import reshard_checkpoint
from semmoe.runtime.serving.results import kept_results, partial_state
from semmoe.solvers.evaluate.metrics import metrics_XL
from semmoe.solvers.evaluate.sums import traffic_sums
from semmoe.solvers.placement import Topology
from semmoe.solvers.plan import Plan
from semmoe.solvers.schedule.fit import fit_schedule
from semmoe.solvers.time.hardware import TimeAsked, resolve

METRICS = {
    *("scheduler", "ranks", "requests", "prefill_tokens_per_s", "decode_tokens_per_s", "lar", "rem", "rows_sent"),
    *("bytes_sent", "load_imbalance", "token_imbalance", "time", "check", "layers", "device", "backend"),
    *("verified", "same_checkpoint", "skipped", "replica_choice"),
}
RUN = ["run", "demo", "--dtype", "float32", "--max-new-tokens", "4", "--batch-tokens", "600"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with trace `t`, plan `p` with replicas and a schedule, plan `bare` without a
    schedule, and prompts."""
    root = tmp_path_factory.mktemp("demo")
    write_synthetic(root / "t", SyntheticWorld(num_layers=4, num_experts=32, top_k=4, num_requests=40, vocab_size=4000))
    sample = profile_traces([RoutingTrace.open(root / "t")], seed=0).sample
    bare = rank_cases.with_replicas(random_plan(demo_model_path(), ranks=2), 2)
    bare.save(root / "bare")
    replace(bare, tables=fit_schedule(sample, bare.placement, seed=0).to_tables()).save(root / "p")
    texts = ["a", "word " * 480, "def f(x):\n    return", "Die Katze", "Once upon a time there was"]
    lines = [json.dumps({"id": f"r{i}", "text": text}) for i, text in enumerate(texts)]
    (root / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    bad = [json.dumps({"id": f"bad{i}", "text": text}) for i, text in enumerate(["", " \n", "word " * 2000])]
    (root / "some-bad.jsonl").write_text("\n".join([bad[0], *lines[:2], *bad[1:], *lines[2:]]) + "\n")
    return root


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, str(result.exception) if result.exception and result.exit_code == 1 else result.stdout


def test_run_gives_the_answers_of_the_model(demo: Path) -> None:
    out = demo / "out.jsonl"
    prompts = ["--plan", str(demo / "p"), "--prompts", str(demo / "some-bad.jsonl")]
    done = CliRunner().invoke(app, [*RUN, *prompts, "--check", "--json", "-o", str(out)])
    told = done.stderr
    assert done.exit_code == 0, told
    assert "skipped: request bad0 of" in told and "skipped: request bad1 of" in told
    assert "skipped: request bad2 has 4001 tokens and may get 4 more, the model reads at most 1024" in told, told
    assert "3 of 8 requests are skipped" in told
    metrics = json.loads(done.stdout)
    assert set(metrics) == METRICS
    assert metrics["check"] == {"ok": True, "compared": 5, "mismatches": [], "ties": []}
    assert (metrics["scheduler"], metrics["ranks"], metrics["requests"], metrics["skipped"]) == ("dp", 2, 5, 3)
    assert set(metrics["time"]) == {"attention", "dispatch", "experts", "combine", "wait"}
    assert 0 < metrics["lar"] < 1 and 0 < metrics["rem"] <= 1
    assert metrics["rows_sent"] == sum(layer["rows_sent"] for layer in metrics["layers"])
    for layer in metrics["layers"]:
        assert layer["rows_sent"] == np.sum(layer["links"]) and np.trace(layer["links"]) == 0
    # Out: 128 values, 4 weights, 4 slots; back: 128 values.
    assert metrics["bytes_sent"] == metrics["rows_sent"] * (512 + 16 + 8 + 512)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["id"] for line in lines] == ["r0", "r1", "r2", "r3", "r4"]
    assert {tuple(line) for line in lines} == {("id", "rank", "text", "token_ids", "finish_reason")}
    assert {line["rank"] for line in lines} == {0, 1}
    assert not (demo / "out.jsonl.partial").exists()


@pytest.mark.parametrize("predict", ["context", "learning"])
def test_tensor_parallel_run_gives_the_answers_of_the_model(demo: Path, predict: str) -> None:
    prompts = ["--plan", str(demo / "p"), "--prompts", str(demo / "prompts.jsonl")]
    code, stdout = run(*RUN, *prompts, "--scheduler", "tp", "--predict", predict, "--check", "--json")
    assert code == 0, stdout
    metrics = json.loads(stdout)
    assert metrics["check"] == {"ok": True, "compared": 5, "mismatches": [], "ties": []}
    assert metrics["token_imbalance"] <= 1.05 and metrics["requests"] == 5


def test_learning_helps_on_traffic_that_the_plan_does_not_know(demo: Path) -> None:
    """The plan's schedule is of a made-up trace: its tables mislead on real prompts."""
    texts = ["--prompts", str(demo_model_path().parent / "prompts.jsonl"), "--max-requests", "60"]
    lar = {}
    for predict in ("context", "learning"):
        code, stdout = run(*RUN, "--plan", str(demo / "p"), *texts, "--scheduler", "tp", "--predict", predict, "--json")
        assert code == 0, stdout
        lar[predict] = json.loads(stdout)["lar"]
    assert lar["learning"] > lar["context"] + 0.03


def test_replay_measures_what_the_evaluator_predicts(demo: Path) -> None:
    arguments = ["--plan", str(demo / "p"), "--hidden-size", "16", "--expert-size", "8", "--batch-tokens", "500"]
    hardware = demo / "hardware.json"
    code, stdout = run("run", "--replay", str(demo / "t"), *arguments, "--write-hardware", str(hardware), "--json")
    assert code == 0, stdout
    result = json.loads(stdout)
    # What was measured is what a prediction for these experts reads.
    model = ("", 4, 32, 4)
    asked = TimeAsked(hardware=str(hardware), hidden_size=16, expert_size=8)
    costing = resolve(asked, model, num_ranks=2, num_nodes=1, prompts=1)
    assert {"dispatch", "combine", "experts"} <= costing.curves.keys() and not costing.assumed
    with pytest.raises(InputError, match="experts of 16 x 8 were measured"):
        resolve(replace(asked, expert_size=16), model, num_ranks=2, num_nodes=1, prompts=1)
    cases = [(row["placement"], row["schedule"]) for row in result["rows"]]
    assert cases == [
        *(
            ("contiguous", "random"),
            ("load", "random"),
            ("plan", "random"),
            ("plan", "dp-scorer"),
            ("plan", "tp-context"),
        )
    ]
    sizes = {"hidden_size": 16, "expert_size": 8, "batch_tokens": 500}
    options = ReplayOptions(trace=str(demo / "t"), plan=str(demo / "p"), **sizes)
    batch, topology = RoutingTrace.open(demo / "t").load(), Topology(2)
    for row, case in zip(result["rows"], prepare(options, 2, print).cases, strict=True):
        sums = traffic_sums(batch, case.serving_LRE, topology, dispatch="per-rank", homes_TL=case.homes_TL)
        expected = metrics_XL(sums.resampled(np.ones((1, len(sums.tokens_G)))), topology, "per-rank")
        assert row["rows_per_token"] == pytest.approx(expected["rem"].mean(), abs=1e-9)
        assert row["load_imbalance"] == pytest.approx(expected["load_imbalance"].mean(), abs=1e-9)
        assert row["bytes_per_token"] == pytest.approx(row["rows_per_token"] * (64 + 16 + 8 + 64), abs=1e-6)
    # The same order on any machine; how close they come on a shaped network: docs/experiments.md.
    ratios = [row["predicted_ms_per_layer"] / row["ms_per_layer"] for row in result["rows"]]
    assert 0.1 < np.median(ratios) < 10, ratios


def test_resharded_checkpoints(tmp_path: Path) -> None:
    for family in ("qwen3_moe", "gpt_oss"):
        tiny_model(family).save_pretrained(tmp_path / family)
        plan = random_plan(tmp_path / family)
        plan.save(tmp_path / f"{family}-plan")
        reshard_checkpoint(
            tmp_path / family, plan, tmp_path / f"{family}-permuted", ReshardOptions(layout="permuted", verify="none")
        )
        more = rank_cases.with_replicas(plan, 1)
        more.save(tmp_path / f"{family}-ranks-plan")
        reshard_checkpoint(
            tmp_path / family, more, tmp_path / f"{family}-ranks", ReshardOptions(layout="ranks", verify="none")
        )
    found = launch(rank_cases.compare_layouts, (str(tmp_path), ["qwen3_moe", "gpt_oss"]), 2)
    assert len(found) == 4
    assert {name: difference for name, difference in found.items() if not difference <= 1e-4} == {}


def test_a_reshard_for_ranks_is_checked_against_its_original(demo: Path, tmp_path: Path) -> None:
    split, plan = tmp_path / "split", Plan.load(demo / "p")
    reshard_checkpoint(demo_model_path(), plan, split, ReshardOptions(layout="ranks", verify="none"))
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "other")
    words = ["run", str(split), *RUN[2:], "--plan", str(demo / "p"), "--prompts", str(demo / "prompts.jsonl")]
    code, text = run(*words, "--check")
    assert code == 1 and text.endswith("which plain Transformers cannot load: name its original with --reference MODEL")
    code, text = run(*words, "--check", "--reference", str(split))
    assert code == 1 and text.startswith(f"--reference {split} is a reshard for ranks")
    code, text = run(*words, "--check", "--reference", str(tmp_path / "other"))
    assert code == 1 and text.startswith(f"--reference {tmp_path / 'other'} has num_hidden_layers 3, {split} has "), (
        text
    )
    assert run(*words, "--reference", "demo")[0] == 2  # without --check
    code, text = run(*words, "--check", "--reference", "demo", "--json")
    assert code == 0, text
    assert json.loads(text)["check"] == {"ok": True, "compared": 5, "mismatches": [], "ties": []}


def test_a_rank_that_dies_ends_the_run() -> None:
    with pytest.raises(InputError, match="rank 1 was killed by SIGKILL"):
        launch(rank_cases.kill_itself, (1,), 3)


def test_ctrl_c_ends_all_ranks_without_a_word_from_them(tmp_path: Path) -> None:
    code = (
        "from cases import rank_cases; from semmoe.runtime.ranks.launch import launch; "
        f"launch(rank_cases.write_rank_and_wait, ({str(tmp_path)!r},), 2)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(Path(rank_cases.__file__).parents[1])},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    while len(list(tmp_path.iterdir())) < 2 and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # a terminal's Ctrl-C goes to the ranks too
    _, complaints = process.communicate(timeout=240)  # the ranks wait longer
    assert complaints.count("Traceback") == 1 and "KeyboardInterrupt" in complaints  # of this process alone


def test_a_rank_that_hangs_is_named_with_the_layer() -> None:
    with pytest.raises(InputError, match=r"rank 0: the exchange of split sizes at layer 7 failed: .*"):
        launch(rank_cases.hang, (1, 3.0), 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nproc", "3"], "3 ranks run, the plan .* is for 2"),
        (
            ["--scheduler", "tp", "--predict", "luck"],
            "--predict luck: expected one of context, learning, table, paper, none",
        ),
        (["--scheduler", "best"], "--scheduler best: expected one of none, dp, tp"),
        (["--scheduler", ""], "--scheduler : expected one of none, dp, tp"),
        (["--backend", "nccl", "--device", "cpu"], "--backend nccl needs GPUs"),
        (["--backend", "mpi"], "--backend mpi: expected one of auto, nccl, gloo"),
        (["--device", "tpu"], "--device tpu: expected auto, cpu, cuda"),
        (["--max-new-tokens", "4000"], "request r0 has 1 tokens and may get 4000 more, the model reads at most 1024"),
        (["--prompts", "/nowhere.jsonl"], "/nowhere.jsonl is neither a file nor a directory"),
        (["--text-field", "body"], "has no field 'body'; it has id, text"),
    ],
)
def test_refusals_in_one_line(demo: Path, arguments: list[str], message: str) -> None:
    code, text = run(*RUN, "--plan", str(demo / "p"), "--prompts", str(demo / "prompts.jsonl"), *arguments)
    assert code == 1
    assert "\n" not in text
    assert re.search(message, text), text


def test_an_output_that_cannot_be_written_is_told_at_once(demo: Path, tmp_path: Path) -> None:
    words = ["--plan", str(demo / "p"), "--prompts", str(demo / "prompts.jsonl"), "-o"]
    for output, message in ((tmp_path, "it is a directory"), (tmp_path / "a" / "b", "the directory .* does not exist")):
        code, text = run(*RUN, *words, str(output))
        assert code == 1 and re.fullmatch(f"cannot write {output}: {message}", text), text
    (tmp_path / "o.partial").mkdir()
    code, text = run(*RUN, *words, str(tmp_path / "o"))
    assert code == 1 and text == f"cannot write {tmp_path / 'o.partial'}: it is a directory"


def test_a_run_that_fails_at_its_start_counts_no_requests_of_an_older_one(demo: Path, tmp_path: Path) -> None:
    shutil.copytree(demo_model_path(), tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text("{")
    (tmp_path / "o.partial").write_text("an older run\n")
    words = ["--plan", str(demo / "p"), "--prompts", str(demo / "prompts.jsonl"), "-o", str(tmp_path / "o")]
    code, text = run("run", str(tmp_path / "model"), *words, "--max-new-tokens", "2")
    assert code == 1 and re.fullmatch(".* has a generation_config.json that cannot be read: [^;]*", text), text
    assert (tmp_path / "o.partial").read_text() == "an older run\n"


def test_what_is_kept_is_counted_once_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "o.partial").write_text("an older run\n")
    before = partial_state(tmp_path / "o")
    assert kept_results(tmp_path / "o", before) == ""
    (tmp_path / "o.partial").write_text("one\ntwo\n")
    assert kept_results(tmp_path / "o", before) == f"; 2 finished requests are in {tmp_path / 'o.partial'}"
    (tmp_path / "o.partial").write_bytes(b'one\ntwo\n{"cut": "\xc3')  # as a full disk leaves it
    assert kept_results(tmp_path / "o", before).startswith("; 2 finished")
    (tmp_path / "o.partial").unlink()
    assert kept_results(tmp_path / "o", before) == ""


def test_finished_requests_of_an_earlier_run_are_kept_and_named(
    demo: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "o.partial").write_text("one\ntwo\n")
    (tmp_path / "o.partial.1").write_text("older\n")
    (tmp_path / ".o.partial.lock").write_text("semmoe lock\n1\n")  # of a killed run
    words = ["--plan", str(demo / "p"), "--prompts", str(demo / "prompts.jsonl"), "-o", str(tmp_path / "o")]
    with Lock(tmp_path / "o", tmp_path / ".o.partial.lock"):
        code, text = run(*RUN, *words)
        assert code == 1 and text.startswith(
            f"another run is writing {tmp_path / 'o'}: process {os.getpid()} since "
        ), text
    assert run(*RUN, *words)[0] == 0
    told = f"2 finished requests of an earlier run were in {tmp_path / 'o.partial'}: they are kept in {tmp_path / 'o.partial.2'}"
    assert told in capfd.readouterr().err
    assert (tmp_path / "o.partial.2").read_text() == "one\ntwo\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o", "o.partial.1", "o.partial.2"]


def test_what_one_rank_refuses_all_ranks_have_seen() -> None:
    assert launch(rank_cases.refuse_together, (1,), 3) == ["rank 1 lacks a file"] * 3


def test_out_of_memory_is_one_line(demo: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--plan", str(demo / "bare"), "--hidden-size", str(10**13)]
    code, text = run("run", "--replay", str(demo / "t"), *words)
    assert code == 1 and re.match(r"rank \d is out of memory: ", text) and "\n" not in text
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["demo", "--prompts", "demo", "--predict", "learning"], "--predict does not go with another scheduler"),
        (["demo", "--prompts", "demo", "--hidden-size", "8"], "--hidden-size does not go with CHECKPOINT"),
        (["demo", "--prompts", "demo", "--timeout", "inf"], "Invalid value for '--timeout'"),
        (["--replay", "t", "--hidden-size", "8", "--check"], "--check does not go with --replay"),
        (["--replay", "t", "--hidden-size", "8", "-o", "x"], "--output does not go with --replay"),
    ],
)
def test_options_that_would_be_passed_over(words: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["run", "--plan", "p", *words])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no prompt"),
        ('{"body": "a"}\n', "it has body: name one with --text-field"),
        ('{"text": ""}\n', "request prompts.jsonl:1 of .* is empty"),
    ],
)
def test_prompts_that_hold_no_text(demo: Path, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "prompts.jsonl").write_text(content)
    code, text = run(*RUN, "--plan", str(demo / "p"), "--prompts", str(tmp_path / "prompts.jsonl"))
    assert code == 1
    assert "\n" not in text
    assert re.search(message, text), text


def test_missing_plans_and_prompts_are_told_before_torch_is_imported(demo: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("")
    code = (
        "import sys; from semmoe.main import main\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    for plan in (demo / "p", tmp_path / "nothing"):
        words = ["run", "demo", "--plan", str(plan), "--prompts", str(tmp_path / "prompts.jsonl")]
        ended = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
        assert ended.stdout == "1 False\n", ended.stderr
        assert ended.stderr.startswith("semmoe: ") and ended.stderr.count("\n") == 1


def test_run_reads_what_trace_reads(demo: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "some.jsonl").write_text('{"body": "a"}\n{"body": "Once upon a time"}\n{"body": "c"}\n')
    words = ["--plan", str(demo / "p"), "--prompts", str(tmp_path / "texts"), "--text-field", "body"]
    code, text = run(*RUN, *words, "--max-requests", "2", "--max-new-tokens", "2")
    assert code == 0
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert [line["id"] for line in lines] == ["some.jsonl:1", "some.jsonl:2"]
    assert [(len(line["token_ids"]), line["finish_reason"]) for line in lines] == [(2, "length")] * 2


def test_dp_needs_a_plan_that_scores_requests(demo: Path) -> None:
    arguments = ["--plan", str(demo / "bare"), "--prompts", str(demo / "prompts.jsonl"), "--scheduler", "dp"]
    code, text = run(*RUN, *arguments)
    assert code == 1 and "this plan scores no requests" in text


def test_replay_leaves_out_requests_that_the_plan_was_fitted_on(demo: Path, tmp_path: Path) -> None:
    trace = RoutingTrace.open(demo / "t")
    keys_B, tokens_B = request_keys(trace.requests()), np.diff(trace.load().starts_B1)
    told: list[str] = []
    for name, seen in (("half", slice(0, 25)), ("all", slice(None))):
        replace(Plan.load(demo / "bare"), fitted_keys=keys_B[seen]).save(tmp_path / name)
    options = ReplayOptions(trace=str(demo / "t"), plan=str(tmp_path / "half"), hidden_size=16, batch_tokens=500)
    assert len(prepare(options, 2, told.append).expert_ids_TLK) == tokens_B[25:].sum()
    assert "25 requests" in told[0] and "left out" in told[0]
    prepared = prepare(replace(options, plan=str(tmp_path / "all")), 2, told.append)
    assert len(prepared.expert_ids_TLK) == tokens_B.sum() and "fitted on every request" in told[-1]


def test_replay_refuses_experts_of_sizes_that_kernels_do_not_take(demo: Path) -> None:
    words = ["run", "--replay", str(demo / "t"), "--plan", str(demo / "p"), "--json", "--max-tokens", "200"]
    for sizes, dtype, unit in (((33, 8), "float32", 4), ((16, 5), "float32", 4), ((16, 12), "bfloat16", 8)):
        given = ["--hidden-size", str(sizes[0]), "--expert-size", str(sizes[1]), "--dtype", dtype]
        code, text = run(*words, *given)
        assert code == 1 and f"expected multiples of {unit}, or --expert-size 0" in text, text
    code, _ = run(*words, "--hidden-size", "33", "--scheduler", "none")
    assert code == 0


def test_replay_refuses_another_model(demo: Path, tmp_path: Path) -> None:
    write_synthetic(tmp_path / "other", SyntheticWorld(num_layers=2, num_experts=8, top_k=2, num_requests=4))
    code, text = run("run", "--replay", str(tmp_path / "other"), "--plan", str(demo / "p"), "--hidden-size", "16")
    assert code == 1 and "num_layers 2" in text
    code, _ = run("run", "--replay", str(demo / "t"), "--plan", str(demo / "p"))
    assert code == 2  # --hidden-size is needed
