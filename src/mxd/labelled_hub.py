"""The five sample-level sets of the paper (arXiv 2505.21364), streamed by name from the Hugging Face hub.

Sizes, classes, the pairs of europarl and the characters skipped in code are those of the published code. Rows are taken in the order of
the stream where it draws them at random, and the split is ours (`labelled.split_of`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from . import assets
from .errors import TextError
from .labelled import PUBLISHED_PER_CLASS, Sample, Task, make
from .sources import SURROGATE, from_text

ROWS_AT_MOST = 4_000_000
"""Rows of a stream after which what has been found must do."""
CODE_SKIP = 150
"""Characters left out at the beginning of a file of code: licences."""
CODE_LEAST = 534
"""Characters of the shortest file of code that is taken."""
BIOS = {
    2: "attorney",
    6: "dentist",
    11: "journalist",
    18: "photographer",
    19: "physician",
    21: "professor",
    22: "psychologist",
    26: "teacher",
}
"""Professions with at least 2,500 biographies of either gender, the condition of the published code."""
PAIRS = {"en": "en-fr", "fr": "fr-it", "de": "de-en", "es": "es-fr", "nl": "nl-pt"}
"""Configuration of europarl out of which each language is read."""


class _Set(NamedTuple):
    about: str
    repository: str
    classes: tuple[str, ...]
    read: Callable[[Any], tuple[str, str, str] | None]
    """Text, class and quota (rows of one class share one quota, or one for each gender) of a row; None to pass it over."""
    quotas: int = 1
    """Quotas per class."""
    keep: str = "first"


def _bios(row: Any) -> tuple[str, str, str] | None:
    label = BIOS.get(int(row["profession"]))
    return (row["hard_text"], label, f"{label}/{row['gender']}") if label else None


def _amazon(row: Any) -> tuple[str, str, str] | None:
    label = {1: "negative", 5: "positive"}.get(int(float(row["rating"])))
    return (row["text"], label, label) if label else None


def _news(row: Any) -> tuple[str, str, str]:
    label = NEWS[int(row["label"])]
    return row["text"], label, label


def _code(row: Any) -> tuple[str, str, str] | None:
    if row["language"] not in CODE or len(row["code"]) <= CODE_LEAST:
        return None
    return row["code"][CODE_SKIP:], row["language"], row["language"]


NEWS = ("World", "Sports", "Business", "Sci/Tech")
CODE = ("C", "HTML", "Java", "PHP", "Python")
SETS: dict[str, _Set] = {
    "ag_news": _Set("news by section", "fancyzhx/ag_news", NEWS, _news),
    "github-code": _Set("files of source code", "codeparrot/github-code", CODE, _code, keep="last"),
    "amazon-reviews": _Set("product reviews", "canrager/amazon_reviews_mcauley_1and5", ("negative", "positive"), _amazon),
    "bias_in_bios": _Set("biographies by profession, as many of either gender", "LabHC/bias_in_bios", tuple(BIOS.values()), _bios, 2),
}


def _task(name: str) -> Task:
    wanted = SETS[name]
    each = PUBLISHED_PER_CLASS // wanted.quotas

    def samples() -> Iterator[Sample]:
        taken: dict[str, int] = {}
        for row in _rows(wanted.repository, None):
            try:
                made = wanted.read(row)
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise _other(wanted.repository, row, error) from error
            if made and taken.get(made[2], 0) < each and _usable(made[0]):
                taken[made[2]] = taken.get(made[2], 0) + 1
                yield _sample(name, made[0], made[1])
                if len(taken) == wanted.quotas * len(wanted.classes) and min(taken.values()) == each:
                    return

    return make(name, f"{wanted.about} ({wanted.repository})", samples(), wanted.classes, keep=wanted.keep)


def _europarl() -> Task:
    def samples() -> Iterator[Sample]:
        for language, pair in PAIRS.items():
            taken = 0
            for row in _rows("Helsinki-NLP/europarl", pair):
                try:
                    text = row["translation"][language]
                except (KeyError, TypeError) as error:
                    raise _other("Helsinki-NLP/europarl", row, error) from error
                if _usable(text):
                    taken += 1
                    yield _sample("europarl", text, language)
                if taken == PUBLISHED_PER_CLASS:
                    break

    return make("europarl", "sentences of the European Parliament (Helsinki-NLP/europarl)", samples(), list(PAIRS))


def _usable(text: Any) -> bool:
    return isinstance(text, str) and bool(text.strip()) and not SURROGATE.search(text)


def _sample(name: str, text: str, label: str) -> Sample:
    own = from_text(text).id
    return Sample(f"{name}/{own}", text, label, own)


def _rows(repository: str, configuration: str | None) -> Iterator[Any]:
    try:
        rows: Iterable[object] = assets.open_dataset(repository, configuration)[0]
        for number, row in enumerate(rows):
            if number == ROWS_AT_MOST:
                return
            yield row
    except Exception as error:
        raise TextError(
            f"cannot read the Hugging Face dataset {repository}",
            expected="a public dataset with a train part, and a network",
            got=f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}",
            next="connect, or leave the task out: the built-in ones need no hub (mxd eval --tasks)",
        ) from error


def _other(repository: str, row: Any, error: BaseException) -> TextError:
    fields = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
    return TextError(f"{repository} has other fields than the published protocol reads", expected=str(error), got=fields)


TASKS: dict[str, Callable[[], Task]] = {**{name: (lambda name=name: _task(name)) for name in SETS}, "europarl": _europarl}
"""The tasks of this file."""
