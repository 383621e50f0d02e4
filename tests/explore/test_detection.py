"""Which texts labels are made from and tested on: halves, windows, deciles, silent ones, and balanced accuracy by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mxd.explore import detection
from mxd.explore.detection import DECILES, DETECTION, EXAMPLES, FUZZING, SILENT, WRONG, Text, balanced_accuracy, dice


def text_of(sequences: int = 40, length: int = 70, documents: int = 10) -> Text:
    ids = np.arange(sequences * length, dtype=np.int32).reshape(sequences, length)
    return Text(ids, np.arange(sequences) * documents // sequences)


def test_windows_cover_every_token_but_the_first_of_a_sequence() -> None:
    text = text_of(length=70)
    assert text.per_sequence == 3
    for sequence in (0, 7):
        for position in range(1, 70):
            window = int(text.window_of(np.array([sequence * 70 + position]))[0])
            seq, start, end = text.span(window)
            assert seq == sequence and start <= position < end and end - start in (32, 5)
    table = text.table(text.ids, -1)
    for window in (0, 1, 2, 22):
        seq, start, end = text.span(window)
        assert table[window][: end - start].tolist() == text.ids[seq, start:end].tolist() and (table[window][end - start :] == -1).all()
    whole = text_of(length=65)
    assert whole.per_sequence == 2 and whole.span(1) == (0, 33, 65)


def test_no_document_is_in_both_halves_and_they_are_about_as_large() -> None:
    documents = np.repeat(np.arange(9), [40, 1, 2, 3, 20, 8, 8, 8, 10])
    text = Text(np.zeros((100, 9), np.int32), documents)
    assert abs(int(text.testing.sum()) - 50) <= 1
    assert not set(documents[text.testing]) & set(documents[~text.testing])
    both = np.concatenate([text.windows(testing=True), text.windows(testing=False)])
    assert sorted(both) == list(range(100 * text.per_sequence))


def test_of_a_single_document_sequences_are_kept_apart() -> None:
    text = Text(np.zeros((10, 9), np.int32), np.zeros(10, np.int64))
    assert text.testing.sum() == 5


def test_fired_windows_and_their_strongest_activation() -> None:
    text = text_of(length=65)
    tokens = np.array([1, 32, 33, 65 + 64])
    found = detection.fired(text, tokens, np.array([1.0, 3.0, 2.0, 5.0], np.float32))
    assert found.windows.tolist() == [0, 1, 3] and found.top.tolist() == [3.0, 2.0, 5.0]
    nothing = detection.fired(text, np.zeros(0, np.int64), np.zeros(0, np.float32))
    assert len(nothing.windows) == 0


def test_a_test_has_five_of_each_decile_and_twenty_silent_ones_of_the_other_half() -> None:
    text = text_of(sequences=800, length=33, documents=200)
    tokens = np.arange(0, 800, 2) * 33 + 5
    values = np.linspace(0.1, 9, len(tokens)).astype(np.float32)
    found = detection.fired(text, tokens, values)
    held_out = text.windows(testing=True)
    on, deciles, off = detection.detection_test(text, found, held_out, dice(0, 3, "detection"))
    assert len(on) == DETECTION * DECILES and len(off) == SILENT and len(set(on)) == len(on) and len(set(off)) == len(off)
    assert text.testing[on].all() and text.testing[off].all(), "one window a sequence here"
    assert set(on) <= set(found.windows) and not set(off) & set(found.windows)
    tops = dict(zip(found.windows.tolist(), found.top.tolist(), strict=True))
    limits = np.quantile([tops[w] for w in found.windows if text.testing[w]], np.arange(11) / 10)
    for window, decile in zip(on.tolist(), deciles.tolist(), strict=True):
        assert limits[decile - 1] - 0.1 <= tops[window] <= limits[decile] + 0.1
    again = detection.detection_test(text, found, held_out, dice(0, 3, "detection"))
    assert all((a == b).all() for a, b in zip((on, deciles, off), again, strict=True))
    other = detection.detection_test(text, found, held_out, dice(1, 3, "detection"))
    assert (other[0] != on).any()


def test_silent_windows_are_found_where_there_are_few() -> None:
    text = text_of(sequences=400, length=33)
    tokens = np.arange(3, 400) * 33 + 5
    found = detection.fired(text, tokens, np.ones(len(tokens), np.float32))
    assert sorted(detection.silent(found, np.arange(400), 20, dice(0, 0, "x"))) == [0, 1, 2]
    assert len(detection.silent(found, np.zeros(0, np.int64), 20, dice(0, 0, "x"))) == 0


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ([1] * 50 + [0] * 20, 1.0),
        ([1] * 70, 0.5),
        ([0] * 70, 0.5),
        ([0] * 50 + [1] * 20, 0.0),
        ([1] * 40 + [0] * 10 + [0] * 5 + [1] * 15, 0.525),
    ],
)
def test_balanced_accuracy_by_hand(said: list[int], score: float) -> None:
    truth = np.arange(70) < 50
    assert balanced_accuracy(truth, np.array(said, bool)) == pytest.approx(score)


def test_too_few_of_either_sort_are_no_score() -> None:
    for yes, no in ((4, 20), (20, 4), (0, 0), (0, 20)):
        truth = np.arange(yes + no) < yes
        assert balanced_accuracy(truth, truth) is None
    truth = np.arange(10) < 5
    assert balanced_accuracy(truth, truth) == 1.0


def test_the_published_protocol() -> None:
    assert (DECILES, DETECTION, SILENT, FUZZING, WRONG) == (10, 5, 20, 7, 2) and EXAMPLES == 4
