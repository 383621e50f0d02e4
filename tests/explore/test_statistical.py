"""Statistical labels with known answers: names are what units fire on, scores what they must be."""

from __future__ import annotations

import time

import numpy as np
import pytest

from mxd.explore import statistical
from mxd.explore.codes import Codes
from mxd.explore.detection import Text, dice
from mxd.explore.statistical import Known, Label, label
from mxd.explore.store import TextStore
from tests.explore import planted


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Known, Codes]:
    run = planted.planted_run(tmp_path_factory.mktemp("planted"))
    store = TextStore(run)
    return Known(Text.read(store), store), Codes(run, planted.STUDENT)


def of(made: tuple[Known, Codes], unit: int, seed: int = 0) -> Label:
    known, codes = made
    return label(known, *codes.active(unit), dice(seed, unit, "detection"))


def test_a_unit_on_one_token_has_its_name_and_is_always_found(made: tuple[Known, Codes]) -> None:
    assert of(made, 2) == Label("“w7”", 1.0, 70)
    assert of(made, 8) == Label("“w7”", 1.0, 70)


def test_a_unit_on_a_token_after_another(made: tuple[Known, Codes]) -> None:
    found = of(made, 3)
    assert found.text == "“w7” (after “w3”)"
    assert found.detection is not None and found.detection >= 0.85, "w7 after words that were never seen before it may be either"


def test_a_unit_on_many_tokens_is_found_without_a_short_name(made: tuple[Known, Codes]) -> None:
    found = of(made, 7)
    named = {f"“w{n}”" for n in range(20, 40)}
    assert len(set(found.text.split(", ")) & named) == 4 and found.detection is not None and found.detection > 0.6


def test_a_random_unit_is_found_no_better_than_by_chance(made: tuple[Known, Codes]) -> None:
    known, _ = made
    scores: list[float] = []
    inside = np.flatnonzero(np.arange(known.ids.size) % planted.LENGTH)
    for seed in range(60):
        rng = np.random.default_rng(seed)
        tokens = np.sort(rng.choice(inside, 390, replace=False))
        found = label(known, tokens, rng.random(len(tokens)).astype(np.float32), dice(seed, 0, "detection"))
        assert found.detection is not None and found.n == 70
        scores.append(found.detection)
    # The standard error of one score is .065, of the mean of sixty .008.
    assert abs(float(np.mean(scores)) - 0.5) < 0.035


def test_what_cannot_be_scored_says_why(made: tuple[Known, Codes]) -> None:
    assert of(made, 0) == Label(statistical.NEVER, None, None)
    always = of(made, 1)
    assert always.text.endswith("(not scored: silent in too few texts)") and always[1:] == (None, None)
    rare = of(made, 5)
    assert rare.text.endswith("(not scored: fires in too few texts)") and rare[1:] == (None, None)


def test_invisible_characters_are_made_visible(made: tuple[Known, Codes]) -> None:
    name = of(made, 6).text
    assert "U+202E" in name and "\u202e" not in name and "\n" not in name and len(name) < 60


@pytest.mark.parametrize(
    ("piece", "name"),
    [
        (" at", "“at”"),
        ("At", "“At”"),
        ("ing", "“-ing”"),
        ("\n", "“↵”"),
        ("\t", "“→”"),
        (" ", "“ ”"),
        ("“", "“““"[:2] + "”"),
        ("\x00", "“U+0000”"),
        ("123", "“123”"),
    ],
)
def test_tokens_as_they_stand_in_a_name(piece: str, name: str) -> None:
    assert statistical._quoted(piece) == name


def test_a_token_without_text_is_called_by_what_it_is_for(made: tuple[Known, Codes]) -> None:
    known, _ = made
    assert known.name(7) == "“w7”"
    assert known.name(0) == "start of text" and known.name(900) == "end of text" and known.name(901) == "“<pad>”"


def test_what_is_usual_is_counted_in_the_half_for_making_labels(made: tuple[Known, Codes]) -> None:
    known, _ = made
    inside = known.text.ids[~known.text.testing, 1:]
    assert known.count[7] == (inside == 7).sum() and known.tokens == inside.size == known.pair_count.sum()
    pair = int(np.flatnonzero((known.first_of_pair == 3) & (known.second_of_pair == 7))[0])
    assert known.pair_count[pair] == ((inside == 7) & (known.text.ids[~known.text.testing, :-1] == 3)).sum() > 100


def test_the_tested_half_has_no_part_in_the_name_or_the_rates(made: tuple[Known, Codes]) -> None:
    """Firings on another token in the half for testing change the score and nothing else."""
    known, codes = made
    tokens, _ = codes.active(2)
    testing = known.text.testing[tokens // planted.LENGTH]
    other = np.flatnonzero((known.ids == 100) & known.text.testing[np.arange(known.ids.size) // planted.LENGTH])
    other = other[other % planted.LENGTH > 0]
    changed = np.sort(np.concatenate([tokens[~testing], other]))
    found = label(known, changed, np.ones(len(changed), np.float32), dice(0, 2, "detection"))
    assert found.text == "“w7”" and found.detection is not None and found.detection < 0.65


def test_labels_are_quick(made: tuple[Known, Codes]) -> None:
    begun = time.perf_counter()
    for _ in range(50):
        of(made, 2)
    assert (time.perf_counter() - begun) / 50 < 0.05, "20,000 units in minutes"
