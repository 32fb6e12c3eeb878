"""The section of a model card that a reshard writes, and takes out again."""

import pytest

from semmoe.runtime.reshard.card import CARD, add_section, remove_section

FACTS = {"layout": "permuted", "num_experts": 8, "plan": {"fingerprint": "0123456789abcdef", "ranks": 4}}


@pytest.mark.parametrize(
    "content", [None, b"", b"# A model\n", b"---\ntags: [a]\n---\nno end of line", b"\xff\r\n\n\n"]
)
def test_a_card_is_the_same_after_the_section_is_taken_out(tmp_path, content):
    card = tmp_path / CARD
    if content is not None:
        card.write_bytes(content)
    for ranks in (4, 8):  # a second section takes the place of the first
        add_section(tmp_path, {**FACTS, "plan": FACTS["plan"] | {"ranks": ranks}})
        written = card.read_bytes()
        assert written.startswith(content or b"") and written.count(b"## Experts placed by semmoe") == 1
        assert f"for {ranks} ranks".encode() in written and b"0123456789abcdef" in written
    remove_section(tmp_path)
    assert (card.read_bytes() if card.exists() else None) == content


def test_a_card_without_a_section_stays(tmp_path):
    remove_section(tmp_path)
    assert not (tmp_path / CARD).exists()
    (tmp_path / CARD).write_bytes(b"mine")
    remove_section(tmp_path)
    assert (tmp_path / CARD).read_bytes() == b"mine"


def test_of_the_layout_of_ranks_it_says_what_can_read_it(tmp_path):
    add_section(tmp_path, FACTS | {"layout": "ranks"})
    assert b"each of 4 ranks" in (tmp_path / CARD).read_bytes()
