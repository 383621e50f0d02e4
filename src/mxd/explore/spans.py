"""Token ids as spans of their text, so that a page can mark tokens without knowing a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

LONGEST_CHARACTER = 8
"""Tokens, at most, that one character is split over; what stays broken after so many is broken."""

Decode = Callable[[Sequence[int]], str]


def utf16(text: str) -> int:
    """Length of a text in UTF-16 units, as browsers count."""
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def spans(ids: Sequence[int], decode: Decode) -> tuple[str, list[int]]:
    """The text of `ids`, and where each token begins in it, in UTF-16 units; one more number than tokens, the last the text's length.

    A token that ends within a character has no width: the character belongs to the token that completes it. Special tokens, which
    `decode` leaves out, have none either.
    """
    whole = decode(ids)
    pieces = _pieces(ids, decode)
    if "".join(pieces) != whole:  # decoders that look at what stands before: SentencePiece drops the first blank
        pieces = _by_prefix(ids, decode, whole)
    cuts = [0]
    for piece in pieces:
        cuts.append(cuts[-1] + utf16(piece))
    return whole, cuts


def _pieces(ids: Sequence[int], decode: Decode) -> list[str]:
    """The text of each token, decoded alone or with the tokens before that it completes a character of."""
    pieces: list[str] = []
    begun: list[int] = []
    for token in ids:
        begun.append(token)
        piece = decode(begun)
        if piece.endswith("\ufffd") and len(begun) < LONGEST_CHARACTER:
            pieces.append("")
            continue
        pieces.append(piece)
        begun = []
    if begun:
        pieces[-1] = decode(begun)
    return pieces


def _by_prefix(ids: Sequence[int], decode: Decode, whole: str) -> list[str]:
    """The text of each token as what it makes the decoded beginning longer by, as far as that is how the whole begins."""
    ends: list[int] = []
    done = 0
    for count in range(1, len(ids) + 1):
        prefix = whole if count == len(ids) else decode(ids[:count])
        while done < len(whole) and done < len(prefix) and prefix[done] == whole[done] and not _unfinished(prefix, done, whole):
            done += 1
        ends.append(done)
    ends[-1] = len(whole)
    return [whole[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _unfinished(prefix: str, at: int, whole: str) -> bool:
    """Whether the replacement character at the end of a prefix stands for a character that is not complete yet."""
    return prefix[at] == "\ufffd" and at == len(prefix) - 1 and len(prefix) < len(whole)
