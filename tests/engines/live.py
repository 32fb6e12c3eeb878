#!/usr/bin/env python3
"""What tests/engines/all does to a server that runs: live.py streams|faults|replan|kill URL MODEL TEXTS PLAN LOG.

`streams`: 200 at once, of which every fourth client leaves, every fifth names its rank, and every
tenth has a prompt that the plan knows nothing of. `faults`: requests in which the plug-in fails
(faults.py; `live.py plugin FOLDER` puts it there beforehand). `replan`: both ranks are given the
re-placement PLAN-next in the middle of requests. `kill`: the process of rank 1 is killed while
streams run. Each prints a row per claim and fails where one does not hold. LOG is what
the server writes.
"""

import asyncio
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import faults
from served import read_texts, told

RUNNING = r'^vllm:num_requests_running.*engine="(\d)".*\} (\S+)'
DECISIONS = r'^semmoe_requests_total\{decision="(\w+)"\} (\S+)'
END_SECONDS = 60.0  # that a server has to end after one of its processes died, and a stream before that


@dataclass(frozen=True, eq=False)
class Live:
    """A server, and what is sent to it."""

    url: str
    model: str
    texts: list[str]
    plan: Path
    log: Path
    client: aiohttp.ClientSession

    async def look(self, pattern: str) -> dict[str, float]:
        """Values of a metric by the label that the pattern finds."""
        async with self.client.get(self.url + "/metrics") as response:
            found = re.findall(pattern, await response.text(), re.MULTILINE)
        return {name: float(value) for name, value in found}

    async def gained(self, before: dict[str, float]) -> dict[str, int]:
        return {name: round(value - before[name]) for name, value in (await self.look(DECISIONS)).items()}

    def ask(self, prompt: str | list[int], tokens: int, stream: bool, **headers: str) -> Any:
        body: dict[str, Any] = {"model": self.model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return self.client.post(self.url + "/v1/completions", json=body, headers=headers)

    def unseen_ids(self) -> list[int]:
        """Token ids that the plan's trace did not have."""
        from semmoe.runtime.engines.plan_files import read_plan_facts

        known = set(read_plan_facts(self.plan).tables["ids_V"].tolist())
        return [number for number in range(100, max(known)) if number not in known][:40]


async def streams(live: Live) -> bool:
    unseen = live.unseen_ids()

    async def one(number: int) -> str:
        prompt = unseen if number % 10 == 3 else live.texts[number % len(live.texts)][:400]
        headers = {"X-data-parallel-rank": str(number // 5 % 2)} if number % 5 == 0 else {}
        async with live.ask(prompt, 24, True, **headers) as response:
            if number % 4 == 0:
                return "left" if await response.content.readany() else "empty"
            data = await response.read()
        return "whole" if b'"completion_tokens":24' in data and data.endswith(b"data: [DONE]\n\n") else "broken"

    before = await live.look(DECISIONS)
    begin = time.monotonic()
    ends = Counter(await asyncio.gather(*(one(number) for number in range(200))))
    took, waited = time.monotonic() - begin, time.monotonic()
    while (still := sum((await live.look(RUNNING)).values())) and time.monotonic() < waited + 10:
        await asyncio.sleep(0.1)
    gained = await live.gained(before)
    known = gained["affine"] + gained["spilled"]
    expected = {"pinned": 40, "unknown": 20, "failed": 0}
    good = all(gained[name] == number for name, number in expected.items()) and known == 140
    return told(
        [
            (
                "200 streams at once, every fourth left",
                f"{dict(ends)} in {took:.0f} s",
                ends == {"whole": 150, "left": 50},
            ),
            ("nothing runs any more after", f"{time.monotonic() - waited:.1f} s", still == 0),
            ("their decisions", gained, good),
        ]
    )


async def check_pins(live: Live) -> bool:
    """Pins arrive at the rank that they name, and one that is none is vLLM's to refuse."""
    pattern = r'^vllm:request_success_total\{.*engine="(\d)".*finished_reason="length".*\} (\S+)'
    before, statuses = await live.look(pattern), Counter()
    for rank in ("1", "1", "1", "0", "2", "-1"):
        async with live.ask(live.texts[0][:100], 2, False, **{"X-data-parallel-rank": rank}) as response:
            statuses[response.status] += 1
    await asyncio.sleep(1)
    gained = {name: round(value - before.get(name, 0)) for name, value in (await live.look(pattern)).items()}
    return told(
        [("3 pins to rank 1, 1 to rank 0: finished there", gained, gained == {"0": 1, "1": 3})]
        + [("pins to ranks 2 and -1: refused", dict(statuses), statuses == {200: 4, 400: 2})]
    )


async def break_hooks(live: Live) -> bool:
    before, statuses = await live.look(DECISIONS), Counter()

    async def one(number: int) -> None:
        prompt = faults.BROKEN_IDS + [20 + number] if number % 2 else live.texts[number][:100]
        named = {} if number % 2 else {"X-Request-Id": f"{faults.BROKEN_NAME}-{number}"}
        async with live.ask(prompt, 4, False, **named) as response:
            statuses[response.status] += 1

    await asyncio.gather(*(one(number) for number in range(40)))
    gained = await live.gained(before)
    async with live.ask(live.texts[0][:200], 4, False) as response:
        after = await live.gained(before)
        good = response.status == 200 and after["affine"] + after["spilled"] == gained["affine"] + gained["spilled"] + 1
    traces = live.log.read_text(errors="replace").count("ZeroDivisionError: a fault that a test put")
    return told(
        [
            ("40 requests, in each the hook fails", dict(statuses), statuses == {200: 40}),
            ("their decisions", gained, gained["failed"] == 40),
            ("faults in the log", traces, traces == 1),
            ("and the next request is scored again", good, good),
        ]
    )


async def replan(live: Live) -> bool:
    from semmoe.runtime.engines.plan_files import read_plan_facts

    new = f"{live.plan}-next"

    async def one(number: int, tokens: int) -> list[int]:
        body = {"model": live.model, "prompt": live.texts[number][:300], "max_tokens": tokens, "ignore_eos": True}
        body |= {"temperature": 0, "return_token_ids": True}
        headers = {"X-data-parallel-rank": str(number % 2)}
        async with live.client.post(live.url + "/v1/completions", json=body, headers=headers) as response:
            return (await response.json())["choices"][0]["token_ids"]

    async def post(route: str, **body: Any) -> Any:
        async with live.client.post(live.url + route, json=body) as response:
            return await response.json()

    async def change(*words: str) -> dict[str, Any]:
        return (await post("/collective_rpc", method="semmoe_replan", args=[new, *words]))["results"][0]

    long = await asyncio.gather(*(one(number, 150) for number in range(24)))
    too_early = await change()
    asking = [asyncio.ensure_future(one(number, 150)) for number in range(24)]
    await asyncio.sleep(1)
    await post("/pause?mode=keep")
    waiting = sum(not each.done() for each in asking)
    done = await change("yes")
    await post("/resume")
    under_way = await asyncio.gather(*asking)
    await post("/reset_prefix_cache")
    after = await asyncio.gather(*(one(number, 150) for number in range(24)))
    served, moved = done["plan"] == read_plan_facts(new).fingerprint, done["moved"]
    return told(
        [
            ("another plan without a pause: refused", too_early["reason"][:30], not too_early["applied"]),
            ("24 requests pause, another plan is served", f"{moved} experts moved", served and moved and waiting == 24),
            ("their tokens, as without it", sum(map(list.__eq__, long, under_way)), under_way == long),
            ("tokens of requests that come later", sum(map(list.__eq__, long, after)), after == long),
        ]
    )


def descendants(pid: int) -> list[int]:
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def words_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def server_processes() -> dict[int, str]:
    """Processes of the server, which the script that started this one has started beside it."""
    pid = os.getppid()
    while pid > 1 and "serve-example.sh" not in words_of(pid):
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    found = {one: words_of(one) for one in descendants(pid)} if pid > 1 else {}
    return {one: words for one, words in found.items() if re.match(r"VLLM|\S*python\S* \S*vllm serve", words)}


async def kill(live: Live) -> bool:
    there = server_processes()
    (rank_1,) = [pid for pid, words in there.items() if "EngineCore_DP1" in words]
    begun = asyncio.Event()

    async def one(number: int) -> str:
        try:
            async with live.ask(live.texts[number][:100], 900, True) as response:
                await response.content.readany()
                begun.set()
                data = await response.read()
            return "whole" if b'"completion_tokens":900' in data else f"told of an error ({response.status})"
        except aiohttp.ClientError:
            return "cut"

    asking = [asyncio.ensure_future(one(number)) for number in range(6)]
    await begun.wait()
    await asyncio.sleep(0.5)
    begin = time.monotonic()
    os.kill(rank_1, signal.SIGKILL)
    done, hanging = await asyncio.wait(asking, timeout=END_SECONDS)
    took = time.monotonic() - begin
    while (left := [pid for pid in there if words_of(pid)]) and time.monotonic() < begin + END_SECONDS:
        await asyncio.sleep(0.2)
    errors = len(re.findall("ERROR .*semmoe: ", live.log.read_text(errors="replace")))
    ends = Counter(each.result() for each in done)
    return told(
        [
            (
                "rank 1 is killed under 6 streams: they end",
                f"{dict(ends)} in {took:.1f} s",
                not hanging and not ends["whole"],
            ),
            ("and so does the server, as without us", f"{time.monotonic() - begin:.0f} s, {len(left)} left", not left),
            ("errors that we logged: of the fault put in", errors, errors == 1),
        ]
    )


def plugin(folder: Path) -> None:
    """The faults as a distribution, found by whoever has `folder` in PYTHONPATH."""
    about = folder / "semmoe_faults-1.dist-info"
    about.mkdir(parents=True)
    shutil.copy(faults.__file__, folder / "semmoe_faults.py")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: semmoe-faults\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[vllm.general_plugins]\nsemmoe_faults = semmoe_faults:register\n")


@asynccontextmanager
async def opened(url: str, model: str, texts: str, plan: str, log: str) -> AsyncIterator[Live]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:
        yield Live(url, model, read_texts(texts), Path(plan), Path(log), client)


async def main(name: str, words: list[str]) -> bool:
    async with opened(*words) as live:
        if name == "streams":
            return await check_pins(live) & await streams(live)
        return await {"faults": break_hooks, "replan": replan, "kill": kill}[name](live)


if __name__ == "__main__":
    if sys.argv[1:2] == ["plugin"]:
        plugin(Path(sys.argv[2]))
    elif sys.argv[1:2] and sys.argv[1] in ("streams", "faults", "replan", "kill") and len(sys.argv) == 7:
        sys.exit(0 if asyncio.run(main(sys.argv[1], sys.argv[2:])) else 1)
    else:
        sys.exit(__doc__)
