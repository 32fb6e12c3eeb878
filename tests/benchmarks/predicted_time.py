"""Predicted against measured microseconds of a MoE layer, on ranks behind shaped links. Needs root; prints one JSON object.

    python tests/benchmarks/predicted_time.py GPT_OSS_TRACE [--rates 50mbit,200mbit] [--expert-us 400] [--layers 3] [--tokens 4096]

Four ranks in network namespaces (tests/benchmarks/run.py). Half of the requests are placed on, the other half is replayed; experts wait
--expert-us microseconds for each of their rows, because four ranks on two cores would share what their experts compute, which ranks
with accelerators do not (0: random experts of --expert-size on the cores). A first replay measures exchanges and experts
(--write-hardware); a plan for time is placed by that file, and every placement and schedule is predicted by it (`semmoe report --hardware
FILE`) and measured by a replay. For each rate: five rows with both times, the worst error, Kendall's tau of the two rankings, the plan
for time over load packing and over the plan for bytes, measured and predicted, and how far the two rows that both replays measure
differ (`noise`).
"""

import argparse
import json
import subprocess
import sys
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
    us: float  # that an expert waits for a row, 0: it computes


def measure(work: Path, plan: str, hardware: Path, size: Sizes) -> tuple[dict[Key, float], int]:
    """Microseconds per layer of a replay, by placement and schedule, and the tokens of a rank in its batches, which share what
    is replayed evenly; the measured machine goes to `hardware`."""
    sizes = {"batch_tokens": BATCH_TOKENS, "max_tokens": size.tokens, "expert_size": size.expert}
    sizes |= {"expert_us": size.us} if size.us else {}
    task = {"kind": "replay", "trace": str(work / "replay-held"), "plan": str(work / plan), **sizes}
    found = run_ranks(work, task | {"write_hardware": str(hardware)})
    hardware.write_text(json.dumps(found["hardware"]))
    us = {(row["placement"], row["schedule"]): 1000 * row["ms_per_layer"] for row in found["rows"]}
    return us, round(found["tokens"] / -(-found["tokens"] // BATCH_TOKENS) / RANKS)


def timed(hardware: Path, expert_size: int, tokens_per_rank: int) -> list[str]:
    """Options that ask for the times of such batches."""
    sizes = ["--hidden-size", str(HIDDEN), "--expert-size", str(expert_size), "--weights", "bf16"]
    batches = ["--tokens-per-rank", str(tokens_per_rank), "--phase", "generated"]
    return ["--hardware", str(hardware), *batches, *sizes]


def predict(work: Path, plan: str, asked: list[str]) -> dict[Key, float]:
    words = [*SEMMOE, "report", str(work / plan), str(work / "replay-held"), *asked, "--json"]
    report = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    return {(row["placement"], row["schedule"]): row["us"]["total"] for row in report["time"]["rows"]}


def compared(work: Path, rate: str, size: Sizes) -> dict[str, Any]:
    """Both times of five rows behind links of a rate."""
    shape_network(RANKS, rate)
    hardware, fit = work / f"hardware-{rate}.json", str(work / "replay-fit")
    make(work / "bytes", "place", fit, "--ranks", str(RANKS), "--objective", "tp")
    us, tokens_per_rank = measure(work, "bytes", hardware, size)
    measured, asked = (
        {("bytes", *key): value for key, value in us.items()},
        timed(hardware, size.expert, tokens_per_rank),
    )
    again, name = work / f"again-{rate}.json", f"time-{rate}"
    make(work / name, "place", fit, "--ranks", str(RANKS), "--objective", "tp", *asked)
    measured |= {("time", *key): value for key, value in measure(work, name, again, size)[0].items()}
    twice = [[measured[plan, key, "random"] for plan in ("bytes", "time")] for key in ("contiguous", "load")]
    for key, both in zip(("contiguous", "load"), twice, strict=True):
        measured["bytes", key, "random"] = sum(both) / 2
    predicted = {
        (plan, *key): us
        for plan, path in (("bytes", "bytes"), ("time", name))
        for key, us in predict(work, path, asked).items()
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
        "noise": max(max(both) / min(both) - 1 for both in twice),
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
    parser.add_argument("--rates", default="50mbit,200mbit")
    parser.add_argument("--expert-size", type=int, default=512)
    parser.add_argument("--expert-us", type=float, default=400.0)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        few_layers(options.trace, work / "few", options.layers)
        split_trace(str(work / "few"), work)
        open_network(RANKS)
        try:
            size = Sizes(options.expert_size, options.tokens, options.expert_us)
            found = []
            for rate in options.rates.split(","):
                found.append(compared(work, rate, size))
                print(json.dumps(found[-1]), file=sys.stderr, flush=True)
        finally:
            close_network(RANKS)
    print(json.dumps({"hidden_size": HIDDEN, "expert_us": options.expert_us, "rates": found}))


if __name__ == "__main__":
    main()
