"""Names that a library or a terminal would read as commands go from a server's log through every
command: each is shown as it is, and nothing of it takes effect."""

import json
import re
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest
from engine_samples import routing, sglang_record, write_lines
from matplotlib.image import imread
from typer.testing import CliRunner

from semmoe.main import app, main
from semmoe.pages.explorer import SCRIPT
from semmoe.pages.figures.style import svg
from semmoe.pages.page import Commands, Grid, Page, Section, Text, write_page
from semmoe.profiles.errors import visible
from semmoe.solvers.html import facts_html
from semmoe.terminal.text import json_line, quoted, shortened

DOMAINS = (
    r"a$\frac$ win $9 of $10",
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "\x1b[31mred\x1b]0;title\x07\x9b2J",
    "evil\u202egnp.exe\u2066",
    "[bold red]x[/bold red] [/] :warning:",
    "a|b`c`*d*_e_[f](https://g.h)",
    "two\nlines\r# heading\u2028",
    "font-family:x #010101 &lt;",
    "\u4e2d\u6587 \u05d0\u05d1 \U0001f468\u200d\U0001f469",
    "long " * 60,
)
PLANS = ("p$\\frac$<b>[red]\x1b[2J\u202e", "q\n```\n<script>$x$`|_*")
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class Tags(HTMLParser):
    """Names of tags and of their attributes, and all text."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def harmless_html(html: str) -> Tags:
    ours = html.replace(f"<script>{SCRIPT}</script>", "")
    ours = re.sub(r'<script type="application/json">[^<]*</script>|<a href="#[a-z-]+">', "", ours)
    tags = Tags(ours)
    assert not tags.tags & {"script", "img", "b", "iframe", "a"}
    assert not [name for name in tags.attributes if name.startswith("on")]
    assert not CONTROL.search(html)
    return tags


def run(*words: object) -> str:
    """Standard output of a command that must succeed; it and stderr must be harmless."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a font that lacks a glyph is none of the user's concern
        result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output + str(result.exception)
    assert not CONTROL.search(result.stdout + result.stderr)
    return result.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("names")
    records = [
        sglang_record(
            routing(12, seed=n, num_layers=2, dense=()), name=f"r{n}\x1b[2J", domain=DOMAINS[n % len(DOMAINS)]
        )
        for n in range(6 * len(DOMAINS))
    ]
    log = write_lines(root / "log$x$.jsonl", records)
    run("trace", "--from", "sglang", log, "-o", root / "t")
    for name, method in zip(PLANS, ("metis", "load"), strict=True):
        run("place", root / "t", "--ranks", 4, "--method", method, "--no-refit", "-o", root / name)
    return root


@pytest.mark.parametrize("ending", [".html", ".md", ".png"])
def test_pages_show_names_as_they_are(made, ending):
    first, second = (made / name for name in PLANS)
    for name, words in (
        ("plan", ["report", first, made / "t", "--what-if", "2,4"]),
        ("health", ["report", made / "t"]),
        ("compare", ["compare", first, second, made / "t"]),
    ):
        page = made / (name + ending)
        run(*words, "-o", page)
        if ending == ".png":
            assert imread(page).std() > 0
            continue
        text = page.read_text(encoding="utf-8")
        if ending == ".md":
            assert not CONTROL.search(text)
            assert not re.search(r"(?<!\\)[<$]|(?<!\\)`(?!``sh$|``$|$)", re.sub("(?ms)^(`{3,})sh$.*?^\\1$", "", text))
            continue
        shown = harmless_html(text).text
        for domain in DOMAINS[:-1] if name == "health" else ():  # a plan's page has those that it held out
            assert visible(domain) in shown, domain


def test_screens_and_json(made):
    plan = made / PLANS[0]
    for words in (["show", made / "t"], ["show", plan], ["report", made / "t"], ["report", plan, made / "t"]):
        run(*words)
        json.loads(run(*words, "--json"), parse_constant=pytest.fail)
    found = json.loads(run("report", plan, made / "t", "--json"))
    assert {row["domain"] for row in found["domains"]} <= set(DOMAINS)
    assert visible(PLANS[0]) in run("compare", plan, made / PLANS[1], made / "t").replace("\n", "")


def test_refusals_are_one_harmless_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["semmoe", "show", "no\nsuch\x1b[2J\u202e"])
    with pytest.raises(SystemExit):
        main()
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and not CONTROL.search(err) and r"no\nsuch\x1b[2J\u202e" in err


def test_a_grid_keeps_names_whole_and_a_fence_closed(tmp_path):
    grid = Grid(["a", "b"], [["x [1] $", "0.1 [0.0, 0.2]"]])
    page = Page(
        "1. t", "- v", "good", "b", [], [Section("# s", [grid, Text("1. t"), Commands("c", ["a ```"], [])])], "f"
    )
    for ending in ("html", "md"):
        write_page(page, tmp_path / f"p.{ending}")
    html, md = ((tmp_path / f"p.{ending}").read_text() for ending in ("html", "md"))
    assert '<td class="name">x [1] $</td>' in html and "0.1 <small>[0.0, 0.2]</small>" in html
    assert "````sh\na ```\n````" in md and "\n1\\. t\n" in md and "## \\# s" in md


def test_names_in_pictures():
    def draw(figure, palette):
        figure.text(0, 0, "font-family:x #010101 <i> $\\frac$", color=palette.ink)

    picture = svg(draw, 1, key="k", label='"><script>')
    assert "font-family:x #010101 &lt;i&gt; $\\frac$" in picture and "var(--ink)" in picture
    assert Tags(picture).tags == {"svg", "g", "path", "defs", "style", "text"}


def test_one_function_per_target():
    assert json_line({"a": [float("inf"), float("nan"), 1.5], "b": "\u202e\x9b\x7f\ud800"}) == (
        r'{"a": [null, null, 1.5], "b": "\u202e\u009b\u007f\ud800"}'
    )
    assert quoted("a b") == "'a b'" and quoted("it's\n\\") == r"$'it\'s\n\\'"
    assert shortened("x" * 100, 11) == "xxxx...xxxx"
    assert visible("caf\xe9 \t\udcff\uffff") == "caf\xe9 " + r"\t\udcff\uffff"
    assert facts_html("<b>\u202e", {"<i>": "\x1b"}).count("<b>") == 1
