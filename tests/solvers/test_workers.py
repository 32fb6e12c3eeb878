"""Arrays that processes share, and worker processes that end with their work: what large traces
need."""

import glob
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import semmoe.profiles.mapped as mapped_module
import semmoe.solvers.evaluate.rows as traffic_rows_module
import semmoe.solvers.place.joint as joint_module
import semmoe.solvers.schedule.fit as fit
from semmoe.profiles.counts import profile_split, profile_traces
from semmoe.profiles.errors import InputError
from semmoe.profiles.mapped import mapped_empty, open_view, view_of
from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic
from semmoe.profiles.trace import RoutingTrace
from semmoe.profiles.trace_writer import TraceWriter
from semmoe.solvers.demands import Demands
from semmoe.solvers.deployment import Deployment
from semmoe.solvers.evaluate.score_plan import score_batch, score_placements
from semmoe.solvers.place.baselines import place_contiguous
from semmoe.solvers.place.exact_counts import resampled_loads
from semmoe.solvers.place.joint import place_semmoe
from semmoe.solvers.place.request_homes import chosen_requests, request_usage_LBE, usage_shares_BR
from semmoe.solvers.placement import Placement, Topology
from semmoe.solvers.schedule.fit import fit_schedule
from semmoe.solvers.schedule.simulate import Setting
from semmoe.solvers.workers import layer_map

# Two workers that sleep for a minute; the main process says when they run.
SLEEPERS = """
import time
from semmoe.solvers.workers import layer_map

if __name__ == "__main__":
    with layer_map(2, 256) as run:
        print("running", flush=True)
        list(run(time.sleep, [600, 600, 600, 600]))
"""


@pytest.fixture
def everything_mapped(monkeypatch):
    """Arrays of any size go to a file."""
    monkeypatch.setattr(mapped_module, "SMALL_BYTES", 0)


def test_a_view_of_a_mapped_array_is_the_same_in_another_process(everything_mapped):
    array = np.asarray(mapped_empty((4, 50, 3), np.dtype(np.uint16)))
    array[:] = np.random.default_rng(0).integers(0, 500, array.shape)
    view = view_of(array.transpose(1, 0, 2)[7:, 1:3])
    assert view is not None
    np.testing.assert_array_equal(open_view(view), array.transpose(1, 0, 2)[7:, 1:3])
    np.testing.assert_array_equal(open_view(view_of(open_view(view)[2:])), open_view(view)[2:])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(open_view, (view,)), array.transpose(1, 0, 2)[7:, 1:3])
    with pytest.raises(ValueError, match="read-only"):
        open_view(view)[0] = 1
    assert view_of(np.zeros(3)) is None


def test_nothing_is_left_of_a_mapped_array(everything_mapped):
    before = set(glob.glob(f"{tempfile.gettempdir()}/semmoe-*"))
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc") else 0
    array = mapped_empty((1000,), np.dtype(np.int64))
    part = np.asarray(array)[10:]
    del array
    part += 1
    assert part.sum() == 990
    del part
    assert set(glob.glob(f"{tempfile.gettempdir()}/semmoe-*")) == before
    if os.path.exists("/proc"):
        assert len(os.listdir("/proc/self/fd")) == descriptors


def test_no_room_for_a_mapped_array_is_told(everything_mapped):
    free = shutil.disk_usage(tempfile.gettempdir()).free
    with pytest.raises(InputError, match="No space left.*set TMPDIR"):
        mapped_empty((2**50,), np.dtype(np.int64))
    assert free - shutil.disk_usage(tempfile.gettempdir()).free < 2**33, "the disk was filled to find out"
    # Room that goes while it is written.
    bounds = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, bounds[1]))
    try:
        with pytest.raises(InputError, match="File too large.*set TMPDIR"):
            mapped_empty((2**20,), np.dtype(np.int64))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, bounds)


def test_a_mapped_sample_gives_the_same_plan_in_any_number_of_processes(tmp_path, monkeypatch):
    write_synthetic(tmp_path / "t", SyntheticWorld(num_requests=40))
    trace = RoutingTrace.open(tmp_path / "t")
    plain = profile_traces([trace], sample_ids=30 * 64 * 16)
    monkeypatch.setattr(mapped_module, "SMALL_BYTES", 0)
    monkeypatch.setattr(fit, "SMALL_TASK", 1)
    profile = profile_traces([trace], sample_ids=30 * 64 * 16)
    assert view_of(profile.sample.expert_ids_TLK) is not None and view_of(plain.sample.expert_ids_TLK) is None
    np.testing.assert_array_equal(profile.sample.expert_ids_TLK, plain.sample.expert_ids_TLK)
    options = {"load_cap": 1.05, "seed": 0, "objective": "both", "effort": "fast"}
    placement = place_semmoe(plain, Topology(4), Demands(processes=1, **options)).placement
    mapped = place_semmoe(profile, Topology(4), Demands(processes=3, **options)).placement
    np.testing.assert_array_equal(mapped.experts_LRS, placement.experts_LRS)
    whole = fit_schedule(plain.sample, placement, seed=0).to_tables()
    for name, array in fit_schedule(profile.sample, placement, seed=0, processes=3).to_tables().items():
        np.testing.assert_array_equal(array, whole[name], err_msg=name)


def test_scores_do_not_depend_on_the_number_of_processes(tmp_path, everything_mapped, monkeypatch):
    write_synthetic(tmp_path / "t", SyntheticWorld(num_requests=40))
    traces = [RoutingTrace.open(tmp_path / "t")]
    held_out_B = np.arange(40) % 3 == 0
    fitted, rest, _ = profile_split(traces, [held_out_B])
    placement = place_semmoe(fitted, Topology(4), Demands(objective="tp", effort="fast")).placement
    schedule = fit_schedule(fitted.sample, placement, seed=0)
    options = {"setting": Setting()}
    deployment = Deployment(placement, fitted.load_LE, Topology(4), schedule=schedule)
    one = score_batch(deployment, rest.sample, fitted.info, **options)
    monkeypatch.setattr(traffic_rows_module, "SMALL_TASK", 1)
    seen: list[tuple[int, int]] = []
    shown = {"processes": 2, "progress": lambda *step: seen.append(step)}
    assert score_batch(deployment, rest.sample, fitted.info, **options, **shown) == one and len(one.rows) == 12
    assert seen == [(done, 12) for done in range(1, 13)]
    whole = score_placements(deployment, traces, [held_out_B], **options)
    assert replace(whole, phase_shares=one.phase_shares) == one


@pytest.mark.parametrize("run", [None, map])
def test_fitted_and_held_out_requests_are_profiled_in_one_reading(tmp_path, everything_mapped, run):
    write_synthetic(tmp_path / "t", SyntheticWorld(num_requests=40))
    trace = RoutingTrace.open(tmp_path / "t")
    held_out_B = np.arange(40) % 3 == 0
    seen: list[tuple[int, int]] = []
    *parts, whole = profile_split([trace], [held_out_B], progress=lambda *step: seen.append(step), run=run)
    for profile, keep_B in zip(parts, (~held_out_B, held_out_B), strict=True):
        alone = profile_traces([trace], [keep_B])
        assert profile.num_tokens == alone.num_tokens
        np.testing.assert_array_equal(profile.co_activation_LEE, alone.co_activation_LEE)
        np.testing.assert_array_equal(profile.load_LE, alone.load_LE)
        np.testing.assert_array_equal(profile.sample.expert_ids_TLK, alone.sample.expert_ids_TLK)
        np.testing.assert_array_equal(profile.sample.token_ids_T, alone.sample.token_ids_T)
        assert profile.sample.request_ids == alone.sample.request_ids
    np.testing.assert_array_equal(whole.load_LE, profile_traces([trace]).load_LE)
    joined = [profile.sample.expert_ids_TLK for profile in parts]
    np.testing.assert_array_equal(whole.sample.expert_ids_TLK, np.concatenate(joined))
    assert all(np.shares_memory(whole.sample.expert_ids_TLK, ids_TLK) for ids_TLK in joined)
    assert whole.sample.request_ids == parts[0].sample.request_ids + parts[1].sample.request_ids
    assert seen[-1] == (trace.num_tokens, trace.num_tokens)
    # Of a trace beyond the budget both parts are sampled, in proportion.
    fitted, rest, whole = profile_split([trace], [held_out_B], sample_ids=20 * 64 * 16, run=run)
    assert whole.num_tokens == trace.num_tokens
    assert [p.sample.num_requests for p in (fitted, rest, whole)] == [13, 7, 20]


@pytest.mark.skipif(not os.path.exists("/proc"), reason="the file of steps is named in /proc")
def test_workers_tell_their_steps(tmp_path, everything_mapped, monkeypatch):
    monkeypatch.setattr(fit, "SMALL_TASK", 1)
    write_synthetic(tmp_path / "t", SyntheticWorld(num_requests=20))
    profile = profile_traces([RoutingTrace.open(tmp_path / "t")])
    placement = Placement.from_ranks(place_contiguous(4, 32, 4), 4)
    seen: list[tuple[int, int]] = []
    fit_schedule(profile.sample, placement, seed=0, processes=2, progress=lambda *step: seen.append(step))
    assert seen[0] == (0, 8) and seen[-1] == (8, 8) and seen == sorted(seen)


def test_several_traces_are_counted_as_one(tmp_path):
    write_synthetic(tmp_path / "both", SyntheticWorld(num_requests=40))
    both = RoutingTrace.open(tmp_path / "both")
    batch = both.load()
    for name, requests in (("a", range(20)), ("b", range(20, 40))):
        with TraceWriter(tmp_path / name, both.info) as writer:
            for b in requests:
                rows = slice(batch.starts_B1[b], batch.starts_B1[b + 1])
                writer.add(batch.request_ids[b], batch.expert_ids_TLK[rows], token_ids=batch.sequence(b))
    parts = profile_traces([RoutingTrace.open(tmp_path / name) for name in "ab"])
    whole = profile_traces([both])
    np.testing.assert_array_equal(parts.co_activation_LEE, whole.co_activation_LEE)
    np.testing.assert_array_equal(parts.sample.expert_ids_TLK, whole.sample.expert_ids_TLK)


def test_results_come_in_order_and_a_failure_ends_the_map():
    with layer_map(2, 256) as run:
        assert list(run(abs, range(-7, 0))) == list(range(7, 0, -1))
    with pytest.raises(TypeError), layer_map(2, 256) as run:
        list(run(abs, [1, "two", 3]))


@pytest.mark.skipif(not os.path.exists("/proc"), reason="looks at processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_main_process_in_the_middle_of_their_work(tmp_path, how):
    script = tmp_path / "sleepers.py"
    script.write_text(SLEEPERS)
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    assert process.stdout is not None and process.stdout.readline() == "running\n"
    workers = _children(process.pid)
    assert len(workers) >= 2
    begun = time.monotonic()
    process.send_signal(how)
    _, complaints = process.communicate(timeout=300)
    while any(os.path.exists(f"/proc/{worker}") for worker in workers):
        assert time.monotonic() - begun < 300  # their sleep is longer
        time.sleep(0.05)
    assert process.returncode == -how or how == signal.SIGINT
    assert complaints.count("Traceback") <= (how == signal.SIGINT)


def _children(parent: int) -> list[int]:
    tasks = Path(f"/proc/{parent}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def test_request_homes_look_at_a_bounded_choice_of_requests(tmp_path, monkeypatch):
    write_synthetic(tmp_path / "t", SyntheticWorld(num_requests=60))
    profile = profile_traces([RoutingTrace.open(tmp_path / "t")])
    counts = profile.info.num_layers * profile.info.num_experts
    chosen_B = chosen_requests(profile, 0, 20 * counts)
    assert len(chosen_B) == 20 and (np.diff(chosen_B) > 0).all() and chosen_B[-1] > 25
    usage_LBE = request_usage_LBE(profile.sample, chosen_B, profile.info.num_experts)
    assert usage_LBE.dtype == np.float32 and usage_LBE.shape[1] == 20
    for number, b in enumerate(chosen_B.tolist()):
        rows = slice(profile.sample.starts_B1[b], profile.sample.starts_B1[b + 1])
        for layer in (0, profile.info.num_layers - 1):
            expected_E = np.bincount(
                profile.sample.expert_ids_TLK[rows, layer].ravel(), minlength=profile.info.num_experts
            )
            np.testing.assert_array_equal(usage_LBE[layer, number], expected_E)
    # Resamples count all requests, whatever is counted at once.
    some_LJE, all_LJE = (resampled_loads(profile, 3, 0, max_counts=most * counts) for most in (20, 60))
    np.testing.assert_array_equal(some_LJE, all_LJE)
    np.testing.assert_array_equal(all_LJE[:, 0], profile.load_LE)
    demands = Demands(load_cap=1.1, objective="dp", effort="fast")
    whole_LE = place_semmoe(profile, Topology(4), demands).placement.rank_of_LE
    monkeypatch.setattr(
        joint_module, "chosen_requests", lambda profile, seed: chosen_requests(profile, seed, 20 * counts)
    )
    bounded_LE = place_semmoe(profile, Topology(4), demands).placement.rank_of_LE
    kept = [local_share(r_LE, profile) for r_LE in (whole_LE, bounded_LE)]
    assert kept[1] > 0.9 * kept[0] > 1.5 / 4


def local_share(rank_of_LE: np.ndarray, profile) -> float:
    """Share of activations on the request's best rank: what an Attention-DP oracle without caps
    reaches."""
    requests_B = np.arange(profile.sample.num_requests)
    usage_LBE = request_usage_LBE(profile.sample, requests_B, profile.info.num_experts)
    return float(usage_shares_BR(rank_of_LE, usage_LBE, 4).max(axis=1).mean())


@pytest.mark.skipif(not hasattr(os, "openpty") or not os.path.exists("/proc"), reason="needs a terminal and /proc")
@pytest.mark.parametrize(
    "stage",
    ["reading tokens", "placing layers", "fitting schedules", "scoring on held-out requests", "placing layers again"],
)
def test_ctrl_c_in_any_stage_is_one_line_and_leaves_nothing(large_trace, tmp_path, stage):
    command = [sys.executable, "-m", "semmoe", "place", str(large_trace), "--ranks", "4", "--processes", "2"]
    terminal, stderr = os.openpty()
    process = subprocess.Popen(
        [*command, "-o", str(tmp_path / "p")],
        stdout=subprocess.PIPE,
        stderr=stderr,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120", "TMPDIR": str(tmp_path)},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    os.close(stderr)
    shown, workers, begun = b"", [], 0.0
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # the terminal has no writer left
            break
        shown += piece
        if stage.encode() in shown and not begun:
            workers, begun = _children(process.pid), time.monotonic()
            os.killpg(process.pid, signal.SIGINT)  # a terminal's Ctrl-C goes to the workers too
    os.close(terminal)
    assert begun, shown[-500:]
    code = process.wait(timeout=240)
    assert code == 130 and process.stdout is not None and process.stdout.read() == b""
    process.stdout.close()
    while any(os.path.exists(f"/proc/{worker}") for worker in workers):
        assert time.monotonic() - begun < 240
        time.sleep(0.05)
    assert shown.count(b"semmoe: ") == 1 and b"semmoe: interrupted" in shown and b"Traceback" not in shown
    assert os.listdir(tmp_path) == []


@pytest.fixture(scope="module")
def large_trace(tmp_path_factory) -> Path:
    """A trace on which every stage lasts for a while."""
    path = tmp_path_factory.mktemp("traces") / "t"
    write_synthetic(path, SyntheticWorld(num_layers=8, num_experts=64, num_requests=1000))
    return path


def test_large_plans_ask_for_no_huge_pages_unless_told_to() -> None:
    code = "import os; from semmoe.solvers.workers import *; compute_on_one_thread(); print(*map(os.environ.get, SMALL_PAGES))"
    environment = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "mimalloc"}
    environment.pop("NUMPY_MADVISE_HUGEPAGE", None)
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["0", "mimalloc"]
