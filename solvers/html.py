"""Tables of text as HTML, for notebooks: every text is escaped."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape


def table_html(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a row of headings."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def facts_html(title: str, facts: Mapping[str, object]) -> str:
    """A title, and a table of names and values."""
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in facts.items())
    return f"<p><b>{escape(title)}</b></p><table><tbody>{rows}</tbody></table>"
