"""What `semmoe route` adds to a request, beside the routers that others wrote.

    python tests/benchmarks/route.py PLAN [--routers VENV] [--seconds S] [--rounds N]

One backend that answers at once stands behind all of them; each is measured in turn, several times over, in one run:
`first_ms`: milliseconds until the first token of a stream while 50 streams run, direct and through each (p50, p95), and what is
added to the direct ones; `requests_per_s`: small requests that are not streamed, 50 at a time. VENV holds vllm-router, sglang-router
and smg (pip install vllm-router==0.1.17 sglang-router==0.3.2 smg==1.13.0); without it only the direct way and ours are measured.
Prompts are token ids, so that nothing is tokenised on the way, of the others text, since some take no ids; `semmoe route, chat` asks the
engine for the ids of chats. `cpu_ms`: processor time of the router's process for one of those small requests, and `token_us` for a
token of the streams, microseconds; a busy machine hardly changes these. Latencies and rates are those of the best round.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

STREAMS = 50
TOKENS, INTERVAL = 40, 0.025  # of a stream: a second
ROUTERS = {
    "vllm-router": "vllm_router.launch_router",
    "sglang-router": "sglang_router.launch_router",
    "smg": "smg.launch_router",
}
IDS = list(range(5, 205))
KINDS = {"direct": "ids", "semmoe route": "ids", "semmoe route, chat": "chat"}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def post(url: str, body: dict) -> bytes:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.read()


def wait(url: str, process: subprocess.Popen, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            post(url + "/v1/completions", {"model": "m", "prompt": "ready?", "max_tokens": 1})
            return
        except OSError:
            time.sleep(0.3)
    raise RuntimeError(f"no answer from {url}, status {process.poll()}")


def request_bytes(url: str, stream: bool, kind: str) -> bytes:
    text = "what is a rank? " * 50
    asked = {
        "chat": {"messages": [{"role": "user", "content": text}]},
        "text": {"prompt": text},
        "ids": {"prompt": IDS},
    }[kind]
    body = json.dumps({"model": "m", **asked, "max_tokens": TOKENS if stream else 1, "stream": stream}).encode()
    path = "/v1/chat/completions" if kind == "chat" else "/v1/completions"
    head = f"POST {path} HTTP/1.1\r\nHost: {url.removeprefix('http://')}\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def answer(reader: asyncio.StreamReader) -> float:
    """Reads one answer to its end; the time at which the first byte of its body came."""
    head = await reader.readuntil(b"\r\n\r\n")
    assert b" 200 " in head.split(b"\r\n", 1)[0], head
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    if lengths:
        await reader.readexactly(int(lengths[0].split(b":")[1]))
        return time.perf_counter()
    first = 0.0
    while size := int((await reader.readline()).split(b";")[0], 16):
        first = first or time.perf_counter()
        await reader.readexactly(size + 2)
    await reader.readline()
    return first


async def drive(url: str, seconds: float, *, stream: bool, kind: str) -> tuple[list[float], float]:
    """Seconds to the first byte of every answer, and answers per second, with STREAMS connections."""
    host, port = url.removeprefix("http://").split(":")
    sent = request_bytes(url, stream, kind)
    waits: list[float] = []
    begin = time.perf_counter()

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        if stream:
            await asyncio.sleep(TOKENS * INTERVAL * random.Random(number).random())  # each at a time of its own
        while time.perf_counter() - begin < seconds:
            at = time.perf_counter()
            writer.write(sent)
            waits.append(await answer(reader) - at)
        writer.close()

    await asyncio.gather(*(client(number) for number in range(STREAMS)))
    return waits, len(waits) / (time.perf_counter() - begin)


def quantiles_ms(waits: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(waits, n=20)
    return {"p50": round(1e3 * cuts[9], 2), "p95": round(1e3 * cuts[18], 2)}


def control(url: str, **options: object) -> None:
    post(url + "/_control", {"reset": True, **options})


def cpu_seconds(pid: int) -> float:
    """Processor time of a process and of what it started."""
    total = 0.0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == pid:  # the group that it leads
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def measure(backend: str, urls: dict[str, str], pids: dict[str, int], asked: argparse.Namespace) -> dict[str, dict]:
    first: dict[str, list[dict[str, float]]] = {name: [] for name in urls}
    rates: dict[str, list[float]] = {name: [] for name in urls}
    spent: dict[str, list[float]] = {name: [] for name in urls}
    token: dict[str, list[float]] = {name: [] for name in urls}
    for _ in range(asked.rounds):
        for name, url in urls.items():
            kind = KINDS.get(name, "text")
            control(backend, tokens=TOKENS, interval=INTERVAL)
            before = cpu_seconds(pids[name])
            waits, _ = asyncio.run(drive(url, asked.seconds, stream=True, kind=kind))
            first[name].append(quantiles_ms(waits))
            token[name].append(1e6 * (cpu_seconds(pids[name]) - before) / len(waits) / TOKENS)
            control(backend, tokens=1, interval=0)
            before = cpu_seconds(pids[name])
            small, rate = asyncio.run(drive(url, asked.seconds, stream=False, kind=kind))
            rates[name].append(rate)
            spent[name].append(1e3 * (cpu_seconds(pids[name]) - before) / len(small))
    best = {name: {q: min(found[q] for found in first[name]) for q in ("p50", "p95")} for name in urls}
    return {
        name: {
            "first_ms": best[name],
            "added_ms": {q: round(best[name][q] - best["direct"][q], 2) for q in ("p50", "p95")},
            "requests_per_s": round(max(rates[name])),
            "cpu_ms": round(min(spent[name]), 3),
            "token_us": round(min(token[name])),
        }
        for name in urls
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("plan")
    parser.add_argument("--backend", type=Path, default=Path(__file__).parents[1] / "engines/kit/printing-backend.py")
    parser.add_argument("--routers", type=Path)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    started: list[subprocess.Popen] = []
    with tempfile.TemporaryFile() as log:

        def start(*words: object) -> subprocess.Popen:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(
                [str(w) for w in words], stdout=log, stderr=log, start_new_session=True, env=environment
            )
            started.append(process)
            return process

        try:
            backend, ours = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
            port = backend.rpartition(":")[2]
            first = start(sys.executable, asked.backend, "--port", port, "--engine", "vllm")
            wait(backend, first)
            route = [sys.executable, "-m", "semmoe", "route", asked.plan, "--upstream", backend]
            router = start(*route, "--port", ours.rpartition(":")[2])
            wait(ours, router)
            urls = {"direct": backend, "semmoe route": ours, "semmoe route, chat": ours}
            pids = {name: first.pid if name == "direct" else router.pid for name in urls}
            for name, module in ROUTERS.items() if asked.routers else ():
                port = free_port()
                command = [asked.routers / "bin/python", "-m", module, "--host", "127.0.0.1", "--port", port]
                command += ["--worker-urls", backend, "--policy", "round_robin"]
                command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", free_port()]
                other = start(*command)
                urls[name], pids[name] = f"http://127.0.0.1:{port}", other.pid
                wait(urls[name], other)
            found = measure(backend, urls, pids, asked)
            print(json.dumps({"streams": STREAMS, "cores": os.cpu_count(), **found}))
        except RuntimeError:
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace")[-4000:])
            raise
        finally:
            for process in reversed(started):
                os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
