"""Predicted and measured time of an expert layer's exchanges, at several speeds of a shaped network. Needs root; prints one JSON object.

    python tests/benchmarks/cost.py PLAN TRACE [--rates 200mbit 800mbit] [--hidden-size 2880] [--tokens 2048]

Four ranks, each in a network namespace with a link shaped in both directions, replay TRACE (`semmoe run --replay`, bfloat16, no experts).
Every row of the replay is set against

    replay    the replay's own prediction: rows of its very batches, a network that it measured through the same exchange
    link      `semmoe report --topology-bandwidth` with the speed of the link as it was set, and no latency
    measured  the same with the bandwidth and latency that the replay measured

`error` is predicted over measured, less 1.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common.shaped_network import close_network, open_network, shape_network

RANKS, BATCH_TOKENS = 4, 512


def rank_main(task: dict[str, Any]) -> None:
    import torch

    from semmoe.runtime.replay.replay import ReplayOptions, replay_rank

    torch.set_num_threads(1)
    sizes = (task["hidden_size"], 0, BATCH_TOKENS, task["tokens"])
    options = ReplayOptions(task["trace"], task["plan"], *sizes, None, "gloo", "cpu", "bfloat16", 600.0, 0)
    found = replay_rank(options, None, lambda line: print(line, file=sys.stderr))
    if found is not None:
        Path(task["found"]).write_text(json.dumps(found))


def replay(task: dict[str, Any]) -> dict[str, Any]:
    """The replay's result, from four ranks in their namespaces."""
    processes = []
    for rank in range(RANKS):
        environment = os.environ | {
            **{"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank), "MASTER_ADDR": "10.77.0.1"},
            **{"MASTER_PORT": "29513", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"},
        }
        words = ["ip", "netns", "exec", f"semmoe{rank}", sys.executable, __file__, "--rank-of", json.dumps(task)]
        processes.append(subprocess.Popen(words, env=environment, stdout=sys.stderr))
    if any([process.wait() for process in processes]):
        sys.exit("a rank failed")
    return json.loads(Path(task["found"]).read_text())


def reported(task: dict[str, Any], bandwidth: float, latency_s: float) -> dict[tuple[str, str], float]:
    """Milliseconds per layer that `semmoe report` predicts."""
    words = ["report", task["plan"], task["trace"], "--hidden-size", str(task["hidden_size"]), "--json"]
    words += ["--batch-tokens", str(BATCH_TOKENS), "--topology-bandwidth", f"{bandwidth / 1e9:.9f}"]
    words += ["--latency", f"{latency_s * 1e6:.3f}"]
    done = subprocess.run([sys.executable, "-m", "semmoe", *words], check=True, stdout=subprocess.PIPE)
    return {
        (row["placement"], row["schedule"]): row["ms_per_layer"] for row in json.loads(done.stdout)["times"]["rows"]
    }


def compared(task: dict[str, Any], rate: str) -> dict[str, Any]:
    found = replay(task)
    network = found["network"]
    as_set = float(rate.removesuffix("mbit")) * 1e6 / 8
    link, measured = reported(task, as_set, 0.0), reported(task, network["bytes_per_s"], network["latency_s"])
    rows = []
    for row in found["rows"]:
        key = row["placement"], row["schedule"]
        predictions = {"replay": row["predicted_ms_per_layer"], "link": link[key], "measured": measured[key]}
        ms = row["ms_per_layer"]
        errors = {name: value / ms - 1 for name, value in predictions.items()}
        rows.append({"placement": key[0], "schedule": key[1], "ms": ms, "predicted": predictions, "error": errors})
    return {"rate": rate, "network": network, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("plan")
    parser.add_argument("trace")
    parser.add_argument("--rates", nargs="+", default=["200mbit", "800mbit"])
    parser.add_argument("--hidden-size", type=int, default=2880)
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args()
    task = {"plan": options.plan, "trace": options.trace, "hidden_size": options.hidden_size, "tokens": options.tokens}
    result: dict[str, Any] = {"benchmark": "cost", "ranks": RANKS, "load_average": os.getloadavg(), "rates": []}
    with tempfile.TemporaryDirectory() as folder:
        try:
            open_network(RANKS)
            for rate in options.rates:
                shape_network(RANKS, rate)
                result["rates"].append(compared(task | {"found": f"{folder}/{rate}.json"}, rate))
        finally:
            close_network(RANKS)
    for name in ("replay", "link", "measured"):
        errors = [abs(row["error"][name]) for part in result["rates"] for row in part["rows"]]
        result[f"worst_error_{name}"] = max(errors)
    print(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank-of"]:
        rank_main(json.loads(sys.argv[2]))
    else:
        main()
