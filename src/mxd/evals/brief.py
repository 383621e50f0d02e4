"""The few figures of a part that a study keeps: no text, nothing per sample, small enough to stand in a repository."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..config import PARTS

_LEFT_OUT: dict[str, tuple[str, ...]] = {
    "generation_agreement": ("samples", "identical_tokens", "documents"),
    "steering": ("examples", "units", "points", "host_text"),
    "anatomy": ("coactivation", "token_types", "histogram", "curve"),
    "selectivity": ("units",),
    "cost": (),
}


def brief(student: Mapping[str, Any]) -> dict[str, Any]:
    """By part: its figures without texts, lists of samples and numbers of units; of the probes the means over classes.

    A part that could not be measured keeps its ``missing``.
    """
    found: dict[str, Any] = {}
    for part in PARTS:
        figures = student.get(part)
        if figures:
            short = figures if "missing" in figures else _probes(figures) if part == "probes" else _without(figures, _LEFT_OUT[part])
            found[part] = short
    return found


def _without(value: Any, names: tuple[str, ...]) -> Any:
    if isinstance(value, Mapping):
        return {key: _without(item, names) for key, item in value.items() if key not in names}
    return [_without(item, names) for item in value] if isinstance(value, list) else value


def _probes(figures: Mapping[str, Any]) -> dict[str, Any]:
    """{task: {row: {feature: {f1, f1_ci95, best}}}} of the probes on one unit, and whether the student is above random units."""
    tasks: dict[str, Any] = {}
    for name, task in figures["tasks"].items():
        rows = {row: _means(features) for row, features in task["figures"].items()}
        tasks[name] = {"rows": rows, "above": task["above"], "floor": task["floor"]}
    return {"tasks": tasks, "skipped": figures["skipped"]}


def _means(features: Mapping[str, Any]) -> dict[str, Any]:
    # One unit (k1); the probe on all of y, which chooses no units, stands under k0.
    one = {feature: cell.get("k1") or cell["k0"] for feature, cell in features.items() if cell}
    return {feature: {**_scores(cell), "best": _best(cell["classes"])} for feature, cell in one.items()}


def _scores(cell: Mapping[str, Any]) -> dict[str, Any]:
    return {name: cell[name] for name in ("f1", "f1_ci95", "balanced_accuracy", "balanced_accuracy_ci95") if name in cell}


def _best(classes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The class that was probed best on the samples that choose: its figures on test were no part of the choice."""
    best = max(classes, key=lambda cell: cell["chosen_f1"])
    return {"class": best["class"], **_scores(best)}
