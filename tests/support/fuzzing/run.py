"""Runs inputs: each in a directory and a process of its own, forked from one that has imported
everything; and says what is wrong with the answer."""

import ctypes
import json
import os
import re
import resource
import select
import shutil
import signal
import struct
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fuzzing.inputs import WHOLE_FORMAT, Input

SECONDS = 20.0  # in which every answer is due, on a machine with nothing else to do
MOST_SECONDS = 120.0
MEMORY_BYTES = 6 << 30  # that a command may ask for beyond what the imports hold
LONGEST_LINE = 1000
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
OUTCOMES = (
    "refused",
    "passed",
    "traceback",
    "signal",
    "slow",
    "escaped",
    "accepted",
    "exit code",
    "lines",
    "undamaged input refused",
    "not made",
)


class Answer(NamedTuple):
    """How a command ended."""

    code: int | None  # None: ended by the clock
    signal: int
    seconds: float
    stderr: str
    touched: list[str]  # files that changed, other than the output


def import_everything() -> None:
    """What any command imports, so that no child has to."""
    import gc
    import importlib
    import pkgutil

    import matplotlib.pyplot  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import scipy.optimize  # noqa: F401
    import torch
    import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401
    import yaml  # noqa: F401
    from rich import console, table  # noqa: F401

    for name in ("semmoe", "semmoe.profiles", "semmoe.solvers", "semmoe.runtime"):  # folders of their own
        for module in pkgutil.walk_packages(importlib.import_module(name).__path__, f"{name}."):
            if not module.name.endswith(("__main__", ".train", "reference")):
                importlib.import_module(module.name)
    torch.set_num_threads(1)
    gc.freeze()


def patience() -> float:
    """Seconds to wait for an answer: more where processes queue for the cores."""
    queue = os.getloadavg()[0] / (os.cpu_count() or 1)
    return min(MOST_SECONDS, SECONDS * max(1.0, queue))


# ---- one command


def run_command(words: Sequence[str], folder: Path, log: Path, *, seconds: float) -> Answer:
    """`semmoe WORDS` in `folder`, in a forked process. `log`: a directory for stdout and stderr."""
    before = listing(folder.parents[1])
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        become_command(words, folder, log)
    watch = os.pidfd_open(child)
    ready, _, _ = select.select([watch], [], [], seconds)
    os.close(watch)
    if not ready:
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    spent = time.monotonic() - start
    end_group(child)
    code = None if not ready else os.waitstatus_to_exitcode(status)
    stderr = (log / "stderr").read_bytes().decode("utf-8", errors="backslashreplace")
    touched = changes(before, listing(folder.parents[1]), output_of(words))
    return Answer(code if code is None or code >= 0 else 0, -code if code and code < 0 else 0, spent, stderr, touched)


def become_command(words: Sequence[str], folder: Path, log: Path) -> None:
    """The command itself; ends the process as the interpreter would."""
    code = 70
    try:
        os.setsid()
        end_with_parent()
        os.chdir(folder)
        for descriptor, name in ((0, os.devnull), (1, log / "stdout"), (2, log / "stderr")):
            opened = os.open(name, os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(opened, descriptor)
        limit = address_space() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        code = command(words)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def command(words: Sequence[str]) -> int:
    """The exit code of `semmoe WORDS`, with a traceback on stderr where it has none of its own."""
    from semmoe.main import main

    sys.argv = ["semmoe", *words]
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", encoding="utf-8"), open(2, "w", encoding="utf-8")
    try:
        main()
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 1


def end_with_parent() -> None:
    """Let a killed harness leave nothing behind."""
    set_death_signal = 1
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def end_group(leader: int) -> None:
    """End what the command has left running."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        pass


def output_of(words: Sequence[str]) -> str:
    """Name of what the command may write."""
    return words[words.index("-o") + 1] if "-o" in words else ""


def listing(folder: Path) -> dict[str, tuple[int, ...]]:
    """Every file below a folder with its size, time and kind; links are not followed."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(root, name)
            state = os.lstat(path)
            is_folder = name in folders
            found[os.path.relpath(path, folder)] = (
                state.st_mode,
                0 if is_folder else state.st_size,
                0 if is_folder else state.st_mtime_ns,
            )
    return found


def changes(before: dict[str, Any], after: dict[str, Any], output: str) -> list[str]:
    """What was made, changed or removed outside of `output` and its neighbours .output*."""
    here = "in/here/"
    own = tuple(f"{here}{prefix}{output}" for prefix in ("", ".")) if output else ()
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    return sorted(name for name in changed if not (own and name.startswith(own)))


# ---- one input


def prepare(one: Input, base: Path, folder: Path) -> Path:
    """The directory where the input's command runs, with the files that it names, one of them
    damaged."""
    here = folder / "in" / "here"
    here.mkdir(parents=True)
    (folder / "victim").mkdir()
    names = {word.split("/")[0] for word in one.words.split()} | {one.file.split("/")[0]}
    for name in sorted(names - {""}):
        if (base / name).is_dir():
            shutil.copytree(base / name, here / name)
        elif (base / name).is_file():
            shutil.copyfile(base / name, here / name)
    os.chdir(here)
    one.damage.apply(Path(one.file))
    os.chdir("/")
    return here


def run_input(one: Input, base: Path, folder: Path) -> tuple[str, Answer]:
    """Outcome, one of OUTCOMES, and answer."""
    here = prepare(one, base, folder)
    log = folder.with_suffix(".log")
    log.mkdir()
    seconds = MOST_SECONDS if one.format == WHOLE_FORMAT else patience()
    answer = run_command(one.words.split(), here, log, seconds=seconds)
    return outcome(one, answer), answer


def outcome(one: Input, answer: Answer) -> str:
    """What is wrong with an answer, the worst first; or "refused", or "passed" where the input may
    be valid."""
    if one.format == WHOLE_FORMAT:
        return "passed" if answer.code == 0 and not answer.signal and not answer.touched else "undamaged input refused"
    if answer.code is None:
        return "slow"
    if answer.signal:
        return "signal"
    if "Traceback (most recent call last)" in answer.stderr:
        return "traceback"
    if answer.touched:
        return "escaped"
    if answer.code == 0:
        return "passed" if one.may_pass else "accepted"
    if answer.code not in (1, 2):
        return "exit code"
    return "refused" if refused_well(answer) else "lines"


def refused_well(answer: Answer) -> bool:
    """Whether stderr is one refusal after at most notes of our own; or, with code 2, a usage."""
    lines = answer.stderr.splitlines()
    if not lines or CONTROL.search(answer.stderr) or max(map(len, lines)) > LONGEST_LINE:
        return False
    if answer.code == 2:
        return lines[0].startswith("Usage: semmoe") and lines[-1].startswith("Error: ")
    return all(line.startswith("semmoe: ") for line in lines)


def cause(answer: Answer) -> str:
    """Where the last traceback on stderr comes from: the last frame of this project, and the
    exception."""
    last = answer.stderr.rpartition("Traceback (most recent call last)")[2]
    frames = re.findall(r'File "[^"]*?((?:semmoe_cli|profiles|solvers|runtime)/[^"]+)", line (\d+), in (\S+)', last)
    said = last.rpartition('  File "')[2].splitlines()[1:]  # the source line of the last frame, then the exception
    error = next((line for line in said if line and not line.startswith(" ")), "")
    where = "{}:{} in {}".format(*frames[-1]) if frames else "outside of this project"
    return f"{where}: {error[:160]}"


# ---- many


def run_many(
    inputs: Sequence[Input], numbers: Sequence[int], base: Path, root: Path, *, processes: int, keep: bool = False
) -> dict[int, dict[str, Any]]:
    """Results by number: outcome, code, seconds and the end of stderr. `processes` workers take the
    numbers in turn."""
    root.mkdir(parents=True, exist_ok=True)
    taking, giving = os.pipe()
    workers = []
    for worker in range(processes):
        child = os.fork()
        if child == 0:
            end_with_parent()
            os.close(giving)
            work(inputs, taking, base, root, root / f"results-{worker}.jsonl", keep=keep)
        workers.append(child)
    os.close(taking)
    for number in numbers:
        os.write(giving, struct.pack("<I", number))
    os.close(giving)
    for child in workers:
        os.waitpid(child, 0)
    found = {}
    for worker in range(processes):
        for line in (root / f"results-{worker}.jsonl").read_text().splitlines():
            result = json.loads(line)
            found[result["number"]] = result
    if missing := [number for number in numbers if number not in found]:
        raise RuntimeError(f"inputs without a result, a worker must have died: {missing[:20]}")
    return found


def work(inputs: Sequence[Input], taking: int, base: Path, root: Path, results: Path, *, keep: bool) -> None:
    """A worker: inputs by the numbers from a pipe, until it ends."""
    code = 1
    try:
        with open(results, "w") as out:
            while word := os.read(taking, 4):
                number = struct.unpack("<I", word)[0]
                result = run_number(inputs, number, base, root, keep=keep)
                out.write(json.dumps(result) + "\n")
                out.flush()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def run_number(inputs: Sequence[Input], number: int, base: Path, root: Path, *, keep: bool) -> dict[str, Any]:
    """One input as a result that can be written."""
    one, folder = inputs[number], root / f"{number:05d}"
    for old in (folder, folder.with_suffix(".log")):
        shutil.rmtree(old, ignore_errors=True)
    try:
        found, answer = run_input(one, base, folder)
    except Exception:
        found, answer = "not made", Answer(None, 0, 0.0, traceback.format_exc(), [])
        os.chdir("/")
    if not keep:
        for old in (folder, folder.with_suffix(".log")):
            shutil.rmtree(old, ignore_errors=True)
    return {
        "number": number,
        "outcome": found,
        "format": one.format,
        "file": one.file,
        "damage": one.damage.what,
        "command": f"semmoe {one.words}",
        "code": answer.code,
        "signal": answer.signal,
        "seconds": round(answer.seconds, 2),
        "cause": cause(answer) if found == "traceback" else "",
        "touched": answer.touched[:10],
        "stderr": answer.stderr[-2000:],
    }
