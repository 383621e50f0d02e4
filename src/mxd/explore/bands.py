"""Which firings of a unit are shown: over the whole range of its activations, by rank, and where it stayed silent.

Band 0 holds the strongest firings; bands 1 to 5 are double deciles of the unit's own firings from the top; band 6 are silent twins:
tokens like those of its strongest firings where it did not fire. Within a band, contexts are drawn by a hash of seed and place, so that
the same text gives the same contexts, and each document is drawn from once before any is drawn from twice.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import schema
from .codes import Firings
from .ordering import falling, numbered, order_by

DOUBLE_DECILES = 5
POOL = 4
"""The strongest firings that band 0 is chosen from, for each context that it has room for."""
BEFORE, AFTER = 3, 1
"""Tokens before and after the peak that make two contexts the same."""


class Text(NamedTuple):
    """The text that was read, token by token."""

    ids: NDArray[np.int64]
    """[token] ids of all sequences, one after the other."""
    length: int
    """Tokens of a sequence."""
    documents: NDArray[np.int64]
    """[token] the document that it stands in."""
    draw: NDArray[np.int64]
    """[token] its turn when tokens are drawn, by a hash of seed and place."""
    keys: NDArray[np.int64]
    """[token] number of the few ids around it: the same where the same tokens stand."""


def text_of(ids: NDArray[np.int64], documents: NDArray[np.int64], seed: int, *, eos: int | None = None) -> Text:
    """
    Args:
        ids: [sequence, position].
        documents: [sequence] the document that each begins in, numbered in the order of the text.
        seed: of the draw.
        eos: the token that stands at the end of a document; None if there is none.
    """
    flat = ids.reshape(-1)
    at = np.arange(len(flat), dtype=np.uint64)
    keys = np.zeros(len(flat), np.uint64)
    for offset in range(-BEFORE, AFTER + 1):
        moved = np.full(ids.shape, -1, np.int64)
        into = slice(max(0, -offset), ids.shape[1] - max(0, offset))
        moved[:, into] = ids[:, max(0, offset) : ids.shape[1] + min(0, offset)]
        keys = mixed(keys ^ (moved.reshape(-1).astype(np.uint64) + np.uint64(offset + BEFORE + 1)))
    ended = np.zeros(ids.shape, np.int64)
    if eos is not None:
        ended[:, 1:] = np.cumsum(ids[:, :-1] == eos, axis=1)
    drawn = numbered(mixed(at + mixed(np.full(1, seed, np.uint64))))
    return Text(flat, ids.shape[1], (documents[:, None] + ended).reshape(-1), drawn, numbered(keys))


def mixed(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser (Steele, Lea and Flood 2014): numbers that look random, the same on every machine."""
    with np.errstate(over="ignore"):
        z = numbers + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def ranks(firings: Firings) -> NDArray[np.int64]:
    """[firing] rank among the unit's own, 0 the strongest; of equal ones the earlier first."""
    order = order_by(firings.units, falling(firings.values), firings.tokens)
    found = np.empty(len(order), np.int64)
    found[order] = np.arange(len(order)) - firings.starts[:-1][firings.units]
    return found


def double_deciles(rank: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Band 1 (the strongest fifth) to 5 of each firing, given its rank and how many firings its unit has."""
    return 1 + DOUBLE_DECILES * rank // np.maximum(counts, 1)


class Chosen(NamedTuple):
    """Firings to show, sorted by unit, band and the order in which they are shown."""

    pairs: NDArray[np.int64]
    """Which firings of the chunk."""
    bands: NDArray[np.int64]
    repeats: NDArray[np.int64]
    """Firings of the unit and band with the same tokens around, this one included."""


def choose(firings: Firings, rank: NDArray[np.int64], text: Text, n: int) -> Chosen:
    """At most `n` firings of each unit and band."""
    units, counts = firings.units, np.diff(firings.starts)[firings.units]
    top = np.flatnonzero(rank < POOL * n)
    strongest = _draw(units[top], rank[top], firings.tokens[top], text, n)
    shown = np.zeros(len(rank), bool)
    shown[top[strongest.pairs]] = True
    rest = np.flatnonzero(~shown)
    band = double_deciles(rank, counts)
    drawn = _draw(units[rest] * 8 + band[rest], text.draw[firings.tokens[rest]], firings.tokens[rest], text, n)
    pairs = np.concatenate([top[strongest.pairs], rest[drawn.pairs]])
    bands = np.concatenate([np.zeros(len(strongest.pairs), np.int64), band[rest[drawn.pairs]]])
    repeats = np.concatenate([strongest.repeats, drawn.repeats])
    # Drawn by chance, shown from the strongest to the weakest.
    order = order_by(units[pairs], bands, rank[pairs])
    return Chosen(pairs[order], bands[order], repeats[order])


class _Drawn(NamedTuple):
    pairs: NDArray[np.int64]
    repeats: NDArray[np.int64]


def _draw(groups: NDArray[np.int64], priority: NDArray[np.int64], tokens: NDArray[np.int64], text: Text, n: int) -> _Drawn:
    """The first `n` of each group by `priority`, different windows only, the first of every document before the second of any."""
    if not len(groups):
        return _Drawn(np.zeros(0, np.int64), np.zeros(0, np.int64))
    order = order_by(groups, text.keys[tokens], priority)
    first = _begins(groups[order], text.keys[tokens[order]])
    kept = order[first]
    repeats = np.diff(np.append(np.flatnonzero(first), len(order)))
    documents = text.documents[tokens[kept]]
    by_document = order_by(groups[kept], documents, priority[kept])
    turn = np.empty(len(kept), np.int64)
    turn[by_document] = _place(_begins(groups[kept][by_document], documents[by_document]))
    order = order_by(groups[kept], turn, priority[kept])
    inside = _place(_begins(groups[kept][order])) < n
    return _Drawn(kept[order][inside], repeats[order][inside])


def _begins(*columns: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Where a run of equal rows begins."""
    begins = np.zeros(len(columns[0]), bool)
    begins[:1] = True
    for column in columns:
        begins[1:] |= column[1:] != column[:-1]
    return begins


def _place(begins: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Place of each row within its run, from 0."""
    at = np.arange(len(begins))
    return at - np.maximum.accumulate(np.where(begins, at, 0))


class Twins:
    """Finds tokens like those of a unit's strongest firings at which it is silent."""

    def __init__(self, text: Text) -> None:
        self._text = text
        inside = np.flatnonzero(np.arange(len(text.ids)) % text.length > 0)
        order = inside[order_by(text.ids[inside], text.draw[inside])]
        self._order, self._ids = order, text.ids[order]

    def of(self, token: int, active: NDArray[np.int64], n: int) -> NDArray[np.int64]:
        """At most `n` places where `token` stands and that are not among the sorted `active`; one of a document before two of any."""
        low, high = (int(np.searchsorted(self._ids, token, side)) for side in ("left", "right"))
        places = self._order[low : min(high, low + 8 * n + len(active))]
        if len(active) and len(places):
            near = np.minimum(np.searchsorted(active, places), len(active) - 1)
            places = places[active[near] != places]
        places = places[: 8 * n]
        documents = self._text.documents[places]
        by_document = np.argsort(documents, kind="stable")
        turn = np.empty(len(places), np.int64)
        turn[by_document] = _place(_begins(documents[by_document]))
        return places[np.argsort(turn, kind="stable")][:n]


def blobs(firings: Firings, rank: NDArray[np.int64], chosen: Chosen, text: Text) -> dict[tuple[int, int], tuple[int, bytes]]:
    """By unit (its number in the layer) and band: how many contexts, and they, packed."""
    return packed(
        firings, text, firings.units[chosen.pairs], chosen.bands, firings.tokens[chosen.pairs], chosen.repeats, chosen.pairs, rank
    )


def packed(
    firings: Firings,
    text: Text,
    units: NDArray[np.int64],
    bands: NDArray[np.int64],
    tokens: NDArray[np.int64],
    repeats: NDArray[np.int64],
    pairs: NDArray[np.int64] | None = None,
    rank: NDArray[np.int64] | None = None,
) -> dict[tuple[int, int], tuple[int, bytes]]:
    """Contexts around `tokens` for `units` of the chunk (counted from its first), in the order given.

    Args:
        pairs, rank: the firing that each context is about, and the ranks of all firings; None for silent twins.
    """
    sequences, positions = tokens // text.length, tokens % text.length
    width = min(schema.LONGEST, text.length)
    starts = np.clip(positions - width // 2, 0, text.length - width)
    maximum = np.zeros(len(firings.starts) - 1, np.float32)
    np.maximum.at(maximum, firings.units, firings.values)
    # One sorted axis for all units: unit number times a number larger than any token, plus the token.
    stride = len(text.ids) + 1
    axis = firings.units * stride + firings.tokens
    low = np.searchsorted(axis, units * stride + sequences * text.length + starts)
    high = np.searchsorted(axis, units * stride + sequences * text.length + starts + width)
    levels = np.ceil(255 * firings.values / maximum[firings.units]).clip(1, 255).astype(np.uint8)
    head = np.zeros(len(tokens), schema.HEAD)
    head["seq"], head["start"], head["length"], head["peak"] = sequences, starts, width, positions - starts
    head["repeats"], head["delta"] = np.minimum(repeats, 65535), np.nan
    if pairs is not None and rank is not None:
        head["rank"], head["a"], head["delta"] = rank[pairs], firings.values[pairs], firings.effects[pairs]
    heads, size = head.tobytes(), schema.HEAD.itemsize
    found: dict[tuple[int, int], list[bytes]] = {}
    for i, (unit, band) in enumerate(zip((units + firings.first).tolist(), bands.tolist(), strict=True)):
        span = slice(int(low[i]), int(high[i]))
        offsets = (firings.tokens[span] - int(sequences[i]) * text.length - int(starts[i])).astype(np.uint8)
        body = heads[i * size : (i + 1) * size] + bytes((len(offsets),)) + offsets.tobytes() + levels[span].tobytes()
        found.setdefault((unit, band), []).append(body)
    return {key: (len(parts), b"".join(parts)) for key, parts in found.items()}
