"""semmoe run as its own processes: under torchrun, on one and on two nodes, and with a rank that
is killed in the middle."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from cases import rank_cases
from random_plans import random_plan

from semmoe.profiles.counts import profile_traces
from semmoe.profiles.demo.paths import demo_model_path
from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic
from semmoe.profiles.trace import RoutingTrace
from semmoe.runtime.ranks.failures import short_reason
from semmoe.solvers.schedule.fit import fit_schedule

SEMMOE = ["-m", "semmoe", "run"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
MOST_S = 240.0  # for starting processes on a busy machine


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with plan `p` for 2 ranks, 5 prompts, and 300 prompts that take a while."""
    root = tmp_path_factory.mktemp("torchrun")
    write_synthetic(root / "t", SyntheticWorld(num_layers=4, num_experts=32, top_k=4, num_requests=40, vocab_size=4000))
    sample = profile_traces([RoutingTrace.open(root / "t")], seed=0).sample
    plan = rank_cases.with_replicas(random_plan(demo_model_path(), ranks=2), 2)
    replace(plan, tables=fit_schedule(sample, plan.placement, seed=0).to_tables()).save(root / "p")
    few = ["a", "word " * 400, "def f(x):\n    return", "Die Katze", "Once upon a time there was"]
    for name, texts in (("few", few), ("many", [f"{i} {'word ' * (20 + i % 50)}" for i in range(300)])):
        lines = [json.dumps({"id": f"r{i}", "text": text}) for i, text in enumerate(texts)]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return root


# What a rank's interpreter finds at start: at its end it writes down which threads are left.
NAME_THREADS = """
import atexit, os, pathlib

def write():
    names = [task.joinpath("comm").read_text().strip() for task in pathlib.Path("/proc/self/task").iterdir()]
    pathlib.Path(f"threads{os.environ['RANK']}.txt").write_text(" ".join(names))

if "RANK" in os.environ:
    atexit.register(write)
"""


def start(words: list[str], folder: Path, **more: str) -> "subprocess.Popen[str]":
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more
    pipe = subprocess.PIPE
    return subprocess.Popen(words, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def free_port() -> int:
    """For torchrun on two nodes, which has to be told one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_words(prompts: str, output: str, *more: str) -> list[str]:
    words = ["demo", "--plan", "p", "--prompts", f"{prompts}.jsonl", "--dtype", "float32", "--batch-tokens", "600"]
    return [*SEMMOE, *words, "-o", output, "--json", *more]


def test_torchrun_gives_what_locally_started_ranks_give(demo: Path) -> None:
    few = ("--max-new-tokens", "4")
    local = start([sys.executable, *run_words("few", "local.jsonl", *few)], demo)
    (demo / "hook").mkdir()
    (demo / "hook" / "sitecustomize.py").write_text(NAME_THREADS)
    words = [*TORCHRUN, "--nproc-per-node", "2", *run_words("few", "one.jsonl", "--check", *few)]
    one_node = start(words, demo, PYTHONPATH=str(demo / "hook"))
    where = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    nodes = [
        start([*TORCHRUN, *where, "--node-rank", str(node), *run_words("few", "two.jsonl", *few)], demo)
        for node in range(2)
    ]
    outputs = {}
    for name, process in (("local", local), ("one", one_node), ("two", nodes[0]), ("other node", nodes[1])):
        outputs[name], errors = process.communicate(timeout=MOST_S)
        assert process.returncode == 0, errors
    assert outputs.pop("other node") == ""  # rank 0 speaks
    for rank in range(2):
        left = (demo / f"threads{rank}.txt").read_text()
        assert left and "gloo" not in left, "a thread of gloo can abort an interpreter that ends"
    metrics = {name: json.loads(output) for name, output in outputs.items()}
    assert metrics["one"].pop("check") == {"ok": True, "compared": 5, "mismatches": [], "ties": []}
    lines = (demo / "local.jsonl").read_text()
    assert len(lines.splitlines()) == 5
    for name in ("one", "two"):
        assert (demo / f"{name}.jsonl").read_text() == lines
        for key in ("ranks", "requests", "lar", "rem", "rows_sent", "bytes_sent", "layers"):
            assert metrics[name][key] == metrics["local"][key], key


def test_a_mistake_is_told_once_under_torchrun(demo: Path) -> None:
    words = run_words("few", "no.jsonl", "--prompts", "/nowhere.jsonl")
    process = start([*TORCHRUN, "--nproc-per-node", "2", *words], demo)
    _, errors = process.communicate(timeout=MOST_S)
    told = [line for line in errors.splitlines() if line.startswith("semmoe: ")]
    assert process.returncode == 1 and len(told) == 1, errors
    assert told[0].startswith("semmoe: /nowhere.jsonl is neither a file nor a directory")
    assert not list(demo.glob("no.jsonl*"))


def children(pid: int) -> list[int]:
    found = [file.read_text().split() for file in Path(f"/proc/{pid}/task").glob("*/children")]
    return sorted(int(word) for words in found for word in words)


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def find_ranks(process: "subprocess.Popen[str]", partial: Path) -> list[int]:
    """The process of each rank, once a request is finished."""
    deadline = time.monotonic() + MOST_S
    while not (partial.exists() and partial.stat().st_size) and process.poll() is None:
        assert time.monotonic() < deadline, "no request was finished"
        time.sleep(0.05)
    found = {pid: command_of(pid) for pid in children(process.pid)}
    servers = [pid for pid in found if "forkserver" in found[pid]]  # whose copies the ranks are
    ranks = children(servers[0]) if servers else [pid for pid in found if "resource_tracker" not in found[pid]]
    assert len(ranks) == 2, found
    return ranks


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds ranks in /proc")
@pytest.mark.parametrize("starter", ["local", "torchrun"])
def test_a_killed_rank_ends_the_run_and_keeps_what_is_finished(demo: Path, starter: str) -> None:
    before = [*TORCHRUN, "--nproc-per-node", "2"] if starter == "torchrun" else [sys.executable]
    process = start([*before, *run_words("many", f"killed-{starter}.jsonl", "--max-new-tokens", "40")], demo)
    partial = demo / f"killed-{starter}.jsonl.partial"
    os.kill(find_ranks(process, partial)[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=MOST_S)
    assert process.returncode == 1, errors
    kept = partial.read_text().splitlines()
    assert 0 < len(kept) < 300 and not (demo / f"killed-{starter}.jsonl").exists()
    assert {tuple(json.loads(line)) for line in kept} == {("id", "rank", "text", "token_ids", "finish_reason")}
    told = [line for line in errors.splitlines() if line.startswith("semmoe: rank")]
    assert len(told) == 1 and f"{len(kept)} finished requests are in killed-{starter}.jsonl.partial" in told[0], errors
    if starter == "local":
        assert told[0].startswith("semmoe: rank 1 was killed by SIGKILL: the run is over")
    else:
        assert told[0].startswith("semmoe: rank 1 has died: the run is over")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds ranks in /proc")
def test_a_stopped_rank_ends_the_run_by_name(demo: Path) -> None:
    """Rank 1 of ranks that were started here, rank 0 of torchrun's."""
    starters = {"local": [sys.executable], "torchrun": [*TORCHRUN, "--nproc-per-node", "2"]}
    stopped = {"local": 1, "torchrun": 0}
    running = {
        name: start([*words, *run_words("many", f"stopped-{name}.jsonl", "--max-new-tokens", "60")], demo)
        for name, words in starters.items()
    }
    for name, process in running.items():
        rank = find_ranks(process, demo / f"stopped-{name}.jsonl.partial")[stopped[name]]
        os.kill(rank, signal.SIGSTOP)
    for name, process in running.items():
        _, errors = process.communicate(timeout=MOST_S)
        assert process.returncode == 1, errors
        told = [line for line in errors.splitlines() if line.startswith("semmoe: rank")]
        assert len(told) == 1 and re.match(
            rf"semmoe: rank {stopped[name]} has not answered for [12]\d s, its process \d+ is stopped: the run is over; "
            rf"[1-9]\d* finished requests are in stopped-{name}.jsonl.partial",
            told[0],
        ), errors


def test_reasons_are_short() -> None:
    text = (
        "[/__w/third_party/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:21140: Connection reset by peer. "
        "This is typically caused by a remote worker hanging.\nmore"
    )
    assert short_reason(text) == "Read error [127.0.0.1]:21140: Connection reset by peer"
    assert short_reason("Timed out waiting 3000ms for recv") == "Timed out waiting 3000ms for recv"
