"""Which of the built-in Wikipedia leads, by language, the students of a run were trained on: what notes of a report say of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CORPORA = {"wiki-en": "English", "wiki-fr": "French", "wiki-es": "Spanish"}
"""Built-in corpora whose articles are also labelled texts, and their languages."""


def trained_on(info: Mapping[str, Any]) -> list[str]:
    """Names of the sources of a run's training text, from what the run knows of itself; empty if it does not say."""
    return [str(source.get("name")) for source in (info.get("text") or {}).get("sources", [])]


def seen_in_training(names: Sequence[str]) -> str:
    """A sentence or two on which of the labelled Wikipedia leads were training text, from `trained_on`."""
    seen, rest = ([language for name, language in CORPORA.items() if (name in names) == wanted] for wanted in (True, False))
    if not names:
        return "What the students were trained on is not known: Wikipedia leads may be among it."
    if not seen:
        return "None of the built-in Wikipedia corpora was training text."
    text = f"Most of the measured Wikipedia leads in {_all(seen)} were training texts of the students, of every kind, without labels."
    return text + (f" The corpora in {_all(rest)} were not training text." if rest else "")


def _all(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
