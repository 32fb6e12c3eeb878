"""`semmoe route` as a user starts it: what it says, refuses, shows, and how it ends."""

import asyncio
import re
import signal
import sys

import aiohttp
import pytest
from routers import in_loop, router, until
from stand_ins.standin_engine import engine
from typer.testing import CliRunner

from semmoe.main import app
from semmoe.runtime.router.pins import ENGINES

COMPLETIONS = "/v1/completions"


def refused(*words: object) -> str:
    result = CliRunner().invoke(app, ["route", *map(str, words)])
    assert result.exit_code == 1 and result.stdout == "", result.output
    return str(result.exception)


URL = ("--upstream", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--upstream", "127.0.0.1:8001"), "--upstream 127.0.0.1:8001: expected a URL such as http://127.0.0.1:8001"),
        (("--upstream", "http://me:secret@127.0.0.1:9"), "--upstream 127.0.0.1: a URL with a password stands in logs"),
        (("--upstream", "ftp://a"), "expected a URL"),
        (("--upstream", "http://a:99999"), "expected a URL"),
        ((*URL, *URL), "--upstream names a server twice"),
        (
            (*URL, "--upstream", "http://b", "--upstream", "http://c"),
            "is for 2 ranks, which do not divide over 3 upstreams",
        ),
        ((*URL, "--dp-ranks", 3), "is for 2 ranks, which do not divide over --dp-ranks 3"),
        ((*URL, "--tokenizer", "/nowhere/at/all"), "--tokenizer /nowhere/at/all: "),
        ((*URL, "--host", "203.0.113.7"), "cannot listen on 203.0.113.7:8000: "),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(plan, words, said):
    line = refused(plan, *words, *([] if "--host" in words else ["--port", 0]))
    assert said in line and "\n" not in line and "secret" not in line


def test_what_is_no_plan_is_refused(tmp_path):
    assert "plan.json" in refused(tmp_path, *URL)


def test_engines_are_those_of_the_option():
    from semmoe.options import Engine

    assert tuple(Engine) == ENGINES


@in_loop
async def test_pages_and_metrics(plan):
    async with engine() as one, router(plan, one.url) as served:
        await served.post(
            COMPLETIONS, {"prompt": list(range(10, 40)), "max_tokens": 4}, Authorization="Bearer key-of-a-client"
        )
        texts = {}
        for path in ("/", "/healthz", "/readyz", "/metrics", "/semmoe/status"):
            async with served.client.get(served.url + path) as response:
                texts[path] = await response.text()
                assert response.status == 200
                if path == "/":
                    assert "default-src 'none'" in response.headers["content-security-policy"]
        assert not re.search(r"(src|href)=|url\(|@import|https?://(?!www\.w3\.org)", texts["/"])
        for line in texts["/metrics"].splitlines():
            assert re.fullmatch(r"# (HELP|TYPE) .*|semmoe_\w+(\{(\w+=\"[^\"]*\",?)+\})? [-0-9.e+]+", line), line
        assert 'semmoe_requests_total{decision="affine",rank=' in texts["/metrics"]
        assert "semmoe_added_latency_seconds_count 1" in texts["/metrics"]
        assert "key-of-a-client" not in "".join(texts.values())
        async with served.client.post(served.url + "/metrics") as response:  # not ours: only GET is
            assert response.status == 200 and one.seen[-1].target == "/metrics"


@in_loop
async def test_the_process_drains_on_sigterm(plan, tmp_path):
    async with engine(tokens=20, interval=0.1) as one:
        words = ["-m", "semmoe", "route", plan, "--upstream", one.url, "--port", "0", "--metrics-port", "0"]
        log = (tmp_path / "log").open("w+")
        process = await asyncio.create_subprocess_exec(sys.executable, *words, stderr=log)

        def said(pattern: str) -> str:
            found = re.search(pattern, (tmp_path / "log").read_text())
            return found[1] if found else ""

        await until(lambda: bool(said(r"listening on (\S+)")), 40)
        main, own = said(r"listening on (\S+)"), said(r"pages and metrics: (\S+)")
        async with aiohttp.ClientSession() as client:
            for path, status in (("/healthz", 200), ("/metrics", 200), ("/", 200), ("/v1/models", 404)):
                async with client.get(own + path) as response:
                    assert response.status == status
            response = await client.post(main + COMPLETIONS, json={"prompt": [10, 11, 12], "stream": True})
            await response.content.readany()
            process.send_signal(signal.SIGTERM)
            await until(lambda: bool(said(r"(1 in flight)")), 10)
            async with client.get(own + "/readyz") as ready:
                assert ready.status == 503 and await ready.text() == "draining\n"
            await asyncio.sleep(0.3)  # the server looks every tenth of a second
            with pytest.raises(aiohttp.ClientConnectorError):
                async with aiohttp.ClientSession() as other:
                    await other.get(main + "/healthz")
            assert (await response.read()).endswith(b"data: [DONE]\n\n")
        assert await asyncio.wait_for(process.wait(), 20) == 0
        assert one.generations[0].end == "finished"
        assert "[10, 11" not in (tmp_path / "log").read_text()
