"""README and docs/: links lead somewhere, command lines parse, figures are what their script
draws."""

import json
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from semmoe.main import app
from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
WRITTEN = [name for name in NAMES if name != "docs/cli.md"]  # the other is generated
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.M | re.S)
STARTS = ("-m", "--no-python")  # what comes before the program's name where it is not the first word
LINK = re.compile(r"!?\[[^\]\n]*\]\(([^)\s]+)\)")


def prose(text: str) -> str:
    """The text without code."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


@cache
def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as code hosts make them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found.add(next(s for n in range(99) if (s := f"{slug}-{n}" if n else slug) not in found))
    return found


def semmoe_lines(code: str) -> list[list[str]]:
    """The words after `semmoe` (or `-m semmoe`, `--no-python semmoe`) of every command in a block
    of shell."""
    lexer = shlex.shlex(re.sub(r"\\\n", " ", code).replace("\n", "\n; "), posix=True, punctuation_chars=True)
    lexer.commenters = "#"
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set(";|&"):
            commands.append([])
        else:
            commands[-1].append(word)
    found = []
    for words in commands:
        words = words[: next((i for i, w in enumerate(words) if set(w) <= set("<>")), len(words))]
        before = zip(["-m", *words], words, strict=False)
        start = next(
            (i for i, (b, w) in enumerate(before) if w.endswith("/bin/semmoe") or (b in STARTS and w == "semmoe")), None
        )
        if start is not None:
            found.append(words[start + 1 :])
    return found


def commands_of(text: str) -> list[list[str]]:
    return [line for kind, code in FENCE.findall(text) if kind in ("", "bash", "sh") for line in semmoe_lines(code)]


@cache
def program() -> Any:
    return typer.main.get_command(app)


def parse(words: list[str]) -> None:
    """Parse a command line without running it; raises what the program would report."""
    name, *rest = words
    command = program().commands[name]
    command.make_context(name, list(rest))


def test_shell_is_split_into_command_lines():
    code = (
        "VAR=1 torchrun -x 2 \\\n  -m semmoe run d --plan p  # why\ntorchrun --no-python semmoe show q\n"
        "a && .venv/bin/semmoe demo; semmoe show 'a b' > f\ncat semmoe\n"
    )
    assert semmoe_lines(code) == [["run", "d", "--plan", "p"], ["show", "q"], ["demo"], ["show", "a b"]]


def test_anchors_are_those_of_code_hosts(tmp_path):
    page = tmp_path / "p.md"
    page.write_text("# A B-c (d)\n## 1. It's\n## 1. It's\n```text\n# no\n```\n", encoding="utf-8")
    assert anchors(page) == {"a-b-c-d", "1-its", "1-its-1"}


@pytest.mark.parametrize("name", NAMES)
def test_links_and_anchors_lead_somewhere(name):
    page = ROOT / name
    for target in LINK.findall(prose(page.read_text(encoding="utf-8"))):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.is_file(), f"{name}: {target}"
        assert not anchor or anchor in anchors(there), f"{name}: {target} is none of {sorted(anchors(there))}"


@pytest.mark.parametrize("name", WRITTEN)
def test_command_lines_parse(name):
    for words in commands_of((ROOT / name).read_text(encoding="utf-8")):
        try:
            parse(words)
        except Exception as error:  # whatever the parser raises, the reader needs the line
            pytest.fail(f"{name}: semmoe {shlex.join(words)}: {getattr(error, 'message', error)!r}")


def test_the_parser_refuses_what_does_not_exist():
    for words in (["place", "t", "--ranks", "4"], ["place", "t", "-o", "p", "--rank", "4"], ["magic"]):
        with pytest.raises(Exception, match=r"."):
            parse(words)


def test_pages_that_teach_commands_have_some():
    for name in ("README.md", "docs/quickstart.md", "docs/tutorial.md", "docs/multi-node.md", "docs/engines.md"):
        assert commands_of((ROOT / name).read_text(encoding="utf-8")), name


@pytest.mark.parametrize("name", WRITTEN)
def test_options_in_the_text_exist(name):
    """`semmoe COMMAND ... --option` within a line: the option is one of that command's."""
    text = FENCE.sub("", (ROOT / name).read_text(encoding="utf-8"))
    for code in re.findall(r"`([^`]+)`", text):
        for line in re.split(r"[;|]|&&", code):
            found = re.match(r"\s*semmoe (\w+)(.*)", line, re.S)
            if found is None:
                continue
            command = program().commands.get(found[1])
            assert command is not None, f"{name}: {line}"
            known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
            for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", found[2]):
                assert option in known | {"--help"}, f"{name}: {line}"


def test_every_command_and_option_is_in_the_reference():
    sections = re.split(r"^## semmoe ", (DOCS / "cli.md").read_text(encoding="utf-8"), flags=re.M)
    for name, command in program().commands.items():
        section = next(s for s in sections if s.startswith(f"{name}\n"))
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert any(re.search(rf"{re.escape(o)}\b", section) for o in parameter.opts), f"{name} {parameter.opts}"


def test_every_page_is_reached_from_the_index():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        assert page.name == "index.md" or f"({page.name}" in index, page.name


def test_the_site_lists_every_page():
    site = yaml.safe_load((DOCS / "site" / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = [page for entry in site["nav"] for page in entry.values()]
    assert sorted(pages) == sorted(page.name for page in DOCS.glob("*.md"))


def test_the_site_builds(tmp_path):
    """Strictly: a page, link or anchor that is not there is an error."""
    pytest.importorskip("material", reason="the extra docs is not installed")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(DOCS / "site" / "mkdocs.yml")]
    built = subprocess.run([*words, "-d", str(tmp_path)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr


def test_diagrams_are_what_the_script_draws():
    """Text and scores must agree; the bytes depend on the version of matplotlib."""
    figures = runpy.run_path(str(DOCS / "figures.py"))
    for name in figures["DIAGRAMS"]:
        committed = (DOCS / "images" / f"{name}.svg").read_text(encoding="utf-8")
        drawn = figures["diagram_svg"](name)
        texts = [re.findall(r"<text[^>]*>(.*?)</text>", svg, re.S) for svg in (committed, drawn)]
        assert len(texts[0]) > 10 and texts[0] == texts[1], f"run: python docs/figures.py ({name})"
    assert figures["token_scores"](figures["CONTIGUOUS"], 1) == (0.0, 3, 1)
    assert figures["token_scores"](figures["PLACED"], 0) == (0.75, 1, 0)


def test_the_figure_of_co_activation_is_drawn_from_a_trace_and_a_plan(tmp_path):
    write_synthetic(tmp_path / "trace", SyntheticWorld(num_requests=60))
    words = ["place", str(tmp_path / "trace"), "--ranks", "4", "--method", "metis", "-o", str(tmp_path / "plan")]
    assert CliRunner().invoke(app, words).exit_code == 0
    svg = runpy.run_path(str(DOCS / "figures.py"))["co_activation_svg"](tmp_path)
    committed = (DOCS / "images" / "co-activation.svg").read_text(encoding="utf-8")
    for text in ("before: checkpoint order", "after: grouped by rank", "rank 3", "times as often as by chance"):
        assert text in svg and text in committed


def test_figures_have_a_ground_of_their_own():
    """On a dark page an image without a ground shows dark text on dark."""
    for path in (DOCS / "images").glob("*.svg"):
        assert 'id="patch_1"' in (svg := path.read_text(encoding="utf-8")) and "fill: #ffffff" in svg[:2500], path.name


def keys_of(value: Any) -> set[str]:
    """Names of all objects within a JSON value; lists are looked into at their first values."""
    if isinstance(value, dict):
        return set(value).union(*map(keys_of, value.values()))
    return set().union(*map(keys_of, value[:3])) if isinstance(value, list) else set()


def test_keys_of_results_are_documented(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_synthetic("t", SyntheticWorld(num_requests=60, tokens_per_request=40, num_layers=2))
    place = ["place", "t", "--ranks", "4", "--method", "metis", "--no-refit"]
    lines = [
        [*place, "--certify", "-o", "p"],
        [*place, "--seed", "1", "-o", "q"],
        ["report", "t"],
        [
            "report",
            "p",
            "t",
            "--what-if",
            "2,64",
            "--topology-bandwidth",
            "9",
            "--hidden-size",
            "8",
            "--tokenizer",
            "demo",
        ],
        ["compare", "p", "q", "t", "--expert-bytes", "9"],
        ["export", "p", "--to", "vllm", "--format", "pr41141", "-o", "map.jsonl"],
    ]
    names = set()
    for words in lines:
        result = CliRunner().invoke(app, [*words, "--json"])
        assert result.exit_code == 0, result.output
        names |= keys_of(json.loads(result.stdout))
    for path in ("t/trace.json", "p/plan.json", "map.jsonl.semmoe.json"):
        names |= keys_of(json.loads(Path(path).read_text(encoding="utf-8")))
    page = (DOCS / "formats.md").read_text(encoding="utf-8")
    free = {
        name for name in names if name.startswith("plan, ") or name == "planted_groups"
    }  # columns and notes by name
    assert {name for name in names - free if not re.search(rf"[`\"]{re.escape(name)}[`\"]", page)} == set()
