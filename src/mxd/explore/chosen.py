"""Which units of a student are exported: those named, those starred, or the first by a column."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from ..checkpoint import Run, StudentRecord
from ..errors import ConfigError, RunError, nearest
from . import schema
from .notes import Notes
from .store import UnitStore, units_path

Units = Sequence[int] | Literal["starred"] | None


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which units."""

    units: Units = None
    """Numbers, "starred", or None for the first by a column."""
    top: int | None = None
    """How many of those; None: all that fired."""
    by: str = "effect"
    """The column, a name out of `schema.COLUMNS`, the largest value first."""


def collected(run: Run, names: Sequence[str] = ()) -> list[StudentRecord]:
    """The students of these names, or all of which something was collected.

    Raises:
        RunError: no such student, it has no units, or nothing was collected.
    """
    found = [run.student(name) for name in names] or [record for record in run.students if units_path(run, record.name).is_file()]
    for record in found:
        if not record.n_units:
            raise RunError(f"{record.name} has no units", expected="a student with experts or latents", next=f"mxd info {run.path}")
    if not found:
        raise RunError(f"nothing was collected about {run.path}", expected="explore/STUDENT.sqlite", next=f"mxd collect {run.path}")
    return found


def chosen(run: Run, store: UnitStore, student: str, choice: Choice, *, others: bool = False) -> list[int]:
    """The chosen units of one student: in the order given, by number where starred, or the largest first.

    Args:
        others: with other students, so that it is no error if none of this one is starred.

    Raises:
        ConfigError: there is no such unit or column, no unit is starred, or the column is known of none.
        RunError: what was collected is damaged.
    """
    if choice.units == "starred":
        weights = run.weights_sha256(student)
        starred = sorted(n["unit"] for n in Notes(run).all() if n["star"] and n["weights_sha"] == weights and n["unit"] < store.n_units)
        if not starred and not others:
            raise ConfigError(f"no unit of {student} is starred", expected="stars, set on the page", next=f"mxd explore {run.path}")
        return starred
    if choice.units is not None:
        if strange := [unit for unit in choice.units if not 0 <= unit < store.n_units]:
            raise ConfigError(f"no unit {strange[0]} of {student}", expected=f"0 to {store.n_units - 1}", got=str(strange[0]))
        return list(dict.fromkeys(choice.units))
    if choice.by not in schema.COLUMNS:
        raise ConfigError("no such column", expected=nearest(choice.by, schema.COLUMNS), got=choice.by)
    columns = store.columns(("fires", choice.by))
    fired = np.flatnonzero(columns["fires"] > 0)
    if choice.top is None:
        return [int(unit) for unit in fired]
    known = fired[np.isfinite(columns[choice.by][fired])]
    if not len(known) and len(fired):
        raise ConfigError(f"{choice.by} is not known of any unit of {student}", expected="a column with numbers", next="--by fires")
    order = np.argsort(-columns[choice.by][known], kind="stable")[: choice.top]
    return [int(unit) for unit in known[order]]
