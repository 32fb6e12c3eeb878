"""The section of a model card (README.md) that says what a reshard did.

It stands at the end, between markers, and nothing else of the card changes: taking it out gives
back the same bytes.
"""

import re
from pathlib import Path
from typing import Any

CARD = "README.md"
BEGIN, BEGIN_ALONE, END = b"<!-- semmoe reshard -->", b"<!-- semmoe reshard, made this file -->", b"<!-- semmoe end -->"
SECTION = re.compile(rb"\n?<!-- semmoe reshard(, made this file)? -->.*?<!-- semmoe end -->\n", re.DOTALL)


def add_section(folder: Path, facts: dict[str, Any]) -> None:
    """Write the section of a reshard with these facts (semmoe.json) into its card, in place of
    another one."""
    remove_section(folder)
    card = folder / CARD
    before = card.read_bytes() if card.is_file() else None
    begin = BEGIN_ALONE if before is None else b"\n" + BEGIN
    card.write_bytes((before or b"") + begin + b"\n" + _section(facts).encode() + END + b"\n")


def remove_section(folder: Path) -> None:
    """Take the section out of a card; the card too where the section made it."""
    card = folder / CARD
    found = SECTION.search(content := card.read_bytes()) if card.is_file() else None
    if found is None:
        return
    if found[1] and found[0] == content:
        card.unlink()
    else:
        card.write_bytes(SECTION.sub(b"", content))


def _section(facts: dict[str, Any]) -> str:
    plan, ranks = facts["plan"]["fingerprint"], facts["plan"]["ranks"]
    if facts["layout"] == "ranks":
        done = f"Weights lie in a directory for each of {ranks} ranks, `shared` has what all of them hold."
        load = "`semmoe run` reads it; other software needs the checkpoint that it was made from."
    else:
        done = f"The {facts['num_experts']} experts of each MoE layer are renumbered, routers with them, for {ranks} ranks."
        load = "It loads as the original does and computes the same; expert ids in its routing are of the new order."
    return (
        f"## Experts placed by semmoe\n\n{done} {load}\n\n"
        f"- layout: {facts['layout']}\n- plan: `{plan}`\n- what was done: `semmoe.json`\n"
        "- back to the original, bit for bit: `semmoe reshard --undo DIRECTORY -o OUT`\n"
    )
