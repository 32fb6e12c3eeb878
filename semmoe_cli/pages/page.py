"""A report as one file: sections of text, tables, pictures and commands, rendered as HTML, Markdown
or PNG.

The HTML holds everything it shows: inline SVG, no script, font or image from elsewhere; light and
dark by the reader's setting, narrow drawings on a phone, and it prints. A map of layers has a few
lines of script of its own (pages/explorer.py) and is complete without them. Matplotlib is imported
where a picture is drawn.
"""

import html
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from semmoe.pages.explorer import SCRIPT, LayerMap, layer_map_html
from semmoe.pages.figures.style import DARK, LIGHT, NARROW, Draw, css_variables, png, svg
from semmoe.pages.stylesheet import STYLE
from semmoe.profiles.errors import visible
from semmoe.terminal.text import visible_lines

ENDINGS = (".html", ".md", ".png")
NUMBER_LETTERS = 9  # of a tile: more is words
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
    """A drawing, its height in inches, what it says in words, and a caption. `stacked`: panels that
    stand below each other where the page is narrow."""

    draw: Draw
    height: float
    label: str
    caption: str = ""
    stacked: int = 1

    @property
    def narrow_height(self) -> float:
        """Height in inches on a phone."""
        return self.height * (0.9 * self.stacked if self.stacked > 1 else 1)


@dataclass(frozen=True)
class Commands:
    """Lines to type, under a name."""

    name: str
    lines: list[str]
    notes: list[str]


Block = Text | Grid | Picture | Commands | LayerMap


@dataclass(frozen=True)
class Section:
    """A heading that states the finding, and what shows it. `part`: of which part of a page it is
    the beginning."""

    title: str
    blocks: list[Block]
    part: str = ""


@dataclass(frozen=True)
class Tile:
    """One number of the first screen: its name, the number, and what it is beside."""

    name: str
    value: str
    note: str


@dataclass(frozen=True)
class Page:
    """A whole report. `verdict`: a short sentence, and `lead` the whole of it. `level`: "good",
    "watch" or "bad"; the `badge` says it in words. `facts`: name and value. `tiles`: rows of
    numbers under a name, and `hero` the picture of the first screen; with them the facts stand at
    the end."""

    title: str
    verdict: str
    level: str
    badge: str
    facts: list[tuple[str, str]]
    sections: list[Section]
    footer: str
    lead: str = ""
    tiles: tuple[tuple[str, list[Tile]], ...] = ()
    hero: Picture | None = None

    @property
    def pictures(self) -> list[tuple[str, Picture | LayerMap]]:
        """Everything that is drawn, under the title of its section."""
        found: list[tuple[str, Picture | LayerMap]] = [("", self.hero)] if self.hero else []
        return found + [(s.title, b) for s in self.sections for b in s.blocks if isinstance(b, Picture | LayerMap)]


def write_page(page: Page, path: Path) -> None:
    """Write the page in the format of the file's ending. Raises InputError for another ending,
    or where it cannot be written."""
    from semmoe.profiles.files import write_file

    check_page_target(path)
    if path.suffix == ".md":
        for number, (_, picture) in enumerate(page.pictures, 1):
            write_file(_beside(path, number), png([("", picture.draw, picture.height)], title="", subtitle=""))
        write_file(path, _markdown(page, path))
        return
    write_file(path, {".html": _html, ".png": _png}[path.suffix](page))


def _beside(path: Path, number: int) -> Path:
    """File of a picture of a Markdown page."""
    return path.with_name(f"{path.stem}-{number}.png")


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


def _html(page: Page) -> bytes:
    style = STYLE % {"light": css_variables(LIGHT), "dark": css_variables(DARK)}
    facts = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in page.facts)
    facts = f"<dl>{facts}</dl>" if facts else ""
    body = "\n".join(_section(section, i) for i, section in enumerate(page.sections))
    first = ""
    if page.tiles:
        about = '<p class="part" id="about">About</p>' if facts else ""
        body, facts = f"{body}\n{about}<section>{facts}</section>", ""
        first = "".join(_tiles(name, tiles) for name, tiles in page.tiles)
    lead = f'<p class="lead">{_text(page.lead)}</p>' if page.lead else ""
    hero = _block(page.hero, "hero") if page.hero else ""
    parts = [section.part for section in page.sections if section.part]
    links = "".join(f'<a href="#{_anchor(part)}">{_text(part)}</a>' for part in parts)
    nav = f"<nav>{links}</nav>" if parts else ""
    mapped = any(isinstance(picture, LayerMap) for _, picture in page.pictures)
    script = f"<script>{SCRIPT}</script>\n" if mapped else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(page.title)}</title>\n<style>{style}</style></head>\n<body><main>\n"
        f'<header><p class="kicker">{_text(page.title)}</p><h1>{_text(page.verdict)}</h1>\n'
        f'<span class="level {page.level}">{_text(page.badge)}</span>{lead}{first}{hero}{facts}{nav}</header>\n'
        f"{body}\n<footer>{_text(page.footer)}</footer>\n</main>{script}</body></html>\n"
    ).encode()


def _tiles(name: str, tiles: list[Tile]) -> str:
    """A row of numbers; words are set smaller than digits."""
    cells = "".join(
        f'<div class="tile"><span>{_text(t.name)}</span><strong{"" if len(t.value) <= NUMBER_LETTERS else " class=words"}>'
        f"{_text(t.value)}</strong><small>{_text(t.note)}</small></div>"
        for t in tiles
    )
    heading = f"<h3>{_text(name)}</h3>" if name else ""
    return f'{heading}<div class="tiles">{cells}</div>'


def _anchor(part: str) -> str:
    return re.sub(r"[^a-z]+", "-", part.lower()).strip("-")


def _section(section: Section, number: int) -> str:
    blocks = "\n".join(_block(block, f"{number}-{i}") for i, block in enumerate(section.blocks))
    part = f'<p class="part" id="{_anchor(section.part)}">{_text(section.part)}</p>\n' if section.part else ""
    return f"{part}<section><h2>{_text(section.title)}</h2>\n{blocks}</section>"


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
            narrow = svg(draw, block.narrow_height, key=f"{key}-narrow", label=label, width=NARROW)
            return f"<figure>{svg(draw, height, key=key, label=label)}{narrow}{below}</figure>"
        case LayerMap():
            return layer_map_html(block, _text)
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


def _markdown(page: Page, path: Path) -> bytes:
    number = 0

    def embedded(picture: Picture | LayerMap) -> list[str]:
        nonlocal number
        number += 1
        return [
            f"![{as_markdown(picture.label)}]({quote(_beside(path, number).name)})",
            "",
            as_markdown(picture.caption),
        ]

    lines = [f"# {as_markdown(page.title)}", "", f"**{as_markdown(page.verdict)}**", ""]
    lines += [as_markdown(page.lead), ""] if page.lead else []
    for name, tiles in page.tiles:
        lines += [f"### {as_markdown(name)}", ""] if name else []
        rows = [[as_markdown(text) for text in (tile.name, tile.value, tile.note)] for tile in tiles]
        lines += ["| | | |", "| --- | --- | --- |", *("| " + " | ".join(row) + " |" for row in rows), ""]
    lines += embedded(page.hero) if page.hero else []
    lines += [f"- {as_markdown(name)}: {as_markdown(value)}" for name, value in page.facts]
    for section in page.sections:
        lines += ["", f"## {as_markdown(section.title)}", ""]
        for block in section.blocks:
            shown = embedded(block) if isinstance(block, Picture | LayerMap) else _markdown_block(block)
            lines += [*shown, ""]
    text = "\n".join([*lines, "", "---", as_markdown(page.footer), ""])
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.encode()


def _markdown_block(block: Text | Grid | Commands) -> list[str]:
    match block:
        case Text(text):
            return [as_markdown(text)]
        case Grid(headings, rows, marked, words, names_at):
            rule = ["---" if words or j in names_at else "---:" for j in range(len(headings))]
            texts = [[as_markdown(c) if words or j in names_at else c for j, c in enumerate(row)] for row in rows]
            cells = [[f"**{c}**" if (i, j) in marked else c for j, c in enumerate(row)] for i, row in enumerate(texts)]
            heads = [as_markdown(heading) for heading in headings]
            return ["| " + " | ".join(row) + " |" for row in [heads, rule, *cells]]
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
    pictures = [(title, picture.draw, picture.height) for title, picture in page.pictures]
    return png(pictures, title=page.lead or page.verdict, subtitle=page.title)


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
