"""What a part of the evaluation suite is: measured student by student, kept on its own, and shown in every report in the same form.

A part is a module of `mxd.evals` with a `Part` called ``PART``; `mxd.evals.suite` lists them. Its figures for one student are one
JSON-able dict, which stands in report.json under the part's name, and from which alone tables, plots and words are made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from ..checkpoint import Run, StudentRecord
from ..config import EvalConfig
from ..layers import SparseLayer
from .svg import Figure

if TYPE_CHECKING:
    from ..host import Host
    from ..text import Corpus

Value = TypeVar("Value")
Found = dict[str, Any]
"""The figures of one part for one student, as they go into report.json; ``{"missing": why}`` where it could not be measured."""
Student = Mapping[str, Any]
"""One entry of ``students`` in report.json."""


class Shared:
    """What several students' measurements have in common (the host's own texts, activations), made once per part."""

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """What `make` returned when it was first called under `key`."""
        if key not in self._made:
            self._made[key] = make()
        return cast("Value", self._made[key])


@dataclass(frozen=True)
class Subject:
    """One student to be measured, and all that stands around it."""

    run: Run
    """The run it belongs to."""
    record: StudentRecord
    """What the run knows of it: name, kind, k, hookpoint, seed."""
    layer: SparseLayer
    """The trained layer, on the host's device, in evaluation mode (with ``--edit``: as edited)."""
    host: Host
    """The host, with its own MLPs in place. A part leaves it as it found it."""
    corpus: Corpus
    """The texts the run was trained on, split by document."""
    config: EvalConfig
    """What was asked for."""
    shared: Shared
    """Of all students in this part."""
    say: Callable[[float, str], None]
    """Called with the fraction of this student's measurement that is done (0 to 1), and a word on what is being done."""

    @property
    def hookpoint(self) -> str:
        """The MLP it stands in for."""
        return self.record.hookpoint

    @property
    def paper(self) -> bool:
        """Whether the published protocol is to be followed to the letter (``--suite paper``)."""
        return self.config.suite == "paper"


class Table(NamedTuple):
    """A table of a report."""

    caption: str
    """What it shows, and the unit of its numbers."""
    heads: Sequence[str]
    """Headings; the first column names the row."""
    rows: Sequence[Sequence[str]]
    """Cells, as text (`mxd.evals.svg.number` makes numbers into text); in report.html what follows `` [`` stands on a line of its own."""
    folded: bool = False
    """Whether report.html shows it only when asked: for tables of detail."""


class Section(NamedTuple):
    """What a report shows of one part."""

    title: str
    """Its heading."""
    words: Sequence[str] = ()
    """What follows from the figures and what does not: one sentence or a few each."""
    tables: Sequence[Table] = ()
    """Its tables."""
    figures: Sequence[tuple[str, Figure]] = ()
    """Its plots, each with a caption."""
    html: str = ""
    """More, for report.html only; whatever is from a model or a text in it must have gone through `svg.escape`."""
    notes: Sequence[str] = ()
    """How to read it: protocol, sizes, what an interval covers."""


class Part(NamedTuple):
    """One part of the suite."""

    name: str
    """Key in report.json, name in ``--parts``."""
    version: int
    """Raised whenever the same options come to mean other figures; results kept under another version are measured again."""
    options: Sequence[str]
    """Fields of `EvalConfig` that its figures depend on, besides suite, split, seed and edit."""
    measure: Callable[[Subject], Found]
    """Measures one student. May raise `MxdError`: the part is then reported as missing for this student, with that line."""
    show: Callable[[Sequence[Student]], Sequence[Section]]
    """Makes sections of the students of one hookpoint (entries of report.json; only those that have the part)."""
    on_machine: bool = False
    """Whether its figures hold for one machine only (times): kept ones of another device or number of threads are measured again."""


def finite(value: Any) -> Any:
    """`value` with every number that is NaN or infinite replaced by None, tuples by lists: what JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def missing(why: str) -> Found:
    """The figures of a part that could not be measured; `why` says so in a sentence."""
    return {"missing": why}


def measured(students: Sequence[Student], part: str) -> list[Student]:
    """Those of `students` for which `part` has figures."""
    return [s for s in students if s.get(part) and "missing" not in s[part]]
