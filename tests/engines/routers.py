"""Which pins survive which router: prints the table of docs/engines.md, row by row.

    python tests/engines/routers.py PLAN [--routers VENV] [CASE...]

Starts `semmoe route` and each router that VENV has (pip install vllm-router==0.1.17
sglang-router==0.3.2 smg==1.13.0; about 350 MB) in front of a backend that prints what it gets
(kit/printing-backend.py), sends ten requests pinned to rank 1 of 2 in every known way and on every route,
and prints for each which rank vLLM and SGLang would read: 1 = the pin arrived; - = no rank arrived,
the engine chooses; 0+1 = the router chose. PLAN is a plan for two ranks. The exit status is 1 where
`semmoe route` loses a pin that its engine reads. On 127.0.0.1 only; by hand, not by pytest.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from route import free_port, post, wait

ASKED = 1
PINS: dict[str, tuple[dict[str, str], dict[str, int]]] = {  # headers, fields of the body
    "no pin": ({}, {}),
    "header X-Data-Parallel-Rank": ({"X-Data-Parallel-Rank": str(ASKED)}, {}),
    "body routed_dp_rank": ({}, {"routed_dp_rank": ASKED}),
    "body data_parallel_rank": ({}, {"data_parallel_rank": ASKED}),
    "header X-SMG-Target-Worker": ({"X-SMG-Target-Worker": str(ASKED)}, {}),
}
ROUTES = {
    "/v1/completions": {"prompt": "text"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "text"}]},
    "/generate": {"text": "text"},
}
OURS = ("semmoe", "route")
CASES: dict[str, tuple[str, list[str]]] = {  # the engine behind it, and the program with its options
    "direct": ("vllm", []),
    "semmoe route": ("vllm", [*OURS]),
    "semmoe route --engine sglang": ("sglang", [*OURS, "--engine", "sglang"]),
    "vllm-router": ("vllm", ["vllm_router.launch_router"]),
    "vllm-router, 2 ranks": ("vllm", ["vllm_router.launch_router", "--intra-node-data-parallel-size", "2"]),
    "sglang-router": ("sglang", ["sglang_router.launch_router"]),
    "sglang-router --dp-aware": ("sglang", ["sglang_router.launch_router", "--dp-aware"]),
    "smg": ("sglang", ["smg.launch_router"]),
    "smg --dp-aware": ("sglang", ["smg.launch_router", "--dp-aware"]),
    "smg --dp-aware, consistent_hashing": (
        "sglang",
        ["smg.launch_router", "--dp-aware", "--policy", "consistent_hashing"],
    ),
}
# What an engine reads must arrive behind ours: place of its rank in a cell, and routes by pin.
KEPT: dict[str, tuple[int, dict[str, list[str]]]] = {
    "semmoe route": (0, {"header X-Data-Parallel-Rank": list(ROUTES)}),
    "semmoe route --engine sglang": (
        1,
        {
            "header X-Data-Parallel-Rank": list(ROUTES)[:2],
            "body routed_dp_rank": list(ROUTES),
            "body data_parallel_rank": list(ROUTES),
        },
    ),
}


def arrived(backend: str, url: str, route: str, pin: str) -> str:
    """Ranks that vLLM and SGLang would read of ten requests."""
    headers, fields = PINS[pin]
    post(backend + "/_control", {"reset": True})
    body = json.dumps({"model": "m", "max_tokens": 2, **ROUTES[route], **fields}).encode()
    for _ in range(10):
        try:
            asked = urllib.request.Request(url + route, body, {"Content-Type": "application/json", **headers})
            urllib.request.urlopen(asked, timeout=10).close()
        except urllib.error.HTTPError as error:
            return f"error {error.code}"
    with urllib.request.urlopen(backend + "/_seen", timeout=10) as answer:
        seen = json.load(answer)["requests"]
    ranks = ({str(each[engine]) for each in seen} for engine in ("vllm", "sglang"))
    return " ".join("+".join(sorted(each)).replace("None", "-") for each in ranks)


def command(words: list[str], asked: argparse.Namespace, backend: str, port: int) -> list[object]:
    if words[:2] == list(OURS):
        return [sys.executable, "-m", *words, asked.plan, "--upstream", backend, "--port", port]
    policy = [] if "--policy" in words else ["--policy", "round_robin"]
    prometheus = ["--prometheus-host", "127.0.0.1", "--prometheus-port", free_port()]
    listen = ["--host", "127.0.0.1", "--port", port, "--worker-urls", backend]
    return [asked.routers / "bin/python", "-m", words[0], *listen, *prometheus, *policy, *words[1:]]


def check(name: str, asked: argparse.Namespace, log) -> Iterator[tuple[str, list[str]]]:
    engine, words = CASES[name]
    started: list[subprocess.Popen] = []

    def start(*told: object) -> subprocess.Popen:
        started.append(subprocess.Popen([str(w) for w in told], stdout=log, stderr=log, start_new_session=True))
        return started[-1]

    try:
        port = free_port()
        backend = url = f"http://127.0.0.1:{port}"
        wait(backend, start(sys.executable, asked.backend, "--port", port, "--ranks", "2", "--engine", engine))
        if words:
            port = free_port()
            url = f"http://127.0.0.1:{port}"
            wait(url, start(*command(words, asked, backend, port)))
        for pin in PINS:
            yield pin, [arrived(backend, url, route, pin) for route in ROUTES]
    finally:
        for process in reversed(started):
            os.killpg(process.pid, signal.SIGKILL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan")
    parser.add_argument("--backend", type=Path, default=Path(__file__).parent / "kit/printing-backend.py")
    parser.add_argument("--routers", type=Path)
    parser.add_argument("cases", nargs="*")
    asked = parser.parse_intermixed_args()
    lost = 0
    print("| router | sent | " + " | ".join(ROUTES) + " |\n|---|---|---|---|---|")
    with tempfile.TemporaryFile() as log:
        for name in asked.cases or [n for n, (_, w) in CASES.items() if asked.routers or not w or w[:2] == list(OURS)]:
            for pin, cells in check(name, asked, log):
                print(f"| {name} | {pin} | {' | '.join(cells)} |", flush=True)
                place, routes_of = KEPT.get(name, (0, {}))
                found = dict(zip(ROUTES, cells, strict=True))
                lost += any(found[route].split(" ")[place] != str(ASKED) for route in routes_of.get(pin, ()))
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
