"""Continuations side by side: agreement, splits and the text of each stretch, by hand."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pytest
from rich.console import Console

from mxd import tables
from mxd.lanes import Lane, Piece, compare

WORDS = {0: "a", 1: " b", 2: " c", 3: " d"}


def decode(ids: Sequence[int]) -> str:
    return "".join(WORDS[token] for token in ids)


def test_the_host_agrees_with_itself() -> None:
    assert compare("host", [0, 1, 2], [0, 1, 2], decode) == Lane("host", None, 1.0, [Piece("a b c", False)])


def test_a_difference_in_the_middle() -> None:
    pieces = [Piece("a", False), Piece(" d", True), Piece(" c", False), Piece(" c", True)]
    assert compare("s", [0, 1, 2, 3], [0, 3, 2, 2], decode) == Lane("s", 2, 0.5, pieces)


def test_a_difference_from_the_start() -> None:
    assert compare("s", [0, 1], [3, 3], decode) == Lane("s", 1, 0.0, [Piece(" d d", True)])


def test_lanes_of_unequal_length() -> None:
    assert compare("short", [0, 1, 2], [0, 1], decode) == Lane("short", 3, 2 / 3, [Piece("a b", False)])
    assert compare("long", [0], [0, 1], decode) == Lane("long", 2, 0.5, [Piece("a", False), Piece(" b", True)])
    assert compare("nothing", [], [], decode) == Lane("nothing", None, 1.0, [])


def test_a_character_spread_over_two_tokens_is_not_torn() -> None:
    letters = {0: b"x", 1: "é".encode()[:1], 2: "é".encode()[1:], 3: b"y"}

    def of_bytes(ids: Sequence[int]) -> str:
        return b"".join(letters[token] for token in ids).decode(errors="replace")

    lane = compare("s", [0, 1, 3, 3], [0, 1, 2, 3], of_bytes)
    assert "".join(piece.text for piece in lane.pieces) == "xéy"
    assert lane.pieces == [Piece("x", False), Piece("é", True), Piece("y", False)]
    assert lane.split == 3


def test_differences_are_coloured_or_marked() -> None:
    lane = compare("s", [0, 1], [0, 3], decode)
    assert tables.lane_text(lane, colour=False).plain == "a{+ d+}"
    coloured = tables.lane_text(lane, colour=True)
    assert coloured.plain == "a d"
    assert [(span.start, span.end) for span in coloured.spans] == [(1, 3)]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(tables.lanes_table([compare("host", [0, 1], [0, 1], decode), lane], colour=False))
    said = console.export_text()
    assert "at token 2 (50% alike)" in said
    assert "never" not in said, "the host is not compared with itself"


@pytest.mark.parametrize("width", [60, 80, 100, 160, 250])
def test_the_report_table_goes_without_columns_rather_than_cut_them(width: int) -> None:

    from mxd.tables import LEAVE_OUT, report_table

    heads = ["student", "excess CE [95 %]", "FVU [95 %]", "KL", "nmse", "tokens/s", "recipe"]
    row = ["Additive control", "0.00192 [0.000584, 0.00330]", "0.0351 [0.0341, 0.0364]", "0.00459", "0.0303", "5,616", "host-encoder"]
    console = Console(width=width)
    with console.capture() as said:
        console.print(report_table("t", heads, [row], width=width))
    text = said.get()
    assert "…" not in text and row[1] in text
    assert all(cell in text for head, cell in zip(heads, row, strict=True) if width == 250 or head not in LEAVE_OUT)
    assert width < 250 or row[5] in text
