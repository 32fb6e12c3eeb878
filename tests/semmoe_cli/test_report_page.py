"""Report pages: whole and self-contained in every format, honest about what they show, and drawn
by a real browser."""

import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from command_line import run
from matplotlib.image import imread
from typer.testing import CliRunner

from semmoe.main import app
from semmoe.pages.deployment import deployment
from semmoe.pages.figures.health import load_skew
from semmoe.pages.figures.plan import saved_share
from semmoe.pages.figures.style import DARK, LIGHT, png, svg
from semmoe.pages.page import Grid, Page, Picture, Section, Text, check_page_target, write_page
from semmoe.pages.plan import FITTED
from semmoe.pages.plan_report import PlanReportOptions, make_plan_report
from semmoe.profiles.errors import InputError
from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic
from semmoe.profiles.trace import RoutingTrace
from semmoe.solvers.evaluate.decision import Decision, decide
from semmoe.solvers.evaluate.pictures import scored_requests
from semmoe.solvers.evaluate.predictable import token_predictability
from semmoe.solvers.evaluate.report import Judgement, LayerScores, Report, ScoreRow, Verdict
from semmoe.solvers.evaluate.verdict import dispatch_costs, rows_per_token
from semmoe.solvers.evaluate.what_if import what_if
from semmoe.solvers.health.record import LoadFacts
from semmoe.solvers.plan import Plan
from semmoe.solvers.schedule.simulate import Setting

LINKS = ("--topology-bandwidth", 50, "--latency", 10)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A trace t, a plan p that kept its held-out requests unseen, and a plan q that was fitted
    on all of t after scoring."""
    root = tmp_path_factory.mktemp("pages")
    write_synthetic(root / "t", SyntheticWorld(num_requests=60, tokens_per_request=40, num_layers=3))
    run("place", root / "t", "--ranks", 4, "--method", "metis", "--no-refit", "-o", root / "p")
    run("place", root / "t", "--ranks", 4, "--method", "metis", "-o", root / "q")
    return root


@pytest.fixture(scope="module")
def html(made) -> Path:
    path = made / "report.html"
    run("report", made / "p", made / "t", "-o", path, "--what-if", "2,4,8,64", "--hidden-size", 64, *LINKS)
    return path


class Outline(HTMLParser):
    """Tags with their attributes, and a check that every element is closed in order."""

    VOID = {"meta", "br", "path", "image", "use", "rect", "input"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_one_file_without_anything_from_elsewhere(html):
    text = html.read_text(encoding="utf-8")
    assert html.stat().st_size < 3_000_000
    outline = Outline()
    outline.feed(text)
    assert outline.open == []
    tags = {tag for tag, _ in outline.seen}
    assert not tags & {"link", "iframe", "object", "img"}
    assert [attributes for tag, attributes in outline.seen if tag == "script"] == [{"type": "application/json"}, {}]
    for _, attributes in outline.seen:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), attributes
    anchors = {a["href"] for tag, a in outline.seen if tag == "a"}
    assert anchors == {"#do-this-next", "#what-do-i-risk", "#evidence", "#other-engines"}
    assert anchors <= {f"#{a['id']}" for _, a in outline.seen if "id" in a}
    assert "url(http" not in text and "@import" not in text
    ids = [
        a["id"]
        for _, a in outline.seen
        if "id" in a and not re.match(r"(figure|axes|patch|line2d|text|xtick|matplot)", a["id"])
    ]
    references = set(re.findall(r"url\(#([^)]+)\)|xlink:href=\"#([^\"]+)\"", text))
    assert {a or b for a, b in references} <= {a["id"] for _, a in outline.seen if "id" in a}
    clips = [i for i in ids if i.startswith("p")]
    assert len(clips) == len(set(clips)), "two pictures share the id of a clip path"


def test_the_page_says_what_was_measured_and_found(html, made):
    text = html.read_text(encoding="utf-8")
    scores = json.loads(run("report", made / "p", made / "t", "--json"))
    row = next(r for r in scores["rows"] if (r["placement"], r["schedule"]) == ("plan", "random"))
    assert f"{row['rem']:.3f}" in text
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    for word in (
        "never saw",
        "layer",
        "share a rank",
        "rows between ranks",
        "Load:",
        "REM falls in",
        "other numbers of ranks",
        "deploy",
    ):
        assert any(word in heading for heading in headings), (word, headings)
    assert "Hidden size 64" in text and "GB/s" in text
    for command in ("semmoe export", "--init-expert-location", "semmoe reshard"):
        assert command in text
    assert text.count('role="img" aria-label="') == text.count("<svg") >= 7


def test_the_page_follows_the_readers_theme(html):
    text = html.read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    assert LIGHT.plan in text and DARK.plan in text
    pictures = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert "var(--plan)" in pictures and "var(--ink)" in pictures
    assert not re.search(r"#0([1-9])0\1(0\1)?\b", pictures), "a marker colour was left in a picture"
    assert "DejaVu" not in pictures


def test_same_input_gives_the_same_page(html, made):
    again = made / "again.html"
    run("report", made / "p", made / "t", "-o", again, "--what-if", "2,4,8,64", "--hidden-size", 64, *LINKS)
    assert again.read_bytes() == html.read_bytes()


def test_markdown_and_png(made):
    from PIL import Image

    run("report", made / "p", made / "t", "-o", made / "r.md")
    text = (made / "r.md").read_text(encoding="utf-8")
    assert text.startswith("# Expert placement for synthetic on 4 ranks") and "| contiguous | random |" in text
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(pictures) >= 7 and all(Image.open(made / name).width > 1000 for name in pictures)
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert tables and all(len({line.count("|") for line in table.splitlines()}) == 1 for table in tables)
    run("report", made / "p", made / "t", "-o", made / "r.png")
    with Image.open(made / "r.png") as picture:
        assert picture.width > 1000 and picture.height > picture.width


def test_a_health_page_and_its_json(made):
    path = made / "health.html"
    health = json.loads(run("report", made / "t", "-o", path, "--ranks", 4, "--json"))
    assert health["format"] == "semmoe-health" and health["trace"] == str(made / "t")
    text = path.read_text(encoding="utf-8")
    assert "<h1>Good" in text and text.count("<svg") >= 5
    table = run("report", made / "t", "--ranks", 4)
    assert "There is structure" in table and "expected" in table


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_browser_draws_it(html, tmp_path, theme):
    from PIL import Image

    shot = tmp_path / f"{theme}.png"
    words = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
    ]
    words += [
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    words += [f"--blink-settings=preferredColorScheme={int(theme == 'light')}", f"--screenshot={shot}"]
    subprocess.run([*words, "--window-size=1000,2400", html.as_uri()], capture_output=True, timeout=120, check=True)
    with Image.open(shot) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    paper = [int((DARK if theme == "dark" else LIGHT).paper[i : i + 2], 16) for i in (1, 3, 5)]
    assert np.abs(pixels[5, 5] - paper).max() <= 2
    plan = [int((DARK if theme == "dark" else LIGHT).plan[i : i + 2], 16) for i in (1, 3, 5)]
    assert (np.abs(pixels - plan).max(-1) <= 8).sum() > 200, "the plan's marks are not there in the theme's colour"
    assert (np.abs(pixels - paper).max(-1) > 40).mean() > 0.02


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_a_browser_prints_it(html, tmp_path):
    words = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
    ]
    words += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    words += ["--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'r.pdf'}", html.as_uri()]
    subprocess.run(words, capture_output=True, timeout=120, check=True)
    printed = (tmp_path / "r.pdf").read_bytes()
    pages = len(re.findall(rb"/Type\s*/Page\b", printed))
    assert printed.startswith(b"%PDF") and 3 <= pages <= 20


MEASURE = """
addEventListener("load", () => setTimeout(() => {
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  const ids = [...page.querySelectorAll("a")].map(link => link.getAttribute("href").slice(1));
  const select = page.querySelector(".explorer select"), before = page.querySelector(".explorer output").textContent;
  select.value = 1 - select.value % 2; select.onchange();
  const strip = page.querySelectorAll("svg.strip")[1], box = strip.getBoundingClientRect();
  const after = page.querySelector(".explorer output").textContent;
  strip.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + 3}));
  document.title = JSON.stringify({
    wide: root.scrollWidth, broken: ids.filter(id => !page.getElementById(id)), changed: before != after,
    under: page.querySelector(".explorer output").textContent, asked: performance.getEntriesByType("resource").length
      + document.querySelector("iframe").contentWindow.performance.getEntriesByType("resource").length,
    tall: page.querySelector("h1").getBoundingClientRect().height / parseFloat(getComputedStyle(page.querySelector("h1")).lineHeight),
    broad: getComputedStyle(page.querySelector("svg.broad")).display, narrow: getComputedStyle(page.querySelector("svg.narrow")).display,
  });
}, 200));
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_finds_no_overflow_no_broken_anchor_and_no_request(html, tmp_path, width):
    """The page in a frame of that width: a browser's own window is no narrower than 500 pixels."""
    inside = escape(html.read_text(encoding="utf-8"))
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<script>{MEASURE}</script><iframe style="width:{width}px;height:800px;border:0" srcdoc="{inside}"></iframe>',
        encoding="utf-8",
    )
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--window-size=1400,900"]
    words += [
        "--disable-background-networking",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=5000",
    ]
    done = subprocess.run([*words, "--dump-dom", frame.as_uri()], capture_output=True, timeout=120, check=True)
    title = re.search(r"<title>(\{.*?)</title>", done.stdout.decode())
    assert title, "the page was not measured"
    seen = json.loads(unescape(title[1]))
    assert seen["wide"] <= width and seen["broken"] == [] and seen["asked"] == 0
    assert seen["changed"], "the selector of layers changes nothing"
    assert re.match(r"expert \d+ on rank \d, .*: about [\d.]+ times the mean expert", seen["under"])
    assert (seen["broad"] == "none", seen["narrow"] == "none") == (width == 400, width == 1280)
    assert seen["tall"] < (2.5 if width == 1280 else 5.5)


@pytest.mark.parametrize(("columns", "kind"), [(4, "plain"), (5, "stacked")])
def test_tables_of_many_intervals_set_them_below_values(tmp_path, columns, kind):
    grid = Grid(["", *"abcde"[:columns]], [["row", *["1.0 [0.9, 1.1]"] * columns]])
    write_page(Page("t", "v", "good", "b", [], [Section("s", [grid])], "f"), tmp_path / "x.html")
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert f'<table class="{kind}">' in text and "1.0 <small>[0.9, 1.1]</small>" in text
    assert ".stacked td small { display: block" in text


def test_nodes_are_explained_where_there_are_some(made, tmp_path):
    run("place", made / "t", "--ranks", 4, "--nodes", 2, "--method", "metis", "--no-refit", "-o", tmp_path / "n")
    run("report", tmp_path / "n", made / "t", "-o", tmp_path / "n.md")
    assert "NODE: other nodes" in (tmp_path / "n.md").read_text(encoding="utf-8")


def test_names_and_numbers_are_aligned_by_kind(tmp_path):
    grid = Grid(["most", "share", "least", "share"], [["a", "1", "b", "2"]], names_at=frozenset((0, 2)))
    for ending in ("html", "md"):
        write_page(Page("t", "v", "good", "b", [], [Section("s", [grid])], "f"), tmp_path / f"x.{ending}")
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert '<td class="name">a</td><td>1</td><td class="name">b</td><td>2</td>' in text
    assert "| --- | ---: | --- | ---: |" in (tmp_path / "x.md").read_text(encoding="utf-8")


def test_deployment_gives_whole_commands(made):
    plan = Plan.load(made / "p")
    unnamed = replace(plan, model=replace(plan.model, model="unknown", num_model_layers=0))
    for placed, source in ((plan, "synthetic"), (unnamed, "CHECKPOINT")):
        lines = {c.name.split(" ")[0]: " ".join(c.lines).replace(" \\\n ", "") for c in deployment(placed, "my plan")}
        assert f"python -m sglang.launch_server --model-path {source} --tp-size 4" in lines["SGLang"]
        assert f"trtllm-serve {source} --tp_size 4" in lines["TensorRT-LLM"]
        assert f"vllm serve {source} --data-parallel-size 4" in lines["vLLM"]
        assert f"semmoe reshard {source} 'my plan' -o {source}-placed" in lines["Any"]
        assert ("--model CHECKPOINT" in lines["SGLang"]) == (source == "CHECKPOINT")
        for found in deployment(placed, "my plan"):
            assert max(len(part) for line in found.lines for part in line.splitlines()) < 140


def test_pictures_that_are_no_evidence_say_so(made):
    plan = json.loads((made / "q" / "plan.json").read_text(encoding="utf-8"))
    shutil.copytree(made / "q", made / "strange")
    for row in plan["scores"]["rows"]:
        row["rem"] += 1
    (made / "strange" / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    run("show", made / "strange", "--accept-edits")
    for name, said in (("strange", True), ("q", False)):
        run("report", made / name, made / "t", "-o", made / f"{name}.md")
        assert (FITTED in (made / f"{name}.md").read_text(encoding="utf-8")) == said


@pytest.mark.parametrize(
    ("file", "message"), [("r.pdf", "ends in .html, .md, .png"), ("no/r.html", "does not exist"), ("", "ends in")]
)
def test_a_wrong_output_is_refused_at_once(made, file, message):
    with pytest.raises(InputError, match=message):
        check_page_target(made / file)


@pytest.mark.parametrize("words", [["--what-if", "2,x"], ["--what-if", "0"], ["--tokenizer", "nowhere"]])
def test_wrong_options_are_one_line(made, words):
    result = CliRunner().invoke(app, ["report", str(made / "p"), str(made / "t"), *words])
    assert isinstance(result.exception, InputError) and "\n" not in str(result.exception)


def test_options_of_a_plan_need_a_plan(made):
    result = CliRunner().invoke(app, ["report", str(made / "t"), "--what-if", "2"])
    assert isinstance(result.exception, InputError) and "need a plan" in str(result.exception)
    assert CliRunner().invoke(app, ["report", "a", "b", "c"]).exit_code == 2


def test_a_refitted_plan_is_shown_as_it_was_scored(made):
    trace = RoutingTrace.open(made / "t")
    kept, refitted = Plan.load(made / "p"), Plan.load(made / "q")
    scored = scored_requests(refitted, trace, scheduled=True)
    assert scored.held_out and not (scored.fit_B & scored.score_B).any()
    assert np.array_equal(scored.deployment.placement.experts_LRS, kept.placement.experts_LRS)
    assert np.array_equal(scored.deployment.load_LE, kept.load_LE)
    for name, table in scored.deployment.schedule.to_tables().items():
        assert np.array_equal(table, kept.tables[name]), name
    strange = replace(refitted.scores, rows=[replace(row, rem=9.0) for row in refitted.scores.rows])
    older = replace(refitted, scored=None)
    for plan, said in ((replace(refitted, scores=strange), ""), (older, "does not hold the placement that was scored")):
        fallback = scored_requests(plan, trace, scheduled=True)
        assert not fallback.held_out and "not evidence" in fallback.note and said in fallback.note
        assert np.array_equal(fallback.deployment.placement.experts_LRS, refitted.placement.experts_LRS)


def test_a_report_of_a_refitted_plan_solves_nothing_and_shows_what_was_scored(made, monkeypatch):
    monkeypatch.setattr("semmoe.solvers.place.solve.solve_placement", lambda *_, **__: pytest.fail("solved again"))
    monkeypatch.setattr("semmoe.solvers.make_plan.solve_placement", lambda *_, **__: pytest.fail("solved again"))
    trace, options = RoutingTrace.open(made / "t"), PlanReportOptions([], 0, 2.0, "", "", None, True)
    run("report", made / "q", made / "t", "-o", made / "solved.md")
    assert "fitted on the training requests alone" in (made / "solved.md").read_text(encoding="utf-8")
    # The plan that was not refitted is the placement that was scored: the same pictures.
    pages = [make_plan_report(Plan.load(made / n), trace, options, Setting(), plan_path="p").details for n in "pq"]
    kept, refitted = pages
    assert (kept.layer, kept.schedule) == (refitted.layer, refitted.schedule) and kept.schedule != "random"
    assert np.array_equal(kept.pairs_EE, refitted.pairs_EE) and np.array_equal(kept.home_of_E, refitted.home_of_E)
    for name in ("before", "after"):
        assert np.array_equal(kept.rows_RR[name], refitted.rows_RR[name])
        assert np.array_equal(kept.load_LR[name], refitted.load_LR[name])


def test_a_plan_without_the_scored_placement_is_still_read(made, tmp_path):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(made / "q", tmp_path / "old")
    tables = load_file(tmp_path / "old" / "tables.safetensors")
    assert {"scored_placement", "scored_expert_load"} <= tables.keys()
    save_file({n: a for n, a in tables.items() if "scored" not in n}, tmp_path / "old" / "tables.safetensors")
    facts = json.loads((tmp_path / "old" / "plan.json").read_text(encoding="utf-8"))
    signatures = {"digest", "tables_sha256"}  # which such a plan does not have either
    kept = {key: value for key, value in facts.items() if key not in signatures}
    (tmp_path / "old" / "plan.json").write_text(json.dumps(kept), encoding="utf-8")
    run("report", tmp_path / "old", made / "t", "-o", tmp_path / "old.md")
    text = (tmp_path / "old.md").read_text(encoding="utf-8")
    assert FITTED in text and "The plan does not hold the placement that was scored" in text


def test_what_if_learns_and_scores_on_different_requests(made):
    trace = RoutingTrace.open(made / "t")
    fit_B = np.arange(60) % 2 == 0
    found = what_if(trace, fit_B, ~fit_B, [2, 4, 5, 32], ranks_per_node=2, dispatch="per-rank", seed=0)
    assert [(row.ranks, row.nodes) for row in found.rows[::3]] == [(2, 1), (4, 2), (32, 16)]
    assert found.to_json()["skipped"] == [{"ranks": 5, "why": "5 ranks do not fill nodes of 2"}]
    rem = {(row.ranks, row.placement): row.rem for row in found.rows}
    assert rem[4, "metis"] < 0.7 * rem[4, "contiguous"] and rem[32, "metis"] == pytest.approx(rem[32, "contiguous"])
    with pytest.raises(InputError, match="other requests"):
        what_if(trace, fit_B, fit_B, [2], ranks_per_node=2, dispatch="per-rank", seed=0)


def test_predictable_tokens_are_told_from_unpredictable_ones(made):
    trace = RoutingTrace.open(made / "t")
    batch = trace.load()
    hosts_LER = Plan.load(made / "p").placement.hosts_LER
    experts_TLK, ids_T = batch.expert_ids_TLK.copy(), batch.token_ids_T.copy()
    half = len(ids_T) // 2
    ids_T[:] = np.arange(len(ids_T)) % 2  # token 0: always the same experts; token 1: any
    experts_TLK[ids_T == 0] = np.stack([np.flatnonzero(hosts_LER[layer, :, 1])[:4] for layer in range(3)])
    sides = [
        replace(batch, token_ids_T=np.where(side, ids_T, -1), expert_ids_TLK=experts_TLK)
        for side in (np.arange(len(ids_T)) < half, np.arange(len(ids_T)) >= half)
    ]
    found = token_predictability(*sides, hosts_LER)
    assert found.ids_U.tolist() == [0, 1] and found.share_U[0] == 1 and found.share_U[1] < 0.7
    assert found.tokens_U.sum() == len(ids_T) - half
    assert len(token_predictability(*sides, hosts_LER, least_tokens=10**6).ids_U) == 0


def test_nothing_to_save_is_no_saving():
    assert saved_share(0.0, 0.0) == 0 and saved_share(2.0, 1.5) == 0.25 and saved_share(1.0, 1.5) == -0.5


def row(placement: str, rem: float, width: float, **more: float) -> ScoreRow:
    values = {"lar": 0.25, "rem": rem, "node": 0.0, "link": rem, "load_imbalance": 1.1}
    values |= {"load_imbalance_median": 1.1, "token_imbalance": 1.0} | more
    return ScoreRow(placement, "random", **values, ci={name: (v - width, v + width) for name, v in values.items()})


def report_of(rows: list[ScoreRow], **more) -> Report:
    facts = {"ranks": 8, "nodes": 1, "dispatch": "per-rank", "layers": [LayerScores(i, i, rows) for i in range(3)]}
    names = {"plan": "", "trace": "", "model": "", "uniform": {}}
    return Report(**{**names, **facts, "rows": rows, "requests": 30, "tokens": 900, **more})


def test_rows_and_bytes_per_dispatch_kind():
    rows = [row(placement, 1.5, 0.0, node=0.5) for placement in ("contiguous", "plan")]
    assert rows_per_token(rows[0], top_k=4, num_ranks=8) == {
        "per-rank": 1.5,
        "per-expert": 3.0,
        "per-node": 0.5,
        "gather": 7.0,
    }
    costs = dispatch_costs(report_of(rows), top_k=4, hidden_size=10, dispatch_bytes=1.0)
    assert [row.dispatch for row in costs.rows] == ["per-rank", "per-expert", "gather"]
    assert costs.rows[0].bytes["plan"] == 1.5 * 10 * 3 * 3


@pytest.mark.parametrize(
    ("dispatch", "rem", "width", "level", "words"),
    [
        ("per-rank", 1.5, 0.02, "watch", "25% less traffic"),
        ("per-rank", 1.95, 0.1, "bad", "No saving is shown"),
        ("per-expert", 1.5, 0.02, "watch", "Placement alone saves no traffic"),
        ("gather", 1.5, 0.02, "bad", "cannot reduce traffic"),
    ],
)
def test_without_a_verdict_the_intervals_speak(dispatch, rem, width, level, words):
    found = decide(report_of([row("plan", rem, width), row("contiguous", 2.0, width)], dispatch=dispatch))
    assert found.level == level and words in found.sentence


def test_the_headline_is_of_what_can_be_deployed():
    rows = [row("plan", 1.5, 0.1), row("contiguous", 2.0, 0.1), row("load", 2.0, 0.1)]
    scheduled = [replace(rows[0], schedule="dp-scorer", rem=1.2), replace(rows[0], schedule="tp-context", rem=0.9)]
    judged = Judgement("insufficient evidence", "watch", "More.", 0.02, (0.0, 0.3), "random", 900, 9_000, "load")
    pays = replace(judged, decision="recommend", saved=0.25, ci=(0.2, 0.3))

    def headline(first: Judgement, rows: list[ScoreRow] = rows, **more) -> Decision:
        return decide(report_of(rows, verdict=Verdict(**vars(first), with_schedule=None, **more), against="load"))

    undecided = headline(judged)
    assert (undecided.level, undecided.saved) == ("watch", 0.02) and undecided.sentence.startswith("Not decided: ")
    assert "about 9,000 held-out tokens" in undecided.why
    found = headline(pays)
    assert found.level == "watch" and "add --hardware" in found.sentence, "bytes alone are no reason to deploy"
    assert "saves 25.0% of the bytes (interval 20.0% to 30.0%) against experts packed by load" in found.sentence
    assert "30 held-out requests" in found.sentence
    better = replace(pays, schedule="dp-scorer", saved=0.4)
    found = headline(replace(judged, decision="not worth it", level="bad"), [*rows, *scheduled], deployable=better)
    assert found.sentence.startswith("Worth deploying with the plug-in or router by bytes: placement with dp-scorer")
    assert [(s.role, s.schedule, s.needs) for s in found.standings] == [
        ("today", "random", "nothing"),
        ("EPLB's way", "random", "a map or checkpoint"),
        ("this plan", "dp-scorer", "the plug-in or router"),
    ]
    assert "tp-context" in found.research and "tp-context" not in found.sentence


def test_markup_in_names_is_shown_not_obeyed(tmp_path):
    hostile = "<script>alert(1)</script> & [bold]"
    picture = Picture(lambda figure, palette: figure.subplots().plot([0, 1]), 1.0, hostile, hostile)
    blocks = [Text(hostile), Grid([hostile], [[hostile]]), picture]
    page = Page(hostile, hostile, "good", hostile, [(hostile, hostile)], [Section(hostile, blocks)], hostile)
    write_page(page, tmp_path / "x.html")
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert "<script" not in text and "&lt;script&gt;" in text


def test_pictures_do_not_depend_on_the_time():
    draw = lambda figure, palette: figure.subplots().plot([0, 1], color=palette.plan)  # noqa: E731
    assert svg(draw, 1.0, key="a", label="x") == svg(draw, 1.0, key="a", label="x")


def test_compare_end_to_end(made):
    run("place", made / "t", "--ranks", 4, "--method", "load", "--no-refit", "-o", made / "l")
    found = json.loads(run("compare", made / "l", made / "p", made / "t", "--expert-bytes", 100, "--json"))
    assert found["format"] == "semmoe-compare" and found["requests"] == 12
    difference = found["differences"][0]
    assert difference["against"] == str(made / "l") and difference["rem"][2] < 0
    moves = found["moves"][0]
    assert moves["bytes"] == 100 * moves["experts"] == 100 * sum(layer["experts"] for layer in moves["layers"])
    assert moves["experts_renamed_per_layer"] <= moves["experts_renamed"] <= moves["experts"] <= moves["slots"] == 96
    table = run("compare", made / "l", made / "p", made / "t")
    assert "better" in table and "renamed" in table


@pytest.mark.parametrize("ending", ["html", "md", "png"])
def test_compare_writes_a_page(made, tmp_path, ending):
    page = tmp_path / f"c.{ending}"
    printed = run("compare", made / "l", made / "p", made / "t", "--expert-bytes", 10**9, "-o", page, "--json")
    found = json.loads(printed)
    if ending == "png":
        assert page.read_bytes().startswith(b"\x89PNG")
        return
    text = page.read_text(encoding="utf-8")
    for row in found["rows"]:
        if row["schedule"] == "random":
            assert f"{row['rem']:.3f}" in text
    moved = found["moves"][0]["experts"]
    assert f"{moved:,} (" in text and f"{moved:,.2f} GB" in text and "Expert copies to move" in text
    assert "<script" not in text


def test_a_page_of_plans_for_different_ranks_does_not_name_a_best(made, tmp_path):
    run("place", made / "t", "--ranks", 8, "--method", "metis", "--no-refit", "-o", tmp_path / "p8")
    run("compare", made / "p", tmp_path / "p8", made / "t", "-o", tmp_path / "c.md")
    text = (tmp_path / "c.md").read_text(encoding="utf-8")
    assert "Plans for 4, 8 ranks side by side" in text and "reaches the fewest" not in text


def test_compare_of_plans_fitted_on_everything(made):
    run("place", made / "t", "--ranks", 4, "--method", "spectral", "-o", made / "s")
    found = json.loads(run("compare", made / "q", made / "s", made / "t", "--json"))
    assert found["differences"] == [] and {r["placement"] for r in found["rows"]} == {str(made / "q"), str(made / "s")}
    run("place", made / "t", "--ranks", 4, "--method", "spectral", "--seed", 5, "-o", made / "s5")
    result = CliRunner().invoke(app, ["compare", str(made / "q"), str(made / "s5"), str(made / "t")])
    assert isinstance(result.exception, InputError) and "nothing is left to compare" in str(result.exception)


def test_titles_of_a_picture_stay_on_it():
    title = (
        "Worth deploying: placement saves 16% of the bytes (interval 14% to 17%) against contiguous experts, WWWW" * 2
    )
    draw = lambda figure, palette: figure.subplots().set_axis_off()  # noqa: E731
    pixels = imread(io.BytesIO(png([(title, draw, 1.0)], title=title, subtitle="x")))
    assert (pixels[:, -12:, :3] == 1).all() and (pixels < 0.5).any()


def test_layers_are_whole_numbers():
    load = LoadFacts(1.5, [1.5] * 4, 0.0, 1, 1.0, share_by_popularity=[0.5, 0.5])
    assert "\u22120.5</text>" not in svg(load_skew(load), 2.4, key="a", label="x")


def test_compare_needs_two_plans(made):
    assert CliRunner().invoke(app, ["compare", str(made / "p"), str(made / "t")]).exit_code == 2
    result = CliRunner().invoke(app, ["compare", str(made / "p"), str(made / "p"), str(made / "t")])
    assert isinstance(result.exception, InputError) and "named twice" in str(result.exception)


def test_plans_of_other_ranks_are_compared_without_moves(made):
    run("place", made / "t", "--ranks", 8, "--method", "metis", "--no-refit", "-o", made / "p8")
    found = json.loads(run("compare", made / "p", made / "p8", made / "t", "--json"))
    assert "4 against 8 ranks" in found["moves"][0]["why_not"] and len(found["differences"]) == 1
