"""What a reader of a run's numbers should be careful with, each in a sentence with the number behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DEAD = 0.2
"""A larger share of units that fired on no token is said."""
FEW_TOKENS = 1_000_000
ROUTING = 3.0
"""Nats lost when every unit writes what another would have, as a multiple of the excess cross-entropy: below, the dense path does much."""

Student = Mapping[str, Any]


def of_run(students: Sequence[Student], run: Path) -> list[dict[str, Any]]:
    """The banners of all students, in their order."""
    found: list[dict[str, Any]] = []
    for student in students:
        found += _routing(student)
        store = student["store"]
        if store:
            found += _firing(student, store) + _collected(student, store, run)
    return found


def _banner(student: Student, level: str, text: str, about: str) -> dict[str, Any]:
    return {"level": level, "student": student["name"], "text": text, "about": about}


def _routing(student: Student) -> list[dict[str, Any]]:
    """Whether it matters which expert fires."""
    figures = student["figures"] or {}
    nats = _number(figures, "anatomy", "causality", "nats", "value")
    excess = _number(figures, "excess_ce")
    about = "routing"
    if nats is not None and excess is not None and excess > 0 and nats < ROUTING * excess:
        text = f"Routing is worth {nats:.3f} nats, {nats / excess:.1f} × the excess cross-entropy: much of this student is its dense path."
        return [_banner(student, "warn", text, about)]
    if (figures.get("routing") or {}).get("experts_matter") is False and not student["is_control"]:
        text = "Of the tests whether it matters which expert fires (N_r, G_r, ID), not all exceed 0 with their intervals."
        return [_banner(student, "warn", text, about)]
    return []


def _firing(student: Student, store: Mapping[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    units, word, tokens = student["n_units"], f"{student['word']}s", store["tokens"] or 0
    if store["dead"] > DEAD * units:
        text = f"{store['dead']:,} of {units:,} {word} ({100 * store['dead'] / units:.0f} %) are dead: 0 of {tokens:,} tokens."
        found.append(_banner(student, "warn", text, "dead"))
    if store["shared"]:
        one = store["shared"] == 1
        text = f"{store['shared']:,} {student['word'] if one else word} {'fires' if one else 'fire'} on more than half of the tokens."
        found.append(_banner(student, "note", text, "shared"))
    return found


def _collected(student: Student, store: Mapping[str, Any], run: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if store["weights_sha256"] != student["weights_sha256"]:
        text = f"This was collected from other weights than those in the run now. Next: mxd collect {run}"
        found.append(_banner(student, "warn", text, "weights"))
    if store["tokens"] is not None and store["tokens"] < FEW_TOKENS:
        text = f"Collected on {store['tokens']:,} tokens: of rarer units than 1 in {store['tokens'] // 30:,} little is known."
        found.append(_banner(student, "note", text, "tokens"))
    return found


def _number(figures: Mapping[str, Any], *path: str) -> float | None:
    """A number deep in a report; None if it is not there."""
    found: Any = figures
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return float(found) if isinstance(found, (int, float)) and not isinstance(found, bool) else None
