"""Which contexts are shown, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from mxd.explore import schema
from mxd.explore.bands import Text, Twins, blobs, choose, double_deciles, packed, ranks, text_of
from mxd.explore.codes import Firings
from mxd.explore.schema import Context, pack, unpack

LENGTH = 10


def firings(*units: list[tuple[int, float]]) -> Firings:
    """Of (token, activation) pairs by unit."""
    starts = np.cumsum([0, *(len(unit) for unit in units)])
    flat = [pair for unit in units for pair in unit]
    tokens = np.array([token for token, _ in flat], dtype=np.int64)
    values = np.array([value for _, value in flat], dtype=np.float32)
    return Firings(0, starts, tokens, values, values * 0, values * np.float32(0.1))


def test_ranks_and_double_deciles() -> None:
    found = firings([(1, 2.0), (2, 5.0), (3, 5.0), (4, 1.0), (5, 0.5)], [], [(7, 1.0)])
    rank = ranks(found)
    assert rank.tolist() == [2, 0, 1, 3, 4, 0], "of equal activations the earlier first"
    assert double_deciles(rank, np.array([5, 5, 5, 5, 5, 1])).tolist() == [3, 1, 2, 4, 5, 1]


def text(sequences: int = 40, documents: int = 40, seed: int = 0) -> tuple[NDArray[np.int64], Text]:
    ids = np.random.default_rng(seed).integers(0, 1000, (sequences, LENGTH))
    return ids, text_of(ids, np.arange(sequences) % documents, seed)


def test_every_band_shows_its_own_firings() -> None:
    _, around = text()
    unit = [(10 * s + 5, float(40 - s)) for s in range(40)]
    found = firings(unit)
    rank = ranks(found)
    chosen = choose(found, rank, around, 3)
    by_band = {band: rank[chosen.pairs[chosen.bands == band]].tolist() for band in range(6)}
    assert by_band[0] == [0, 1, 2], "the strongest"
    for band in range(1, 6):
        assert len(by_band[band]) == 3
        assert all(8 * (band - 1) <= r < 8 * band for r in by_band[band])
        assert by_band[band] == sorted(by_band[band])
    assert not set(by_band[1]) & {0, 1, 2}, "what the first band shows is not shown again"


def test_contexts_depend_on_seed_and_place_only() -> None:
    unit = [(10 * s + 5, float(s % 7 + 1)) for s in range(40)]
    drawn = [choose(firings(unit), ranks(firings(unit)), text_of(text()[0], np.arange(40), seed), 2).pairs.tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_each_document_once_before_any_twice() -> None:
    ids, _ = text()
    documents = np.array([0] * 38 + [1, 2])
    found = firings([(10 * s + 4 + p, 5.0 - p) for s in range(40) for p in range(5)])  # the weakest fifth: one in every sequence
    chosen = choose(found, ranks(found), text_of(ids, documents, 0), 4)
    shown = documents[found.tokens[chosen.pairs[chosen.bands == 5]] // LENGTH]
    assert sorted(shown.tolist()) == [0, 0, 1, 2]


def test_equal_windows_are_counted_not_repeated() -> None:
    ids = np.tile(np.arange(LENGTH), (12, 1))
    found = firings([(10 * s + 5, 2.0) for s in range(12)])
    chosen = choose(found, ranks(found), text_of(ids, np.arange(12), 0), 5)
    top = chosen.bands == 0
    assert chosen.repeats[top].tolist() == [12]
    assert found.tokens[chosen.pairs[top]].tolist() == [5]


def test_silent_twins_are_the_same_token_where_the_unit_is_off() -> None:
    ids = np.array([[9, 7, 1, 7, 2], [7, 7, 3, 4, 7]])
    twins = Twins(text_of(ids, np.array([0, 1]), 0))
    assert sorted(twins.of(7, np.array([1, 6]), 5).tolist()) == [3, 9], "not where it fires, not at the first of a sequence"
    assert twins.of(8, np.zeros(0, np.int64), 5).tolist() == []
    assert len({place // 5 for place in twins.of(7, np.zeros(0, np.int64), 2).tolist()}) == 2, "two documents before one twice"


def test_a_context_holds_what_the_unit_did_around_the_peak() -> None:
    _, around = text()
    found = firings([(23, 1.0), (25, 4.0), (31, 2.0)], [(25, 3.0)])
    rank = ranks(found)
    contexts = blobs(found, rank, choose(found, rank, around, 2), around)
    (first, second) = unpack(contexts[0, 0][1], contexts[0, 0][0])
    assert (first.seq, first.start, first.length, first.peak, first.rank) == (2, 0, 10, 5, 0)
    assert (first.a, first.delta) == (4.0, pytest.approx(0.4))
    assert first.offsets.tolist() == [3, 5] and first.levels.tolist() == [64, 255], "255ths of the largest, rounded up; its own only"
    assert (second.seq, second.peak, second.levels.tolist()) == (3, 1, [128])
    silent = packed(found, around, np.array([0]), np.array([schema.TWINS]), np.array([28]), np.array([1]))[0, schema.TWINS]
    (twin,) = unpack(silent[1], silent[0])
    assert (twin.peak, twin.a, twin.offsets.tolist()) == (8, 0.0, [3, 5]) and np.isnan(twin.delta)


def test_long_sequences_are_cut_around_the_peak() -> None:
    ids = np.random.default_rng(0).integers(0, 50, (2, 300))
    around = text_of(ids, np.array([0, 1]), 0)
    found = firings([(2, 1.0), (150, 3.0), (299, 2.0), (450, 1.5)])
    rank = ranks(found)
    contexts = [c for n, blob in blobs(found, rank, choose(found, rank, around, 4), around).values() for c in unpack(blob, n)]
    where = {(c.seq, c.start, c.length, c.peak) for c in contexts}
    assert where == {(0, 0, 128, 2), (0, 86, 128, 64), (0, 172, 128, 127), (1, 86, 128, 64)}


def test_contexts_survive_packing_and_damage_is_found() -> None:
    one = Context(7, 3, 20, 5, 2, 4, 1.5, float("nan"), np.array([5, 9], np.uint8), np.array([255, 1], np.uint8))
    data = pack([one, one])
    again = unpack(data, 2)[1]
    assert again[:7] == one[:7] and again.offsets.tolist() == [5, 9] and again.levels.tolist() == [255, 1]
    outside = one._replace(offsets=np.array([5, 20], np.uint8))
    far = one._replace(peak=20)
    for broken, n in [(data[:-1], 2), (data, 1), (data, 3), (pack([outside]), 1), (pack([far]), 1), (b"", 1)]:
        with pytest.raises(Exception, match="damaged"):
            unpack(broken, n)
