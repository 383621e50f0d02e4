"""From the answers of probes to figures: F1 and balanced accuracy, means over classes, intervals over documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...config import EvalConfig
from ..bootstrap import resampled_sums
from .probes import Outcome, balanced_accuracy, counts, f1

Array = NDArray[np.float64]


class Row(NamedTuple):
    """Probes of every class of a task."""

    source: str
    """``student``, ``random``, ``neurons``, ``shuffled`` or ``dense``."""
    feature: str
    """``pre`` (scores before ReLU and TopK), ``code`` (after), or ``y``."""
    size: int
    """Units per probe; 0: all of y."""
    outcomes: list[Outcome]
    """One per class."""


def figures_of(
    classes: Sequence[str], rows: Sequence[Row], test: tuple[NDArray[np.bool_], Sequence[str]], config: EvalConfig
) -> dict[str, Any]:
    """``figures``: source -> feature -> ``k1`` … -> {f1, …, classes}; ``above``: how much the student is above random units and neurons.

    Intervals resample groups of test samples, the same resamples for every row: differences are paired.

    Args:
        classes: names.
        rows: the probes.
        test: labels [class, test sample], and the group of every test sample.
        config: bootstrap and seed.
    """
    if not rows:
        return {"figures": {}, "above": {}}
    labels, groups = test
    names = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    of = np.array([names[group] for group in groups])
    each = counts(np.stack([[o.predicted for o in row.outcomes] for row in rows]), labels[None])  # [row, class, sample, 4]
    sums = np.zeros((len(names), each[:, :, 0].size))
    np.add.at(sums, of, np.moveaxis(each, 2, 0).reshape(len(of), -1))
    drawn = resampled_sums(sums, resamples=config.bootstrap, seed=config.seed)
    shape = (len(rows), len(classes), 4)
    whole, many = sums.sum(0).reshape(shape), drawn.reshape(-1, *shape)
    with np.errstate(invalid="ignore"):
        values = {name: (rate(whole), rate(many)) for name, rate in (("f1", f1), ("balanced_accuracy", balanced_accuracy))}
    figures: dict[str, Any] = {}
    for r, row in enumerate(rows):
        mean = {name: (one[r].mean(), several[:, r].mean(1)) for name, (one, several) in values.items()}
        own: list[dict[str, Any]] = [{"class": c, "units": list(o.units)} for c, o in zip(classes, row.outcomes, strict=True)]
        for c, cell in enumerate(own):
            cell.update(_cells({name: (one[r, c], several[:, r, c]) for name, (one, several) in values.items()}))
            cell["chosen_f1"] = row.outcomes[c].chosen_f1
        figures.setdefault(row.source, {}).setdefault(row.feature, {})[f"k{row.size}"] = {**_cells(mean), "classes": own}
    place = {(row.source, row.feature, row.size): r for r, row in enumerate(rows)}
    return {"figures": figures, "above": {c: _above(c, place, *values["f1"]) for c in ("random", "neurons")}}


def _cells(values: dict[str, tuple[Any, Array]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (value, drawn) in values.items():
        found[name] = float(value)
        found[f"{name}_ci95"] = _interval(drawn)
    return found


def _interval(drawn: Array) -> list[float]:
    finite = drawn[np.isfinite(drawn)]
    return [float("nan")] * 2 if not len(finite) else [float(q) for q in np.percentile(finite, [2.5, 97.5])]


def _above(control: str, place: dict[tuple[str, str, int], int], one: Array, many: Array) -> dict[str, Any]:
    """Mean F1 of the student's single units minus that of a control, with a paired interval; and whether their own intervals part."""
    found: dict[str, Any] = {}
    for feature in ("pre", "code"):
        a, b = place.get(("student", feature, 1)), place.get((control, feature, 1))
        if a is not None and b is not None:
            own, other = _interval(many[:, a].mean(1)), _interval(many[:, b].mean(1))
            found[feature] = {
                "difference": float(one[a].mean() - one[b].mean()),
                "difference_ci95": _interval((many[:, a] - many[:, b]).mean(1)),
                "disjoint": own[0] > other[1],
            }
    return found
