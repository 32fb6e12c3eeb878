"""Malformed inputs over every command and format: each must be refused in one line, quickly.

python tests/benchmarks/fuzz.py [--failures FILE] [--only N] [--format trace.json] [--sample 300] [--keep DIR]; prints one
JSON object. The inputs are made from a fixed seed (tests/support/fuzzing): wrong values in every key, cut files, changed
bytes, names that leave a directory, pickles with code, and single bits flipped in parts of a trace. An input fails by a
traceback, a signal, more than 20 s, an exit code other than 1 and 2, more than one line after notes, a file touched
outside of the output, or by being accepted though the command reads what is damaged.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "support")]

from fuzzing.base import write_base  # noqa: E402
from fuzzing.corpus import corpus, sample  # noqa: E402
from fuzzing.run import OUTCOMES, import_everything, run_command, run_many  # noqa: E402

FINE = ("refused", "passed")


def make_base(root: Path) -> Path:
    """The whole inputs, below `root`."""
    base, log = root / "base" / "in" / "here", root / "base.log"
    base.mkdir(parents=True)
    log.mkdir()
    os.chdir(base)

    def run(line: str) -> None:
        answer = run_command(line.split(), base, log, seconds=300)
        if answer.code != 0:
            raise RuntimeError(f"semmoe {line} ended with {answer.code}:\n{answer.stderr}")

    write_base(run)
    os.chdir("/")
    return base


def measure(arguments: argparse.Namespace, root: Path) -> dict[str, Any]:
    start = time.perf_counter()
    import_everything()
    base = make_base(root)
    inputs = corpus(base)
    numbers = list(range(len(inputs)))
    if arguments.format:
        numbers = [n for n in numbers if inputs[n].format in arguments.format]
    if arguments.command:
        numbers = [n for n in numbers if inputs[n].words.startswith(tuple(arguments.command))]
    if arguments.without:
        numbers = [
            n for n in numbers if not f"{inputs[n].format}: {inputs[n].words}".startswith(tuple(arguments.without))
        ]
    if arguments.sample:
        chosen = set(sample(inputs, arguments.sample))
        numbers = [n for n in numbers if n in chosen]
    if arguments.only is not None:
        numbers = [arguments.only]
    prepared = time.perf_counter() - start
    keep = Path(arguments.keep).resolve() if arguments.keep else root / "inputs"
    found = run_many(inputs, numbers, base, keep, processes=arguments.processes, keep=bool(arguments.keep))
    failures = [found[n] for n in numbers if found[n]["outcome"] not in FINE]
    if arguments.failures:
        Path(arguments.failures).write_text(json.dumps(failures, indent=1) + "\n")
    return {
        "inputs": len(numbers),
        "failures": len(failures),
        "outcomes": counted(found.values(), "outcome"),
        "formats": {name: counted(group, "outcome") for name, group in grouped(found.values(), "format").items()},
        "commands": {name: counted(group, "outcome") for name, group in grouped(found.values(), "command").items()},
        "tracebacks": dict(Counter(result["cause"] for result in failures if result["cause"]).most_common()),
        "slowest": max((result["seconds"] for result in found.values()), default=0),
        "prepared_seconds": round(prepared, 1),
        "seconds": round(time.perf_counter() - start, 1),
    }


def grouped(results: Any, key: str) -> dict[str, list[dict[str, Any]]]:
    """Results by format, or by the command's first word."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        name = result[key]
        words = name.split()
        name = name if key == "format" else " ".join(words[1 : 3 if words[2].startswith("--") else 2])
        groups.setdefault(name, []).append(result)
    return dict(sorted(groups.items()))


def counted(results: Any, key: str) -> dict[str, int]:
    counts = Counter(result[key] for result in results)
    return {name: counts[name] for name in OUTCOMES if counts[name]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--failures", help="write every failure to this file: number, command line, exit code, stderr")
    parser.add_argument("--only", type=int, help="run the input of this number")
    parser.add_argument("--format", nargs="+", help="run the inputs of these formats, e.g. trace.json 'flipped bit'")
    parser.add_argument("--command", nargs="+", help="run the inputs whose command lines begin so, e.g. 'place t'")
    parser.add_argument(
        "--without", nargs="+", help="leave out formats, or commands of one: 'flipped bit', 'prompts: run'"
    )
    parser.add_argument("--sample", type=int, help="run about so many, of every format, without slow commands")
    parser.add_argument("--keep", help="keep the inputs, and what the commands said, in this directory")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("FUZZ_TMP")) as root:
        print(json.dumps(measure(arguments, Path(root).resolve()), indent=1))


if __name__ == "__main__":
    main()
