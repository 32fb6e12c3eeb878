"""Held-out quality of `semmoe place` over split seeds; prints one JSON object. What docs/experiments.md tabulates.

    python tests/benchmarks/quality.py TRACE --seeds 0 1 2 3 -- --ranks 4 --objective dp

Everything after `--` goes to `semmoe place TRACE --holdout 0.5 --no-refit` as it is (later options win). Per row of the report: LAR, REM,
load and token imbalance of each seed, and their means.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
METRICS = ("lar", "rem", "node", "load_imbalance", "token_imbalance")


def place(trace: str, options: list[str], seed: int) -> list[dict]:
    """Rows of the report of one seed, metrics as plain numbers."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["place", trace, "--holdout", "0.5", "--no-refit", "--seed", str(seed), *options, "--json"]
        run = subprocess.run(
            [sys.executable, "-m", "semmoe", *command, "--force", "-o", str(Path(folder) / "plan")],
            cwd=Path(__file__).resolve().parents[2],
            stdout=subprocess.PIPE,
            check=True,
        )
    return json.loads(run.stdout)["rows"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    a, options = parser.parse_args(words[:split]), words[split + 1 :]
    trace = str(Path(a.trace).resolve()) if Path(a.trace).exists() else a.trace
    found: dict[str, dict[str, list[float]]] = {}
    for seed in a.seeds:
        for row in place(trace, options, seed):
            metrics = found.setdefault(f"{row['placement']} {row['schedule']}", {})
            for name in METRICS:
                if row.get(name) is not None:
                    metrics.setdefault(name, []).append(round(row[name], 4))
    means = {
        key: {name: round(sum(values) / len(values), 4) for name, values in row.items()} for key, row in found.items()
    }
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        json.dumps(
            {
                "trace": a.trace,
                "options": options,
                "seeds": a.seeds,
                "means": means,
                "by_seed": found,
                "cpu_seconds_per_seed": round((used.ru_utime + used.ru_stime) / len(a.seeds), 1),
            }
        )
    )


if __name__ == "__main__":
    main()
