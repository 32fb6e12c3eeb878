"""Predicted against measured microseconds of a MoE layer, on ranks behind shaped links. Needs root; prints one JSON object.

    python tests/benchmarks/predicted_time.py GPT_OSS_TRACE [--rates 400mbit,2gbit] [--expert-size 512] [--layers 4] [--tokens 4096]

Four ranks in network namespaces (tests/benchmarks/run.py). Half of the requests are placed on, the other half is replayed with random
experts of the size that is asked for, so that balance counts as well as rows. A first replay measures exchanges and experts
(--write-hardware); a plan for time is placed by that file, and every placement and schedule is predicted by it (`semmoe report --hardware
FILE`) and measured by a replay. For each rate: five rows with both times, the worst error, Kendall's tau of the two rankings, and the plan
for time over load packing and over the plan for bytes, measured and predicted.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from common.few_layers import few_layers
from common.shaped_network import close_network, open_network, shape_network
from run import RANKS, SEMMOE, make, run_ranks, split_trace
from scipy.stats import kendalltau

HIDDEN, BATCH_TOKENS = 2880, 512
Key = tuple[str, str]


class Sizes(NamedTuple):
    """Of an expert, and tokens that are replayed."""

    expert: int
    tokens: int


def measure(work: Path, plan: str, hardware: Path, size: Sizes) -> dict[Key, float]:
    """Microseconds per layer of a replay, by placement and schedule; the measured machine goes to `hardware`."""
    sizes = {"batch_tokens": BATCH_TOKENS, "max_tokens": size.tokens, "expert_size": size.expert}
    task = {"kind": "replay", "trace": str(work / "replay-held"), "plan": str(work / plan), **sizes}
    found = run_ranks(work, task | {"write_hardware": str(hardware)})
    hardware.write_text(json.dumps(found["hardware"]))
    return {(row["placement"], row["schedule"]): 1000 * row["ms_per_layer"] for row in found["rows"]}


def timed(hardware: Path, expert_size: int) -> list[str]:
    """Options that ask for the times of such batches."""
    sizes = ["--hidden-size", str(HIDDEN), "--expert-size", str(expert_size), "--weights", "bf16"]
    batches = ["--tokens-per-rank", str(BATCH_TOKENS // RANKS), "--phase", "generated", "--backend", "deepep-normal"]
    return ["--hardware", str(hardware), *batches, *sizes]


def predict(work: Path, plan: str, hardware: Path, expert_size: int) -> dict[Key, float]:
    words = [*SEMMOE, "report", str(work / plan), str(work / "replay-held"), *timed(hardware, expert_size), "--json"]
    report = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    return {(row["placement"], row["schedule"]): row["us"]["total"] for row in report["time"]["rows"]}


def compared(work: Path, rate: str, size: Sizes) -> dict[str, Any]:
    """Both times of five rows behind links of a rate."""
    shape_network(RANKS, rate)
    hardware, fit = work / f"hardware-{rate}.json", str(work / "replay-fit")
    make(work / "bytes", "place", fit, "--ranks", str(RANKS), "--objective", "tp")
    measured = {("bytes", *key): us for key, us in measure(work, "bytes", hardware, size).items()}
    again, name = work / f"again-{rate}.json", f"time-{rate}"
    make(work / name, "place", fit, "--ranks", str(RANKS), "--objective", "tp", *timed(hardware, size.expert))
    measured |= {("time", *key): us for key, us in measure(work, name, again, size).items()}
    predicted = {
        (plan, *key): us
        for plan, path in (("bytes", "bytes"), ("time", name))
        for key, us in predict(work, path, hardware, size.expert).items()
    }
    wanted = [
        ("bytes", "contiguous", "random"),
        ("bytes", "load", "random"),
        ("bytes", "plan", "random"),
        ("time", "plan", "random"),
        ("bytes", "plan", "tp-context"),
    ]
    rows = [
        {
            "plan": key[0],
            "placement": key[1],
            "schedule": key[2],
            "predicted_us": predicted[key],
            "measured_us": measured[key],
        }
        for key in wanted
    ]
    ratios = [row["predicted_us"] / row["measured_us"] for row in rows]
    load, by_bytes, by_time = (next(r for r, k in zip(rows, wanted, strict=True) if k == w) for w in wanted[1:4])
    return {
        "rate": rate,
        "rows": rows,
        "worst_error": max(abs(ratio - 1) for ratio in ratios),
        "kendall_tau": float(kendalltau([r["predicted_us"] for r in rows], [r["measured_us"] for r in rows]).statistic),
        "time_plan_measured_over_load": by_time["measured_us"] / load["measured_us"],
        "time_plan_measured_over_bytes": by_time["measured_us"] / by_bytes["measured_us"],
        "time_plan_predicted_over_load": by_time["predicted_us"] / load["predicted_us"],
        "time_plan_predicted_over_bytes": by_time["predicted_us"] / by_bytes["predicted_us"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("--rates", default="400mbit,2gbit")
    parser.add_argument("--expert-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        few_layers(options.trace, work / "few", options.layers)
        split_trace(str(work / "few"), work)
        open_network(RANKS)
        try:
            size = Sizes(options.expert_size, options.tokens)
            found = [compared(work, rate, size) for rate in options.rates.split(",")]
        finally:
            close_network(RANKS)
    print(json.dumps({"hidden_size": HIDDEN, "expert_size": options.expert_size, "rates": found}))


if __name__ == "__main__":
    main()
