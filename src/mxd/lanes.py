"""Continuations side by side: where each leaves the host's, token by token. Knows neither the host nor the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Piece(NamedTuple):
    """A stretch of a continuation that agrees with the host's throughout, or differs throughout."""

    text: str
    """Its text; the pieces of a lane join to the lane's whole text."""
    differs: bool
    """Whether its tokens differ from the host's at the same positions."""


class Lane(NamedTuple):
    """One continuation, compared with the host's."""

    name: str
    """The host or the student that wrote it."""
    split: int | None
    """First token, counted from 1, that is not the host's; None if there is none."""
    agreement: float
    """Fraction of positions, up to the longer of the two, with the host's token there."""
    pieces: list[Piece]
    """Its text in stretches."""


def compare(name: str, host_ids: Sequence[int], ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> Lane:
    """The lane of `ids` beside the host's `host_ids` (new tokens only); `decode` gives the text of the first n of them."""
    same = [position < len(host_ids) and token == host_ids[position] for position, token in enumerate(ids)]
    longer = max(len(ids), len(host_ids))
    alike = same.index(False) if False in same else len(same)
    split = None if alike == longer else alike + 1
    return Lane(name, split, sum(same) / longer if longer else 1.0, _pieces(ids, same, decode))


def _pieces(ids: Sequence[int], same: list[bool], decode: Callable[[Sequence[int]], str]) -> list[Piece]:
    whole = decode(ids)
    ends = [n for n in range(1, len(ids) + 1) if n == len(ids) or same[n] != same[n - 1]]
    pieces: list[Piece] = []
    done = 0
    for end in ends:
        # A character may be spread over several tokens: cut in the middle it decodes to a replacement sign, and goes to the next piece.
        upto = len(whole) if end == len(ids) else _common(whole, decode(ids[:end]))
        if upto > done:
            pieces.append(Piece(whole[done:upto], not same[end - 1]))
            done = upto
    return pieces


def _common(a: str, b: str) -> int:
    length = 0
    for left, right in zip(a, b, strict=False):
        if left != right:
            break
        length += 1
    return length
