"""Which texts a label is made from, and on which it is tested: windows of the held-out text, drawn over all strengths of a unit.

The protocol is that of Juang et al. (2024). *Detection*: 5 windows of each decile of the unit's activations and 20 random ones where it
is silent; does it fire in this text? *Fuzzing*: 7 windows of each decile, 2 of them with other tokens marked than those where it fires;
are these the tokens? Both are scored by balanced accuracy. A decile counts windows, ordered by the strongest activation inside.
What a label is made from and what it is tested on come from different documents.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import RunError
from .store import TextStore

WINDOW = 32
"""Tokens of a window."""
DECILES = 10
EXAMPLES = 4
"""Windows of each decile that a label is made from."""
DETECTION, SILENT = 5, 20
"""Windows of each decile in a detection test, and random ones where the unit is silent."""
FUZZING, WRONG = 7, 2
"""Windows of each decile in a fuzzing test, and how many of them are wrongly marked."""
FEWEST = 5
"""Windows of either sort without which there is no score."""
_DOCUMENTS = 4
"""With fewer documents, sequences are kept apart instead."""


class Text:
    """The sequences of a run's text.sqlite in memory, cut into windows. The first token of a sequence is in no window.

    Attributes:
        ids: int32 [sequences, tokens_per_sequence].
        testing: bool [sequences]; whether it is kept for testing labels; the others are for making them. A document is in one of the two.
        per_sequence: windows in a sequence, of which the last may be shorter.
    """

    def __init__(self, ids: NDArray[np.int32], documents: NDArray[np.int64]) -> None:
        self.ids = ids
        self.per_sequence = -(-(ids.shape[1] - 1) // WINDOW)
        self.testing = _half(documents)

    @classmethod
    def read(cls, store: TextStore) -> Text:
        """
        Raises:
            RunError: the file is damaged, or its sequences are of several lengths.
        """
        rows = store.ask("SELECT seq, doc, ids FROM seq ORDER BY seq", seconds=60)
        ids = [store.numbers(row[2], "<u4") for row in rows]
        if len({len(one) for one in ids}) != 1 or len(ids[0]) < 2 or [row[0] for row in rows] != list(range(len(rows))):
            raise store.damaged("sequences that are missing or of several lengths")
        if any(int(one.max()) >= 2**31 for one in ids):
            raise store.damaged("a token that is none")
        return cls(np.stack(ids).astype(np.int32), np.array([row[1] for row in rows], dtype=np.int64))

    @property
    def sequences(self) -> int:
        return self.ids.shape[0]

    def window_of(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """The window of each token (counted over the whole text); a sequence's first token has none and is not asked for."""
        length = self.ids.shape[1]
        return tokens // length * self.per_sequence + (tokens % length - 1) // WINDOW

    def span(self, window: int) -> tuple[int, int, int]:
        """Sequence, first position in it, and position behind the last one of a window."""
        sequence, part = divmod(window, self.per_sequence)
        start = 1 + part * WINDOW
        return sequence, start, min(start + WINDOW, self.ids.shape[1])

    def windows(self, *, testing: bool) -> NDArray[np.int64]:
        """All windows for testing, or all for making labels, ascending."""
        sequences = np.flatnonzero(self.testing == testing)
        return (sequences[:, None] * self.per_sequence + np.arange(self.per_sequence)).ravel()

    def table(self, values: NDArray[np.int32], padding: int) -> NDArray[np.int32]:
        """Values of all tokens, [sequences, tokens_per_sequence], laid out by window: [windows, WINDOW], short ones padded."""
        laid = np.full((self.sequences, self.per_sequence * WINDOW), padding, np.int32)
        laid[:, : values.shape[1] - 1] = values[:, 1:]
        return laid.reshape(-1, WINDOW)


class Fired(NamedTuple):
    """The windows in which a unit fires."""

    windows: NDArray[np.int64]
    """Ascending."""
    top: NDArray[np.float32]
    """The strongest activation in each."""


class Example(NamedTuple):
    """A window as it is shown to a model."""

    window: int
    marks: list[int]
    """Positions in the sequence that are marked."""
    strength: int
    """Decile, 1 the weakest to 10; 0 for windows where the unit is silent."""
    right: bool
    """Whether the unit fires here (detection), or at the tokens that are marked (fuzzing)."""


def fired(text: Text, tokens: NDArray[np.int64], values: NDArray[np.float32]) -> Fired:
    """The windows of a unit's firings.

    Args:
        tokens: where it fired, counted over the whole text, ascending; none the first of a sequence.
        values: how strongly.
    """
    if not len(tokens):
        return Fired(np.zeros(0, np.int64), np.zeros(0, np.float32))
    windows = text.window_of(tokens)
    starts = np.flatnonzero(np.diff(windows, prepend=-1))
    return Fired(windows[starts], np.maximum.reduceat(values, starts))


def within(text: Text, found: Fired, *, testing: bool) -> Fired:
    """Those windows that are for testing, or those for making labels."""
    here = text.testing[found.windows // text.per_sequence] == testing
    return Fired(found.windows[here], found.top[here])


def over_deciles(found: Fired, each: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Up to `each` windows of every decile, the weakest first, in random order inside it."""
    parts = np.array_split(found.windows[np.argsort(found.top, kind="stable")], DECILES)
    return [rng.permutation(part)[:each] for part in parts]


def silent(found: Fired, among: NDArray[np.int64], most: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Up to `most` random windows where the unit is silent.

    Args:
        found: all windows in which it fires.
        among: the windows to draw from.
    """
    if not len(among):
        return among
    drawn = among[rng.permutation(len(among))[: 4 * most]] if len(among) < 64 * most else np.unique(rng.choice(among, 4 * most))
    off = drawn[~_contains(found.windows, drawn)]
    if len(off) < most:
        off = np.setdiff1d(among, found.windows, assume_unique=True)
    return rng.permutation(off)[:most]


def dice(seed: int, unit: int, what: str) -> np.random.Generator:
    """Random numbers for one unit and one purpose: every author of labels is tested on the same windows."""
    return np.random.default_rng([seed, unit, *what.encode()])


def detection_test(text: Text, found: Fired, held_out: NDArray[np.int64], rng: np.random.Generator) -> tuple[NDArray[np.int64], ...]:
    """The windows of a detection test: those of each decile where the unit fires, and random ones where it is silent.

    Args:
        found: all windows in which it fires.
        held_out: all windows for testing, as `Text.windows`.

    Returns:
        (windows with firings, their deciles from 1, windows without).
    """
    parts = over_deciles(within(text, found, testing=True), DETECTION, rng)
    deciles = np.repeat(np.arange(1, DECILES + 1), [len(part) for part in parts])
    return np.concatenate(parts), deciles, silent(found, held_out, SILENT, rng)


def balanced_accuracy(truth: NDArray[np.bool_], said: NDArray[np.bool_]) -> float | None:
    """Mean of the share of true ones that are found and of the share of false ones that are passed over; None with fewer than `FEWEST`
    of either sort."""
    yes = int(truth.sum())
    if min(yes, len(truth) - yes) < FEWEST:
        return None
    return float(said[truth].mean() + (~said[~truth]).mean()) / 2


def check_size(text: Text, sequences: int, tokens_per_sequence: int, *, next: str) -> None:
    """
    Raises:
        RunError: codes of another size than the text.
    """
    if text.ids.shape != (sequences, tokens_per_sequence):
        raise RunError(
            "codes and text do not belong together",
            expected=f"{text.ids.shape[0]} sequences of {text.ids.shape[1]} tokens",
            got=f"{sequences} of {tokens_per_sequence}",
            next=next,
        )


def _contains(ascending: NDArray[np.int64], values: NDArray[np.int64]) -> NDArray[np.bool_]:
    if not len(ascending):
        return np.zeros(len(values), np.bool_)
    at = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return ascending[at] == values


def _half(documents: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Two halves of about as many sequences: documents from the largest on, each to the half that has less."""
    names, inverse, sizes = np.unique(documents, return_inverse=True, return_counts=True)
    if len(names) < _DOCUMENTS:
        names, inverse, sizes = np.arange(len(documents)), np.arange(len(documents)), np.ones(len(documents), np.int64)
    # Of the same size, in an order by hash (Knuth's multiplier), which has nothing to do with that of the text.
    order = np.lexsort((names.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15), -sizes))
    half, load = np.zeros(len(names), np.bool_), [0, 0]
    for document in order:
        half[document] = load[1] < load[0]
        load[int(half[document])] += int(sizes[document])
    return half[inverse]
