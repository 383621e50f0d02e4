"""An exported file holds each stretch of text once, for contexts of several units show the same sequences.

A context without its text keeps ``seq``, ``start``, ``n``, its tokens, and ``doc``, a number. Three tables say the rest, and
``page/packed.js`` joins them:

    vocabulary   ids, texts: of the tokens that occur, the commonest first
    docs         [name, source]
    sequences    by number: [position of the first token kept, the tokens, what is odd]

Tokens are a string of one character each, whose code is the token's place in the vocabulary + `FIRST`, surrogates passed over: common
tokens take a byte, and what compresses text compresses them. Odd are [token, its text] where that is not the vocabulary's, which happens
to tokens that are parts of characters.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .store import TextStore

FIRST = 0x20
SURROGATES = 0xD800, 0x800
"""Where they begin, and how many there are."""
_TEXT = ("text", "cuts", "ids")


class Packing:
    """Takes the text out of contexts, and gathers it."""

    def __init__(self, text: TextStore) -> None:
        self._text = text
        self._kept: dict[int, tuple[int, int]] = {}
        self._docs: dict[tuple[str, str], int] = {}
        self._peaks: dict[int, set[int]] = {}

    def context(self, context: Mapping[str, Any]) -> dict[str, Any]:
        """A context as the page takes it, without its text."""
        start, n = context["start"], len(context["ids"])
        self.keep(context["seq"], start, n, context["peak"])
        doc = self._docs.setdefault((context["doc"]["name"], context["doc"]["source"]), len(self._docs))
        return {**{name: value for name, value in context.items() if name not in _TEXT}, "n": n, "doc": doc}

    def keep(self, seq: int, start: int, n: int, peak: int) -> None:
        """`n` tokens from `start` are needed, and the document of the one that is `peak` behind it."""
        low, high = self._kept.get(seq, (start, start + n))
        self._kept[seq] = min(low, start), max(high, start + n)
        self._peaks.setdefault(seq, set()).add(start + peak)

    def spans(self) -> dict[int, tuple[int, int]]:
        """First token that is needed and first that is not any more, by sequence."""
        return dict(sorted(self._kept.items()))

    def counts(self) -> tuple[int, int]:
        """How many different tokens and documents are needed."""
        ids: list[NDArray[np.uint32]] = []
        documents: set[int] = set()
        for seq, (low, high) in self.spans().items():
            sequence = self._text.sequence(seq)
            ids.append(sequence.ids[low:high])
            ends = np.flatnonzero(sequence.ids == int(self._text.meta.get("eos", -1)))
            documents |= {sequence.doc + int(found) for found in np.searchsorted(ends, sorted(self._peaks[seq]))}
        return len(ranked(ids)), len(documents)

    def documents(self, every: int) -> list[tuple[str, str]]:
        """Name and source of some of the documents, of one for every so many sequences."""
        seqs = itertools.islice(self.spans(), 0, None, every)
        return list(dict.fromkeys(self._text.document(self._text.sequence(seq), min(self._peaks[seq])) for seq in seqs))

    def tables(self, every: int = 1) -> dict[str, Any]:
        """The text that is needed; or of every so manieth sequence."""
        found = [(self._text.sequence(seq), low, high) for seq, (low, high) in itertools.islice(self.spans().items(), 0, None, every)]
        vocabulary = ranked([sequence.ids[low:high] for sequence, low, high in found])
        rank = {int(token): place for place, token in enumerate(vocabulary)}
        texts: list[str | None] = [None] * len(vocabulary)
        sequences: dict[str, Any] = {}
        for sequence, low, high in found:
            places = [rank[token] for token in sequence.ids[low:high].tolist()]
            odd: list[tuple[int, str]] = []
            for at, (place, piece) in enumerate(zip(places, pieces(sequence.text, sequence.cuts[low : high + 1].tolist()), strict=True)):
                texts[place] = piece if texts[place] is None else texts[place]
                if texts[place] != piece:
                    odd.append((at, piece))
            sequences[str(sequence.seq)] = [low, letters(places), *([odd] if odd else [])]
        return {"vocabulary": {"ids": vocabulary.tolist(), "texts": texts}, "docs": list(self._docs), "sequences": sequences}


def ranked(ids: Sequence[NDArray[np.uint32]]) -> NDArray[np.uint32]:
    """The tokens that occur, the commonest first."""
    tokens, counts = np.unique(np.concatenate([*ids, np.zeros(0, np.uint32)]), return_counts=True)
    return tokens[np.lexsort((tokens, -counts))]


def letters(places: Sequence[int]) -> str:
    """Places in the vocabulary as one character each."""
    first, many = SURROGATES
    return "".join(chr(code if code < first else code + many) for code in (place + FIRST for place in places))


def pieces(text: str, cuts: Sequence[int]) -> Iterator[str]:
    """The text between cuts, which count UTF-16 units."""
    if text.isascii():
        yield from (text[start:end] for start, end in itertools.pairwise(cuts))
        return
    units = text.encode("utf-16-le", "surrogatepass")
    for start, end in itertools.pairwise(cuts):
        yield units[2 * start : 2 * end].decode("utf-16-le", "replace")
