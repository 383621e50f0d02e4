"""Labels without a language model: the tokens and contexts that separate where a unit fires from where it does not.

The classifier behind a label is one table: how often the unit fires at a token after the token before it, and where that pair is rare,
at the token alone, and where that is rare too, anywhere. A text is said to hold a firing if more of them are to be expected in it than in
an average one of its length. Nothing is fitted but these rates, and those on other documents than the test's.
"""

from __future__ import annotations

import unicodedata
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import detection
from .detection import Fired, Text
from .store import TextStore

AUTHOR = "statistical"
NEVER = "(never fired)"
MOST_NAMED = 4
"""Tokens in a name, at most."""
_WEIGHT = 2.0
"""Occurrences that count as much as what is known without them: of the token without the one before it, of any token."""
_COVERED = 0.8
"""Share of the firings after which no more tokens are named."""
_WORTH = 0.1
"""A token is named only if it says at least this much of what the first one says."""
_TELLING = 0.15
"""Share of the firings that tokens, or tokens before them, must cover to be named as such."""
_ODDS = 2.0
"""By how much the odds that a token stands before a firing must be above the usual ones for it to be named."""
_WINDOWS = 1000
"""Windows looked at for words nearby, at most."""


class Label(NamedTuple):
    """A label and its score."""

    text: str
    detection: float | None
    """Balanced accuracy in the detection test; None where it cannot be tested."""
    n: int | None
    """Windows it was tested on."""


class Known:
    """What the labels of all units are made with: how often each token and each pair of tokens stands in the half for making labels."""

    def __init__(self, text: Text, store: TextStore) -> None:
        self.text, self._store = text, store
        self._names: dict[int, str] = {}
        ids = text.ids
        self.vocabulary = int(ids.max()) + 1
        before = np.concatenate([np.zeros((len(ids), 1), np.int64), ids[:, :-1]], axis=1)
        codes, inverse = np.unique(before[:, 1:] * self.vocabulary + ids[:, 1:], return_inverse=True)
        pairs = np.zeros(ids.shape, np.int32)
        pairs[:, 1:] = inverse.reshape(len(ids), -1)
        self.ids, self.pairs = ids.ravel(), pairs.ravel()
        self.first_of_pair, self.second_of_pair = codes // self.vocabulary, codes % self.vocabulary
        making = ~text.testing
        self.count = np.bincount(ids[making, 1:].ravel(), minlength=self.vocabulary + 1).astype(np.float64)
        self.pair_count = np.bincount(pairs[making, 1:].ravel(), minlength=len(codes) + 1).astype(np.float64)
        self.tokens = int(self.count.sum())
        self.id_table = text.table(ids, self.vocabulary)
        self.pair_table = text.table(pairs, len(codes))
        self.held_out, self.making = text.windows(testing=True), text.windows(testing=False)
        self._distinct = _distinct(self.id_table, self.vocabulary)
        self._windows_with = np.bincount(self._distinct[self.making].ravel(), minlength=self.vocabulary + 1).astype(np.float64)
        # Filled for one unit and emptied again: numpy is fastest on what is there already.
        self._token_fires, self._pair_fires = np.zeros(self.vocabulary + 1), np.zeros(len(codes) + 1)

    def expected(self, tokens: NDArray[np.int64], windows: NDArray[np.int64]) -> NDArray[np.float64]:
        """What the rates say of each window: -log(1 - p) summed over its tokens, p the probability that the unit fires there, less
        what it would be in an average text of that length. Above 0 a firing is expected.

        Args:
            tokens: firings in the half for making labels.
            windows: which windows.
        """
        rate = len(tokens) / max(self.tokens, 1)
        ids, times = np.unique(self.ids[tokens], return_counts=True)
        pairs, pair_times = np.unique(self.pairs[tokens], return_counts=True)
        self._token_fires[ids], self._pair_fires[pairs] = times, pair_times
        at, pair_at = self.id_table[windows], self.pair_table[windows]
        p = (self._token_fires[at] + _WEIGHT * rate) / (self.count[at] + _WEIGHT)
        p = (self._pair_fires[pair_at] + _WEIGHT * p) / (self.pair_count[pair_at] + _WEIGHT)
        self._token_fires[ids], self._pair_fires[pairs] = 0, 0
        surprise = np.log1p(-min(rate, 0.999)) - np.log1p(-np.minimum(p, 0.999))
        # What differs by rounding only is no evidence.
        return np.where(at < self.vocabulary, surprise, 0).sum(1) - 1e-9

    def name(self, token: int) -> str:
        """A token as it stands in a label: “at”, “-ing” for the end of a word; of one without text, what it is for."""
        if token not in self._names:
            if str(token) == self._store.meta.get("eos"):
                said = "end of text"
            elif token in self._store.special and token == int(self.text.ids[0, 0]):
                said = "start of text"
            else:
                said = _quoted(self._store.tokens.get(token, str(token)))
            self._names[token] = said
        return self._names[token]

    def names(self, tokens: list[int]) -> str:
        """Several tokens, those left out that differ in letter case only."""
        names = [self.name(token) for token in tokens]
        return ", ".join(list({name.casefold(): name for name in reversed(names)}.values())[::-1])

    def nearby(self, windows: NDArray[np.int64]) -> list[int]:
        """Tokens that stand in these windows more often than in others."""
        some = windows[:: -(-len(windows) // _WINDOWS)] if len(windows) else windows
        ids, times = np.unique(self._distinct[some], return_counts=True)
        there = ids < self.vocabulary
        return _telling(ids[there], times[there], len(some), self._windows_with[ids[there]], len(self.making))


def label(known: Known, tokens: NDArray[np.int64], values: NDArray[np.float32], rng: np.random.Generator) -> Label:
    """The label of one unit.

    Args:
        tokens: where it fired, counted over the whole text, ascending.
        values: how strongly.
        rng: of its detection test.
    """
    text = known.text
    if not len(tokens):
        return Label(NEVER, None, None)
    found = detection.fired(text, tokens, values)
    making = tokens[~text.testing[tokens // text.ids.shape[1]]]
    name = _name(known, making if len(making) else tokens, found)
    on, _, off = detection.detection_test(text, found, known.held_out, rng)
    if not len(making) or len(on) < detection.FEWEST:
        return Label(f"{name} (not scored: fires in too few texts)", None, None)
    windows, truth = np.concatenate([on, off]), np.arange(len(on) + len(off)) < len(on)
    score = detection.balanced_accuracy(truth, known.expected(making, windows) > 0)
    if score is None:
        return Label(f"{name} (not scored: silent in too few texts)", None, None)
    return Label(name, score, len(windows))


def _name(known: Known, tokens: NDArray[np.int64], found: Fired) -> str:
    """What a unit fires on, in a few words: tokens, then the tokens before them; words nearby where it fires on many different ones."""
    ids, times = np.unique(known.ids[tokens], return_counts=True)
    chosen = _telling(ids, times, len(tokens), known.count[ids], known.tokens)
    here = np.isin(known.ids[tokens], chosen)
    if here.mean() < _TELLING:
        chosen, here = [], np.ones(len(tokens), np.bool_)
    said = known.names(chosen) or "many tokens"
    after = _before(known, known.pairs[tokens[here]], chosen)
    if after:
        return f"{said} (after {known.names(after)})"
    near = [] if chosen else known.nearby(detection.within(known.text, found, testing=False).windows)
    return f"{said} (near {known.names(near)})" if near else said


def _before(known: Known, pairs: NDArray[np.int32], chosen: list[int]) -> list[int]:
    """At most two tokens that stand before firings on the tokens `chosen` (none: on any) more often than they usually do."""
    found, times = np.unique(pairs, return_counts=True)
    before, place = np.unique(known.first_of_pair[found], return_inverse=True)
    fires = np.bincount(place, times)
    if chosen:
        among = np.isin(known.second_of_pair, chosen)
        usual = np.bincount(known.first_of_pair[among], known.pair_count[:-1][among], known.vocabulary)[before].astype(np.float64)
        of = float(known.count[chosen].sum())
    else:
        usual, of = known.count[before], float(known.tokens)
    share, otherwise = fires / len(pairs), np.maximum(usual, fires) / max(of, len(pairs))
    more = share * (1 - otherwise) > _ODDS * otherwise * (1 - share)
    after = _telling(before[more], fires[more], len(pairs), usual[more], of)[:2]
    return after if fires[np.isin(before, after)].sum() >= _TELLING * len(pairs) else []


def _telling(ids: NDArray[Any], times: NDArray[np.int64], total: int, usual: NDArray[np.float64], of: float) -> list[int]:
    """The few values that are most typical: by their part of the Kullback-Leibler divergence from what is usual.

    Args:
        ids, times: the values, and how often each was seen.
        total: how many were seen.
        usual, of: how often each is seen otherwise, of how many.
    """
    if not len(ids):
        return []
    worth = times * np.log((times / total) / (np.maximum(usual, times) / max(of, total)))
    order = np.argsort(-worth, kind="stable")[: 2 * MOST_NAMED]
    chosen: list[int] = []
    covered = 0
    for i in order:
        if len(chosen) == MOST_NAMED or worth[i] <= 0 or worth[i] < _WORTH * worth[order[0]] or covered >= _COVERED * total:
            break
        chosen.append(int(ids[i]))
        covered += int(times[i])
    return chosen


def _quoted(piece: str) -> str:
    """A token's text in quotation marks, its invisible characters made visible."""
    word = piece.strip(" ") or piece
    seen = "".join({"\n": "↵", "\t": "→", "\r": "␍"}.get(c, c if unicodedata.category(c)[0] != "C" else f"U+{ord(c):04X}") for c in word)
    inside = not piece.startswith(" ") and piece[:1].islower() and piece.isalpha()
    return f"“{'-' if inside else ''}{seen[:40]}”"


def _distinct(table: NDArray[np.int32], padding: int) -> NDArray[np.int32]:
    """The table with every value once in each row."""
    rows = np.sort(table, axis=1)
    rows[:, 1:][rows[:, 1:] == rows[:, :-1]] = padding
    return rows
