"""Kills a command at one of its file-system events, looks at what it left, and runs it again.

An event is a call that changes a file below the working directory: open for writing, write, rename,
mkdir, unlink, ... The command runs in a process forked from one that has imported everything;
there these calls are counted, and the process ends itself by SIGKILL in place of the call of a
given number, in the middle of it where it is a write. Or it copies what is on the disk at every
event and goes on: the same as a kill there leaves, of one run for all events.

What is left is looked at for every event. The command is run again from every state that is
another: states that differ only in what was written under temporary names are one.

`python tests/support/kill_points.py FOLDER [--sample N] [--only CASE ...]` prints one JSON object.
"""

import argparse
import builtins
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).resolve().parent)]

BY_PATH = ("mkdir", "rmdir", "unlink", "remove", "truncate", "posix_fallocate", "ftruncate", "fsync", "fdatasync")
BY_BOTH = ("rename", "replace", "link", "symlink")
WRITES = ("write", "pwrite")
COPIES = ("copy_file_range", "sendfile")
WRITING = set("wax+")
FINE = ("old", "absent", "complete", "unfinished")

Snapshot = dict[str, str]  # path below a folder -> hash of a file, "/" of a folder, the target of a link


class Case(NamedTuple):
    """A command that is killed."""

    name: str
    words: str
    target: str  # what it writes
    beside: tuple[str, ...] = ()  # what it writes with it
    old: bool = False  # whether another target lies there before
    trace: bool = False  # an unfinished trace may be left: the same command goes on with it
    rank: bool = False  # it is the only rank of a group


CASES = (
    Case("trace", "trace m --data a.jsonl --generate 2 -o out --resume", "out", trace=True),
    Case("trace, more of it", "trace m --data b.jsonl -o grown --resume", "grown", old=True, trace=True),
    Case("import", "trace --from sglang sglang.jsonl -o out --resume", "out", trace=True),
    Case("place", "place t --ranks 2 --method load --effort fast --processes 1 --force -o out", "out"),
    Case("place, again", "place t --ranks 2 --method load --effort fast --processes 1 --force -o q", "q", old=True),
    Case("export", "export p --to sglang --force -o map.json", "map.json", ("map.json.semmoe.json",)),
    Case(
        "export, again",
        "export q --to sglang --force -o sglang.json",
        "sglang.json",
        ("sglang.json.semmoe.json",),
        old=True,
    ),
    Case("report", "report p t --force -o out.html", "out.html"),
    Case("report, again", "report q t --force -o page.html", "page.html", old=True),
    Case("reshard", "reshard m p -o out", "out"),
    Case("reshard ranks", "reshard m p --layout ranks -o out", "out"),
    Case("reshard, again", "reshard m q -o placed --force", "placed", old=True),
    Case("reshard ranks, again", "reshard m q --layout ranks -o split --force", "split", old=True),
    Case("undo", "reshard --undo placed -o out", "out"),
    Case("undo ranks", "reshard --undo split -o out", "out"),
    Case("run", "run m --plan one --prompts few.jsonl --max-new-tokens 3 --force -o out.jsonl", "out.jsonl", rank=True),
)


class Killer:
    """Counts the events of this process below `folder`; ends it at number `at`, if any, or copies
    the folder to `images`/NUMBER at each."""

    def __init__(self, folder: Path, at: int | None, images: Path | None) -> None:
        self.count, self._at, self._images = 0, at, images
        self._folder, self._process = f"{os.path.realpath(folder)}/", os.getpid()
        self._turn = threading.RLock()
        self._raw = {name: getattr(os, name) for name in (*BY_PATH, *BY_BOTH, *WRITES, *COPIES, "open")}

    def install(self) -> None:
        """Put the counting calls in place of the real ones."""
        for name in (*BY_PATH, *BY_BOTH):
            setattr(os, name, self._counted(name))
        for name in WRITES:
            setattr(os, name, self._cut(name))
        for name in COPIES:
            setattr(os, name, self._copied(name))
        os.open = self._opened_low
        opened = self._opened(io.open)
        io.open = builtins.open = opened  # pathlib calls the one, programs the other

    def _is_ours(self, where: Any, named: dict[str, Any]) -> bool:
        """Whether a path, or an open file, lies below the folder, and this is no child process."""
        if os.getpid() != self._process:
            return False
        try:
            if isinstance(where, int):
                path = os.readlink(f"/proc/self/fd/{where}")
            else:
                above = named.get("dir_fd") or named.get("src_dir_fd")
                base = os.getcwd() if above is None else os.readlink(f"/proc/self/fd/{above}")
                path = os.path.normpath(os.path.join(base, os.fsdecode(where)))
        except (OSError, TypeError):
            return False
        return path.startswith(self._folder)

    def _due(self) -> bool:
        self.count += 1
        return self._images is not None or self.count == self._at

    def _happen(self) -> None:
        """The kill, or the picture of it."""
        if self._images is None:
            os.kill(self._process, signal.SIGKILL)
        else:
            shutil.copytree(self._folder, self._images / str(self.count), symlinks=True)

    def _counted(self, name: str) -> Callable[..., Any]:
        def call(where: Any, *rest: Any, **named: Any) -> Any:
            with self._turn:
                # A link is made at its second argument, whatever the first.
                if self._is_ours(rest[0] if name in ("link", "symlink") else where, named) and self._due():
                    self._happen()
                return self._raw[name](where, *rest, **named)

        return call

    def _cut(self, name: str) -> Callable[..., int]:
        def call(descriptor: int, data: Any, *rest: Any) -> int:
            with self._turn:
                if self._is_ours(descriptor, {}) and self._due():
                    self._raw[name](descriptor, bytes(data)[: len(data) // 2], *rest)
                    self._happen()
                    rest = (rest[0] + len(data) // 2,) if rest else ()
                    return len(data) // 2 + self._raw[name](descriptor, bytes(data)[len(data) // 2 :], *rest)
                return self._raw[name](descriptor, data, *rest)

        return call

    def _copied(self, name: str) -> Callable[..., int]:
        target = 1 if name == "copy_file_range" else 0

        def call(*words: Any, **named: Any) -> int:
            with self._turn:
                if self._is_ours(words[target], {}) and self._due():
                    self._happen()
                return self._raw[name](*words, **named)

        return call

    def _opened_low(self, path: Any, flags: int, *rest: Any, **named: Any) -> int:
        with self._turn:
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and self._is_ours(path, named) and self._due():
                self._happen()
            return self._raw["open"](path, flags, *rest, **named)

    def _opened(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
            ours = bool(WRITING & set(mode)) and self._is_ours(file, {})
            with self._turn:
                if ours and not isinstance(file, int) and self._due():
                    self._happen()
                opened = real(file, mode, *rest, **named)
            if ours:
                write = opened.write

                def cut(data: Any) -> int:
                    with self._turn:
                        if self._due():
                            write(data[: len(data) // 2])
                            opened.flush()
                            self._happen()
                            return len(data) // 2 + write(data[len(data) // 2 :])
                        return write(data)

                opened.write = cut
            return opened

        return call


class Ended(NamedTuple):
    """How a command ended."""

    code: int  # negative: by a signal
    events: int
    stderr: str


def run_command(
    case: Case, folder: Path, log: Path, at: int | None = None, images: Path | None = None, *, seconds: float = 600.0
) -> Ended:
    """The command of a case in `folder`, in a forked process; `at` and `images` as Killer has
    them."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _become(case, folder, log, lambda: Killer(folder, at, images), writing)
    os.close(writing)
    end = time.monotonic() + seconds
    status = None
    while status is None:
        done, found = os.waitpid(child, os.WNOHANG)
        status = found if done else None
        if status is None and time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    with open(reading, "rb") as pipe:
        told = pipe.read()
    return Ended(os.waitstatus_to_exitcode(status), int(told or 0), log.read_text(errors="replace"))


def _become(case: Case, folder: Path, log: Path, make: Callable[[], Killer], pipe: int) -> None:
    from fuzzing.run import command, end_with_parent

    code = 70
    try:
        end_with_parent()
        os.chdir(folder)
        for descriptor, name in ((0, os.devnull), (1, os.devnull), (2, log)):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), descriptor)
        if case.rank:
            place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 0}
            os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
        killer = make()
        killer.install()
        code = command(case.words.split())
        sys.stderr.flush()
        os.write(pipe, str(killer.count).encode())
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


# ---- what is there


def snapshot(path: Path) -> Snapshot | None:
    """A file or a directory with all that is in it; None where nothing is there."""
    if not os.path.lexists(path):
        return None
    found = {}
    for each in [path, *path.rglob("*")]:
        name = each.relative_to(path).as_posix()
        if each.is_symlink():
            found[name] = f"-> {os.readlink(each)}"
        else:
            found[name] = "/" if each.is_dir() else hashlib.sha256(each.read_bytes()).hexdigest()
    return found


def inputs(case: Case, folder: Path) -> dict[str, Snapshot | None]:
    """All that the command only reads."""
    own = (case.target, *case.beside)
    # Temporary names and locks begin with a point; .partial is of finished requests.
    return {
        path.name: snapshot(path)
        for path in sorted(folder.iterdir())
        if path.name not in own and not path.name.startswith((".", f"{case.target}.partial"))
    }


def state(case: Case, folder: Path, old: Any, new: Any) -> str:
    """ "old", "absent", "complete", "unfinished" (a trace that goes on), or what is wrong."""
    found = snapshot(folder / case.target)
    if found == (old or {}).get(case.target):
        kind = "old" if found else "absent"
    elif found == new[case.target]:
        kind = "complete"
    elif found is None:
        kind = "absent"
    elif case.trace:
        return unfinished(folder / case.target)
    else:
        return "the target is neither old, absent nor complete"
    if not case.beside or kind == "absent":
        return kind
    from semmoe.solvers.maps.origin import exported_from

    origin = exported_from(folder / case.target)
    told = json.loads((new if kind == "complete" else old)["origin"])
    return kind if origin == told else f"the map is {kind}, what lies beside it is not about it"


def unfinished(trace: Path) -> str:
    """Whether what is there is a trace that can be gone on with: whole parts only."""
    import pyarrow.parquet as pq

    for part in trace.glob("*.parquet"):
        pq.read_table(part)
    return "unfinished"


def rows(trace: Path) -> list[Any]:
    """What a finished trace holds, however it is cut into parts."""
    import pyarrow.parquet as pq

    facts = json.loads((trace / "trace.json").read_text())
    table = [row for part in sorted(trace.glob("*.parquet")) for row in pq.read_table(part).to_pylist()]
    return [facts["complete"], facts["counts"], *sorted(json.dumps(row) for row in table)]


def keep(case: Case, folder: Path) -> dict[str, Any]:
    """What is compared of a target."""
    kept: dict[str, Any] = {case.target: snapshot(folder / case.target)}
    if case.trace:
        kept["rows"] = rows(folder / case.target)
    for name in case.beside:
        kept["origin"] = (folder / name).read_text() if (folder / name).exists() else ""
    return kept


# ---- points


def walk(case: Case, base: Path, work: Path, *, sample: int | None, seed: int = 0) -> dict[str, Any]:
    """Look at what is left at every event of a case, and run it again from every state that is
    another, or from `sample` of them, one of which a real kill has left: counts, and what was
    wrong."""
    folder, log, images = work / "here", work / "stderr", work / "images"
    fresh(base, folder)
    shutil.rmtree(images, ignore_errors=True)
    images.mkdir()
    old, sources = keep(case, folder) if case.old else None, inputs(case, folder)
    whole = run_command(case, folder, log, images=images)
    if whole.code:
        raise RuntimeError(f"semmoe {case.words} ended with {whole.code}: {whole.stderr}")
    new, names = keep(case, folder), names_of(folder)
    found: dict[int, str] = {}
    first: dict[str, int] = {}  # of the events that leave one state
    for point in range(1, whole.events + 1):
        left = images / str(point)
        found[point] = state(case, left, old, new)
        if inputs(case, left) != sources:
            found[point] = "the source was touched"
        first.setdefault(f"{found[point]} {signature(case, left)}", point)
    points = sorted(first.values())
    if sample is not None and sample < len(points):
        points = sorted(random.Random(f"{case.name} {seed}").sample(points, sample))
    wrong = [f"event {point}: {kind}" for point, kind in found.items() if kind not in FINE]
    for number, point in enumerate(points):
        if number == 0:
            fresh(base, folder)
            if (killed := run_command(case, folder, log, point)).code != -signal.SIGKILL:
                wrong.append(f"event {point}: not killed, but ended with {killed.code}: {killed.stderr}")
            if (kind := state(case, folder, old, new)) != found[point]:
                wrong.append(f"event {point}: a kill left {kind}, the copy shows {found[point]}")
        else:
            fresh(images / str(point), folder)
        line = failing_again(case, folder, log, new, names)
        if line and not (found[point] == "complete" and "is there already" in line):  # as after a whole run
            wrong.append(f"event {point}, {found[point]}: {line}")
    return {"events": whole.events, "again": len(points), "states": dict(Counter(found.values())), "wrong": wrong}


def failing_again(case: Case, folder: Path, log: Path, new: dict[str, Any], names: set[str]) -> str:
    """What is wrong with the same command on what a killed one left, "" where nothing is."""
    again = run_command(case, folder, log)
    same = "rows" if case.trace else case.target
    if again.code:
        return f"the same command ended with {again.code}: {again.stderr.strip()}"
    if keep(case, folder)[same] != new[same] or state(case, folder, None, new) not in ("complete", "unfinished"):
        return "the same command gave something else"
    kept = {name for name in names_of(folder) if name.startswith(f"{case.target}.partial.")}  # and named on stderr
    left = sorted(names_of(folder) - names - kept)
    return f"{', '.join(left)} was left" if left else ""


def signature(case: Case, folder: Path) -> str:
    """A state, without what is in files and directories of temporary names."""
    beside = [snapshot(folder / name) for name in (case.target, *case.beside)]
    temporary = [(p.name, p.is_dir()) for p in sorted(folder.iterdir()) if p.name.startswith(".")]
    inner = [p.name for p in sorted((folder / case.target).glob(".*"))] if case.trace else []
    partial = folder / f"{case.target}.partial"
    return repr((beside if not case.trace else [set(beside[0] or ())], temporary, inner, partial.exists()))


def names_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def make_base(base: Path, log: Path) -> None:
    """What the commands read, and what they replace."""
    from engine_samples import routing, sglang_record, write_lines
    from fuzzing.base import write_prompts

    base.mkdir()
    os.chdir(base)
    child = os.fork()
    if child == 0:  # this process stays as it is: it is forked for every command
        from fuzzing.base import write_model

        write_model(Path("m"))
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("no model was written")
    draw = random.Random(0)
    write_prompts(Path("a.jsonl"), "a", 12, draw)
    write_prompts(Path("b.jsonl"), "b", 8, draw)
    write_lines(Path("few.jsonl"), [{"text": "w3 w4 w5"}, {"text": "w6 w7 w8 w9"}])
    write_lines(Path("sglang.jsonl"), [sglang_record(routing(20, seed=n), name=f"r{n}") for n in range(3)])
    plan = "--effort fast --processes 1"
    for words in (
        "trace m --data a.jsonl -o t",
        "trace m --data a.jsonl -o grown",
        f"place t --ranks 2 --method spectral {plan} -o p",
        f"place t --ranks 2 --method contiguous {plan} -o q",
        f"place t --ranks 1 --method contiguous {plan} -o one",
        "reshard m p -o placed",
        "reshard m p --layout ranks -o split",
        "export p --to sglang -o sglang.json",
        "report p t -o page.html",
    ):
        done = run_command(Case("base", words, "none"), base, log)
        if done.code:
            raise RuntimeError(f"semmoe {words} ended with {done.code}: {done.stderr}")
    os.chdir("/")


def fresh(base: Path, folder: Path) -> None:
    """The inputs as they were."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder, symlinks=True)


def main() -> None:
    from fuzzing.run import import_everything

    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="an empty directory to work in")
    parser.add_argument("--sample", type=int, help="run so many states of each case again, not all")
    parser.add_argument("--only", nargs="+", help="cases")
    arguments = parser.parse_args()
    import_everything()
    base, begun = arguments.folder / "base", time.monotonic()
    make_base(base, arguments.folder / "log")
    found = {}
    for case in CASES:
        if not arguments.only or case.name in arguments.only:
            found[case.name] = walk(case, base, arguments.folder, sample=arguments.sample)
            print(f"{case.name}: {found[case.name]}", file=sys.stderr, flush=True)
    totals = {key: sum(case[key] for case in found.values()) for key in ("events", "again")}
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    totals |= {"cpu_seconds": round(spent.ru_utime + spent.ru_stime, 1)}
    wrong = [f"{name}: {line}" for name, case in found.items() for line in case["wrong"]]
    print(json.dumps({**totals, "wrong": wrong, "seconds": round(time.monotonic() - begun, 1), "cases": found}))


if __name__ == "__main__":
    main()
