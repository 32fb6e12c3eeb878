"""Text of users (names of domains and plans, paths, notes) on its way out: one function per target.

What would move the cursor, turn the direction of letters or break a line is written as an escape,
as Python writes it; everything else stays. Pages add their own escapes to it (pages/page.py).
"""

import json
import math
import re
import shlex
from typing import TYPE_CHECKING, Any
from unicodedata import category

if TYPE_CHECKING:
    from rich.table import Table

UNSEEN = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))  # control, format, half a character, ends of line and paragraph
JOINERS = "\u200c\u200d"  # format characters that words and emoji are made with
MIDDLE = "..."


def visible(text: str) -> str:
    """The text on one line, its control characters and direction marks as escapes."""
    return text if text.isascii() and text.isprintable() else "".join(map(_shown, text))


def visible_lines(text: str) -> str:
    """The same for text of several lines, which stay."""
    return "\n".join(map(visible, text.split("\n")))


def shortened(text: str, letters: int) -> str:
    """Visible text of at most that many letters: a long one loses its middle."""
    text = visible(text)
    if len(text) <= letters:
        return text
    end = (letters - len(MIDDLE)) // 2
    return text[: letters - len(MIDDLE) - end] + MIDDLE + text[len(text) - end :]


def quoted(word: str) -> str:
    """A word of a shell command, visible: bash reads escapes between $' and '."""
    shown = visible(word)
    if shown == word:
        return shlex.quote(word)
    parts = (visible(c) if visible(c) != c else c.replace("\\", "\\\\").replace("'", "\\'") for c in word)
    return f"$'{''.join(parts)}'"


def json_line(value: Any, *, ascii_only: bool = False) -> str:
    """One line of JSON, valid for every reader: numbers without a value are null, and unseen
    characters are escapes."""
    text = json.dumps(_finite(value), ensure_ascii=ascii_only, allow_nan=False)
    return text if text.isprintable() else "".join(c if _is_seen(c) else json.dumps(c)[1:-1] for c in text)


def add_row(table: "Table", *cells: Any, style: str | None = None) -> None:
    """A row of a table for the terminal: text is taken as it is, never as markup. A cell that is
    rich.text.Text already keeps its colours."""
    from rich.text import Text

    table.add_row(*(Text(visible(cell)) if isinstance(cell, str) else cell for cell in cells), style=style)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


def _is_seen(character: str) -> bool:
    # The last two places of every plane, and 32 more, are no characters: XML takes none of them.
    number = ord(character)
    if number & 0xFFFE == 0xFFFE or 0xFDD0 <= number <= 0xFDEF or character == "\x7f":
        return False
    return character in JOINERS or category(character) not in UNSEEN


def _shown(character: str) -> str:
    return character if _is_seen(character) else re.sub(r"^'|'$", "", ascii(character))
