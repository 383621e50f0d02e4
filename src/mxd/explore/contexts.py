"""A stored context with its text, as the page draws it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import schema
from .replies import short
from .store import Sequence_, TextStore

AROUND = 10
"""Tokens on either side of the peak in a row of the table."""


def cut(context: schema.Context, around: int = AROUND) -> schema.Context:
    """The context with at most `around` tokens on either side of its peak."""
    low, high = max(0, context.peak - around), min(context.length, context.peak + around + 1)
    there = (context.offsets >= low) & (context.offsets < high)
    moved = {"start": context.start + low, "length": high - low, "peak": context.peak - low}
    return context._replace(**moved, offsets=context.offsets[there] - low, levels=context.levels[there])


def shown(context: schema.Context, store: TextStore) -> dict[str, Any]:
    """The context as the page takes it.

    Raises:
        RunError: it lies outside its sequence, or the text is damaged.
    """
    sequence = store.sequence(context.seq)
    end = context.start + context.length
    if end > len(sequence.ids):
        raise store.damaged("a context outside its sequence")
    text, cuts = stretch(sequence, context.start, end)
    ids: list[int] = sequence.ids[context.start : end].tolist()
    return {
        "a": short(context.a),
        "delta": short(context.delta, 4),
        "rank": context.rank,
        "repeats": context.repeats,
        "text": text,
        "cuts": cuts,
        "levels": np.stack([context.offsets, context.levels], 1).tolist(),
        "peak": context.peak,
        "seq": context.seq,
        "start": context.start,
        "doc": dict(zip(("name", "source"), store.document(sequence, context.start + context.peak), strict=True)),
        "ids": ids,
        "special": [[at, store.tokens[token]] for at, token in enumerate(ids) if token in store.special],
    }


def stretch(sequence: Sequence_, start: int, end: int) -> tuple[str, list[int]]:
    """The text of tokens `start` to `end`, and where each begins in it, in UTF-16 units."""
    cuts: NDArray[np.int64] = sequence.cuts[start : end + 1].astype(np.int64)
    if sequence.text.isascii():
        return sequence.text[int(cuts[0]) : int(cuts[-1])], (cuts - cuts[0]).tolist()
    units = sequence.text.encode("utf-16-le", "surrogatepass")
    return units[2 * int(cuts[0]) : 2 * int(cuts[-1])].decode("utf-16-le", "replace"), (cuts - cuts[0]).tolist()
