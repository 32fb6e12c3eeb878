"""A report as one file: sections of text, tables, pictures and commands, rendered as HTML, Markdown
or PNG.

The HTML holds everything it shows: inline SVG, no script, no font and no image from elsewhere;
light and dark by the reader's setting, and it prints. Matplotlib is imported where a picture is
drawn.
"""

import html
import re
from dataclasses import dataclass
from pathlib import Path

from semmoe.pages.figures.style import DARK, LIGHT, Draw, css_variables, png, svg
from semmoe.profiles.errors import visible
from semmoe.terminal.text import visible_lines

ENDINGS = (".html", ".md", ".png")
MOST_INTERVALS = 4  # columns; a wider table sets its intervals below their values


@dataclass(frozen=True)
class Text:
    """A paragraph. `hint`: smaller and in a muted colour."""

    text: str
    hint: bool = False


@dataclass(frozen=True)
class Grid:
    """A table of numbers, with names in the columns `names_at`, or of `words` only. `marked`:
    cells (row, column) in bold with a dot."""

    headings: list[str]
    rows: list[list[str]]
    marked: frozenset[tuple[int, int]] = frozenset()
    words: bool = False
    names_at: frozenset[int] = frozenset((0,))


@dataclass(frozen=True)
class Picture:
    """A drawing, its height in inches, what it says in words, and a caption."""

    draw: Draw
    height: float
    label: str
    caption: str = ""


@dataclass(frozen=True)
class Commands:
    """Lines to type, under a name."""

    name: str
    lines: list[str]
    notes: list[str]


Block = Text | Grid | Picture | Commands


@dataclass(frozen=True)
class Section:
    """A heading that states the finding, and what shows it."""

    title: str
    blocks: list[Block]


@dataclass(frozen=True)
class Page:
    """A whole report. `verdict`: one sentence. `level`: "good", "watch" or "bad"; the `badge`
    says it in words. `facts`: name and value."""

    title: str
    verdict: str
    level: str
    badge: str
    facts: list[tuple[str, str]]
    sections: list[Section]
    footer: str


def write_page(page: Page, path: Path) -> None:
    """Write the page in the format of the file's ending. Raises InputError for another ending,
    or where it cannot be written."""
    from semmoe.profiles.files import write_file

    check_page_target(path)
    write_file(path, {".html": _html, ".md": _markdown, ".png": _png}[path.suffix](page))


def check_page_target(path: Path) -> None:
    """Raise InputError where a page cannot go there, before anything is computed."""
    from semmoe.profiles.errors import InputError
    from semmoe.profiles.files import check_file_target

    if path.suffix not in ENDINGS:
        raise InputError(f"-o {path}: a report ends in {', '.join(ENDINGS)}")
    if path.is_dir():
        raise InputError(f"-o {path} is a directory: name a file")
    check_file_target(path)
    if not path.absolute().parent.is_dir():
        raise InputError(f"cannot write {path}: the directory {path.absolute().parent} does not exist")


STYLE = """
:root { %(light)s --soft: #f4f6f8; --good: #00795a; --watch: #9a5b00; --bad: #b3261e; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { %(dark)s --soft: #1d2127; --good: #3cc79a; --watch: #e6b450; --bad: #ff8a80; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", "Noto Sans", "Liberation Sans", Arial, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
header { border-bottom: 1px solid var(--grid); padding-bottom: 1.5rem; }
.kicker { margin: 0 0 .4rem; color: var(--muted); font-size: .9rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; letter-spacing: -.01em; text-wrap: balance; overflow-wrap: anywhere; }
.level { display: inline-block; font-size: .8rem; font-weight: 600; padding: .12rem .6rem; border: 1px solid currentColor;
  border-radius: 1rem; margin-bottom: .8rem; }
.good { color: var(--good); } .watch { color: var(--watch); } .bad { color: var(--bad); }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(11.5rem, 1fr)); gap: .8rem 1.5rem; margin: 0; }
dt { color: var(--muted); font-size: .8rem; }
dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; unicode-bidi: isolate; }
section { padding-top: 2.2rem; break-inside: avoid-page; }
h2 { font-size: 1.2rem; line-height: 1.35; margin: 0 0 .6rem; text-wrap: balance; }
h3 { font-size: .95rem; margin: 1.4rem 0 .35rem; }
p { margin: .5rem 0; max-width: 46rem; } .hint, figcaption { color: var(--muted); font-size: .875rem; }
figure { margin: 1rem 0 .5rem; overflow-x: auto; } figcaption { max-width: 46rem; }
svg.plot { display: block; width: 100%%; min-width: 36rem; height: auto; }
svg.plot text { font-family: inherit; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; margin: .8rem 0; min-width: 60%%; }
th { text-align: right; font-weight: 600; color: var(--muted); font-size: .8rem; border-bottom: 1px solid var(--muted);
  vertical-align: bottom; }
td { text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap; unicode-bidi: isolate; }
td.name { white-space: normal; overflow-wrap: anywhere; min-width: 6rem; max-width: 24rem; }
td small { color: var(--muted); font-size: .78rem; }
th, td { padding: .34rem .7rem .34rem 0; } td:last-child, th:last-child { padding-right: 0; }
th.name, td.name, .words th, .words td { text-align: left; }
td:not(.name) + .name, th:not(.name) + .name { padding-left: 1.6rem; }
.stacked td small { display: block; line-height: 1.2; } .stacked td { vertical-align: top; }
.words td { white-space: normal; vertical-align: top; } .words td:first-child { white-space: nowrap; }
td.best { font-weight: 650; } td.best::before { content: "\\2022\\00a0"; color: var(--plan); }
pre { background: var(--soft); border: 1px solid var(--grid); border-radius: 6px; padding: .7rem .9rem; overflow-x: auto;
  font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--grid); color: var(--muted); font-size: .85rem; }
@media (max-width: 56rem) { td small { display: block; line-height: 1.2; } td { vertical-align: top; } }
@media print { :root { %(light)s --soft: #f4f6f8; } body { font-size: 11pt; } main { max-width: none; padding: 0; }
  figure, table, pre { break-inside: avoid; } h2, h3 { break-after: avoid; } }
"""


def _html(page: Page) -> bytes:
    style = STYLE % {"light": css_variables(LIGHT), "dark": css_variables(DARK)}
    facts = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in page.facts)
    body = "\n".join(_section(section, i) for i, section in enumerate(page.sections))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(page.title)}</title>\n<style>{style}</style></head>\n<body><main>\n"
        f'<header><p class="kicker">{_text(page.title)}</p><h1>{_text(page.verdict)}</h1>\n'
        f'<span class="level {page.level}">{_text(page.badge)}</span><dl>{facts}</dl></header>\n'
        f"{body}\n<footer>{_text(page.footer)}</footer>\n</main></body></html>\n"
    ).encode()


def _section(section: Section, number: int) -> str:
    blocks = "\n".join(_block(block, f"{number}-{i}") for i, block in enumerate(section.blocks))
    return f"<section><h2>{_text(section.title)}</h2>\n{blocks}</section>"


def _block(block: Block, key: str) -> str:
    match block:
        case Text(text, hint):
            return f'<p class="hint">{_text(text)}</p>' if hint else f"<p>{_text(text)}</p>"
        case Grid(headings, rows, marked, words, names_at):
            head = "".join(f"<th{_class(j in names_at, False)}>{_text(h)}</th>" for j, h in enumerate(headings))
            cells = [
                "".join(
                    f"<td{_class(j in names_at, (i, j) in marked)}>{_text(cell) if words or j in names_at else _number(cell)}</td>"
                    for j, cell in enumerate(row)
                )
                for i, row in enumerate(rows)
            ]
            lines = "\n".join(f"<tr>{c}</tr>" for c in cells)
            wide = (
                sum(any(" [" in row[j] for row in rows) for j in range(len(headings)) if j not in names_at)
                > MOST_INTERVALS
            )
            kind = "words" if words else "stacked" if wide else "plain"
            return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>\n{lines}\n</tbody></table></div>'
        case Picture(draw, height, label, caption):
            below = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
            return f"<figure>{svg(draw, height, key=key, label=label)}{below}</figure>"
        case Commands(name, lines, notes):
            said = "".join(map(_command_note, notes))
            return f"<h3>{_text(name)}</h3><pre>{chr(10).join(map(_text, lines))}</pre>{said}"


def _command_note(note: str) -> str:
    """A note under commands; the flags that it ends in are set as code."""
    words, colon, flags = note.partition(": --")
    if not colon:
        return f'<p class="hint">{_text(note)}</p>'
    return f'<p class="hint">{_text(words)}:</p><pre>--{_text(flags)}</pre>'


def _text(text: str) -> str:
    """Text as HTML, between tags and in attributes; lines stay lines."""
    return html.escape(visible_lines(text))


def _number(cell: str) -> str:
    """A cell whose interval, in brackets at its end, is set small."""
    value, bracket, interval = cell.partition(" [")
    return f"{_text(value)} <small>[{_text(interval)}</small>" if bracket else _text(cell)


def _class(name: bool, best: bool) -> str:
    kinds = [word for word, true in (("name", name), ("best", best)) if true]
    return f' class="{" ".join(kinds)}"' if kinds else ""


def _markdown(page: Page) -> bytes:
    lines = [f"# {as_markdown(page.title)}", "", f"**{as_markdown(page.verdict)}**", ""]
    lines += [f"- {as_markdown(name)}: {as_markdown(value)}" for name, value in page.facts]
    for section in page.sections:
        lines += ["", f"## {as_markdown(section.title)}", ""]
        for block in section.blocks:
            lines += [*_markdown_block(block), ""]
    text = "\n".join([*lines, "", "---", as_markdown(page.footer), ""])
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.encode()


def _markdown_block(block: Block) -> list[str]:
    match block:
        case Text(text):
            return [as_markdown(text)]
        case Grid(headings, rows, marked, words, names_at):
            rule = ["---" if words or j in names_at else "---:" for j in range(len(headings))]
            texts = [[as_markdown(c) if words or j in names_at else c for j, c in enumerate(row)] for row in rows]
            cells = [[f"**{c}**" if (i, j) in marked else c for j, c in enumerate(row)] for i, row in enumerate(texts)]
            heads = [as_markdown(heading) for heading in headings]
            return ["| " + " | ".join(row) + " |" for row in [heads, rule, *cells]]
        case Picture(_, _, label, caption):
            return [f"*{as_markdown(label)}.* {as_markdown(caption)}".strip()]
        case Commands(name, lines, notes):
            return [f"### {as_markdown(name)}", "", *_fence(lines), *(line for note in notes for line in _noted(note))]


def as_markdown(text: str) -> str:
    """Text as Markdown that shows it as it is: no emphasis, link, formula, HTML, table or list."""
    text = re.sub(r"[\\`*_\[\]<>|~$&]", r"\\\g<0>", visible(text))
    text = re.sub(
        r"(?<=http)(?=://)|(?<=https)(?=://)|(?<=ftp)(?=://)|(?<=www)(?=\.)", r"\\", text, flags=re.IGNORECASE
    )
    return re.sub(r"^(\s*(?:\d+(?=[.)](?:\s|$))|(?=[-+=#:])))", r"\1\\", text)


def _fence(lines: list[str]) -> list[str]:
    """Lines of a shell in a fence that none of them closes."""
    shown = [visible_lines(line) for line in lines]
    longest = max((len(run) for line in shown for run in re.findall("`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}sh", *shown, fence, ""]


def _noted(note: str) -> list[str]:
    """A note under commands; the flags that it ends in are set as code."""
    words, colon, flags = note.partition(": --")
    return [f"{as_markdown(words)}:", "", *_fence([f"--{flags}"])] if colon else [as_markdown(note), ""]


def _png(page: Page) -> bytes:
    pictures = [(s.title, b.draw, b.height) for s in page.sections for b in s.blocks if isinstance(b, Picture)]
    return png(pictures, title=page.verdict, subtitle=page.title)


def print_section(section: Section) -> None:
    """A section of a page in the terminal: its title, texts and tables, without pictures."""
    from semmoe.terminal.tables import new_table, wide_console
    from semmoe.terminal.text import add_row

    console = wide_console()
    console.print(f"\n{visible(section.title)}", style="bold")
    for block in section.blocks:
        if isinstance(block, Text):
            console.print(visible(block.text), style="dim")
        elif isinstance(block, Grid):
            table = new_table()
            for number, heading in enumerate(block.headings):
                table.add_column(
                    visible(heading), justify="left" if number in block.names_at else "right", overflow="fold"
                )
            for row in block.rows:
                add_row(table, *row)
            console.print(table)
